"""What a command is asked, out of its options: the model, the tokens, what of the trace is wanted."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxref.selection import whole_number
from weights import EMBEDDED, Checkpoint, Config, UserError, open_checkpoint
from weights.errors import brief

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

    Tokens = Sequence[int] | np.ndarray | Array  # [S]

DEFAULT_PROMPT = "What is 2+2?"
# The default prompt in Qwen2's and Qwen3's vocabulary, for checkpoints without a tokenizer.
DEFAULT_TOKENS = [3838, 374, 220, 17, 10, 17, 30]


@dataclass(frozen=True)
class Prompt:
    """A model and the token ids it is asked about."""

    checkpoint: Checkpoint
    prompt: str | None
    tokens: list[int]


def read_prompt(
    model: str | None, prompt: str | None, tokens: str | None, tokens_file: Path | None, chat: bool
) -> Prompt:
    """Open the model and turn the prompt into ids inside its vocabulary. Raises `UserError`."""
    options = {"--prompt": prompt, "--tokens": tokens, "--tokens-file": tokens_file}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one")
    checkpoint = open_checkpoint(EMBEDDED if model is None else model)
    if tokens_file is not None:
        tokens = _read_tokens(tokens_file)
    if tokens is not None:
        if chat:
            raise UserError("--chat needs --prompt: token ids are taken as they are")
        text, ids = None, parse_tokens(tokens)
    else:
        text, ids = _encode(prompt, checkpoint, chat)
    size = checkpoint.config.vocab_size
    if outside := [t for t in ids if not 0 <= t < size]:
        raise UserError(f"token ids {outside[:8]} are outside the vocabulary of {checkpoint.name}, 0 to {size - 1}")
    return Prompt(checkpoint, text, ids)


def _encode(prompt: str | None, checkpoint: Checkpoint, chat: bool) -> tuple[str, list[int]]:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        if prompt is not None or chat:
            raise UserError(f"{checkpoint.folder}: there is no tokenizer; give --tokens instead of --prompt")
        return DEFAULT_PROMPT, list(DEFAULT_TOKENS)
    text = DEFAULT_PROMPT if prompt is None else prompt
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python holds bytes of an argument that are no UTF-8
        raise UserError("the prompt is not valid UTF-8 text")
    text = tokenizer.chat(text) if chat else text
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty; at least one token is needed")
    return text, ids


def _read_tokens(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: not readable as token ids: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: holds no text; token ids between blanks or commas were expected") from None
    if not text.strip():
        raise UserError(f"{path}: holds no token ids; at least one is needed")
    return text


def parse_tokens(text: str) -> list[int]:
    """A list of token ids, by commas or blanks. Raises `UserError` where it is empty or holds anything else."""
    if not text.strip():
        raise UserError("no token ids; at least one is needed")
    try:
        return [whole_number(word) for word in re.split(r"\s*,\s*|\s+", text.strip())]
    except ValueError:
        raise UserError(f"tokens {text[:60]!r}: whole numbers between commas or blanks were expected") from None


def token_ids(tokens: Tokens, config: Config) -> list[int]:
    """Token ids [S] as plain numbers. Raises `UserError` where they are none, or outside the vocabulary."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise UserError(f"tokens {brief(tokens)}: whole numbers were expected, the ids of a tokenizer") from None
    if not ids:
        raise UserError("the prompt is empty; at least one token is needed")
    if outside := [t for t in ids if not 0 <= t < config.vocab_size]:
        raise UserError(f"token ids {outside[:8]} are outside the vocabulary, 0 to {config.vocab_size - 1}")
    return ids
