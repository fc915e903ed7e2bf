"""What a reconstruction audit found. It never says that a model is safe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.tables import aligned, percent
from lightning_cwrf.auditing.values import Estimate, estimate_of
from lightning_cwrf.metrics.functional import holm
from lightning_cwrf.reconstruction.attack import Reconstruction
from lightning_cwrf.reconstruction.prior import ReconstructionPrior

RECONSTRUCTED = "members are reconstructed"
TOLD_APART = "members are told apart, not reconstructed"
NOTHING_FOUND = "nothing found with this prior"
_FORMAT = "lightning_cwrf.ReconstructionResult/1"
LIMIT = "a failed attack shows nothing about another prior, or a longer search"


@dataclass(frozen=True)
class ReconstructionResult:
    """What an attack gave back of the members, beside what it gave back of examples that the model never saw.

    Attributes:
        estimates: ``hit_rate`` and ``chance_hit_rate``, the shares of members and of non-members that a reconstruction
            claims (:func:`~lightning_cwrf.reconstruction.claims`); ``auroc`` and ``tpr_at_fpr_...`` of ``scores``.
        hits: the members and the non-members that are claimed.
        examples: the members and the non-members in all.
        hits_p_value: exact, of as many members among those claimed by chance.
        truth_residual: ρ of the members themselves, with the best multipliers: what the equation leaves unexplained.
        margins: the smallest and the median margin of the members.
        gate_patterns: distinct rows of the first ReLU's gates over the members; None: the model has no ReLU.
        relative_distances: medians over members and non-members of the distance to the nearest reconstruction, over
            that to the nearest other example.
        degree: of homogeneity; None: the network has none.
        scores: ``−min_r ‖x − r‖₂``, members first, float64 ``(n + k,)``. If each example was a member by the toss of a
            coin, ``one_run_epsilon(scores, is_member)`` is a lower bound on ε.
        is_member: bool ``(n + k,)``.
        claimed: indices of the pool, members first, that are claimed.
        pool: the inputs of members and non-members, as the model takes them, float64 ``(n + k, ...)``.
        reconstruction: what the attack found.
        confidence: of every interval, and of :attr:`finding`.
        remarks: what makes the attack weaker than it could be, or the comparison doubtful.
    """

    estimates: dict[str, Estimate]
    hits: tuple[int, int]
    examples: tuple[int, int]
    hits_p_value: float
    truth_residual: float
    margins: tuple[float, float]
    gate_patterns: int | None
    relative_distances: tuple[float, float]
    degree: int | None
    scores: Tensor = field(repr=False)
    is_member: Tensor = field(repr=False)
    claimed: Tensor = field(repr=False)
    pool: Tensor = field(repr=False)
    reconstruction: Reconstruction = field(repr=False)
    confidence: float = 0.95
    remarks: list[str] = field(default_factory=list, repr=False)

    @property
    def prior(self) -> ReconstructionPrior:
        """What the attacker knew."""
        return self.reconstruction.prior

    @property
    def finding(self) -> str:
        """What was found, with the prior; at :attr:`confidence` for the two tests, hits and AUC, together (Holm)."""
        p_auroc = self.estimates["auroc"].p_value
        assert p_auroc is not None
        hits, auroc = (
            holm(torch.tensor([self.hits_p_value, p_auroc], dtype=torch.float64)) <= 1 - self.confidence
        ).tolist()
        found = RECONSTRUCTED if hits else TOLD_APART if auroc else NOTHING_FOUND
        return f"{found} (prior: {self.prior}); {LIMIT}"

    def values(self) -> dict[str, float]:
        """Every number by its name; those that are not known are left out."""
        near, far = self.relative_distances
        found = {name: estimate.value for name, estimate in self.estimates.items()}
        found |= {
            "hits": self.hits[0],
            "nonmember_hits": self.hits[1],
            "hits_p_value": self.hits_p_value,
            "residual": self.reconstruction.residual,
            "exact_residual": self.reconstruction.exact_residual,
            "truth_residual": self.truth_residual,
            "least_margin": self.margins[0],
            "median_margin": self.margins[1],
            "member_distance": near,
            "nonmember_distance": far,
        }
        if self.gate_patterns is not None:
            found["gate_patterns"] = self.gate_patterns
        return {name: float(value) for name, value in found.items()}

    def save(self, path: str | PathLike[str]) -> Path:
        """Save as one JSON file, completely or not at all. **It holds the inputs of members and non-members.**

        Raises:
            ValueError: the path has a suffix of weight files (``.safetensors``, ``.ckpt``, ``.pt``), or is a folder.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return write_json({"format": _FORMAT, "version": __version__, "finding": self.finding, **own}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ReconstructionResult:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no reconstruction audit, is damaged, was changed, or is of another version.
        """
        content = read_json(path, _FORMAT, what="saved reconstruction", writer="ReconstructionResult.save")
        found = content["reconstruction"]
        prior = found["prior"]
        prior["box"] = None if prior["box"] is None else tuple(prior["box"])
        found["prior"] = ReconstructionPrior(**prior)
        found |= {name: float(found[name]) for name in ("residual", "exact_residual")}  # text where not finite
        content["reconstruction"] = Reconstruction(**found)
        content["estimates"] = {name: estimate_of(each) for name, each in content["estimates"].items()}
        content |= {name: tuple(content[name]) for name in ("hits", "examples")}
        content |= {name: tuple(map(float, content[name])) for name in ("margins", "relative_distances")}
        content["truth_residual"] = float(content["truth_residual"])
        return cls(**{f.name: content[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        (a, b), (n, k) = self.hits, self.examples
        found = self.reconstruction
        p_auroc = self.estimates["auroc"].p_value
        rows = [
            ["", "value", "p"],
            ["members claimed", f"{a} of {n}: {self.estimates['hit_rate']}", f"{self.hits_p_value:.2g}"],
            ["non-members claimed (chance)", f"{b} of {k}: {self.estimates['chance_hit_rate']}"],
            ["AUC of the distances", str(self.estimates["auroc"]), f"{p_auroc:.2g}"],
            ["distance, relative (members, non-members)", "{:.2f}, {:.2f}".format(*self.relative_distances)],
            ["residual of the attack (with its own gates)", f"{found.residual:.4f} ({found.exact_residual:.4f})"],
            ["residual of the members themselves", f"{self.truth_residual:.4f}"],
            ["margin of the members (least, median)", "{:.2f}, {:.2f}".format(*self.margins)],
        ]
        if self.gate_patterns is not None:
            rows.append(["gate patterns", str(self.gate_patterns)])
        table = aligned([[*row, ""][:3] for row in rows])
        legend = f"In brackets: {percent(self.confidence)} confidence interval."
        return "\n".join([f"{self.finding}.", "", *table, "", legend, *self.remarks])
