"""Attacks by name: the registry, lists of attacks, and the scores of a user's own attack."""

import pytest
import torch

from lightning_cwrf.attacks import Attack, available_attacks, create_attack, create_attacks, lira, register_attack
from lightning_cwrf.attacks.metric_based import correctness
from lightning_cwrf.metrics.functional import membership_auroc
from tests.attacks.cases import evidence

pytestmark = pytest.mark.usefixtures("temporary_attacks")


def test_a_registered_function_is_an_attack_with_settings():
    @register_attack("margin")
    def margin(evidence, power=1.0):
        first, second = evidence.logits.topk(2).values.unbind(-1)
        return (first - second) ** power

    seen, is_member = evidence()
    assert float(membership_auroc(create_attack("margin", power=2.0)(seen), is_member)) > 0.5
    assert register_attack("margin")(margin) is margin
    with pytest.raises(ValueError, match="there is already an attack 'margin'"):
        register_attack("margin")(lambda evidence: evidence.logits)


def test_unknown_names_settings_and_needs_list_the_known_ones():
    names = ", ".join(available_attacks())
    with pytest.raises(ValueError, match=f"no attack 'lyra'; available: {names}"):
        create_attack("lyra")
    with pytest.raises(TypeError, match="the lira attack has no setting onlin; it has online, variance"):
        create_attack("lira", onlin=False)
    with pytest.raises(TypeError, match="the entropy attack has no setting x; it has per_class"):
        create_attack("entropy", x=1)
    with pytest.raises(ValueError, match="unknown needs gpu; available: shadows, population"):
        register_attack("x", "gpu")
    with pytest.raises(TypeError, match=r"an attack's name must be a string, not .*; write @register_attack"):
        register_attack(lambda evidence: evidence.logits[:, 0])(lambda evidence: evidence.logits[:, 0])


@pytest.mark.parametrize(
    ("attacks", "error", "message"),
    [
        (lira, TypeError, r"attacks must be a list, such as \['loss', 'lira'\], not the function lira"),
        ([lira], TypeError, "names or results of create_attack, not the function lira; available names: attack_p, .*"),
        ([Attack], TypeError, "not the type Attack"),
        ([None], TypeError, "not a NoneType"),
        (3, TypeError, "attacks must be a list, .* not a int"),
        ([], ValueError, "there is none"),
        (["loss", create_attack("loss")], ValueError, "once each, and one at least; loss"),
        (["loss", ""], ValueError, "there is no attack ''"),
    ],
)
def test_an_invalid_list_of_attacks_raises(attacks, error, message):
    with pytest.raises(error, match=message):
        create_attacks(attacks)


def test_one_attack_instead_of_a_list_raises():
    with pytest.raises(TypeError, match=r"attacks must be a list, such as \[create_attack\('lira'\)\], not a Attack"):
        create_attacks(create_attack("lira"))
    assert [a.name for a in create_attacks(("loss", create_attack("lira")))] == ["loss", "lira"]
    assert [a.name for a in create_attacks({"loss": 1})] == ["loss"]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda e: e.targets.tolist(), TypeError, "the own attack returned a list; it must return one number per"),
        (lambda e: e.targets.numpy(), TypeError, "the own attack returned a ndarray"),
        (lambda e: None, TypeError, "the own attack returned a NoneType"),
        (lambda e: e.logits[:, 0] + 1j, TypeError, "the own attack returned torch.complex64"),
        (lambda e: e.logits, ValueError, r"returned scores of shape \(20, 4\); one per example is \(20,\)"),
        (lambda e: e.logits[:, 0] / 0 * 0, ValueError, r"the own attack returned NaN for 20 examples \(first \[0, 1, "),
    ],
)
def test_an_attack_that_returns_no_scores_raises(function, error, message):
    register_attack("own")(function)
    with pytest.raises(error, match=message):
        create_attack("own")(evidence(n=20, k=4, m=30)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16])
def test_scores_of_any_number_type_become_float64(dtype):
    register_attack("own")(lambda e: (e.logits.argmax(-1) == e.targets).to(dtype))
    seen, _ = evidence(n=20, k=4, m=30)
    scores = create_attack("own")(seen)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, correctness(seen.logits, seen.targets))


def test_settings_of_an_own_attack_are_checked_by_its_check():
    def check(power=1):
        if power < 1:
            raise ValueError("power must be at least 1.")

    register_attack("own", check=check)(lambda evidence, power=1: evidence.logits[:, 0] ** power)
    assert create_attack("own", power=2).settings == {"power": 2}
    with pytest.raises(ValueError, match="power must be at least 1"):
        create_attack("own", power=0)
