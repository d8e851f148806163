"""The options that every command shares that runs a model over a prompt and writes a tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Folder(click.Path):
    """A path to write to; an empty one would be the folder that one is in."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Fails where it is empty."""
        if value == "":
            self.fail("is empty; the name of a folder was expected", param, ctx)
        return super().convert(value, param, ctx)


_PROMPT = (
    click.argument("model", required=False),
    click.option("--prompt", help="The text, taken raw: no special tokens are added."),
    click.option("--tokens", help="Token ids, for example 3838,374,220."),
    click.option("--tokens-file", type=click.Path(path_type=Path), help="A file of token ids, by blanks or commas."),
    click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt."),
)
_OPTIONS = (
    *_PROMPT,
    click.option("--stages", default="all", show_default=True, help="all, or a comma list of stage names."),
    click.option("--layers", default="all", show_default=True, help="all, START..END (END excluded) or 0,3,7."),
    click.option("--positions", help="all, last or a list like 5,6.  [default: all; lm_head and MoE stages: last]"),
    click.option(
        "--output", type=Folder(), default=Path("trace"), show_default=True, help="The folder that is written to."
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where it is computed; cuda is an NVIDIA GPU.",
    ),
    click.option(
        "--format",
        "form",
        type=click.Choice(["aprt", "safetensors"]),
        default="aprt",
        show_default=True,
        help="aprt holds float32; safetensors holds what was computed.",
    ),
    click.option(
        "--convention",
        type=click.Choice(["canonical", "apr"]),
        default="canonical",
        show_default=True,
        help="apr: zeros above the diagonal of attn_scores, as that engine writes them.",
    ),
    click.option("--hash-weights", is_flag=True, help="Note the SHA-256 of whole weight files in the manifest."),
    click.option("--plan", is_flag=True, help="Say what would be written and how large, and compute nothing."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables."),
    click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors."),
)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument MODEL and the options that say what it is asked."""
    for option in reversed(_PROMPT):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command MODEL, the prompt and what is to be written."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
