"""Checkpoint + tokens → tree of files, with the files written beside the computing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxref.activations import coarsest_activation
from jaxref.devices import described, memory_limit, out_of_memory_in_words
from jaxref.hosts import Crew
from jaxref.memory import MemoryPlan, plan_for
from jaxref.mesh import to_host
from jaxref.pieces import Piece
from jaxref.precision import PRECISION, Device, Numerics
from jaxref.reader import Reader
from jaxref.selection import Selection
from jaxref.stages import STAGES, keys_of
from jaxref.stream import stream, trace
from jaxref.tree import MANIFEST, Tree, stage_path
from jaxref.writer import Writer
from weights import Checkpoint, UserError

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
    crew: Crew | None = None  # several processes, whose devices the mesh is made of

    def __post_init__(self) -> None:
        """Raises `UserError` where activations are to be rounded as nobody stores weights here."""
        model = self.checkpoint.folder
        if self.as_stored and (model.suffix != ".gguf" or self.numerics.name != "float32"):
            raise UserError(f"activations as stored go with a .gguf file in float32; this is {model}")

    def check(self) -> None:
        """Raise `UserError` where there is nothing to compute, or nothing to compute it from."""
        if not self.selection.keys():
            raise UserError("nothing to write: no stage of this selection exists")
        if not self.tokens:
            raise UserError("the prompt is empty; at least one token is needed")
        if outside := [t for t in self.tokens if not 0 <= t < self.checkpoint.config.vocab_size]:
            size = self.checkpoint.config.vocab_size
            raise UserError(f"token ids {outside[:8]} are outside the vocabulary, which has ids 0 to {size - 1}")

    def memory(self) -> MemoryPlan:
        """What the job needs on a device while the layers are streamed."""
        mesh = None if self.mesh is None else self.mesh.shape
        platform = "cpu" if self.device is None else self.device.platform
        return plan_for(self.checkpoint, self.selection, self.numerics, mesh, platform)

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
            "versions": {name: _version(name) for name in packages},
        }

    def itemsize(self) -> int:
        """Bytes a number in a file."""
        return 4 if self.form == "aprt" else self.numerics.compute.itemsize

    def paths(self) -> list[str]:
        """The files of this dump, in computation order."""
        return [stage_path(*key, self.form) for key in self.selection.keys()]


def _version(package: str) -> str:
    """As it is installed; jaxref itself may be run out of its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
    that holds the parameters already is used in place of the checkpoint's files. Of several processes (`job.crew`) the
    first one writes; the others' report has no files.
    """
    job, run = begun(job)
    with nullcontext() if job.crew is None else job.crew.alike({name: run[name] for name in run if name != "device"}):
        feed = feeder(job, progress, source, **options)
        report = write_tree(job, run, feed) if job.crew is None else _write_together(job, job.crew, run, feed)
    report.read = job.checkpoint.bytes_read
    return report


def begun(job: Job) -> tuple[Job, dict[str, Any]]:
    """The job on its device, and what the manifest says of it."""
    device = job.device or jax.devices()[0]
    job = replace(job, device=device, numerics=job.numerics.on(device, job.mesh))
    return job, job.run("jaxref", PACKAGES, described(device, job.mesh), PRECISION.name)


def feeder(job: Job, progress: Progress, source: Reader | None = None, **options: Any) -> Callable[[Offer], None]:
    """What computes a job that is begun, and offers every stage of it. Raises `UserError` where it does not fit."""
    device = job.device
    assert device is not None
    if source is None:
        plan, place = job.memory().fit(memory_limit(device, job.max_memory)), job.mesh or device
        options |= {"progress": progress, "as_stored": job.as_stored, "read_ahead": plan.read_ahead}
        pieces = stream(job.checkpoint, job.tokens, job.selection, job.numerics, place, **options)
    else:
        pieces = trace(source, job.tokens, job.selection, progress)

    def feed(offer: Offer) -> None:
        # Closed here and not by the garbage collector, whenever that comes, where `offer` gives up.
        with closing(pieces), out_of_memory_in_words(), job.numerics.context(), jax.default_device(device):
            for layer, piece in pieces:
                if job.selection.wants(layer, piece.stage):
                    if job.crew is not None:
                        piece = piece._replace(value=to_host(piece.value))
                    elif device.platform != "cpu":
                        _send_home(piece)
                offer(layer, piece)

    return feed


def _write_together(job: Job, crew: Crew, run: dict[str, Any], feed: Callable[[Offer], None]) -> Report:
    """`write_tree` in the first process, and in the others the computing that belongs to it."""

    def fed(offer: Offer) -> None:
        with crew.working(offer) as guarded:
            feed(guarded)

    if crew.index == 0:
        return write_tree(job, run, fed)
    fed(lambda layer, piece: None)
    return Report(job.output / MANIFEST)


def _send_home(piece: Piece) -> None:
    """Begin to bring a value back from the device, under the computing that follows."""
    if isinstance(piece.value, jax.Array):  # what goes on inside experts is on this side already
        piece.value.copy_to_host_async()


def write_tree(job: Job, run: dict[str, Any], feed: Callable[[Offer], None]) -> Report:
    """Write what `feed` offers, stage by stage, as the tree of this job; `run` is the head of its manifest.

    Raises `UserError` before anything is written where it can't be.
    """
    job.check()
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
