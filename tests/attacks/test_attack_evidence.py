"""What attacks are given: the same scores whatever holds the logits or surrounds the call, and no copy of them."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cwrf.attacks import (
    Evidence,
    PerModel,
    available_attacks,
    create_attack,
    entropy,
    example_losses,
    logit_signal,
    shadow_bootstrap,
    signals,
    true_class_probability,
)
from lightning_cwrf.attacks.metric_based import confidence, correctness, modified_entropy
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.test_more_attacks import evidence

FAST = {"neural": {"epochs": 2}, "quantile_regression": {"epochs": 2}}


def attack(name):
    return create_attack(name, **FAST.get(name, {}))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made, views of given ones aside."""

    def __init__(self, *given):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in given}
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.storages:
                self.elements = max(self.elements, made.numel())
        return result


SHADOWED = [name for name in available_attacks() if name not in ("loss", "attack_p", "quantile_regression")]


@pytest.mark.parametrize("name", [n for n in SHADOWED if n != "neural"])  # which draws outputs, and needs logits
@pytest.mark.parametrize("order", ["as given", "another"])
def test_no_attack_copies_the_shadow_models_logits(name, order, monkeypatch):
    monkeypatch.setattr(signals, "_BLOCK", 2000)
    n, k, classes = 300, 8, 50
    seen, _ = evidence(n=n, k=k, m=300, classes=classes)
    columns = torch.arange(n) if order == "as given" else torch.arange(n).flip(0)
    given = [seen.shadow_logits, seen.shadow_population_logits, seen.shadow_view_logits]
    by_model = replace(seen, shadow_logits=PerModel(given[0], columns), shadow_view_logits=PerModel(given[2], columns))
    with Largest(*given) as largest:
        attack(name)(by_model)
    views = 3 if name in ("lira_views", "augmentation") else 1
    one_model, all_signals = views * n * classes, k * views * n * 2
    assert 0 < largest.elements <= max(one_model, all_signals) < k * n * classes


def test_the_neural_attack_copies_what_it_draws_alone():
    seen, _ = evidence(n=300, k=8, m=30, classes=50)
    with Largest(seen.shadow_logits) as largest:
        create_attack("neural", epochs=1, outputs=500)(seen)
    assert largest.elements <= 500 * 51


@pytest.mark.parametrize(
    "signal",
    [logit_signal, true_class_probability, example_losses, correctness, confidence, entropy, modified_entropy],
)
def test_blocks_of_examples_do_not_matter_for_signals(signal, monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 2, 11, 5), torch.randint(5, (11,))
    whole = signal(logits, targets)
    assert whole.shape == (3, 2, 11)
    for block in (1, 10, 25, 55):
        monkeypatch.setattr(signals, "_BLOCK", block)
        assert torch.equal(signal(logits, targets), whole)
        assert torch.equal(signal(logits[1, 0], targets), whole[1, 0])
    strided = logits.transpose(0, 1)
    assert torch.equal(signal(strided, targets), whole.transpose(0, 1))


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


def test_signals_are_computed_once_for_all_attacks_and_replicates():
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


def test_a_pool_in_order_is_not_copied_and_the_beginning_of_one_is_no_pool():
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
    views = seen.shadow_signals(logit_signal, "views")
    assert views.shape == (4, 3, 20)
    assert torch.equal(views, logit_signal(seen.shadow_view_logits, seen.targets))
    bare = Evidence(seen.logits, seen.targets, shadow_population_logits=seen.shadow_population_logits)
    with pytest.raises(ValueError, match=r"the evidence has no shadow_logits\."):
        bare.shadow_signals(logit_signal)
    with pytest.raises(ValueError, match=r"the evidence has no population_targets\."):
        bare.shadow_signals(logit_signal, "population")


def test_which_fields_there_are():
    bare = Evidence(torch.zeros(2, 3), torch.zeros(2).long())
    assert bare.shadow_logits is bare.shadow_view_logits is bare.shadow_population_logits is None
    full = replace(bare, shadow_logits=torch.zeros(4, 2, 3))
    assert full.has("logits", "shadow_logits")
    assert not full.has("logits", "membership")
    assert full.shadow_logits.shape == (4, 2, 3)
    assert vars(bare)["shadow_logits"] is None


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
def test_scores_do_not_depend_on_what_surrounds_the_attack(name, around):
    seen, _ = evidence(n=40, k=8, m=60)
    expected = attack(name)(seen)
    with AROUND[around]():
        # The tensors too are made there.
        made = replace(seen, **{f: v.clone() for f in vars(seen) if (v := getattr(seen, f)) is not None})
        scores = attack(name)(made)
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.float64


@pytest.mark.parametrize("name", available_attacks())
def test_logits_with_a_gradient_give_the_same_scores(name):
    seen, _ = evidence(n=40, k=8, m=60)
    fields = [field for field in vars(seen) if "logits" in field or "inputs" in field]
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
