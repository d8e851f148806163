"""Text to token ids and back, by the tokenizer that lies beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Text is taken raw: no special tokens are added."""

    folder: Path
    backend: Any  # tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as engines trace it."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def chat(self, text: str) -> str:
        """The text as one user turn in the model's chat template. Raises `UserError` where it has none."""
        try:
            tokenizer = _auto_tokenizer(self.folder)
            turn = [{"role": "user", "content": text}]
            return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.folder}: no usable chat template: {_first_line(error)}") from None


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder; None where there is none. Raises `UserError` for a broken one."""
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            # Straight from the file: importing transformers takes longer than a whole small dump.
            import tokenizers

            backend = tokenizers.Tokenizer.from_file(str(path))
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            backend = _auto_tokenizer(folder).backend_tokenizer
        else:
            return None
    except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception for a broken file
        raise UserError(f"{folder}: the tokenizer is not readable: {_first_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(folder, backend)


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
