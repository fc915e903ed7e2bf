"""The page, the figures and the sentences of audits of recipes, and of a search."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lightning_cwrf.auditing.recipe_result import Difference
from lightning_cwrf.metrics import Interval
from lightning_cwrf.report import plot_losses, plot_roc, plot_tradeoff, write_report
from lightning_cwrf.report.changes import gain, measured_changes
from lightning_cwrf.report.curves import mean_roc, smallest_rate
from lightning_cwrf.report.svg import Scale
from lightning_cwrf.report.verdict import verdict
from lightning_cwrf.searching import RecipeSearch, Trial, write_search_report
from tests.auditing.recipes import run, simulated
from tests.report.cases import audited, page_of


@pytest.fixture(scope="module")
def recipes():
    leaky, safe = simulated(leak=3.0, better=0.3), simulated()
    return {"leaky": run(leaky, ("loss", "lira")), "safe": run(safe, ("loss", "lira"))}


@pytest.mark.slow
def test_the_page_compares_recipes_in_pairs(recipes, tmp_path):
    page, _ = page_of(recipes, tmp_path)
    assert "2 ways of training · 8 models each, on halves of 96 examples" in page.text
    assert "Members can be told from non-members" in page.text
    assert "leaky → safe: A gain in privacy was shown: " in page.text
    assert "Accuracy against privacy" in page.text
    assert "Most exposed members" not in page.text
    assert "Your model" not in page.text
    row = next(cells for cells in page.cells if cells[0] == "LiRA AUC")
    assert f"lower: {recipes['safe'].minus(recipes['leaky'], 'lira/auroc')}" in row[2]
    assert "One model, also yours, can leak more or less than its recipe does on average." in page.text
    assert "Intervals are over examples." not in page.text


def test_a_change_is_said_at_the_level_of_all_measures_together(recipes):
    before, after = recipes["leaky"], recipes["safe"]
    found = measured_changes(before, after)
    assert [each.label for each in found][:3] == ["train accuracy", "test accuracy", "loss gap (test − train)"]
    level = 0.05 / len(found)
    for each, measure in zip(
        found,
        ["train_accuracy", "test_accuracy", "loss_gap"]
        + [f"{a}/{m}" for a in ("loss", "lira") for m in ("auroc", "tpr_at_fpr_0.001")],
        strict=True,
    ):
        difference = after.minus(before, measure)
        expected = "no difference shown"
        if difference.p_value <= level:
            expected = "lower" if difference.value < 0 else "higher"
        assert each.word == expected, measure
    assert {"lower", "no difference shown"} <= {each.word for each in found}


@pytest.mark.slow
def test_recipes_of_other_pools_are_not_said_to_differ(recipes):
    other = run(simulated(seed=1), ("loss", "lira"))
    assert gain(recipes["leaky"], other).startswith("Whether privacy was gained is not known")


def test_the_verdict_counts_members_found_on_average(recipes):
    said = " ".join(verdict(recipes["leaky"]).details)
    counts = {}
    for attack, scores in recipes["leaky"].scores.items():
        found = 0
        for row, inside in zip(scores.tolist(), recipes["leaky"].is_member.tolist(), strict=True):
            best = max(s for s, m in zip(row, inside, strict=True) if not m)
            found += sum(s > best for s, m in zip(row, inside, strict=True) if m)
        counts[attack] = found / 8
    assert f"finds {max(counts.values()):.1f} of 48 members, on average over the models" in said


def test_a_mean_roc_is_the_mean_of_the_models_rates(recipes):
    result = recipes["leaky"]
    floor = smallest_rate([result])
    assert floor == 0.5 / 48
    for fpr, tpr in mean_roc(result, "lira", floor, points=7):
        rates = []
        for scores, inside in zip(result.scores["lira"].tolist(), result.is_member.tolist(), strict=True):
            outside = [s for s, m in zip(scores, inside, strict=True) if not m]
            members = [s for s, m in zip(scores, inside, strict=True) if m]
            allowed = [t for t in [*scores, math.inf] if sum(s >= t for s in outside) / len(outside) <= fpr + 1e-12]
            rates.append(max(sum(s >= t for s in members) / len(members) for t in allowed))
        assert tpr == pytest.approx(sum(rates) / len(rates), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(48, 1, 8, 8)}, "images are of the exposed members of one model"),
        ({"class_names": ["a"]}, "class_names is for the list of exposed members"),
    ],
)
def test_what_only_a_model_has_is_refused_for_recipes(arguments, message, recipes, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report(recipes, tmp_path / "report.html", **arguments)
    assert not list(tmp_path.iterdir())


def test_models_and_recipes_on_one_page_raise(recipes, tmp_path):
    with pytest.raises(ValueError, match=r"'a' \(AuditResult\), 'leaky' \(RecipeAudit\)"):
        write_report({"a": audited(), **recipes}, tmp_path / "report.html")


@pytest.mark.slow
def test_saved_recipes_are_read_by_their_paths(recipes, tmp_path):
    paths = [result.save(tmp_path / f"{name}.json") for name, result in recipes.items()]
    page, _ = page_of(paths, tmp_path)
    assert "2 ways of training" in page.text
    for path in (plot_roc(recipes, tmp_path / "roc.png"), plot_losses(recipes, tmp_path / "losses.png")):
        assert path.stat().st_size > 10_000


def test_a_recipe_with_nan_scores_and_one_without_an_attack_are_shown_as_such(recipes, tmp_path):
    safe = recipes["safe"]
    nan = replace(safe, scores={**safe.scores, "lira": torch.full_like(safe.scores["lira"], torch.nan)})
    less = replace(safe, scores={"loss": safe.scores["loss"]}, estimates={"loss": safe.estimates["loss"]})
    page, text = page_of({"leaky": recipes["leaky"], "nan": nan, "less": less}, tmp_path)
    assert "Not drawn, because its scores have NaN: nan." in page.text
    assert "not run" in page.text
    assert "NaN" not in text.replace("have NaN", "")


def searched(recipes):
    leaky, safe = recipes["leaky"], recipes["safe"]
    no = Difference(-0.3, Interval(-0.4, -0.2), 0.001)
    trial = Trial("safe", False, 8, safe.model_metrics["test_accuracy"], safe.estimates["lira"]["auroc"], no, None)
    out = replace(trial, name="<worse>", dropped="loses too much test accuracy: −0.3")
    return RecipeSearch(0.02, "lira/auroc", [trial, out], {"no defense": leaky, "safe": safe}, "safe", ["it was short"])


def test_the_page_of_a_search_has_its_conclusions_and_its_dropped_candidates(recipes, tmp_path):
    found = searched(recipes)
    path = write_search_report(found, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "<h2>Conclusions</h2>" in text
    for line in (*found.conclusions(), "it was short", "&lt;worse&gt;", "loses too much test accuracy: −0.3"):
        assert line in text
    assert "<worse>" not in text
    loaded = RecipeSearch.load(found.save(tmp_path / "search.json"))
    assert write_search_report(loaded, tmp_path / "again.html").read_text(encoding="utf-8") == text
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_search_report(found, path)
    with pytest.raises(TypeError, match="search must be what search_recipes returns, not a dict"):
        write_search_report({}, tmp_path / "x.html")


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.481, 0.5, 120.0])
@pytest.mark.parametrize("width", [1e-3, 0.05, 0.333, 1.0, 7.0, 99.0])
def test_ticks_are_round_few_and_inside(low, width):
    found = Scale(low, low + width, 0, 1).ticks()
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 <= each <= low + width + 1e-9 for each in found)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1
    assert all(f"{step:e}"[0] in "125" for step in steps)


@pytest.mark.slow
def test_names_with_dollars_are_no_formulas(recipes, tmp_path):
    names = {f"$5 and _x_ $a {name}": each for name, each in recipes.items()}
    for path in (plot_roc(names, tmp_path / "a.png"), plot_losses(names, tmp_path / "b.png")):
        assert path.stat().st_size > 10_000
    assert plot_tradeoff({"$\\frac$": names}, tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_caution_says_how_each_comparison_was_made(recipes, tmp_path):
    other = run(simulated(seed=1), ("loss", "lira"))
    page, _ = page_of({**recipes, "other": other}, tmp_path)
    assert "Of two recipes with the same pool" in page.text
    assert "Of other audits" in page.text
    page, _ = page_of(recipes, tmp_path, overwrite=True)
    assert "Of other audits" not in page.text


@pytest.mark.parametrize(
    ("names", "seconds", "message"),
    [
        (["", "b"], None, "an audit has an empty name"),
        (["a", "b"], {"a": math.nan, "b": 1.0}, "seconds of a must be a number"),
        (["a", "b"], {"a": 1.0, "b": -1.0}, "seconds of b must be a number"),
    ],
)
def test_names_and_seconds_that_say_nothing_raise(names, seconds, message, recipes, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report(dict(zip(names, recipes.values(), strict=True)), tmp_path / "x.html", seconds=seconds)
