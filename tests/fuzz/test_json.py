"""JSON of somebody else: what has one meaning and can be printed is taken, all else refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights import Config, UserError, config_from_dict
from weights.files import MOST_NESTED, read_json
from weights.tiny import tiny_config

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "invalid start byte"),
        (nested(MOST_NESTED + 1), "more than 64 levels deep"),
        (nested(900), "more than 64 levels deep"),
        (nested(200_000), "more than 64 levels deep"),
        (b'{"a":' * 200_000, "more than 64 levels deep"),
        (b"[NaN]", "NaN is no finite number"),
        (b"[-Infinity]", "-Infinity is no finite number"),
        (b"[1e999]", "'1e999' is no finite number"),
        (b"9" * 5000, "Exceeds the limit"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
    ],
)
def test_what_has_two_meanings_or_none_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=says) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: not readable as JSON: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '{"a": [1], "a": [1]}', '"😀"', "1" * 4000])
def test_what_has_one_meaning_is_taken(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert read_json(path) == json.loads(text)


def test_levels_up_to_the_limit_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(nested(MOST_NESTED))
    assert len(str(read_json(tmp_path / "a.json"))) == 2 * MOST_NESTED


@given(tree=TREES)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_what_python_writes_is_read(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.getbasetemp() / "written.json"
    path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    assert read_json(path) == tree


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = (tiny_config("qwen2"), tiny_config("qwen3_moe"), tiny_config("qwen3", rope_scaling=YARN))


@pytest.mark.parametrize("raw", CONFIGS)
def test_a_config_comes_back_from_its_manifest(raw: dict) -> None:
    config = config_from_dict(raw)
    assert Config.from_json(json.loads(json.dumps(config.to_json())) | {"of another version": 1}) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": -1}, "hidden_size is -1, not int"),
        ({"hidden_size": True}, "hidden_size is True, not int"),
        ({"vocab_size": 1 << 32}, "vocab_size is 4294967296, not int"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', not float"),
        ({"layer_types": 7}, "layer_types is 7, not tuple"),
        ({"mlp_only_layers": ["x"]}, "mlp_only_layers is"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"rope_scaling": {}}, "missing 2 required positional arguments"),
        ({"rope_scaling": {"rope_type": 7, "factor": 1.0}}, "rope_type is 7"),
    ],
)
def test_a_manifest_whose_config_is_none_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config.from_json(config_from_dict(CONFIGS[1]).to_json() | changes)
    with pytest.raises(UserError, match="is no object"):
        Config.from_json([changes])
