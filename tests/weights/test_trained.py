"""Untrained models are recognised by their outputs on the members and by their vanilla weights."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.weights.trained import check_trained, descends_from
from tests.helpers import Classifier, digits, loader, same_snapshot, snapshot, trained

pytestmark = pytest.mark.slow

UNTRAINED = "does no better on its training data than guessing: .* It looks untrained. Load its finished weights first"


def linear(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def convolutional(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes)
    )


def noise(classes):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(1000, 1, 8, 8, generator=generator), torch.arange(1000) % classes)


def even_or_odd():
    images, targets = digits().tensors
    return TensorDataset(images, targets % 2)


def fitted(model, data, weight=None, steps=60):
    """The model after steps on all of the data at once."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs, targets = data.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets, weight).backward()
        optimizer.step()
    return model


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outcome(model, data, vanilla=None):
    """ "error", "warning" or "fine"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_trained(model, data, vanilla)
        except ValueError:
            return "error"
    return (
        "warning"
        if [each for each in caught if "finished" in str(each.message) or "redraw" in str(each.message)]
        else "fine"
    )


def wide(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, classes))


def pair(first, second):
    images, targets = digits().tensors
    chosen = (targets == first) | (targets == second)
    return TensorDataset(images[chosen], (targets[chosen] == second).long())


FEW = {"even or odd": even_or_odd(), "0 or 1": pair(0, 1), "3 or 8": pair(3, 8), "noise": noise(2)}


@pytest.mark.parametrize("make", [linear, convolutional, wide])
@pytest.mark.parametrize("data", [digits(), noise(10)], ids=["digits", "noise"])
def test_an_untrained_model_of_ten_classes_is_an_error_whatever_its_seed_and_vanilla_weights(make, data):
    for seed in range(8):
        torch.manual_seed(seed)
        model = make(10)
        assert outcome(model, data) == "error", seed
        assert outcome(model, data, weights_of(model)) == "error", seed
        assert outcome(model, data, weights_of(make(10))) == "error", seed


@pytest.mark.parametrize("make", [convolutional, wide])
@pytest.mark.parametrize("name", FEW)
def test_an_untrained_model_of_two_classes_is_reported_with_vanilla_weights(make, name):
    """Random weights separate two classes well by chance, so an error is not possible each time."""
    errors = 0
    for seed in range(10):
        torch.manual_seed(seed)
        model = make(2)
        own, others = outcome(model, FEW[name], weights_of(model)), outcome(model, FEW[name], weights_of(make(2)))
        # The convolutional network of two classes has too few weights for a correlation, but equal ones are equal.
        assert own in ("error", "warning"), seed
        assert others in ("error", "warning") or make is convolutional, seed
        errors += own == "error"
    assert errors >= 7


@pytest.mark.parametrize("make", [linear, convolutional, wide])
@pytest.mark.parametrize(("data", "classes"), [(digits(), 10), (even_or_odd(), 2)], ids=["digits", "even or odd"])
def test_a_trained_model_is_fine_with_its_own_vanilla_weights_and_without_any(make, data, classes):
    for seed in range(3):
        torch.manual_seed(seed)
        model = make(classes)
        vanilla = weights_of(model)
        fitted(model, data)
        assert outcome(model, data) == "fine"
        assert outcome(model, data, vanilla) == "fine"


def test_a_trained_model_correlates_with_its_own_vanilla_weights_after_long_training_with_strong_decay():
    for seed in range(3):
        torch.manual_seed(seed)
        model = wide(10)
        vanilla = weights_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
        inputs, targets = digits().tensors
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert descends_from(model, vanilla)


def test_a_trained_model_with_vanilla_weights_of_another_seed_is_a_warning():
    torch.manual_seed(0)
    model = fitted(wide(10), digits())
    with pytest.warns(UserWarning, match="do not correlate with the vanilla weights: it was not trained from those"):
        check_trained(model, digits(), weights_of(wide(10)))


def test_a_weak_model_of_two_classes_is_fine_with_its_vanilla_weights_and_a_warning_without():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(1000) % 2
    inputs = torch.randn(1000, 1200, generator=generator)
    inputs[:, 0] += 0.3 * targets
    data = TensorDataset(inputs, targets)
    torch.manual_seed(0)
    model = nn.Linear(1200, 2)
    vanilla = weights_of(model)
    with torch.no_grad():  # one that barely learned, with the same loss as guessing
        model.weight.mul_(0.05)
        model.weight.add_(0.001 * torch.randn(2, 1200))
        model.weight[1, 0] += 0.1
    found = loss_and_guessing(model, data)
    assert found[0] > 0.95 * found[1]
    assert outcome(model, data, vanilla) == "fine"
    with pytest.warns(UserWarning, match="no better .* than guessing: .*If it is untrained"):
        check_trained(model, data)


def test_weights_without_a_relation_exceed_the_threshold_as_rarely_as_stated():
    exceeded = 0
    for seed in range(300):
        torch.manual_seed(seed)
        exceeded += bool(descends_from(nn.Linear(40, 30), weights_of(nn.Linear(40, 30))))
    assert exceeded <= 1  # expected: 0.01


def test_few_weights_say_nothing_and_equal_ones_always_say_no():
    model = nn.Linear(4, 3)
    assert descends_from(model, weights_of(nn.Linear(4, 3))) is None
    assert descends_from(model, weights_of(model)) is False


def test_a_trained_lightning_module_does_not_raise():
    model, vanilla = trained(epochs=5)
    check_trained(model, loader(0, 64))
    model.load_state_dict(vanilla)
    with pytest.raises(ValueError, match=UNTRAINED):
        check_trained(model, loader(0, 64))


def loss_and_guessing(model, data):
    outputs = collect_outputs(model, data)
    shares = torch.bincount(outputs.targets) / len(outputs)
    return float(F.cross_entropy(outputs.logits, outputs.targets)), float(-(shares * shares.log()).sum())


def test_a_model_of_weighted_classes_does_not_raise_though_its_plain_loss_is_above_that_of_guessing():
    targets = (torch.arange(1000) % 20 == 0).long()  # 5 % positives
    data = TensorDataset(torch.randn(1000, 8) + targets[:, None] * 0.6, targets)
    model = fitted(nn.Linear(8, 2), data, weight=torch.tensor([1.0, 19.0]), steps=200)
    loss, guessing = loss_and_guessing(model, data)
    assert loss > guessing
    check_trained(model, data)


def test_a_model_of_a_large_temperature_does_not_raise_though_its_loss_is_that_of_guessing():
    class Cool(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) / 1000

    model = Cool(fitted(linear(10), digits()))
    loss, guessing = loss_and_guessing(model, digits())
    assert loss == pytest.approx(guessing, rel=0.01)
    check_trained(model, digits())


def test_an_iterator_is_not_consumed():
    batches = iter(list(loader(0, 64)))
    check_trained(linear(10), batches)
    assert len(list(batches)) == 4


def test_members_of_one_class_do_not_raise():
    check_trained(nn.Linear(4, 3), [(torch.randn(90, 4), torch.zeros(90, dtype=torch.long))])


def test_ready_batches_and_a_transfer_of_the_users_own_are_read():
    def halve(batch):
        return batch["images"] / 2, batch["digit"]

    batches = [{"images": x, "digit": y} for x, y in loader(0, 192, batch_size=64)]
    with pytest.raises(ValueError, match=UNTRAINED):
        check_trained(Classifier(), batches, transfer=halve)
    check_trained(trained(epochs=5)[0], batches, transfer=halve)


@pytest.mark.parametrize("epochs", [0, 5])
def test_the_model_and_the_random_state_stay_as_they_were(epochs, request):
    model = trained(epochs=5)[0] if epochs else Classifier()
    model.net[0].eval()
    before = snapshot(model)
    request.getfixturevalue("rng_untouched")
    if epochs:
        check_trained(model, loader(0, 64, shuffle=True))
    else:
        with pytest.raises(ValueError, match=UNTRAINED):
            check_trained(model, loader(0, 64, shuffle=True))
    same_snapshot(before, snapshot(model))
