"""The random state that every test and every doctest begins with."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what users draw from
    torch.manual_seed(0)
