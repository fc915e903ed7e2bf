"""Evidence: its cached signals, its models and its fields."""

from dataclasses import replace

import pytest
import torch

from lightning_cwrf.attacks import (
    Evidence,
    PerModel,
    available_attacks,
    create_attack,
    logit_signal,
    shadow_bootstrap,
    signals,
)
from lightning_cwrf.attacks.signals import check_targets
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.cases import attack, evidence


@pytest.mark.parametrize("name", [n for n in available_attacks() if n != "neural"])  # which reads drawn logits instead
def test_no_signal_is_computed_twice(name, monkeypatch):
    """Not by another call of the attack, not by another attack, not by the replicates of a bootstrap."""
    calls = []

    def counted(logits, targets):
        calls.append(logits.shape)
        return check_targets(logits, targets)

    monkeypatch.setattr(signals, "check_targets", counted)  # which every signal calls once
    seen, is_member = evidence(n=60, k=8, m=40)
    first = attack(name)(seen)
    assert calls
    calls.clear()
    assert torch.equal(attack(name)(seen), first)
    shadow_bootstrap(attack(name), seen, is_member, {}, 3)
    assert not calls


def test_replicates_share_what_the_first_of_them_computes(monkeypatch):
    seen, is_member = evidence(n=60, k=8, m=40)
    computed = []

    def signal(logits, targets):
        computed.append(logits.shape)
        return logit_signal(logits, targets)

    def scores(drawn):
        return drawn.signal(signal) - drawn.shadow_signals(signal).mean(0)

    shadow_bootstrap(scores, seen, is_member, {}, 3)
    assert computed == [(60, 4)] * 9  # the audited model, and each shadow model once


def test_signals_of_drawn_models_are_those_of_the_whole():
    seen, is_member = evidence(n=40, k=8, m=30)
    calls = []

    def signal(logits, targets):
        calls.append(logits.shape)
        return logit_signal(logits, targets)

    first = seen.shadow_signals(signal)
    assert calls == [(40, 4)] * 8
    assert torch.equal(first, logit_signal(seen.shadow_logits, seen.targets))
    assert seen.shadow_signals(signal) is first

    def scores(drawn):
        rows = (drawn.shadow_logits[:, None] == seen.shadow_logits).flatten(2).all(-1).int().argmax(1)
        assert torch.equal(drawn.shadow_signals(signal), first[rows])
        return drawn.shadow_signals(signal).mean(0)

    shadow_bootstrap(scores, seen, is_member, {"auc": membership_auroc}, 5)
    assert len(calls) == 8
    twice = PerModel(seen.shadow_logits)[torch.tensor([3, 5, 5])][torch.tensor([2, 0])]
    assert len(twice) == 2
    assert torch.equal(twice.tensor(), seen.shadow_logits[[5, 3]])
    assert torch.equal(twice.signal(logit_signal, seen.targets), first[[5, 3]])
    other = replace(seen, targets=(seen.targets + 1) % 4)
    assert not torch.equal(other.shadow_signals(signal), first)
    assert torch.equal(other.shadow_signals(signal), logit_signal(seen.shadow_logits, other.targets))


def test_outputs_on_a_pool_in_order_are_not_copied():
    outputs = torch.randn(2, 5, 3)
    assert PerModel(outputs).tensor() is outputs
    assert PerModel(outputs, torch.arange(5)).tensor() is outputs
    assert torch.equal(PerModel(outputs, torch.arange(4)).tensor(), outputs[:, :4])
    assert torch.equal(PerModel(outputs, torch.tensor([1, 0, 2, 3, 4])).tensor(), outputs[:, [1, 0, 2, 3, 4]])
    drawn = PerModel(outputs, torch.tensor([4, 1]))[torch.tensor([1])]
    assert len(drawn) == 1
    assert torch.equal(drawn.tensor(), outputs[1:, [4, 1]])
    assert drawn.device == outputs.device
    assert len(PerModel(outputs)) == 2


def test_signals_of_the_population_and_of_views():
    seen, _ = evidence(n=20, k=4, m=30)
    population = logit_signal(seen.shadow_population_logits, seen.population_targets)
    assert torch.equal(seen.shadow_signals(logit_signal, "population"), population)
    assert torch.equal(
        seen.signal(logit_signal, "population"), logit_signal(seen.population_logits, seen.population_targets)
    )
    assert torch.equal(seen.signal(logit_signal, "views"), logit_signal(seen.view_logits, seen.targets))
    views = seen.shadow_signals(logit_signal, "views")
    assert views.shape == (4, 3, 20)
    assert torch.equal(views, logit_signal(seen.shadow_view_logits, seen.targets))
    bare = Evidence(seen.logits, seen.targets, shadow_population_logits=seen.shadow_population_logits)
    with pytest.raises(ValueError, match=r"the evidence has no shadow_logits\."):
        bare.shadow_signals(logit_signal)
    with pytest.raises(ValueError, match=r"the evidence has no population_targets\."):
        bare.shadow_signals(logit_signal, "population")
    with pytest.raises(ValueError, match=r"the evidence has no view_logits\."):
        bare.signal(logit_signal, "views")
    with pytest.raises(ValueError, match=r"the evidence has no inputs\."):
        bare.require("inputs")


def test_missing_fields():
    bare = Evidence(torch.zeros(2, 3), torch.zeros(2).long())
    assert bare.shadow_logits is bare.shadow_view_logits is bare.shadow_population_logits is None
    full = replace(bare, shadow_logits=torch.zeros(4, 2, 3))
    assert full.has("logits", "shadow_logits")
    assert not full.has("logits", "membership")
    assert full.shadow_logits.shape == (4, 2, 3)


def test_evidence_with_one_of_two_needed_fields_raises():
    seen, _ = evidence(n=20, k=4, m=30)
    for name, field in (("lira", "membership"), ("attack_p", "population_targets")):
        with pytest.raises(ValueError, match=f"the {name} attack needs"):
            create_attack(name)(replace(seen, **{field: None}))
    with pytest.raises(ValueError, match="the quantile_regression attack needs a population's inputs"):
        create_attack("quantile_regression")(replace(seen, population_inputs=None))
