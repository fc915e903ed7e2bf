"""Scores of the losses of one training, against loops; and their file."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.attacks import LossTraces, loss_tnr, lt_iqr
from tests.attacks.cases import close, seeds
from tests.oracles import attacks as oracle


@given(seeds, st.integers(2, 9), st.integers(1, 6), st.booleans())
def test_lt_iqr_against_loops(seed, points, examples, coarse):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(points, examples, generator=generator, dtype=torch.float64) * 5
    losses = losses.round() if coarse else losses
    close(lt_iqr(losses), oracle.lt_iqr(losses.tolist()))
    half = losses.half()
    close(lt_iqr(half), oracle.lt_iqr(half.double().tolist()))


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.25, 0.5, 1.0]))
def test_loss_tnr_against_every_threshold(seed, members, nonmembers, max_fnr):
    generator = torch.Generator().manual_seed(seed)
    inside, outside = (torch.rand(n, generator=generator).mul(8).round() for n in (members, nonmembers))
    expected = 1.0 if max_fnr == 1.0 else oracle.loss_tnr(inside.tolist(), outside.tolist(), max_fnr)
    assert loss_tnr(inside, outside, max_fnr=max_fnr) == pytest.approx(expected)


def test_without_a_difference_loss_tnr_is_about_its_false_negative_rate():
    found = [
        loss_tnr(*torch.rand(2, 2000, generator=torch.Generator().manual_seed(seed)), max_fnr=0.05)
        for seed in range(40)
    ]
    assert np.mean(found) == pytest.approx(0.05, abs=5 * 0.007 / 40**0.5)  # of two shares, each of 2,000


def test_an_example_that_is_learned_late_has_a_larger_score_than_one_learned_early_or_never():
    early, late, never = [2.0] + [0.0] * 9, [2.0] * 5 + [0.0] * 5, [2.0] * 10
    scores = lt_iqr(torch.tensor([early, late, never]).T)
    assert scores.tolist() == [0.0, 2.0, 0.0]


def test_many_examples_are_taken_in_blocks():
    losses = torch.rand(600, 5000, generator=torch.Generator().manual_seed(0))
    whole = lt_iqr(losses)
    torch.testing.assert_close(whole[[0, 1746, 1747, 1748, 4999]], lt_iqr(losses[:, [0, 1746, 1747, 1748, 4999]]))
    losses[3, 4321] = float("nan")
    with pytest.raises(ValueError, match=r"losses has NaN or infinite values at examples \[4321\]"):
        lt_iqr(losses)


def test_wrong_losses():
    for wrong in (torch.zeros(1, 3), torch.zeros(3, 0), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"losses must have shape \(t, n\) of at least 2 points in time"):
            lt_iqr(wrong)
    with pytest.raises(ValueError, match="nonmember_losses has NaN or infinite"):
        loss_tnr(torch.zeros(3), torch.tensor([float("inf")]))
    for sides in ((torch.zeros(0), torch.zeros(2)), (torch.zeros(2), torch.zeros(0))):
        with pytest.raises(ValueError, match="member"):
            loss_tnr(*sides)


def test_traces_rank_examples_and_come_back_from_their_file(tmp_path):
    losses = torch.tensor([[2.0, 2.0, 2.0], [2.0, 0.1, 2.0], [1.8, 0.0, 0.5], [1.9, 0.0, 0.2]]).half()
    traces = LossTraces(losses, torch.tensor([0, 3, 6, 9]), torch.tensor([0.1, 5.0]).half(), "abc")
    assert traces.at_risk(3).tolist() == [2, 1, 0]
    assert traces.loss_tnr() == 0.5
    path = traces.save(tmp_path / "folder" / "traces.safetensors")
    again = LossTraces.load(path)
    assert torch.equal(again.losses, losses)
    assert torch.equal(again.steps, traces.steps)
    assert again.digest == "abc"
    assert again.loss_tnr() == 0.5
    alone = LossTraces(losses, torch.tensor([0, 3, 6, 9]))
    assert LossTraces.load(alone.save(tmp_path / "alone")).nonmember_losses is None
    with pytest.raises(ValueError, match=r"needs the losses of non-members: pass LossTraceCallback\(nonmembers"):
        alone.loss_tnr()
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must be an integer from 1 to 3"):
            traces.at_risk(k)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no file of loss traces: it is damaged"):
        LossTraces.load(path)
