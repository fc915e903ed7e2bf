"""Plots of audits, saved to files; no display is needed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_cwrf.auditing import AuditResult, RecipeAudit
from lightning_cwrf.auditing.findings import Findings
from lightning_cwrf.auditing.names import attack_name
from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics.functional import membership_roc
from lightning_cwrf.report.curves import loss_histograms, mean_roc, smallest_rate
from lightning_cwrf.report.table import AnyAudit, check_results, check_tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_roc(results: Mapping[str, AnyAudit], path: str | PathLike[str], attack: str = "lira") -> Path:
    """Save the ROC of one attack on several models, with logarithmic axes (Carlini et al. 2022).

    The axes begin at half a false positive, the smallest rate that the sample can show. The curve of a recipe is the
    mean TPR over its models.

    Args:
        results: audits by the name of the model or of the recipe.
        path: of the image; without a suffix it is a PNG.
        attack: the attack to plot.

    Returns:
        The path of the image.

    Raises:
        TypeError: no mapping from names to audits.
        ValueError: no audit, or one without that attack.
    """
    return _save(roc_figure(results, attack), path)


def roc_figure(results: Mapping[str, AnyAudit], attack: str = "lira") -> Figure:
    """The figure that :func:`plot_roc` saves; arguments and errors are the same."""
    check_results(results, attack, (AuditResult, RecipeAudit))
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    floor = smallest_rate(results.values())
    for name, result in results.items():
        label = f"{_plain(name)} (AUC {result.estimates[attack]['auroc'].value:.3f})"
        if isinstance(result, RecipeAudit):
            fpr, tpr = torch.tensor(mean_roc(result, attack, floor)).T
            axes.plot(fpr, tpr.clamp(min=floor), label=label)
            continue
        fpr, tpr, _ = membership_roc(result.scores[attack], result.is_member)
        axes.step(fpr.clamp(min=floor), tpr.clamp(min=floor), where="post", label=label)
    axes.plot([floor, 1], [floor, 1], "--", color="gray", linewidth=1, label="chance")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1), title=f"ROC of {attack_name(attack)}")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def plot_losses(results: Mapping[str, AnyAudit], path: str | PathLike[str], bins: int = 40) -> Path:
    """Save histograms of the members' and non-members' losses, one panel per model, on one logarithmic axis.

    Args:
        results: audits by the name of the model.
        path: of the image; without a suffix it is a PNG.
        bins: of each histogram.

    Returns:
        The path of the image.

    Raises:
        TypeError: no mapping from names to audits; bins that are not an integer.
        ValueError: no audit; bins below 1.
    """
    check_results(results, kinds=(AuditResult, RecipeAudit))
    check_integer("bins", bins, low=1)
    found = loss_histograms(results.values(), bins)
    figure = _figure(4 * len(results), 3.2)
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name, (members, nonmembers) in zip(panels, results, found.shares, strict=True):
        for shares, label in ((members, "members"), (nonmembers, "non-members")):
            axes.hist(found.edges[:-1], bins=found.edges, weights=shares, alpha=0.6, label=label)
        axes.set(title=_plain(name), xlabel="loss", xscale="log")
    panels[0].set_ylabel("share of examples")
    panels[0].legend(fontsize="small")
    return _save(figure, path)


def plot_tradeoff(
    results: Mapping[str, Mapping[str, Findings]], path: str | PathLike[str], attack: str = "lira"
) -> Path:
    """Plot utility against privacy: test accuracy and an attack's AUC with their intervals; bottom right is best.

    Args:
        results: audits by the way of training (a marker), then by defense (a colour).
        path: of the image; without a suffix it is a PNG.
        attack: the attack to plot.

    Returns:
        The path of the image.

    Raises:
        TypeError: no audits by way of training and defense.
        ValueError: no audit, or one without that attack.
    """
    check_tradeoff(results, attack)
    figure = _figure(9, 6)
    axes = figure.add_subplot()
    defenses = list(dict.fromkeys(defense for audits in results.values() for defense in audits))
    colours = dict(zip(defenses, _colours(len(defenses)), strict=True))
    for audits, marker in zip(results.values(), cycle("osD^vPX"), strict=False):
        for defense, result in audits.items():
            x, y = result.model_metrics["test_accuracy"], result.estimates[attack]["auroc"]
            axes.errorbar(
                x.value,
                y.value,
                xerr=[[x.value - x.interval.low], [x.interval.high - x.value]],
                yerr=[[max(y.value - y.interval.low, 0)], [max(y.interval.high - y.value, 0)]],
                fmt=marker,
                color=colours[defense],
                elinewidth=0.4,
            )
    axes.axhline(0.5, linestyle="--", color="gray", linewidth=1)
    for way, marker in zip(results, cycle("osD^vPX"), strict=False):
        axes.plot([], [], marker, color="gray", label=_plain(way))
    for defense, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=_plain(defense))
    axes.set(xlabel="test accuracy", ylabel=f"AUC of {attack_name(attack)} (0.5: chance)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _colours(count: int) -> list[Any]:
    """Different colours: the usual ten, or as many along a rainbow."""
    from matplotlib import colormaps

    return [f"C{i}" for i in range(count)] if count <= 10 else list(colormaps["turbo"].resampled(count)(range(count)))


def _plain(text: str) -> str:
    """Text in which no dollar begins a formula."""
    return str(text).replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # heavy, and for plots alone

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | PathLike[str]) -> Path:
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")  # matplotlib's default, made explicit for the returned path
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
