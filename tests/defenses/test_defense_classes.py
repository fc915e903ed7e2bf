"""A class made of a defense and a module trains with the defense, or raises or warns."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from lightning_cwrf.defenses import (
    PAST,
    DefenseMixin,
    DPSGDMixin,
    HAMPMixin,
    PASTMixin,
    RelaxLossMixin,
    relaxloss_loss,
)
from tests.defenses.dpsgd.cases import Conv
from tests.helpers import Classifier, loader, trainer


class Hardened(RelaxLossMixin, Classifier):
    pass


class OnTop(Classifier):
    """A step of its own that calls the next class's."""

    def training_step(self, batch, batch_idx):
        self.log("twice", 2.0)
        return super().training_step(batch, batch_idx)


class Extra(LightningModule):
    """No step of its own."""

    def on_train_start(self):
        self.started = True


class Own(LightningModule):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Timed:
    def training_step(self, batch, batch_idx):
        self.called = True
        return super().training_step(batch, batch_idx)


class Blind:
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_the_module_before_the_defense_raises_with_the_right_order():
    with pytest.raises(
        TypeError,
        match=r"Wrong would train without its defense: Python finds Classifier\.training_step before "
        r"RelaxLossMixin's\. Put the defense first: class Wrong\(RelaxLossMixin, Classifier\)",
    ):

        class Wrong(Classifier, RelaxLossMixin):
            pass

    with pytest.raises(TypeError, match=r"class Bare\(HAMPMixin, LightningModule\)"):

        class Bare(LightningModule, HAMPMixin):
            pass

    with pytest.raises(TypeError, match=r"class Calls\(RelaxLossMixin, OnTop\)"):

        class Calls(OnTop, RelaxLossMixin):  # its super() is LightningModule
            pass


@pytest.mark.parametrize("first", [Own, Blind])
def test_a_step_in_between_that_does_not_call_the_defense_raises(first):
    with pytest.raises(TypeError, match=rf"{first.__name__}\.training_step comes before RelaxLossMixin's and does not"):
        type("Between", (first, RelaxLossMixin, Classifier), {})


@pytest.mark.parametrize("bases", [(Extra, RelaxLossMixin, Classifier), (Timed, RelaxLossMixin, Classifier),
                                   (RelaxLossMixin, OnTop), (RelaxLossMixin, Blind, Classifier)])  # fmt: skip
def test_bases_that_reach_the_defense_train_with_it(bases):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = type("Reached", bases, {})(alpha=3.0)
    batch = next(iter(loader(0, 16)))
    model.eval()
    model.log = lambda *_, **__: None
    assert torch.equal(model.training_step(batch, 0), relaxloss_loss(model(batch[0]), batch[1], alpha=3.0, epoch=0))
    assert getattr(model, "called", True)


def test_two_defenses_raise():
    with pytest.raises(TypeError, match=r"Two has 2 defenses \(RelaxLossMixin and HAMPMixin\): they cannot all be"):

        class Two(RelaxLossMixin, HAMPMixin, Classifier):
            pass

    with pytest.raises(TypeError, match=r"Again has 2 defenses \(HAMPMixin and RelaxLossMixin\)"):

        class Again(HAMPMixin, Hardened):  # the module is hardened already
            pass

    with pytest.raises(TypeError, match=r"After has 2 defenses"):

        class After(Hardened, HAMPMixin):
            pass

    class Both(RelaxLossMixin, HAMPMixin):
        """A defense made of two, with a loss of its own."""

        def defense_loss(self, logits, targets):
            return F.cross_entropy(logits, targets)

    assert Both.attach(Classifier(), alpha=0.5).defense_settings == {"alpha": 0.5, "upper": 1.0}


def test_a_subclass_whose_step_loses_the_defense_is_warned_about():
    with pytest.warns(UserWarning, match=r"Lost\.training_step takes the place of RelaxLossMixin's, so Lost trains"):

        class Lost(Hardened):
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Below(Lost):  # told once
            pass

        class Kept(Hardened):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.log("doubled", 2 * loss.detach())
                return loss

        class ByHand(Hardened):
            def training_step(self, batch, batch_idx):
                def loss():
                    return self.defense_loss(self(batch[0]), batch[1])

                return loss()

        class Other(RelaxLossMixin):  # a defense with its own step
            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch[0]), batch[1])

        class Uses(Other, Classifier):
            pass

    run = trainer(max_steps=1)
    run.fit(Kept(alpha=1.0), loader(0, 16))
    assert {"doubled", "train_loss"} <= set(run.callback_metrics)


class MyPAST(PASTMixin):
    pass


class MyDPSGD(DPSGDMixin):
    pass


@dataclass(frozen=True, kw_only=True)
class More(PAST):
    """Adds a setting to those it inherits."""

    extra: int = 1


class MoreMixin(PASTMixin, settings=More):
    pass


def test_a_defense_that_inherits_its_settings_takes_them():
    class Mine(MyPAST, Classifier):
        pass

    class Private(MyDPSGD, Conv):
        pass

    class Longer(MoreMixin, Classifier):
        pass

    mine = Mine(nonmembers=loader(300, 320), lam=0.5, width=4)
    assert mine.defense_settings == {"lam": 0.5, "alpha": 2.5}
    assert mine.hparams["width"] == 4
    private = Private(noise_multiplier=1.0, accountant="rdp")
    longer = Longer(nonmembers=loader(300, 320), extra=3)
    assert longer.defense_settings == {"lam": 1e-3, "alpha": 2.5, "extra": 3}
    for model in (mine, private, longer):
        trainer(max_steps=1).fit(model, loader(0, 16))
    assert private.privacy_spent.steps == 1


@pytest.mark.filterwarnings("ignore:.*configure_defense is now:FutureWarning")
def test_configure_defense_of_a_subclass_and_after_the_users_init():
    class LongerMixin(PASTMixin):
        def configure_defense(self, *, nonmembers=None, lam: float = 1e-3, alpha: float = 2.5, extra: int = 1):
            super().configure_defense(nonmembers=nonmembers, lam=lam, alpha=alpha)
            self._set_defense(**self.defense_settings, extra=extra)

    class Longer(LongerMixin, Classifier):
        pass

    longer = Longer(nonmembers=loader(300, 320), extra=3)
    assert longer.defense_settings == {"lam": 1e-3, "alpha": 2.5, "extra": 3}
    trainer(max_steps=1).fit(longer, loader(0, 16))

    class OldMixin(DefenseMixin):
        def __init__(self, *args, strength, **kwargs):
            super().__init__(*args, **kwargs)
            self.configure_defense(power=strength)

        def configure_defense(self, *, power):
            self._set_defense(power=power)

        def defense_loss(self, logits, targets):
            return F.cross_entropy(logits, targets)

    class Old(OldMixin, Classifier):
        pass

    assert Old(strength=2).defense_settings == {"power": 2}


class Counted(RelaxLossMixin):
    calls = 0

    def defense_loss(self, logits, targets):
        Counted.calls += 1
        return super().defense_loss(logits, targets)


@pytest.mark.slow
@pytest.mark.parametrize("uncompiled", [False, True])
def test_a_module_whose_first_training_was_compiled_trains_with_the_defense(uncompiled):
    model, Counted.calls = Classifier(), 0
    trainer(max_epochs=1).fit(torch.compile(model, backend="eager"), loader(0, 16))
    if uncompiled:
        to_uncompiled(model)
        Counted.attach(model)
    else:
        with pytest.warns(UserWarning, match="was compiled .* with its old training step. It is no longer compiled"):
            Counted.attach(model)
    trainer(max_epochs=1).fit(model, loader(0, 16))
    assert Counted.calls == 1
    trainer(max_epochs=1).fit(torch.compile(model, backend="eager"), loader(0, 16))
    assert Counted.calls == 2
    DefenseMixin.detach(model)
    trainer(max_epochs=1).fit(model, loader(0, 16))
    assert Counted.calls == 2


def test_a_training_step_set_on_the_object_is_an_error():
    model = Classifier()
    model.training_step = lambda batch, batch_idx: model(batch[0]).sum()
    with pytest.raises(MisconfigurationException, match="has a training_step set on the object, which would train it"):
        RelaxLossMixin.attach(model)
    assert type(model) is Classifier
    del model.training_step
    RelaxLossMixin.attach(model)
