"""What tests and doctests have in common."""

import gc
import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what users draw from
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Every garbage collection would look at all imported modules again, a tenth of the time of short tests."""
    gc.collect()
    gc.freeze()
