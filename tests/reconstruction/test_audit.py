"""The audit: what enters the attack, what is counted, what is refused, and what it says."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import AuditResult, ReconstructionPrior, ReconstructionResult, audit_reconstruction
from lightning_cwrf.data import all_ids
from lightning_cwrf.data.seen import record_seen
from lightning_cwrf.metrics.functional import auroc_p_value, clopper_pearson, one_run_epsilon
from lightning_cwrf.reconstruction import claims, hits_p_value, reconstruct, reconstruction_scores
from tests.helpers import same_snapshot, snapshot


def network(seed=0, inputs=4, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes, bias=False))


def side(count, seed, inputs=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, inputs, generator=generator), torch.arange(count) % classes)


def audited(model=None, **given):
    given = {"members": side(6, 1), "nonmembers": side(8, 2), "steps": 5, **given}
    return audit_reconstruction(network() if model is None else model, **given)


def test_the_numbers_are_those_of_the_measures():
    model, prior = network(), ReconstructionPrior(scale=1.0)
    result = audited(model, prior=prior, ratio=0.9, candidates=3.0, seed=2, confidence=0.9)
    found = reconstruct(model, (4,), 3, candidates=18, steps=5, prior=prior, seed=2)
    assert torch.equal(result.reconstruction.inputs, found.inputs)
    pool = torch.cat([side(6, 1).tensors[0], side(8, 2).tensors[0]]).double()
    assert torch.equal(result.pool, pool)
    assert torch.equal(result.scores, reconstruction_scores(found.inputs, pool))
    assert result.is_member.tolist() == [True] * 6 + [False] * 8
    claimed = claims(found.inputs, pool, 0.9)
    assert torch.equal(result.claimed, claimed)
    a, b = int((claimed < 6).sum()), int((claimed >= 6).sum())
    assert b > 0
    assert result.hits == (a, b)
    assert result.examples == (6, 8)
    assert result.hits_p_value == hits_p_value(a, b, 6, 8)
    assert result.estimates["hit_rate"].value == a / 6
    assert result.estimates["chance_hit_rate"].interval == clopper_pearson(b, 8, 0.9)
    assert result.estimates["auroc"].p_value == auroc_p_value(result.scores, result.is_member)
    assert result.values()["auroc"] == result.estimates["auroc"].value
    assert result.values()["nonmember_hits"] == b
    assert all(isinstance(value, float) for value in result.values().values())
    assert result.prior is prior
    assert result.degree == 2
    assert float(one_run_epsilon(result.scores, result.is_member)) >= 0


def test_members_and_nonmembers_are_treated_alike():
    one = audited(members=side(8, 1), nonmembers=side(8, 2), ratio=0.9)
    other = audited(members=side(8, 2), nonmembers=side(8, 1), ratio=0.9)
    assert one.hits == other.hits[::-1]
    assert one.estimates["auroc"].value == pytest.approx(1 - other.estimates["auroc"].value)


def test_nothing_of_the_members_enters_the_attack_but_their_number():
    one, other = (
        audited(members=side(6, 1)),
        audited(members=TensorDataset(side(6, 9).tensors[0] * 50 + 7, torch.zeros(6).long())),
    )
    assert torch.equal(one.reconstruction.inputs, other.reconstruction.inputs)
    assert torch.equal(one.reconstruction.multipliers, other.reconstruction.multipliers)
    assert one.reconstruction.residual == other.reconstruction.residual
    assert len(audited(members=side(7, 1), candidates=40.0).reconstruction.targets) > len(one.reconstruction.targets)


@pytest.mark.parametrize("center", [0.0, torch.linspace(-1, 1, 4), np.linspace(-1, 1, 4), [0.0, 0.5, -1, 1e-9]])
def test_a_result_is_saved_and_loaded_as_it_was(tmp_path, center):
    prior = ReconstructionPrior(center=center, scale=1.0, box=(-2.0, 2.0))
    result = audited(prior=prior, members=side(6, 1), nonmembers=side(8, 2))
    result = replace(result, relative_distances=(float("inf"), 1.0))  # a pool of one example has none
    loaded = ReconstructionResult.load(result.save(tmp_path / "result.json"))
    for name in ("scores", "is_member", "claimed", "pool"):
        assert torch.equal(getattr(loaded, name), getattr(result, name)), name
        assert getattr(loaded, name).dtype == getattr(result, name).dtype
    for name in ("inputs", "targets", "multipliers"):
        assert torch.equal(getattr(loaded.reconstruction, name), getattr(result.reconstruction, name)), name
    assert loaded.values() == result.values()
    assert loaded.estimates == result.estimates
    assert (loaded.degree, loaded.hits, loaded.confidence) == (result.degree, result.hits, result.confidence)
    assert torch.as_tensor(loaded.prior.center).tolist() == torch.as_tensor(center, dtype=torch.float64).tolist()
    assert loaded.prior.box == (-2.0, 2.0)
    assert str(loaded) == str(result)


def test_a_changed_file_is_no_result(tmp_path):
    path = audited().save(tmp_path / "result.json")
    path.write_text(path.read_text().replace('"degree": 2', '"degree": 3'))
    with pytest.raises(ValueError, match="was changed after it was saved"):
        ReconstructionResult.load(path)
    with pytest.raises(ValueError, match=r"is not a saved audit"):
        AuditResult.load(path)


def test_the_model_and_the_random_state_are_untouched():
    model = nn.Sequential(nn.BatchNorm1d(4), *network(), nn.Dropout())
    before, state = snapshot(model), torch.get_rng_state()
    members, nonmembers = (DataLoader(side(8, seed), batch_size=3, shuffle=True) for seed in (1, 2))
    first = audited(model, members=members, nonmembers=nonmembers, weight_decay=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    same_snapshot(before, snapshot(model))
    again = audited(model, members=[tuple(side(8, 1).tensors)], nonmembers=side(8, 2), weight_decay=1e-3)
    assert torch.equal(first.scores, again.scores)


def test_gate_patterns_margins_and_residual_are_of_the_members():
    model, (x, y) = network(), side(6, 1).tensors
    result = audited(model)
    gates = {tuple(row.tolist()) for row in (model[0](x) > 0).T}
    assert result.gate_patterns == len(gates)
    logits = model(x).double()
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = (logits.gather(1, y[:, None])[:, 0] - others).detach()
    assert result.margins == pytest.approx((float(margins.min()), float(margins.median())), abs=1e-5)
    assert 0 < result.truth_residual <= 1
    assert any("does not give every member its label" in remark for remark in result.remarks)


def test_findings_name_the_prior_and_never_say_safe():
    result = audited(prior=ReconstructionPrior(scale=2.0, box=(-1, 1)))
    texts = {}
    for hits, auroc in [(1e-6, 1e-6), (0.5, 1e-6), (0.5, 0.5), (0.04, 0.5)]:
        changed = copy.copy(result)
        estimate = copy.copy(result.estimates["auroc"])
        vars(estimate)["p_value"] = auroc
        vars(changed).update(hits_p_value=hits, estimates={**result.estimates, "auroc": estimate})
        texts[hits, auroc] = str(changed)
    limit = "(prior: N(0, 2²) in each coordinate, kept in [-1, 1]); a failed attack shows nothing about another prior, "
    limit += "or a longer search."
    assert texts[1e-6, 1e-6].startswith(f"members are reconstructed {limit}")
    assert texts[0.5, 1e-6].startswith(f"members are told apart, not reconstructed {limit}")
    assert texts[0.5, 0.5].startswith(f"nothing found with this prior {limit}")
    assert texts[0.04, 0.5].startswith("nothing found")  # of two tests, 0.04 is no finding at 95 %
    assert not any(re.search(r"\b(safe|secure|private|protected)", text) for text in texts.values())


def test_copies_are_counted_once():
    x, y = side(6, 1).tensors
    members = TensorDataset(torch.cat([x, x[:2]]), torch.cat([y, y[:2]]))
    with pytest.warns(UserWarning, match="2 of the 8 members are copies of others, and are left out"):
        result = audited(members=members)
    assert result.examples == (6, 8)
    assert torch.equal(result.scores, audited().scores)
    assert "2 of the 8 members are copies" in str(result)


def test_many_members_are_a_warning():
    members, nonmembers = side(3, 1, classes=340), side(3, 2, classes=340)
    with pytest.warns(UserWarning, match="3 members and 340 classes: this attack was never seen to succeed"):
        audited(network(classes=340), members=members, nonmembers=nonmembers, steps=1, candidates=0.1)


def changed(data, **parts):
    x, y = data.tensors
    return TensorDataset(parts.get("x", x), parts.get("y", y))


TWO_INPUTS = [{"a": torch.ones(6, 4), "b": torch.ones(6, 4), "y": torch.arange(6)}]


def mixed():
    """Two members and six others."""
    members, others = side(6, 1).tensors[0], side(8, 2).tensors[0]
    return changed(side(8, 2), x=torch.cat([members[:2], others[2:]]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"nonmembers": side(5, 2)}, ValueError, "6 different members and 5 different non-members: .* as many"),
        ({"nonmembers": mixed()}, ValueError, r"2 of the 8 .* are members \(the same inputs\), at positions 0, 1"),
        ({"nonmembers": changed(side(8, 1), y=(torch.arange(8) + 1) % 3)}, ValueError, "of nonmembers are members"),
        ({"members": side(1, 1)}, ValueError, "1 different members .* at least two"),
        ({"members": TWO_INPUTS}, TypeError, "other arguments"),
        ({"prior": ReconstructionPrior(torch.zeros(3))}, ValueError, r"has the shape \(3,\) and the inputs \(4,\)"),
        ({"prior": 1.0}, TypeError, "prior must be a ReconstructionPrior, not a float"),
        ({"candidates": 1e9}, ValueError, r"6000000000 candidates .* fewer candidates=, at most \d+ in all"),
        ({"candidates": 0.0}, ValueError, "candidates must be a number above 0, not 0.0. It is"),
        ({"ratio": 1.0}, ValueError, r"ratio must be a number in \(0, 1\), not 1.0"),
        ({"confidence": 1.0}, ValueError, "confidence must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be a number of at least 0, not -1.0"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        audited(**given)


def test_inputs_that_are_no_floats():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x.float())

    sides = [changed(side(8, seed), x=torch.randint(256, (8, 4), dtype=torch.uint8)) for seed in (1, 2)]
    with pytest.raises(TypeError, match=r"one float tensor, .* not of torch.uint8: .* Convert them in the data set"):
        audited(Bytes(), members=sides[0], nonmembers=sides[1])


def test_reference_data_are_no_nonmembers():
    model = network()
    record_seen(model, "reference data of the scoring", all_ids(side(8, 2))[:3])
    with pytest.raises(ValueError, match="3 of the 8 examples of nonmembers are reference data of the scoring"):
        audited(model)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)], r"2 \(Linear\)"),
        ([nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False)], r"1 \(BatchNorm1d\)"),
        ([nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3, bias=False)], r"1 \(GELU\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:the network calls no ReLU")
def test_without_weight_decay_a_network_that_is_not_homogeneous_is_refused(layers, named):
    model = nn.Sequential(*layers)
    with pytest.raises(ValueError, match=rf"not homogeneous in its trained weights: {named} is the first layer"):
        audited(model)
    assert audited(model, weight_decay=1e-3).degree is None
