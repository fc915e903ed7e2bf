"""Private fine-tuning inside a Trainer: what it changes, counts and resumes."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import (
    ExponentialMechanismCallback,
    MIAAuditCallback,
)
from lightning_cwrf.callbacks import exponential
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.mechanism.spent import GaussianLedger, draws_of, ledger_of
from tests.callbacks.drawing import HEAD, PRIVATE, Counts, draws, finished, private, weights
from tests.defenses.dpsgd.cases import fresh
from tests.helpers import Classifier, DigitsData, digits, loader, snapshot, trained, trainer


def test_a_fit_draws_and_trains_nothing_else():
    model, callback, counts = finished(), draws(), Counts()
    before = snapshot(model)
    run = trainer(callbacks=[callback, counts])
    torch.manual_seed(0)
    run.fit(model, private())
    assert (counts.begun, run.global_step, dict(run.callback_metrics)) == (0, 0, {})
    after = snapshot(model)
    changed = {name for name in before["state"] if not torch.equal(before["state"][name], after["state"][name])}
    assert changed == set(HEAD)
    assert before["modes"] == after["modes"]
    spent = callback.privacy_spent
    assert (spent.epsilon, spent.delta, spent.steps) == (pytest.approx(2.0), 1e-3, 2)
    assert (spent.accountant, spent.mechanism, spent.covers) == (
        "exact Gaussian", "exponential mechanism", "the fine-tuning phase alone"
    )  # fmt: skip
    assert not run.callback_metrics


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_whatever_the_order_of_the_loader():
    found = []
    for seed, shuffle in ((0, True), (0, False), (1, False)):
        model = finished()
        run = trainer(callbacks=[draws(noise_seed=seed)])
        with pytest.warns(UserWarning, match="noise_seed makes the noise of the draws reproducible"):
            run.fit(model, private(shuffle))
        found.append(model.net[5].weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_it_learns_new_labels_at_a_large_epsilon():
    """Labels shifted by one: the head of zeros learns them from the private data alone."""
    images, labels = digits().tensors
    data = TensorDataset(images[:800], (labels[:800] + 1) % 10)
    model = trained(epochs=5)[0]
    for parameter in (model.net[5].weight, model.net[5].bias):
        parameter.data.zero_()
    callback = draws(loader(1200, 1500, batch_size=300), target_epsilon=20.0, draws=10, target_delta=1e-5)
    trainer(callbacks=[callback]).fit(model, DataLoader(data, batch_size=400))
    model.eval()
    reached = float((model(images[900:1200]).argmax(1) == (labels[900:1200] + 1) % 10).float().mean())
    assert reached > 0.75


def test_curvature_and_clipping_norm_do_not_see_the_private_data(monkeypatch):
    found = []
    real = exponential.public_curvature
    monkeypatch.setattr(exponential, "public_curvature", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    for begin in (0, 400):
        trainer(callbacks=[draws()]).fit(finished(), loader(begin, begin + 60, batch_size=60))
    assert torch.equal(found[0].cholesky, found[1].cholesky)
    assert found[0].clip == found[1].clip


@pytest.mark.slow
def test_a_resumed_run_draws_nothing_again(tmp_path):
    model = finished()
    run = trainer(tmp_path, callbacks=[draws()])
    run.fit(model, private())
    run.save_checkpoint(tmp_path / "end.ckpt")
    again, callback = finished(), draws()
    trainer(tmp_path, callbacks=[callback]).fit(again, private(), ckpt_path=tmp_path / "end.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (callback.privacy_spent.steps, callback.privacy_spent.epsilon) == (2, pytest.approx(2.0))
    # Another fit of it goes on from there: the budget is spent, and a larger one is not.
    with pytest.raises(ValueError, match="the 2 draws so far have spent ε = 2 at δ = "):
        trainer(callbacks=[draws()]).fit(again, private())
    more = draws(target_epsilon=3.0)
    trainer(callbacks=[more]).fit(again, private())
    assert (more.privacy_spent.steps, more.privacy_spent.epsilon) == (4, pytest.approx(3.0))


def test_a_resumed_run_with_other_settings_is_an_error(tmp_path):
    run = trainer(tmp_path, callbacks=[draws()])
    run.fit(finished(), private())
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match=r"did its work with target_epsilon=2.0, and now it has .*=4.0"):
        trainer(callbacks=[draws(target_epsilon=4.0)]).fit(finished(), private(), ckpt_path=tmp_path / "end.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False])
def test_fits_of_one_module_add_up(new):
    """With the same callback or another one: squares of μ."""
    model, callback = finished(), draws(target_epsilon=None, mu=0.3)
    for fits in (1, 2):
        callback = draws(target_epsilon=None, mu=0.3) if new else callback
        before = weights(model)
        trainer(callbacks=[callback]).fit(model, private())
        assert not torch.equal(before[HEAD[0]], model.net[5].weight)
        spent = callback.privacy_spent
        assert (spent.steps, spent.mu) == (2 * fits, pytest.approx(0.3 * math.sqrt(fits)))
    other = finished()
    trainer(callbacks=[callback]).fit(other, private())
    assert callback.privacy_spent.steps == 2  # of another module


class Tested(Classifier):
    def test_step(self, batch, batch_idx):
        pass


@pytest.mark.slow
def test_a_checkpoint_that_was_tested_before_does_not_keep_a_fit_from_drawing(tmp_path):
    torch.manual_seed(0)
    run = trainer(tmp_path, callbacks=[draws(target_epsilon=None, mu=0.3)])
    run.fit(Tested(), private())
    run.save_checkpoint(tmp_path / "end.ckpt")
    model, callback = Tested(), draws(target_epsilon=None, mu=0.3)
    second = trainer(tmp_path, callbacks=[callback])
    second.test(model, loader(300, 320), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    second.fit(model, private())
    assert callback.privacy_spent.steps == 4  # two of the weights that the test loaded


@pytest.mark.slow
def test_draws_that_fail_leave_the_weights_and_stay_counted(tmp_path, monkeypatch):
    """An exception in the middle: the checkpoint that it leaves says so, and a resumed run draws all of its own."""
    model = finished()
    trainer(callbacks=[draws(target_epsilon=None, mu=0.3)]).fit(model, private())
    before = weights(model)
    real, calls = exponential.exponential_mechanism, []

    def breaks(*given, **settings):
        calls.append(1)
        ledger_of(given[0]).add("of the broken run", 7.0, 1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(exponential, "exponential_mechanism", breaks)
    callback = draws(target_epsilon=None, mu=0.3)
    run = trainer(tmp_path, callbacks=[callback, OnExceptionCheckpoint(tmp_path, "broken")], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(model, private())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    monkeypatch.setattr(exponential, "exponential_mechanism", real)
    again, callback = finished(), draws(target_epsilon=None, mu=0.3)
    trainer(tmp_path, callbacks=[callback]).fit(again, private(), ckpt_path=tmp_path / "broken.ckpt")
    assert callback.privacy_spent.steps == draws_of(again) == 2 + 1 + 2
    assert callback.privacy_spent.mu == pytest.approx(math.sqrt(2 * 0.3**2 + 1 / 49))


def test_what_a_fit_spent_that_broke_off_is_said(monkeypatch):
    def breaks(model, *given, **settings):
        ledger_of(model).add("of the broken run", 7.0, 1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(exponential, "exponential_mechanism", breaks)
    callback = draws()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(callbacks=[callback]).fit(finished(), private())
    assert (callback.privacy_spent.steps, callback.privacy_spent.mu) == (1, pytest.approx(1 / 7))


class Other(ExponentialMechanismCallback):
    pass


def test_a_subclass_counts_the_draws_of_a_checkpoint(tmp_path):
    given = {"public": loader(200, 260, batch_size=60), "mu": 0.3, "draws": 2, "target_delta": 1e-3}
    run = trainer(tmp_path, callbacks=[Other(**given)])
    run.fit(finished(), private())
    run.save_checkpoint(tmp_path / "end.ckpt")
    callback, model = ExponentialMechanismCallback(**given), finished()
    trainer(tmp_path, callbacks=[callback]).fit(model, private(), ckpt_path=tmp_path / "end.ckpt")
    assert (callback.privacy_spent.steps, draws_of(model)) == (2, 2)  # it does not draw again
    with pytest.raises(MisconfigurationException, match="there are 2 Others in this Trainer"):
        trainer(callbacks=[Other(**given), ExponentialMechanismCallback(**given)]).fit(finished(), private())


def test_twice_the_noise_for_examples_that_are_replaced(monkeypatch):
    asked = []
    real = exponential.exponential_mechanism
    monkeypatch.setattr(exponential, "exponential_mechanism", lambda *a, **k: asked.append(k) or real(*a, **k))
    callback = draws(adjacency="replace_one", eta=0.1, damping=0.1, clip=0.5)
    model = finished()
    trainer(callbacks=[callback]).fit(model, private())
    assert (asked[0]["adjacency"], asked[0]["eta"]) == ("replace_one", 0.1)
    assert callback.privacy_spent.adjacency == "replace_one"
    assert callback.privacy_spent.epsilon == pytest.approx(2.0)
    assert ledger_of(model).mu("add_remove") == pytest.approx(callback.privacy_spent.mu / 2)


def test_draws_and_dpsgd_do_not_hide_one_another():
    model = fresh()
    trainer(callbacks=[draws(parameters="all", subspace=5)]).fit(model, private())
    with pytest.raises(MisconfigurationException, match="come from 2 draws of the exponential mechanism, and the ε of"):
        DPSGDMixin.attach(model, noise_multiplier=1.0)
    trained_by_steps = DPSGDMixin.attach(fresh(), noise_multiplier=1.0)
    trainer(max_epochs=1).fit(trained_by_steps, private())
    plain = DPSGDMixin.detach(trained_by_steps)
    with pytest.raises(ValueError, match="this model has taken 1 steps of DP-SGD, and the ε of draws would not count"):
        trainer(callbacks=[draws(parameters="all", subspace=5)]).fit(plain, private())


def test_a_training_step_after_the_draws_is_an_error():
    class GoesOn(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.should_stop = False

    with pytest.raises(MisconfigurationException, match="was about to take a training step after the private draws"):
        trainer(callbacks=[draws(), GoesOn()]).fit(finished(), private())


def test_a_finished_checkpoint_that_leaves_no_draw_is_an_error(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(finished(), private())
    run.save_checkpoint(tmp_path / "end.ckpt")
    callback = draws()
    model = finished()
    trainer(callbacks=[callback]).fit(model, private())
    with pytest.raises(MisconfigurationException, match="the fit ended before"):
        trainer(max_epochs=1, callbacks=[callback]).fit(model, private(), ckpt_path=tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match="the fit ended before ExponentialMechanismCallback could take"):
        trainer(max_epochs=1, callbacks=[draws()]).fit(finished(), private(), ckpt_path=tmp_path / "end.ckpt")


def test_a_dry_run_takes_the_whole_data_and_says_that_it_counts():
    callback = draws()
    with pytest.warns(UserWarning, match="under fast_dev_run the private draws are taken, and counted"):
        trainer(callbacks=[callback], fast_dev_run=True).fit(finished(), loader(*PRIVATE))
    assert callback.privacy_spent.steps == 2


def test_public_data_by_the_name_of_a_split():
    class WithPublic(DigitsData):
        def predict_dataloader(self):
            return loader(200, 300, batch_size=100)

    callback = draws("predict")
    trainer(callbacks=[callback]).fit(finished(), datamodule=WithPublic())
    assert callback.privacy_spent.steps == 2
    with pytest.raises(ValueError, match="the curvature must come from public data"):
        trainer(callbacks=[draws("train")]).fit(finished(), datamodule=WithPublic())


@pytest.mark.slow
def test_training_between_draws_warns_and_nothing_else_does():
    model = finished()
    trainer(callbacks=[draws(target_epsilon=1.0)]).fit(model, private())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weights are not those that")
        trainer(callbacks=[draws(target_epsilon=2.0)]).fit(model, private())
    trainer(max_epochs=1).fit(model, private())
    with pytest.warns(UserWarning, match="not those that the 4 earlier draws gave: something else has changed them"):
        trainer(callbacks=[draws(target_epsilon=3.0)]).fit(model, private())


@pytest.mark.slow
def test_weights_of_a_checkpoint_are_those_that_its_draws_gave(tmp_path):
    run = trainer(callbacks=[draws(target_epsilon=1.0)])
    run.fit(Tested(), private())
    run.save_checkpoint(tmp_path / "drawn.ckpt")
    other, tested = Tested(), draws(target_epsilon=2.0)
    trainer(callbacks=[tested]).test(other, loader(300, 340), ckpt_path=tmp_path / "drawn.ckpt", verbose=False)
    assert tested.privacy_spent.epsilon == pytest.approx(1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weights are not those that")
        trainer(callbacks=[tested]).fit(other, private())
    assert tested.privacy_spent.steps == 4


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_spent_budget_is_an_error_at_every_epsilon(epsilon, count):
    ledger = GaussianLedger()
    mu = ledger.left(epsilon, 1e-5, "add_remove")
    sigma = ledger.noise_for(mu, "add_remove", count)
    for _ in range(count):
        ledger.add("run", sigma)
    with pytest.raises(ValueError, match=f"the {count} draws so far have spent"):
        ledger.left(epsilon, 1e-5, "add_remove")


def test_an_audit_in_the_same_trainer_knows_that_every_example_was_used():
    audit = MIAAuditCallback(loader(300, 396), attacks=["loss"])
    trainer(callbacks=[draws(), audit]).fit(finished(), loader(*PRIVATE, batch_size=20))
    assert not [remark for remark in audit.result.remarks if "drawn" in remark]
