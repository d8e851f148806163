"""The stage reference as Markdown, out of the table: `python -m jaxref.reference > docs/stages.md`."""

from __future__ import annotations

from collections.abc import Iterator

from jaxref.stage import DIMENSIONS, Stage
from jaxref.stages import STAGES

_HEAD = """# The stages

Made by `python -m jaxref.reference` from `jaxref/stages.py`; a test checks that it is.

Of `a or b` a stage reads the first that the model has; `hidden` is the layer before (`embedding` in layer 0). Stages
marked *last* hold the last position alone unless `--positions` says otherwise. *ext.* marks names that are ours."""
_SCOPES = {"layer": "every layer", "first": "layer 0", "model": "once"}
_CONDITIONS = {"is_dense": "dense layers", "is_moe": "layers with experts"}


def reference() -> Iterator[str]:
    """The page, line by line."""
    yield _HEAD
    yield ""
    yield ", ".join(f"{letter} {words}" for letter, words in DIMENSIONS.items()) + "."
    yield ""
    yield "| stage | shape | where | reads | parameters | meaning |"
    yield "|---|---|---|---|---|---|"
    for stage in STAGES.values():
        reads = ", ".join(name.replace("|", " or ") for name in stage.inputs)
        cells = (
            _name(stage),
            f"[{', '.join(stage.axes)}]",
            _where(stage),
            reads,
            ", ".join(stage.params),
            stage.meaning,
        )
        yield f"| {' | '.join(cells)} |"


def _name(stage: Stage) -> str:
    return f"`{stage.name}`" + (" *last*" if stage.last else "") + ("" if stage.canonical else " *ext.*")


def _where(stage: Stage) -> str:
    special = {"qkv_bias": "models with QKV biases", "q_norm": "Qwen3 family", "k_norm": "Qwen3 family"}
    return special.get(stage.name) or _CONDITIONS.get(stage.when.__name__) or _SCOPES[stage.scope]


if __name__ == "__main__":
    print("\n".join(reference()))
