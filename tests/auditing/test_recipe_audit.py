"""An audit of a recipe, against loops and against simulated recipes whose truth is known."""

import dataclasses

import pytest
import torch

from lightning_cwrf import RecipeAudit
from lightning_cwrf.attacks import logit_signal, register_attack
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing.decision import beating_guesses
from lightning_cwrf.metrics import TPRAtFPR
from lightning_cwrf.metrics.functional import attack_advantage, membership_auroc
from tests.auditing.recipes import run, simulated


def pooled_lira(target, shadows, membership):
    """LiRA with pooled variances, example by example."""
    deviations, means = {True: [], False: []}, {True: [], False: []}
    for x in range(len(target)):
        for side in (True, False):
            values = [float(s[x]) for s, m in zip(shadows, membership, strict=True) if bool(m[x]) == side]
            mean = sum(values) / len(values)
            means[side].append(mean)
            deviations[side].append((sum((v - mean) ** 2 for v in values), len(values) - 1))
    variance = {side: sum(s for s, _ in each) / sum(f for _, f in each) for side, each in deviations.items()}
    log = {
        side: -0.5 * ((target - torch.tensor(means[side])) ** 2 / variance[side] + torch.tensor(variance[side]).log())
        for side in (True, False)
    }
    return log[True] - log[False]


def auc_of(signals, membership, target, others):
    return float(
        membership_auroc(pooled_lira(signals[target], signals[others], membership[others]), membership[target])
    )


def test_every_model_is_attacked_with_the_other_pairs_and_errors_leave_each_pair_out():
    shadows = simulated(leak=2.0, examples=48)
    signals = logit_signal(shadows.logits, shadows.targets)
    found = run(shadows)
    pairs = range(4)

    def mean_auc(kept):
        values = []
        for i in (2 * pair + side for pair in kept for side in (0, 1)):
            others = [j for j in range(8) if j // 2 in kept and j // 2 != i // 2]
            values.append(auc_of(signals, shadows.membership, i, others))
        return sum(values) / len(values)

    assert found.estimates["lira"]["auroc"].value == pytest.approx(mean_auc(list(pairs)), abs=1e-9)
    without = [mean_auc([pair for pair in pairs if pair != left]) for left in pairs]
    assert found.jackknives["lira/auroc"].without_pair.tolist() == pytest.approx(without, abs=1e-9)


def test_metrics_of_the_models_are_means_over_them():
    shadows = simulated(leak=1.0)
    found = run(shadows, ["loss"])
    right, outside = shadows.logits.argmax(-1) == 0, shadows.population_logits.argmax(-1) == 0
    train = [right[i][shadows.membership[i]].double().mean() for i in range(8)]
    test = [torch.cat([right[i][~shadows.membership[i]], outside[i]]).double().mean() for i in range(8)]
    assert found.model_metrics["train_accuracy"].value == pytest.approx(float(sum(train) / 8))
    assert found.model_metrics["test_accuracy"].value == pytest.approx(float(sum(test) / 8))
    losses = torch.nn.functional.cross_entropy(shadows.logits.flatten(0, 1), torch.zeros(8 * 96, dtype=torch.long))
    assert float(found.losses.mean()) == pytest.approx(float(losses), abs=1e-5)
    advantage = [attack_advantage(-found.losses[i], shadows.membership[i]) for i in range(8)]
    assert found.estimates["loss"]["advantage"].value == pytest.approx(float(sum(advantage) / 8))
    assert "epsilon_lower_bound" not in found.estimates["loss"]


@pytest.mark.slow
def test_without_a_leak_no_attack_is_below_chance():
    """With the model of the other half too, members would have one IN model less, and LiRA an AUC of about 0.47."""
    values = [run(simulated(seed=seed)).estimates["lira"]["auroc"].value for seed in range(16)]
    mean, error = sum(values) / 16, torch.tensor(values).std() / 4
    assert abs(mean - 0.5) < 3 * error


@pytest.mark.slow
def test_intervals_cover_the_mean_over_other_pools_and_models():
    """With more draws, and other recipes: ``benchmarks/recipe_coverage.py``."""
    found = [run(simulated(seed=seed, leak=2.0)) for seed in range(24)]
    for name in ("lira/auroc", "lira/advantage", "test_accuracy", "loss_gap"):
        intervals = [each.jackknives[name].interval(0.95) for each in found]
        truth = sum(each.jackknives[name].value for each in found) / len(found)
        covered = sum(low <= truth <= high for low, high in intervals)
        assert covered >= 21, (name, covered)  # fewer in 3 % of cases at a rate of 0.95


@pytest.mark.slow
def test_a_difference_is_narrower_than_what_it_is_the_difference_of():
    weak, strong = (run(simulated(seed=3, leak=leak, models=16), ["loss"]) for leak in (1.0, 2.0))
    difference = strong.minus(weak, "loss/auroc")
    assert difference.value == pytest.approx(
        strong.estimates["loss"]["auroc"].value - weak.estimates["loss"]["auroc"].value
    )
    assert difference.interval.low > 0
    assert difference.p_value < 0.01
    wide = strong.estimates["loss"]["auroc"].interval
    assert difference.interval.high - difference.interval.low < wide.high - wide.low
    assert weak.minus(strong, "loss/auroc").value == -difference.value
    assert strong.minus(strong, "loss/auroc").p_value == 1.0


@pytest.mark.slow
def test_recipes_over_other_data_or_models_are_not_compared_in_pairs():
    first = run(simulated(), ["loss"])
    others = [run(simulated(seed=1), ["loss"]), run(simulated(models=10), ["loss"]), run(simulated(), ["loss"], seed=1)]
    another = "another pool, population or seed"
    for other, why in zip(others, (another, "one has 8 models and the other 10", another), strict=True):
        with pytest.raises(ValueError, match=why):
            first.minus(other, "loss/auroc")
    with pytest.raises(ValueError, match="there is no measure 'lira/auroc'; there are train_accuracy"):
        first.minus(first)
    with pytest.raises(TypeError, match="with a RecipeAudit, not with a float"):
        first.minus(0.5)


@pytest.mark.parametrize(
    ("shadows", "message"),
    [(simulated(models=6), "6 shadow models are too few"), (simulated(examples=10), "a pool of 10 examples is too sm")],
)
def test_too_few_models_or_examples_raise(shadows, message):
    with pytest.raises(ValueError, match=message):
        run(shadows)


def test_an_attack_that_needs_the_inputs_raises():
    with pytest.raises(ValueError, match="quantile_regression attack needs the examples' inputs"):
        run(simulated(), ["quantile_regression"])


def test_untrained_models_are_remarked():
    shadows = simulated()
    guesses = dataclasses.replace(shadows, logits=torch.zeros_like(shadows.logits), targets=torch.arange(96) % 2)
    assert "does no better on its training data than guessing" in run(guesses, ["loss"]).remarks[0]


def test_what_is_saved_is_loaded(tmp_path):
    result = run(simulated(leak=1.0), ["loss", "lira"])
    again = RecipeAudit.load(result.save(tmp_path / "recipe.json"))
    assert str(again) == str(result)
    assert again.minus(result, "loss/auroc").value == 0
    for one in dataclasses.fields(result):
        if one.name not in ("scores", "is_member", "targets", "losses", "jackknives"):
            assert getattr(again, one.name) == getattr(result, one.name)
    assert torch.equal(again.scores["lira"], result.scores["lira"])
    assert "8 models of one recipe, on halves of a pool of 96" in str(result)
    assert "| LiRA |" in result.to_markdown()


def test_every_model_right_on_everything_has_an_interval_with_a_width():
    interval = run(simulated(better=30.0), ["loss"]).model_metrics["train_accuracy"].interval
    assert interval.low < 0.99
    assert interval.high == 1


def test_a_part_of_the_pool_is_audited_as_a_pool():
    shadows = simulated(leak=1.0)
    chosen = torch.arange(0, 96, 2)
    part = shadows.part(chosen, torch.arange(10))
    assert torch.equal(part.logits, shadows.logits[:, chosen])
    assert part.digests == shadows.digests[::2]
    assert part.population_logits.shape[1] == len(part.population) == 10
    assert run(part).is_member.shape == (8, 48)
    for wrong, error in (([0], TypeError), (torch.tensor([96]), ValueError), (torch.tensor([1, 1]), ValueError)):
        with pytest.raises(error, match="examples must be"):
            shadows.part(wrong)


def test_chance_is_the_mean_tpr_of_scores_without_a_signal():
    """Over all orders of one member among the non-members, with each number of false positives allowed."""
    for nonmembers in (4, 9):
        for rate in (0.0, 0.12, 0.5, 1.0):
            found = []
            for place in range(nonmembers + 1):  # of the member in the order
                scores = torch.arange(nonmembers + 1.0)
                inside = torch.arange(nonmembers + 1) == place
                found.append(float(TPRAtFPR(rate).value_of(scores, inside)))
            assert TPRAtFPR(rate).chance(nonmembers) == pytest.approx(min(1, sum(found) / len(found)))


@pytest.mark.slow
def test_a_recipe_without_a_leak_does_not_beat_guessing():
    """By the TPR neither, which is far above its FPR by chance where the non-members are few."""
    found = [run(simulated(32, 64, seed=seed, population=1), ("loss",)) for seed in range(6)]
    assert all(each.estimates["loss"]["tpr_at_fpr_0.001"].value > 0.005 for each in found)
    assert all(each.estimates["loss"]["tpr_at_fpr_0.001"].interval.low > 0.001 for each in found[:1])
    assert sum(bool(beating_guesses(each.estimates, 0.95)) for each in found) <= 1
    leaky = run(simulated(8, 96, leak=4.0), ("loss",))
    assert leaky.estimates["loss"]["tpr_at_fpr_0.001"].p_value < 0.01


def test_a_failed_attack_is_named_and_the_others_stand():
    def broken(evidence):
        raise RuntimeError("no luck")

    with ATTACKS.temporary():
        register_attack("broken")(broken)
        found = run(simulated(), ("loss", "broken"))
        assert found.failures == {"broken": "RuntimeError: no luck"}
        assert list(found.estimates) == ["loss"]
        assert "broken" in str(found)
        with pytest.raises(RuntimeError, match="no luck"):
            run(simulated(), ("broken",))


@pytest.mark.slow
def test_audits_of_different_confidence_have_no_difference():
    shadows = simulated()
    with pytest.raises(ValueError, match=r"different confidence, 0\.95 and 0\.9: audit both at one"):
        run(shadows).minus(run(shadows, confidence=0.9))
