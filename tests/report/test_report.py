"""Tables and plots of audits made by hand, and invalid arguments."""

import sys

import pytest
import torch
from matplotlib.colors import to_rgba

from lightning_cwrf.report import comparison_table, plot_losses, plot_roc, plot_tradeoff, tradeoff_table
from lightning_cwrf.report.plots import _colours
from tests.report.cases import audited


def saved(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plt = sys.modules.get("matplotlib.pyplot")
    assert plt is None or plt.get_fignums() == []  # no figure is left open
    return True


ONE = {"flat": audited()}
NESTED = {"scratch": {"none": audited(), "hamp": audited(0.6)}, "tuned": {"hamp": audited(0.55)}}
FLAT = [
    (comparison_table, {}),
    (plot_losses, {"path": "a.png"}),
    (plot_roc, {"path": "a.png", "attack": "loss"}),
]
BY_WAY = [(tradeoff_table, {}), (plot_tradeoff, {"path": "a.png", "attack": "loss"})]


@pytest.mark.parametrize(("function", "more"), FLAT)
@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ({}, ValueError, "there is no audit to show: results is empty"),
        ([audited()], TypeError, "results must be audits by the name of the model, .* not a list"),
        (audited(), TypeError, "results must be audits by the name .* not a AuditResult"),
        (None, TypeError, "not a NoneType"),
        ({"a": audited(), "b": 0.5}, TypeError, "'b' must be an AuditResult( or a RecipeAudit)?, not a float"),
        (NESTED, TypeError, "'scratch' is a dict of audits, not an AuditResult: results by way and defense are for"),
    ],
)
def test_invalid_audits_by_name_raise(function, more, results, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        function(results, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("function", "more"), BY_WAY)
@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ({}, ValueError, "there is no audit to show"),
        ({"scratch": {}}, ValueError, "there is no audit to show"),
        ([], TypeError, "audits by the way a model was trained and then by its defense, .* not a list"),
        (ONE, TypeError, "and then by its defense, .* not audits by one name"),
        ({"scratch": [audited()]}, TypeError, "audits by the name of the model, .* not a list"),
        ({"scratch": {"none": 3}}, TypeError, "'none' must be an AuditResult( or a RecipeAudit)?, not a int"),
    ],
)
def test_invalid_audits_by_way_and_defense_raise(function, more, results, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        function(results, **more)
    assert not list(tmp_path.iterdir())


def test_an_attack_missing_from_an_audit_raises(tmp_path):
    results = {"a": audited(), "b": audited(attacks=["loss"])}
    with pytest.raises(ValueError, match="'b' was not audited with 'lira'; it has loss"):
        plot_roc(results, tmp_path / "x.png")
    with pytest.raises(ValueError, match="'b' was not audited with 'lira'; it has loss"):
        plot_tradeoff({"scratch": results}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="'c' was not audited with 'nn'; it has none"):
        plot_roc({"c": audited(attacks=[])}, tmp_path / "x.png", attack="nn")


def test_intervals_of_different_confidence_raise():
    results = {"a": audited(), "b": audited(confidence=0.9)}
    with pytest.raises(ValueError, match=r"different confidence.*: 0\.95 \(a\), 0\.9 \(b\)\. Audit them at one"):
        comparison_table(results)
    with pytest.raises(ValueError, match=r"different confidence.* 0\.9 \(b \(scratch\)\)"):
        tradeoff_table({"scratch": results})
    assert "In brackets: 99.5% confidence interval." in comparison_table({"a": audited(confidence=0.995)})


def test_a_model_without_seconds_raises():
    with pytest.raises(ValueError, match="seconds must have one number for each model; b has none"):
        comparison_table({"a": audited(), "b": audited()}, seconds={"a": 1.0})


def test_a_model_that_was_not_trained_here_has_no_seconds():
    results = {"a": audited(), "b": audited()}
    (line,) = (line for line in comparison_table(results, {"a": None, "b": 2.0}).splitlines() if "seconds" in line)
    assert line.split() == ["seconds", "–", "2.0"]
    assert "seconds" not in comparison_table(results, {"a": None, "b": None})


@pytest.mark.parametrize(("bins", "error"), [(0, ValueError), (2.5, TypeError), ("40", TypeError)])
def test_invalid_bins_raise(bins, error, tmp_path):
    with pytest.raises(error, match="bins must be an integer"):
        plot_losses(ONE, tmp_path / "x.png", bins=bins)


def test_the_comparison_has_a_column_per_model_and_a_row_per_measure():
    table = comparison_table(
        {"a": audited(0.7), "b": audited(0.6, attacks=["loss"], failures={"lira": "no"})}, {"a": 1.25, "b": 20, "c": 3}
    )
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    assert rows[0] == ["a", "b"]
    assert set("".join(rows[1])) == {"─"}
    assert rows[2:10] == [
        ["train accuracy", "1.000 [0.900, 1.000]", "1.000 [0.900, 1.000]"],
        ["test accuracy", "0.800 [0.700, 0.900]", "0.800 [0.700, 0.900]"],
        ["loss gap (test − train)", "0.100 [-inf, inf]", "0.100 [-inf, inf]"],
        ["loss attack AUC", "0.700 [0.600, 0.900]", "0.600 [0.600, 0.900]"],
        ["loss attack TPR at 0.1% FPR", "0.100 [0.000, 0.200]", "0.100 [0.000, 0.200]"],
        ["LiRA AUC", "0.700 [0.600, 0.900]", "failed"],
        ["LiRA TPR at 0.1% FPR", "0.100 [0.000, 0.200]", "failed"],
        ["seconds", "1.2", "20.0"],
    ]
    assert table.splitlines()[10:13] == [
        "",
        "In brackets: 95% confidence interval.",
        "RMIA failed: no population",
    ]
    assert table.count("TPR at 0.1% FPR: too few") == 1


def test_the_tradeoff_has_a_row_per_model_with_a_defenses_rows_together():
    table = tradeoff_table({**NESTED, "none yet": {}})
    lines = table.splitlines()
    assert lines[0].split()[:6] == ["defense", "way", "train", "accuracy", "test", "accuracy"]
    assert [line.split()[:2] for line in lines[2:5]] == [["none", "scratch"], ["hamp", "scratch"], ["hamp", "tuned"]]
    assert "0.550 [0.600, 0.900]" in lines[4]
    assert "In brackets: 95% confidence interval." in table


@pytest.mark.parametrize("count", [1, 10, 11, 30])
def test_every_series_has_its_own_colour(count):
    assert len({to_rgba(colour) for colour in _colours(count)}) == count


@pytest.mark.slow
def test_plots_are_saved_under_the_path_that_is_returned(tmp_path):
    assert saved(plot_losses({**ONE, "other": audited()}, tmp_path / "deep" / "losses.png"))
    path = plot_roc(ONE, tmp_path / "roc", attack="loss")
    assert path == tmp_path / "roc.png"
    assert saved(path)
    assert saved(plot_tradeoff(NESTED, str(tmp_path / "t.png")))
    zero = audited(losses=torch.zeros(12, dtype=torch.float64))
    assert saved(plot_losses({"no loss at all": zero}, tmp_path / "zero.png", bins=1))
