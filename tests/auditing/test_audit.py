"""Audits of finished models in one call."""

import dataclasses
import functools
import inspect
import json
import math

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_cwrf import MIAAuditCallback, attacks
from lightning_cwrf.attacks import Attack, available_attacks, create_attack
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.auditing import AuditResult, audit, audit_outputs
from lightning_cwrf.auditing.evidence import columns_of
from lightning_cwrf.auditing.names import attack_name
from lightning_cwrf.metrics.functional import resolvable_auc
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.report import comparison_table, plot_losses, plot_roc
from tests.auditing.conftest import MEMBERS, NONMEMBERS, POPULATION
from tests.helpers import Classifier, digits, loader, part, same_snapshot, snapshot, trainer


@pytest.mark.slow
def test_every_attack_beats_chance_on_a_model_that_memorised(audited):
    result = audited[1].result
    assert result.model_metrics["train_accuracy"].value == 1.0
    assert not result.failures
    assert set(result.estimates) == {"loss", "lira", "rmia"}
    for attack, found in result.estimates.items():
        assert found["auroc"].interval.low > 0.5, attack


@pytest.fixture(scope="module")
def full(audited, shadows):
    """Every attack, in one call."""
    model, every = audited[0], available_attacks()
    return audit(model, members=MEMBERS, nonmembers=NONMEMBERS, shadows=shadows, attacks=every)


@pytest.mark.slow
def test_lira_and_rmia_beat_the_loss_attack(audited):
    values = audited[1].result.values()
    assert min(values["lira/auroc"], values["rmia/auroc"]) > values["loss/auroc"]


@pytest.mark.slow
def test_every_attack_in_one_call(audited, shadows, full):
    assert list(full.estimates) == available_attacks()
    for attack, found in full.estimates.items():
        assert found["auroc"].value > 0.5, attack
        if attack not in ("correctness", "augmentation", "entropy", "quantile_regression"):  # weak, at 100 members
            assert found["auroc"].p_value < 0.05, attack
        assert found["epsilon_lower_bound"].interval.high == math.inf
    same = audited[1].result
    for attack in ("loss", "lira", "rmia"):
        torch.testing.assert_close(full.scores[attack], same.scores[attack], rtol=1e-3, atol=1e-3)
    again = audit(audited[0], members=MEMBERS, nonmembers=NONMEMBERS, shadows=shadows, attacks=["neural", "lira"])
    assert torch.equal(again.scores["neural"], full.scores["neural"])


def test_views_are_those_of_the_shadow_models(audited, shadows):
    attacks = ["augmentation"]
    given = {"members": MEMBERS, "nonmembers": NONMEMBERS, "attacks": attacks, "views": default_views()}
    with pytest.raises(ValueError, match="the shadow models have views of their own"):
        audit(audited[0], **given, shadows=shadows)
    assert audit(audited[0], **given).scores["augmentation"].max() <= 1.0  # without shadow models a share of views


@pytest.mark.slow
def test_an_audit_does_not_change_a_plain_module():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    before, rng = snapshot(model), torch.get_rng_state()
    attacks = ["loss", "attack_p", "quantile_regression", "augmentation"]
    result = audit(model, members=MEMBERS, nonmembers=NONMEMBERS, population=POPULATION, attacks=attacks)
    same_snapshot(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())
    for attack in ("loss", "attack_p"):  # an untrained model tells nobody
        assert result.estimates[attack]["auroc"].p_value > 0.01
        assert result.estimates[attack]["epsilon_lower_bound"].value == 0
    assert list(audit(model, members=MEMBERS, nonmembers=NONMEMBERS).estimates) == ["loss"]


def test_an_audit_is_saved_and_loaded(full, tmp_path):
    path = full.save(tmp_path / "deep" / "audit.json")
    again = AuditResult.load(path)
    assert again.estimates == full.estimates
    assert again.model_metrics == full.model_metrics
    assert again.confidence == full.confidence
    assert again.failures == full.failures
    for name, score in full.scores.items():
        assert torch.equal(again.scores[name], score)
    for name in ("is_member", "targets", "losses"):
        assert torch.equal(getattr(again, name), getattr(full, name))
    assert str(again) == str(full)
    content = json.loads(path.read_text())
    assert content["attacks"]["lira"]["auroc"]["value"] == full.estimates["lira"]["auroc"].value


def test_the_printed_table_has_every_attack_and_its_main_numbers(full):
    text = str(full)
    assert text.splitlines()[0] == "100 members, 100 non-members"
    table = text[text.index("\nattack ") :]
    for attack, found in full.estimates.items():
        line = next(line for line in table.splitlines() if line.startswith(f"{attack_name(attack)} "))
        shown = [n for n in found if n not in ("tpr_at_fpr_1e-05", "balanced_accuracy", "p1", "mu_lower_bound")]
        assert len(shown) == 4
        assert all(str(found[name]) in line for name in shown)
        assert len(line) < 120
    assert "the saved file: mu_lower_bound, tpr_at_fpr_1e-05, balanced_accuracy, p1." in text
    least = resolvable_auc(100, 100, 1 - 0.05 / (2 * len(full.estimates)))  # AUC and TPR of each attack together
    resolution = f"100 members and 100 non-members: an AUC of at least {least:.3f} is significantly better than chance"
    assert resolution in text
    assert "the smallest FPR that can be seen is 0.01" in text
    assert any(resolution in note for note in full.notes())


def test_the_most_exposed_members_by_counting(full):
    exposed = full.exposed("lira", count=7)
    scores, members = full.scores["lira"], full.scores["lira"][:100]
    assert [e.score for e in exposed] == sorted(members.tolist(), reverse=True)[:7]
    for e in exposed:
        assert float(scores[e.member]) == e.score
        assert e.target == int(MEMBERS[e.member][1])
        assert e.false_positive_rate == sum(s >= e.score for s in scores[100:].tolist()) / 100
    every = full.exposed("lira", count=100)
    assert full.exposed("lira", count=100, target=3) == [e for e in every if e.target == 3]
    assert full.exposed("lira", count=2, target=3) == [e for e in every if e.target == 3][:2]
    assert [each.value for each in full.slices(attack="loss")] == list(range(10))
    with pytest.raises(ValueError, match="this audit has no attack 'nn'; it has attack_p"):
        full.exposed("nn")


def flat(begin):
    images, labels = digits()[begin : begin + 20]
    return TensorDataset(images.flatten(1), labels)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"attacks": ["lyra"]}, ValueError, "no attack 'lyra'"),
        ({"attacks": "lira"}, TypeError, r"a list of names, such as \['lira'\]"),
        ({"attacks": []}, ValueError, "there is none"),
        ({"attacks": ["loss", "loss"]}, ValueError, "once each, and one at least; loss"),
        ({"attacks": ["loss", "lira"]}, ValueError, "the lira attack needs shadow models: pass shadows="),
        ({"attacks": ["loss", "attack_p"]}, ValueError, "the attack_p attack needs a population"),
        ({"nonmembers": MEMBERS}, ValueError, "are members"),
        ({"population": part(50, 90)}, ValueError, "40 of the 40 examples of population are members"),
        ({"population": part(190, 210)}, ValueError, "10 of the 20 examples of population are non-members too"),
        (
            {"attacks": ["augmentation"], "members": flat(0), "nonmembers": flat(100)},
            ValueError,
            "rotate and move images",
        ),
    ],
)
def test_invalid_audit_raises(settings, error, message):
    with pytest.raises(error, match=message):
        audit(Classifier(), **{"members": MEMBERS, "nonmembers": NONMEMBERS, **settings})


def test_two_populations_raise(shadows):
    with pytest.raises(ValueError, match="leave population out"):
        audit(Classifier(), members=MEMBERS, nonmembers=NONMEMBERS, shadows=shadows, population=POPULATION)


def test_an_audit_sees_the_models_outputs_and_does_not_change_it(audited, shadows):
    model, callback, _ = audited
    before = snapshot(model)
    parts = [collect_outputs(model, data) for data in (MEMBERS, NONMEMBERS, POPULATION)]
    again = audit_outputs(parts[0], parts[1], shadows=shadows, population=parts[2])
    same_snapshot(before, snapshot(model))
    assert again.values() == pytest.approx(callback.result.values())
    unseen = torch.cat([parts[1].correct, parts[2].correct])
    assert again.model_metrics["test_accuracy"].value == pytest.approx(float(unseen.float().mean()))


def test_membership_reaches_no_attack(audited, shadows):
    """Swapping who is called a member swaps the labels; no example's score changes."""
    members, nonmembers, population = (collect_outputs(audited[0], d) for d in (MEMBERS, NONMEMBERS, POPULATION))
    result = audit_outputs(members, nonmembers, shadows=shadows, population=population)
    swapped = audit_outputs(nonmembers, members, shadows=shadows, population=population)
    for name, scores in result.scores.items():
        assert torch.allclose(swapped.scores[name], scores.roll(100)), name
        assert swapped.values()[f"{name}/auroc"] == pytest.approx(1 - result.values()[f"{name}/auroc"])
    for attack in (attacks.lira, attacks.rmia, attacks.loss_threshold):
        assert "is_member" not in inspect.signature(attack).parameters


def test_examples_are_found_by_content_in_any_order(audited, shadows):
    model, callback, _ = audited
    backwards = [torch.utils.data.Subset(d, list(range(len(d)))[::-1]) for d in (MEMBERS, NONMEMBERS)]
    population = collect_outputs(model, POPULATION)
    found = audit_outputs(*(collect_outputs(model, d) for d in backwards), shadows=shadows, population=population)
    assert found.values() == pytest.approx(callback.result.values(), abs=0.02)
    assert found.values()["lira/auroc"] == pytest.approx(callback.result.values()["lira/auroc"], abs=1e-9)


def test_examples_outside_the_pool_raise(audited, shadows):
    model = audited[0]
    with pytest.raises(ValueError, match=r"100 of the 200 audited examples are not in the pool of 200"):
        audit_outputs(collect_outputs(model, MEMBERS), collect_outputs(model, part(200, 300)), shadows=shadows)


def test_copies_in_a_pool_are_matched_one_to_one():
    class Pool:
        digests = [b"b", b"a", b"c", b"a"]
        targets = torch.zeros(4).long()

    assert columns_of([b"a", b"b", b"a"], torch.zeros(3).long(), Pool).tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match=r"1 of the 3 audited examples are not in the pool of 4 .*, or more often"):
        columns_of([b"a", b"a", b"a"], torch.zeros(3).long(), Pool)


def test_a_failed_attack_is_named_and_the_others_are_valid(audited, shadows):
    from dataclasses import replace

    model = audited[0]
    lost = replace(shadows, population=None, population_logits=None)
    result = audit_outputs(collect_outputs(model, MEMBERS), collect_outputs(model, NONMEMBERS), shadows=lost)
    assert set(result.estimates) == {"loss", "lira"}
    assert "the rmia attack needs a population: pass population= to train_shadows" in result.failures["rmia"]
    assert any(note.startswith("RMIA failed: it needs a population") for note in result.notes())
    table = comparison_table({"a": audited[1].result, "b": result})
    assert "failed" in next(line for line in table.splitlines() if line.startswith("RMIA AUC"))
    callback = MIAAuditCallback(NONMEMBERS, shadows=lost, members=MEMBERS)
    with pytest.warns(UserWarning, match="RMIA failed"):
        trainer(max_epochs=1, callbacks=[callback]).fit(Classifier(), loader(0, 100))


def test_an_attack_that_writes_into_the_evidence_is_an_error():
    """The attacks after it would see what it left."""
    model = Classifier()
    careless = Attack("careless", lambda evidence: evidence.logits.zero_()[:, 0])
    with pytest.raises(ValueError, match=r"the careless attack changed the evidence's logits in place.*clone"):
        audit(model, members=MEMBERS, nonmembers=NONMEMBERS, attacks=[careless, create_attack("loss")])


@pytest.mark.slow
def test_table_and_plots(audited, tmp_path):
    results = {"plain": audited[1].result, "again": dataclasses.replace(audited[1].result, weights="")}
    table = comparison_table(results, {"plain": 1.0, "again": 2.0})
    lines = table.splitlines()
    assert lines[0].split() == ["plain", "again"]
    expected = audited[1].result.estimates["lira"]["auroc"]
    assert str(expected) in next(line for line in lines if line.startswith("LiRA AUC"))
    assert any("100 non-members cannot show an FPR of 0.001" in line for line in lines)
    assert "95% confidence" in table
    with pytest.raises(ValueError, match="'plain' was not audited with 'nn'; it has loss, lira, rmia"):
        plot_roc(results, tmp_path / "x.png", attack="nn")
    assert "tensor(" not in repr(audited[1].result)  # no raw scores
    for path in (plot_roc(results, tmp_path / "a" / "roc.png"), plot_losses(results, tmp_path / "b" / "l.png")):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@functools.cache
def source(name):
    return inspect.getsource(inspect.getmodule(getattr(attacks, name)))


def test_attacks_loop_over_no_example():
    for name in ("lira", "rmia", "loss_threshold"):
        assert " in range(" not in source(name)
