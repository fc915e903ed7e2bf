"""A user's own attack in an audit: an exception stops this attack only, and is reported."""

import pytest
import torch

from lightning_cwrf.attacks import create_attack, lira, register_attack
from lightning_cwrf.auditing import AuditResult, attack_scores, audit, audit_outputs
from lightning_cwrf.outputs import ModelOutputs


def outputs(begin, n=30):
    generator = torch.Generator().manual_seed(begin)
    logits = torch.randn(n, 4, generator=generator)
    return ModelOutputs(logits, torch.arange(n) % 4, [bytes([begin, i]) for i in range(n)])


pytestmark = pytest.mark.usefixtures("temporary_attacks")


@pytest.fixture
def raising():
    """Registers an attack ``own`` that raises this error."""

    def make(error):
        @register_attack("own")
        def own(evidence):
            raise error

    return make


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("too few"), "too few"),
        (RuntimeError("shape"), "RuntimeError: shape"),
        (ZeroDivisionError(), "ZeroDivisionError: "),
        (AssertionError("no"), "AssertionError: no"),
    ],
)
def test_a_failing_attack_does_not_stop_the_others(raising, error, reason, tmp_path):
    raising(error)
    result = audit_outputs(outputs(0), outputs(1), attacks=["own", "loss"])
    assert list(result.estimates) == list(result.scores) == ["loss"]
    assert result.failures == {"own": reason}
    assert f"own failed: {reason}" in str(result)
    assert AuditResult.load(result.save(tmp_path / "a.json")).failures == result.failures
    scores, failures = attack_scores(outputs(0), outputs(1), attacks=["own", "loss"])
    assert (list(scores), failures) == (["loss"], {"own": reason})
    with pytest.raises(type(error)) as caught:
        audit_outputs(outputs(0), outputs(1), attacks=["own"])
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_ends_the_audit(raising, error):
    raising(error)
    with pytest.raises(type(error)):
        audit_outputs(outputs(0), outputs(1), attacks=["own", "loss"])


def test_a_list_instead_of_scores_does_not_stop_the_others():
    register_attack("own")(lambda evidence: evidence.logits.tolist())
    result = audit_outputs(outputs(0), outputs(1), attacks=["loss", "own"])
    assert result.failures == {
        "own": "TypeError: the own attack returned a list; it must return one number per example, a tensor."
    }


def test_integer_scores_are_measured():
    register_attack("own")(lambda evidence: (evidence.logits.argmax(-1) == evidence.targets).long())
    result = audit_outputs(outputs(0), outputs(1), attacks=["own", "correctness"])
    assert result.estimates["own"]["auroc"].value == result.estimates["correctness"]["auroc"].value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([lira], "names or results of create_attack, not the function lira"),
        (lira, r"attacks must be a list, such as \['loss', 'lira'\], not the function lira"),
        (create_attack("loss"), r"attacks must be a list, such as \[create_attack\('loss'\)\]"),
    ],
)
def test_a_function_or_one_attack_instead_of_a_list_raises(given, message):
    batches = [(torch.randn(8, 3), torch.arange(8) % 2)]
    with pytest.raises(TypeError, match=message):
        audit(torch.nn.Linear(3, 2), members=batches, nonmembers=batches, attacks=given)


def test_swapped_sides_are_reported():
    confident = ModelOutputs(torch.eye(4)[torch.arange(30) % 4] * 9, torch.arange(30) % 4, outputs(2).digests)
    result = audit_outputs(outputs(0), confident, attacks=["loss"])
    assert result.values()["loss/auroc"] < 0.1
    assert "loss attack: an AUC of 0.0" in str(result)
    assert "are members and non-members swapped" in str(result)
    assert "swapped" not in str(audit_outputs(confident, outputs(0), attacks=["loss"]))
