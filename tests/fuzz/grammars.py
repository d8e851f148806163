"""What people type: stages, layers, positions, token ids, prompts, tolerances, and whole command lines."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import click

from jaxref.__main__ import main as jaxref_main
from jaxref.asked import parse_tokens, read_prompt
from jaxref.selection import Selection, parse_layers, parse_positions, parse_stages
from jaxref.stages import STAGES
from oracle.__main__ import main as oracle_main
from oracle.metrics import Figures
from oracle.tolerances import compile_missing, parse_tolerance
from oracle.verdict import Rules
from tests.fuzz.mutate import Mutation, mutate_words, text_of
from tests.fuzz.world import World
from weights import UserError

COUNT = 7  # tokens
BETWEEN = "\x1f"  # the words of a command line


@dataclass(frozen=True)
class Grammar:
    """How a text is checked, valid ones, and what it is made of."""

    check: Callable[[World, bytes], object]
    seeds: tuple[str, ...]
    mutate: Mutation


def selection(world: World, data: bytes) -> None:
    config = world.moe_checkpoint.config
    stages, layers, positions = (*text_of(data).split(";"), "all", "all", "all")[:3]
    found = Selection(
        config,
        COUNT,
        parse_stages(stages, config),
        parse_layers(layers, config.num_hidden_layers),
        parse_positions(positions, COUNT),
    )
    assert all(0 <= layer < config.num_hidden_layers for layer in found.layers)
    assert isinstance(found.positions, str) or all(0 <= p < COUNT for p in found.positions or ())
    assert set(found.stages) <= set(STAGES) and found.stages
    assert found.size() > 0 or not found.keys()
    again = ",".join(found.stages), ",".join(map(str, found.layers))
    assert (parse_stages(again[0], config), parse_layers(again[1], 1)) == (found.stages, found.layers)


def tokens(world: World, data: bytes) -> None:
    text = text_of(data)
    ids = parse_tokens(text)
    assert parse_tokens(",".join(map(str, ids))) == ids
    file = world.file("tokens/ids.txt", data)
    for words in ({"tokens": text, "tokens_file": None}, {"tokens": None, "tokens_file": file}):
        asked = read_prompt(str(world.dense), None, chat=False, **words)
        assert all(0 <= token < asked.checkpoint.config.vocab_size for token in asked.tokens)


def prompt(world: World, data: bytes) -> None:
    for chat in (False, True):
        asked = read_prompt(str(world.dense), text_of(data), None, None, chat)
        assert all(0 <= token < asked.checkpoint.config.vocab_size for token in asked.tokens)


def model(world: World, data: bytes) -> None:
    read_prompt(text_of(data), None, None, None, False)


def tolerance(world: World, data: bytes) -> None:
    rule, *patterns = text_of(data).split(";")
    found = parse_tolerance(rule)
    missing = compile_missing(patterns)
    figures = Figures(7, 0.1, 0.99, 1.0, 0.1, 20.0, 1.0, 2.0, 0.1, (0, 0, 0))
    for key in ((0, "lm_head"), (None, "q_norm")):
        found.covers(key)
        if missing is not None:
            missing.fullmatch(key[1])
    found.failing(figures)
    Rules("float16", "float16", (found,)).written((0, "attn_norm"))


def command(world: World, data: bytes) -> None:
    """A command line that writes nothing: `dump --plan`, or a `compare` of two trees."""
    # As the system hands them over: bytes that are no text are \udc80 to \udcff.
    tool, *words = text_of(data).replace("\ud800", "\udc80").replace("\0", "").split(BETWEEN)
    trees = [str(world.trees[form]) for form in ("aprt", "safetensors")]
    if tool == "compare":
        program, first = oracle_main, ["compare", *trees]
        words = [word for word in words if "junit" not in word and "html" not in word]
    else:
        program, first = jaxref_main, ["dump", "--plan", f"--output={world.root / 'planned'}", str(world.dense)]
        words = [word for word in words if "out" not in word]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            program.main([first[0], *words, *first[1:]], "x", standalone_mode=False)
        except click.ClickException as error:
            raise UserError(" ".join(error.format_message().split()) or "wrong use") from None  # as `cli.run` does
    assert not (world.root / "planned").exists()


_STAGES = ("attn_norm", "ATTN_SCORES", "lm_head", "moe_router", "layer_output", "ffn_silu", "all", "embedding")
_NUMBERS = ("0", "1", "6", "7", "..", ",", ";", "last", "99", "0..1", "1..0")
_RULES = (
    "attn_out", "ffn_.*", "layer-0/.*", ":", "0.05", "cosine>=0.999", "max_abs<0.1 and rms<0.01", ";", "kl<=1", "nan",
    "inf", "1e-3", "(", ")", "[", "a{99999999999}", "(?i)", "(?P<n>a)", "\\1", "[[a]", "*", "+", "(?:" * 200, "top1>0",
    "(" * 6000, "-1", "|", "(?x)#", "\\", "x{1,2}{3}",
)  # fmt: skip
_OPTIONS = (
    "--stages=attn_norm", "--layers=0", "--positions=1", "--positions=last", "--tokens=1,2,3", "--prompt=Hi", "--chat",
    "--json", "--dtype=float16", "--format=safetensors", "--convention=apr", "--quiet", "--min-cosine=0.9", BETWEEN,
    "--max-ratio=2", "--tolerance=lm_head:1", "--allow-missing=x", "--accept-layout", "--test-dtype=q8", "--", "=",
    "--max-ratio=nan", "--min-cosine=nan", "--hash-weights", "--activations=stored", "--device=cpu", "dump", "compare",
)  # fmt: skip

GRAMMARS: dict[str, Grammar] = {
    "selection": Grammar(
        selection, ("all;all;all", "attn_norm,lm_head;0;last", "LM_HEAD;0..1;5,6"), mutate_words((*_STAGES, *_NUMBERS))
    ),
    "tokens": Grammar(tokens, ("3,8,220", " 1 , 2 "), mutate_words((*_NUMBERS, "271", "272", " ", "\t", "4294967296"))),
    "prompt": Grammar(prompt, ("What is 2+2?",), mutate_words(("Hi", "<|im_end|>", "\n", "😀", "é", "\u202e"))),
    "model": Grammar(model, ("tiny",), mutate_words(("~", "~nobody", "/", "..", "x" * 300, "/dev", ".gguf"))),
    "tolerance": Grammar(
        tolerance,
        ("attn_softmax:0.05;ffn_silu", "ffn_.*:cosine>=0.999", "layer-3/.*:max_abs<0.1 and rms<0.01"),
        mutate_words(_RULES),
    ),
    "command": Grammar(
        command,
        (BETWEEN.join(("dump", "--stages=all", "--json")), BETWEEN.join(("compare", "--min-cosine=0.9", "--json"))),
        mutate_words(_OPTIONS),
    ),
}
