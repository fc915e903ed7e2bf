"""Correlation of scores, by kind of weight."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from lightning_cwrf.weights.correlation import score_correlation, weight_kinds
from tests.oracles import formulas


def test_kinds_and_correlation_of_a_vit():
    vit = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=10)
    kinds = weight_kinds(vit)
    assert kinds["conv_proj.weight"] == "conv"
    assert kinds["encoder.layers.encoder_layer_0.mlp.0.weight"] == "attention+MLP"
    assert kinds["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"] == "attention+MLP"
    assert kinds["encoder.layers.encoder_layer_1.self_attention.out_proj.bias"] == "attention+MLP"
    assert kinds["encoder.ln.weight"] == "norm"
    assert kinds["heads.head.weight"] == "linear"
    assert kinds["class_token"] == "other"
    a = {name: torch.rand_like(p) for name, p in vit.named_parameters()}
    b = {name: torch.rand_like(p) + a[name] for name, p in vit.named_parameters()}
    found = score_correlation(a, b, vit)
    for kind in set(kinds.values()) | {"all"}:
        names = [n for n in kinds if kind in ("all", kinds[n])]
        flat = [[v for n in names for v in s[n].flatten().tolist()] for s in (a, b)]
        assert found[kind] == pytest.approx(formulas.pearson(*flat), abs=1e-9), kind


def test_head_of_a_flat_attention_model_is_linear():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.attn = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 3)

    kinds = weight_kinds(Flat())
    assert kinds["head.weight"] == "linear"
    assert kinds["attn.out_proj.weight"] == "attention+MLP"
    assert kinds["embed.weight"] == "embedding"


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)


class AttentionNet(nn.Module):
    """Told by its parts: a name with "attention" in it makes no block of the whole model."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attention": SelfAttention(), "mlp": nn.Linear(4, 4), "drop": nn.PReLU()})
        self.block2 = nn.Linear(4, 4)
        self.bag = nn.EmbeddingBag(3, 4)
        self.up = nn.ConvTranspose1d(1, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(1, 4), nn.RMSNorm(4)])


def test_kinds_by_hand():
    kinds = weight_kinds(AttentionNet())
    assert kinds["block.mlp.weight"] == "attention+MLP"
    assert kinds["block.drop.weight"] == "other"
    assert kinds["block2.weight"] == "linear"  # its name only begins as the block's
    assert kinds["bag.weight"] == "embedding"
    assert kinds["up.weight"] == "conv"
    assert {kinds[name] for name in kinds if name.startswith("norms.")} == {"norm"}
    # A linear layer of an attention layer of the user's own lies inside its block too.
    assert kinds["block.attention.query.weight"] == "attention+MLP"
    for layer in (nn.TransformerDecoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 16)):
        kinds = weight_kinds(layer)
        assert {kinds[name] for name in kinds if not name.startswith("norm")} == {"attention+MLP"}
        assert kinds["norm1.weight"] == "norm"


def test_correlation_refuses_scores_of_another_model():
    model = nn.Linear(2, 2)
    both = {"weight": torch.rand(2, 2), "bias": torch.rand(2)}
    weight = {"weight": both["weight"]}
    for a, b, name in (
        (weight, both, "bias"),
        (both, weight, "bias"),
        (weight, {"weight": torch.rand(4, 1)}, "weight"),
        ({"other": torch.rand(2)}, {"other": torch.rand(2)}, "other"),
    ):
        with pytest.raises(ValueError, match=f"the scores of '{name}' are missing"):
            score_correlation(a, b, model)
    assert score_correlation(weight, weight, model) == {"all": pytest.approx(1), "linear": pytest.approx(1)}
