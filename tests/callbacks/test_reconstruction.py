"""The reconstruction audit in a fit: when it runs, on which weights, and what it refuses before the first step."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_cwrf import (
    ReconstructionAuditCallback,
    ReconstructionPrior,
    ReconstructionResult,
    audit_reconstruction,
)
from tests.helpers import trainer


def side(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


MEMBERS, NONMEMBERS = side(6, 1), side(8, 2)


class Net(LightningModule):
    def __init__(self, optimizer=torch.optim.SGD, bias=False, **settings):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3, bias=bias))
        self.make = lambda parameters: optimizer(parameters, lr=0.05, **settings)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(*callbacks, model=None, data=None, **settings):
    torch.manual_seed(0)
    model = Net(weight_decay=1e-3) if model is None else model
    run = trainer(callbacks=list(callbacks), **settings)
    run.fit(model, DataLoader(MEMBERS, batch_size=6) if data is None else data)
    return model, run


def callback(nonmembers=NONMEMBERS, **settings):
    return ReconstructionAuditCallback(nonmembers, **{"steps": 5, **settings})


def test_the_result_is_that_of_an_audit_of_the_finished_model(tmp_path):
    prior = ReconstructionPrior(scale=0.5)
    audit = callback(prior=prior, seed=3)
    model, _ = fit(audit, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    expected = audit_reconstruction(
        model, members=MEMBERS, nonmembers=NONMEMBERS, prior=prior, steps=5, seed=3, weight_decay=1e-3
    )
    assert torch.equal(audit.result.scores, expected.scores)
    assert audit.result.values() == expected.values()
    assert str(audit.result) == str(expected)
    (path,) = tmp_path.rglob("metrics.csv")
    head, *rows = path.read_text().splitlines()
    logged = dict(zip(head.split(","), rows[-1].split(","), strict=True))
    for name, value in expected.values().items():
        assert float(logged[f"reconstruction/{name}"]) == pytest.approx(value)


def test_the_training_is_not_changed():
    ended = []
    for callbacks in ([callback()], []):
        model, _ = fit(*callbacks)
        ended.append((model.state_dict(), torch.get_rng_state(), model.training))
    for name, value in ended[0][0].items():
        assert torch.equal(value, ended[1][0][name]), name
    assert torch.equal(ended[0][1], ended[1][1])
    assert ended[0][2] == ended[1][2]


def test_several_priors_in_one_training():
    one, other = callback(), callback(prior=ReconstructionPrior(scale=1.0), name="without domain")
    fit(one, other)
    assert "0.03" in one.result.finding
    assert "N(0, 1²)" in other.result.finding
    with pytest.raises(
        MisconfigurationException, match=r"2 ReconstructionAuditCallbacks .* or give each another name="
    ):
        fit(callback(), callback())


@pytest.mark.filterwarnings("ignore:.*")
def test_the_final_weights_are_attacked():
    audit = callback()
    model, _ = fit(audit, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), max_epochs=4)
    expected = audit_reconstruction(model, members=MEMBERS, nonmembers=NONMEMBERS, steps=5, weight_decay=1e-3)
    assert torch.equal(audit.result.scores, expected.scores)

    class Late(Net):
        def teardown(self, stage):  # it runs after those of the callbacks; so a hook before them
            pass

        def on_fit_end(self):
            with torch.no_grad():
                self.net[0].weight.mul_(1.5)

    audit = callback()
    model, _ = fit(audit, model=Late(weight_decay=1e-3))
    expected = audit_reconstruction(model, members=MEMBERS, nonmembers=NONMEMBERS, steps=5, weight_decay=1e-3)
    assert torch.equal(audit.result.scores, expected.scores)


def test_the_result_is_saved_and_a_file_of_another_run_is_kept(tmp_path):
    audit = callback(save=tmp_path / "result.json")
    fit(audit)
    assert torch.equal(ReconstructionResult.load(audit.save).scores, audit.result.scores)
    with pytest.raises(MisconfigurationException, match="exists; pass another file as save=, or overwrite=True"):
        fit(callback(save=tmp_path / "result.json"))
    fit(callback(save=tmp_path / "result.json", overwrite=True))
    twins = (callback(save=tmp_path / "a.json"), callback(save=tmp_path / "a.json", name="other"))
    with pytest.raises(MisconfigurationException, match="two callbacks in this Trainer save to"):
        fit(*twins)


def test_a_second_fit_attacks_again_and_the_callback_can_be_copied():
    audit = callback()
    model, _ = fit(audit)
    first = audit.result
    trainer(callbacks=[audit]).fit(model, DataLoader(MEMBERS, batch_size=6))
    assert not torch.equal(audit.result.scores, first.scores)
    assert torch.equal(copy.deepcopy(audit).result.scores, audit.result.scores)


class Trap(Net):
    def training_step(self, batch, batch_idx):
        raise AssertionError("a step was trained")


def refused(message, error=MisconfigurationException, *, data=None, **settings):
    given = {name: settings.pop(name) for name in ("optimizer", "bias", "weight_decay_of_model") if name in settings}
    decay = given.pop("weight_decay_of_model", 1e-3)
    with pytest.raises(error, match=message):
        fit(callback(**settings), model=Trap(weight_decay=decay, **given), data=data)


def test_a_network_that_is_not_homogeneous_is_refused_without_weight_decay():
    message = r"not homogeneous in its trained weights: net\.3 \(Linear\)"
    refused(message, bias=True, weight_decay_of_model=0.0)
    refused(message, bias=True, weight_decay=0)
    audit = callback()
    fit(audit, model=Net(bias=True, weight_decay=1e-3))
    assert audit.result.degree is None
    audit = callback(weight_decay=1e-3)
    fit(audit, model=Net(bias=True))
    assert audit.result.degree is None
    fit(callback(), model=Net())


def test_wrong_data_is_an_error_before_the_first_step():
    refused("6 different members and 5 different non-members", ValueError, nonmembers=side(5, 2))
    refused("of the 8 examples of nonmembers are members", ValueError, nonmembers=side(8, 1))
    refused(r"center has the shape \(3,\)", ValueError, prior=ReconstructionPrior(torch.zeros(3)))
    sampler = RandomSampler(MEMBERS, num_samples=2)
    refused("leaves out", data=DataLoader(MEMBERS, batch_size=2, sampler=sampler))


def grouped(parameters, lr, weight_decay):
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": rest, "weight_decay": 0.5}], lr, weight_decay=weight_decay)


class Two(Trap):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[3])]


@pytest.mark.slow
def test_the_weight_decay_is_read_off_the_optimizer():
    refused(r"groups of SGD have different weight decays \(0.001, 0.5\).* Pass weight_decay=", optimizer=grouped)
    with pytest.raises(MisconfigurationException, match=r"2 optimizers, so its weight decay is not one number\. Pass"):
        fit(callback(), model=Two())
    for optimizer, decay, said in [
        (torch.optim.AdamW, 1e-3, "a training by AdamW with a decoupled weight decay ends elsewhere"),
        (torch.optim.Adam, 0.0, "a training by Adam without weight decay ends elsewhere"),
        (torch.optim.RMSprop, 1e-3, "a training by RMSprop ends elsewhere"),
    ]:
        audit = callback()
        with pytest.warns(UserWarning, match=said):
            fit(audit, model=Net(optimizer, weight_decay=decay))
        assert sum(said in remark for remark in audit.result.remarks) == 1
        assert said in str(audit.result)
    for optimizer, decay in [(torch.optim.SGD, 0.0), (torch.optim.SGD, 1e-3), (torch.optim.Adam, 1e-3)]:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*ends elsewhere.*")
            fit(callback(), model=Net(optimizer, weight_decay=decay))


def test_an_optimizer_that_ends_elsewhere_is_remarked_with_any_weight_decay():
    audit = callback(weight_decay=1e-3)
    with pytest.warns(UserWarning, match="AdamW with a decoupled weight decay"):
        fit(audit, model=Net(torch.optim.AdamW))
    assert any("AdamW with a decoupled weight decay" in remark for remark in audit.result.remarks)


class Head(Trap):
    """The optimizer has the last layer alone."""

    def configure_optimizers(self):
        return self.make(self.net[3].parameters())


def test_weights_in_no_optimizer_are_refused():
    message = r"no optimizer has the parameters net\.0\.weight, net\.0\.bias, .* Freeze them with requires_grad_"
    for settings in ({}, {"weight_decay": 1e-3}):
        with pytest.raises(MisconfigurationException, match=message):
            fit(callback(**settings), model=Head(weight_decay=1e-3))

    class Frozen(Net):
        def configure_optimizers(self):
            return self.make(self.net[3].parameters())

    model = Frozen(weight_decay=1e-3)
    model.net[0].requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)  # the outputs do not depend on it, so it does not count
    audit = callback()
    fit(audit, model=model)
    assert audit.result is not None


def test_what_is_remarked_is_a_warning_before_the_first_step_and_in_the_result():
    model = Net(weight_decay=1e-3)
    model.net[2] = nn.Dropout(0.3)
    members = TensorDataset(MEMBERS.tensors[0], torch.ones(6).long())
    others = TensorDataset(side(12, 2).tensors[0], torch.arange(12) % 2 * 2)
    audit = callback(others)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(audit, model=model, data=DataLoader(members, batch_size=6))
    for said in ("compute otherwise in training", "labels of members and non-members are in different proportions"):
        assert sum(said in str(each.message) for each in caught) == 1
        assert sum(said in remark for remark in audit.result.remarks) == 1


class Probabilities(Trap):
    def forward(self, x):
        return super().forward(x).softmax(-1)


def test_probabilities_and_too_many_candidates_are_errors_before_the_first_step():
    with pytest.raises(ValueError, match="probabilities"):
        fit(callback(), model=Probabilities(weight_decay=1e-3))
    refused(r"6000000000 candidates .* need more than 8 GiB: pass fewer candidates=", ValueError, candidates=1e9)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"candidates": 0}, ValueError, "candidates must be a number above 0"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"lr": 0}, ValueError, "lr must be a number above 0"),
        ({"sharpness": 0}, ValueError, "sharpness must be a number above 0"),
        ({"margin": 0}, ValueError, "margin must be a number above 0"),
        ({"ratio": 0}, ValueError, r"ratio must be a number in \(0, 1\)"),
        ({"restarts": 0}, ValueError, "restarts must be an integer of at least 1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a number of at least 0"),
        ({"confidence": 2}, ValueError, "confidence must be"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"prior": "normal"}, TypeError, "prior must be a ReconstructionPrior, not a str"),
        ({"name": ""}, TypeError, "name must be a non-empty string"),
        ({"nonmembers": 3}, TypeError, "nonmembers: expected a DataLoader"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        callback(**settings)
