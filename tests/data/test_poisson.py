"""Poisson batches: each example independently, the same draw on every process and worker."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses import DPSGDMixin
from tests.defenses.dpsgd.cases import Conv, fresh
from tests.helpers import digits, loader, part, trainer


@given(
    n=st.integers(1, 60),
    steps=st.integers(1, 9),
    parts=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_parts_and_processes_share_out_one_poisson_draw(n, steps, parts, world, seed):
    data = DataLoader(torch.arange(n), batch_size=4)
    ranks = [
        PoissonBatches(data, steps=steps, parts=parts, seed=seed, first_step=lambda: 5, rank=r, world_size=world)
        for r in range(world)
    ]
    batches = [[b.tolist() for b in rank] for rank in ranks]
    assert {len(b) for b in batches} == {steps * parts} == {len(ranks[0])}
    for step in range(steps):
        chunks = [batches[r][step * parts + p] for r in range(world) for p in range(parts)]
        assert sorted(i for c in chunks for i in c) == ranks[0].drawn(5 + step).tolist()
        sizes = [len(c) for c in chunks]
        assert max(sizes) - min(sizes) <= 2


def test_every_example_is_drawn_independently_at_the_stated_rate():
    batches = PoissonBatches(DataLoader(torch.arange(40), batch_size=10), steps=4)
    drawn = np.stack([np.bincount(batches.drawn(step), minlength=40) for step in range(4000)])
    assert set(np.unique(drawn)) == {0, 1}
    error = math.sqrt(0.25 * 0.75 / 4000)
    assert np.abs(drawn.mean(0) - 0.25).max() < 5 * error
    correlations = np.corrcoef(drawn.T)[np.triu_indices(40, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(4000)


def test_an_empty_batch_has_the_form_of_the_others_and_is_a_step_of_noise():
    data = DataLoader([{"pixels": torch.zeros(3), "name": "a", "label": 1}] * 4, batch_size=1)
    empty = next(batch for batch in PoissonBatches(data, steps=100) if not len(batch["label"]))
    assert empty["pixels"].shape == (0, 3)
    assert empty["label"].shape == (0,)

    class Sparse(Conv):
        def forward(self, x):
            return super().forward(x.view(len(x), -1).view(len(x), 1, 8, 8))  # fails on an empty batch

    model = DPSGDMixin.attach(fresh(Sparse), noise_multiplier=1.0)
    run = trainer(max_epochs=1)
    run.fit(model, loader(0, 20, batch_size=1))
    assert min(len(model.defense_state.batches.drawn(s)) for s in range(20)) == 0
    assert run.global_step == model.privacy_spent.steps == 20


@pytest.mark.parametrize(
    ("workers", "start"), [(0, None), (2, "fork"), pytest.param(1, "forkserver", marks=pytest.mark.slow)]
)
def test_workers_read_ahead_without_changing_the_draw(workers, start):
    data = DataLoader(part(0, 40), batch_size=8, num_workers=workers, multiprocessing_context=start)
    batches = PoissonBatches(data, steps=5, parts=2, seed=3)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [int(digits()[i][1]) for s in range(5) for i in batches.drawn(s)]
