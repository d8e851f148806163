"""The plan of the memory: never too small, not much too great, and kept to."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxref import dump as dumping
from jaxref.devices import memory_limit, parse_size
from jaxref.memory import plan_memory, stage_work, trace_bytes
from jaxref.precision import numerics_of
from jaxref.selection import Selection, parse_layers, parse_stages
from jaxref.stages import STAGES, keys_of
from jaxref.stream import stream
from tests.commands import command, refused
from tests.conftest import prompt
from tests.test_lowered import abstract, cases, config_of
from tests.trees import read_tree, tree_bytes, write_tree
from weights import Config, UserError, config_from_dict, open_checkpoint
from weights.tiny import tiny_config


def selection(config: Config, count: int) -> Selection:
    return Selection(config, count, parse_stages("all", config), parse_layers("all", config.num_hidden_layers), "all")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("name", "key"), list(cases()))
def test_no_stage_needs_more_than_its_plan(name: str, key, dtype: str) -> None:
    """What XLA says that the compiled program takes beside its inputs and outputs."""
    numerics, stage, config = numerics_of(dtype), STAGES[key[1]], config_of(name)
    if stage.name == "embedding":  # whose whole table is never an input: only the rows of the prompt's tokens are
        return
    with numerics.context():
        compiled = abstract(stage, config, key[0], numerics, count=64).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= stage_work(
        stage, config, key[0], 64, numerics, numerics.compute
    )


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("qwen2-0.5b", "float32", 7),
        ("qwen2-0.5b", "float16", 300),
        ("qwen3-0.6b", "float32", 300),
        ("qwen3-0.6b", "float64", 7),
    ],
)
def test_the_activations_of_a_layer_are_planned_within_a_factor(name: str, dtype: str, count: int) -> None:
    """All outputs of a layer and the work of its largest stage, by the compiled programs; the plan is 1 to 3 times."""
    numerics, config = numerics_of(dtype), config_of(name)
    outputs, work = 0, 0
    with numerics.context():
        for layer, stage in keys_of(config):
            if layer == 0 and stage != "embedding":
                compiled = abstract(STAGES[stage], config, 0, numerics, count).lower().compile().memory_analysis()
                outputs, work = outputs + compiled.output_size_in_bytes, max(work, compiled.temp_size_in_bytes)
    planned = plan_memory(selection(config, count), numerics).activations
    assert outputs + work <= planned <= 3 * (outputs + work)


@pytest.mark.parametrize("read_ahead", [True, False])
@pytest.mark.parametrize("name", ["qwen2-0.5b", "moe-64"])
def test_what_lies_on_the_device_stays_inside_the_plan(zoo, name: str, read_ahead: bool) -> None:
    """Every array alive at every stage, the reader's too. The plan has room for what programs use inside, besides."""
    checkpoint, tokens = open_checkpoint(zoo(name)), prompt(20, 272)
    numerics, chosen = numerics_of("float32"), selection(checkpoint.config, 20)
    plan = replace(plan_memory(chosen, numerics), read_ahead=read_ahead, waiting=0)  # nothing waits here
    before, most = alive(), 0
    for _ in stream(checkpoint, tokens, chosen, numerics, read_ahead=read_ahead):
        most = max(most, alive() - before)
    assert most <= plan.needed <= 3 * most


def alive() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_one_layer_at_a_time_gives_the_same_bytes(zoo, tmp_path, monkeypatch) -> None:
    folder, tokens, ahead = zoo("moe"), prompt(20, 272), []
    streamed = dumping.stream
    monkeypatch.setattr(dumping, "stream", lambda *a, **o: ahead.append(o["read_ahead"]) or streamed(*a, **o))
    checkpoint = open_checkpoint(folder)
    plan = plan_memory(selection(checkpoint.config, 20), numerics_of("float32"))
    limit = replace(plan, read_ahead=False).needed
    assert plan.fit(limit).read_ahead is False and plan.fit(plan.needed).read_ahead is True
    write_tree(folder, tmp_path / "two", tokens, positions="all")
    write_tree(folder, tmp_path / "one", tokens, positions="all", max_memory=limit)
    assert ahead == [True, False]
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
    with pytest.raises(UserError, match=r"one layer at a time needs .* MB .* may be used: take fewer tokens"):
        write_tree(folder, tmp_path / "none", tokens, positions="all", max_memory=limit - 1)
    assert not (tmp_path / "none").exists()


def test_the_plan_of_the_command_line(tmp_path) -> None:
    words = ["dump", "--tokens", "1,2,3", "--output", tmp_path / "tree"]
    assert "memory on a device: " in command(*words, "--plan").stdout
    plan = json.loads(command(*words, "--plan", "--json").stdout)["device_memory"]
    assert (
        plan["needed"]
        == max(2 * plan["layer"] + plan["activations"], 2 * plan["head"] + plan["logits"]) + plan["waiting"]
    )
    assert "may be used" in refused(*words, "--max-device-memory", "100kB")
    assert "may be used" in refused(*words, "--max-device-memory", "100kB", "--plan")
    assert "8GB or 512MiB" in refused(*words, "--max-device-memory", "much")
    assert list(tmp_path.iterdir()) == []
    assert command(*words, "--max-device-memory", str(plan["needed"]), "--quiet").returncode == 0
    assert len(read_tree(tmp_path / "tree")) == 71


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8e9), ("512MiB", 512 << 20), ("1.5 kib", 1536), ("7", 7), ("3B", 3), ("2TB", 2e12)],
)
def test_sizes(text: str, count: float) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1GB", "1e9", "8 G", "GB", "1..2GB", "inf", "9" * 400])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="a number of bytes was expected"):
        parse_size(text)


class Card:
    """A device as JAX shows a GPU: 75 of 80 GB may be taken, 15 are."""

    def memory_stats(self):
        return {"bytes_limit": 75_000, "bytes_in_use": 15_000, "peak_bytes_in_use": 20_000}


def test_the_limit_of_a_device() -> None:
    assert memory_limit(Card(), None) == 54_000
    assert memory_limit(Card(), 99_000) == 99_000
    assert memory_limit(jax.devices("cpu")[0], None) is None


@pytest.mark.parametrize(("arch", "like"), [("qwen2", "7b"), ("qwen3_moe", "30b-a3b")])
def test_the_plan_of_real_shapes(arch: str, like: str) -> None:
    """Parameters by hand: the whole model's count without its embedding; a mesh of four holds a quarter."""
    config, numerics = config_from_dict(tiny_config(arch, like)), numerics_of("float32")
    plan = plan_memory(selection(config, 7), numerics)
    from weights.names import expected

    stored = sum(int(np.prod(shape)) for name, shape in expected(config) if "embed_tokens" not in name)
    assert plan.model == 4 * stored
    kept = plan_memory(selection(config, 7), numerics, platform="cuda", stored=np.dtype(ml_dtypes.bfloat16))
    assert (kept.model, kept.layer) == (2 * stored, plan.layer // 2)
    split = plan_memory(selection(config, 7), numerics, ways=4)
    assert plan.model / 4 <= split.model <= plan.model / 4 * 1.01
    assert trace_bytes(config, 7, numerics) == selection(config, 7).size()
