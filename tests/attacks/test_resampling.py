"""The bootstrap over shadow models: against plain loops, in simulated audits, and in the audit itself."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from scipy import stats

from lightning_cwrf.attacks import Evidence, create_attack, shadow_bootstrap
from lightning_cwrf.auditing import AuditResult, audit_outputs
from lightning_cwrf.metrics import MembershipAUROC
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.shadows import ShadowOutputs
from tests.helpers import load_benchmark

coverage = load_benchmark("coverage")
world = coverage.shadow_world


def toy(evidence):
    """Above the mean of the OUT models."""
    outside = (~evidence.membership).double()
    mean = (evidence.shadow_logits[..., 0] * outside).sum(0) / outside.sum(0)
    return evidence.logits[:, 0] - mean


@pytest.mark.usefixtures("rng_untouched")
def test_replicates_are_those_of_plain_loops():
    evidence, is_member = world(0, models=8, examples=12)
    n, pairs, resamples = 12, 4, 40
    found = shadow_bootstrap(toy, evidence, is_member, {"auc": membership_auroc}, resamples, seed=3)["auc"]
    generator = torch.Generator().manual_seed(3)
    signals, own = evidence.shadow_logits[..., 0].tolist(), evidence.logits[:, 0].tolist()
    expected, redrawn = [], 0
    for _ in range(resamples):
        drawn = []
        while len(set(drawn)) < 2:
            redrawn += bool(drawn)
            drawn = torch.randint(pairs, (pairs,), generator=generator).tolist()
        scores = []
        for i in range(n):
            rows = [j for pair in drawn for j in (2 * pair, 2 * pair + 1)]
            outside = [signals[j][i] for j in rows if not evidence.membership[j, i]]
            assert len(outside) == pairs
            scores.append(own[i] - sum(outside) / len(outside))
        members = [scores[i] for i in torch.randint(6, (6,), generator=generator).tolist()]
        others = [scores[6 + i] for i in torch.randint(6, (6,), generator=generator).tolist()]
        expected.append(sum((a > b) + (a == b) / 2 for a in members for b in others) / 36)
    assert redrawn  # a draw of one single pair occurred
    assert found.tolist() == pytest.approx(expected)
    again = shadow_bootstrap(toy, evidence, is_member, {"auc": membership_auroc}, resamples, seed=3)["auc"]
    assert torch.equal(found, again)
    other = shadow_bootstrap(toy, evidence, is_member, {"auc": membership_auroc}, resamples, seed=4)["auc"]
    assert not torch.equal(found, other)


def test_all_fields_of_shadow_models_are_drawn_together():
    @dataclass(frozen=True)
    class More(Evidence):
        shadow_number: torch.Tensor | None = None

    evidence, is_member = world(0, population=5)
    given = {f.name: getattr(evidence, f.name) for f in fields(evidence) if f.init}
    evidence = More(**given, shadow_number=torch.arange(8))
    seen = []

    def attack(drawn):
        rows = drawn.shadow_number
        seen.append(rows.tolist())
        for name in ("shadow_logits", "membership", "shadow_population_logits"):
            assert torch.equal(getattr(drawn, name), getattr(evidence, name)[rows])
        assert torch.equal(drawn.membership[0::2], ~drawn.membership[1::2])
        assert drawn.logits is evidence.logits
        assert drawn.population_logits is evidence.population_logits
        return drawn.logits[:, 0]

    shadow_bootstrap(attack, evidence, is_member, {}, 200)
    assert all(a + 1 == b and a % 2 == 0 for rows in seen for a, b in zip(rows[0::2], rows[1::2], strict=True))
    counts = torch.bincount(torch.tensor(seen).flatten(), minlength=8)
    assert counts.min() > 160  # of 200 each
    bare = evidence.without_shadows()
    left = {f.name for f in fields(bare) if f.init and bare.has(f.name)}
    assert left == {"logits", "targets", "population_logits", "population_targets"}
    torn = replace(evidence, shadow_number=torch.arange(3))
    with pytest.raises(ValueError, match="shadow_number must have the 8 shadow models along its first axis"):
        shadow_bootstrap(attack, torn, is_member, {}, 2)


def simulated(common, worlds, resamples=30, **sizes):
    """AUCs of LiRA over worlds, and the deviations that bootstraps claim, with shadow models and without."""
    attack, aucs, claimed, alone = create_attack("lira"), [], [], []
    for seed in range(worlds):
        evidence, is_member = world(seed, common=common, **sizes)
        scores = attack(evidence)
        aucs.append(float(membership_auroc(scores, is_member)))
        replicates = shadow_bootstrap(attack, evidence, is_member, {"auc": membership_auroc}, resamples, seed=seed)
        claimed.append(float(replicates["auc"].std()))
        fixed = shadow_bootstrap(lambda _, s=scores: s, evidence, is_member, {"auc": membership_auroc}, resamples)
        alone.append(float(fixed["auc"].std()))
    return tuple(torch.tensor(values, dtype=torch.float64) for values in (aucs, claimed, alone))


def covered(aucs, errors, confidence):
    reach = errors * stats.norm.ppf((1 + confidence) / 2)
    return int(((aucs - aucs.mean()).abs() <= reach).sum())


@pytest.mark.slow
def test_the_interval_covers_the_mean_over_worlds_with_shared_errors():
    """Of 120 intervals at 90 %, a binomial band holds the mean AUC; those over examples only are too narrow."""
    aucs, claimed, alone = simulated(1.5, 120, examples=800)
    low, high = stats.binom.ppf([0.0001, 0.9999], 120, 0.9)
    assert low <= covered(aucs, claimed, 0.9) <= high
    assert covered(aucs, alone, 0.9) < low
    assert claimed.mean() > 1.5 * alone.mean()
    assert 0.8 < claimed.mean() / aucs.std() < 1.3


@pytest.mark.slow
def test_the_interval_is_too_wide_rather_than_too_narrow_without_shared_errors():
    """Noise of single examples in single models counts more than once, but fades with the number of models."""
    ratios = []
    for models in (8, 32):
        aucs, claimed, alone = simulated(0.0, 60, models=models)
        assert covered(aucs, claimed, 0.9) >= stats.binom.ppf(0.0001, 60, 0.9)
        ratios.append(float((claimed / alone).mean()))
    assert 1.1 < ratios[0] < 1.6
    assert 1.0 < ratios[1] < 1.2


def audited(seed=0, **settings):
    evidence, is_member = world(seed, examples=40, common=1.0, population=30)
    names = [bytes([i]) for i in range(70)]
    parts = [
        ModelOutputs(evidence.logits[flag], evidence.targets[flag], names[20 * i : 20 * i + 20])
        for i, flag in enumerate((is_member, ~is_member))
    ]
    shadows = ShadowOutputs(
        evidence.shadow_logits,
        evidence.membership,
        evidence.targets,
        names[:40],
        population=torch.utils.data.TensorDataset(torch.zeros(30, 1)),
        population_logits=evidence.shadow_population_logits,
        store=None,
    )
    if "membership" in settings:
        rows = settings.pop("membership")
        shadows = replace(shadows, membership=shadows.membership[rows], logits=shadows.logits[rows])
    population = ModelOutputs(evidence.population_logits, evidence.population_targets, names[40:])
    return audit_outputs(*parts, **{"shadows": shadows, "population": population, **settings})


ATTACKS = ["loss", "attack_p", "attack_r", "lira", "bavaria", "rmia", "modified_entropy"]


@pytest.mark.slow
@pytest.mark.usefixtures("rng_untouched")
def test_an_audit_has_intervals_over_shadow_models(tmp_path):
    plain = audited(attacks=ATTACKS)
    result = audited(attacks=ATTACKS, shadow_resamples=50)
    for attack, found in result.estimates.items():
        for name, e in found.items():
            if attack in ("loss", "attack_p") or name.endswith("_lower_bound"):
                assert e.shadow_interval is None
                continue
            low, high = e.shadow_interval
            assert max(0, low) <= e.interval.low <= e.value <= e.interval.high <= min(1, high), (attack, name)
        assert {n: replace(e, shadow_interval=None) for n, e in found.items()} == plain.estimates[attack]
    lira = result.estimates["lira"]["auroc"]
    assert lira.shadow_interval.high - lira.shadow_interval.low > lira.interval.high - lira.interval.low
    assert audited(attacks=ATTACKS, shadow_resamples=50).estimates == result.estimates
    assert audited(attacks=["lira"], shadow_resamples=50).estimates["lira"] == result.estimates["lira"]  # same draws
    assert audited(attacks=["lira"], shadow_resamples=50, seed=1).estimates["lira"] != result.estimates["lira"]
    line = next(line for line in str(result).splitlines() if line.startswith("LiRA over shadow models too"))
    assert f"AUC {lira.value:.3f} [{lira.shadow_interval.low:.3f}, {lira.shadow_interval.high:.3f}]" in line
    assert "loss attack over shadow" not in str(result)
    assert "over shadow" not in str(plain)
    path = result.save(tmp_path / "audit.json")
    assert AuditResult.load(path).estimates == result.estimates


def test_the_interval_is_the_value_and_the_spread_of_its_replicates():
    evidence, is_member = world(0, examples=40, common=1.0, population=30)
    found = audited(attacks=["lira"], shadow_resamples=30, confidence=0.8).estimates["lira"]["auroc"]
    metric = MembershipAUROC()

    def auc(scores, is_member):
        metric.reset()
        metric.update(scores, is_member)
        return metric.compute()

    replicates = shadow_bootstrap(create_attack("lira"), evidence, is_member, {"auc": auc}, 30, examples=False)["auc"]
    spread = stats.norm.ppf(0.9) * float(replicates.std()) * (4 / 3) ** 0.5  # of 4 pairs
    low, high = found.shadow_interval
    assert low == pytest.approx(max(0, found.value - math.hypot(found.value - found.interval.low, spread)))
    assert high == pytest.approx(min(1, found.value + math.hypot(found.interval.high - found.value, spread)))


def test_replicates_over_shadow_models_alone_keep_the_examples():
    evidence, is_member = world(0, examples=40)
    count = {"examples": lambda scores, is_member: scores.unique().numel()}
    alone = shadow_bootstrap(toy, evidence, is_member, count, 20, examples=False)["examples"]
    assert alone.tolist() == [40.0] * 20
    assert alone.dtype == torch.float64
    assert shadow_bootstrap(toy, evidence, is_member, count, 20)["examples"].max() < 40


@pytest.mark.slow
def test_shadow_intervals_cover_the_mean_over_worlds():
    """Of 100 intervals at 95 %, at least a binomial quantile. Shadow models share errors; those over examples fail."""
    least = stats.binom.ppf(0.001, 100, 0.94)
    held = coverage.shadow_coverage(8, 1.5, 100, resamples=20)
    for name, (_, wide) in held.items():
        assert round(100 * wide) >= least, name
    assert round(100 * held["AUC"][0]) < least


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shadow_resamples": -1}, "shadow_resamples must be an integer of at least 0, not -1"),
        ({"shadow_resamples": 1}, "resampled at least twice"),
        ({"shadows": None, "attacks": ["loss"]}, "needs shadow models: pass shadows="),
        ({"membership": [0, 1, 2, 3, 4, 5]}, r"6 shadow models are too few to draw from: train at least 8"),
        ({"membership": [0, 2, 1, 3, 4, 5, 6, 7]}, "complementary pairs.*balanced_membership"),
        ({"membership": [0, 1, 2, 3, 4, 5, 6, 7, 0]}, "complementary pairs"),
    ],
)
def test_invalid_resampling_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        audited(**{"shadow_resamples": 10, **settings})
    assert math.isfinite(audited().estimates["lira"]["auroc"].value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shadow_resamples": 10.0}, "shadow_resamples must be an integer, not the float 10.0"),
        ({"shadow_resamples": "10"}, "shadow_resamples must be an integer"),
        ({"shadow_resamples": True}, "shadow_resamples must be an integer"),
        ({"confidence": "0.95"}, "confidence must be a number"),
    ],
)
def test_numbers_of_the_wrong_type_raise(settings, message):
    with pytest.raises(TypeError, match=message):
        audited(**settings)
    evidence, is_member = world(0, examples=40)
    with pytest.raises(TypeError, match="resamples must be an integer"):
        shadow_bootstrap(toy, evidence, is_member, {}, 2.0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        shadow_bootstrap(toy, evidence, is_member, {}, 2, seed=0.5)
    with pytest.raises(TypeError, match="examples must be True or False"):
        shadow_bootstrap(toy, evidence, is_member, {}, 2, examples="no")
