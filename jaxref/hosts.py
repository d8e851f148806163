"""Several processes as one mesh, on one host or on several: `jax.distributed`, and what keeps the processes alike.

Each process runs the same program on its own devices, reads its own copy of the checkpoint, and meets the others in
every product that is split. Process 0 writes. A process that fails alone would leave the others waiting for it, so
they tell each other how they are before the work begins and after each layer.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxref.transport import listen_for, own_stdout
from weights import UserError

if TYPE_CHECKING:
    from jaxref.dump import Offer
    from jaxref.pieces import Piece

_GRAMMAR = re.compile(r"([^\s,]+:([0-9]{1,5})),([0-9]{1,5}),([0-9]{1,5})")
# What the messages of JAX's transports have where a connection ended: those of CPUs, of NVIDIA GPUs, of its service.
_TRANSPORT = re.compile(r"gloo|nccl|coordination service|closed by peer|reset by peer", re.IGNORECASE)
CONNECT = 60  # seconds that a process waits for the others to start


@dataclass(frozen=True)
class Hosts:
    """Where process 0 listens, how many processes there are, and which one this is; None: the cluster says it."""

    address: str | None = None
    count: int | None = None
    index: int | None = None


def parse_hosts(text: str) -> Hosts:
    """`10.0.0.1:1234,2,0`, or `auto` under Slurm or Open MPI. Raises `UserError` for anything else."""
    if text.strip().lower() == "auto":
        return Hosts()
    found = _GRAMMAR.fullmatch(text.strip())
    if found is None or int(found[2]) >= 65536 or not int(found[4]) < int(found[3]) > 1:
        raise UserError(
            f"hosts {text!r}: ADDRESS:PORT,COUNT,INDEX was expected, for example 10.0.0.1:1234,2,0 in the first of two"
            " processes and 10.0.0.1:1234,2,1 in the second; or auto under Slurm or Open MPI"
        )
    return Hosts(found[1], int(found[3]), int(found[4]))


class Crew:
    """The processes that do one job, each of them in the same order. `index` is this one's place among `count`.

    While they are at work they meet in products, and who fails there can only go. Else a fault is told to all.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.parted = False  # whether all of them know that the work has ended
        self._at_work = False
        self._facts = b""

    @contextmanager
    def alike(self, facts: Any) -> Iterator[None]:
        """All of a job, which is told by these facts (JSON values), the same in every process.

        Raises `UserError` in every process where one has failed, or was asked something else.
        """
        self._facts = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
        self._meet()  # before anything is written
        try:
            yield
        except Exception as error:
            if not self._at_work and not self.parted:
                self._meet(error)
            raise
        self._meet()

    @contextmanager
    def working(self, offer: Offer) -> Iterator[Offer]:
        """The part of it where they meet in products: `offer` with a meeting after each layer.

        A fault in `offer`, which writes in one process alone, is raised there, when the others hear of it.
        """
        self._meet()
        self._at_work = True
        faults: list[Exception] = []
        at: int | None = 0

        def guarded(layer: int | None, piece: Piece) -> None:
            nonlocal at
            if layer != at:
                at = layer
                self._meet(*faults)
            try:
                if not faults:
                    offer(layer, piece)
            except Exception as error:  # noqa: BLE001 - kept until the others can hear of it
                faults.append(error)

        yield guarded
        self._at_work = False
        if faults:
            raise faults[0]

    def _meet(self, fault: Exception | None = None) -> None:
        """Tell the others whether this process has failed, and raise what one of them tells."""
        from jax.experimental.multihost_utils import process_allgather

        words = np.frombuffer(self._facts, np.uint32)
        heard = np.asarray(process_allgather(np.append(words, np.uint32(fault is not None))))
        failed, other = (np.flatnonzero(rows) for rows in (heard[:, -1], (heard != heard[0]).any(axis=1)))
        self.parted = bool(len(failed) or len(other))
        if fault is not None:
            raise fault
        if len(failed):
            raise UserError(f"process {failed[0]} of {self.count} has failed; its own output says why")
        if len(other):
            raise UserError(
                f"process {other[0]} of {self.count} was asked something else than process 0: the same command,"
                " checkpoint and versions are needed in all of them"
            )


@contextmanager
def joined(hosts: Hosts | None) -> Iterator[Crew | None]:
    """Join the processes of a job before JAX has looked for devices; None: this one is alone. For command lines.

    Raises `UserError` where they do not find each other within a minute, and where one of them ends meanwhile.
    """
    if hosts is None:
        yield None
        return
    crew: Crew | None = None
    try:
        _connect(hosts)
        crew = Crew()
        yield crew
    except BaseException as error:
        if crew is None or not crew.parted:
            # The others wait in a product for this process: it must go, and not wait for them in turn.
            atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 2)
            if _TRANSPORT.search(str(error)):  # of several classes, ValueError among them
                raise UserError(f"another process of the mesh has ended: {_first_line(error)}") from error
        raise


def _connect(hosts: Hosts) -> None:
    """`jax.distributed.initialize` in a thread: in this one, it could neither be interrupted nor end but in a crash."""
    own_stdout()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which ends a dump in order
    faults: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(hosts.address, hosts.count, hosts.index, initialization_timeout=2 * CONNECT)
        except (RuntimeError, ValueError) as error:
            faults.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT)
    if thread.is_alive():
        raise UserError(f"--hosts: the processes did not find each other within {CONNECT} s: are all of them started?")
    if faults:
        raise UserError(f"--hosts: {_first_line(faults[0])}")
    listen_for(hosts.address)


def _leave(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
