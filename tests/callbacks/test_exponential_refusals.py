"""What private fine-tuning refuses: settings, data, Trainers, callbacks and models."""

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_cwrf import (
    DefenseCallback,
    ExponentialMechanismCallback,
    GradientMaskCallback,
    RelaxLossMixin,
    WeightMask,
)
from lightning_cwrf.mechanism.spent import draws_of
from tests.callbacks.drawing import PRIVATE, draws, finished, private, weights
from tests.defenses.dpsgd.cases import fresh
from tests.helpers import Classifier, digits, loader, part, trainer

REMEDY = (
    r"the curvature must come from public data\. Leave them out of the private data .*not out of the public data, "
    r"which would then depend on the private ones"
)


class Augmented(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, place):
        image, label = self.data[place]
        return image + 0.01 * torch.randn_like(image), label


def test_private_examples_among_the_public_ones_are_an_error():
    images, labels = digits().tensors
    public = DataLoader(TensorDataset(images[90:300].clone(), labels[90:300]), batch_size=100)
    message = rf"6 of the 96 examples of the private data are public .*at positions 90, .*{REMEDY}"
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[draws(public)]).fit(finished(), private())


def test_parts_of_one_data_set_are_compared_by_index_also_under_augmentation():
    whole = Augmented(digits())
    first, second = (DataLoader(Subset(whole, range(*ends)), batch_size=100) for ends in ((0, 96), (90, 300)))
    with pytest.raises(ValueError, match=rf"share 6 of its examples \(at 90, 91, .*{REMEDY}"):
        trainer(callbacks=[draws(second)]).fit(finished(), first)
    joined = DataLoader(ConcatDataset([Augmented(part(300, 310)), Subset(whole, [95])]), batch_size=100)
    with pytest.raises(ValueError, match=r"share 1 of its examples \(at 95\)"):
        trainer(callbacks=[draws(joined)]).fit(finished(), first)


def test_public_data_that_read_differently_cannot_be_compared_which_is_said():
    with pytest.warns(UserWarning, match="the public data read differently each time .*cannot be checked by content"):
        trainer(callbacks=[draws(Augmented(part(200, 260)))]).fit(finished(), private())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 1.0}, "needs one of target_epsilon and mu, and not both"),
        ({"target_epsilon": None}, "needs one of target_epsilon and mu, and not both"),
        ({"target_epsilon": 0}, r"target_epsilon must be a number in \(0, 100\], not 0"),
        ({"target_epsilon": None, "mu": float("inf")}, r"mu must be a number in \(0, 1e\+07\], not inf"),
        ({"target_delta": 0.0}, r"target_delta must be a number in \(0, 1\), not 0"),
        ({"draws": 0}, "draws must be an integer of at least 1, not 0"),
        ({"eta": -1.0}, "eta must be a number above 0, not -1"),
        ({"damping": 0.0}, "damping must be a number above 0, not 0"),
        ({"clip": float("inf")}, "clip must be a number above 0, not inf"),
        ({"subspace": 0}, "subspace must be an integer from 1 to 4096, not 0"),
        ({"subspace": 5000}, "subspace must be an integer from 1 to 4096, not 5000"),
        ({"adjacency": "other"}, "adjacency must be 'add_remove' or 'replace_one'"),
    ],
)
def test_settings_out_of_range_raise_where_they_are_given(settings, message):
    with pytest.raises(ValueError, match=message):
        draws(**settings)


@pytest.mark.parametrize("public", [None, 3, torch.ones(3)])
def test_public_data_that_are_none_raise_where_they_are_given(public):
    with pytest.raises(TypeError, match="public: expected a DataLoader"):
        ExponentialMechanismCallback(public, target_epsilon=1.0)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (digits()[i] for i in range(20))


@pytest.mark.parametrize(
    ("make", "data", "error", "message"),
    [
        (lambda: draws(parameters=["net.9.weight"]), private(), ValueError, "no parameter 'net.9.weight'"),
        (
            lambda: draws(parameters="all", subspace=4000),
            private(),
            ValueError,
            "subspace must be an integer from 1 to",
        ),
        (lambda: draws([]), private(), ValueError, "public holds no batch"),
        (lambda: draws(DataLoader(Stream())), private(), TypeError, "public must be data that can be read twice"),
        (draws, DataLoader(part(0, 90), batch_size=16, drop_last=True), ValueError, "drop_last=True"),
        (draws, DataLoader(Stream(), batch_size=4), TypeError, "the private data are read once for each draw"),
        (draws, {"a": private(), "b": private()}, TypeError, "the private data: expected a DataLoader"),
    ],
)
def test_wrong_data_and_parameters_raise_and_change_nothing(make, data, error, message):
    model = finished()
    before = weights(model)
    with pytest.raises(error, match=message):
        trainer(callbacks=[make()], max_steps=1).fit(model, data)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert draws_of(model) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_train_batches": 0.5}, "leave out limit_train_batches"),
        ({"limit_train_batches": 1}, "leave out limit_train_batches"),
        ({"overfit_batches": 1}, "leave out limit_train_batches and overfit_batches"),
        ({"min_epochs": 1}, "min_epochs and min_steps would make the Trainer take training steps"),
        ({"max_epochs": 0}, "the fit ends before ExponentialMechanismCallback"),
    ],
)
def test_trainers_that_it_does_not_work_with(settings, message):
    model = finished()
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=[draws()], **settings).fit(model, private())
    assert draws_of(model) == 0


def test_several_devices_are_refused():
    with pytest.raises(MisconfigurationException, match="works on one device, not with DDPStrategy"):
        draws().setup(trainer(strategy=DDPStrategy(), devices=2), finished(), stage="fit")


def test_loss_scaling_is_refused():
    run = trainer()
    run.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="use bf16-mixed or 32, not 16-mixed"):
        draws().setup(run, finished(), stage="fit")


def test_callbacks_and_defenses_that_it_does_not_work_with():
    model = finished()
    mask = WeightMask({name: torch.zeros_like(value, dtype=torch.bool) for name, value in model.named_parameters()})
    for other in (StochasticWeightAveraging(1e-2), GradientMaskCallback(mask=mask)):
        with pytest.raises(MisconfigurationException, match=f"after which {type(other).__name__} would change or"):
            trainer(callbacks=[draws(), other]).fit(finished(), private())
    with pytest.raises(MisconfigurationException, match="the defense on the module would do nothing; detach it"):
        trainer(callbacks=[draws()]).fit(RelaxLossMixin.attach(finished()), private())
    with pytest.raises(MisconfigurationException, match="there are 2 ExponentialMechanismCallbacks in this Trainer"):
        trainer(callbacks=[draws(), draws()]).fit(finished(), private())


class Remembers(Classifier):
    """A transfer hook keeps the largest pixels of all that it has seen, which the forward pass does not use."""

    def __init__(self, replaces):
        super().__init__()
        self.replaces = replaces
        self.register_buffer("largest", torch.full((64,), -1.0), persistent=not replaces)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        new = torch.maximum(self.largest, batch[0].flatten(1).amax(0))
        if self.replaces:
            self.largest = new
        else:
            self.largest.copy_(new)
        return batch


@pytest.mark.parametrize("replaces", [False, True])
def test_what_a_transfer_hook_keeps_is_an_error_and_is_not_released(replaces):
    model = Remembers(replaces)
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    callback = draws()
    with pytest.raises(ValueError, match="changed largest of the model, without noise: a transfer hook"):
        trainer(callbacks=[callback]).fit(model, private())
    own = dict(model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in own.items())
    public = loader(200, 260, batch_size=60).dataset
    seen = torch.stack([public[i][0].flatten() for i in range(60)]).amax(0)
    assert torch.equal(model.largest, seen)  # the public data were read before
    assert callback.privacy_spent.steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("settings", [("relaxloss", {"alpha": 1.0}), ("dpsgd", {"noise_multiplier": 1.0})])
def test_a_defense_is_refused_in_any_order(first, settings):
    name, given = settings
    callbacks = [draws(), DefenseCallback(name, **given)]
    model = fresh()
    before = weights(model)
    with pytest.raises(MisconfigurationException, match="takes no training step, so the defense on the module"):
        trainer(callbacks=callbacks if first else callbacks[::-1]).fit(model, private())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert draws_of(model) == 0


@pytest.mark.parametrize(
    "repeated",
    [
        lambda whole: Subset(whole, [0] * 20 + list(range(96))),
        lambda whole: ConcatDataset([whole, whole]),
        lambda whole: ConcatDataset([Subset(whole, range(90)), Subset(whole, range(80, 96))]),
        lambda whole: Subset(ConcatDataset([whole, part(96, 100)]), [-1, 99, 5]),
    ],
)
def test_an_example_that_is_there_twice_is_an_error(repeated):
    with pytest.raises(ValueError, match=r"hold .* more than once"):
        trainer(callbacks=[draws()]).fit(finished(), DataLoader(repeated(part(*PRIVATE)), batch_size=32))


def test_equal_examples_warn():
    images, labels = digits().tensors
    data = TensorDataset(images[:96].repeat(2, 1, 1, 1), labels[:96].repeat(2))
    with pytest.warns(UserWarning, match="192 of the 192 private examples are equal to others, up to 2"):
        trainer(callbacks=[draws()]).fit(finished(), DataLoader(data, batch_size=32))


def test_copies_of_public_examples_are_an_error_however_often_they_are_there():
    images, labels = digits().tensors
    data = TensorDataset(images[200:260].repeat(2, 1, 1, 1), labels[200:260].repeat(2))
    with pytest.raises(ValueError, match=r"120 of the 120 examples.*the curvature must come from public data"):
        trainer(callbacks=[draws()]).fit(finished(), DataLoader(data, batch_size=32))


@pytest.mark.parametrize(("parameters", "error"), [(3, TypeError), ("head.weight", ValueError), ([1], TypeError)])
def test_parameters_that_choose_none_raise_at_once(parameters, error):
    with pytest.raises(error, match='parameters must be "head", "all" or a list of names'):
        draws(parameters=parameters)


def test_a_model_of_probabilities_is_refused():
    class Softmax(Classifier):
        def forward(self, images):
            return super().forward(images).softmax(1)

    with pytest.raises(ValueError, match="outputs on the public data are probabilities"):
        trainer(callbacks=[draws()]).fit(Softmax(), private())
