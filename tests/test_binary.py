"""Binary classifiers with one logit for each example; multi-label and regression targets are refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    DPSGDMixin,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
    audit,
    insert_canaries,
    train_shadows,
)
from lightning_cwrf.attacks import available_attacks, create_attack
from lightning_cwrf.classification import classification_step, deferred_checks
from lightning_cwrf.data import example_digests
from lightning_cwrf.defenses import HAMPOutput, available_defenses, defense_class
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from lightning_cwrf.shadows.pool import read_data
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.defenses.test_registry import minimal
from tests.helpers import Classifier, digits, part, trainer

FORMS = {
    "(n,), floats": (lambda z: z[:, 0], lambda y: y.float()),
    "(n,), integers": (lambda z: z[:, 0], lambda y: y),
    "(n, 1), floats (n, 1)": (lambda z: z, lambda y: y.float()[:, None]),
    "(n, 1), bools": (lambda z: z, lambda y: y.bool()),
    "(n, 1), uint8 (n, 1)": (lambda z: z, lambda y: y.to(torch.uint8)[:, None]),
}


class Fixed(nn.Module):
    """Gives what the batch holds."""

    def classification_step(self, batch):
        return batch


class Binary(Classifier):
    """Whether a digit is at least 5, by one logit."""

    def __init__(self, width=8, lr=1e-2, optimizer="adam"):
        super().__init__(width, lr, optimizer)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class TwoLogits(Binary):
    """The same model with logits 0 and z."""

    def forward(self, x):
        z = super().forward(x)
        return torch.stack([torch.zeros_like(z), z], -1)


def pool(begin, end, dtype=torch.float32):
    images, labels = digits().tensors
    return TensorDataset(images[begin:end], (labels[begin:end] >= 5).to(dtype))


def batches(begin, end, dtype=torch.float32, **kwargs):
    return DataLoader(pool(begin, end, dtype), batch_size=16, **kwargs)


@pytest.mark.parametrize("form", FORMS)
def test_softmax_of_the_two_logits_is_the_sigmoid(form):
    shape, label = FORMS[form]
    z, y = torch.randn(40, 1, requires_grad=True), torch.randint(2, (40,))
    logits, targets = classification_step(Fixed(), (shape(z), label(y)))
    assert logits.shape == (40, 2)
    assert torch.equal(targets, y)
    assert torch.allclose(logits.softmax(-1)[:, 1], z.sigmoid()[:, 0])
    assert torch.allclose(F.cross_entropy(logits, targets), F.binary_cross_entropy_with_logits(z[:, 0], y.float()))
    (ours,) = torch.autograd.grad(F.cross_entropy(logits, targets), z)
    (theirs,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(z[:, 0], y.float()), z)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_last_batch_of_one_whose_output_was_squeezed():
    logits, targets = classification_step(Fixed(), (torch.tensor(2.0), torch.tensor([1.0])))
    assert torch.equal(logits, torch.tensor([[0.0, 2.0]]))
    assert torch.equal(targets, torch.tensor([1]))


@pytest.mark.parametrize("targets", [[0.0, 0.3], [0, 3], [-1, 1], [0.0, float("nan")]])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_targets_that_are_not_0_or_1_raise(targets, shape):
    given = torch.zeros(shape), torch.tensor(targets).reshape(shape)
    with pytest.raises(ValueError, match="is a binary classifier, whose targets are 0 and 1; some of these are"):
        classification_step(Fixed(), given)
    with deferred_checks() as checks:
        logits, found = classification_step(Fixed(), given)
        with pytest.raises(ValueError, match="Regression is not supported"):
            checks.passed(F.cross_entropy(logits, found))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), "multi-label classification, which is not supported"),
        (torch.tensor([[0, 1, 1], [0, 0, 0]]), r"multi-label .* define classification_step"),
        (torch.tensor([[False, True, True], [False, False, False]]), "multi-label"),
        (torch.tensor([[0.0, 0.9, 0.1], [1.0, 0.0, 0.0]]), r"one-hot or probability targets .* \.argmax\(-1\)"),
        (torch.tensor([[0.2, 3.5, 1.0], [0.0, -1.0, 0.0]]), "regression is not supported"),
        (torch.tensor([0.2, 3.5]), "regression is not supported"),
    ],
)
def test_multi_label_and_regression_are_refused_by_name(targets, message):
    with pytest.raises(ValueError, match=message):
        classification_step(Fixed(), (torch.zeros(2, 3), targets))


def test_a_column_of_class_indices_is_taken():
    _, targets = classification_step(Fixed(), (torch.zeros(2, 3), torch.tensor([[2], [0]])))
    assert torch.equal(targets, torch.tensor([2, 0]))


class Given(nn.Module):
    def forward(self, x):
        return x[:, :1]


def test_outputs_of_a_trained_sigmoid_are_an_error():
    def read(low, high, n=64):
        z = torch.linspace(low, high, n)[:, None]
        return collect_outputs(Given(), [(z, torch.arange(n) % 2)])

    with pytest.raises(ValueError, match=r"all 64 on .* from 0\.010 to 0\.990: they are probabilities; return logits"):
        read(0.01, 0.99)
    with pytest.warns(UserWarning, match="lie between 0 and 1"):  # a logit before the training, perhaps
        read(0.1, 0.6)
    with pytest.warns(UserWarning, match="lie between 0 and 1"):
        read(0.01, 0.99, n=40)
    read(-0.01, 0.99)
    read(0.01, 1.2)


def test_outputs_of_a_sigmoid_warn():
    with pytest.warns(UserWarning, match="lie between 0 and 1, as those of a sigmoid do"):
        collect_outputs(nn.Sequential(Binary(), nn.Sigmoid()), batches(0, 64))


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in one.items())


def models():
    torch.manual_seed(0)
    vanilla, finished = Binary(), Binary()
    twins = TwoLogits(), TwoLogits()
    for model, twin in zip((vanilla, finished), twins, strict=True):
        twin.load_state_dict(model.state_dict())
    return vanilla, finished, *twins


def test_scores_are_those_of_the_model_with_two_logits():
    vanilla, finished, vanilla_2, finished_2 = models()
    members, reference = [list(batches(0, 32)), list(batches(100, 132))]
    as_int = [[(x, y.long()) for x, y in side] for side in (members, reference)]
    same(learnability_scores(finished, members, steps=2), learnability_scores(finished_2, as_int[0], steps=2))
    same(
        privacy_vulnerability_scores(finished, vanilla, members, reference, steps=2),
        privacy_vulnerability_scores(finished_2, vanilla_2, *as_int, steps=2),
    )


@pytest.mark.slow
def test_an_audit_is_that_of_the_model_with_two_logits():
    _, finished, _, finished_2 = models()
    attacks = [name for name in available_attacks() if not create_attack(name).needs]
    assert len(attacks) > 3
    one = audit(finished, members=batches(0, 64), nonmembers=batches(64, 128), attacks=attacks)
    two = audit(finished_2, members=pool(0, 64, torch.long), nonmembers=pool(64, 128, torch.long), attacks=attacks)
    assert one.values() == pytest.approx(two.values())
    with pytest.raises(ValueError, match="64 of the 64 examples of nonmembers are members"):
        audit(finished, members=batches(0, 64), nonmembers=batches(0, 64))


def learned_from(name, cls, dtype):
    """The other models that a defense learns from."""
    torch.manual_seed(2)
    if name == "dmp":
        return {"teacher": cls()}
    if name != "selena":
        return {}
    data = batches(0, 64, dtype)
    digests = [digest for batch in data for digest in example_digests(batch)]
    targets = torch.cat([y for _, y in data]).long()
    known = torch.randn(4, 64, 2), balanced_membership(4, 64)
    return {"ensemble": ShadowOutputs(*known, targets, digests, None, None, store=None)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(available_defenses()))
def test_every_defense_trains_it_as_it_does_the_model_with_two_logits(name):
    weights = []
    for cls, dtype in ((Binary, torch.float32), (TwoLogits, torch.long)):
        torch.manual_seed(0)
        model = cls()
        settings = minimal(name)
        settings |= learned_from(name, cls, dtype) or dict.fromkeys(
            defense_class(name).data_names(), pool(200, 264, dtype)
        )
        torch.manual_seed(1)
        trainer(max_epochs=1, callbacks=[DefenseCallback(name, **settings)]).fit(model, batches(0, 64, dtype))
        weights.append(model.state_dict())
    same(*weights)


@pytest.mark.slow
def test_hardening_audit_and_shadow_models(tmp_path):
    def first_training():
        torch.manual_seed(0)
        model = Binary()
        vanilla = copy.deepcopy(model.state_dict())
        run = trainer(max_epochs=2)
        run.fit(model, batches(0, 64, shuffle=True))
        return model, vanilla, run

    model, vanilla, run = first_training()
    recipe = ShadowRecipe.like(run, model)
    base = train_shadows(recipe, pool(0, 128), n=4, keep_weights=True, population=pool(300, 340), store=tmp_path)
    hardened = copy.deepcopy(model)
    privacy = MIAAuditCallback(nonmembers=batches(64, 128))
    callbacks = [PrivacyScoringCallback(batches(200, 240), vanilla, steps=2), CriticalRewindCallback(0.1)]
    callbacks += [GradientMaskCallback(), DefenseCallback("relaxloss", alpha=0.3), privacy]
    run = trainer(max_epochs=2, callbacks=callbacks)
    run.fit(hardened, batches(0, 64, shuffle=True))
    data = {"population": pool(300, 340), "store": tmp_path}
    shadows = train_shadows(ShadowRecipe.like(run, hardened), pool(0, 128), n=4, base=base, **data)
    assert shadows.logits.shape == (4, 128, 2)
    result = audit(hardened, members=pool(0, 64), nonmembers=pool(64, 128), shadows=shadows)
    assert not result.failures
    assert {"loss", "lira", "rmia"} <= set(result.scores)
    assert 0 <= privacy.result.values()["test_accuracy"] <= 1


def test_hamp_output_keeps_the_predicted_class():
    _, finished, _, finished_2 = models()
    x = pool(0, 64)[:][0]
    shown = HAMPOutput(finished)(x)
    assert torch.equal(shown, HAMPOutput(finished_2)(x))
    assert torch.equal(shown.argmax(-1).bool(), finished(x) > 0)


def test_canaries_keep_the_type_of_their_labels():
    canaries = insert_canaries(pool(0, 40), m=10)
    labels = torch.stack([canaries.examples[i][1] for i in range(10)])
    assert labels.dtype == torch.float32
    assert torch.equal(labels, 1 - pool(0, 40)[:][1][canaries.places])


def test_a_pool_of_soft_labels_raises():
    soft = TensorDataset(part(0, 8).dataset.tensors[0][:8], torch.full((8,), 0.3))
    with pytest.raises(ValueError, match="must be class indices from 0 on"):
        read_data(soft, None)


@pytest.mark.slow
def test_dp_sgd_trains_it():
    model = DPSGDMixin.attach(Binary(), noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-2)
    trainer(max_epochs=1).fit(model, batches(0, 64))
    assert model.privacy_spent.epsilon > 0
