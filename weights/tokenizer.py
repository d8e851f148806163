"""Text to token ids and back, by the tokenizer that lies beside the weights, or in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weights.errors import UserError, brief, plain
from weights.files import read_json, regular

# The values of `tokenizer.ggml.pre` that mean this split of a text into words; the ids of other splits are not Qwen's.
PRE_TOKENIZERS = ("qwen2", "deepseek-r1-qwen")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The values of `tokenizer.ggml.token_type` that are matched in a text before it is split.
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Text is taken raw: no special tokens are added."""

    folder: Path  # or the GGUF file
    backend: Any  # tokenizers.Tokenizer
    templated: Callable[[], Any]  # the tokenizer in transformers, which applies chat templates
    stops: Callable[[], list[Any]]  # what the files state as ids that end a text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as engines trace it."""
        return list(self._calling(self.backend.encode, text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._calling(self.backend.decode, ids, skip_special_tokens=False))

    def ends(self) -> frozenset[int]:
        """The ids after which a text is at its end, as far as any file beside the weights states them."""
        return frozenset(stated for stated in self.stops() if type(stated) is int)

    def chat(self, text: str) -> str:
        """The text as one user turn in the model's chat template. Raises `UserError` where it has none."""
        turn = [{"role": "user", "content": text}]
        try:
            return str(self.templated().apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # noqa: BLE001 - a template is a program, which fails in any way
            raise UserError(f"{self.folder}: no usable chat template: {_first_line(error)}") from None

    def _calling(self, method: Callable[..., Any], what: Any, **options: Any) -> Any:
        try:
            return method(what, **options)
        except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception
            raise UserError(f"{self.folder}: the tokenizer does not take this: {_first_line(error)}") from None


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder; None where there is none. Raises `UserError` for a broken one."""
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            # Straight from the file: importing transformers takes longer than a whole small dump.
            import tokenizers

            backend = tokenizers.Tokenizer.from_file(str(regular(path)))
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            backend = _auto_tokenizer(folder).backend_tokenizer
        else:
            return None
    except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception for a broken file
        raise UserError(f"{folder}: the tokenizer is not readable: {_first_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(folder, backend, partial(_with_template, folder, backend), partial(_stops, folder, backend))


def tokenizer_from_metadata(path: Path, metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a GGUF file with this metadata; None where there is none.

    As llama.cpp and transformers read it: bytes merged in pairs, and no normalising of the text (the `tokenizer.json`
    of the published models has NFC). Raises `UserError` for another kind of tokenizer, or a broken one.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    for key, known in (("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", PRE_TOKENIZERS)):
        if metadata.get(key) not in known:
            raise UserError(f"{path}: {key} {brief(metadata.get(key))} is not supported (only {', '.join(known)})")
    try:
        backend = _byte_pairs(metadata)
    except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception for a broken vocabulary
        raise UserError(f"{path}: the tokenizer is not readable: {_first_line(error)}") from None
    stops = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Tokenizer(path, backend, partial(_fast_tokenizer, backend, metadata), lambda: stops)


def _byte_pairs(metadata: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.get("tokenizer.ggml.merges", [])]
    backend: Any = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _fast_tokenizer(backend: Any, metadata: dict[str, Any]) -> Any:
    """The tokenizer in transformers, with the chat template and the names that a template may use."""
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def _with_template(folder: Path, backend: Any) -> Any:
    """The tokenizer in transformers, with the chat template that lies beside it.

    Not transformers' own loader, which follows names in `tokenizer_config.json` out of the folder.
    """
    from transformers import PreTrainedTokenizerFast

    settings, file = _settings(folder), folder / "chat_template.jinja"
    template = regular(file).read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    stated = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    stated = {name: token.get("content") if isinstance(token, dict) else token for name, token in stated.items()}
    named = {name: token for name, token in stated.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def _stops(folder: Path, backend: Any) -> list[Any]:
    stated = [_settings(folder, name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    named = _settings(folder).get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    several = [ids if isinstance(ids, list) else [ids] for ids in stated]
    return [*several[0], *several[1], backend.token_to_id(text) if isinstance(text, str) else None]


def _settings(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    path = folder / name
    settings = read_json(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a JSON object was expected, this is a {type(settings).__name__}")
    return settings


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    for name in ("vocab.json", "merges.txt"):
        regular(folder / name)
    if "fast_tokenizer_files" in _settings(folder):
        raise UserError("tokenizer_config.json names other files (fast_tokenizer_files), which are not read")
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _first_line(error: Exception) -> str:
    return plain((str(error).splitlines() or [type(error).__name__])[0])
