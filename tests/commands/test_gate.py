"""Thresholds on audits that must not pass whatever their values are."""

from dataclasses import replace

import pytest
import torch

from lightning_cwrf.auditing import audit_outputs
from lightning_cwrf.commands.gate import Gate, judged
from lightning_cwrf.outputs import ModelOutputs

LOW = Gate("loss/auroc", 0.9)
ACCURATE = Gate("test_accuracy", 0.3, below=True)


@pytest.fixture(scope="module")
def guessing():
    """An audit of a model of two classes that gives the same outputs for everything."""

    def outputs(seed):
        return ModelOutputs(torch.zeros(200, 2), torch.arange(200) % 2, [bytes([seed, i]) for i in range(200)])

    return audit_outputs(outputs(0), outputs(1), attacks=["loss"])


def test_a_model_that_only_guesses_does_not_pass(guessing):
    with pytest.raises(
        ValueError, match=r"cannot be judged: the model does no better.*--fail-below test_accuracy=VALUE"
    ):
        judged([LOW], guessing, "bound")
    with pytest.raises(ValueError, match="does no better"):
        judged([Gate("loss_gap", 10.0)], guessing, "value")
    assert judged([], guessing, "bound") == (0, [])


def test_it_passes_with_the_remark_where_an_accuracy_is_named(guessing):
    code, lines = judged([LOW, ACCURATE], guessing, "bound")
    assert code == 0
    assert lines[-1].startswith("      but the model does no better on its training data than guessing")
    code, _ = judged([LOW, replace(ACCURATE, limit=0.6)], guessing, "bound")
    assert code == 3


def test_a_threshold_that_is_exceeded_fails_as_such(guessing):
    assert judged([replace(LOW, limit=0.1)], guessing, "bound")[0] == 3
