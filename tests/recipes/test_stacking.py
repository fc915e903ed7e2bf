"""A stack of models gives what each gives alone, or is refused."""

import contextlib
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch import nn
from torch.nn import functional as F

from lightning_cwrf import (
    CWRFConfig,
)
from lightning_cwrf.defenses import (
    available_defenses,
    create_defense,
)
from tests.defenses.cases import MODELS
from tests.helpers import Classifier, ManualClassifier, part
from tests.recipes.modules import Hooked, Plain, assert_stacking_changes_nothing, stackable, train

pytestmark = pytest.mark.slow


class Replacing(Plain):
    """Sets a buffer anew rather than in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean()
        return F.cross_entropy(self(batch[0] - self.mean), batch[1])


def test_a_recipe_whose_callbacks_are_none_stacks(tmp_path):
    assert_stacking_changes_nothing(replace(stackable(Plain), callbacks=list), tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "adagrad"])
def test_a_stack_equals_its_models_trained_one_by_one(tmp_path, optimizer):
    assert_stacking_changes_nothing(stackable(functools.partial(Plain, optimizer)), tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 5},
    ],
)
@pytest.mark.parametrize("scheduler", ["epoch", "step"])
def test_stacks_follow_the_trainers_arguments(tmp_path, arguments, scheduler):
    assert_stacking_changes_nothing(stackable(functools.partial(Plain, "sgd", scheduler), **arguments), tmp_path)


@pytest.mark.parametrize("change", [{"drop_last": True}, {"shuffle": False}, {"build_module": Replacing}])
def test_stacks_of_other_batches_and_buffers(tmp_path, change):
    assert_stacking_changes_nothing(replace(stackable(Plain), **change), tmp_path)


@pytest.mark.parametrize(
    "defense",
    [
        create_defense("relaxloss", alpha=1.0),
        create_defense("hamp"),
        create_defense("ccl"),
        create_defense("label_smoothing"),
        create_defense("confidence_penalty"),
        create_defense("weight_penalty", l1=1e-3, l2=1e-2, on=create_defense("relaxloss", alpha=1.0)),
    ],
    ids=lambda d: d.mixin.__name__,
)
def test_stacks_of_defended_models(tmp_path, defense):
    """Epochs 0 and 1: RelaxLoss does different things in even and odd ones."""
    assert_stacking_changes_nothing(replace(stackable(Plain), defense=defense), tmp_path)


def test_a_stack_of_fine_tuned_models(tmp_path):
    base = train(stackable(Plain), part(0, 80), 4, store=tmp_path, keep_weights=True)
    tuned = replace(stackable(Plain), defense=create_defense("relaxloss", alpha=0.5))
    assert_stacking_changes_nothing(tuned, tmp_path / "tuned", part(0, 80), base=base)


class Random(Plain):
    """Dropout of values and of channels, in place and not, and noise on the inputs."""

    def __init__(self):
        super().__init__()
        self.drop, self.channels = nn.Dropout(0.3, inplace=True), nn.Dropout2d(0.2)

    def forward(self, x):
        x = self.channels(self.body[:3](x + 0.1 * torch.randn_like(x) if self.training else x))
        return self.head(self.drop(x.flatten(1) * 1.0))


class Attention(Plain):
    """A transformer's layer: it draws dropout for tensors that are transposed in memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.layer.self_attn.dropout = 0.0

    def forward(self, x):
        return super().forward(self.layer(x.squeeze(1)).unsqueeze(1))


class Constant(Random):
    """All models begin with the same weights."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))


class Shifted(Plain):
    def training_step(self, batch, batch_idx):
        order = torch.randperm(len(batch[1]))
        return F.cross_entropy(self(batch[0] + torch.rand(8, 1)), batch[1]) + self(batch[0][order]).square().mean()


class Penalised(Plain):
    """Under vmap alone no weight says that it requires a gradient, and the penalty would silently be nothing."""

    def training_step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        return F.cross_entropy(self(batch[0]), batch[1]) + penalty


@pytest.mark.parametrize("module", [Classifier, Random, Attention, Shifted, Penalised])
def test_each_model_draws_and_penalises_as_alone(tmp_path, module):
    assert_stacking_changes_nothing(stackable(module, max_epochs=3), tmp_path)


def test_random_numbers_are_a_models_own(tmp_path):
    """The same weights in a stack of two and of four, and others for another seed."""
    recipe, same = replace(stackable(Constant), shuffle=False), list(range(20))
    two, four, again = (
        recipe.train_stack(part(0, 20), [same] * len(seeds), seeds) for seeds in ([5, 6], [8, 7, 6, 5], [8, 7, 6, 5])
    )
    for name, value in two[0].state_dict().items():
        torch.testing.assert_close(value, four[3].state_dict()[name], rtol=1e-6, atol=1e-8)
        assert torch.equal(four[3].state_dict()[name], again[3].state_dict()[name])
    # From the same weights, on the same examples in the same order, they differ by their dropout alone.
    weights = [model.head.weight.detach() for model in four]
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(weights, 2)) > 1e-3


class Looks(Plain):
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if loss.item() < 1e9 else None


class Noisy(Plain):
    """NumPy would draw one number for all models, where each alone draws its own."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) * np.random.default_rng().uniform(1, 2)


class Once(Plain):
    """Does something at its first call alone, as a data-dependent initialisation does."""

    calls = 0

    def training_step(self, batch, batch_idx):
        Once.calls += 1
        return F.cross_entropy(self(batch[0]), batch[1]) * (2 if Once.calls == 1 else 1)


class Kink(Plain):
    """In a stack another step on the batches with one of some examples, as where rounding decides about a ReLU."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def training_step(self, batch, batch_idx):
        x, y = batch
        there = (x.flatten(1)[:, None] == self.at.flatten(1)).all(-1).any()
        stacked = torch._C._functorch.is_batchedtensor(x)
        return F.cross_entropy(self(x), y) * (1 + there if stacked else 1)


def test_a_step_that_differs_on_one_batch_alone_is_stacked():
    data, members = [part(0, 20)[i][0].double() for i in range(20)], list(range(20))
    for at, refused in ((data[:1], False), (data[::10], True), (data, True)):
        recipe = replace(stackable(functools.partial(Kink, torch.stack(at))), shuffle=False, batch_size=8)
        refusal = pytest.raises(ValueError, match="its first step is not that")
        with refusal if refused else contextlib.nullcontext():
            recipe.train_stack(part(0, 20), [members, members], [1, 2])


@pytest.mark.parametrize("examples", [20, 8])
def test_a_step_whose_first_call_differs_is_refused(examples):
    Once.calls, members = 0, list(range(examples))
    with pytest.raises(ValueError, match="its first step is not that"):
        replace(stackable(Once), batch_size=8).train_stack(part(0, 20), [members, members], [1, 2])


class Filled(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0] + torch.empty(8, 8).uniform_()), batch[1])


class Two(Plain):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (stackable(Filled), "Filled cannot be stacked: its training step draws random numbers"),
        (stackable(Looks), "Looks cannot be stacked: its training step does not vectorise .*item"),
        (stackable(Noisy), "vectorised, its first step is not that of the models one by one"),
        (stackable(Hooked), "Hooked cannot be stacked: it has on_before_zero_grad"),
        (stackable(ManualClassifier), "uses manual optimization"),
        (stackable(functools.partial(Plain, "lbfgs")), "LBFGS cannot be stacked"),
        (stackable(Two), "needs one optimizer, not 2"),
        (replace(stackable(Plain), augment=lambda item: item), "a recipe with augment cannot be stacked"),
        (replace(stackable(Plain), callbacks=lambda: [Timer()]), "a recipe with callbacks cannot be stacked"),
        (replace(stackable(Plain), cwrf=CWRFConfig(part(100, 120))), "CWRF hardens finished models"),
    ],
)  # fmt: skip
def test_unsupported_stacks_raise_with_a_reason(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        recipe.train_stack(part(0, 20), [list(range(10)), list(range(10, 20))], [1, 2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dpsgd", "DPSGD cannot be stacked: it clips the gradient of each example"),
        ("adversarial_regularization", "AdversarialRegularization cannot be stacked: an attack is trained"),
        ("past", "PAST cannot be stacked: it takes the gradients of two losses"),
        ("mixup_mmd", "MixupMMD cannot be stacked: it draws non-members"),
        ("dmp", "DMP cannot be stacked: it needs another model.s outputs on each batch"),
        ("selena", "SELENA cannot be stacked: each model needs an ensemble of its own"),
    ],
)
def test_defenses_that_do_more_than_their_loss_raise(name, reason):
    settings = {"dpsgd": {"noise_multiplier": 1.0, "fix": True}, **MODELS}.get(name, {"nonmembers": part(100, 160)})
    recipe = replace(stackable(Plain), defense=create_defense(name, **settings))
    with pytest.raises(ValueError, match=reason):
        recipe.train_stack(part(0, 20), [list(range(10)), list(range(10, 20))], [1, 2])


def test_every_defense_stacks_or_says_why_not():
    """A new defense that does more than its loss is refused without being known here."""
    compared = {"relaxloss", "hamp", "ccl", "label_smoothing", "confidence_penalty", "weight_penalty"}
    refused = {"dpsgd", "adversarial_regularization", "past", "mixup_mmd", "dmp", "selena"}
    assert set(available_defenses()) == compared | refused


def test_a_function_cannot_be_stacked(tmp_path):
    from tests.recipe_functions import quick

    with pytest.raises(TypeError, match="this recipe cannot train a stack"):
        train(quick, part(0, 20), 2, store=tmp_path, stack=2)
    with pytest.raises(ValueError, match="stack must be an integer of at least 1"):
        train(quick, part(0, 20), 2, store=tmp_path, stack=0)


def test_a_diverged_model_does_not_stop_the_others(tmp_path):
    pool = part(0, 80)
    base = train(stackable(Plain), pool, 4, store=tmp_path, keep_weights=True)
    weights = base.weights(2)
    weights["head.bias"][0] = torch.nan
    base.store.save(2, base.store.outputs(2), weights)
    with pytest.raises(RuntimeError, match=r"1 of 4 shadow models failed(.|\n)*shadow model 2 (.|\n)*NaN"):
        train(stackable(Plain), pool, 4, store=tmp_path / "tuned", base=base, stack=4)
    assert len(list((tmp_path / "tuned").rglob("model-*.safetensors"))) == 3
