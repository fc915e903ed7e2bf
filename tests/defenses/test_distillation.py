"""Training on another model's outputs: the losses by loops, DMP's teacher, SELENA's ensemble."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import DMPMixin, SELENAMixin, SELENARecipe, ShadowRecipe, train_shadows
from lightning_cwrf.auditing import audit
from lightning_cwrf.defenses import (
    DMP,
    SELENA,
    DefenseMixin,
    create_defense,
    distillation_loss,
    most_certain,
    split_ai_labels,
)
from tests.defenses.cases import Small
from tests.helpers import Classifier, digits, loader, part, trained, trainer
from tests.oracles.formulas import softmax

RECIPE = ShadowRecipe(Small, {"max_epochs": 2}, batch_size=16)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return train_shadows(RECIPE, part(0, 64), 4, store=tmp_path_factory.mktemp("store"), workers=1, progress=False)


def soft_labels(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 3
    soft = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * 3).softmax(-1)
    return logits, soft


@given(st.integers(0, 9999), st.integers(1, 5), st.integers(2, 5))
def test_the_loss_against_loops(seed, n, classes):
    logits, soft = soft_labels(seed, n, classes)
    rows = [
        sum(q * (math.log(q) - math.log(p)) for p, q in zip(softmax(z), s, strict=True))
        for z, s in zip(logits.tolist(), soft.tolist(), strict=True)
    ]
    assert float(distillation_loss(logits, soft)) == pytest.approx(sum(rows) / n)
    assert float(distillation_loss(soft.log(), soft)) == pytest.approx(0, abs=1e-12)


def test_the_loss_of_certain_and_of_extreme_outputs():
    soft = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(distillation_loss(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), soft)) == 0
    assert float(distillation_loss(torch.tensor([[0.0, 1e4], [0.0, 1e4]]), soft)) == 5e3
    with pytest.raises(ValueError, match=r"soft labels must have the logits' shape \(2, 3\), not \(2, 2\)"):
        distillation_loss(torch.zeros(2, 3), soft)


@given(st.integers(0, 9999), st.integers(2, 6), st.integers(1, 5))
def test_the_ensembles_labels_against_loops(seed, models, n):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(models, n, 3, generator=generator)
    membership = torch.rand(models, n, generator=generator) < 0.5
    membership[0] &= membership[1:].logical_not().any(0)  # at least one model knows nothing of each example
    labels = split_ai_labels(logits, membership)
    for i in range(n):
        rows = [softmax(logits[j, i].tolist()) for j in range(models) if not membership[j, i]]
        assert labels[i].tolist() == pytest.approx([sum(p) / len(rows) for p in zip(*rows, strict=True)], abs=1e-6)


def test_an_example_that_every_model_knows_is_an_error():
    membership = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match=r"every model of the ensemble was trained on 1 of the examples \(first \[1\]"):
        split_ai_labels(torch.zeros(2, 2, 3), membership)
    with pytest.raises(ValueError, match=r"needs logits \(k, n, K\) and bool membership \(k, n\)"):
        split_ai_labels(torch.zeros(2, 3), membership)


def test_dmps_loss_is_the_divergence_from_the_teacher_and_the_teacher_stays():
    teacher, _ = trained()
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(0)
    student = DMPMixin.attach(Small(), teacher=teacher, temperature=2.0)
    start = copy.deepcopy(student.state_dict())
    run = trainer(max_steps=1)
    run.fit(student, loader(300, 316))
    x, _ = next(iter(loader(300, 316)))
    plain = Small()
    plain.load_state_dict(start)
    with torch.no_grad():
        soft = (copy.deepcopy(teacher).eval()(x) / 2).softmax(-1)
        expected = distillation_loss(plain(x), soft)
    torch.testing.assert_close(run.callback_metrics["train_loss"], expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in student.state_dict())
    assert student.defense_settings == {"temperature": 2.0}


def test_an_audit_of_dmp_refuses_the_reference_data_as_non_members():
    student = DMP(teacher=trained()[0]).attach(Small())
    trainer(max_epochs=1).fit(student, loader(300, 332))
    with pytest.raises(ValueError, match="reference data that DMP distils on"):
        audit(student, members=part(0, 64), nonmembers=part(320, 364), attacks=["loss"])


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_knows():
    teacher, _ = trained(epochs=20)
    x, y = digits()[:][0][:600], digits()[:][1][:600]
    no_labels = DataLoader(TensorDataset(x, torch.zeros_like(y)), batch_size=32, shuffle=True)
    torch.manual_seed(0)
    student = create_defense("dmp", teacher=teacher, temperature=2.0).attach(Classifier())
    trainer(max_epochs=5).fit(student, no_labels)
    with torch.no_grad():
        agree = (student.eval()(x).argmax(-1) == teacher.eval()(x).argmax(-1)).float().mean()
    assert agree > 0.7


def test_wrong_teachers():
    with pytest.raises(MisconfigurationException, match=r"DMP distils a finished model: pass teacher="):
        DMP()
    with pytest.raises(TypeError, match=r"teacher must be a finished model, an nn\.Module, not Subset"):
        DMP(teacher=part(0, 3))
    with pytest.raises(ValueError, match="temperature must be a number above 0, not 0"):
        DMP(teacher=Small(), temperature=0.0)
    model = Small()
    with pytest.raises(MisconfigurationException, match=r"the teacher is the student: pass teacher=copy\.deepcopy"):
        trainer().fit(DMP(teacher=model).attach(model), loader(0, 16))


def test_the_most_certain_reference_examples_are_chosen():
    teacher, _ = trained()
    chosen = most_certain(teacher, part(300, 340), 7)
    with torch.no_grad():
        p = [softmax(teacher.eval()(x[None])[0].tolist()) for x, _ in part(300, 340)]
    entropy = [-sum(q * math.log(q) for q in row) for row in p]
    assert chosen.indices == sorted(range(40), key=entropy.__getitem__)[:7]
    for count in (0, 41):
        with pytest.raises(ValueError, match="count must be an integer from 1 to 40"):
            most_certain(teacher, part(300, 340), count)


def test_selenas_loss_is_the_divergence_from_the_models_that_had_not_seen_an_example(ensemble):
    torch.manual_seed(0)
    model = SELENAMixin.attach(Small(), ensemble=ensemble)
    start = copy.deepcopy(model.state_dict())
    run = trainer(max_steps=1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:16].tolist()
    x = digits()[order][0]
    other_labels = TensorDataset(x, torch.zeros(16, dtype=torch.long))
    run.fit(model, DataLoader(other_labels, batch_size=16))
    plain = Small()
    plain.load_state_dict(start)
    soft = split_ai_labels(ensemble.logits, ensemble.membership)[order]
    torch.testing.assert_close(run.callback_metrics["train_loss"], distillation_loss(plain(x), soft).detach())
    DefenseMixin.detach(model)
    assert type(model) is Small


def test_examples_that_the_ensemble_lacks_are_an_error(ensemble):
    with pytest.raises(ValueError, match="SELENA: 16 of the 16 examples of this batch are not in the ensemble's pool"):
        trainer().fit(create_defense("selena", ensemble=ensemble).attach(Small()), loader(64, 80))

    class Two(Small):
        def forward(self, x):
            return self.net(x)[:, :2]

    with pytest.raises(ValueError, match="the ensemble has 10 classes, and this model 2"):
        data = TensorDataset(digits()[:4][0], torch.zeros(4, dtype=torch.long))
        trainer().fit(SELENA(ensemble=ensemble).attach(Two()), DataLoader(data))


def test_wrong_ensembles():
    with pytest.raises(MisconfigurationException, match="SELENA distils an ensemble: pass ensemble="):
        SELENA()
    with pytest.raises(TypeError, match="ensemble must be what train_shadows returns, not a list"):
        SELENA(ensemble=[])


def test_a_recipe_with_a_model_of_the_data_is_refused_with_the_fix(ensemble, tmp_path):
    for defense, what in (
        (SELENA(ensemble=ensemble), "SELENAMixin's ensemble"),
        (DMP(teacher=Small()), "DMPMixin's teacher"),
    ):
        recipe = ShadowRecipe(Small, {"max_epochs": 1}, batch_size=16, defense=defense)
        with pytest.raises(ValueError, match=rf"{what} was trained on the data to protect.*SELENARecipe\(recipe\)"):
            train_shadows(recipe, part(0, 32), 2, store=tmp_path, workers=1)


def test_the_recipe_trains_an_ensemble_and_distils_it(ensemble):
    made = SELENARecipe(RECIPE, models=4)(part(0, 64), 0)
    again = ShadowRecipe(Small, {"max_epochs": 2}, batch_size=16, defense=SELENA(ensemble=ensemble))(part(0, 64), 0)
    assert isinstance(made, SELENAMixin)
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:the model does no better on its training data")
def test_it_is_a_recipe_of_shadow_models(tmp_path):
    recipe = SELENARecipe(RECIPE, models=2)
    shadows = train_shadows(recipe, part(0, 32), 2, store=tmp_path, workers=1, progress=False)
    assert shadows.logits.shape == (2, 32, 10)
    members = torch.utils.data.Subset(part(0, 32), shadows.membership[0].nonzero().flatten().tolist())
    assert audit(recipe(members, 5), members=members, nonmembers=part(100, 116), attacks=["loss"]).estimates
    again = train_shadows(recipe, part(0, 32), 2, store=tmp_path, workers=1, progress=False)
    assert torch.equal(again.logits, shadows.logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": 3}, ValueError, "models must be even, because shadow models come in pairs, not 3"),
        ({"models": 0}, ValueError, "models must be an integer of at least 2, not 0"),
        ({"stack": 0}, ValueError, "stack must be an integer of at least 1"),
        ({"recipe": functools.partial(nn.Linear, 1)}, TypeError, "recipe must be a ShadowRecipe, not a partial"),
        (
            {"recipe": ShadowRecipe(Small, {"max_epochs": 1}, batch_size=16, defense=create_defense("relaxloss"))},
            ValueError,
            "the recipe must have no defense and no CWRF",
        ),
    ],
)
def test_wrong_recipes(change, error, message):
    with pytest.raises(error, match=message):
        SELENARecipe(**{"recipe": RECIPE, **change})


def test_an_audit_of_the_reference_data_as_members_remarks_on_it():
    student = DMPMixin.attach(Small(), teacher=trained()[0])
    trainer(max_epochs=1).fit(student, loader(100, 140))
    with pytest.warns(UserWarning, match="40 of the 40 members are reference data that DMP distils on"):
        audit(student, members=part(100, 140), nonmembers=part(200, 240), attacks=["loss"])
