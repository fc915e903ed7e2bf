"""The HTML page: what it says, what it refuses to say, and what it must not hold."""

import base64
import io
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_cwrf import WeightMask
from lightning_cwrf.auditing import Estimate, audit_outputs
from lightning_cwrf.metrics import Interval
from lightning_cwrf.metrics.functional import resolvable_auc
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.report import comparison_table, write_report
from lightning_cwrf.report.changes import same_examples
from lightning_cwrf.report.verdict import rule, verdict
from tests.auditing.cases import estimate
from tests.report.cases import Page, audited

pytestmark = pytest.mark.slow


def random_audit(n=60, shift=0.0, seed=0, **more):
    """Of a model that gives members a logit higher by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for i, extra in enumerate((shift, 0.0)):
        targets = torch.randint(3, (n,), generator=generator)
        logits = torch.randn(n, 3, generator=generator) + extra * torch.nn.functional.one_hot(targets, 3)
        ids = [f"{i}-{j}" for j in range(n)]
        sides.append(ModelOutputs(logits, targets, ids))
    return audit_outputs(*sides, **more)


def page_of(results, folder, **more):
    path = write_report(results, folder / "report.html", **more)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


MANY = {"before": audited(0.9, low=0.8, high=0.95), "after": audited(0.6, low=0.5, high=0.7)}


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
    for note in [*result.notes(), "odd data", "the rmia attack failed: no population"]:
        assert note in page.text
    assert "Attacks that failed, at least on one model: RMIA." in page.text


def test_an_attack_that_finds_members_is_named_with_its_uncertainty(tmp_path):
    result = random_audit(shift=2.0, attacks=["loss"])
    page, _ = page_of(result, tmp_path)
    auc = result.estimates["loss"]["auroc"]
    assert "Members can be told from non-members: loss attack beats guessing." in page.text
    bounds = f"(interval: {100 * auc.interval.low:.1f}% to {100 * auc.interval.high:.1f}%)"
    assert f"ranks the member higher in {100 * auc.value:.1f}% of cases {bounds}; guessing does so in 50%." in page.text
    members, nonmembers = result.scores["loss"][:60], result.scores["loss"][60:]
    found = int((members > nonmembers.max()).sum())
    assert f"Without accusing one of the 60 non-members, loss attack finds {found} of 60 members" in page.text
    assert "p ≤ 0.025: that is 5% divided by 2 tests" in page.text


@pytest.mark.parametrize("seed", range(3))
def test_an_audit_that_finds_nothing_says_what_it_could_not_have_seen_and_never_safe(tmp_path, seed):
    page, _ = page_of(random_audit(seed=seed, attacks=["loss", "entropy"]), tmp_path)
    assert "No attack that ran could be told from guessing. Another attack may do better." in page.text
    assert "no false positive rate below 1.7% can be seen" in page.text
    least = f"{resolvable_auc(60, 60, 1 - 0.05 / 4):.3f}"  # the four tests of the verdict together
    assert f"an AUC below {least} cannot be told from guessing" in page.text
    assert f"an AUC of at least {least} is significantly better than chance" in page.text
    assert ["the smallest that this audit can tell from guessing", least] in page.cells
    assert "No attack with shadow models ran." in page.text
    assert "read these numbers as those of a weak attacker" in page.text
    assert "an audit bounds nothing from above" in page.text
    assert not re.search(r"\b(safe|secure|private)\b", page.text, re.I)


def test_shadow_models_are_named_where_an_attack_used_them(tmp_path):
    page, _ = page_of(audited(), tmp_path)
    assert "LiRA compared the model with shadow models." in page.text
    assert "No attack with shadow models ran" not in page.text


def test_p_values_are_judged_all_together(tmp_path):
    """Four tests: 0.04 alone is no finding."""

    def at(p):
        estimates = {
            attack: {**found, "auroc": replace(found["auroc"], p_value=p)}
            for attack, found in audited().estimates.items()
        }
        for found in estimates.values():
            found["tpr_at_fpr_0.001"] = replace(found["tpr_at_fpr_0.001"], p_value=1.0)
        return audited(estimates=estimates)

    page, _ = page_of({"a": at(0.04)}, tmp_path)
    assert "No attack that ran could be told from guessing." in page.text
    page, _ = page_of({"a": at(0.0125)}, tmp_path, overwrite=True)
    assert "Members can be told from non-members: loss attack and LiRA beat guessing." in page.text


def test_an_attack_below_chance_gives_no_verdict(tmp_path):
    result = audited(0.2, low=0.1, high=0.3, attacks=["loss"])
    for found in result.estimates.values():
        found.update({name: replace(each, p_value=1.0) for name, each in found.items()})
    page, _ = page_of(result, tmp_path)
    assert "loss attack did worse than guessing" in page.text
    assert "this audit says nothing about the model" in page.text
    assert "could be told from guessing" not in page.text
    assert "are members and non-members swapped" in page.text


def test_an_attack_whose_interval_is_below_chance_gives_no_verdict():
    """As of members and non-members swapped by mistake, in a small audit."""
    result = random_audit(n=200, shift=-0.25, seed=1, attacks=["loss"])
    assert 0.4 < result.estimates["loss"]["auroc"].value < result.estimates["loss"]["auroc"].interval.high < 0.5
    said = verdict(result)
    assert said.level == "unknown"
    assert "or it is chance, which does this in at most about 2.5% of audits" in said.headline


def with_loss(value=0.5, low=0.4, high=0.6, p_value=1.0, **more):
    each = estimate(value, low, high, p_value=p_value)
    return audited(attacks=["loss"], estimates={"loss": {"auroc": each, "tpr_at_fpr_0.001": each}}, **more)


def test_what_was_not_measured_is_not_called_not_found():
    nan = math.nan
    assert verdict(with_loss()).level == "not found"
    for unmeasured in (
        with_loss(nan, nan, nan),
        with_loss(p_value=nan),
        with_loss(nan, nan, nan, p_value=None),
        audited(estimates={"loss": {"balanced_accuracy": estimate(0.5, 0.4, 0.6)}}, attacks=["loss"]),
        audited(estimates={}, attacks=[], failures={"loss": "no data"}),
    ):
        assert verdict(unmeasured).level == "unknown"
    assert not rule({"it": with_loss(p_value=nan)})
    result = with_loss(failures={"rmia": "no population"})
    result.estimates["lira"] = {"auroc": estimate(nan, nan, nan)}
    said = verdict(result)
    assert said.level == "not found"
    assert said.details[0] == "Failed, and not part of this verdict: RMIA."
    assert said.details[1].endswith("and not part of this verdict: LiRA.")


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


def test_a_page_takes_the_place_of_no_input_and_is_html(tmp_path):
    saved = audited().save(tmp_path / "audit.html")
    for results in (saved, [saved], {"a": str(saved)}):
        with pytest.raises(ValueError, match="is read for the report, which would take its place"):
            write_report(results, tmp_path / "x" / ".." / "audit.html", overwrite=True)
    with pytest.raises(ValueError, match=r"must end with \.html, not '\.json'"):
        write_report(audited(), tmp_path / "audit.json")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        write_report(audited(), tmp_path, overwrite=True)
    assert write_report(saved, tmp_path / "PAGE.HTM").exists()


def test_examples_are_compared_by_content():
    """Equal labels alone are not the same data."""
    targets = torch.arange(20) % 3

    def of(inputs):
        sides = [
            ModelOutputs(torch.randn(20, 3), targets, [f"{inputs}-{side}-{i}" for i in range(20)]) for side in "ab"
        ]
        return audit_outputs(*sides)

    assert same_examples(of("x"), of("x"))
    assert not same_examples(of("x"), of("y"))
    assert same_examples(of("x"), replace(of("x"), examples=""))


def test_before_and_after_say_no_more_than_the_intervals(tmp_path):
    page, _ = page_of(MANY, tmp_path)
    assert "before → after: A gain in privacy was shown: loss attack AUC and LiRA AUC fell." in page.text
    assert "Loss attack AUC and LiRA AUC are lower; for the other measures of attacks the" in page.text
    same = {"a": audited(0.7), "b": audited(0.65), "c": audited(0.95, low=0.91, high=0.99)}
    page, _ = page_of(same, tmp_path, overwrite=True)
    assert "For all measures of attacks the intervals overlap." in page.text
    assert "a → b: No gain in privacy was shown" in page.text
    assert "a → c: Privacy was lost: loss attack AUC and LiRA AUC rose." in page.text
    assert "Loss attack AUC and LiRA AUC are higher;" in page.text
    assert "these audits cannot tell" in page.text
    assert "different examples" not in page.text
    assert "compared by labels alone" in page.text
    page, _ = page_of({"a": audited(), "b": audited(n=8)}, tmp_path, overwrite=True)
    assert "is not known: the two audits are of different examples, or read them differently." in page.text
    assert "by labels alone" not in page.text
    page, _ = page_of(audited(), tmp_path, overwrite=True)
    assert "Before and after" not in page.text


def test_an_attack_that_failed_on_one_model_is_not_compared(tmp_path):
    page, _ = page_of({"a": audited(), "b": audited(attacks=["loss"], failures={"lira": "no"})}, tmp_path)
    assert "LiRA AUC and LiRA TPR at 0.1% FPR cannot be compared." in page.text
    assert ["LiRA AUC", "0.750 [0.600, 0.900]", "failedcannot be compared"] in page.cells


def test_an_audit_in_which_every_attack_failed_says_nothing(tmp_path):
    page, text = page_of(audited(attacks=[]), tmp_path)
    assert "No attack could run: this audit says nothing about the model." in page.text
    assert "the rmia attack failed: no population" in page.text
    assert "ROC of" not in text


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


def test_the_layers_of_the_rewound_weights(tmp_path):
    mask = WeightMask(
        {
            "net.0.weight": torch.tensor([True, True, False, False]),
            "net.0.bias": torch.tensor([True]),
            "net.2.weight": torch.zeros(10, dtype=torch.bool),
            "scale": torch.tensor([True]),
        }
    )
    path = mask.save(tmp_path / "mask.safetensors")
    for given in (mask, path, str(path)):
        page, _ = page_of(audited(), tmp_path, mask=given, overwrite=True)
        assert ["net.0", "3 of 5", "60.0%", "75.0%"] in page.cells
        assert ["net.2", "0 of 10", "0.0%", "0.0%"] in page.cells
        assert ["scale", "1 of 1", "100.0%", "25.0%"] in page.cells
        assert "4 of 16 weights (25.00%) were rewound and held." in page.text
    many = WeightMask({f"layer{i}.weight": torch.tensor([i % 2 == 0, False]) for i in range(90)})
    page, _ = page_of(audited(), tmp_path, mask=many, overwrite=True)
    assert "Not listed: 50 further layers with 5 rewound weights." in page.text
    assert "Rewound weights" not in page_of(audited(), tmp_path, overwrite=True)[0].text


def test_the_most_exposed_members_by_the_strongest_attack(tmp_path):
    result = random_audit(shift=2.0, attacks=["loss", "entropy"])
    aucs = {attack: found["auroc"].value for attack, found in result.estimates.items()}
    strongest = max(aucs, key=aucs.get)
    page, text = page_of({"it": result}, tmp_path, exposed=4, class_names=["cat", "dog", "owl"])
    for each in result.exposed(strongest, 4):
        above = round(60 * each.false_positive_rate)
        row = [str(each.member), ["cat", "dog", "owl"][each.target], f"{each.score:.4g}", f"{above} of 60"]
        assert row in page.cells
    assert "treat the page as you treat the data" in page.text
    assert "<img" not in text  # pictures only when asked
    assert "Most exposed" not in page_of(result, tmp_path, exposed=0, overwrite=True)[0].text


def test_a_list_of_exposed_members_says_when_its_attack_found_none(tmp_path):
    results = {"leaks": random_audit(shift=2.0, attacks=["loss"]), "does not": random_audit(attacks=["loss"])}
    doubt = "could not be told from guessing on this model, so the list means nothing"
    page, _ = page_of(results, tmp_path)
    assert page.text.count(doubt) == 1
    assert (
        page.text.index("leaks, by loss attack") < page.text.index("does not, by loss attack") < page.text.index(doubt)
    )


def test_notes_have_the_words_of_the_page(tmp_path):
    page, _ = page_of(random_audit(shift=2.0, attacks=["loss"]), tmp_path)
    assert "TPR at 0.1% FPR: 60 non-members" in page.text
    assert "tpr_at_fpr" not in page.text
    assert "auroc" not in page.text


def test_pictures_of_members_are_their_own(tmp_path):
    """The picture beside a member's index is that member's, stretched to the full range."""
    result = audited(attacks=["loss"])
    images = torch.zeros(6, 1, 3, 5)
    for i in range(6):
        images[i, 0, 0, :i] = 0.25
    for given in (images, list(images), TensorDataset(images, torch.arange(6)), images[:, 0]):
        _, text = page_of(result, tmp_path, images=given, exposed=3, overwrite=True)
        found = re.findall(r'alt="member (\d)" src="data:image/png;base64,([^"]+)"', text)
        assert [int(i) for i, _ in found] == [each.member for each in result.exposed("loss", 3)]
        for i, content in found:
            pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(content))).getdata())).view(3, 5)
            assert torch.equal(pixels, (images[int(i), 0] * 4 * 255).long())
    assert "It shows their pictures" in text


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(5, 1, 2, 2), ValueError, "images has 5 elements, and 'the model' was audited with 6 members"),
        (
            torch.rand(6, 2, 2, 2),
            ValueError,
            r"the shape \(1 or 3, height, width\) or \(height, width\), not \(2, 2, 2\)",
        ),
        (torch.full((6, 2, 2), math.nan), ValueError, "NaN or infinite"),
        (["a"] * 6, TypeError, r"must be a tensor, or \(tensor, label\), not a str"),
        (iter(range(6)), TypeError, "images must be the members in the order of the audit"),
    ],
)
def test_wrong_pictures_raise_and_leave_no_page(images, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_report(audited(), tmp_path / "x.html", images=images)
    assert not list(tmp_path.iterdir())


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
        ({"results": {"a": 1}}, TypeError, "'a' must be an AuditResult, not a int"),
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
        audited(), tmp_path, settings={"rewind": {"rate": 0.03, "to": "vanilla"}, "seed": 0, "none": None}
    )
    for row in (["rewind.rate", "0.03"], ["rewind.to", "vanilla"], ["seed", "0"], ["none", "None"]):
        assert row in page.cells
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text
    assert "No settings were given" in page_of(audited(), tmp_path, overwrite=True)[0].text
