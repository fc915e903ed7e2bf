"""A defense on top of another one's loss: what trains is the sum, and what does not compose is refused."""

import copy
import pickle
from argparse import ArgumentError

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from lightning_cwrf.classification import classification_step
from lightning_cwrf.defenses import (
    CCL,
    DPSGD,
    HAMP,
    PAST,
    AdversarialRegularization,
    ConfidencePenalty,
    Defense,
    DefenseMixin,
    DPSGDMixin,
    LabelSmoothing,
    LabelSmoothingMixin,
    PASTMixin,
    RelaxLoss,
    WeightPenalty,
    create_defense,
)
from tests.defenses.dpsgd.cases import by_hand, fresh, wide
from tests.defenses.test_defense_training import Plain, Record, compare, twin_of
from tests.helpers import Classifier, loader, part, trainer
from tests.oracles import formulas

pytestmark = pytest.mark.slow

OTHER = next(iter(loader(300, 320, batch_size=20)))


def train(defense):
    torch.manual_seed(0)
    model, record = defense.attach(Plain()), Record()
    trainer(max_epochs=2, precision="64-true", callbacks=[record]).fit(model, loader(0, 24, batch_size=12))
    assert len(record.steps) == 4
    return record.steps


def past_on(step, model, base):
    """PAST's own loss with the mean cross-entropy of the members exchanged for ``base``."""
    x, y = step["batch"]
    there = (OTHER[0].double(), OTHER[1])
    alone = formulas.past(model, (x, y), there, 0.05, 1.5)
    return alone - F.cross_entropy(model(x), y) + base(model(x), y, step["epoch"])


BASES = [
    (RelaxLoss(alpha=0.5), lambda z, y, e: formulas.relaxloss(z, y, 0.5, e, 1.0)),
    (RelaxLoss(alpha=5.0, upper=0.3), lambda z, y, e: formulas.relaxloss(z, y, 5.0, e, 0.3)),
    (HAMP(), lambda z, y, e: formulas.hamp(z, y, 0.95, 1.0)),
    (CCL(alpha=0.2), lambda z, y, e: formulas.ccl(z, y, 0.2, 1.0, "ccel")),
]


@pytest.mark.parametrize(("base", "oracle"), BASES, ids=[type(b).__name__ + str(i) for i, (b, _) in enumerate(BASES)])
def test_past_on_another_defense_has_the_sum_of_both_gradients(base, oracle):
    for step in train(PAST(nonmembers=[OTHER], lam=0.05, alpha=1.5, on=base)):
        model = twin_of(step)
        compare(step, model, past_on(step, model, oracle))


def test_a_weight_penalty_on_another_defense():
    for step in train(WeightPenalty(l1=0.2, l2=0.3, on=RelaxLoss(alpha=0.5))):
        model, (x, y) = twin_of(step), step["batch"]
        base = formulas.relaxloss(model(x), y, 0.5, step["epoch"], 1.0)
        compare(step, model, base + formulas.weight_penalty(model.parameters(), 0.2, 0.3))


def test_penalties_on_one_another():
    for step in train(PAST(nonmembers=[OTHER], lam=0.05, alpha=1.5, on=WeightPenalty(l2=0.3, on=CCL(alpha=0.2)))):
        model = twin_of(step)
        ccl, weights = formulas.ccl, list(model.parameters())
        base = lambda z, y, _: ccl(z, y, 0.2, 1.0, "ccel") + formulas.weight_penalty(weights, 0.0, 0.3)  # noqa: E731, B023
        compare(step, model, past_on(step, model, base))


@pytest.mark.parametrize(
    ("base", "oracle"),
    [
        (HAMP(gamma=0.6, alpha=0.5), lambda z, y: formulas.hamp(z, y, 0.6, 0.5)),
        (CCL(alpha=0.2, kind="ccql"), lambda z, y: formulas.ccl(z, y, 0.2, 1.0, "ccql")),
        (LabelSmoothing(smoothing=0.4), lambda z, y: formulas.label_smoothing(z, y, 0.4)),
        (ConfidencePenalty(beta=2.0), lambda z, y: formulas.confidence_penalty(z, y, 2.0)),
    ],
    ids=["hamp", "ccl", "label_smoothing", "confidence_penalty"],
)
@pytest.mark.parametrize("ghost", [False, True])
def test_dp_sgd_clips_the_gradients_of_another_defenses_loss(base, oracle, ghost):
    """Against a loop over single examples, without noise."""
    model = fresh(optimizer="sgd", lr=0.5).double()
    twin = copy.deepcopy(model)
    DPSGD(noise_multiplier=0, max_grad_norm=0.3, ghost=ghost, on=base).attach(model)
    trainer(precision="64-true", max_epochs=1).fit(model, wide())
    expected = by_hand(twin, model.defense_state.batches, 6, 0.3, loss=oracle)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_the_base_is_part_of_hparams_checkpoints_copies_and_classes():
    named = {"name": "RelaxLossMixin", "alpha": 0.5, "upper": 1.0}
    defense = create_defense("past", nonmembers=part(300, 400), on=create_defense("relaxloss", alpha=0.5))
    model = defense.attach(Classifier())
    assert model.defense_settings == {"lam": 1e-3, "alpha": 2.5, "on": named}
    assert model.hparams["defense"] == {"name": "PASTMixin", **model.defense_settings}
    assert pickle.loads(pickle.dumps(defense.on)) == copy.deepcopy(model).defense.on == RelaxLoss(alpha=0.5)

    class Hardened(PASTMixin, Classifier):
        pass

    by_class = Hardened(nonmembers=loader(300, 320), on=RelaxLoss(alpha=0.5))
    assert by_class.defense_settings == model.defense_settings
    run = trainer(max_steps=2)
    run.fit(by_class, loader(0, 32))
    assert create_defense("past", nonmembers=part(300, 400)).plain() == {"lam": 1e-3, "alpha": 2.5}  # as without on


class OnTop(PASTMixin, Classifier):
    pass


@pytest.mark.parametrize(("alpha", "fits"), [(0.5, True), ("half", False)])
def test_a_base_in_yaml_is_type_checked(alpha, fits):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Classifier, "model")
    base = {"class_path": "lightning_cwrf.RelaxLoss", "init_args": {"alpha": alpha}}
    arguments = {"nonmembers": {"class_path": "tests.helpers.DigitsReference"}, "lam": 0.1, "on": base, "width": 4}
    config = {"model": {"class_path": f"{__name__}.OnTop", "init_args": arguments}}
    if fits:
        made = parser.instantiate_classes(parser.parse_object(config)).model
        assert made.defense.on == RelaxLoss(alpha=0.5)
        assert made.defense.lam == 0.1
    else:
        with pytest.raises(ArgumentError, match="alpha"):
            parser.parse_object(config)


class Hooked(DefenseMixin):
    def defense_loss(self, logits, targets):
        return F.cross_entropy(logits, targets)

    def on_train_epoch_end(self):
        self.seen = True


class Stepped(DefenseMixin):
    def defense_step(self, batch):
        logits, targets = classification_step(self, batch)
        return F.cross_entropy(logits, targets), len(targets)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightPenalty(on="relaxloss"), TypeError, r"on must be a defense, such as RelaxLoss\(alpha=1\.0\)"),
        (lambda: PAST(nonmembers=[OTHER], on=RelaxLoss), TypeError, "on must be a defense"),
        (
            lambda: PAST(nonmembers=[OTHER], on=AdversarialRegularization(nonmembers=[OTHER])),
            ValueError,
            "PAST cannot build on AdversarialRegularization: on= takes a defense that is a loss of logits",
        ),
        (lambda: WeightPenalty(on=DPSGD(noise_multiplier=1.0)), ValueError, "cannot build on DPSGD"),
        (lambda: WeightPenalty(on=Hooked.defense_class()), ValueError, "cannot build on Hooked"),
        (lambda: WeightPenalty(on=Stepped.defense_class()), ValueError, "cannot build on Stepped"),
        (
            lambda: DPSGD(noise_multiplier=1.0, on=RelaxLoss()),
            ValueError,
            "DPSGD cannot build on RelaxLoss, which does not say that its loss is a mean over examples",
        ),
        (lambda: DPSGD(noise_multiplier=1.0, on=WeightPenalty()), ValueError, "cannot build on WeightPenalty"),
        (lambda: create_defense("relaxloss", on=HAMP()), TypeError, "RelaxLoss has no setting on"),
    ],
)
def test_what_does_not_compose_raises(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_base_that_the_user_wrote():
    class Doubled(DefenseMixin):
        def defense_loss(self, logits, targets):
            return 2 * F.cross_entropy(logits, targets) + 0 * self.current_epoch

    for step in train(WeightPenalty(l2=0.3, on=Doubled.defense_class())):
        model, (x, y) = twin_of(step), step["batch"]
        compare(step, model, 2 * F.cross_entropy(model(x), y) + formulas.weight_penalty(model.parameters(), 0.0, 0.3))
    assert isinstance(Doubled.defense_class(), Defense)
    assert DPSGDMixin.defense_class is DPSGD


class Counting(DefenseMixin):
    """Keeps something between steps, as an average or a schedule does."""

    steps = 0

    def defense_loss(self, logits, targets):
        self.steps += 1
        COUNTED.append(self.steps)
        return F.cross_entropy(logits, targets)


COUNTED = []


def test_a_defense_under_another_keeps_its_state_between_steps():
    COUNTED.clear()
    model = WeightPenalty(on=Counting.defense_class()).attach(Classifier())
    trainer(max_epochs=1).fit(model, loader(0, 64))
    assert COUNTED == [1, 2, 3, 4]
    WeightPenalty(on=Counting.defense_class()).attach(DefenseMixin.detach(model))
    trainer(max_epochs=1).fit(model, loader(0, 16))
    assert COUNTED[4:] == [1]


class Squared(LabelSmoothingMixin):
    def defense_loss(self, logits, targets):
        return F.cross_entropy(logits, targets) ** 2


def test_a_subclass_with_another_loss_is_no_mean_over_examples():
    with pytest.raises(ValueError, match="does not say that its loss is a mean over examples"):
        DPSGD(noise_multiplier=1.0, on=Squared.defense_class())


def test_settings_without_a_mixin_cannot_be_built_on():
    class Lonely(Defense):
        pass

    with pytest.raises(MisconfigurationException, match="no mixin trains with Lonely yet"):
        WeightPenalty(on=Lonely())
