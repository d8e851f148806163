"""One model on several devices: eight virtual ones of a CPU, in processes of their own, since JAX counts them once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxref.mesh import parse_mesh, split_axis
from tests.commands import ROOT, refused
from tests.conftest import prompt
from tests.test_memory import config_of
from tests.trees import distance, read_tree
from weights import UserError
from weights.names import EXPERTS, layer_rows

# Relative L2 of any stage against one device: sums in another order, nothing else.
BOUNDS = {"float32": 5e-6, "float64": 1e-13}
FFN = {"ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl"}
HEADS = {"qkv_matmul", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax", "attention"}
SPLIT = {"2": HEADS | FFN, "3": set(), "4": FFN}
WAYS = {"qwen2": (2, 3, 4), "qwen3": (2, 4), "moe": (2, 4)}

SCRIPT = """
import json, sys
import numpy as np
from jaxref import Session
from tests.trees import distances, flat
from weights import open_checkpoint

folder, dtype, tokens, ways = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
checkpoint, found = open_checkpoint(folder), {}
with Session(checkpoint, dtype) as session:
    one = session.forward(tokens)
for count in ways:
    with Session(checkpoint, dtype, mesh=f"tp={count}") as session:
        trace = session.forward(tokens)
        apart = distances(trace, one)
        same = sum(np.array_equal(a, b) for a, b in zip(flat(trace).values(), flat(one).values()))
        split = [name for name, value in trace["layer-1"].items() if not value.sharding.is_fully_replicated]
        layer = session._source._layers[0]
        held = [layer.q_proj, layer.k_proj, layer.o_proj, layer.gate_proj, session._source._head[0]]
        if layer.gate_proj is None:
            held[3] = session._source._experts[0][5].down_proj
        shares = [array.addressable_shards[0].data.size / array.size for array in held]
        found[count] = {"distances": apart, "devices": session.mesh.size, "shares": shares, "split": split}
        found[count]["same"] = same == len(apart)
print(json.dumps(found))
"""


def on_eight(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize("name", list(WAYS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mesh_differs_from_one_device_by_rounding_alone(zoo, name: str, dtype: str) -> None:
    ways = WAYS[name] if dtype == "float32" else WAYS[name][:1]
    done = on_eight("-c", SCRIPT, zoo(name), dtype, json.dumps(prompt(20, 272)), json.dumps(ways))
    assert done.returncode == 0, done.stderr
    for count, found in json.loads(done.stdout).items():
        worst = max(found["distances"], key=found["distances"].get)
        assert found["distances"][worst] <= BOUNDS[dtype], (count, worst, found["distances"][worst])
        assert found["devices"] == int(count)
        # And each device computes its part: the values lie split as well.
        assert set(found["split"]) >= SPLIT[count]
        # 6 query heads and 2 kv heads: three ways cut q and o alone, four ways neither. 272 rows of the head.
        q, k, o, ffn, head = found["shares"]
        part = 1 / int(count)
        assert (q, k) == {"2": (part, part), "3": (part, 1), "4": (1, 1)}[count]
        assert (o, ffn, head) == (q, 1 if count == "3" else part, 1 if count == "3" else part)


def test_half_precision_keeps_its_bytes(zoo) -> None:
    """Its sums are made in float64, where their order decides no rounding."""
    done = on_eight("-c", SCRIPT, zoo("qwen2"), "float16", json.dumps(prompt(20, 272)), "[2]")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["2"]["same"]


def test_the_command_line_and_its_manifest(zoo, tmp_path) -> None:
    words = ["-m", "jaxref", "dump", zoo("moe"), "--tokens", "5,6,7,8", "--quiet"]
    one, two = [*words, "--output", tmp_path / "one"], [*words, "--output", tmp_path / "two", "--mesh", "tp=2"]
    for command in (one, two, two):  # the second time into the same folder: the same run
        done = on_eight(*command)
        assert done.returncode == 0, done.stderr
    devices = [json.loads((tmp_path / n / "manifest.json").read_text())["device"] for n in ("one", "two")]
    assert "mesh" not in devices[0]
    assert devices[1] == devices[0] | {"mesh": {"tp": 2}}
    alone, split = read_tree(tmp_path / "one"), read_tree(tmp_path / "two")
    assert alone.keys() == split.keys()
    assert max(distance(split[path], alone[path]) for path in alone) <= BOUNDS["float32"]
    mixed = on_eight(*words, "--output", tmp_path / "two", "--mesh", "tp=4")
    assert (mixed.returncode, "another dump (device differ)" in mixed.stderr) == (2, True), mixed.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp", "NAME=N was expected"),
        ("tp=", "NAME=N was expected"),
        ("tp=0", "NAME=N was expected"),
        ("tp=-2", "NAME=N was expected"),
        ("tp=2,tp=2", "NAME=N was expected"),
        ("", "NAME=N was expected"),
        ("ep=2", "there is no axis 'ep'"),
        ("tp=2,dp=2", "there is no axis 'dp'"),
    ],
)
def test_a_mesh_that_is_none(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_mesh(text)


def test_too_few_devices(tmp_path) -> None:
    words = ("dump", "--mesh", "tp=4096", "--output", tmp_path / "tree")
    assert "needs 4096 devices, JAX finds" in refused(*words)
    assert list(tmp_path.iterdir()) == []
    assert parse_mesh(" tp = 4 ") == {"tp": 4}


@pytest.mark.parametrize("ways", [2, 4, 7, 8])
def test_heads_are_never_cut(ways: int) -> None:
    """The 7B has 28 heads and 4 kv heads: seven ways split q and o and leave k and v whole, eight leave all whole."""
    from weights import config_from_dict
    from weights.tiny import tiny_config

    config = config_from_dict(tiny_config("qwen2", "7b"))
    cut = {row.field: split_axis(row.name, row.shape(config), config, ways) for row in layer_rows(config, 0)}
    kv = None if ways > 4 else 0
    assert (cut["q_proj"], cut["q_bias"], cut["o_proj"]) == ((None, None, None) if ways == 8 else (0, 0, 1))
    assert (cut["k_proj"], cut["v_proj"], cut["k_bias"], cut["v_bias"]) == (kv, kv, kv, kv)
    assert (cut["input_layernorm"], cut["post_attention_layernorm"]) == (None, None)
    assert cut["gate_proj"] == cut["up_proj"] == (0 if 18944 % ways == 0 else None)


def test_experts_are_split_inside_and_the_router_is_not() -> None:
    config = config_of("moe")
    axes = {row.field: split_axis(row.name, row.shape(config), config, 4) for row in EXPERTS}
    assert axes == {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    names = {row.field: split_axis(row.name, row.shape(config), config, 2) for row in layer_rows(config, 0)}
    assert {field for field, axis in names.items() if axis is None} >= {"router", "q_norm", "k_norm"}
    assert np.prod([axis is not None for field, axis in names.items() if field in ("q_proj", "k_proj", "v_proj")])
