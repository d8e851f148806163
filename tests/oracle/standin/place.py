"""One layer of one run: its numbers, its weights as they are (mis)read, its faults, and where its stages are kept."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle.standin.bits import kept, unpacked
from tests.oracle.standin.spoil import spoil

Trace = dict[tuple[int | None, str], np.ndarray]


@dataclass
class Run:
    """What the layers share. `struck` collects the faults that took effect, so that none is planted in vain."""

    config: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    dtype: torch.dtype
    faults: Mapping[str, Container[int] | None]
    tokens: list[int]
    trace: Trace = field(default_factory=dict)
    struck: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Place:
    """A run at one layer, or at the whole model's stages (None)."""

    run: Run
    layer: int | None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.run.config

    @property
    def number(self) -> int:
        """The layer, where it must be one."""
        assert self.layer is not None
        return self.layer

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        default = self.config["hidden_size"] // self.heads if self.config["model_type"] == "qwen2" else 128
        return self.config.get("head_dim") or default

    def fault(self, *names: str) -> bool:
        """Whether one of these faults is planted here."""
        found = [name for name in names if name in self.run.faults and self._here(name)]
        self.run.struck.update(found)
        return bool(found)

    def argument(self, cause: str) -> str | None:
        """The rest of the name of a fault planted here: `5` of `window/5`."""
        for name in self.run.faults:
            if name.startswith(cause + "/") and self._here(name):
                self.run.struck.add(name)
                return name.removeprefix(cause + "/")
        return None

    def _here(self, name: str) -> bool:
        layers = self.run.faults[name]
        return layers is None or (self.layer is not None and self.layer in layers)

    def emit(self, stage: str, x: Tensor) -> Tensor:
        """Keep a stage's output, rounded to the run's type, and hand it on; spoiled first where that is planted."""
        x = spoil(self, stage, x)
        kept = x.to(self.run.dtype) if x.is_floating_point() else x
        self.run.trace[self.layer, stage] = kept.float().numpy().copy()
        return x

    def read(self, stage: str, x: Tensor) -> Tensor:
        """What the stage reads: another tensor that was kept, where that is planted."""
        name = self.argument(f"input_other/{stage}")
        if name is None:
            return x
        last = (self.config["num_hidden_layers"] if self.layer is None else self.layer) - 1
        key = (last if self.layer is None else self.layer, name)
        if name == "hidden":
            key = (last, "post_ffn_residual") if last >= 0 else (0, "embedding")
        key = (0, name) if name == "embedding" else key
        return torch.from_numpy(self.run.trace[key]).to(x.dtype).view_as(x)

    def round(self, x: Tensor) -> Tensor:
        """To the type that this run computes in."""
        return x.to(self.run.dtype)

    def linear(self, x: Tensor, role: str) -> Tensor:
        """x·Wᵀ, summed in float32 and rounded once."""
        return self.round(self.product(x, role))

    def product(self, x: Tensor, role: str) -> Tensor:
        """x·Wᵀ in float32."""
        x, weight, short = x.float(), self.weight(role).float(), role.split(".")[-2]
        if kind := self.argument(f"input_rounded/{short}"):
            x = kept(x, kind)
        if (kind := self.argument(f"weight_rounded/{short}")) and kind.endswith(" both"):
            x = kept(x, kind.removesuffix(" both"))
        if part := self.argument(f"partial_sum/{short}"):
            first, last = {"half": (0.0, 0.5), "quarter": (0.25, 0.5)}.get(part) or (0.0, int(part) / x.shape[-1])
            some = slice(round(first * x.shape[-1]), round(last * x.shape[-1]))
            return x[..., some] @ weight[:, some].T
        return x @ weight.T

    def has(self, role: str) -> bool:
        """Whether the checkpoint has such a tensor at this layer."""
        return self._name(role) in self.run.weights

    def weight(self, role: str) -> Tensor:
        """A tensor of this layer (of the model, where the layer is None), read wrongly where that is planted."""
        short = role.removesuffix(".weight").rpartition(".")[
            2
        ]  # q_proj, gate_proj (an expert's too), gate (the router)
        raw = self.run.weights[self._name(role)]
        other = self._neighbour(role)
        if other is not None and self.fault(f"weight_neighbour/{short}", f"norm_weight_neighbour/{short}"):
            raw = other
        values = np.array(raw, dtype=np.float32)
        if self.fault(f"weight_dtype/{short}"):  # the upper half of a float32 is a bfloat16
            values = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.float16).astype(np.float32)
        if kind := self.argument(f"weight_rounded/{short}"):
            values = kept(torch.from_numpy(values), kind.removesuffix(" both")).numpy()
        if self.fault(f"weight_transposed/{short}"):
            values = values.reshape(values.shape[::-1]).T
        if self.fault(f"weight_transposed/{short}/columns"):
            values = values.T.reshape(values.shape)
        packed = self.argument(f"weight_nibbles/{short}")
        if short in ("q_proj", "k_proj", "v_proj"):
            packed = packed or self.argument("weight_nibbles/qkv")
        if packed:
            values = unpacked(values, packed)
        if self.fault(f"weight_permuted/{short}/halves"):
            halves = values.reshape(-1, 2, self.head_dim // 2, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if self.fault(f"weight_permuted/{short}/heads"):
            by_head = values.reshape(-1, self.head_dim, values.shape[-1])
            values = np.concatenate([by_head[1::-1], by_head[2:]]).reshape(values.shape)
        return self.round(torch.from_numpy(np.ascontiguousarray(values)))

    def neighbour_weight(self, role: str) -> Tensor:
        """The same tensor of the next layer."""
        found = self._neighbour(role)
        assert found is not None
        return self.round(torch.from_numpy(np.array(found, np.float32)))

    def _name(self, role: str) -> str:
        return role if self.layer is None or role.startswith("model.") else f"model.layers.{self.layer}.{role}"

    def _neighbour(self, role: str) -> np.ndarray | None:
        """The same tensor of the next layer that has one, round the end; None where there is no other."""
        count = self.config["num_hidden_layers"]
        for step in range(1, count if self.layer is not None else 0):
            name = f"model.layers.{(self.number + step) % count}.{role}"
            if name in self.run.weights:
                return self.run.weights[name]
        return None
