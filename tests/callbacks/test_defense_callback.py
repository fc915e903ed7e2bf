"""DefenseCallback: a defense for the length of a fit, and the module's own class before and after."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    DPSGDMixin,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLoss,
    RelaxLossMixin,
    create_defense,
)
from lightning_cwrf.data.seen import seen_by
from lightning_cwrf.defenses import available_defenses
from tests.callbacks.helpers import build, finished, fitted, same_weights
from tests.defenses.dpsgd.cases import Conv
from tests.defenses.test_registry import minimal
from tests.helpers import Classifier, loader, trainer

pytestmark = pytest.mark.slow


class Class(Callback):
    """The module's class during training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.name = type(pl_module).__name__


class Stop(Callback):
    def __init__(self, error, step=2):
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("name", available_defenses())
def test_it_trains_as_an_attached_defense_does(name):
    defense = create_defense(name, **minimal(name))
    by_hand, model, kind = defense.attach(build()), build(), Class()
    fitted(by_hand)
    hparams, attributes = dict(model.hparams), set(vars(model))
    fitted(model, [DefenseCallback(name, **minimal(name)), kind])
    if name != "dpsgd":  # its noise is drawn from a seed that the whole process shares
        assert same_weights(model, by_hand.state_dict())
    assert kind.name == type(by_hand).__name__ != "Classifier"
    assert type(model) is Classifier
    assert dict(model.hparams) == hparams
    assert not [each for each in set(vars(model)) - attributes if "defense" in each]
    assert seen_by(model) == seen_by(by_hand)


def test_settings_go_to_the_logger_and_to_checkpoints(tmp_path):
    model = build()
    run = fitted(model, [DefenseCallback(RelaxLoss(alpha=0.5))], tmp_path, logger=CSVLogger(tmp_path))
    assert "alpha: 0.5" in (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    run.save_checkpoint(tmp_path / "after.ckpt")  # the module has its own class again
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["lightning_cwrf_defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    assert "defense" not in saved["hyper_parameters"]
    assert same_weights(Classifier.load_from_checkpoint(tmp_path / "after.ckpt"), model.state_dict())
    with pytest.warns(UserWarning, match=r"trained with the defense .*0\.5.* now it is .*0\.9"):
        fitted(build(), [DefenseCallback("relaxloss", alpha=0.9)], tmp_path, tmp_path / "after.ckpt", max_epochs=3)


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("stop"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
@pytest.mark.parametrize("name", ["relaxloss", "dpsgd"])
def test_an_exception_leaves_the_module_as_it_was(error, raised, name):
    model = build(Conv)
    with pytest.raises(raised):
        fitted(model, [DefenseCallback(name, **minimal(name)), Stop(error)])
    assert type(model) is Conv
    assert not model.net[0]._forward_hooks
    run = fitted(model, [DefenseCallback(name, **minimal(name))])
    assert type(model) is Conv
    assert run.global_step == 8


def test_an_error_in_setup_leaves_module_and_trainer_as_they_were():
    model, run = build(Conv), trainer(overfit_batches=1, callbacks=[DefenseCallback("dpsgd", noise_multiplier=1.0)])
    with pytest.raises(MisconfigurationException, match="overfit_batches=1"):
        run.fit(model, loader(0, 64))
    assert type(model) is Conv
    assert run.accumulate_grad_batches == 1


@pytest.mark.parametrize("name", ["relaxloss", "adversarial_regularization", "dpsgd"])
@pytest.mark.parametrize("where", ["in the fit", "after it"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, name, where):
    """The attack's network, and DP-SGD's ledger and noise, are in the checkpoint of a run with the callback."""
    ends = []
    for broken in (False, True):
        model, callback = build(Conv), DefenseCallback(name, **minimal(name))
        if broken and where == "in the fit":
            keep = ModelCheckpoint(tmp_path, "half", every_n_epochs=1, save_top_k=-1, enable_version_counter=False)
            with pytest.raises(RuntimeError):
                fitted(model, [callback, keep, Stop(RuntimeError(), 5)], tmp_path, enable_checkpointing=True)
        elif broken:
            run = fitted(model, [callback], tmp_path, max_epochs=1)
            run.save_checkpoint(tmp_path / "half.ckpt")
        if broken:
            model, callback = build(Conv), DefenseCallback(name, **minimal(name))
        run = fitted(model, [callback], tmp_path, tmp_path / "half.ckpt" if broken else None)
        run.save_checkpoint(tmp_path / f"{broken}.ckpt")
        saved = torch.load(tmp_path / f"{broken}.ckpt", weights_only=True)
        ends.append((model, saved.get("dpsgd", {}).get("accountant")))
    assert same_weights(ends[0][0], ends[1][0].state_dict())
    assert ends[0][1] == ends[1][1]
    if name == "dpsgd":
        assert DPSGDMixin.attach(ends[1][0], noise_multiplier=1.0).privacy_spent.steps == 8


def test_cwrf_and_an_audit_beside_it_in_any_order(tmp_path):
    order = []
    for before in (True, False):
        model, vanilla = finished()
        audit = MIAAuditCallback(loader(100, 160))
        defense, rewind = DefenseCallback("relaxloss", alpha=0.5), CriticalRewindCallback(0.2)
        ours = [PrivacyScoringCallback(loader(200, 260), vanilla, steps=3), rewind, GradientMaskCallback(), audit]
        run = fitted(model, [defense, *ours] if before else [*ours, defense], tmp_path)
        for name, mask in rewind.mask.masks.items():
            assert torch.equal(model.get_parameter(name)[mask], vanilla[name][mask])
        assert audit.result is not None
        assert type(model) is Classifier
        run.save_checkpoint(tmp_path / "run.ckpt")
        order.append(model)
    assert same_weights(order[0], order[1].state_dict())
    ours = [PrivacyScoringCallback(loader(200, 260), vanilla, steps=3), CriticalRewindCallback(0.2)]
    with pytest.raises(MisconfigurationException, match="or by DefenseCallback"):
        fitted(build(), [*ours, GradientMaskCallback()], tmp_path, tmp_path / "run.ckpt", max_epochs=3)


class Counted(RelaxLossMixin):
    calls = 0

    def defense_loss(self, logits, targets):
        Counted.calls += 1
        return super().defense_loss(logits, targets)


def test_a_compiled_module_trains_compiled_with_the_defense(recwarn):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model, Counted.calls = build(), 0
    fitted(torch.compile(model, backend=backend), [DefenseCallback(Counted.defense_class(alpha=0.5))], max_epochs=1)
    assert Counted.calls
    assert compiled
    assert type(model) is Classifier
    calls, Counted.calls = Counted.calls, 0
    fitted(model, max_epochs=1)  # as torch.compile left it, and without the defense
    assert Counted.calls == 0 < calls
    assert model._compiler_ctx is not None
    assert not [each for each in recwarn if "compile it again" in str(each.message)]


def test_only_a_fit_has_the_defense():
    model, kind = build(), Class()
    run = trainer(callbacks=[DefenseCallback("relaxloss")])
    run.validate(model, loader(0, 32), verbose=False)
    assert type(model) is Classifier
    run = fitted(model, [kind])
    assert kind.name == "Classifier"


def test_one_callback_for_several_modules():
    callback = DefenseCallback("relaxloss", alpha=0.5)
    for _ in range(2):
        model = build()
        fitted(model, [callback])
        assert type(model) is Classifier
    mine = Counted.defense_class(alpha=0.5)  # of a mixin that inherits its settings
    assert pickle.loads(pickle.dumps(mine)) == mine
    assert pickle.loads(pickle.dumps(mine)).mixin is Counted
    again = pickle.loads(pickle.dumps(callback))
    assert again.defense == copy.deepcopy(callback).defense == callback.defense
    assert fitted(build(), [again]).callback_metrics["train_loss"] >= 0


def test_two_processes_get_the_callback_and_the_module_stays_plain():
    model = build()
    before = copy.deepcopy(model)
    run = trainer(max_epochs=1, callbacks=[DefenseCallback("relaxloss")], strategy="ddp_fork", devices=2)
    run.fit(model, loader(0, 32))
    assert type(model) is Classifier
    assert not same_weights(model, before.state_dict())


def test_a_compiled_wrapper_is_fitted_twice():
    raw = build()
    compiled = torch.compile(raw, backend="eager")
    for callbacks in ([], [DefenseCallback("relaxloss")], [DefenseCallback("relaxloss", alpha=2.0)], []):
        trainer(max_epochs=1, callbacks=callbacks).fit(compiled, loader(0, 32))
        assert type(raw) is Classifier
