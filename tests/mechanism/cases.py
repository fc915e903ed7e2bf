"""Small models and data that the tests of the mechanism share."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_cwrf.mechanism import PublicCurvature


def data(n, seed, features=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(classes, (n,), generator=generator))


def network(seed=0, features=4, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def metric(k, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(k, dtype=torch.float64)


def curvature_of(matrix, clip):
    return PublicCurvature(torch.linalg.cholesky(matrix), clip, ["weight"])
