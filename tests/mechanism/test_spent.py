"""The ledger of draws: composition, adjacency, and that nothing is forgotten or counted twice."""

import copy
import math

import pytest
from torch import nn

from lightning_cwrf.defenses import PrivacySpent as DefensesPrivacySpent
from lightning_cwrf.mechanism import GaussianLedger, PrivacySpent
from lightning_cwrf.mechanism.spent import draws_of, ledger_of
from lightning_cwrf.metrics.functional import gaussian_epsilon, gaussian_mu


def test_draws_of_any_noise_compose_to_the_root_of_squares():
    ledger = GaussianLedger()
    for sigma, draws in ((4.0, 3), (10.0, 7)):
        ledger.add(ledger.new_run(), sigma, draws)
    mu = math.sqrt(3 / 16 + 7 / 100)
    assert ledger.mu() == pytest.approx(mu)
    assert ledger.mu("replace_one") == pytest.approx(2 * mu)
    assert ledger.spent(1e-5).epsilon == pytest.approx(gaussian_epsilon(mu, 1e-5))
    assert ledger.spent(1e-5, "replace_one").mu == pytest.approx(2 * mu)
    assert ledger.left(8.0, 1e-5, "add_remove") == pytest.approx(math.sqrt(gaussian_mu(8.0, 1e-5) ** 2 - mu**2))


def test_one_by_one_or_at_once_is_the_same_and_a_run_has_one_noise():
    one, many = GaussianLedger(), GaussianLedger()
    run = one.new_run()
    for _ in range(5):
        one.add(run, 3.0)
    many.add("run", 3.0, 5)
    assert (one.draws, one.mu()) == (many.draws, many.mu()) == (5, pytest.approx(math.sqrt(5) / 3))
    with pytest.raises(ValueError, match=r"this run has the noise multiplier 3, not 2; make a new_run\(\)"):
        one.add(run, 2.0)


def test_a_checkpoint_is_added_and_counted_once():
    ledger = GaussianLedger()
    ledger.add("a", 2.0, 3)
    earlier = ledger.state_dict()
    ledger.add("a", 2.0, 2)
    ledger.add("b", 5.0, 1)
    for state in (earlier, ledger.state_dict()):
        ledger.load_state_dict(state)  # a resumed run of the same object
    assert (ledger.draws, ledger.mu()) == (6, pytest.approx(math.sqrt(5 / 4 + 1 / 25)))
    fresh = GaussianLedger()
    fresh.add("c", 2.0, 1)
    fresh.load_state_dict(earlier)
    assert fresh.draws == 4
    fresh.load_state_dict(ledger.state_dict())
    assert fresh.draws == 7


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_that_is_none_raises(noise):
    ledger = GaussianLedger()
    with pytest.raises(ValueError, match="noise_multiplier must be a number above 0"):
        ledger.add("a", noise)
    with pytest.raises(ValueError, match="noise_multiplier must be a number above 0"):
        ledger.load_state_dict({"runs": {"a": [noise, 1]}})
    assert ledger.draws == 0


@pytest.mark.parametrize(("draws", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_numbers_of_draws_that_are_none_raise(draws, error):
    ledger = GaussianLedger()
    with pytest.raises(error, match="draws must be an integer"):
        ledger.add("a", 1.0, draws)
    with pytest.raises(error, match="draws must be an integer"):
        ledger.load_state_dict({"runs": {"a": [1.0, draws]}})


@pytest.mark.parametrize("entries", [((1.0, 5), (10.0, 1)), ((10.0, 1), (1.0, 5)), ((10.0, 5), (1.0, 1))])
def test_of_one_run_the_smaller_noise_and_more_draws_count(entries):
    ledger = GaussianLedger()
    for entry in entries:
        ledger.load_state_dict({"runs": {"a": list(entry)}})
    assert ledger.mu() == pytest.approx(math.sqrt(5))


def test_draws_on_a_part_count_for_the_whole_and_the_other_way():
    whole = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    ledger_of(whole[1], ["0.weight"]).add("a", 1.0, 2)
    assert (draws_of(whole), draws_of(whole[0]), draws_of(whole[1][0])) == (2, 0, 2)
    ledger_of(whole, ["1.0.weight"]).add("b", 1.0, 1)
    assert [draws_of(part) for part in (whole, whole[0], whole[1], whole[1][0])] == [3, 0, 3, 3]
    wrapped = nn.Sequential(whole)
    assert draws_of(wrapped) == draws_of(copy.deepcopy(wrapped)) == 3


def test_a_ledger_stays_with_its_model_and_its_copies():
    model = nn.Linear(2, 2)
    assert draws_of(model) == 0
    ledger_of(model).add("a", 1.0)
    twin = copy.deepcopy(model)
    ledger_of(twin).add("b", 1.0)
    assert (draws_of(model), draws_of(twin)) == (1, 2)
    assert "_gaussian_ledger" not in model.state_dict()


def test_what_was_spent_is_said_with_its_mechanism():
    assert DefensesPrivacySpent is PrivacySpent
    plain = PrivacySpent(2.0, 1e-5, 40, "prv", True)
    assert str(plain) == "DP-SGD: ε = 2 at δ = 1e-05 after 40 steps (prv accountant). It covers the whole training."
    ledger = GaussianLedger()
    ledger.add("a", 2 / 0.26805, 1)
    assert str(ledger.spent(1e-5, "replace_one")) == (
        "exponential mechanism: ε = 1 at δ = 1e-05 after 1 draws (exact Gaussian accountant), where neighbours differ "
        "by replacing one example. It covers the fine-tuning phase alone: the weights it started from were not trained "
        "under it."
    )
