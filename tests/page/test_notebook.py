"""A result as a notebook takes it: as HTML, as a data frame, as a figure."""

from __future__ import annotations

import sys

import pytest

from oracle.result import Result
from tests.page.pages import planted
from tests.page.test_page import Ids
from weights import UserError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return planted(tmp_path_factory.mktemp("notebook"))


def test_html_is_small_and_runs_nothing(result) -> None:
    html = result._repr_html_()
    assert not Ids(html).open
    assert "<script" not in html and "<button" not in html and len(html) < 30_000
    assert "diverges first at layer-3/qkv_bias" in html and 'title="layer-3/qkv_bias: diverge, 0.225"' in html


def test_html_needs_no_matplotlib(result, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "qkv_bias" in result._repr_html_()
    with pytest.raises(UserError, match=r"jaxref\[html\]"):
        result.plot()


def test_repr_is_one_line(result) -> None:
    assert repr(result) == "Result(diverge, first at layer-3/qkv_bias: 88 stages compared, 0 missing)"


def test_data_frame(result, monkeypatch) -> None:
    frame = result.to_dataframe()
    assert len(frame) == len(result.comparisons)
    first = frame[frame.status == "diverge"].iloc[0]
    assert (first.layer, first.stage) == (3, "qkv_bias") and first.coordinate.startswith("token ")
    assert first.relative_l2 == result.first.test.relative_l2 and first.hf_relative_l2 == result.first.hf.relative_l2
    assert frame.layer.isna().sum() == 2  # the whole model's
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        result.to_dataframe()


def test_figure(result) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    axes = result.plot().axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines][:1] == ["test"]
    assert {"test", "hf", "limit", "floor"} <= {line.get_label() for line in axes.lines}
    assert pyplot.get_fignums() == before  # nothing is left open
