import pytest
import torch
from torch import nn

from lightning_cwrf.vanilla import capture, load_vanilla, redraw, save_vanilla


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_every_source_gives_the_same_weights(tmp_path):
    model, start = net(), net()
    weights = capture(start)
    save_vanilla(start, tmp_path / "w.safetensors")
    torch.save(start.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": start.state_dict(), "epoch": 0}, tmp_path / "w.ckpt")

    def factory():
        made = net()
        made.load_state_dict(weights)
        return made

    for source in (start, weights, factory, *tmp_path.iterdir(), str(tmp_path / "w.ckpt")):
        assert same(load_vanilla(source, model), weights)


def test_a_capture_is_a_copy():
    model = net()
    weights = capture(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert weights["0.weight"].abs().sum() > 0


def test_tied_weights_save_and_load(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    path = save_vanilla(model, tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other[1].weight = other[0].weight
    assert same(load_vanilla(path, other), capture(model))


def test_redraw_is_reset_parameters_and_draws_nothing_from_the_caller():
    model = net()
    with torch.no_grad():
        model[1].weight.fill_(7)
        model[1].running_mean.fill_(7)
    before, rng = capture(model), torch.get_rng_state()
    with pytest.warns(UserWarning, match="drawn anew"):
        drawn = redraw(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(before, capture(model))
    assert not torch.equal(drawn["0.weight"], before["0.weight"])
    assert drawn["1.weight"].tolist() == [1] * 4
    assert drawn["1.running_mean"].tolist() == [0] * 4


def test_redraw_names_what_it_cannot_draw():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.attn = nn.MultiheadAttention(4, 2)

    with pytest.raises(ValueError, match=r"the parameters of token \(Token\): no reset_parameters"):
        redraw(nn.ModuleDict({"token": Token()}))


class NotPlain:
    pass


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"junk"), "cannot read vanilla weights"),
        (lambda path: torch.save({"state_dict": {"w": NotPlain()}}, path), "cannot read vanilla weights"),
        (lambda path: torch.save([1, 2], path), "holds no state dict"),
    ],
)
def test_files_that_are_no_weights(tmp_path, write, message):
    path = tmp_path / "w.ckpt"
    write(path)
    with pytest.raises(ValueError, match=message):
        load_vanilla(path, net())


def test_damaged_safetensors(tmp_path):
    path = save_vanilla(net(), tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot read vanilla weights"):
        load_vanilla(path, net())


def test_what_does_not_fit_is_named():
    model = net()
    weights = capture(net())
    with pytest.raises(ValueError, match=r"lack '2.bias' \(shape \(2,\)\)"):
        load_vanilla({n: w for n, w in weights.items() if n != "2.bias"}, model)
    with pytest.raises(ValueError, match="have an unknown 'head'"):
        load_vanilla({**weights, "head": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"'2.bias' of shape \(3,\) instead of \(2,\)"):
        load_vanilla({**weights, "2.bias": torch.zeros(3)}, model)
    with pytest.raises(ValueError, match="and 3 more"):
        load_vanilla({}, nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)]))
    with pytest.raises(FileNotFoundError, match="VanillaSnapshotCallback"):
        load_vanilla("nowhere.ckpt", model)
    with pytest.raises(TypeError, match="not int"):
        load_vanilla(3, model)


def test_the_models_own_weights_are_taken_with_a_warning():
    model = net()
    with pytest.warns(UserWarning, match="own present weights"):
        assert same(load_vanilla(capture(model), model), capture(model))
