"""The body of every command that runs a model over a prompt and writes a tree, whoever computes it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jaxref.dump import Job, Progress, Report
    from jaxref.memory import MemoryPlan

# Takes the job, the device's name and the progress bar; returns what was written.
Write = Callable[["Job", str, "Progress"], "Report"]


def run_dump(
    options: dict[str, Any],
    write: Write,
    shown: Callable[[Job], Job] = lambda job: job,
    planned: Callable[[Job], MemoryPlan | None] = lambda job: None,
) -> None:
    """Read the shared options, let `write` do the work, and tell a person or a machine what came of it.

    `shown` takes out of a plan what the producer cannot show; `planned` says what memory it needs, where that is known.
    """
    begun = time.perf_counter()
    plan, as_json, quiet = (options.pop(name) for name in ("plan", "as_json", "quiet"))
    device, job = _read(options)
    from jaxref import show

    if plan:
        _tell_plan(shown(job), planned(job), as_json)
        return
    # What nobody sees is not worth a third of a second; what is not readable is told before the work.
    tokenizer = None if quiet and not as_json else job.checkpoint.tokenizer()
    with show.progress_bar(job.selection.depth(), quiet=quiet or as_json) as progress:
        report = write(job, device, progress)
    if not report.files:
        return  # another process of the mesh has written it, and tells
    likeliest = show.next_tokens(report.logits, tokenizer)
    seconds = time.perf_counter() - begun
    if as_json:
        facts = {"output": str(job.output), "manifest": str(report.manifest), "model": job.checkpoint.name}
        facts |= {"tokens": job.tokens, "dtype": job.numerics.name, "bytes_read": report.read}
        facts |= {"files": len(report.files), "bytes": report.size, "next_tokens": likeliest}
        click.echo(json.dumps(facts | {"seconds": round(seconds, 3)}))
    elif not quiet:
        show.print_report(report, job, likeliest, seconds)


def _tell_plan(job: Job, memory: MemoryPlan | None, as_json: bool) -> None:
    from jaxref import show
    from jaxref.dump import describe_plan

    rows = describe_plan(job)
    if as_json:
        needed = {} if memory is None else {"device_memory": memory.to_json()}
        click.echo(json.dumps(show.plan_json(rows, job.selection) | needed))
        return
    show.print_plan(rows, job)
    if memory is not None:
        click.echo(str(memory))


def _read(options: dict[str, Any]) -> tuple[str, Job]:
    """The device's name and the job."""
    output, dtype, device, form, hashing, convention = (
        options.pop(name) for name in ("output", "dtype", "device", "form", "hash_weights", "convention")
    )
    as_stored = options.pop("activations", "exact") == "stored"
    wanted = {name: options.pop(name) for name in ("stages", "layers", "positions")}
    from jaxref.asked import read_prompt
    from jaxref.selection import select

    asked = read_prompt(**options)
    selection = select(asked.checkpoint.config, len(asked.tokens), **wanted)
    from jaxref.dump import Job
    from jaxref.precision import numerics_of

    job = Job(
        asked.checkpoint,
        asked.tokens,
        selection,
        numerics_of(dtype),
        output,
        form,
        asked.prompt,
        hashing,
        convention,
        as_stored=as_stored,
    )
    return device, job
