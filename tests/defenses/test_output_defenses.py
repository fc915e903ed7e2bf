"""Wrappers that change what a finished model shows: rounding and MemGuard, against loops, and seen by audits."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_cwrf.auditing import audit
from lightning_cwrf.defenses import MemGuardOutput, OutputDefense, RoundedOutput, memguard_probability, memguard_scores
from lightning_cwrf.defenses.output import keep_class, rounded, uniform_of
from tests.helpers import Classifier, loader, part, trained
from tests.oracles.formulas import softmax

seeds = st.integers(0, 9999)


@given(seeds, st.integers(2, 6), st.integers(0, 4), st.sampled_from(["float32", "float64", "float16"]))
def test_rounded_probabilities_by_hand(seed, classes, digits, dtype):
    logits = (torch.randn(5, classes, generator=torch.Generator().manual_seed(seed)) * 4).to(getattr(torch, dtype))
    shown = rounded(logits, digits)
    assert shown.dtype == logits.dtype
    assert torch.equal(shown.argmax(-1), logits.argmax(-1))
    step = 10.0**-digits
    for row, found in zip(logits.float().tolist(), shown.double().exp().tolist(), strict=True):
        for p, value in zip(softmax(row), found, strict=True):
            near = {max(round((p + e) / step) * step, step / 4) for e in (-1e-6, 0, 1e-6)}  # halves may go either way
            assert min(abs(value - each) for each in near) < 0.02 * value


@given(seeds, st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
def test_the_predicted_class_stays_where_rounded_values_tie(seed, dtype):
    z = (torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) * 0.01).to(getattr(torch, dtype))
    assert torch.equal(rounded(z, 1).argmax(-1), z.argmax(-1))
    predicted = torch.tensor([[2]])
    for values in ([1.0, 2.0, 2.0], [-1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [-2.0, -1.0, -1.0]):
        kept = keep_class(torch.tensor([values]), predicted)
        assert int(kept.argmax()) == 2
        assert kept[0, :2].tolist() == values[:2]


def test_nothing_finer_than_the_rounded_values_is_shown():
    a, b = torch.tensor([[1.0, 0.0, -3.0]]), torch.tensor([[1.03, 0.0, -3.2]])
    assert torch.equal(rounded(a, 1), rounded(b, 1))
    assert not torch.equal(rounded(a, 3), rounded(b, 3))


class Own(nn.Module):
    """Batches that only the model itself can interpret."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def classification_step(self, batch):
        return self.model(batch["image"]), batch["what"]


@pytest.mark.slow
def test_an_audit_sees_the_defended_outputs_also_of_a_model_with_its_own_step():
    model = trained(epochs=20)[0]
    sides = {"members": part(0, 40), "nonmembers": part(100, 140)}
    plain = audit(model, **sides, attacks=["loss", "correctness"])
    shown = audit(RoundedOutput(model), **sides, attacks=["loss", "correctness"])
    assert len(shown.scores["loss"].unique()) < 30 < len(plain.scores["loss"].unique())
    assert torch.equal(shown.scores["correctness"], plain.scores["correctness"])
    assert shown.model_metrics["test_accuracy"].value == plain.model_metrics["test_accuracy"].value
    named = {
        side: [{"image": x, "what": y} for x, y in loader(begin, begin + 40, batch_size=40)]
        for side, begin in (("members", 0), ("nonmembers", 100))
    }
    own = audit(RoundedOutput(Own(model)), **named, attacks=["loss"])
    assert torch.equal(own.scores["loss"], shown.scores["loss"])


def test_named_inputs_and_a_binary_classifier():
    class Named(nn.Module):
        def forward(self, first, second):
            return first - second

    shown = RoundedOutput(Named())(first=torch.tensor([[2.0], [0.0]]), second=torch.zeros(2, 1))
    assert shown.exp().tolist() == [pytest.approx([0.1, 0.9]), pytest.approx([0.5, 0.5])]


def test_wrong_wrappers():
    for kind in (RoundedOutput, OutputDefense):
        with pytest.raises(TypeError, match=r"Output.* wraps a model, an nn\.Module|wraps a model"):
            kind(Classifier)
    for digits, error in ((-1, ValueError), (7, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="digits must be an integer"):
            RoundedOutput(Classifier(), digits)
    with pytest.raises(ValueError, match="NaN or infinite"):
        RoundedOutput(nn.Identity())(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(NotImplementedError):
        OutputDefense(nn.Identity())(torch.zeros(1, 2))


def slow_memguard(logits, weights, bias, steps):
    """One example and a linear attack on sorted scores, in floats, with the gradient written out."""

    def attack(z):
        return sum(w * p for w, p in zip(weights, sorted(softmax(z)), strict=True)) + bias

    label = max(range(len(logits)), key=lambda j: logits[j])
    scores, start = softmax(logits), attack(logits)

    def turned(z):
        return max(range(len(z)), key=lambda j: z[j]) == label and attack(z) * start <= 0

    def sign(x):
        return (x > 0) - (x < 0)

    def gradient_of(z, c):
        p = softmax(z)
        ranks = sorted(range(len(z)), key=lambda j: p[j])
        slope = {j: sign(attack(z)) * weights[rank] + c * sign(p[j] - scores[j]) for rank, j in enumerate(ranks)}
        found = [p[j] * (slope[j] - sum(slope[k] * p[k] for k in range(len(z)))) for j in range(len(z))]
        rival = max((j for j in range(len(z)) if j != label), key=lambda j: z[j])
        if z[rival] > z[label]:
            found[rival] += 10
            found[label] -= 10
        return found

    found, c = scores, 0.1
    while abs(1 / (1 + math.exp(-start)) - 0.5) > 1e-5 and c <= 1e5:
        z = list(logits)
        for _ in range(steps - 1):
            if turned(z):
                break
            gradient = gradient_of(z, c)
            norm = math.sqrt(sum(g * g for g in gradient))
            z = [v - 0.1 * g / max(norm, 1e-30) for v, g in zip(z, gradient, strict=True)]
        if not turned(z):
            break
        found, c = softmax(z), c * 10
    return found


@pytest.mark.slow
@given(seeds)
@settings(max_examples=6, deadline=None)
def test_the_search_for_noise_against_one_example_at_a_time(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 3
    weights = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    bias = -0.75

    def attack(z):
        return z.softmax(-1).sort(-1).values @ weights + bias

    shown = memguard_scores(logits, attack, steps=20).exp()
    assert torch.equal(shown.argmax(-1), logits.argmax(-1))
    alone = torch.cat([memguard_scores(row[None], attack, steps=20).exp() for row in logits])
    torch.testing.assert_close(shown, alone)  # the batch has no part in it
    for row, found in zip(logits.tolist(), shown.tolist(), strict=True):
        assert found == pytest.approx(slow_memguard(row, weights.tolist(), bias, 20), abs=1e-9)


@given(seeds, st.floats(0, 2))
def test_the_noise_is_added_as_often_as_the_budget_allows_and_only_where_it_helps(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    scores, noisy = (torch.randn(6, 3, generator=generator).double().softmax(-1) for _ in range(2))
    before, after = torch.rand(2, 6, generator=generator).double()
    found = memguard_probability(scores, noisy, before, after, epsilon)
    for i in range(6):
        distance = sum(abs(a - b) for a, b in zip(scores[i].tolist(), noisy[i].tolist(), strict=True))
        helps = abs(float(after[i]) - 0.5) < abs(float(before[i]) - 0.5)
        assert float(found[i]) == pytest.approx(min(1, epsilon / distance) if helps else 0)
        assert float(found[i]) * distance <= epsilon + 1e-9
    same = memguard_probability(scores, scores, before, before, epsilon)
    assert same.tolist() == [0.0] * 6


@pytest.fixture(scope="module")
def guarded():
    model = trained(epochs=20)[0]
    rng = torch.get_rng_state()
    guard = MemGuardOutput(model, loader(0, 40), loader(100, 140), steps=20, seed=1)
    assert torch.equal(torch.get_rng_state(), rng)
    return model, guard


@pytest.mark.slow
def test_memguard_keeps_the_class_and_the_budget_and_repeats_itself(guarded):
    model, guard = guarded
    x = torch.stack([x for x, _ in part(0, 40)])
    with torch.no_grad():
        plain = copy.deepcopy(model).eval()(x)
    shown = guard(x)
    assert torch.equal(shown.argmax(-1), plain.argmax(-1))
    assert torch.equal(guard(x), shown)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guard(x[order]), shown[order])
    changed = (shown.exp() - plain.softmax(-1)).abs().sum(-1)
    assert float(changed.mean()) <= 1.0
    assert (changed > 1e-3).any()
    before, after = ((guard.attack_logits(z).sigmoid() - 0.5).abs() for z in (plain, shown))
    assert (after <= before + 1e-4).all()
    assert after.mean() < before.mean() / 2
    again = MemGuardOutput(model, loader(0, 40), loader(100, 140), epsilon=0.0, steps=2, seed=1)
    torch.testing.assert_close(again(x), plain.log_softmax(-1))  # no budget, no noise
    assert all(torch.equal(a, b) for a, b in zip(guard.network.parameters(), again.network.parameters(), strict=True))


@pytest.mark.slow
def test_an_audit_sees_memguard_and_refuses_its_non_members(guarded):
    model, guard = guarded
    sides = {"members": part(0, 40), "nonmembers": part(200, 240)}
    plain, shown = (audit(each, **sides, attacks=["loss", "correctness"]) for each in (model, guard))
    assert not torch.equal(plain.scores["loss"], shown.scores["loss"])
    assert torch.equal(plain.scores["correctness"], shown.scores["correctness"])
    with pytest.raises(ValueError, match="non-members that MemGuard learned from"):
        audit(guard, members=part(0, 40), nonmembers=part(130, 170), attacks=["loss"])


def test_wrong_memguards():
    model = Classifier()
    with pytest.raises(ValueError, match="are members"):
        MemGuardOutput(model, part(0, 10), part(5, 15))
    with pytest.raises(ValueError, match=r"epsilon must be a number in \[0, 2\], not 3"):
        MemGuardOutput(model, part(0, 10), part(10, 20), epsilon=3)
    with pytest.raises(ValueError, match="steps must be an integer of at least 2, not 1"):
        MemGuardOutput(model, part(0, 10), part(10, 20), steps=1)
    with pytest.raises(TypeError, match="seed must be an integer"):
        MemGuardOutput(model, part(0, 10), part(10, 20), seed=0.5)
    with pytest.raises(ValueError, match="no batch"):
        MemGuardOutput(model, part(0, 10), [])


def test_draws_are_uniform():
    drawn = torch.tensor([uniform_of(i.to_bytes(4, "little"), 0) for i in range(4000)])
    assert float(drawn.mean()) == pytest.approx(0.5, abs=5 * 0.289 / 4000**0.5)
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1


def test_the_kept_class_of_a_float64_model_survives_float32():
    """In which audits read outputs."""
    logits = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shown = rounded(logits, 0)
    assert torch.equal(shown.float().argmax(-1), logits.argmax(-1))


def test_memguard_of_another_precision(guarded):
    guard, x = copy.deepcopy(guarded[1]), torch.stack([x for x, _ in part(0, 8)])
    for dtype in (torch.float64, torch.bfloat16):
        assert guard.to(dtype)(x.to(dtype)).dtype == dtype
