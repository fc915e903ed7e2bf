"""Code that does not change the caller's random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the caller's random state (Python, NumPy, PyTorch on the CPU and on ``device``) at the end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    devices = [device] if device is not None and device.type not in ("cpu", "meta") else []
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
