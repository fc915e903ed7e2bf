"""Audit results on disk, and what they say of themselves."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_cwrf.auditing import AuditResult, audit_outputs
from lightning_cwrf.auditing.saved import plain, read_json, write_json
from lightning_cwrf.outputs import ModelOutputs
from tests.auditing.cases import estimate, made


def same(a, b):
    for name in ("estimates", "model", "confidence", "failures"):
        assert getattr(a, name) == getattr(b, name)
    assert list(a.scores) == list(b.scores)
    pairs = [(a.scores[name], b.scores[name]) for name in a.scores]
    pairs += [(getattr(a, name), getattr(b, name)) for name in ("is_member", "targets", "losses")]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    return True


@pytest.mark.parametrize("name", ["audit.json", "rate_0.01", "no_ending", "ä/deep/audit.json"])
def test_a_result_is_loaded_from_its_path(tmp_path, name):
    result = made()
    path = result.save(str(tmp_path / name))
    assert path == tmp_path / name
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(AuditResult.load(path), result)
    assert str(AuditResult.load(str(path))) == str(result)


def test_names_with_dots_do_not_collide(tmp_path):
    first, second = made(auc=0.7), made(auc=0.8)
    paths = [first.save(tmp_path / "rate_0.01"), second.save(tmp_path / "rate_0.03")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rate_0.01", "rate_0.03"]
    assert same(AuditResult.load(paths[0]), first)
    assert same(AuditResult.load(paths[1]), second)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_weight_files_are_not_overwritten(tmp_path, ending):
    weights = tmp_path / "init.safetensors"
    save_file({"w": torch.ones(2)}, weights)
    before = weights.read_bytes()
    made().save(tmp_path / "init.json")
    assert weights.read_bytes() == before
    with pytest.raises(ValueError, match=rf"one JSON file.*init\{ending} has the suffix .* Name it init\.json"):
        made().save(tmp_path / f"init{ending}")
    assert weights.read_bytes() == before


@pytest.mark.slow
def test_a_crash_while_saving_leaves_the_old_result(tmp_path):
    """The process is killed in the middle of the write."""
    old = made(auc=0.7)
    path = old.save(tmp_path / "audit.json")
    code = (
        "import os, pathlib\n"
        "from tests.auditing.cases import made\n"
        "write = pathlib.Path.write_text\n"
        "def half(self, text, **more):\n"
        "    write(self, text[: len(text) // 2], **more)\n"
        "    os._exit(9)\n"
        "pathlib.Path.write_text = half\n"
        f"made(auc=0.9).save({str(path)!r})\n"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=where).returncode == 9
    assert same(AuditResult.load(path), old)


def test_a_failed_save_leaves_the_old_result_and_no_other_file(tmp_path):
    old = made()
    path = old.save(tmp_path / "audit.json")
    with pytest.raises(TypeError):
        made(weights=object()).save(path)
    assert same(AuditResult.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]


def edited(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["attacks"]["loss"]["auroc"].update(value=0.5),
        lambda c: c["attacks"]["loss"]["auroc"]["interval"].reverse(),
        lambda c: c.pop("model"),
        lambda c: c.update(confidence=0.99),
        lambda c: c.pop("digest"),
        lambda c: c["failures"].clear(),
        lambda c: c["raw"]["is_member"].update(base64=c["raw"]["is_member"]["base64"].replace("A", "B", 1)),
        lambda c: c["raw"]["scores"].pop("lira"),
        lambda c: c.update(notes=[]),
    ],
)
def test_a_changed_file_raises(tmp_path, edit):
    path = made().save(tmp_path / "audit.json")
    edited(path, edit)
    with pytest.raises(ValueError, match=r"audit\.json was changed after it was saved.* Restore the file, or run"):
        AuditResult.load(path)


def test_another_layout_of_the_same_content_is_loaded(tmp_path):
    result = made()
    path = result.save(tmp_path / "audit.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert same(AuditResult.load(path), result)


def test_other_files_raise(tmp_path):
    path = made().save(tmp_path / "audit.json")
    text = path.read_text()
    with pytest.raises(FileNotFoundError, match=r"there is no saved audit at .*none\.json"):
        AuditResult.load(tmp_path / "none.json")
    for name, content, message in (
        ("torn.json", text[:100], "is damaged or is not JSON"),
        ("other.json", "{}", "is not a saved audit"),
        ("list.json", "[1]", "is not a saved audit"),
        ("old.json", text.replace("AuditResult/2", "AuditResult/1"), "format lightning_cwrf.AuditResult/1 of another"),
        ("mask.json", text.replace("AuditResult/2", "WeightMask/2"), "is not a saved audit"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} .*{message}|{message}"):
            AuditResult.load(tmp_path / name)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged or is not JSON"):
        AuditResult.load(tmp_path / "bytes.json")


def test_readable_numbers_come_before_the_scores(tmp_path):
    path = made().save(tmp_path / "audit.json")
    content = json.loads(path.read_text())
    assert content["format"] == "lightning_cwrf.AuditResult/2"
    assert content["attacks"]["loss"]["auroc"] == {
        "value": 0.75,
        "interval": [0.6, 0.9],
        "note": None,
        "p_value": 0.01,
        "shadow_interval": [0.55, 0.95],
    }
    assert content["attacks"]["lira"]["epsilon_lower_bound"]["interval"] == [1.5, "inf"]
    assert content["model"]["loss_gap"]["interval"] == ["-inf", "inf"]
    assert content["notes"] == made().notes()
    assert list(content)[-2:] == ["raw", "digest"]
    assert all(len(line) < 300 for line in path.read_text().partition('"raw"')[0].splitlines())


def test_fields_that_are_added_later_are_kept_and_may_be_missing(tmp_path):
    @dataclass(frozen=True)
    class More(AuditResult):
        later: dict[str, list[int]] = field(default_factory=dict)

    old = made().save(tmp_path / "old.json")
    assert More.load(old).later == {}
    path = More(**vars(made()), later={"nonmembers": [3, 4]}).save(tmp_path / "new.json")
    assert More.load(path).later == {"nonmembers": [3, 4]}


def test_every_kind_of_value_comes_back(tmp_path):
    content = {
        "format": "x/1",
        "none": None,
        "flag": True,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(7),
        "view": torch.arange(6.0).view(2, 3).t(),
        "nested": [{"a": torch.tensor([True, False])}],
    }
    read = read_json(write_json(content, tmp_path / "x.json"), "x/1")
    for name in ("half", "empty", "one", "view"):
        assert read[name].dtype == content[name].dtype
        assert torch.equal(read[name], content[name])
    assert (read["none"], read["flag"]) == (None, True)
    assert read["nested"][0]["a"].tolist() == [True, False]
    assert plain([math.nan, 0.5, estimate(1.0, 0.0, math.inf)])[:2] == ["nan", 0.5]
    with pytest.raises(TypeError, match="not complex64"):
        plain(torch.zeros(1, dtype=torch.complex64))


def test_nan_values_come_back(tmp_path):
    result = made(model={"test_loss": estimate(math.nan, math.nan, math.nan, p_value=math.nan)})
    again = AuditResult.load(result.save(tmp_path / "a.json")).model_metrics["test_loss"]
    assert all(math.isnan(x) for x in (again.value, *again.interval, again.p_value))


@pytest.mark.parametrize(
    ("auc", "high", "said"), [(0.07, 0.12, True), (0.44, 0.492, True), (0.44, 0.493, False), (0.5, 0.6, False)]
)
def test_an_auc_below_chance_asks_whether_the_sides_were_swapped(auc, high, said):
    """Of two attacks, z is 2.2414 instead of 1.96: the reach of 0.0525 above 0.44 becomes 0.06."""
    estimates = {**made().estimates, "lira": {"auroc": estimate(auc, 0.0, high)}}
    notes = made(estimates=estimates).notes()
    expected = f"LiRA: an AUC of {auc:.3f} is below chance, interval included: are members and non-members swapped, or"
    assert any(note.startswith(expected) for note in notes) == said
    assert not any(note.startswith("loss: an AUC") for note in notes)
    assert not any("below chance" in note for note in made(estimates=estimates).notes(["advantage"]))
    assert not any("below chance" in note for note in replace(made(), estimates={"x": {}}).notes())


def test_places_where_no_file_can_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file"):
        made().save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        made().save(tmp_path / "file" / "a.json")
    with pytest.raises(ValueError, match="suffix of another kind"):
        made().save(tmp_path / "A.CKPT")


def test_one_attack_is_below_chance_where_its_interval_is():
    for high, below in ((0.4999, ["loss"]), (0.5, []), (0.51, []), (math.nan, [])):
        assert made(estimates={"loss": {"auroc": estimate(0.48, 0.4, high)}}).below_chance() == below


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"count": "5"}, TypeError, "count must be an integer"),
        ({"count": -1}, ValueError, "count must be an integer of at least 0"),
        ({"target": True}, TypeError, "target must be an integer"),
        ({"attack": "nn"}, ValueError, "this audit has no attack 'nn'; it has loss, lira"),
    ],
)
def test_invalid_queries_raise(settings, error, message):
    with pytest.raises(error, match=message):
        made().exposed(**settings)


def test_the_most_exposed_by_hand():
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 2.0, 0.0])
    result = AuditResult(
        scores={"loss": scores},
        is_member=torch.tensor([True, True, True, False, False, False]),
        targets=torch.tensor([0, 1, 1, 0, 1, 0]),
        losses=scores,
        estimates={},
        model={},
        confidence=0.95,
    )
    assert result.exposed("loss") == [(0, 0, 3.0, 0.0), (2, 1, 3.0, 0.0), (1, 1, 1.0, 2 / 3)]
    assert result.exposed("loss", count=1, target=1) == [(2, 1, 3.0, 0.0)]
    assert result.exposed("loss", count=0) == []
    assert [each.estimates["auroc"].value for each in result.slices(attack="loss")] == [1.0, 0.5]


def test_a_mean_of_one_value_and_a_high_confidence():
    x = torch.tensor([[3.0, 1.0]])
    one = ModelOutputs(x, torch.tensor([0]), [b"a"]), ModelOutputs(x, torch.tensor([1]), [b"b"])
    text = str(audit_outputs(*one, confidence=0.999))
    assert "test loss: 2.127 [-inf, inf]" in text
    assert "In brackets: 99.9% confidence interval." in text
    assert "at 99.9% confidence" in text
