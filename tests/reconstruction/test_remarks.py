"""Remarks on what makes an audit weaker than it looks: each where it belongs, and not where it does not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_cwrf import ReconstructionResult, audit_reconstruction
from lightning_cwrf.reconstruction import claims, kkt_residual
from lightning_cwrf.reconstruction.remarks import labels_p_value, near_copies, of_attack, of_layers
from tests.reconstruction.test_audit import audited, changed, network, side


def warned(match, tmp_path, model=None, **given):
    """A remark is a warning, and is printed, and is in the saved file."""
    with pytest.warns(UserWarning, match=match):
        result = audited(model, **given)
    assert all(remark in str(result) for remark in result.remarks)
    loaded = ReconstructionResult.load(result.save(tmp_path / "result.json"))
    assert loaded.remarks == result.remarks
    return next(remark for remark in result.remarks if match in remark)


def with_layer(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), layer, nn.ReLU(), nn.Linear(8, 3, bias=False))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.2), nn.AlphaDropout(0.2)])
def test_layers_that_compute_otherwise_in_training(tmp_path, layer):
    said = warned("compute otherwise in training", tmp_path, with_layer(layer), weight_decay=1e-3)
    assert f"1 ({type(layer).__name__})" in said
    assert "finds nothing shows nothing" in said


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.0), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8), nn.Identity()]
)
def test_other_layers_are_no_remark(layer):
    assert of_layers(with_layer(layer)) == []


def test_many_layers_are_counted():
    (said,) = of_layers(nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(5)]))
    assert "2 (BatchNorm1d) and 2 more" in said
    assert of_layers(nn.InstanceNorm2d(4, track_running_stats=True))


def trained(norm):
    """A network at a stationary point of cross-entropy with weight decay, or where BatchNorm keeps it from one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), *norm, nn.ReLU(), nn.Linear(20, 2, bias=False))
    x, y = side(12, 1, inputs=30, classes=2).tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


@pytest.mark.slow
def test_the_equation_holds_without_batch_statistics_alone():
    assert kkt_residual(*trained([])).residual < 0.1
    assert kkt_residual(*trained([nn.BatchNorm1d(20)])).residual > 0.5


def test_an_equation_that_the_members_do_not_satisfy_is_no_matter_of_steps():
    result = audited(network())  # untrained
    assert result.truth_residual > 0.5
    assert any("does not hold for the members themselves" in remark for remark in result.remarks)
    assert not any("Pass more steps=" in remark for remark in result.remarks)
    assert "more steps= do not help" in str(result)
    (said,) = of_attack(0.3, 0.4, 1.0)
    assert "Pass more steps=" in said
    assert of_attack(0.01, 0.4, 1.0) == []


def test_near_copies(tmp_path):
    x, y = side(10, 1).tensors
    rest = side(20, 2)
    doubled = TensorDataset(torch.cat([x, x + 1e-6]), torch.cat([y, y]))
    pool = torch.cat([doubled.tensors[0], rest.tensors[0]]).double()
    assert len(claims(x.double() + 1e-3, pool)) == 0  # all members are found, and none can be claimed
    assert near_copies(pool).tolist() == [True] * 20 + [False] * 20
    said = warned("have a near copy", tmp_path, members=doubled, nonmembers=rest)
    assert "20 of the 20 members and 0 of the 20 non-members" in said
    assert "undercounted" in said
    both = torch.cat([rest.tensors[0], rest.tensors[0] * (1 + 1e-5)])
    assert bool(near_copies(torch.cat([pool[:20], both])).all())  # also where every example has one


def test_usual_neighbours_are_no_near_copies():
    for seed in range(20):
        assert not near_copies(side(60, seed).tensors[0]).any()
    assert not any("near copy" in remark for remark in audited().remarks)


def test_other_proportions_of_labels(tmp_path):
    members, others = changed(side(10, 1), y=torch.ones(10).long()), changed(side(20, 2), y=torch.arange(20) % 2 * 2)
    said = warned("in different proportions", tmp_path, members=members, nonmembers=others)
    assert "p = 0.001; of class 1 are 100% of the members and 0% of the non-members" in said
    same = audited(members=side(9, 1), nonmembers=side(18, 2))
    assert not any("proportions" in remark for remark in same.remarks)


def test_the_test_of_the_labels_holds_its_level_and_finds_many_small_classes():
    draw = np.random.default_rng(1)
    found = []
    for _ in range(400):
        labels = torch.from_numpy(draw.integers(10, size=60))
        found.append(labels_p_value(labels[:20], labels[20:]))
    share = torch.tensor(found)
    assert float((share <= 0.01).double().mean()) < 0.03  # 0.01, and three standard errors
    assert float((share <= 0.2).double().mean()) == pytest.approx(0.2, abs=0.07)
    pairs = torch.arange(20).repeat_interleave(2)
    assert labels_p_value(pairs[:20], pairs[20:]) <= 0.01  # no class is significant by itself


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="probabilities"):
        audit_reconstruction(
            nn.Sequential(network(), nn.Softmax(-1)), members=side(6, 1), nonmembers=side(8, 2), steps=1, weight_decay=1
        )
