"""The HTML page: its numbers, its arguments, and what it must not contain."""

import math
import re
from dataclasses import replace

import pytest
import torch

from lightning_cwrf import WeightMask
from lightning_cwrf.auditing import Estimate
from lightning_cwrf.metrics import Interval
from lightning_cwrf.report import comparison_table, write_report
from tests.auditing.cases import estimate
from tests.report.cases import MANY, Page, audited, page_of, random_audit

pytestmark = pytest.mark.slow


def test_the_page_has_the_numbers_and_notes_of_the_comparison_table(tmp_path):
    page, _ = page_of(MANY, tmp_path, seconds={"before": 1.25, "after": 20.0})
    lines = comparison_table(MANY, {"before": 1.25, "after": 20.0}).splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines[2 : lines.index("")]]
    assert len(rows) == 8
    cells = [
        [re.sub(r"(lower|higher|no difference shown|cannot be compared)$", "", c) for c in row] for row in page.cells
    ]
    for row in rows:
        assert row in cells
    for note in lines[lines.index("") + 1 :]:
        assert note in page.text


def test_every_attack_measure_p_value_note_and_failure_is_shown(tmp_path):
    result = random_audit(
        shift=1.0, attacks=["loss", "entropy", "confidence", "modified_entropy"], remarks=["odd data"]
    )
    result = replace(result, failures={"rmia": "no population"})
    page, text = page_of({"it": result}, tmp_path)
    for attack, found in result.estimates.items():
        name = {"loss": "loss attack"}.get(attack, attack)
        assert text.count(f'aria-label="ROC of {name} ') == 1
        for each in found.values():
            assert str(each).split(" [")[0] in page.text
            assert each.p_value is None or f"p = {each.p_value:.2g}" in page.text
    for note in [*result.notes(), "odd data", "RMIA failed: no population"]:
        assert note in page.text
    assert "Attacks that failed, at least on one model: RMIA." in page.text


def test_attacks_that_were_not_run_or_have_no_such_metric_are_not_called_failed(tmp_path):
    results = {"a": audited(failures={}), "b": audited(attacks=["loss"], failures={}), "c": audited(attacks=["loss"])}
    results["c"] = replace(results["c"], failures={"lira": "no shadow models"})
    results["d"] = audited(attacks=["loss"], estimates={"loss": {"balanced_accuracy": estimate(0.5, 0.4, 0.6)}})
    page, _ = page_of(results, tmp_path)
    row = next(line for line in comparison_table(results).splitlines() if line.startswith("LiRA AUC"))
    assert re.split(r"\s{2,}", row)[2:] == ["not run", "failed", "not run"]
    row = next(line for line in comparison_table(results).splitlines() if line.startswith("loss attack AUC"))
    assert row.endswith("not measured")
    assert "Attacks that were not run on every model: LiRA." in page.text
    assert "loss" in str(results["d"])


def test_a_page_replaces_no_input_and_is_html(tmp_path):
    saved = audited().save(tmp_path / "audit.html")
    for results in (saved, [saved], {"a": str(saved)}):
        with pytest.raises(ValueError, match="is read for the report, which would take its place"):
            write_report(results, tmp_path / "x" / ".." / "audit.html", overwrite=True)
    with pytest.raises(ValueError, match=r"must end with \.html, not '\.json'"):
        write_report(audited(), tmp_path / "audit.json")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        write_report(audited(), tmp_path, overwrite=True)
    assert write_report(saved, tmp_path / "PAGE.HTM").exists()


def test_numbers_that_are_nan_or_infinite_are_shown_as_such(tmp_path):
    odd = audited()
    for found in odd.estimates.values():
        found["auroc"] = Estimate(math.nan, Interval(math.nan, math.nan))
        found["advantage"] = estimate(0.4, -math.inf, math.inf)
    losses = odd.losses.clone()
    losses[:3] = torch.tensor([math.inf, math.nan, 0.0])
    scores = {**odd.scores, "loss": torch.full((12,), math.nan, dtype=torch.float64)}
    odd = replace(odd, losses=losses, scores=scores)
    page, text = page_of({"fine": audited(), "odd": odd}, tmp_path)
    assert "No attack has an AUC that is a number." in page.text
    assert "2 losses are NaN or infinite and not drawn." in page.text
    assert "Not drawn, because its scores have NaN: odd." in page.text
    assert "No attack has scores to order the members by." in page.text
    numbers = re.findall(r' (?:d|x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', text)
    assert numbers
    assert not [each for each in numbers if re.search("nan|inf", each, re.I)]


def test_names_from_users_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>&amp;'
    result = audited()
    result = replace(
        result,
        scores={evil: result.scores["loss"]},
        estimates={evil: result.estimates["loss"]},
        failures={evil: evil},
        remarks=[evil],
    )
    mask = WeightMask({f"{evil}.weight": torch.tensor([True, False])})
    page, text = page_of(
        {evil: result, "other": result},
        tmp_path,
        title=evil,
        mask=mask,
        settings={evil: {evil: evil}},
        class_names=[evil] * 3,
    )
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count(evil) > 20
    assert not [value for name, value in page.attributes if name.startswith("on")]


def test_nothing_comes_from_a_network_and_no_script_runs(tmp_path):
    page, text = page_of(MANY, tmp_path, images=torch.rand(6, 3, 4, 4))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<script|<iframe", text)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links
    assert all(value.startswith("data:image/png;base64,") for value in links)
    assert "default-src 'none'" in text


def test_saved_audits_are_read_and_named_after_their_files(tmp_path):
    paths = [audited(0.7).save(tmp_path / "plain.json"), audited(0.6).save(tmp_path / "tuned.json")]
    page, text = page_of(paths, tmp_path)
    assert ["", "plain", "tuned"] in page.cells
    named = {"plain": paths[0], "tuned": audited(0.6)}
    assert Page(text).cells == page_of(named, tmp_path, overwrite=True)[0].cells
    assert "plain" in page_of(str(paths[0]), tmp_path, overwrite=True)[0].text
    twins = [audited(0.7).save(tmp_path / "a" / "audit.json"), audited(0.6).save(tmp_path / "b" / "audit.json")]
    assert ["", *map(str, twins)] in page_of(twins, tmp_path, overwrite=True)[0].cells


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"results": {}}, ValueError, "there is no audit to show"),
        ({"results": []}, TypeError, "results must be audits by the name"),
        ({"results": [audited()]}, TypeError, "results must be audits by the name"),
        ({"results": {"a": 1}}, TypeError, "'a' must be an AuditResult or a RecipeAudit, not a int"),
        ({"results": ["none.json"]}, FileNotFoundError, "there is no saved audit"),
        ({"results": ["same.json", "same.json"]}, ValueError, "given twice"),
        ({"results": {"a": audited(), "b": audited(confidence=0.9)}}, ValueError, "different confidence"),
        ({"title": 3}, TypeError, "title must be text, not a int"),
        ({"mask": {"w": torch.ones(2)}}, TypeError, "mask must be a WeightMask or a file of one, not a dict"),
        ({"mask": "none.safetensors"}, FileNotFoundError, "none.safetensors"),
        ({"settings": [1]}, TypeError, "settings must be values by name, not a list"),
        ({"class_names": ["a", "b"]}, ValueError, "class_names has 2 names, and the audits have at least 3 classes"),
        ({"class_names": "abc"}, TypeError, "class_names must be a list of names"),
        ({"exposed": -1}, ValueError, "exposed must be an integer of at least 0"),
        ({"overwrite": "yes"}, TypeError, "overwrite must be True or False"),
        ({"seconds": {}}, ValueError, "seconds must have one number for each model"),
    ],
)
def test_wrong_arguments_raise_and_leave_no_page(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        write_report(**{"results": audited(), "path": "x.html", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_page_is_replaced_only_when_asked(tmp_path):
    path = write_report(audited(), tmp_path / "deep" / "x.html")
    before = path.read_text()
    with pytest.raises(FileExistsError, match=r"x\.html exists; pass overwrite=True to replace it"):
        write_report(audited(0.6), path)
    assert path.read_text() == before
    write_report(audited(0.6), path, overwrite=True)
    assert path.read_text() != before
    assert [each.name for each in path.parent.iterdir()] == ["x.html"]


def test_a_page_of_many_examples_stays_small(tmp_path):
    """Curves are thinned to what a screen shows."""
    results = {f"model {i}": random_audit(20_000, 0.5, seed=i, attacks=["loss"]) for i in range(2)}
    path = write_report(results, tmp_path / "x.html")
    assert 20_000 < path.stat().st_size < 120_000


def test_settings_and_versions_are_shown(tmp_path):
    page, _ = page_of(
        audited(), tmp_path, settings={"rewind": {"rate": 0.03, "values": "initial"}, "seed": 0, "none": None}
    )
    for row in (["rewind.rate", "0.03"], ["rewind.values", "initial"], ["seed", "0"], ["none", "None"]):
        assert row in page.cells
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text
    assert "No settings were given" in page_of(audited(), tmp_path, overwrite=True)[0].text


def test_notes_have_the_words_of_the_page(tmp_path):
    page, _ = page_of(random_audit(shift=2.0, attacks=["loss"]), tmp_path)
    assert "TPR at 0.1% FPR: 60 non-members" in page.text
    assert "tpr_at_fpr" not in page.text
    assert "auroc" not in page.text
