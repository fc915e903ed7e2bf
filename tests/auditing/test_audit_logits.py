"""Audits of outputs alone: the same numbers as from the model, wherever the examples are in the pool."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from lightning_cwrf import MIAAuditCallback, audit, audit_logits, audit_recipe, probabilities_to_logits, train_shadows
from lightning_cwrf.attacks import Evidence, create_attack
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from tests.auditing.conftest import MEMBERS, NONMEMBERS, POPULATION
from tests.helpers import part

ATTACKS = ["loss", "lira", "rmia", "attack_p", "bavaria"]


def outputs(model, data):
    found = collect_outputs(model, data)
    return found.logits, found.targets


def arrays(shadows):
    """The same shadow models as another engine would give them."""
    population = shadows.population_logits.double().numpy(), shadows.read_population()[0].tolist()
    given = shadows.logits.double().numpy(), shadows.membership.numpy(), shadows.targets.tolist()
    return ShadowOutputs.from_arrays(*given, population=population)


def same(first, second):
    assert first.values() == second.values()
    assert first.bounds() == second.bounds()
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)


@pytest.mark.slow
def test_an_audit_of_outputs_is_that_of_the_model(audited, shadows):
    model = audited[0]
    data = {"members": MEMBERS, "nonmembers": NONMEMBERS}
    given = {name: outputs(model, each) for name, each in data.items()}
    whole = audit(model, **data, shadows=shadows, attacks=ATTACKS, shadow_resamples=2)
    for models in (shadows, arrays(shadows)):
        more = {"population": outputs(model, POPULATION), "attacks": ATTACKS, "shadow_resamples": 2}
        found = audit_logits(**given, shadows=models, **more)
        same(found, whole)
        assert found.examples == ""
        assert found.failures == {}
    same(audit_logits(**given), audit(model, **data))


def test_places_say_where_in_the_pool_an_example_is(audited, shadows):
    model = audited[0]
    models, order = arrays(shadows), torch.randperm(200, generator=torch.Generator().manual_seed(0))
    given = {"members": outputs(model, MEMBERS), "nonmembers": outputs(model, NONMEMBERS)}
    whole = audit_logits(**given, shadows=models, attacks=["lira"])
    population = models.population_logits, models.read_population()[0]
    mixed = (models.logits[:, order], models.membership[:, order], models.targets[order])
    where = order.argsort()
    shuffled = ShadowOutputs.from_arrays(*mixed, population=population)
    same(audit_logits(**given, shadows=shuffled, attacks=["lira"], places=(where[:100], where[100:].tolist())), whole)
    # A part of the pool, of trained models too: the members from 10 on.
    fewer = {"members": tuple(each[10:] for each in given["members"]), "nonmembers": given["nonmembers"]}
    for those in (shadows, models):
        found = audit_logits(**fewer, shadows=those, attacks=["lira"], places=(range(10, 100), np.arange(100, 200)))
        assert torch.equal(found.scores["lira"], lira_of(fewer, models, range(10, 200)))


def lira_of(given, models, places):
    """LiRA's scores of the examples at these places, without any look-up."""
    z, y = (torch.cat([torch.as_tensor(side[i]) for side in given.values()]) for i in (0, 1))
    places = torch.tensor(places)
    evidence = Evidence(z, y, shadow_logits=models.logits[:, places], membership=models.membership[:, places])
    return create_attack("lira")(evidence)


def test_copies_in_the_pool_are_told_apart_by_their_place():
    """Two copies of one example with opposite membership: each is compared with the models of its own place."""
    membership = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    z = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0))
    z[:, 1] = z[:, 0]
    models = ShadowOutputs.from_arrays(z, membership, [0, 0, 1, 1])
    given = {"members": (z[0, :1], [0]), "nonmembers": (z[0, 2:3], [1])}
    scores = {}
    for place in (0, 1):
        found = audit_logits(**given, shadows=models, attacks=["lira"], places=([place], [2]))
        scores[place] = found.scores["lira"]
        assert torch.equal(scores[place], lira_of(given, models, [place, 2]))
    assert scores[0][0] != scores[1][0]


def test_a_recipe_is_audited_from_arrays(shadows):
    found, whole = (audit_recipe(each, attacks=["lira"], progress=False) for each in (arrays(shadows), shadows))
    assert found.values() == whole.values()


def test_one_logit_is_two_classes():
    generator = torch.Generator().manual_seed(0)
    z, shadow_z = torch.randn(40, generator=generator), torch.randn(4, 40, generator=generator)
    y, membership = torch.arange(40) % 2, balanced_membership(4, 40)

    def both(z):
        return torch.stack([torch.zeros_like(z), z], -1)

    one, two = (
        audit_logits(
            members=(read(z)[:20], y[:20]),
            nonmembers=(read(z)[20:], y[20:]),
            shadows=ShadowOutputs.from_arrays(read(shadow_z), membership, y),
            attacks=["loss", "lira"],
        )
        for read in (lambda z: z, both)
    )
    same(one, two)


def forest(x, y, seed):
    return RandomForestClassifier(20, random_state=seed).fit(x, y)


def forests(draw, count=8, n=80):
    """A target and shadow forests on halves of a pool, and their logits on the pool: who trains on what is random."""
    rng = np.random.default_rng(draw)
    x, y = rng.normal(size=(n, 5)), rng.permutation(np.arange(n) % 2)
    membership = balanced_membership(count, n, seed=draw)
    models = [forest(x[half], y[half], i) for i, half in enumerate(membership.numpy())]
    shadows = ShadowOutputs.from_arrays(
        np.stack([probabilities_to_logits(m.predict_proba(x), floor=1 / 40) for m in models]), membership, y
    )
    target = forest(x[: n // 2], y[: n // 2], 99)
    z = probabilities_to_logits(target.predict_proba(x), floor=1 / 40)
    return {"members": (z[: n // 2], y[: n // 2]), "nonmembers": (z[n // 2 :], y[n // 2 :]), "shadows": shadows}


def test_a_forest_is_found_to_memorise():
    result = audit_logits(**forests(0), attacks=["loss", "lira"])
    assert all(found["auroc"].interval.low > 0.8 for found in result.estimates.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model does")  # it guesses
def test_without_a_signal_the_auc_covers_one_half():
    """Outputs that know nothing of membership, of the target and of 8 shadow models, in 25 audits."""
    held = {"loss": 0, "lira": 0}
    for run in range(25):
        generator = torch.Generator().manual_seed(run)
        z, y = torch.randn(9, 120, 3, generator=generator), torch.randint(3, (120,), generator=generator)
        found = audit_logits(
            members=(z[0, :60], y[:60]),
            nonmembers=(z[0, 60:], y[60:]),
            shadows=ShadowOutputs.from_arrays(z[1:], balanced_membership(8, 120, seed=run), y),
            attacks=list(held),
        )
        for name, estimates in found.estimates.items():
            low, high = estimates["auroc"].interval
            held[name] += low <= 0.5 <= high
    assert min(held.values()) >= stats.binom.ppf(0.001, 25, 0.95)


Z, Y = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.5], [-1.0, 0.5]]), torch.tensor([0, 1, 0, 1])
SHADOW_Z = torch.stack([Z + i for i in range(4)])
SHADOWS = ShadowOutputs.from_arrays(SHADOW_Z, balanced_membership(4, 4), Y, population=(SHADOW_Z[:, :3], Y[:3]))
SIDES = {"members": (Z[:2], Y[:2]), "nonmembers": (Z[2:], Y[2:])}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"members": (Z[:1], Y[:1])}, ValueError, "pool has 4 examples, members and non-members together are 3"),
        ({"nonmembers": (Z[2:], 1 - Y[2:])}, ValueError, "another label in the shadow models' pool"),
        ({"nonmembers": (torch.randn(2, 3), Y[2:])}, ValueError, "2 classes on the members and 3 on the non-members"),
        ({"places": ([0, 1], [2])}, ValueError, "places of the nonmembers must be 2 indices"),
        ({"places": ([0, 1], [2, 4])}, ValueError, "between 0 and 3"),
        ({"places": ([0, 1], [1, 2])}, ValueError, "given twice"),
        ({"places": [0, 1, 2, 3]}, TypeError, "places must be a pair"),
        ({"places": ([0.0, 1.0], [2, 3])}, ValueError, "indices in the pool"),
        ({"places": ([0, 1], [2, 3]), "shadows": None}, ValueError, "pass shadows= too"),
        ({"population": (Z, Y)}, ValueError, "has 4 examples, that of the shadow models has 3"),
        ({"population": (Z[:3], 1 - Y[:3])}, ValueError, "or their labels differ"),
        ({"shadows": SHADOW_Z}, TypeError, "shadows must be what train_shadows returns"),
        ({"attacks": ["rmia"]}, ValueError, "needs a population"),
        ({"attacks": ["lira_views"]}, ValueError, "needs"),
        ({"attacks": ["lira"], "shadows": None}, ValueError, "needs shadow models"),
        ({"confidence": 1}, ValueError, "confidence"),
    ],
)
def test_what_does_not_fit_raises(changes, error, message):
    with pytest.raises(error, match=message):
        audit_logits(**{**SIDES, "shadows": SHADOWS, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"membership": balanced_membership(4, 4).int()}, TypeError, "membership must be bool"),
        ({"membership": balanced_membership(2, 4)}, ValueError, r"shape \(4, 4\)"),
        ({"membership": torch.ones(4, 4, dtype=torch.bool)}, ValueError, "trained on the whole pool"),
        ({"membership": torch.zeros(4, 4, dtype=torch.bool)}, ValueError, "all on none of it"),
        ({"logits": SHADOW_Z.softmax(-1)}, ValueError, "are probabilities"),
        ({"logits": SHADOW_Z.log()}, ValueError, "NaN or infinite"),
        ({"logits": Z}, ValueError, "multi|membership must have shape|logits of"),
        ({"targets": Y[:2]}, ValueError, "logits of 4 examples and 2 targets"),
        ({"population": SHADOW_Z}, TypeError, "population must be a pair"),
        ({"population": (SHADOW_Z[:2], Y)}, ValueError, "of 2 models with 2 classes, those of the pool of 4 with 2"),
        ({"population": (SHADOW_Z, Y[:1])}, ValueError, "logits of 4 examples and 1 targets"),
    ],
)
def test_shadow_outputs_that_do_not_fit_raise(changes, error, message):
    with pytest.raises(error, match=message):
        ShadowOutputs.from_arrays(
            **{"logits": SHADOW_Z, "membership": balanced_membership(4, 4), "targets": Y, **changes}
        )


def tune(members, seed, base):
    raise AssertionError("nothing is trained")


def test_shadow_models_without_inputs_are_for_outputs_alone(tmp_path):
    with pytest.raises(ValueError, match="do not say which inputs"):
        audit(nn.Linear(4, 2), members=part(0, 4), nonmembers=part(4, 8), shadows=SHADOWS)
    with pytest.raises(ValueError, match="do not say which inputs"):
        train_shadows(tune, part(0, 4), 4, base=SHADOWS, store=tmp_path)
    with pytest.raises(ValueError, match="do not say which inputs"):
        MIAAuditCallback(part(4, 8), shadows=SHADOWS)
    with pytest.raises(ValueError, match="have no weights"):
        SHADOWS.weights(0)
    assert "from arrays" in repr(SHADOWS)
    assert dataclasses.replace(SHADOWS, store=None).part(torch.tensor([0, 2])).targets.tolist() == [0, 0]
