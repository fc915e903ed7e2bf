"""The defenses that train against non-members beyond their loss: the attack that trains along, and Mixup+MMD."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_cwrf.defenses import adversarial_regularization_loss, attack_gain, create_defense
from lightning_cwrf.defenses.adversarial import AttackNetwork
from lightning_cwrf.defenses.mixup_mmd import mix_batch
from lightning_cwrf.defenses.nonmembers import NonmemberBatches
from tests.defenses.cases import defense, start
from tests.helpers import Classifier, digits, loader, part, trainer


@pytest.fixture
def as_is(monkeypatch):
    """Steps outside of a fit: a Trainer that has no data moves no batch."""
    monkeypatch.setattr("lightning_cwrf.defenses.nonmembers.transfer_of", lambda trainer: lambda batch: batch)


def test_the_attack_of_adversarial_regularization_is_in_the_checkpoint_alone(tmp_path):
    model, _ = start()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    defense("adversarial_regularization").attach(model)
    run = trainer(max_epochs=1)
    run.fit(model, loader(0, 64))
    assert list(model.state_dict()) == keys
    assert [id(p) for g in run.optimizers[0].param_groups for p in g["params"]] == parameters
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["adversarial_regularization"]
    network = model.defense_state.adversary.network
    assert all(torch.equal(saved["network"][n], t) for n, t in network.state_dict().items())
    assert saved["optimizer"]["state"][0]["step"] == 2 * 4  # two attack steps a batch
    again = copy.deepcopy(model).defense_state.adversary.network
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_the_attack_improves_and_the_classifier_trains_against_it(as_is):
    """Members are told from non-members after some steps; the classifier's loss is that against this attack."""
    model, _ = start()
    model.net[1].eval()  # no batch statistics: the loss can be taken again
    defense("adversarial_regularization").attach(model)
    model.trainer = trainer()
    batch = next(iter(loader(0, 64, batch_size=64)))
    for _ in range(30):  # the classifier stands still
        loss, size = model.defense_step(batch)
    assert size == 64
    model.eval()
    attack, (x, y) = model.defense_state.adversary.network, next(iter(loader(300, 360, batch_size=60)))
    assert float(attack_gain(attack(model(batch[0]), batch[1]), attack(model(x), y))) > math.log(0.5) + 0.05
    expected = adversarial_regularization_loss(model(batch[0]), batch[1], attack(model(batch[0]), batch[1]), lam=0.5)
    model.train()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.requires_grad for p in model.defense_state.adversary.network.parameters())


def test_the_attack_network_is_that_of_the_paper():
    """1024, 512, 64 for the prediction, 512, 64 for the label, 256, 64, 1 for both; ReLU between."""
    network = AttackNetwork(3)
    widths = [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
    assert widths == [(1024, 3), (512, 1024), (64, 512), (512, 3), (64, 512), (256, 128), (64, 256), (1, 64)]
    layers = {
        side: [m for m in getattr(network, side).modules() if isinstance(m, nn.Linear)]
        for side in ("prediction", "label", "both")
    }
    logits, targets = torch.randn(5, 3), torch.tensor([2, 0, 1, 1, 0])
    hidden = {"prediction": logits.exp() / logits.exp().sum(1, keepdim=True), "label": torch.eye(3)[targets]}
    for side, values in hidden.items():
        for layer in layers[side]:
            values = (values @ layer.weight.T + layer.bias).clamp(min=0)
        hidden[side] = values
    both = torch.cat([hidden["prediction"], hidden["label"]], dim=1)
    for layer in layers["both"][:-1]:
        both = (both @ layer.weight.T + layer.bias).clamp(min=0)
    odds = both @ layers["both"][-1].weight[0] + layers["both"][-1].bias
    torch.testing.assert_close(network(logits, targets), odds)


def test_every_epoch_and_process_has_an_order_of_its_own_and_the_same_again():
    def numbers(rank, epoch, batches):
        module = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        draws = torch.rand(3, generator=batches.generator(module)).tolist()
        more = torch.rand(3, generator=batches.generator(module)).tolist()  # the same generator goes on
        assert more != draws
        return tuple(draws + more)

    one, two = ([NonmemberBatches([], "a defense") for _ in range(3)] for _ in range(2))
    places = list(itertools.product(range(3), range(4)))
    found = [numbers(rank, epoch, one[rank]) for rank, epoch in places]
    assert len(set(found)) == len(places)
    resumed = [(rank, epoch) for rank, epoch in places if epoch >= 2]
    assert [numbers(rank, epoch, two[rank]) for rank, epoch in resumed] == [
        found[places.index(place)] for place in resumed
    ]


@pytest.mark.parametrize("name", ["adversarial_regularization", "mixup_mmd"])
def test_a_pass_without_gradients_leaves_autocast_its_gradients(name, as_is):
    """Autocast keeps casted weights; those of an evaluation pass would carry no gradient."""
    grads = []
    for enabled in (False, True):
        model, _ = start()
        model.eval()
        defense(name).attach(model)
        model.trainer = trainer()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = model.defense_step(next(iter(loader(0, 32, batch_size=32))))
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > 0.99


def test_mixup_mmd_draws_non_members_of_the_members_classes(as_is):
    model, _ = start()
    defense("mixup_mmd").attach(model)
    model.trainer = trainer()
    members = next(iter(loader(0, 32, batch_size=32)))
    assert torch.equal(model.defense_state.nonmembers.like(model, members, members[1])[1], members[1])
    few = [i for i in range(300, 400) if int(digits()[i][1]) != 3]
    missing = create_defense("mixup_mmd", nonmembers=Subset(digits(), few)).attach(start()[0])
    with pytest.raises(ValueError, match="no example of class 3"):
        trainer().fit(missing, loader(0, 64))
    listed = create_defense("mixup_mmd", nonmembers=[next(iter(loader(300, 330)))]).attach(start()[0])
    with pytest.raises(TypeError, match="by class: pass a dataset"):
        trainer().fit(listed, loader(0, 64))
    with pytest.raises(ValueError, match="are members"):
        trainer().fit(create_defense("mixup_mmd", nonmembers=part(0, 64)).attach(start()[0]), loader(0, 64))
    with pytest.raises(TypeError, match=r"floating-point inputs, not torch\.int64"):
        mix_batch((torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1])), torch.tensor([1, 0]), 0.5)
    with pytest.raises(TypeError, match=r"floating-point inputs, not list"):
        mix_batch(([[1.0], [2.0]], torch.tensor([0, 1])), torch.tensor([1, 0]), 0.5)
    x, y, order = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1, 0])
    for batch in ((x, y, y), [x], x):
        with pytest.raises(TypeError, match=r"Mixup needs batches \(inputs, targets\) or dicts"):
            mix_batch(batch, order, 0.5)
    mixed = mix_batch([torch.tensor([[0.0], [4.0]]), y], order, 0.75)  # lists are batches too
    assert mixed[0].tolist() == [[1.0], [3.0]]
    assert mixed[1] is y
    with pytest.raises(MisconfigurationException, match=r"Mixup\+MMD needs data the model is not trained on"):
        create_defense("mixup_mmd")


def test_an_attack_of_another_number_of_classes_raises(as_is):
    with pytest.raises(ValueError, match="made for 10 classes, not for 4"):
        AttackNetwork(10)(torch.zeros(2, 4), torch.tensor([0, 1]))
    model, _ = start()
    defense("adversarial_regularization").attach(model)
    model.trainer = trainer()
    model.on_load_checkpoint({"adversarial_regularization": {"network": AttackNetwork(12).state_dict()}})
    with pytest.raises(ValueError, match="attack network is of 12 classes, and the model has 10: resume with"):
        model.defense_step(next(iter(loader(0, 16))))


def with_wrong(x, y, value, label):
    """The 41st example is not finite, or the 42nd has a label that the model lacks."""
    x, y = x.clone(), y.clone()
    x[40] = value if value is not None else x[40]
    y[41] = label if label is not None else y[41]
    return DataLoader(TensorDataset(x, y), batch_size=16)


@pytest.mark.parametrize(("value", "label", "message"), [(math.nan, None, "NaN or inf"), (None, 12, "label 12 is")])
@pytest.mark.parametrize("name", ["adversarial_regularization", "mixup_mmd", "past"])
def test_a_bad_batch_raises_for_what_is_wrong_in_it(name, value, label, message):
    model = create_defense(name, nonmembers=part(200, 400)).attach(Classifier())
    x, y = digits()[:64]
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=1).fit(model, with_wrong(x, y, value, label))
    if name == "adversarial_regularization":
        assert all(v.isfinite().all() for v in model.defense_state.adversary.network.state_dict().values())
