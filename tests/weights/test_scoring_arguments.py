"""Arguments of the scoring: defaults, errors and warnings."""

import copy
import re
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cwrf import PrivacyScoringCallback
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores, warn_if_swapped
from tests.helpers import part, trained
from tests.weights.helpers import Counting, linear_case


def test_overlap_is_found_by_content_and_named():
    model, vanilla, members, reference = linear_case()
    reference[0][0][3] = members[0][0][5]
    with pytest.raises(ValueError, match=r"1 of the 8 examples of the reference data \(nonmembers=\) are members"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


def test_overlap_is_found_wherever_it_is_and_counted_whole():
    model, vanilla = trained()
    with pytest.raises(ValueError, match=r"3 of the 1003 examples of the reference data \(nonmembers=\)"):
        privacy_vulnerability_scores(model, vanilla, part(0, 64), part(61, 1064), steps=1)


def test_probabilities_are_refused():
    _, _, members, reference = linear_case()
    model, vanilla = (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)) for _ in range(2))
    with pytest.raises(ValueError, match="are probabilities"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"lam": 1.2}, "lam must be a number in"),
        (lambda c: {"steps": 0}, "steps must be an integer of at least 1"),
        (lambda c: {"lr": -1.0}, "lr must be a number of at least 0, not -1.0"),
        (lambda c: {"lr": float("inf")}, "lr must be a number of at least 0, not inf"),
        (lambda c: c["members"].clear() or {}, "members holds no batch"),
        (lambda c: c["nonmembers"].clear() or {}, "nonmembers holds no batch"),
        (lambda c: c["members"][0][1].fill_(3) is None or {}, "label 3 is out of range"),
        (lambda c: c["members"][0][0].fill_(float("nan")) is None or {}, "NaN or infinite"),
        (lambda c: {"lr": 3e38}, "NaN or infinite|scoring loss is"),
    ],
)
def test_bad_input_is_a_clear_error(change, message):
    model, vanilla, members, reference = linear_case()
    case = {"members": members, "nonmembers": reference}
    extra = change(case)
    case.update(extra if isinstance(extra, dict) else {})
    with pytest.raises(ValueError, match=message):
        privacy_vulnerability_scores(model, vanilla, **case)


def test_the_models_own_weights_are_doubtful_vanilla_weights():
    model, _, members, reference = linear_case()
    with pytest.warns(UserWarning, match="own current weights"):
        privacy_vulnerability_scores(model, copy.deepcopy(model), members, reference)


def test_nothing_trainable_is_an_error():
    model, vanilla, members, reference = linear_case()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to score"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("model.pt", TypeError, "model must be a torch.nn.Module, not str"),
        (nn.Linear, TypeError, "not the class Linear; pass an instance"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, r"lazy parameters without a shape yet \(0.weight, 0.bias\)"),
    ],
)
def test_what_is_no_model_or_has_no_shapes_yet(model, error, message):
    with pytest.raises(error, match=message):
        learnability_scores(model, [(torch.randn(8, 4), torch.randint(3, (8,)))])


def test_a_model_that_cannot_be_copied_is_named():
    model, vanilla, members, reference = linear_case()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear cannot be copied .attribute 'lock' of type lock"):
        privacy_vulnerability_scores(model, vanilla, members, reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": "0.7"}, "lam must be a number, not the str '0.7'. It weights"),
        ({"lam": True}, "lam must be a number, not the bool True"),
        ({"lam": None}, "lam must be a number, not None"),
        ({"steps": 30.0}, "steps must be an integer, not the float 30.0"),
        ({"steps": "30"}, "steps must be an integer, not the str '30'"),
        ({"lr": "1e-3"}, "lr must be a number, not the str '1e-3'"),
    ],
)
def test_settings_of_the_wrong_type(settings, message):
    for make in (
        lambda: privacy_vulnerability_scores(*linear_case(), **settings),
        lambda: PrivacyScoringCallback([], "redraw", **settings),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            make()


def test_defaults_are_the_published_settings():
    """30 batches of 256, λ = 0.7; and η_e = 1e-3, which the paper does not state."""
    members = TensorDataset(torch.randn(257, 4), torch.randint(3, (257,)))
    reference = TensorDataset(torch.randn(257, 4), torch.randint(3, (257,)))
    model, vanilla = Counting(4, 3), Counting(4, 3)
    settings = {"steps": 30, "lr": 1e-3, "batch_size": 256}
    for scores, explicit in (
        (lambda **given: learnability_scores(model, members, **given), settings),
        (
            lambda **given: privacy_vulnerability_scores(model, vanilla, members, reference, **given),
            {**settings, "lam": 0.7},
        ),
    ):
        found, done = [], []
        for given in ({"on_step": done.append}, explicit):
            torch.manual_seed(0)
            Counting.sizes = []
            found.append(scores(**given))
            assert 256 in Counting.sizes
            assert 257 not in Counting.sizes
        assert done == list(range(1, 31))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_an_example_at_least(size):
    model, vanilla, members, reference = linear_case()
    for make in (
        lambda: learnability_scores(model, members, batch_size=size),
        lambda: privacy_vulnerability_scores(model, vanilla, members, reference, batch_size=size),
        lambda: PrivacyScoringCallback([], "redraw", batch_size=size),
    ):
        with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, not {size}"):
            make()


def logits_of(losses):
    """Two logits for each example, of which the first is the true class's, with the given cross-entropy."""
    z = torch.tensor(losses, dtype=torch.float64).expm1().log()  # ln(1 + e^z) is the loss
    return torch.stack([torch.zeros_like(z), z], 1), torch.zeros(len(losses), dtype=torch.long)


@pytest.mark.parametrize(
    ("members", "reference", "told"),
    [
        # A variance of 8/7 on both sides: the difference has the error sqrt(2/7), and four of them are 2.138.
        ([2.7, 4.7] * 4, [0.5, 2.5] * 4, True),
        ([2.6, 4.6] * 4, [0.5, 2.5] * 4, False),
        ([0.5, 2.5] * 4, [2.7, 4.7] * 4, False),
        # 8/7 and 12/11 on 8 and 12 examples: the error is sqrt(1/7 + 1/11), and four of them 1.934.
        ([2.5, 4.5] * 6, [0.5, 2.5] * 4, True),
        ([2.4, 4.4] * 6, [0.5, 2.5] * 4, False),
        ([5.0, 7.0] * 3 + [6.0], [0.5, 2.5] * 4, False),  # seven are too few to tell
        ([5.0, 7.0] * 4, [0.5, 2.5] * 3 + [1.5], False),
        ([5.0, 7.0] * 4, [0.5, 2.5] * 4, True),
        ([1.0] * 8, [1.0] * 8, False),  # a model that tells nothing apart
    ],
)
def test_sides_are_swapped_where_their_losses_differ_by_four_errors(members, reference, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_swapped(*logits_of(members), *logits_of(reference))
    assert [("swapped" in str(w.message)) for w in caught] == [True] * told


@pytest.mark.parametrize("order", [1, -1])
def test_a_copy_that_uses_a_weight_of_the_model_is_found_wherever_in_the_loss_it_is(order):
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other = nn.Linear(4, 3), nn.Linear(4, 3)
            self.call = lambda x: self.other(x)  # of this module, in every copy

        def forward(self, x):
            first, second = [self.own(x), self.call(x)][::order]
            return first + second

    with pytest.raises(ValueError, match=r"still computes with the 'other\.(weight|bias)' of the model itself"):
        learnability_scores(Bound(), linear_case()[2], steps=1)
