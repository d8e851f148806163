"""The commands that the documentation shows are run as they stand, each block in a folder of its own."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.gguf_writer import tokens, write_gguf
from weights import EMBEDDED, open_checkpoint
from weights.tiny import tiny_config, write_random

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "engines", "numerics"))]
COMMAND = re.compile(r"python -m (?:jaxref|oracle|weights) [^`#\n]+")
SCRIPT = re.compile(r"python -m (tests[\w.]*)((?: --\w+(?: [\w,]+)?)*)")
# What the pages call things by, and the form that a tiny model is to be had in.
OURS = {"REFERENCE": "truth", "YOUR_TREE": "engine-trace", "DIR/hf": "MODEL"}
OURS |= {"A.bin": "truth/lm_head.bin", "B.bin": "engine-trace/lm_head.bin"}


@dataclass(frozen=True)
class Block:
    """Commands that follow one another; `verdict`: what they end with may be that of a faulty engine."""

    page: str
    commands: tuple[str, ...]


def blocks() -> list[Block]:
    """Every indented block of commands, and every command within a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"(?:^    python -m .*\n)+", text, re.MULTILINE):
            found.append(Block(page.name, tuple(COMMAND.findall(block))))
        found += [Block(page.name, (words,)) for words in re.findall(rf"`({COMMAND.pattern})`", text)]
    return list(dict.fromkeys(found))


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def arguments(command: str) -> list[str]:
    """The words of a command as a shell has them, with names of files that are there."""
    words = shlex.split(command.replace("[", "").replace("]", "").replace("…", "What is 2+2?"))
    return [OURS.get(word, word) for word in words[1:]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another as GGUF, the trees of faulty engines, and what llama.cpp makes of it."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(EMBEDDED, folder / "MODEL")
    # llama.cpp takes H·h = hidden_size for granted in qwen2, and wants one merge at least.
    write_random(folder / "other", tiny_config("qwen2", hidden_size=96), seed=1)
    names = tokens(folder / "other")["tokenizer.ggml.tokens"]
    merged = {"tokenizer.ggml.tokens": [*names[:-1], "ab"], "tokenizer.ggml.merges": ["a b"]}
    write_gguf(folder / "other", folder / "MODEL.gguf", "F16", merged)
    for words in (
        "oracle plant MODEL --output engine-trace --dtype float16",
        "oracle plant MODEL.gguf --output llama-theta",
        "oracle llama-cpp MODEL.gguf --output llama",
        "jaxref dump MODEL --output truth",
    ):
        done = run("-m", *words.split(), "--quiet", folder=folder)
        assert done.returncode == 0, done.stderr
    done = run(*"-m oracle weight MODEL.gguf blk.3.ffn_down.weight --output mine.bin".split(), folder=folder)
    assert done.stdout == "mine.bin: 96 × 112 values of model.layers.3.mlp.down_proj.weight, stored as F16\n"
    model = open_checkpoint(folder / "MODEL.gguf")
    save_file({name: model.tensor(name).copy() for name in model.tensor_names}, folder / "loaded.safetensors")
    return folder


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page}: {block.commands[-1].strip()}")
def test_a_block_runs(block: Block, prepared: Path, tmp_path: Path) -> None:
    made = {word for command in block.commands for word in re.findall(r"--output (\S+)", command)}
    for path in prepared.iterdir():
        if path.name not in made:
            (tmp_path / path.name).symlink_to(path)
    for command in block.commands:
        words = arguments(command)
        done = run(*words, folder=tmp_path)
        verdict = words[2] in ("compare", "localize", "explain")
        assert done.returncode in ((0, 1) if verdict else (0,)), (command, done.stdout[-800:], done.stderr)
        assert done.stdout and "Traceback" not in done.stderr
    if "compare truth llama" in block.commands[-1]:
        assert done.returncode == 0, done.stdout[-800:]
    elif verdict and words[-1] in ("engine-trace", "llama-theta"):
        assert done.returncode == 1 and "q_post_rope" in done.stdout, done.stdout


def test_every_page_shows_commands() -> None:
    assert {block.page for block in blocks()} >= {"README.md", "tutorial.md", "engines.md"}
    assert sum(len(block.commands) for block in blocks()) >= 20


@pytest.mark.parametrize(
    "words", sorted({m.group() for page in PAGES for m in SCRIPT.finditer(page.read_text("utf-8"))})
)
def test_a_script_that_made_a_figure_is_there(words: str) -> None:
    found = SCRIPT.fullmatch(words)
    assert found is not None
    module, options = found.groups()
    assert importlib.util.find_spec(module) is not None
    done = run("-m", module, "--help", folder=ROOT)
    assert done.returncode == 0, done.stderr
    for option in re.findall(r"--\w+", options):
        assert option in done.stdout, f"{module} has no {option}"
