"""Defenses and settings classes that users write."""

from argparse import ArgumentError
from dataclasses import dataclass

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from lightning_cwrf.defenses import Defense, DefenseMixin, DefenseState
from tests.helpers import Classifier, loader, trainer


def test_a_defense_of_the_user_needs_one_method():
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


def test_settings_of_a_users_defense_by_attach_and_by_inheritance():
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


def test_wrong_settings_classes_raise():
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
