"""Checkpoint + tokens → tree of files, with the files written beside the computing."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxref.activations import coarsest_activation
from jaxref.devices import described, memory_limit, out_of_memory_in_words
from jaxref.memory import WAITING, MemoryPlan, plan_memory, workspace
from jaxref.mesh import TENSOR
from jaxref.model import Piece
from jaxref.precision import PRECISION, Device, Numerics
from jaxref.reader import Reader
from jaxref.selection import Selection, take_rows
from jaxref.stage_file import StageFile
from jaxref.stages import STAGES, keys_of
from jaxref.stream import stream, trace
from jaxref.tree import SUFFIXES, Tree, stage_path
from jaxref.writing import naming
from weights import Checkpoint, UserError

WRITERS = 2
STAGE_ORDER = {name: place for place, name in enumerate(STAGES)}
Offer = Callable[[int | None, Piece], None]  # layer (None: whole model) and a stage's value
Progress = Callable[[int], None]
PACKAGES = ("jaxref", "jax", "jaxlib", "numpy", "ml_dtypes")


@dataclass(frozen=True)
class Job:
    """One dump: what is computed, from which tokens, and where it goes."""

    checkpoint: Checkpoint
    tokens: list[int]
    selection: Selection
    numerics: Numerics
    output: Path
    form: str = "aprt"
    prompt: str | None = None
    hash_weights: bool = False
    convention: str = "canonical"  # "apr": zeros above the diagonal of the scores, as that engine writes them
    device: Device | None = None  # None: where JAX would compute anyway
    as_stored: bool = False  # round activations as an engine does before weights stored so
    mesh: Mesh | None = None  # several devices, of which `device` is the first
    max_memory: int | None = None  # bytes on a device; None: 90 % of what is free there, if JAX knows it

    def memory(self) -> MemoryPlan:
        """What the job needs on a device while the layers are streamed."""
        ways = 1 if self.mesh is None else self.mesh.shape[TENSOR]
        platform = "cpu" if self.device is None else self.device.platform
        return plan_memory(self.selection, self.numerics, ways=ways, workspace=workspace(platform))

    def run(self, producer: str, packages: Sequence[str], device: dict[str, Any], precision: str) -> dict[str, Any]:
        """What the bytes depend on, as JSON values; the head of the manifest."""
        positions = self.selection.positions
        return {
            "producer": producer,
            "model": self.checkpoint.name,
            "config": self.checkpoint.config.to_json(),
            "weights": self.checkpoint.identity(whole_files=self.hash_weights),
            "tokens": self.tokens,
            "prompt": self.prompt,
            "positions": list(positions) if isinstance(positions, tuple) else positions,
            "dtype": self.numerics.name,
            "activations": coarsest_activation(self.checkpoint) if self.as_stored else self.numerics.name,
            "matmul_precision": precision,
            "format": self.form,
            "convention": self.convention,
            "device": device,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def itemsize(self) -> int:
        """Bytes a number in a file."""
        return 4 if self.form == "aprt" else self.numerics.compute.itemsize

    def paths(self) -> list[str]:
        """The files of this dump, in computation order."""
        return [stage_path(*key, self.form) for key in self.selection.keys()]


@dataclass
class Report:
    """What a dump did: its manifest and the manifest's lines; the logits of the last position, if computed."""

    manifest: Path
    files: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0  # bytes written
    read: int = 0  # bytes of tensors read from the checkpoint
    logits: np.ndarray | None = None  # [V]


def dump(job: Job, *, progress: Progress = lambda layer: None, source: Reader | None = None, **options: Any) -> Report:
    """Write the tree of a job. Raises `UserError` before anything is written where it can't be.

    `progress` is called with each layer that is done. `warn` among the options takes warnings about weights. A `source`
    that holds the parameters already is used in place of the checkpoint's files.
    """
    device = job.device or jax.devices()[0]
    job = replace(job, device=device)

    def feed(offer: Offer) -> None:
        # Closed here and not by the garbage collector, whenever that comes, where `offer` gives up.
        with closing(pieces), out_of_memory_in_words(), job.numerics.context(), jax.default_device(device):
            for layer, piece in pieces:
                if device.platform != "cpu" and job.selection.wants(layer, piece.stage):
                    _send_home(piece)
                offer(layer, piece)

    if source is None:
        plan, place = job.memory().fit(memory_limit(device, job.max_memory)), device if job.mesh is None else job.mesh
        options |= {"progress": progress, "as_stored": job.as_stored, "read_ahead": plan.read_ahead}
        pieces = stream(job.checkpoint, job.tokens, job.selection, job.numerics, place, **options)
    else:
        pieces = trace(source, job.tokens, job.selection, progress)
    report = write_tree(job, job.run("jaxref", PACKAGES, described(device, job.mesh), PRECISION.name), feed)
    report.read = job.checkpoint.bytes_read
    return report


def _send_home(piece: Piece) -> None:
    """Begin to bring a value back from the device, under the computing that follows."""
    if isinstance(piece.value, jax.Array):  # what goes on inside experts is on this side already
        piece.value.copy_to_host_async()


def write_tree(job: Job, run: dict[str, Any], feed: Callable[[Offer], None]) -> Report:
    """Write what `feed` offers, stage by stage, as the tree of this job; `run` is the head of its manifest.

    Raises `UserError` before anything is written where it can't be.
    """
    if not job.selection.keys():
        raise UserError("nothing to write: no stage of this selection exists")
    if not job.tokens:
        raise UserError("the prompt is empty; at least one token is needed")
    if outside := [t for t in job.tokens if not 0 <= t < job.checkpoint.config.vocab_size]:
        size = job.checkpoint.config.vocab_size
        raise UserError(f"token ids {outside[:8]} are outside the vocabulary, which has ids 0 to {size - 1}")
    with Tree(job.output, run, job.paths(), job.selection.size(job.itemsize())) as tree:
        writer = Writer(job, tree)
        try:
            feed(writer.offer)
            writer.finish()
        except BaseException as error:
            writer.stop(error)
            raise
        written = {entry["path"]: entry for entry in writer.entries}
        if missing := [path for path in job.paths() if path not in written]:
            others = f"{missing[0]} and {len(missing) - 1} others"
            raise UserError(f"{job.output}: {others} were not made; no manifest tells of this dump")
        for file in job.checkpoint.files.values():
            file.check()  # whatever engine read it: the manifest is about the bytes that were opened
        manifest = tree.finish([stage_path(*key, job.form) for key in keys_of(job.checkpoint.config)])
    files = [written[path] for path in job.paths()]
    size = sum((job.output / entry["path"]).stat().st_size for entry in files)
    return Report(manifest, files, size, logits=writer.logits)


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


def describe_plan(job: Job) -> list[dict[str, Any]]:
    """What the job would write: each stage with its shape, its files and their bytes."""
    selection, rows = job.selection, []
    for name in selection.stages:
        keys = [key for key in selection.keys() if key[1] == name]
        shape = selection.shape(STAGES[name])
        size = int(np.prod(shape, dtype=np.int64)) * job.itemsize() * len(keys)
        rows.append(
            {"stage": name, "shape": list(shape), "axes": list(STAGES[name].axes), "files": len(keys), "bytes": size}
        )
    return rows


__all__ = ["SUFFIXES", "Job", "Report", "Writer", "describe_plan", "dump"]
