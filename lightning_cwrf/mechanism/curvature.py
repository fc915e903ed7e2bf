"""The curvature of a classifier on public data, which gives a mechanism its metric and its clipping norm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.data import Batches, all_ids, as_loader, bring_to, check_batches, reads_alike
from lightning_cwrf.data.examples import is_whole
from lightning_cwrf.data.overlap import is_ambiguous
from lightning_cwrf.mechanism.gradients import Subspace, example_gradients, label_gradients, part_size, parts_of
from lightning_cwrf.mechanism.parameters import Parameters, check_head, parameter_names
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.descent import scoring_context

MOST_DIMENSIONS = 4096
"""The most dimensions k; the Cholesky factor has k² numbers of 8 bytes."""


@dataclass(frozen=True)
class PublicCurvature:
    """The metric of a mechanism, ``H_λ = L Lᵀ``, and its clipping norm; no private example has a part in it.

    Attributes:
        cholesky: L, float64 ``(k, k)``, lower triangular.
        clip: C, the largest norm ``‖L⁻¹g‖₂`` of an example's gradient.
        names: of the parameters that are trained.
        subspace: the directions in which they are; None: all, k = d.
        public: what identifies the inputs of the public examples; None: it is not known, and not checked.
        ambiguous: whether many public examples share their content, so that it identifies none.
    """

    cholesky: Tensor
    clip: float
    names: list[str]
    subspace: Subspace | None = None
    public: frozenset[Hashable] | None = field(default=None, repr=False, compare=False)
    ambiguous: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = tuple(self.cholesky.shape)
        if self.cholesky.dtype != torch.float64 or len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"cholesky must be float64 of shape (k, k), not {self.cholesky.dtype} of {shape}.")
        check_number("clip", self.clip, low=0, low_open=True)

    @property
    def dimensions(self) -> int:
        """The number k of dimensions."""
        return len(self.cholesky)

    def gradients(self, model: nn.Module, batch: Any, at: Tensor | None = None) -> Tensor:
        """:func:`example_gradients` of a batch in these dimensions, float64 ``(n, k)`` on the CPU."""
        return _in(self.subspace, example_gradients(model, batch, self.names, at)).cpu().double()

    def whiten(self, gradients: Tensor) -> Tensor:
        """``u = L⁻¹g`` of each row: float64 ``(n, k)``, whose Euclidean norm is that of g in ``H_λ⁻¹``."""
        found: Tensor = torch.linalg.solve_triangular(self.cholesky.mT, gradients.double(), upper=True, left=False)
        return found

    def unwhiten(self, values: Tensor) -> Tensor:
        """``L⁻ᵀ v`` of each row, or of one vector."""
        each = values.view(-1, values.shape[-1])
        found: Tensor = torch.linalg.solve_triangular(self.cholesky, each, upper=False, left=False)
        return found.view_as(values)


def public_curvature(
    model: nn.Module,
    public: Batches,
    *,
    parameters: Parameters = "head",
    damping: float = 3e-3,
    clip: float | None = None,
    subspace: int | None = None,
    max_dimensions: int = MOST_DIMENSIONS,
    seed: int = 0,
    transfer: Callable[[Any], Any] | None = None,
) -> PublicCurvature:
    """The Gauss-Newton matrix of a classifier on public data, damped: ``H + λI``, ``λ = damping · tr(H) / k``.

    ``H = 1/m Σ_x J_xᵀ (diag p_x − p_x p_xᵀ) J_x`` over m public examples, with the Jacobian J of the logits by the
    parameters and the softmax p at the model's present weights; it is the Fisher information of the softmax too. Labels
    are not read, so it exists for a new head, also one of zeros. The model is not changed, nor the random state.

    **Public** means: a private example has no part in it, neither its inputs nor its label, nor in how the public
    inputs are normalised or chosen. Whoever leaves private examples out of the public data makes these depend on the
    private ones; leave them out of the private data instead.

    Args:
        model: a classifier, in any mode; it is run in eval mode.
        public: a loader, a data set or a list of batches.
        parameters: ``"head"`` (the last ``nn.Linear``), ``"all"`` that are trainable, or names.
        damping: λ, in mean eigenvalues of H.
        clip: C; None: half the median of ``‖L⁻¹g‖`` over the public examples, with labels drawn from the model's own
            softmax.
        subspace: k random directions instead of all d parameters.
        max_dimensions: raise where k is larger.
        seed: of the directions and of the labels that ``clip=None`` draws.
        transfer: applied to each batch before its tensors go to the model's device and precision.

    Raises:
        TypeError: a stream, or batches of something other than tensors.
        ValueError: no batch; too many dimensions; a curvature of 0; unknown parameters; numbers out of range.

    >>> data = [(torch.randn(64, 4), torch.zeros(64, dtype=torch.long))]
    >>> curvature = public_curvature(nn.Linear(4, 3), data)
    >>> curvature.cholesky.shape, curvature.names
    (torch.Size([15, 15]), ['weight', 'bias'])
    """
    check_number("damping", damping, low=0, low_open=True)
    check_integer("max_dimensions", max_dimensions, low=1)
    check_integer("seed", seed)
    if clip is not None:
        check_number("clip", clip, low=0, low_open=True)
    check_batches(public, "public")
    if not is_whole(public):
        raise TypeError("public must be data that can be read twice: a data set, a loader of one or a list of batches.")
    names = parameter_names(model, parameters)
    own = dict(model.named_parameters())
    total = sum(own[name].numel() for name in names)
    if not reads_alike(public):
        warnings.warn(
            "the public data read differently each time (random augmentation), so whether private examples are among "
            "them cannot be checked by content: make sure that they are not, or pass plain data.",
            stacklevel=2,
        )
    directions = _subspace(total, subspace, max_dimensions, seed)
    bring = bring_to(model, transfer)

    def gradients() -> Iterator[tuple[Tensor, Tensor]]:
        sizes = [1]
        for part in parts_of(map(bring, as_loader(public, shuffle=False)), sizes):
            found, p = label_gradients(model, part, names)
            if parameters == "head" and sizes == [1]:
                check_head(model, p.shape[1])
            sizes[0] = part_size(model, names, p.shape[1])
            yield _in(directions, found).cpu().double(), p.cpu().double()

    model = copied(model)  # a forward pass may change buffers
    with scoring_context(model), evaluating(model):
        curvature = _damped(gradients(), damping)
        found = PublicCurvature(torch.linalg.cholesky(curvature), 1.0 if clip is None else clip, names, directions)
        if clip is None:
            clip = _half_median(gradients(), found, seed)
    known = [digest for digest, _ in all_ids(public) or ()]
    return PublicCurvature(found.cholesky, float(clip), names, directions, frozenset(known), is_ambiguous(known))


def _subspace(parameters: int, subspace: int | None, most: int, seed: int) -> Subspace | None:
    if subspace is not None:
        check_integer("subspace", subspace, low=1, high=parameters, hint="It is a number of directions.")
    dimensions = parameters if subspace is None else subspace
    if dimensions > most:
        raise ValueError(
            f"{dimensions} dimensions are more than max_dimensions={most}, and a matrix of {dimensions}² numbers is "
            "needed: pass subspace=k or fewer parameters."
        )
    return None if subspace is None else Subspace.draw(parameters, subspace, seed)


def _in(directions: Subspace | None, gradients: Tensor) -> Tensor:
    return gradients if directions is None else directions.project(gradients)


def _damped(found: Iterator[tuple[Tensor, Tensor]], damping: float) -> Tensor:
    """``H + λI``: ``diag p − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ``, so H is a mean of squared gradients over labels."""
    matrix, examples = torch.zeros(()), 0
    for gradients, p in found:
        scaled = (p.sqrt().unsqueeze(-1) * gradients).flatten(0, 1)
        matrix = matrix + scaled.mT @ scaled
        examples += len(p)
    if not examples:
        raise ValueError("public holds no batch: there is no curvature without public examples.")
    matrix = matrix / examples
    mean = float(matrix.trace()) / len(matrix)
    if not mean > 0:
        raise ValueError(
            "the curvature on the public data is 0: the model's softmax there does not depend on these parameters, or "
            "is saturated. Pass other parameters, or public data that the model is less sure of."
        )
    return matrix + damping * mean * torch.eye(len(matrix), dtype=torch.float64)


def _half_median(found: Iterator[tuple[Tensor, Tensor]], curvature: PublicCurvature, seed: int) -> float:
    """Half the median norm of public examples' whitened gradients, with labels drawn from the softmax."""
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for gradients, p in found:
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        norms.append(curvature.whiten(gradients[torch.arange(len(labels)), labels]).norm(dim=1))
    found_clip = float(torch.cat(norms).median()) / 2
    if not 0 < found_clip < float("inf"):
        raise ValueError(
            f"half the median norm of the public gradients is {found_clip:g}, which cannot be a clipping norm: the "
            "model is sure of most public examples. Pass clip=, or public data that it is less sure of."
        )
    return found_clip
