"""`Checkpoint`: one model's tensors by name, read one layer at a time from files that `opening.py` found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from weights import names
from weights.config import Config
from weights.errors import UserError, listed
from weights.identity import sample_sha256, whole_sha256
from weights.params import Expert, Layer, Params, expert_names, layer_names, whole_params
from weights.upcast import all_finite

if TYPE_CHECKING:
    from weights.gguf_file import GgufFile
    from weights.safetensors_file import SafetensorsFile
    from weights.tokenizer import Tokenizer

    TensorFile = SafetensorsFile | GgufFile

# Buffers that some exporters save beside the weights; they are functions of the config.
DERIVED = ("rotary_emb.inv_freq",)


class Checkpoint:
    """Lazy, memory-mapped access to one model's tensors [out, in]: views in the dtype on disk; float32 if quantised."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        files: Mapping[str, TensorFile],
        places: Mapping[str, str],
        tokenizer: Callable[[], Tokenizer | None],
    ) -> None:
        self.folder = folder  # of a GGUF, the file itself: nothing that lies beside it belongs to it
        self.config = config
        self.files = files  # file name -> open file
        self._places = places  # tensor name -> file name
        self._tokenizer = cache(tokenizer)
        self.stacked = any(name.endswith("mlp.experts.gate_up_proj") for name in places)
        _check_tensors(config, self)

    @property
    def name(self) -> str:
        """What a person calls the model: its folder's name, or the id of a cached snapshot."""
        parts = self.folder.parts
        cached = next((p for p in parts if p.startswith("models--")), None)
        return cached.removeprefix("models--").replace("--", "/") if cached else self.folder.name

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor stored, without the derived buffers."""
        return [name for name in self._places if not name.endswith(DERIVED)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return self.files[self._places[name]].shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a stored tensor: on disk, or dequantised."""
        return self.files[self._places[name]].dtype(name)

    def widest_dtype(self) -> np.dtype[Any]:
        """The dtype of most bytes among the stored tensors."""
        return max((self.dtype(name) for name in self.tensor_names), key=lambda dtype: dtype.itemsize)

    def stored_as(self, name: str) -> str:
        """How a tensor is stored, for people: its dtype, or GGUF's name of its type."""
        return self.files[self._places[name]].stored_as(name)

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where it has none. Raises `UserError` for one that is not readable."""
        return self._tokenizer()

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A view of rows `start:stop` of one tensor by its checkpoint name."""
        return self.files[self._places[name]].tensor(name, start, stop)

    def packed(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """The bytes [rows, ·] of some rows of a tensor as a GGUF file holds them, in blocks of `stored_as`."""
        from weights.gguf_file import GgufFile

        file = self.files[self._places[name]]
        assert isinstance(file, GgufFile)  # no other has blocks
        return file.packed(name, rows)

    def copy(self, view: np.ndarray, out: np.ndarray) -> bool:
        """Fill `out` with the values of a view of some tensor, and say whether all are finite in both dtypes.

        What lies in a file as it is is read from there, which is faster than out of the map. Raises `UserError` where
        the file has become shorter.
        """
        file = next((file for file in self.files.values() if file.holds(view)), None)
        if file is not None:
            return file.copy(view, out)
        with np.errstate(all="ignore"):
            np.copyto(out, view, casting="unsafe")
        return all_finite(out)

    def layer(self, index: int) -> Layer:
        """The parameters of one layer, without its experts, as views."""
        return jax.tree.map(self.tensor, layer_names(self.config, index))

    def expert(self, layer: int, index: int) -> Expert:
        """The parameters of one expert, as views; of stacked tensors only its slice."""
        if not self.stacked:
            return jax.tree.map(self.tensor, expert_names(layer, index))
        gate_up, down = (self.tensor(row.name.format(layer=layer), index, index + 1)[0] for row in names.STACKED)
        size = self.config.moe_intermediate_size
        return Expert(gate_proj=gate_up[:size], up_proj=gate_up[size:], down_proj=down)

    def embedding_rows(self, tokens: np.ndarray) -> np.ndarray:
        """[S, D]: only the rows of these token ids are read."""
        return self.files[self._places["model.embed_tokens.weight"]].rows("model.embed_tokens.weight", tokens)

    def norm(self) -> np.ndarray:
        """[D]: the weight of the final norm."""
        return self.tensor("model.norm.weight")

    @property
    def head_name(self) -> str:
        """The tensor that is the output projection."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def head_blocks(self, rows: int) -> Iterator[np.ndarray]:
        """The output projection [V, D] in blocks of at most `rows` rows, in order."""
        for start in range(0, self.config.vocab_size, rows):
            yield self.tensor(self.head_name, start, start + rows)

    def params(self) -> Params:
        """The whole model, for models that fit: views, but for the experts, which are copied into one array a field."""
        return whole_params(self.config, self.tensor, self.expert)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors handed out so far."""
        return sum(file.bytes_read for file in self.files.values())

    def release(self) -> None:
        """Give all pages read so far back to the system."""
        for file in self.files.values():
            file.release()

    def identity(self, *, whole_files: bool = False) -> list[dict[str, Any]]:
        """What tells this checkpoint from another: each file's size, and the SHA-256 of its header and of a sample.

        The sample (`weights.identity`) is 264 KiB of each file, so that two fine-tunes of one shape differ. It cannot
        see a change that lies between its blocks, such as in one tensor of many: `whole_files` hash every byte.
        """
        return [
            {
                "file": name,
                "size": file.size,
                "header_sha256": file.header_sha256,
                "sample_sha256": sample_sha256(file.watched),
                **({"sha256": whole_sha256(file.watched)} if whole_files else {}),
            }
            for name, file in sorted(self.files.items())
        ]


def _same_head(checkpoint: Checkpoint, rows: int = 4096) -> bool:
    """Whether a head that is stored beside a tied embedding is the same."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if checkpoint.shape(head) != checkpoint.shape(table):
        return False
    starts = range(0, checkpoint.config.vocab_size, rows)
    return all(
        np.array_equal(checkpoint.tensor(head, i, i + rows), checkpoint.tensor(table, i, i + rows)) for i in starts
    )


def _check_tensors(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse missing, unknown and mis-shaped tensors, all listed at once."""
    stored = set(checkpoint.tensor_names)
    most = 4 * len(stored) + 4096  # a config may ask for layers × experts without end
    wanted = dict(islice(names.expected(config, stacked=checkpoint.stacked), most + 1))
    if len(wanted) > most:
        raise UserError(f"{checkpoint.folder}: holds {len(stored)} tensors, the config wants more than {most}")
    extra = stored - set(wanted)
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")
    faults = [f"missing {name} {list(wanted[name])}" for name in wanted if name not in stored]
    faults += [f"unknown {name} {list(checkpoint.shape(name))}" for name in sorted(extra)]
    for name in (n for n in wanted if n in stored):
        if checkpoint.shape(name) != wanted[name]:
            faults.append(f"{name} has shape {list(checkpoint.shape(name))}, the config wants {list(wanted[name])}")
        checkpoint.dtype(name)
    if config.tie_word_embeddings and "lm_head.weight" in stored and not faults and not _same_head(checkpoint):
        faults.append("lm_head.weight differs from the embedding, but the config ties them (tie_word_embeddings)")
    if faults:
        raise UserError(f"{checkpoint.folder}: tensors do not fit the config: {listed(faults, '; ')}")
