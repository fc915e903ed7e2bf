"""The noise of draws: from the operating system, or reproducible for tests."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cwrf.data import isolated_rng
from lightning_cwrf.mechanism.curvature import PublicCurvature
from lightning_cwrf.mechanism.private import PrivateExamples
from lightning_cwrf.weights.copies import parameters_and_buffers

KNOWN_NOISE = (
    "noise_seed makes the noise of the draws reproducible, and the guarantee then holds only while it is secret and "
    "cannot be guessed: for tests, never for a release. Leave it out."
)


def noise_source(
    seed: int | None, model: nn.Module, curvature: PublicCurvature, examples: PrivateExamples, settings: str
) -> np.random.Generator:
    """A generator whose secret is 256 random bits of the operating system; with a ``seed``, one of it and the run."""
    if seed is None:
        return generator_of(secrets.token_bytes(32))
    return generator_of(_reproducible(seed, model, curvature, examples, settings))


def generator_of(secret: bytes) -> np.random.Generator:
    """NumPy's Philox generator, with 128 bits of the secret's hash as its key and 256 as its counter."""
    found = hashlib.blake2b(secret, digest_size=48).digest()
    key, counter = (int.from_bytes(part, "little") for part in (found[:16], found[16:]))
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _reproducible(
    seed: int, model: nn.Module, curvature: PublicCurvature, examples: PrivateExamples, settings: str
) -> bytes:
    """A secret that is a function of a seed and of all that the draws depend on: other draws have other noise.

    Two releases with the same noise, of neighbouring data or at two ε, would give the private gradients away.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=32)

    def add(name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        whole = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        head = repr((name, str(value.dtype), tuple(value.shape), len(whole))).encode()
        digest.update(head + b"\n" + whole)

    digest.update(settings.encode() + b"\n")
    add("cholesky", curvature.cholesky)
    if curvature.subspace is not None:
        add("basis", curvature.subspace.basis)
    for name, value in parameters_and_buffers(model):
        add(name, value)
    with isolated_rng():
        for example in examples.groups(1):
            for leaf in pytree.tree_leaves(example):
                add("example", leaf if isinstance(leaf, Tensor) else torch.tensor(list(repr(leaf).encode())))
    return digest.digest()
