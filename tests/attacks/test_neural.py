"""The neural-network attack: against its formulas, and its bounds."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_cwrf.attacks import (
    create_attack,
    neural_attack,
)
from lightning_cwrf.attacks.neural import draw_outputs
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import Largest, evidence
from tests.oracles import learned as oracles


@pytest.mark.parametrize(("n", "outputs"), [(40, 50_000), (300, 700), (300, 1200)])
def test_the_neural_attack_against_its_formulas(n, outputs):
    seen, _ = evidence(n=n, k=4, m=30)
    logits, shadow_logits = seen.logits * 4, seen.shadow_logits * 4
    shadow_logits[:, 0, 0] -= 100  # a log-probability below -50
    if 4 * n <= outputs:
        places = range(4 * n)
    else:
        places = torch.randint(4 * n, (outputs,), generator=torch.Generator().manual_seed(7)).tolist()
    drawn = [divmod(place, n) for place in places]
    settings = {"hidden": 5, "epochs": 3, "seed": 7}
    expected = oracles.neural(
        logits.tolist(), seen.targets.tolist(), shadow_logits.tolist(), seen.membership.tolist(), drawn, **settings
    )
    case = logits, seen.targets, shadow_logits, seen.membership
    torch.testing.assert_close(neural_attack(*case, **settings, outputs=outputs), expected, rtol=1e-3, atol=1e-4)


def test_outputs_are_drawn_only_if_there_are_more_than_asked_for():
    membership = balanced_membership(4, 10)
    models, examples = draw_outputs(membership, 40, 0)
    assert list(zip(models.tolist(), examples.tolist(), strict=True)) == [(j, i) for j in range(4) for i in range(10)]
    models, examples = draw_outputs(membership, 39, 0)
    assert len(models) == len(examples) == 39
    assert (models < 4).all()
    assert (examples < 10).all()
    assert not torch.equal(models, draw_outputs(membership, 39, 1)[0])


def test_only_drawn_outputs_are_copied():
    seen, _ = evidence(n=300, k=8, m=30, classes=50)
    with Largest(seen.shadow_logits) as largest:
        create_attack("neural", epochs=1, outputs=500)(seen)
    assert largest.elements <= 500 * 51


def test_features_are_clamped_to_the_range_of_the_shadow_models():
    """The shadow models give every class the same; the audited model is sure."""
    shadow_logits, membership = torch.zeros(4, 6, 3), balanced_membership(4, 6)
    targets = torch.arange(6) % 3
    sure = neural_attack(torch.eye(3)[targets] * 9, targets, shadow_logits, membership, epochs=2)
    assert torch.equal(sure, neural_attack(torch.zeros(6, 3), targets, shadow_logits, membership, epochs=2))


@pytest.mark.slow
def test_few_outputs_give_the_auc_of_all():
    """10,000 of the 64,000 outputs: the AUC is within noise of that of all of them."""
    seen, is_member = evidence(n=4000, k=16, m=30, classes=10)
    auc = {
        outputs: float(membership_auroc(create_attack("neural", outputs=outputs, epochs=8)(seen), is_member))
        for outputs in (10_000, 64_000)
    }
    assert auc[10_000] > auc[64_000] - 0.01 > 0.8, auc


def test_a_nan_in_any_shadow_logit_raises_even_if_not_drawn():
    seen, _ = evidence(n=20, k=4, m=30)
    seen.shadow_logits[2, 13, 1] = math.inf
    with pytest.raises(ValueError, match=r"shadow_logits has NaN or infinite values at examples \[13\]"):
        create_attack("neural", outputs=2)(seen)


@pytest.mark.parametrize("membership", ["all", "none"])
def test_the_neural_attack_needs_both_kinds(membership):
    seen, _ = evidence(n=20, k=4, m=30)
    inside = torch.full((4, 20), membership == "all")
    with pytest.raises(ValueError, match="both kinds, IN and OUT"):
        create_attack("neural")(replace(seen, membership=inside))
