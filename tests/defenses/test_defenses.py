import copy
import math
import pickle
from argparse import ArgumentError
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cwrf.data.seen import record_seen, seen_by
from lightning_cwrf.defenses import Defense, DefenseMixin, DefenseState, PASTMixin, RelaxLossMixin, relaxloss_loss
from tests.helpers import Classifier, ManualClassifier, loader, part, trainer
from tests.oracles import formulas


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    st.integers(0, 3),
    st.sampled_from([1.0, 0.3, 0.1]),
    st.sampled_from([0.1, 1.0, 8.0]),
)
def test_relaxloss_and_its_gradient_against_loops(seed, alpha, epoch, upper, scale):
    torch.manual_seed(seed)
    logits = (torch.randn(6, 4, dtype=torch.float64) * scale).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    targets = torch.randint(4, (6,))
    ours = relaxloss_loss(logits, targets, alpha=alpha, epoch=epoch, upper=upper)
    theirs = formulas.relaxloss(twin, targets, alpha, epoch, upper)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-6, atol=1e-9)


def test_relaxloss_far_above_its_level_is_cross_entropy():
    logits, targets = torch.randn(8, 5) * 10, torch.randint(5, (8,))
    odd = relaxloss_loss(logits, targets, alpha=0.0, epoch=1)
    assert torch.equal(odd, F.cross_entropy(logits, targets))


def test_relaxloss_exactly_at_its_level_ascends():
    """Only a loss above the level is descended; all logits are equal here, so it is ln 2 for each example."""
    logits, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    level = float(F.cross_entropy(logits, targets))
    # The first example is predicted rightly: -ln 2. The second one wrongly: its soft label's cross-entropy, ln 2, less
    # its loss, ln 2.
    odd = relaxloss_loss(logits, targets, alpha=level, epoch=1)
    assert float(odd) == pytest.approx(-math.log(2) / 2, abs=1e-6)
    assert float(relaxloss_loss(logits, targets, alpha=level - 1e-3, epoch=1)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(relaxloss_loss(logits, targets, alpha=level, epoch=2)) == 0


@pytest.mark.parametrize(("settings", "message"), [({"alpha": -1}, "alpha"), ({"alpha": 1, "upper": 0}, "upper"),
                                                   ({"alpha": 1, "upper": 1.1}, "upper")])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        relaxloss_loss(torch.zeros(2, 3), torch.tensor([0, 1]), epoch=0, **settings)
    with pytest.raises(ValueError, match=message):
        RelaxLossMixin.attach(Classifier(), **settings)


class Hardened(RelaxLossMixin, Classifier):
    pass


def test_class_and_attach_are_the_same_training():
    states = []
    for make in (lambda: Hardened(alpha=0.7), lambda: RelaxLossMixin.attach(Classifier(), alpha=0.7)):
        torch.manual_seed(0)
        model = make()
        run = trainer(max_epochs=3)
        run.fit(model, loader(0, 64), loader(100, 132))
        assert {"train_loss", "train_loss_epoch", "val_acc"} <= set(run.callback_metrics)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[1])


def test_the_loss_that_trains_is_relaxloss_at_the_epoch():
    model = RelaxLossMixin.attach(Classifier(), alpha=0.7)
    batch = next(iter(loader(0, 8)))
    model.eval()
    seen = []
    model.log = lambda name, value, **_: seen.append(value)
    assert torch.equal(model.training_step(batch, 0), relaxloss_loss(model(batch[0]), batch[1], alpha=0.7, epoch=0))
    assert len(seen) == 1


def test_attach_changes_the_class_and_nothing_else():
    model = Classifier(width=4)
    keys, hparams = list(model.state_dict()), dict(model.hparams)
    attached = RelaxLossMixin.attach(model, alpha=0.5)
    assert attached is model
    assert isinstance(model, Classifier)
    assert isinstance(model, RelaxLossMixin)
    assert list(model.state_dict()) == keys
    assert {k: v for k, v in model.hparams.items() if k != "defense"} == hparams
    assert model.hparams["defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    assert type(RelaxLossMixin.attach(Classifier())) is type(model)
    RelaxLossMixin.detach(model)
    assert type(model) is Classifier
    assert dict(model.hparams) == hparams


class Greedy(Classifier):
    """Takes any keyword, as many modules do: whatever stands in hyper_parameters is passed to it."""

    def __init__(self, **kwargs):
        unknown = set(kwargs) - {"width", "lr", "optimizer"}
        assert not unknown, unknown
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Silent(LightningModule):
    """Saves no hyper-parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("cls", [Classifier, Greedy, Silent])
def test_a_hardened_checkpoint_loads_into_the_original_class(tmp_path, cls):
    model = RelaxLossMixin.attach(cls(), alpha=0.5)
    run = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(again) is cls
    assert all(torch.equal(again.state_dict()[n], w) for n, w in model.state_dict().items())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["lightning_cwrf_defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    logged = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert "alpha: 0.5" in logged


def test_settings_that_changed_since_the_checkpoint_are_reported(tmp_path):
    model = Hardened(alpha=0.5)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert Hardened.load_from_checkpoint(tmp_path / "last.ckpt").defense_settings["alpha"] == 0.5
    with pytest.warns(UserWarning, match=r"trained with the defense .*0\.5.* now it is .*0\.9"):
        Hardened.load_from_checkpoint(tmp_path / "last.ckpt", alpha=0.9)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_attached_module_can_be_copied_and_pickled(copier):
    model = RelaxLossMixin.attach(Classifier(), alpha=0.5)
    twin = copier(model)
    assert type(twin) is type(model)
    assert twin.defense_settings == model.defense_settings
    assert all(torch.equal(twin.state_dict()[n], w) for n, w in model.state_dict().items())


def test_a_defense_of_ones_own_needs_one_method():
    class Smoothed(DefenseMixin):
        def defense_loss(self, logits, targets):
            return F.cross_entropy(logits, targets, label_smoothing=0.1)

    model = Smoothed.attach(Classifier())
    trainer(max_epochs=1).fit(model, loader(0, 32))
    with pytest.raises(NotImplementedError, match="defines no defense_loss"):
        DefenseMixin.attach(Classifier()).defense_loss(None, None)


@dataclass(frozen=True)
class Tempered(Defense):
    temperature: float = 2.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}.")


class TemperedMixin(DefenseMixin, settings=Tempered):
    def defense_loss(self, logits, targets):
        return F.cross_entropy(logits / self.defense.temperature, targets)


class Inherited(TemperedMixin, Classifier):
    pass


class Below(Inherited):
    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


def test_settings_of_ones_own_defense_by_attach_and_by_inheritance():
    models = (TemperedMixin.attach(Classifier(), temperature=3.0), Inherited(temperature=3.0, width=4),
              Below(extra=2, temperature=3.0), Tempered(3.0).attach(Classifier()))  # fmt: skip
    for model in models:
        assert model.defense == Tempered(3.0)
        assert model.defense_settings == {"temperature": 3.0}
        trainer(max_epochs=1).fit(model, loader(0, 32))
    assert Inherited().defense_settings == {"temperature": 2.0}
    with pytest.raises(ValueError, match="temperature must be positive"):
        Inherited(temperature=0)
    with pytest.raises(TypeError, match="Tempered: temperature must be float, not '3'"):
        Below(temperature="3")


@pytest.mark.parametrize("cls", [Inherited, Below])
@pytest.mark.parametrize(("value", "fits"), [(0.5, True), ("hot", False), ([1.0], False)])
def test_jsonargparse_reads_the_settings_of_a_class(cls, value, fits):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Classifier, "model")
    path = f"{cls.__module__}.{cls.__qualname__}"
    config = {"model": {"class_path": path, "init_args": {"temperature": value, "width": 4}}}
    if fits:
        made = parser.instantiate_classes(parser.parse_object(config)).model
        assert (type(made), made.defense.temperature, made.hparams["width"]) == (cls, 0.5, 4)
    else:
        with pytest.raises(ArgumentError, match="temperature"):
            parser.parse_object(config)


def test_a_mixin_that_inherits_has_a_settings_class_of_its_own():
    class Half(TemperedMixin):
        def defense_loss(self, logits, targets):
            return super().defense_loss(logits, targets) / 2

    made = Half.defense_class(temperature=3.0)
    assert made.mixin is Half
    assert Tempered.mixin is TemperedMixin
    assert type(Half.attach(Classifier(), temperature=3.0).defense) is type(made)
    assert issubclass(Half.defense_class, Tempered)


def test_wrong_settings_classes():
    with pytest.raises(TypeError, match=r"settings of Wrong must be a frozen dataclass that inherits Defense, not 3"):

        class Wrong(DefenseMixin, settings=3):
            pass

    class Mutable(Defense):
        pass

    for unfit in (Mutable, dataclass(Mutable), Tempered(3.0)):
        with pytest.raises(TypeError, match="must be a frozen dataclass that inherits Defense"):
            type("WrongMixin", (DefenseMixin,), {}, settings=unfit)

    with pytest.raises(TypeError, match="Module is a module: give settings= to a mixin, and inherit from it"):

        class Module(DefenseMixin, Classifier, settings=Tempered):
            pass

    @dataclass(frozen=True)
    class Alone(Defense):
        pass

    with pytest.raises(MisconfigurationException, match=r"no mixin trains with Alone yet: define class AloneMixin\("):
        Alone().attach(Classifier())


def test_a_defense_may_read_the_parameters_when_it_is_attached():
    """create_defense has no module, and must not need one."""

    class Start(DefenseState):
        def __init__(self, module, defense):
            super().__init__(module, defense)
            self.weights = [p.detach().clone() for p in module.parameters()]

    class NearMixin(DefenseMixin):
        state_class = Start

        def defense_loss(self, logits, targets):
            gaps = [(p - w).square().sum() for p, w in zip(self.parameters(), self.defense_state.weights, strict=True)]
            return F.cross_entropy(logits, targets) + torch.stack(gaps).sum()

    model = NearMixin.defense_class().attach(Classifier())
    assert len(model.defense_state.weights) == len(list(model.parameters()))
    trainer(max_steps=1).fit(model, loader(0, 32))


def test_nothing_of_the_users_own_is_overwritten(tmp_path):
    """A hyper-parameter and a checkpoint entry that are called defense too."""

    class Own(Classifier):
        def __init__(self, defense="none"):
            super().__init__()
            self.save_hyperparameters()

        def on_save_checkpoint(self, checkpoint):
            checkpoint["defense"] = {"name": "mine", "strength": 3}

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["defense"]

    model = RelaxLossMixin.attach(Own(defense="castle"), alpha=0.5)
    assert model.hparams["defense"] == "castle"
    assert model.hparams["lightning_cwrf_defense"]["alpha"] == 0.5
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["defense"] == {"name": "mine", "strength": 3}
    assert saved["lightning_cwrf_defense"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    again = RelaxLossMixin.attach(Own.load_from_checkpoint(tmp_path / "last.ckpt"), alpha=0.5)
    assert again.loaded == {"name": "mine", "strength": 3}
    assert DefenseMixin.detach(again).hparams["defense"] == "castle"


def test_a_checkpoint_of_the_previous_release_has_its_defense():
    model = RelaxLossMixin.attach(Classifier(), alpha=0.9)
    with pytest.warns(UserWarning, match=r"trained with the defense .*0\.5.* now it is .*0\.9"):
        model.on_load_checkpoint({"defense": {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}})


def test_an_attribute_that_the_defense_would_hide_raises():
    class Guarded(Classifier):
        defense = "a castle"

    with pytest.raises(MisconfigurationException, match=r"RelaxLossMixin would hide Guarded\.defense: rename"):
        RelaxLossMixin.attach(Guarded())


def test_a_failed_attach_leaves_nothing_behind():
    class Broken(DefenseState):
        def __init__(self, module, defense):
            super().__init__(module, defense)
            raise RuntimeError("no")

    class BrokenMixin(DefenseMixin):
        state_class = Broken

    model = Classifier()
    before = set(vars(model))
    with pytest.raises(RuntimeError, match="no"):
        BrokenMixin.attach(model)
    assert type(model) is Classifier
    assert set(vars(model)) - before <= {"_hparams"}
    RelaxLossMixin.attach(model)


def test_configure_defense_still_works_and_warns():
    with pytest.warns(FutureWarning, match=r"OldMixin\.configure_defense is now a frozen dataclass: class OldMixin\("):

        class OldMixin(DefenseMixin):
            def configure_defense(self, *, temperature: "float" = 2.0):
                if temperature <= 0:
                    raise ValueError(f"temperature must be positive, not {temperature}.")
                self.count = len(list(self.parameters()))  # which crashed create_defense
                self._set_defense(temperature=temperature)

            def defense_loss(self, logits, targets):
                return F.cross_entropy(logits / self.defense_settings["temperature"], targets)

    class Old(OldMixin, Classifier):
        pass

    made = OldMixin.defense_class(temperature=3.0)
    for model in (OldMixin.attach(Classifier(), temperature=3.0), Old(temperature=3.0), made.attach(Classifier())):
        assert model.defense_settings == {"temperature": 3.0}
        assert model.hparams["defense"] == {"name": "OldMixin", "temperature": 3.0}
        assert model.count
        trainer(max_steps=1).fit(model, loader(0, 32))
    with pytest.raises(ValueError, match="temperature must be positive"):
        OldMixin.attach(Classifier(), temperature=0)
    with pytest.raises(TypeError, match="Old: temperature must be float, not '3'"):
        OldMixin.attach(Classifier(), temperature="3")
    with pytest.raises(TypeError, match="Old has no setting heat"):
        OldMixin.attach(Classifier(), heat=1)


def test_a_defense_that_forgets_to_reduce_its_loss():
    class Forgetful(DefenseMixin):
        def defense_loss(self, logits, targets):
            return F.cross_entropy(logits, targets, reduction="none")

    model = Forgetful.attach(Classifier())
    assert model.defense_settings == {}
    with pytest.raises(TypeError, match=r"loss of ForgetfulClassifier must be a scalar tensor, not a tensor of shape"):
        trainer().fit(model, loader(0, 32))


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_raises_with_the_label_the_defense_and_the_step(label):
    data = [(x, torch.tensor(label if i == 9 else int(y))) for i, (x, y) in enumerate(part(0, 16))]
    message = (
        rf"label {label} is out of range: the model has 10 classes.*\(In RelaxLossClassifier, epoch 0, batch 1; its"
    )
    with pytest.raises(ValueError, match=message):
        trainer().fit(RelaxLossMixin.attach(Classifier()), DataLoader(data, batch_size=8))


class TakesAll(Classifier):
    """Saves every argument, its subclasses' too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Against(PASTMixin, TakesAll):
    pass


def test_reference_data_are_no_hyper_parameters(tmp_path):
    reference = loader(200, 260)
    model = Against(nonmembers=reference, lam=1e-4)
    assert model.hparams["lam"] == 1e-4
    run = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert "nonmembers" not in model.hparams
    assert "nonmembers" not in (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert Against.load_from_checkpoint(tmp_path / "last.ckpt", nonmembers=reference).defense_settings["lam"] == 1e-4


def test_bad_logits_raise_with_the_defense_and_the_step():
    class Diverged(Classifier):
        def forward(self, x):
            return super().forward(x) * float("nan")

    with pytest.raises(
        ValueError, match=r"are NaN or infinite .*\(In RelaxLossDiverged, epoch 0, batch 0; its settings"
    ):
        trainer().fit(RelaxLossMixin.attach(Diverged(), alpha=0.5), loader(0, 32))


def test_misuse_raises():
    with pytest.raises(TypeError, match="needs a LightningModule, not Linear"):
        RelaxLossMixin.attach(nn.Linear(2, 2))
    model = Classifier()
    with pytest.raises(TypeError, match="RelaxLoss has no setting alhpa; it has alpha, upper"):
        RelaxLossMixin.attach(model, alhpa=1.0)
    assert type(model) is Classifier
    with pytest.raises(MisconfigurationException, match="has a defense already"):
        RelaxLossMixin.attach(RelaxLossMixin.attach(Classifier()))
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        RelaxLossMixin.attach(ManualClassifier())
    with pytest.raises(MisconfigurationException, match="no defense was attached"):
        RelaxLossMixin.detach(Classifier())
    with pytest.raises(TypeError, match="both take alpha"):

        class Clash(RelaxLossMixin, LightningModule):
            def __init__(self, alpha):
                super().__init__()

        class Taken(LightningModule):
            def __init__(self, alpha):
                super().__init__()

        class Clash2(RelaxLossMixin, Taken):
            pass


def test_a_loss_that_turned_nan_names_defense_and_step():
    class Broken(DefenseMixin):
        def defense_loss(self, logits, targets):
            return logits.sum() * float("nan")

    with pytest.raises(ValueError, match="the loss of BrokenClassifier is nan at epoch 0, batch 0"):
        trainer().fit(Broken.attach(Classifier()), loader(0, 32))


def test_the_users_classification_step_is_used():
    class Own(Silent):
        def classification_step(self, batch):
            return 2 * self(batch["image"]), batch["digit"]

    data = DataLoader([{"image": x, "digit": y} for x, y in part(0, 32)], batch_size=8)
    model = RelaxLossMixin.attach(Own(), alpha=0.1)
    trainer(max_epochs=1).fit(model, data)


def test_what_a_defense_has_seen_is_in_its_checkpoint():
    model, again = (RelaxLossMixin.attach(Classifier()) for _ in range(2))
    seen = {(bytes(range(16)), 3), (bytes(range(16, 32)), None)}
    record_seen(model, "non-members", seen)
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    assert seen_by(again) == {"non-members": seen}
