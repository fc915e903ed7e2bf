"""What holds for every registered attack: a new one is tested here without being named."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from lightning_cwrf.attacks import (
    Evidence,
    PerModel,
    available_attacks,
    create_attack,
    signals,
)
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.cases import Largest, attack, calibration, evidence, given_fields


@pytest.mark.parametrize("name", available_attacks())
def test_every_attack_finds_a_signal_and_none_in_noise(name):
    with_signal, without = calibration(name)
    assert with_signal > 0.55
    assert abs(without - 0.5) < 0.05


@pytest.mark.parametrize("name", available_attacks())
def test_writing_into_scores_does_not_change_the_next_ones(name):
    seen, _ = evidence(n=40, k=8, m=60)
    needs_shadows = any(need.startswith("shadow") for need in attack(name).needs)
    for given in [seen] if needs_shadows else [seen, seen.without_shadows()]:
        scores = attack(name)(given)
        before = scores.clone()
        scores.zero_()
        assert torch.equal(attack(name)(given), before)


@pytest.mark.parametrize("name", available_attacks())
def test_every_attack_is_deterministic_and_draws_nothing_from_the_callers_rng(name):
    seen, _ = evidence(n=40, k=8, m=60)
    rng = torch.get_rng_state()
    scores = attack(name)(seen)
    assert torch.equal(torch.get_rng_state(), rng)
    assert scores.dtype == torch.float64
    assert torch.equal(attack(name)(replace(seen)), scores)


def test_the_strongest_attacks_beat_the_loss_attack_at_8_shadow_models():
    seen, is_member = evidence()
    auc = {
        name: float(membership_auroc(create_attack(name)(seen), is_member))
        for name in ("loss", "lira", "rmia", "bavaria")
    }
    assert min(auc["lira"], auc["rmia"], auc["bavaria"]) > auc["loss"] + 0.05, auc


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize("kind", ["huge", "half", "constant", "one example"])
def test_scores_of_degenerate_evidence_are_finite(name, kind):
    seen, _ = evidence(n=20, k=4, m=30)
    changes = {}
    for field in (f for f in given_fields(seen) if "logits" in f):
        value = getattr(seen, field)
        if kind == "huge":
            value = value * 1e4 / 4 if not name.startswith("rmia") else value * 100
        elif kind == "half":
            value = value.half()
        elif kind == "constant":
            value = torch.zeros_like(value)
        elif field == "logits":
            value = value[:1]
        elif "population" not in field:
            value = value[..., :1, :]
        changes[field] = value
    if kind == "one example":
        changes |= {"targets": seen.targets[:1], "membership": seen.membership[:, :1], "inputs": seen.inputs[:1]}
    scores = create_attack(name)(replace(seen, **changes))
    assert torch.isfinite(scores).all()
    if kind == "constant" and name not in ("quantile_regression", "neural"):
        assert len(scores.unique()) <= 4 + 1  # examples differ by their label only, one of four


@pytest.mark.parametrize("name", available_attacks())
def test_nan_raises_and_names_the_example(name):
    seen, _ = evidence(n=20, k=4, m=30)
    logits, views = seen.logits.clone(), seen.view_logits.clone()
    logits[7, 1] = views[0, 7, 1] = math.nan
    with pytest.raises(ValueError, match=r"examples \[7\]|rows? \[7\]|NaN"):
        create_attack(name)(replace(seen, logits=logits, view_logits=views))


@pytest.mark.parametrize("name", available_attacks())
def test_missing_evidence_raises(name):
    seen, _ = evidence(n=20, k=4, m=30)
    bare = Evidence(seen.logits, seen.targets)
    attack = create_attack(name)
    if not attack.needs:
        assert attack(bare).shape == (20,)
        return
    with pytest.raises(ValueError, match=f"the {name} attack needs"):
        attack(bare)


SHADOWED = [name for name in available_attacks() if name not in ("loss", "attack_p", "quantile_regression")]


@pytest.mark.parametrize("name", [n for n in SHADOWED if n != "neural"])  # which draws outputs, and needs logits
@pytest.mark.parametrize("order", ["as given", "another"])
def test_shadow_logits_are_not_copied(name, order, monkeypatch):
    monkeypatch.setattr(signals, "BLOCK", 2000)
    n, k, classes = 300, 8, 50
    seen, _ = evidence(n=n, k=k, m=300, classes=classes)
    columns = torch.arange(n) if order == "as given" else torch.arange(n).flip(0)
    given = [seen.shadow_logits, seen.shadow_population_logits, seen.shadow_view_logits]
    by_model = replace(seen, shadow_logits=PerModel(given[0], columns), shadow_view_logits=PerModel(given[2], columns))
    with Largest(*given) as largest:
        attack(name)(by_model)
    views = 3 if name in ("lira_views", "rmia_views", "augmentation") else 1
    one_model, all_signals = views * n * classes, k * views * n * 2
    assert 0 < largest.elements <= max(one_model, all_signals) < k * n * classes


@pytest.mark.parametrize("name", available_attacks())
def test_evidence_gathered_from_a_pool_gives_the_same_scores(name):
    seen, _ = evidence(n=60, k=8, m=40)
    columns = torch.randperm(100)[:60]
    pools = {}
    for field in ("shadow_logits", "shadow_view_logits"):
        value = getattr(seen, field)
        pool = torch.full((*value.shape[:-2], 100, value.shape[-1]), math.nan)
        pool[..., columns, :] = value
        pools[field] = PerModel(pool, columns)
    gathered = replace(seen, **pools)
    assert torch.equal(gathered.shadow_logits, seen.shadow_logits)
    assert torch.equal(gathered.shadow_view_logits, seen.shadow_view_logits)
    assert torch.equal(attack(name)(gathered), attack(name)(seen))


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64 by default": double_by_default,
}


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize("around", AROUND)
def test_scores_do_not_depend_on_autocast_grad_mode_or_default_dtype(name, around):
    seen, _ = evidence(n=40, k=8, m=60)
    expected = attack(name)(seen)
    with AROUND[around]():
        # The tensors too are made there.
        made = replace(seen, **{f: getattr(seen, f).clone() for f in given_fields(seen)})
        scores = attack(name)(made)
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.float64


@pytest.mark.parametrize("name", available_attacks())
def test_logits_with_a_gradient_give_the_same_scores(name):
    seen, _ = evidence(n=40, k=8, m=60)
    fields = [field for field in given_fields(seen) if "logits" in field or "inputs" in field]
    live = replace(seen, **{field: getattr(seen, field).clone().requires_grad_() for field in fields})
    scores = attack(name)(live)
    assert torch.equal(scores, attack(name)(seen))
    assert not scores.requires_grad


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type_give_the_same_scores(name, dtype):
    seen, _ = evidence(n=40, k=8, m=60)
    other = replace(seen, targets=seen.targets.to(dtype), population_targets=seen.population_targets.to(dtype))
    assert torch.equal(attack(name)(other), attack(name)(seen))


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: torch.where(torch.arange(20) == 7, -1, y), ValueError,
         r"classes from 0 to 3; examples \[7\] \(1 in all\) have others \(the first is -1\)"),
        (lambda y: torch.where(torch.arange(20) == 7, 4, y), ValueError, r"examples \[7\] .*\(the first is 4\)"),
        (lambda y: y[:-1], ValueError, r"targets must have shape \(20,\), one per example .*, not \(19,\)"),
        (lambda y: y[:, None], ValueError, r"targets must have shape \(20,\)"),
        (lambda y: y.float(), TypeError, "targets must be a tensor of class indices .*, not torch.float32"),
        (lambda y: y > 0, TypeError, r"targets must be a tensor of class indices \(integers\), not torch.bool"),
        (lambda y: y.tolist(), TypeError, "class indices .*, not a list"),
        (lambda y: y.numpy(), TypeError, "class indices .*, not a ndarray"),
    ],
)  # fmt: skip
def test_invalid_targets_raise(name, change, error, message):
    seen, _ = evidence(n=20, k=4, m=30)
    if name in ("entropy",):
        seen = replace(seen, shadow_logits=None)
    with pytest.raises(error, match=message):
        create_attack(name)(replace(seen, targets=change(seen.targets)))


def test_every_setting_of_every_attack_is_checked():
    for name in available_attacks():
        for setting in ATTACKS.find(name).settings:
            with pytest.raises((TypeError, ValueError), match=setting):
                create_attack(name, **{setting: [1]})
