"""What every benchmark shares: timing in turns, peak memory, the network, and rows of one table."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

HEADINGS = ("benchmark", "ours", "compared with", "theirs", "ratio", "target", "met")


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    benchmark: str
    ours: str
    compared_with: str = ""
    theirs: str = ""
    ratio: str = ""
    target: str = ""
    met: str = ""


def overhead(
    benchmark: str,
    ours: float,
    compared_with: str,
    theirs: float,
    at_most: float | None = None,
    show: Callable[[float], str] | None = None,
) -> Row:
    """A row whose ratio is ours / theirs, to be at most ``at_most`` (None: no target). ``show`` writes the numbers."""
    show, ratio = show or seconds, ours / theirs
    target, met = ("", "") if at_most is None else (f"≤ {at_most:.2f}", verdict(ratio <= at_most))
    return Row(benchmark, show(ours), compared_with, show(theirs), f"{ratio:#.3g}", target, met)


def speedup(benchmark: str, ours: float, compared_with: str, theirs: float, at_least: float | None = None) -> Row:
    """A row whose ratio is theirs / ours, to be at least ``at_least`` times (None: no target)."""
    ratio = theirs / ours
    target, met = ("", "") if at_least is None else (f"≥ {at_least:g}×", verdict(ratio >= at_least))
    return Row(benchmark, seconds(ours), compared_with, seconds(theirs), f"{ratio:#.3g}".rstrip(".") + "×", target, met)


def verdict(holds: bool) -> str:
    return "met" if holds else "MISSED"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:#.3g}".rstrip(".") + " ms"


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def best_of(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """The best time of each side in seconds. The sides take turns, so that noise affects all of them."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for i, side in enumerate(sides):
            gc.collect()  # of the previous side, so that it does not run during this one
            began = time.perf_counter()
            side()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes by which the process's resident memory peaks during ``call`` above what it was just before.

    On Linux, the high-water mark can be reset. Elsewhere it is that of the process's whole life, which gives the right
    result if nothing before took more, as in :func:`in_fresh_process`.
    """
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        reset.write_text("5")
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a module's function in a new interpreter with its own memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cifar_resnet18(seed: int) -> nn.Module:
    """ResNet-18 as used on CIFAR-10: a 3×3 stem of stride 1 and no max pooling, for 32×32 images."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def image_batches(count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random images with random labels; the time of a step does not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def machine() -> str:
    """The processor, its cores, their load (on a busy machine, times mean little), and versions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    busy = f" (load {os.getloadavg()[0]:.1f})" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{busy}, Python {platform.python_version()}, torch {torch.__version__}"


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(tuple(asdict(row).values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run(benchmark: Callable[[], list[Row]], description: str | None) -> None:
    """The command line of one benchmark: print its rows, and save them with ``--json`` for ``run_all.py``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the rows to, for run_all.py")
    arguments = parser.parse_args()
    rows = benchmark()
    for row in rows:
        print(f"{row.benchmark}: {row.ours}", end="")
        print(f"; {row.compared_with}: {row.theirs}; ratio {row.ratio}" if row.compared_with else "", end="")
        print(f"; target {row.target}: {row.met}" if row.target else "")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows]))
