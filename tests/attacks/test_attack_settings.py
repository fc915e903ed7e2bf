"""Wrong uses of attacks: each is an error that states the problem, when the attack is made or when it is given data."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_cwrf import attacks
from lightning_cwrf.attacks import (
    Attack,
    attack_p,
    augmentation_attack,
    available_attacks,
    bavaria,
    calibrated,
    create_attack,
    create_attacks,
    lira,
    neural_attack,
    quantile_regression,
    register_attack,
    rmia,
    tune_offline_a,
)
from lightning_cwrf.attacks.metric_based import confidence, correctness, modified_entropy
from tests.attacks.test_more_attacks import evidence, shadowed


def call_of(name):
    """The pure function behind a name, on data that fit."""
    target, shadows, membership = shadowed()
    p, q = target.sigmoid(), shadows.sigmoid()
    logits, labels = torch.randn(9, 3), torch.arange(9) % 3
    return {
        "lira": lambda **s: lira(target, shadows, membership, **s),
        "bavaria": lambda **s: bavaria(target, shadows, membership, **s),
        "rmia": lambda **s: rmia(p, q, membership, p[:4], q[:, :4], **s),
        "entropy": lambda **s: calibrated(target, labels, shadows, membership, **s),
        "neural": lambda **s: neural_attack(logits, labels, torch.randn(6, 9, 3), membership, **s),
        "quantile_regression": lambda **s: quantile_regression(target, logits, torch.rand(20), torch.rand(20, 3), **s),
    }[name]


WRONG = [
    ("lira", {"online": "False"}, TypeError, "online must be True or False, not the str 'False'"),
    ("lira", {"online": 1}, TypeError, "online must be True or False"),
    ("lira", {"variance": "fixed"}, ValueError, "variance must be 'auto' or 'pooled' or 'per_example' or 'reference_c"),
    ("lira", {"variance": None}, ValueError, "variance must be"),
    ("bavaria", {"online": None}, TypeError, "online must be True or False"),
    ("bavaria", {"predictive": "cauchy"}, ValueError, "predictive must be 't' or 'normal', not 'cauchy'"),
    ("bavaria", {"prior_models": 0}, ValueError, "prior_models must be a number above 0, not 0"),
    ("bavaria", {"prior_models": math.nan}, ValueError, "prior_models must be a number above 0, not nan"),
    ("bavaria", {"prior_models": math.inf}, ValueError, "prior_models must be a number above 0, not inf"),
    ("bavaria", {"prior_models": "2"}, TypeError, "prior_models must be a number, not the str '2'"),
    ("rmia", {"gamma": "2"}, TypeError, "gamma must be a number, not the str '2'"),
    ("rmia", {"gamma": 0.99}, ValueError, "gamma must be a number of at least 1, not 0.99"),
    ("rmia", {"gamma": math.nan}, ValueError, "gamma must be a number of at least 1, not nan"),
    ("rmia", {"gamma": True}, TypeError, "gamma must be a number, not the bool True"),
    ("rmia", {"offline_a": -0.1}, ValueError, r"offline_a must be a number in \[0, 1\], not -0.1. None tunes it"),
    ("rmia", {"offline_a": 1.1}, ValueError, r"offline_a must be a number in \[0, 1\]"),
    ("rmia", {"offline_a": "0.3"}, TypeError, "offline_a must be a number"),
    ("rmia", {"online": "no"}, TypeError, "online must be True or False"),
    ("rmia", {"break_ties": 0}, TypeError, "break_ties must be True or False"),
    ("entropy", {"per_class": "yes"}, TypeError, "per_class must be True or False"),
    ("neural", {"epochs": 0}, ValueError, "epochs must be an integer of at least 1, not 0. An untrained network"),
    ("neural", {"epochs": -3}, ValueError, "epochs must be an integer of at least 1"),
    ("neural", {"epochs": 2.0}, TypeError, "epochs must be an integer, not the float 2.0"),
    ("neural", {"hidden": 0}, ValueError, "hidden must be an integer of at least 1"),
    ("neural", {"hidden": -2}, ValueError, "hidden must be an integer of at least 1"),
    ("neural", {"hidden": True}, TypeError, "hidden must be an integer, not the bool True"),
    ("neural", {"seed": 0.5}, TypeError, "seed must be an integer"),
    ("neural", {"seed": 2**64}, ValueError, "seed must be an integer from"),
    ("neural", {"seed": -(2**63) - 1}, ValueError, "seed must be an integer from"),
    ("neural", {"outputs": 1}, ValueError, "outputs must be an integer of at least 2"),
    ("neural", {"outputs": None}, TypeError, "outputs must be an integer"),
    ("quantile_regression", {"epochs": 0}, ValueError, "epochs must be an integer of at least 1"),
    ("quantile_regression", {"hidden": "64"}, TypeError, "hidden must be an integer"),
    ("quantile_regression", {"seed": None}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize(("name", "settings", "error", "message"), WRONG)
def test_a_wrong_setting_is_an_error_when_the_attack_is_made_and_in_its_function(name, settings, error, message):
    with pytest.raises(error, match=message):
        create_attack(name, **settings)
    with pytest.raises(error, match=message):
        call_of(name)(**settings)


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (lira, {"online": True, "variance": "auto"}),
        (bavaria, {"online": True, "predictive": "t", "prior_models": 2.0}),
        (rmia, {"online": True, "gamma": 2.0, "offline_a": 0.3, "break_ties": True}),
        (tune_offline_a, {"gamma": 2.0, "models": 4}),
        (calibrated, {"per_class": True}),
        (neural_attack, {"hidden": 64, "epochs": 30, "seed": 0, "outputs": 50_000}),
        (quantile_regression, {"hidden": 64, "epochs": 60, "seed": 0}),
    ],
)
def test_the_defaults_are_those_of_the_docs(function, defaults):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == defaults


def test_every_setting_of_every_attack_is_checked():
    for name in available_attacks():
        for setting in attacks.registry._ATTACKS[name].settings:
            with pytest.raises((TypeError, ValueError), match=setting):
                create_attack(name, **{setting: [1]})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lira", {"online": False, "variance": "reference_code"}),
        ("bavaria", {"prior_models": 1e-3, "predictive": "normal"}),
        ("rmia", {"gamma": 1, "offline_a": 0}),
        ("rmia", {"gamma": np.float64(1.5), "offline_a": 1}),
        ("rmia", {"offline_a": None, "online": False}),
        ("neural", {"hidden": 1, "epochs": 1, "seed": -(2**63), "outputs": 2}),
        ("neural", {"seed": 2**64 - 1, "epochs": 1}),
        ("quantile_regression", {"hidden": np.int64(3), "epochs": 1}),
    ],
)
def test_settings_at_their_bounds_are_taken(name, settings):
    made = create_attack(name, **settings)
    assert made.settings == settings
    if settings.get("outputs") != 2:
        assert call_of(name)(**settings).shape == (9,)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lira, TypeError, r"attacks must be a list, such as \['loss', 'lira'\], not the function lira"),
        ([lira], TypeError, "names or what create_attack gives, not the function lira; known names are attack_p, .*"),
        ([Attack], TypeError, "not the type Attack"),
        ([None], TypeError, "not a NoneType"),
        (3, TypeError, "attacks must be a list, .* not a int"),
        ([], ValueError, "there is none"),
        (["loss", create_attack("loss")], ValueError, "once each, and one at least; loss"),
        (["loss", ""], ValueError, "there is no attack ''"),
    ],
)
def test_what_is_no_list_of_attacks(given, error, message):
    with pytest.raises(error, match=message):
        create_attacks(given)


def test_one_attack_in_the_place_of_a_list():
    with pytest.raises(TypeError, match=r"attacks must be a list, such as \[create_attack\('lira'\)\], not a Attack"):
        create_attacks(create_attack("lira"))
    assert [a.name for a in create_attacks(("loss", create_attack("lira")))] == ["loss", "lira"]
    assert [a.name for a in create_attacks({"loss": 1})] == ["loss"]


@pytest.fixture
def own():
    """A name for an attack of one's own, free again afterwards."""
    yield "own"
    attacks.registry._ATTACKS.pop("own", None)


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        (lambda e: e.targets.tolist(), TypeError, "the own attack gave a list; it must give a tensor of one number"),
        (lambda e: e.targets.numpy(), TypeError, "the own attack gave a ndarray"),
        (lambda e: None, TypeError, "the own attack gave a NoneType"),
        (lambda e: e.logits[:, 0] + 1j, TypeError, "the own attack gave torch.complex64"),
        (lambda e: e.logits, ValueError, r"gave scores of shape \(20, 4\); one per example is \(20,\)"),
        (lambda e: e.logits[:, 0] / 0 * 0, ValueError, r"the own attack gave NaN for 20 examples \(first \[0, 1, 2"),
    ],
)
def test_an_attack_of_ones_own_that_gives_no_scores(own, gives, error, message):
    register_attack(own)(gives)
    with pytest.raises(error, match=message):
        create_attack(own)(evidence(n=20, k=4, m=30)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16])
def test_scores_of_any_number_type_become_float64(own, dtype):
    register_attack(own)(lambda e: (e.logits.argmax(-1) == e.targets).to(dtype))
    seen, _ = evidence(n=20, k=4, m=30)
    scores = create_attack(own)(seen)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, correctness(seen.logits, seen.targets))


def test_a_check_of_ones_own_settings_and_a_name_that_is_none(own):
    def check(power=1):
        if power < 1:
            raise ValueError("power must be at least 1.")

    register_attack(own, check=check)(lambda evidence, power=1: evidence.logits[:, 0] ** power)
    assert create_attack(own, power=2).settings == {"power": 2}
    with pytest.raises(ValueError, match="power must be at least 1"):
        create_attack(own, power=0)
    with pytest.raises(TypeError, match=r"an attack's name must be text, not .*; write @register_attack"):
        register_attack(lambda evidence: evidence.logits[:, 0])


@pytest.mark.parametrize("name", available_attacks())
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: torch.where(torch.arange(20) == 7, -1, y), ValueError,
         r"classes from 0 to 3; examples \[7\] \(1 in all\) have others \(the first is -1\)"),
        (lambda y: torch.where(torch.arange(20) == 7, 4, y), ValueError, r"examples \[7\] .*\(the first is 4\)"),
        (lambda y: y[:-1], ValueError, r"targets must have shape \(20,\), one per example .*, not \(19,\)"),
        (lambda y: y[:, None], ValueError, r"targets must have shape \(20,\)"),
        (lambda y: y.float(), TypeError, "targets must be a tensor of class indices .*, not torch.float32"),
        (lambda y: y > 0, TypeError, r"targets must be a tensor of class indices \(integers\), not torch.bool"),
        (lambda y: y.tolist(), TypeError, "class indices .*, not a list"),
        (lambda y: y.numpy(), TypeError, "class indices .*, not a ndarray"),
    ],
)  # fmt: skip
def test_targets_that_are_no_classes(name, change, error, message):
    seen, _ = evidence(n=20, k=4, m=30)
    if name in ("entropy",):
        seen = replace(seen, shadow_logits=None)
    with pytest.raises(error, match=message):
        create_attack(name)(replace(seen, targets=change(seen.targets)))


@pytest.mark.parametrize("function", [correctness, confidence, modified_entropy, attacks.logit_signal])
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"shape \(..., n, K\) with K >= 2 classes, not \(3,\)"),
        (torch.zeros(3, 1), ValueError, r"with K >= 2 classes, not \(3, 1\)"),
        (torch.zeros(3, 2).long(), TypeError, "logits must be a tensor of floats, not torch.int64"),
        (np.zeros((3, 2)), TypeError, "logits must be a tensor of floats, not a ndarray"),
    ],
)
def test_logits_that_are_none(function, logits, error, message):
    with pytest.raises(error, match=message):
        function(logits, torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\)"):
        correctness(torch.zeros(2, 2), torch.zeros(3).long())


T, S, M = shadowed()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lira(T.numpy(), S, M), TypeError, "target must be a tensor of numbers, not a ndarray"),
        (lambda: lira(T, [1.0], M), TypeError, "shadows must be a tensor of numbers, not a list"),
        (lambda: lira(T, S, M.numpy()), ValueError, "membership must be bool of shape .*, not a ndarray"),
        (lambda: lira(T > 0, S, M), TypeError, "target must be a tensor of numbers, not torch.bool"),
        (lambda: lira(T[None, None], S, M), ValueError, r"target must have shape \(n,\)"),
        (lambda: lira(T[None], S[None], M.long()), ValueError, "membership must be bool"),
        (lambda: lira(T[None], S[None], M[:2], variance="reference_code"), ValueError, "membership must be bool"),
        (lambda: lira(T, S, ~(M & False), variance="reference_code"), ValueError, "fewer than 1 OUT shadow models"),
        (lambda: lira(T, S, M & False, variance="reference_code"), ValueError, "fewer than 1 IN shadow models"),
        (lambda: attack_p(torch.rand(2, 3), torch.rand(4)), ValueError, r"losses must have shape \(n,\), not \(2, 3\)"),
        (lambda: attack_p(torch.rand(2), torch.rand(4, 1)), ValueError, "population_losses must have shape"),
        (lambda: calibrated(T, torch.zeros(3).long(), S, M), ValueError, r"targets must have shape \(9,\), not \(3,\)"),
        (lambda: augmentation_attack(T[None] > 0, S[None].long(), M), ValueError, "shadow_correct must be bool"),
        (lambda: augmentation_attack(T[None] > 0, S[None] > 0, M.long()), ValueError, "membership must be bool"),
        (lambda: augmentation_attack(T[None] > 0, S[None] > 0), ValueError, "shadow_correct must have shape"),
        (lambda: augmentation_attack(T > 0), ValueError, "correct must be bool of shape"),
        (lambda: augmentation_attack(T[None][:0] > 0), ValueError, "correct must be bool of shape"),
        (lambda: tune_offline_a(S.sigmoid(), M, S.sigmoid(), models=0), ValueError, "models must be an integer of at"),
        (lambda: quantile_regression(T, S.T, torch.rand(20), torch.rand(19, 6)), ValueError, r"\(20, d\), not"),
        (lambda: quantile_regression(T, S.T[1:], torch.rand(20), torch.rand(20, 6)), ValueError, r"\(9, d\)"),
        (lambda: quantile_regression(T[None], S.T, torch.rand(20), torch.rand(20, 6)), ValueError, r"shapes \(n,\)"),
        (lambda: neural_attack(S, torch.zeros(6).long(), S[None], M), ValueError, r"must be bool of shape \(1, 6\)"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_nan_in_any_shadow_logit_is_found_though_few_are_drawn():
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


def test_evidence_with_half_of_a_pair_of_fields():
    seen, _ = evidence(n=20, k=4, m=30)
    for name, field in (("lira", "membership"), ("attack_p", "population_targets")):
        with pytest.raises(ValueError, match=f"the {name} attack needs"):
            create_attack(name)(replace(seen, **{field: None}))
    with pytest.raises(ValueError, match="the quantile_regression attack needs a population's inputs"):
        create_attack("quantile_regression")(replace(seen, population_inputs=None))
