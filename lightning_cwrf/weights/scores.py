"""Weight scores: how much each weight matters for privacy (Eq. 4 with Eq. 2) and for accuracy (Eq. 2).

Equations are those of "Learnability and Privacy Vulnerability Are Entangled in a Few Critical Weights" (CWRF, ICLR
2026). Everything here works on copies: the model, its buffers, gradients and mode and the caller's random state are
the same before and after. Scores are computed in the weights' own precision, whatever surrounds the call: not under an
outer ``torch.autocast``, ``no_grad`` or ``inference_mode``.

Three choices that the equations leave open. Eq. 2 is taken per batch, as in Algorithm 1: the absolute value is that of
the batch's mean gradient, not the mean of the examples' absolute gradients. The divergence of Eq. 4 is
KL(vanilla ‖ θ'), with the vanilla model's outputs as the target. Both models run in eval mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import check_no_probabilities, check_targets, classification_step
from lightning_cwrf.data import Batches, OverlapCheck, as_loader, bring_to, cycle
from lightning_cwrf.files import load_tensors, save_tensors
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.descent import TwoBatches, accumulate, undisturbed
from lightning_cwrf.weights.descent import trainable_parameters as trainable_parameters  # it has always been here too
from lightning_cwrf.weights.vanilla import VanillaSource, load_vanilla

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVS = nn.modules.conv._ConvNd
_KIND = "lightning_cwrf.Scores/1"


def learnability_scores(
    model: nn.Module,
    members: Batches,
    *,
    steps: int = 30,
    lr: float = 1e-3,
    transfer: Callable[[Any], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Score each weight by its importance for the members' loss: Eq. 2, first-order Taylor (Molchanov et al. 2019).

    Args:
        model: a classifier; see :func:`~lightning_cwrf.classification.classification_step` for what it may return.
        members: batches of training examples (an iterable, begun again when it runs out), a loader or a dataset.
        steps: T, the number of batches.
        lr: η_e, the rate of the plain SGD step on the copy after each batch. The paper does not state its value.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        on_step: called with the number of steps done, for a progress bar.
        batch_size: examples in a batch. Published: 256. Loaders and datasets are read in batches of so many; ready
            batches, of an iterable or of a batch sampler of your own, are taken as they are.

    Returns:
        One non-negative float32 tensor per trainable parameter that the loss reaches in any step, by name and of its
        shape. A tied parameter counts once. A warning names those that the loss does not reach, such as an averaged
        copy of the weights inside the module: they are no weights of the model that is attacked.

    Raises:
        TypeError: settings of the wrong type, no module, or one that cannot be copied.
        ValueError: bad settings, an empty loader, labels out of range, or logits that are not finite.

    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> scores = learnability_scores(nn.Linear(4, 3), data, steps=2)
    >>> {name: tuple(score.shape) for name, score in scores.items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    check_scoring(0.0, steps, lr)
    check_integer("batch_size", batch_size, low=1)
    with undisturbed(model):
        bring = bring_to(model, transfer)

        def begin() -> Callable[[nn.Module], Tensor]:
            batches = cycle(as_loader(members, shuffle=True, batch_size=batch_size), "members")

            def objective(work: nn.Module) -> Tensor:
                logits, targets = classification_step(work, bring(next(batches)))
                return F.cross_entropy(logits.float(), targets)

            return objective

        return accumulate(model, begin, steps, lr, on_step)


def privacy_vulnerability_scores(
    model: nn.Module,
    vanilla: VanillaSource,
    members: Batches,
    nonmembers: Batches,
    *,
    lam: float = 0.7,
    steps: int = 30,
    lr: float = 1e-3,
    transfer: Callable[[Any], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Score each weight by its privacy vulnerability: Eq. 2 accumulated along Eq. 4 (CWRF, Algorithm 1, lines 1-10).

    Each step takes a member batch (x_tr, y_tr) and a reference batch x_re, and on a copy θ' of the model's weights::

        L = (1-λ) · CE(f(x_tr; θ'), y_tr) + λ · KL(softmax f(x_re; θ_vn) ‖ softmax f(x_re; θ'))
        g = ∇L;   φ += |g ⊙ θ'|;   θ' -= η_e · g

    Both models run in eval mode, so that dropout adds no noise and BatchNorm reads its own running statistics.

    Args:
        model: the finished (unprotected) classifier.
        vanilla: θ_vn in any form :func:`~lightning_cwrf.weights.vanilla.load_vanilla` takes.
        members: batches the model was trained on: an iterable of batches (begun again when it runs out), a loader or
            a dataset.
        nonmembers: batches it never saw (D_re), likewise.
        lam: λ in [0, 1]. Published: 0.7 (CIFAR-10, CINIC-10), 0.9 (CIFAR-100).
        steps: T. Published: 30, with batches of 256.
        lr: η_e. Not stated in the paper.
        transfer: applied to each batch before its tensors go to the model's device and precision.
        on_step: called with the number of steps done, for a progress bar.
        batch_size: examples in a batch. Published: 256. Loaders and datasets are read in batches of so many; ready
            batches, of an iterable or of a batch sampler of your own, are taken as they are.

    Returns:
        One non-negative float32 tensor per trainable parameter, as of :func:`learnability_scores`.

    Raises:
        TypeError: settings of the wrong type, no module, or one that cannot be copied.
        ValueError: bad settings; an empty loader; an example among both the members and the reference data that were
            drawn (among all of them, where they come as loaders, datasets or lists); vanilla weights that do not fit;
            labels out of range; logits that are not finite, or are probabilities.

    >>> members = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> reference = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> scores = privacy_vulnerability_scores(nn.Linear(4, 3), nn.Linear(4, 3), members, reference, steps=2)
    >>> bool((scores["weight"] >= 0).all())
    True
    """
    check_scoring(lam, steps, lr)
    check_integer("batch_size", batch_size, low=1)
    with undisturbed(model):
        overlap = OverlapCheck(members, nonmembers, "nonmembers")
        bring = bring_to(model, transfer)

        def begin() -> Callable[[nn.Module], Tensor]:
            answered = _vanilla_outputs(vanilla, model, nonmembers, bring, steps, batch_size)
            member_batches = cycle(as_loader(members, shuffle=True, batch_size=batch_size), "members")
            run = TwoBatches()
            first = iter([True])

            def objective(work: nn.Module) -> Tensor:
                member, (reference, vanilla_logits, reference_targets) = next(member_batches), next(answered)
                overlap.see(member, reference)
                logits, targets, reference_logits = run(work, bring(member), bring(reference))
                check_no_probabilities(logits, "members")
                if next(first, False):  # the copy's weights are still the model's
                    _warn_if_swapped(logits, targets, reference_logits, reference_targets)
                return pve_loss(logits, targets, reference_logits, vanilla_logits, lam=lam)

            return objective

        return accumulate(model, begin, steps, lr, on_step)


def _vanilla_outputs(
    vanilla: VanillaSource,
    model: nn.Module,
    nonmembers: Batches,
    bring: Callable[[Any], Any],
    steps: int,
    batch_size: int,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Reference batches with the vanilla model's logits and the targets, for ever.

    Where the batches of all steps are smaller than the weights, they are read first and the vanilla model's weights
    are given up, because gradients and scores come to stand in memory beside them.
    """
    batches = cycle(as_loader(nonmembers, shuffle=True, batch_size=batch_size), "nonmembers")
    start = copied(model, load_vanilla(vanilla, model)).eval()

    @torch.no_grad()
    def answer(batch: Any) -> tuple[Any, Tensor, Tensor]:
        return batch, *classification_step(start, bring(batch))

    first = answer(next(batches))
    if steps * _bytes(first) < sum(p.numel() * p.element_size() for p in model.parameters()):
        held = [first, *(answer(next(batches)) for _ in range(steps - 1))]
        del start, answer
        yield from held
        return
    yield first
    for batch in batches:
        yield answer(batch)


def _bytes(nest: Any) -> float:
    """The memory of a nest of tensors; infinite where something else may be large."""
    if isinstance(nest, Tensor):
        return nest.numel() * nest.element_size()
    if isinstance(nest, (Mapping, tuple, list)):
        return sum(map(_bytes, nest.values() if isinstance(nest, Mapping) else nest))
    return 0 if nest is None or isinstance(nest, (str, int, float)) else math.inf


def pve_loss(
    member_logits: Tensor, targets: Tensor, reference_logits: Tensor, vanilla_logits: Tensor, *, lam: float
) -> Tensor:
    """Eq. 4: ``(1-λ)·CE(member) + λ·KL(softmax vanilla ‖ softmax reference)``, both as batch means, in float32.

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> round(float(pve_loss(z, torch.tensor([1]), z, z, lam=0.5)), 4)  # half of ln 2, and no divergence
    0.3466
    """
    check_targets(member_logits, targets)
    learn = F.cross_entropy(member_logits.float(), targets)
    unlearn = F.kl_div(
        reference_logits.float().log_softmax(-1),
        vanilla_logits.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - lam) * learn + lam * unlearn


def _warn_if_swapped(
    member_logits: Tensor, targets: Tensor, reference_logits: Tensor, reference_targets: Tensor
) -> None:
    """Warn where the model's loss on a member batch is larger than on a reference batch by more than chance."""
    losses = [
        F.cross_entropy(logits.detach().float(), labels, reduction="none")
        for logits, labels in ((member_logits, targets), (reference_logits, reference_targets))
    ]
    if min(map(len, losses)) < 8:
        return
    members, reference = (float(loss.mean()) for loss in losses)
    error = math.sqrt(sum(float(loss.var()) / len(loss) for loss in losses))
    if members - reference > 4 * error:
        warnings.warn(
            f"the model's loss is {members:.3g} on the members and {reference:.3g} on the reference data: it was "
            "trained on the latter. Are members and nonmembers swapped?",
            stacklevel=4,
        )


def score_correlation(a: Mapping[str, Tensor], b: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Pearson correlation of two weight scores by kind of weight, as in Table 1.

    Args:
        a: scores by parameter name.
        b: scores of the same names and shapes.
        model: the model they belong to; it tells the kind of each weight (:func:`weight_kinds`).

    Returns:
        The correlation under ``all`` and under each kind that the model has. It is NaN where one side is constant.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    >>> a = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    >>> {kind: round(r, 3) for kind, r in score_correlation(a, a, model).items()}
    {'all': 1.0, 'conv': 1.0, 'linear': 1.0}
    """
    kinds = weight_kinds(model)
    for name in set(a) | set(b):
        if name not in a or name not in b or a[name].shape != b[name].shape or name not in kinds:
            raise ValueError(
                f"the scores of {name!r} are missing on one side, differ in shape, or are not the model's."
            )
    groups: dict[str, list[str]] = {"all": list(a)}
    for name in a:
        groups.setdefault(kinds[name], []).append(name)
    return {kind: _pearson([a[n] for n in names], [b[n] for n in names]) for kind, names in groups.items()}


def weight_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each trainable parameter, by name: conv, linear, attention+MLP, norm, embedding or other.

    Linear layers inside a transformer block (the parent of an attention layer) are attention+MLP, as in Table 1.

    >>> weight_kinds(nn.TransformerEncoderLayer(8, 2, 16))["linear1.weight"]
    'attention+MLP'
    """
    modules = dict(model.named_modules())
    attention = {name for name, module in modules.items() if _is_attention(module, name)}
    # The parent of an attention layer is its block; a model that is its own block keeps its head apart.
    blocks = [name.rpartition(".")[0] or name for name in attention]
    if isinstance(model, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        blocks.append("")
    kinds = {}
    for name in trainable_parameters(model):
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        in_block = any(owner_name == block or owner_name.startswith(f"{block}." if block else "") for block in blocks)
        if isinstance(owner, _CONVS):
            kinds[name] = "conv"
        elif isinstance(owner, _NORMS):
            kinds[name] = "norm"
        elif isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            kinds[name] = "embedding"
        elif owner_name in attention or (in_block and isinstance(owner, nn.Linear)):
            kinds[name] = "attention+MLP"
        else:
            kinds[name] = "linear" if isinstance(owner, nn.Linear) else "other"
    return kinds


def check_scoring(lam: float, steps: int, lr: float) -> None:
    """Raise a TypeError or ValueError for settings that cannot score anything."""
    check_number("lam", lam, low=0, high=1, hint="It weighs reference data against members (Eq. 4).")
    check_integer("steps", steps, low=1)
    check_number("lr", lr, low=0)


def save_scores(scores: Mapping[str, Tensor], path: str | PathLike[str]) -> Path:
    """Save scores as safetensors, with a digest.

    >>> from tempfile import mkdtemp
    >>> path = save_scores({"weight": torch.ones(2)}, Path(mkdtemp()) / "scores.safetensors")
    >>> load_scores(path)
    {'weight': tensor([1., 1.])}
    """
    return save_tensors(scores, path, _KIND)


def load_scores(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Load what :func:`save_scores` saved, or any safetensors file of scores by parameter name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else, such as vanilla weights or a mask.
    """
    tensors, kind, _ = load_tensors(path, what="file of scores")
    if kind is not None and kind.startswith("lightning_cwrf.") and kind != _KIND:
        raise ValueError(f"{path} holds no scores but {kind}; PrivacyScoringCallback.save_scores writes them.")
    return tensors


def _is_attention(module: nn.Module, name: str) -> bool:
    # A whole model may be called AttentionNet; only a part of one is judged by the name of its class.
    return isinstance(module, nn.MultiheadAttention) or (name != "" and "attention" in type(module).__name__.lower())


def _pearson(a: list[Tensor], b: list[Tensor]) -> float:
    x = torch.cat([t.detach().flatten().double().cpu() for t in a])
    y = torch.cat([t.detach().flatten().double().cpu() for t in b])
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))
