"""Pieces into files beside the computing, in threads of their own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxref.memory import WAITING
from jaxref.pieces import Piece
from jaxref.selection import take_rows
from jaxref.stage_file import StageFile
from jaxref.stages import STAGES
from jaxref.tree import Tree, stage_path
from jaxref.writing import naming

if TYPE_CHECKING:
    from jaxref.dump import Job

WRITERS = 2
STAGE_ORDER = {name: place for place, name in enumerate(STAGES)}


class Writer:
    """Writes pieces beside the computing, those of one file in the order they come.

    A fault while writing is raised at the next `put`, or by `finish`; one of the two, `finish` or `stop`, is its end.
    """

    def __init__(self, job: Job, tree: Tree) -> None:
        self.job, self.tree = job, tree
        self.entries: list[dict[str, Any]] = []
        self.logits: np.ndarray | None = None
        # Several single threads and not one pool: the blocks of a file must keep their order.
        self._pools = [ThreadPoolExecutor(1, "jaxref-write") for _ in range(WRITERS)]
        self._room = threading.Condition()
        self._waiting = 0  # bytes
        self._busy = 0  # threads
        self._files: dict[tuple[int | None, str], StageFile] = {}
        self._failed: BaseException | None = None

    def offer(self, layer: int | None, piece: Piece) -> None:
        """Take a piece if it is wanted; of `lm_head` keep the last row in any case."""
        if piece.stage == "lm_head":
            self.logits = np.asarray(piece.value)[-1].astype(np.float64)
        if self.job.selection.wants(layer, piece.stage):
            self.put(layer, piece)

    def put(self, layer: int | None, piece: Piece) -> None:
        """Hand over a piece; waits while too much is waiting for the disk."""
        size = piece.value.nbytes
        with self._room:
            self._room.wait_for(lambda: self._failed or not self._waiting or self._waiting + size <= WAITING)
            if self._failed:
                raise self._failed
            self._waiting += size
        place = STAGE_ORDER[piece.stage] + (layer or 0)
        self._pools[place % WRITERS].submit(self._work, layer, piece)

    def _work(self, layer: int | None, piece: Piece) -> None:
        with self._room:
            self._busy += 1
        try:
            if not self._failed:
                with naming(self.job.output / stage_path(layer, piece.stage, self.job.form)):
                    self._write(layer, piece)
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits
            self._failed = error
        finally:
            with self._room:
                self._busy -= 1
                self._waiting -= piece.value.nbytes
                self._room.notify_all()

    def _write(self, layer: int | None, piece: Piece) -> None:
        stage, selection = STAGES[piece.stage], self.job.selection
        value = np.asarray(piece.value)
        if self.job.convention == "apr" and piece.stage == "attn_scores":
            value = np.tril(value, piece.row)
        if not piece.selected:
            value = take_rows(value, stage, selection.rows(stage), piece.row)
        if value.shape[stage.row_axis] == 0:
            return  # a block without any of the selected positions
        key = (layer, piece.stage)
        if key not in self._files:
            shape = selection.shape(stage)
            self._files[key] = StageFile(self.job.output, stage, layer, shape, self.job.form, value.dtype)
        if self._files[key].write(value):
            file = self._files.pop(key)
            entry = file.close(self.tree.stated(file.path))
            self.tree.add(entry)
            self.entries.append(entry)

    def finish(self) -> None:
        """Wait until all is written; of a file whose rows did not all come, nothing is left. Raises what went wrong."""
        for pool in self._pools:
            pool.shutdown()
        self._discard()
        if self._failed:
            raise self._failed

    def stop(self, error: BaseException) -> None:
        """Drop what is not begun, wait for what is, and leave no half file.

        `shutdown` does not tell when that is: Ctrl-C in it, or where a thread starts, makes Python forget the thread.
        """
        self._failed = self._failed or error
        with self._room:
            self._room.wait_for(lambda: not self._busy)
        self._discard()
        for pool in self._pools:
            pool.shutdown(wait=False)

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
