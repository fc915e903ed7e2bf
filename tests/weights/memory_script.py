"""Run by test_memory.py: the peak memory of scoring, the model included, in multiples of the weights."""

import sys
from pathlib import Path

import torch
from torch import nn

from lightning_cwrf.weights.scores import privacy_vulnerability_scores
from lightning_cwrf.weights.vanilla import save_vanilla

WIDTH, DEPTH = 1024, 24  # 25 million weights: 100 MB


def resident(peak=False):
    """Resident memory in bytes, or its highest value since :func:`reset`."""
    word = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word))
    return int(line.split()[1]) * 1024


def reset():
    Path("/proc/self/clear_refs").write_text("5")


def network():
    hidden = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    before = resident()
    model = network()
    weights = sum(p.numel() for p in model.parameters()) * 4
    vanilla = save_vanilla(network(), folder / "vanilla.safetensors")
    data = [[(torch.randn(8, WIDTH), torch.randint(10, (8,))) for _ in range(2)] for _ in range(2)]
    small = nn.Linear(WIDTH, 10)
    privacy_vulnerability_scores(small, nn.Linear(WIDTH, 10), *data, steps=1)  # what is loaded and set up once
    reset()
    scores = privacy_vulnerability_scores(model, vanilla, *data, steps=3)
    print((resident(peak=True) - before) / weights)
    assert scores


if __name__ == "__main__":
    main(Path(sys.argv[1]))
