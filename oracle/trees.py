"""The tensors of one run, opened lazily: which stages there are, whose they are, and each as a flat array."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np

from jaxref.stages import STAGES, Key
from jaxref.tree import MANIFEST, stage_path
from oracle.sources import Given, source_of
from oracle.tensor_file import TensorFile
from weights import Config, UserError
from weights.errors import brief, listed

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (*DTYPES, "q8")
_SAMPLE = 1 << 16  # values of a file that are looked at to guess the dtype


class Tree:
    """The tensors of one run: a folder, one safetensors file, or arrays by name (see `oracle.sources`).

    `role` ("reference", "test", "yardstick") is how messages call it.

    `positions` are those of the rows, for a producer that writes no manifest. Each file is read as it lies there now:
    once it is changed, reading it raises `UserError`, so that no figure is of two runs. Raises `UserError` for a folder
    that holds no stage, one that cannot be read, or a broken manifest.
    """

    def __init__(self, given: Given, role: str, positions: tuple[int, ...] | None = None) -> None:
        self.role, self.asked_positions = role, positions
        self._source = source_of(given, role)
        self.folder, self.manifest = self._source.folder, self._source.manifest
        self.files, self.unknown = self._source.files, self._source.unknown
        self.unseen = self._source.unseen
        self._check_positions()
        self.config = self._config()
        self.tokens = self._tokens()

    def _check_positions(self) -> None:
        """Refuse positions that are not those of the manifest."""
        stated, tokens = ((self.manifest or {}).get(key) for key in ("positions", "tokens"))
        if stated == "all" and tokens:
            stated = list(range(len(tokens)))
        asked = self.asked_positions
        if asked is not None and isinstance(stated, list) and list(asked) != stated:
            words = f"its manifest says positions {listed(stated, ',')}, {listed(asked, ',')} were given"
            raise UserError(f"{self.folder}: {words}; leave --positions away")

    def _config(self) -> Config | None:
        stated = (self.manifest or {}).get("config")
        if stated is None:
            return None
        try:
            return Config.from_json(stated)
        except UserError as error:
            raise UserError(f"{self.folder / MANIFEST}: its config is not one: {error}") from None

    def _tokens(self) -> list[int] | None:
        tokens = (self.manifest or {}).get("tokens")
        if tokens == []:
            raise UserError(f"{self.folder / MANIFEST}: its tokens are none")
        return tokens

    @property
    def stated_positions(self) -> tuple[int, ...] | None:
        """The positions that were written, where they were named one by one."""
        if self.asked_positions is not None:
            return self.asked_positions
        stated = (self.manifest or {}).get("positions")
        return tuple(stated) if isinstance(stated, list) and all(type(p) is int for p in stated) else None

    @property
    def unobservable(self) -> frozenset[str]:
        """Stages that the producer says it cannot show."""
        stated = (self.manifest or {}).get("missing", [])
        return (
            frozenset(stated) if isinstance(stated, list) and all(isinstance(s, str) for s in stated) else frozenset()
        )

    @property
    def stated_dtype(self) -> str | None:
        """The dtype in the manifest. Raises `UserError` for one that is not known."""
        dtype = (self.manifest or {}).get("dtype")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"{self.folder / MANIFEST}: dtype {brief(dtype)}; known are {', '.join(DTYPES)}")
        return dtype

    @property
    def stated_activations(self) -> str | None:
        """What the producer rounds activations to before a matmul, where it says so: one of `ACTIVATIONS`."""
        stated = (self.manifest or {}).get("activations")
        if stated is not None and stated not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{self.folder / MANIFEST}: activations {brief(stated)}; known are {known}")
        return stated

    def open(self, key: Key) -> TensorFile:
        """The file of a stage. Raises `UserError` where it is broken or changed, or its header names another layer."""
        return self._source.open(key)

    def guess_dtype(self) -> str:
        """The narrowest dtype that most of the computed stages fit in, for an engine that does not say."""
        keys = [key for key in self.files if key[1] not in ("embedding", "moe_router_indices", "qkv_matmul")]
        votes = Counter(_fits(self.open(key).values[:_SAMPLE]) for key in keys[:64])
        return votes.most_common(1)[0][0] if votes else "float32"


def _fits(values: np.ndarray) -> str:
    if values.dtype.name in ("float16", "bfloat16", "float64"):
        return values.dtype.name
    values = np.asarray(values)[np.isfinite(values)]
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        with np.errstate(over="ignore"):
            if values.size and np.array_equal(values.astype(dtype).astype(values.dtype), values):
                return name
    return "float32"


def ordered(keys: set[Key]) -> list[Key]:
    """Keys in computation order: layer by layer in the order of the stage table, the whole model's stages last."""
    place = {name: index for index, name in enumerate(STAGES)}
    return sorted(keys, key=lambda key: (key[0] is None, key[0] or 0, place[key[1]]))


def path_of(key: Key) -> str:
    """How a stage is called in rules and reports: `layer-3/attn_norm`, `lm_head`."""
    return stage_path(*key).removesuffix(".bin")
