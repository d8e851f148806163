"""llama.cpp into a tree: the same files and the same manifest as `jaxref dump` writes, less what it cannot show."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import numpy as np

from jaxref.dump import Job, Offer, Progress, Report, write_tree
from jaxref.pieces import Piece
from oracle.engines import llama_api, llama_cpp
from weights import UserError

PACKAGES = ("jaxref", "xllamacpp", "numpy")


def shown(job: Job) -> Job:
    """The job without the stages that llama.cpp computes together with others. Raises `UserError` if none is left."""
    stages = tuple(stage for stage in job.selection.stages if stage not in llama_cpp.MISSING)
    if not stages:
        missing = ", ".join(job.selection.stages)
        raise UserError(f"llama.cpp does not show {missing}: it computes it together with what follows")
    return replace(job, selection=replace(job.selection, stages=stages))


def dump_llama_cpp(job: Job, device: str, progress: Progress, **knobs: float) -> Report:
    """Run a GGUF file by llama.cpp on the CPU and write what it computes; the manifest names what is `missing`.

    `knobs` are settings of the engine that plant a fault, and go into the manifest. Raises `UserError` where the model,
    the library, the device or the output folder is not usable.
    """
    path, asked = job.checkpoint.folder, job.selection.stages
    if path.suffix != ".gguf":
        raise UserError(f"{path}: llama.cpp reads GGUF files alone")
    if (device, job.numerics.name) != ("cpu", "float32"):
        raise UserError(f"--device {device}, {job.numerics.name}: llama.cpp is driven on the cpu, in float32")
    llama_api.load()
    # Quantised weights are multiplied with activations that are rounded too, as its kernels do.
    job = replace(shown(job), as_stored=True)
    missing = [stage for stage in asked if stage in llama_cpp.MISSING]
    threads = os.cpu_count() or 1
    where = {"platform": "cpu", "kind": platform.machine(), "threads": threads}
    run = job.run("llama.cpp", PACKAGES, where, "engine") | {"knobs": knobs, "missing": missing}

    def feed(offer: Offer) -> None:
        def emit(layer: int | None, stage: str, value: np.ndarray) -> None:
            offer(layer, Piece(stage, value))  # type: ignore[arg-type]
            if layer is not None and stage == "post_ffn_residual":
                progress(layer)

        llama_cpp.run(path, job.tokens, emit, threads=threads, **knobs)

    report = write_tree(job, run, feed)
    report.read = sum(file["size"] for file in job.checkpoint.identity())
    return report
