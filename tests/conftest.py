import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")

LONGEST = (
    "examples",
    "runs",
    "clusters",
    "workers",
    "studies",
    "docs",
    "training",
    "ledger",
    "packaging",
    "search",
    "said",
)
"""Modules of tests that take minutes."""


def pytest_collection_modifyitems(items):
    """The longest modules come first, so that no process works alone at the end."""
    items.sort(key=lambda item: next((i for i, n in enumerate(LONGEST) if item.path.stem == f"test_{n}"), len(LONGEST)))


@pytest.fixture(autouse=True)
def _no_profiler_is_left_on():
    """It would record every operation of the tests after it, until memory runs out."""
    yield
    assert not torch.autograd._profiler_enabled()


@pytest.fixture
def rng_untouched():
    """Fails the test when it leaves another random state than it found (it must draw nothing itself)."""
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
