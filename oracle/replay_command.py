"""The body of `python -m oracle localize` and `explain`: their options, the model, the tokens, the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oracle.page import check_html, write_told

if TYPE_CHECKING:
    from weights import Checkpoint

_PATH = click.Path(path_type=Path)
_NUMERICS = ["f32", "f16", "bf16", "q8", "float32", "float16", "bfloat16"]
_OPTIONS = (
    click.argument("model"),
    click.argument("engine_tree", type=_PATH),
    click.option("--prompt", help="The text that the engine was given, where its tree has no manifest."),
    click.option("--tokens", help="Its token ids, for example 3838,374,220."),
    click.option("--tokens-file", type=_PATH, help="A file of token ids, by blanks or commas."),
    click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt."),
    click.option("--hf", type=_PATH, help="A third tree in the engine's numerics: its local errors raise the floor."),
    click.option("--numerics", type=click.Choice(_NUMERICS), help="What the engine computes in."),
    click.option("--positions", help="The positions of the tree's rows, like 5,6, where its manifest does not say."),
    click.option("--html", type=_PATH, help="Write a page to look at: one file, no network needed."),
    click.option("--json", "as_json", is_flag=True, help="JSON records on stdout, one a line, the summary last."),
)


def replay_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command MODEL, ENGINE_TREE and what they need."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_replay(options: dict[str, Any], *, explained: bool) -> int:
    """Localize, explain if asked to, and print. Returns the exit code: 0 clean, 1 faulty, 2 incomplete."""
    as_json, html, model, tree = (options.pop(name) for name in ("as_json", "html", "model", "engine_tree"))
    if html is not None:
        check_html(html)
    checkpoint, tokens = _asked(model, options)
    from jaxref import show
    from jaxref.__main__ import use_compilation_cache
    from jaxref.devices import on_cpu
    from oracle.explain import Explained, explain
    from oracle.localize import localize
    from oracle.told import print_told
    from oracle.told_json import records

    use_compilation_cache()
    with on_cpu(), show.progress_bar(checkpoint.config.num_hidden_layers, quiet=as_json) as progress:
        if explained:
            result = explain(checkpoint, tree, tokens, progress=progress, **options)
        else:
            result = Explained(localize(checkpoint, tree, tokens, progress=progress, **options))
    if html is not None:
        write_told(result, html)
    if as_json:
        for record in records(result, explained=explained):
            click.echo(json.dumps(record, allow_nan=False))
    else:
        print_told(result)
    return result.found.exit_code


def _asked(model: str, options: dict[str, Any]) -> tuple[Checkpoint, list[int] | None]:
    """The checkpoint, and the token ids if any were given: nothing is assumed about an engine's prompt."""
    from jaxref.asked import read_prompt
    from weights import open_checkpoint

    words = {name: options.pop(name) for name in ("prompt", "tokens", "tokens_file", "chat")}
    if any(value for value in words.values()):
        asked = read_prompt(model, **words)
        return asked.checkpoint, asked.tokens
    return open_checkpoint(model), None
