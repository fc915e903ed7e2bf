"""How exposed each single example is, over repeated trainings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import special
from torch import Tensor

from lightning_cwrf.attacks import PerModel, logit_signal
from lightning_cwrf.attacks.per_model import Signal
from lightning_cwrf.auditing.run import check_shadows
from lightning_cwrf.auditing.tables import aligned, percent
from lightning_cwrf.checks import check_confidence, check_number
from lightning_cwrf.metrics.functional import benjamini_hochberg
from lightning_cwrf.metrics.functional.discoveries import rank_sum_p_values, signed_rank_p_values
from lightning_cwrf.metrics.functional.intervals import auroc_interval, normal_quantile, tpr_interval
from lightning_cwrf.metrics.functional.roc import ScoreCounts, auroc_of, tpr_of
from lightning_cwrf.shadows.outputs import ShadowOutputs


@dataclass(frozen=True)
class ExampleRisk:
    """How well models that were trained on an example can be told from those that were not; ``print`` shows the worst.

    Every tensor is float64 or int64 ``(n,)``, in the order of the pool.

    Attributes:
        auroc: the probability that the signal of a model with the example is above that of one without it.
        auroc_low: lower bound of its interval, for this example alone.
        auroc_high: upper bound.
        tpr: the share of models with the example that are above all but ``fpr`` of those without it.
        tpr_low: lower bound of its interval; 0 where the models are too few for one.
        tpr_high: upper bound.
        p_values: exact one-sided tests against chance, for each example alone: signed-rank tests where models come in
            complementary pairs, else rank-sum tests.
        models_in: how many models were trained on the example.
        models_out: how many were not.
        targets: its class.
        fpr: of the TPR.
        confidence: of the intervals.
    """

    auroc: Tensor = field(repr=False)
    auroc_low: Tensor = field(repr=False)
    auroc_high: Tensor = field(repr=False)
    tpr: Tensor = field(repr=False)
    tpr_low: Tensor = field(repr=False)
    tpr_high: Tensor = field(repr=False)
    p_values: Tensor = field(repr=False)
    models_in: Tensor = field(repr=False)
    models_out: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    fpr: float
    confidence: float

    def __len__(self) -> int:
        return len(self.auroc)

    def at_risk(self, fdr: float = 0.05) -> Tensor:
        """Places in the pool of the examples that can be told, the most surely first, with a false discovery rate.

        By the rule of Benjamini and Hochberg. The smallest p-value of k models in pairs is 2 to the power of −k / 2, so
        with few models nothing may be found: that says nothing.
        """
        check_number("fdr", fdr, low=0, high=1, low_open=True, high_open=True)
        order = torch.argsort(self.p_values, stable=True)
        return order[benjamini_hochberg(self.p_values)[order] <= fdr]

    def to_pandas(self) -> Any:
        """A row per example of the pool of a ``pandas.DataFrame``, with the tensors above as columns.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas.") from error
        return pd.DataFrame({name: each.numpy() for name, each in vars(self).items() if isinstance(each, Tensor)})

    def _power(self) -> list[str]:
        """A line where these models are too few to tell any example."""
        models = int((self.models_in + self.models_out).min())
        least = 2.0 ** -(models // 2)
        if least <= 0.05:
            return []
        return [f"With {models} models no p-value is below {least:.2g}, so none could be: train more of them."]

    def __str__(self) -> str:
        found, shares = self.at_risk(), (0.5, 0.9, 0.99, 1.0)
        spread = ", ".join(f"{percent(q)} {float(self.auroc.quantile(q)):.3f}" for q in shares)
        least, most = (int(f(torch.minimum(self.models_in, self.models_out))) for f in (torch.min, torch.max))
        rows = [["example", "class", "AUC", f"TPR at {percent(self.fpr)} FPR", "p"]]
        for i in torch.argsort(self.p_values, stable=True)[:10].tolist():
            cells = [
                f"{float(v[i]):.3f} [{float(low[i]):.3f}, {float(high[i]):.3f}]"
                for v, low, high in (
                    (self.auroc, self.auroc_low, self.auroc_high),
                    (self.tpr, self.tpr_low, self.tpr_high),
                )
            ]
            rows.append([str(i), str(int(self.targets[i])), *cells, f"{float(self.p_values[i]):.2g}"])
        return "\n".join(
            [
                f"{len(self)} examples; at least {least} to {most} models with and without each.",
                f"Mean AUC {float(self.auroc.mean()):.3f}; quantiles over examples: {spread}.",
                f"{len(found)} examples can be told, with a false discovery rate of 5%.",
                *self._power(),
                "",
                *aligned(rows),
                "",
                f"In brackets: {percent(self.confidence)} confidence interval of each example alone.",
            ]
        )


def example_risk(
    shadows: ShadowOutputs, *, signal: Signal = logit_signal, fpr: float = 0.1, confidence: float = 0.95
) -> ExampleRisk:
    """How exposed each example of the pool is: AUC and TPR over the models that were, or were not, trained on it.

    An average over examples hides those at high risk (Krčo, Guépin, Meeus & de Montjoye 2024, "Lost in the Averages",
    arXiv 2405.15423). This is the game of one example: an attacker who knows how its signal is distributed with it and
    without it says of one model whether it was trained on it. Nothing is trained, and no shadow models attack: of one
    example, LiRA with equal variances orders models as the signal does.

    The models of :func:`~lightning_cwrf.train_shadows` were trained on random halves of the pool, so this is the risk
    as a mean over training sets, which that paper calls the average setup. In its specific setup one training set is
    fixed, and the risk there may be higher or lower: train models of other seeds on that set with and without the one
    example, and pass them by :meth:`ShadowOutputs.from_arrays <lightning_cwrf.shadows.ShadowOutputs.from_arrays>` as a
    pool of one: all models with it first, since models that alternate count as pairs.

    Args:
        shadows: outputs of repeated trainings, such as those of :func:`~lightning_cwrf.train_shadows`. Use 32 or more.
            Where models 2 i and 2 i + 1 are trained on the two halves of a pool, they depend on each other: what one
            lacks the other has. The tests allow for any such dependence, and so do the intervals, by twice the variance
            of independent models; one comparison in k / 2 is within a pair, where the AUC is lower. All other models
            count as independent.
        signal: a function of logits ``(..., n, K)`` and targets ``(n,)``, higher where a model was trained on it.
        fpr: of the TPR. With fewer than 1 / fpr models without an example it is the TPR at no false positive.
        confidence: of the intervals, of each example alone.

    Raises:
        TypeError: ``shadows`` that are no :class:`~lightning_cwrf.shadows.ShadowOutputs`.
        ValueError: an example that all models were trained on, or none; models of two halves that are not beside each
            other; a signal that is NaN; settings out of range.

    >>> from lightning_cwrf.shadows import balanced_membership
    >>> membership, targets = balanced_membership(32, 20), torch.arange(20) % 2
    >>> logits = torch.nn.functional.one_hot(targets, 2) * (membership[..., None] + torch.rand(32, 20, 1))
    >>> risk = example_risk(ShadowOutputs.from_arrays(logits, membership, targets))
    >>> float(risk.auroc.min()), len(risk.at_risk())
    (1.0, 20)
    """
    if shadows is None:
        raise TypeError("shadows must be what train_shadows returns, not None.")
    check_shadows(shadows)
    check_confidence(confidence)
    check_number("fpr", fpr, low=0, high=1, low_open=True)
    values = PerModel(shadows.logits).signal(signal, shadows.targets).T.double().contiguous()
    inside = shadows.membership.T.contiguous()
    one_sided = (inside.all(1) | ~inside.any(1)).nonzero().flatten().tolist()
    if one_sided:
        raise ValueError(
            f"{len(one_sided)} examples (first {one_sided[:10]}) were in the training of all models, or of none: each "
            "needs models with it and without it."
        )
    if bool(values.isnan().any()):
        raise ValueError("the signal of some models is NaN.")
    counts = _counts(values, inside)
    paired = _in_pairs(shadows.membership)
    level = confidence
    if paired:  # the variance of a difference is at most twice that of independent terms
        level = 2 * float(special.ndtr(math.sqrt(2) * normal_quantile(confidence))) - 1
        differences = torch.where(inside[:, ::2], 1, -1) * (values[:, ::2] - values[:, 1::2])
    (low, high), (tpr_low, tpr_high) = auroc_interval(counts, level), tpr_interval(counts, fpr, level)
    return ExampleRisk(
        auroc=auroc_of(counts),
        auroc_low=low,
        auroc_high=high,
        tpr=tpr_of(counts, fpr),
        tpr_low=tpr_low,
        tpr_high=tpr_high,
        p_values=signed_rank_p_values(differences) if paired else rank_sum_p_values(values, inside),
        models_in=inside.sum(1),
        models_out=(~inside).sum(1),
        targets=shadows.targets,
        fpr=fpr,
        confidence=confidence,
    )


def _in_pairs(membership: Tensor) -> bool:
    """Whether models 2 i and 2 i + 1 are of the two halves of a pool."""
    models, examples = membership.shape
    if models % 2 == 0 and torch.equal(membership[::2], ~membership[1::2]):
        return True
    rows = {bytes(row.numpy()): i for i, row in enumerate(membership)}
    halves = [(i, rows[other]) for i, row in enumerate(~membership) if (other := bytes(row.numpy())) in rows]
    if examples >= _NO_CHANCE and halves:
        raise ValueError(
            f"models {halves[0][0]} and {halves[0][1]} are of two halves of the pool, and so depend on each other: "
            "order the models such that 2 i and 2 i + 1 are, for all of them, or leave one of each two out."
        )
    return False


_NO_CHANCE = 20
"""Examples of which no two models have opposite ones by chance."""


def _counts(values: Tensor, inside: Tensor) -> ScoreCounts:
    """Models with and without each example at each value, highest first; of equal values, all at the first of them."""
    ordered, order = values.sort(dim=1, descending=True, stable=True)
    members = inside.gather(1, order).double()
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = torch.arange(ordered.shape[1]).expand_as(ordered)
    first = torch.where(new, places, 0).cummax(1).values
    merged = (torch.zeros_like(ordered).scatter_add_(1, first, part) for part in (members, 1 - members))
    return ScoreCounts(ordered, *merged)
