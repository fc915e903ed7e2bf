"""How alike two weight scores are, by kind of weight (Table 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_cwrf.weights.descent import trainable_parameters

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVS = nn.modules.conv._ConvNd


def score_correlation(a: Mapping[str, Tensor], b: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Pearson correlation of two weight scores by kind of weight, as in Table 1.

    Args:
        a: scores by parameter name.
        b: scores of the same names and shapes.
        model: the model they belong to, for the kind of each weight (:func:`weight_kinds`).

    Returns:
        The correlation under ``all`` and under each kind that the model has; NaN where one side is constant.

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
    # The parent of an attention layer is its block, unless that is the whole model, whose head is not part of a block.
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


def _is_attention(module: nn.Module, name: str) -> bool:
    # A whole model may be called AttentionNet; only parts of a model are classified by the name of their class.
    return isinstance(module, nn.MultiheadAttention) or (name != "" and "attention" in type(module).__name__.lower())


def _pearson(a: list[Tensor], b: list[Tensor]) -> float:
    x = torch.cat([t.detach().flatten().double().cpu() for t in a])
    y = torch.cat([t.detach().flatten().double().cpu() for t in b])
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))
