"""Audits as Markdown, as a DataFrame, in a notebook, and their bounds by name."""

import math
import re
import sys
from dataclasses import replace

import pytest

from lightning_cwrf.auditing.tables import markdown_text
from tests.auditing.cases import made
from tests.report.cases import Page

EVIL = "<b>|*x*_[y](z)"


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_markdown_has_what_print_shows():
    result = made()
    shown = result.to_markdown()
    assert rows_of(shown)[:3] == [
        ["the model", "value"],
        ["train accuracy", "1.000 [0.900, 1.000]"],
        ["loss gap", "0.100 [-inf, inf]"],
    ]
    assert rows_of(shown)[3:] == [
        ["attack", "AUC", "TPR at 0.1% FPR", "advantage", "ε, lower bound", "p (AUC)"],
        ["loss attack", "0.750 [0.600, 0.900]", "0.100 [0.000, 0.200]", "0.400 [0.100, 0.700]", "≥ 1.500", "0.01"],
        ["LiRA", "0.750 [0.600, 0.900]", "0.100 [0.000, 0.200]", "0.400 [0.100, 0.700]", "≥ 1.500", "0.01"],
    ]
    points = [line.removeprefix("- ") for line in shown.splitlines() if line.startswith("- ")]
    printed = str(result).splitlines()
    assert set(points) <= set(printed)
    assert "RMIA failed: no population" in points
    assert [line for line in printed if "confidence interval" in line] == points[2:3]


def test_markdown_from_users_is_text():
    result = made(failures={EVIL: f"two\nlines # {EVIL}"}, remarks=["__init__ & tpr_at_fpr"])
    result = replace(result, estimates={EVIL: result.estimates["loss"]})
    shown = result.to_markdown()
    escaped = r"\<b>\|\*x\*\_[y]\(z)"
    assert markdown_text(EVIL) == escaped
    assert f"- {escaped} failed: two lines # {escaped}" in shown
    assert rf"| {escaped} | 0.750" in shown
    assert r"- \_\_init\_\_ \& tpr_at_fpr" in shown


def test_a_notebook_shows_the_tables_and_notes_as_text():
    result = made(failures={EVIL: "<script>alert(1)</script>"})
    shown = result._repr_html_()
    page = Page(shown)
    assert "script" not in page.tags
    assert not re.search(r"style|color|background", shown)  # the notebook's own, light or dark
    assert [
        "loss attack",
        "0.750 [0.600, 0.900]",
        "0.100 [0.000, 0.200]",
        "0.400 [0.100, 0.700]",
        "≥ 1.500",
        "0.01",
    ] in page.cells
    assert ["train accuracy", "1.000 [0.900, 1.000]"] in page.cells
    for note in result.notes(("auroc", "tpr_at_fpr_0.001")):
        assert note in page.text
    assert len(shown) < 5_000


def test_a_data_frame_has_a_row_for_every_estimate():
    pytest.importorskip("pandas", reason="needs pandas")
    result = made()
    frame = result.to_pandas()
    assert len(frame) == len(result.model_metrics) + sum(map(len, result.estimates.values()))
    lira = frame[frame.attack == "lira"].set_index("metric")
    assert lira.loc["auroc", ["value", "low", "high", "p_value", "shadow_low", "shadow_high"]].tolist() == [
        0.75, 0.6, 0.9, 0.01, 0.55, 0.95,
    ]  # fmt: skip
    assert lira.loc["tpr_at_fpr_0.001", "note"] == "too few"
    assert math.isinf(lira.loc["epsilon_lower_bound", "high"])
    assert math.isnan(lira.loc["advantage", "p_value"])
    assert frame[frame.attack.isna()].metric.tolist() == ["train_accuracy", "loss_gap"]
    assert set(frame.dtypes.astype(str)[["value", "low", "p_value", "shadow_high"]]) == {"float64"}


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        made().to_pandas()


def test_bounds_are_finite_and_named_after_their_values():
    bounds = made().bounds()
    assert (bounds["lira/auroc_low"], bounds["lira/auroc_high"]) == (0.6, 0.9)
    assert (bounds["train_accuracy_low"], bounds["train_accuracy_high"]) == (0.9, 1.0)
    assert not [name for name in bounds if "epsilon" in name or "loss_gap" in name]
    assert {name.rpartition("_")[0] for name in bounds} <= set(made().values())
