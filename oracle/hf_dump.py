"""The Hugging Face path into a tree: the same files and the same manifest as `jaxref dump` writes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from jaxref.dump import Job, Offer, Progress, Report, write_tree
from jaxref.pieces import Piece
from oracle import hf
from weights import UserError

PACKAGES = ("jaxref", "torch", "transformers", "numpy")


def dump_hf(job: Job, device: str, progress: Progress) -> Report:
    """Run transformers' own modules in the job's dtype on "cpu" or "cuda" and write what they compute.

    Raises `UserError` where the model, the device or the output folder is not usable.
    """
    if job.checkpoint.folder.is_file():
        raise UserError(
            f"{job.checkpoint.folder}: the Hugging Face path takes a folder with safetensors, not a GGUF file"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; install a torch that was built for CUDA")
    kind = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    where = {"platform": device, "kind": kind, "threads": torch.get_num_threads()}
    run = job.run("huggingface", PACKAGES, where, torch.get_float32_matmul_precision())

    def feed(offer: Offer) -> None:
        # There is a progress bar of ours; this one would also be printed into pipes.
        disable_progress_bar()
        # Loaded only now, when it is clear that the tree can be written.
        model = hf.load(job.checkpoint.folder, job.numerics.name, device)

        def emit(layer: int | None, stage: str, value: torch.Tensor) -> None:
            offer(layer, Piece(stage, _array(value)))  # type: ignore[arg-type]
            if layer is not None and stage == "post_ffn_residual":
                progress(layer)

        hf.run(model, job.tokens, emit)

    report = write_tree(job, run, feed)
    report.read = sum(file["size"] for file in job.checkpoint.identity())
    return report


def _array(value: torch.Tensor) -> np.ndarray:
    """A copy, since the file is written while the model goes on; ids as int32, as jaxref has them."""
    copy = value.to("cpu", value.dtype if value.is_floating_point() else torch.int32, copy=True).contiguous()
    if copy.dtype == torch.bfloat16:  # which NumPy knows only by way of ml_dtypes
        return copy.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return copy.numpy()
