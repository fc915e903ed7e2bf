"""Wrong settings and data: each is an error that states the problem, early."""

import inspect
import math

import numpy as np
import pytest
import torch

from lightning_cwrf.attacks import (
    attack_p,
    augmentation_attack,
    bavaria,
    calibrated,
    create_attack,
    lira,
    neural_attack,
    quantile_regression,
    rmia,
    tune_rmia,
)
from tests.attacks.cases import shadowed


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
    ("rmia", {"offline_a": -0.1}, ValueError, r'offline_a must be a number in \[0, 1\], not -0.1. "tuned" tunes it'),
    ("rmia", {"offline_a": 1.1}, ValueError, r"offline_a must be a number in \[0, 1\]"),
    ("rmia", {"offline_a": "0.3"}, TypeError, "offline_a must be a number"),
    ("rmia", {"offline_a": None}, TypeError, "offline_a must be a number, not None"),
    ("rmia", {"trim": 0.5}, ValueError, r"trim must be a number in \[0, 0.5\), not 0.5"),
    ("rmia", {"trim": -0.1}, ValueError, r"trim must be a number in"),
    ("rmia", {"trim": None}, TypeError, "trim must be a number, not None"),
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
def test_an_invalid_setting_raises_in_create_attack_and_in_the_function(name, settings, error, message):
    with pytest.raises(error, match=message):
        create_attack(name, **settings)
    with pytest.raises(error, match=message):
        call_of(name)(**settings)


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (lira, {"online": True, "variance": "auto"}),
        (bavaria, {"online": True, "predictive": "t", "prior_models": 2.0}),
        (rmia, {"online": True, "gamma": 2.0, "offline_a": "tuned", "trim": 0.0, "break_ties": True}),
        (tune_rmia, {"online": False, "offline_a": None, "trim": 0.0, "models": 4}),
        (calibrated, {"per_class": True}),
        (neural_attack, {"hidden": 64, "epochs": 30, "seed": 0, "outputs": 50_000}),
        (quantile_regression, {"hidden": 64, "epochs": 60, "seed": 0}),
    ],
)
def test_defaults(function, defaults):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == defaults


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lira", {"online": False, "variance": "reference_code"}),
        ("bavaria", {"prior_models": 1e-3, "predictive": "normal"}),
        ("rmia", {"gamma": 1, "offline_a": 0}),
        ("rmia", {"gamma": np.float64(1.5), "offline_a": 1}),
        ("rmia", {"offline_a": "tuned", "online": False, "trim": 0.49}),
        ("neural", {"hidden": 1, "epochs": 1, "seed": -(2**63), "outputs": 2}),
        ("neural", {"seed": 2**64 - 1, "epochs": 1}),
        ("quantile_regression", {"hidden": np.int64(3), "epochs": 1}),
    ],
)
def test_settings_at_their_bounds_are_valid(name, settings):
    made = create_attack(name, **settings)
    assert made.settings == settings
    if settings.get("outputs") != 2:
        assert call_of(name)(**settings).shape == (9,)


@pytest.mark.parametrize("name", ["rmia", "rmia_views"])
def test_the_temperature_is_a_setting_of_the_attack_over_logits(name):
    for valid in ("auto", "tuned", 1, 0.1, 1e6, np.float64(2)):
        assert create_attack(name, temperature=valid).settings == {"temperature": valid}
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r'temperature must be a number above 0, not .* "tuned" tunes it'):
            create_attack(name, temperature=wrong)
    for wrong in ("best", None, True):
        with pytest.raises(TypeError, match="temperature must be a number"):
            create_attack(name, temperature=wrong)


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
        (lambda: tune_rmia({1.0: S.sigmoid()}, M, models=0), ValueError, "models must be an integer of at"),
        (lambda: quantile_regression(T, S.T, torch.rand(20), torch.rand(19, 6)), ValueError, r"\(20, d\), not"),
        (lambda: quantile_regression(T, S.T[1:], torch.rand(20), torch.rand(20, 6)), ValueError, r"\(9, d\)"),
        (lambda: quantile_regression(T[None], S.T, torch.rand(20), torch.rand(20, 6)), ValueError, r"shapes \(n,\)"),
        (lambda: neural_attack(S, torch.zeros(6).long(), S[None], M), ValueError, r"must be bool of shape \(1, 6\)"),
    ],
)  # fmt: skip
def test_data_that_do_not_match_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bavaria(*shadowed(), predictive="cauchy"), "predictive must be"),
        (lambda: bavaria(*shadowed(), prior_models=0), "prior_models must be a number above 0, not 0"),
        (lambda: bavaria(*shadowed(k=2)), "train at least 4 shadow models"),
        (lambda: attack_p(torch.rand(3), torch.rand(0)), "m >= 1"),
        (lambda: quantile_regression(torch.rand(3), torch.rand(3, 2), torch.rand(5), torch.rand(5, 2)), "10 examples"),
        (lambda: quantile_regression(torch.rand(3), torch.rand(3, 2), torch.rand(20), torch.rand(20, 3)), "flat"),
        (lambda: neural_attack(torch.rand(3, 2), torch.zeros(3).long(), torch.rand(2, 4, 2), torch.ones(2, 4) > 0),
         r"must have shape \(k, n, K\)"),
        (lambda: neural_attack(torch.rand(3, 2), torch.zeros(3).long(), torch.rand(2, 3, 2), torch.ones(2, 3) > 0),
         "both kinds, IN and OUT"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
