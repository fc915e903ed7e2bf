"""What the tests of label-only attacks share."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def problem(seed, n=8, d=3, classes=3):
    """A linear model in float64, and examples that it labels right but for the first."""
    torch.manual_seed(seed)
    model, x = nn.Linear(d, classes).double(), torch.randn(n, d).double()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    return model, x, y


def label_of(model):
    return lambda point: int(model(torch.tensor(point, dtype=torch.float64)[None]).argmax())


LINEAR, INPUTS, TARGETS = problem(7)
DATA = TensorDataset(INPUTS, TARGETS)
