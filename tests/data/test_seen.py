"""What a model has seen besides its training data."""

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_cwrf import (
    CWRFConfig,
    PrivacyScoringCallback,
    ShadowRecipe,
)
from lightning_cwrf.auditing import audit
from lightning_cwrf.data.seen import load_seen_state, record_seen, seen_by, seen_state
from lightning_cwrf.defenses import create_defense
from tests.helpers import Classifier, loader, part, trained, trainer

MEMBERS, OTHERS, POPULATION = part(0, 60), part(100, 160), part(200, 300)


@pytest.mark.parametrize("name", ["mixup_mmd", "past", "adversarial_regularization"])
def test_non_members_that_a_defense_trained_on_are_reported(name, tmp_path):
    """The audit took them: .631 in place of .698."""
    reference = part(300, 400)
    model = create_defense(name, nonmembers=DataLoader(reference, batch_size=16)).attach(Classifier())
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, DataLoader(MEMBERS, batch_size=16))
    half = ConcatDataset([OTHERS, part(300, 320)])
    with pytest.raises(ValueError, match=r"20 of the 80 examples of nonmembers are non-members that .* trains against"):
        audit(model, members=MEMBERS, nonmembers=half)
    with pytest.raises(ValueError, match=r"20 of the 80 examples of population are non-members that .* trains against"):
        audit(model, members=MEMBERS, nonmembers=part(160, 200), population=half, attacks=["attack_p"])
    assert audit(model, members=MEMBERS, nonmembers=half, overlap="drop").overlap == {"nonmembers": list(range(60, 80))}
    # Inside another module, without the defense, and from a checkpoint, they are known too.
    with pytest.raises(ValueError, match="trains against"):
        audit(nn.Sequential(type(model).detach(model)), members=MEMBERS, nonmembers=half)
    fresh = create_defense(name, nonmembers=reference).attach(Classifier())
    fresh.on_load_checkpoint({"lightning_cwrf_seen": seen_state(model)})
    assert seen_by(fresh) == seen_by(model)


def test_the_record_is_in_the_checkpoint_and_the_users_class_loads_it(tmp_path):
    model = create_defense("past", nonmembers=part(300, 340)).attach(Classifier())
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, DataLoader(MEMBERS, batch_size=16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_cwrf_seen"]
    plain = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(plain) is Classifier
    other = Classifier()
    load_seen_state(other, seen_state(model))
    assert seen_by(other) == seen_by(model)
    assert len(seen_by(other)["non-members that PAST trains against"]) == 40
    record_seen(other, "x", [(b"a" * 16, None)])
    third = nn.Linear(1, 1)
    load_seen_state(third, seen_state(other))
    assert seen_by(third) == seen_by(other)


def test_a_stream_of_non_members_is_recorded_as_it_is_drawn():
    batches = [next(iter(loader(300, 320, batch_size=20)))]
    model = create_defense("past", nonmembers=Again(batches)).attach(Classifier())
    trainer(max_epochs=1).fit(model, DataLoader(MEMBERS, batch_size=16))
    with pytest.raises(ValueError, match="20 of the 20 examples of nonmembers are non-members that PAST"):
        audit(model, members=MEMBERS, nonmembers=part(300, 320))


class Again:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_reference_data_of_the_scoring_are_reported_at_any_place_of_the_audit():
    model, vanilla = trained()
    scoring = PrivacyScoringCallback(loader(300, 340), vanilla, steps=1)
    trainer(max_epochs=1, callbacks=[scoring]).fit(model, loader(0, 64))
    with pytest.raises(ValueError, match="40 of the 40 examples of nonmembers are reference data of the scoring"):
        audit(model, members=part(0, 64), nonmembers=part(300, 340))
    audit(model, members=part(0, 64), nonmembers=OTHERS)
    control = PrivacyScoringCallback(loader(300, 340), vanilla, steps=1, kind="learnability")
    other, _ = trained()
    trainer(max_epochs=1, callbacks=[control]).fit(other, loader(0, 64))
    assert seen_by(other) == {}


def test_recipes_distinguish_pool_and_population_from_what_their_models_see():
    base = {"build_module": Classifier, "trainer_kwargs": {"max_epochs": 1}, "batch_size": 16}
    for recipe, what in (
        (ShadowRecipe(**base, cwrf=CWRFConfig(part(200, 220))), "CWRF's nonmembers"),
        (ShadowRecipe(**base, defense=create_defense("past", nonmembers=part(200, 220))), "PASTMixin's nonmembers"),
    ):
        recipe.check(part(0, 100), base=True, stack=1, population=part(300, 320))
        with pytest.raises(ValueError, match=f"20 of the 20 examples of {what} are members"):
            recipe.check(part(190, 290), base=True, stack=1)
        with pytest.raises(ValueError, match=f"5 of the 20 examples of {what} are in the population"):
            recipe.check(part(0, 100), base=True, stack=1, population=part(215, 320))
