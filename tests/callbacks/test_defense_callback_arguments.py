"""What DefenseCallback takes in Python and YAML, which modules it refuses, and what a recipe reads from it."""

from dataclasses import replace

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    PAST,
    DefenseCallback,
    RelaxLoss,
    RelaxLossMixin,
    ShadowRecipe,
    WeightPenalty,
)
from lightning_cwrf.defenses import HAMPMixin
from tests.callbacks.helpers import build, fitted
from tests.helpers import QUIET_TRAINER, Classifier, ManualClassifier, loader, part, trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (
            (RelaxLossMixin,),
            {},
            TypeError,
            "takes the name of a defense, such as 'relaxloss', or settings, such as .*not <class",
        ),
        ((RelaxLoss,), {}, TypeError, "or settings, such as .*not <class"),
        ((RelaxLoss(),), {"alpha": 1.0}, TypeError, r"got alpha beside a RelaxLoss: pass it to RelaxLoss\(...\)"),
        (("relaxlos",), {}, ValueError, "there is no defense 'relaxlos'; available: "),
        (("relaxloss",), {"alhpa": 1.0}, TypeError, "RelaxLoss has no setting alhpa"),
        (("relaxloss",), {"alpha": "1"}, TypeError, "RelaxLoss: alpha must be float"),
        (("relaxloss",), {"alpha": -1.0}, ValueError, "alpha must be a number of at least 0"),
    ],
)
def test_invalid_arguments_raise_at_once(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        DefenseCallback(*arguments, **settings)


def test_modules_that_cannot_take_the_defense_raise():
    with pytest.raises(MisconfigurationException, match="has a defense already"):
        fitted(RelaxLossMixin.attach(build()), [DefenseCallback("hamp")])
    model = build()
    with pytest.raises(MisconfigurationException, match=r"^Classifier has a defense already .*two DefenseCallbacks"):
        fitted(model, [DefenseCallback("relaxloss"), DefenseCallback("hamp")])
    assert type(model) is Classifier
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fitted(ManualClassifier(), [DefenseCallback("hamp")])
    attached = RelaxLossMixin.attach(build())
    with pytest.raises(MisconfigurationException, match="already"):
        fitted(attached, [DefenseCallback("hamp")])
    assert isinstance(attached, RelaxLossMixin)  # what the user attached is not taken off


class Saved(Classifier):
    def __init__(self, width=4):
        super().__init__(width)
        self.save_hyperparameters()


@pytest.mark.parametrize("defense", [RelaxLoss(alpha=0.7), PAST(nonmembers=part(300, 400), on=RelaxLoss(alpha=0.7))])
def test_a_recipe_reads_the_defense_off_the_callback(defense):
    model = Saved()
    run = fitted(model, [DefenseCallback(defense)])
    recipe = ShadowRecipe.like(run, model)
    assert recipe.defense is defense
    assert recipe.build().defense_settings == defense.plain()
    assert recipe.module().hparams == model.hparams


def test_a_recipe_without_the_defense_of_the_callback_differs():
    model = Saved()
    run = fitted(model, [DefenseCallback("relaxloss", alpha=0.7)])
    recipe = ShadowRecipe.like(run, model)
    assert recipe.differences(model) == []
    said = "it was trained with RelaxLossMixin (alpha=0.7, upper=1.0), and they with no defense"
    assert replace(recipe, defense=None).differences(model) == [said]
    trainer(callbacks=[DefenseCallback("hamp")]).validate(model, loader(0, 32), verbose=False)  # it was not trained so
    assert replace(recipe, defense=None).differences(model) == []


CONFIG = (
    """
seed_everything: 0
model: {class_path: tests.helpers.Classifier, init_args: {width: 4}}
data: {class_path: tests.helpers.DigitsData}
"""
    + QUIET_TRAINER
    + """  callbacks: CALLBACKS
"""
)


def cli(tmp_path, *callbacks):
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = list(callbacks)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    made = LightningCLI(args=["fit", "--config", str(tmp_path / "run.yaml")], save_config_callback=None)
    return made, next(each for each in made.trainer.callbacks if isinstance(each, DefenseCallback)).defense


def given(defense, **more):
    return {"class_path": "lightning_cwrf.DefenseCallback", "init_args": {"defense": defense}, **more}


def test_in_yaml_by_name_and_as_an_object(tmp_path):
    made, defense = cli(tmp_path, given("relaxloss", dict_kwargs={"alpha": 0.5}))
    assert defense == RelaxLoss(alpha=0.5)
    assert type(made.model) is Classifier
    reference = {"class_path": "tests.helpers.DigitsReference"}
    base = {"class_path": "lightning_cwrf.RelaxLoss", "init_args": {"alpha": 0.5}}
    _, defense = cli(
        tmp_path, given({"class_path": "lightning_cwrf.PAST", "init_args": {"nonmembers": reference, "on": base}})
    )
    assert defense.plain()["on"] == {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    assert len(defense.nonmembers)


@pytest.mark.parametrize("value", ["half", [1.0]])
def test_yaml_rejects_a_setting_of_the_wrong_type(tmp_path, value, capsys):
    wrong = {"class_path": "lightning_cwrf.WeightPenalty", "init_args": {"l1": value}}
    with pytest.raises(SystemExit):
        cli(tmp_path, given(wrong))
    assert "l1" in capsys.readouterr().err
    assert WeightPenalty().l1 == 0


def test_a_defense_that_the_user_attached_meanwhile_stays():
    model, callback = build(), DefenseCallback("relaxloss")
    run = trainer(max_epochs=1, callbacks=[callback])
    run.fit(model, loader(0, 32))
    HAMPMixin.attach(model)
    with pytest.raises(MisconfigurationException, match="has a defense already"):
        run.fit(model, loader(0, 32))
    assert isinstance(model, HAMPMixin)
