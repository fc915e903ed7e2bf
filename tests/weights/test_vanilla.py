import threading

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_cwrf import CriticalRewindCallback, PrivacyScoringCallback, WeightMask
from lightning_cwrf.weights import load_scores, save_scores
from lightning_cwrf.weights.copies import copied
from lightning_cwrf.weights.vanilla import capture, load_vanilla, redraw, save_vanilla


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
    with pytest.warns(UserWarning, match="drawn again"):
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

    with pytest.raises(ValueError, match=r"the parameters of token \(Token: token\): no reset_parameters"):
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
    with pytest.warns(UserWarning, match="own current weights"):
        assert same(load_vanilla(capture(model), model), capture(model))


# --- Files: told apart by content, checked when read.


@pytest.mark.parametrize("name", ["init.safetensors", "init.pt", "init.ckpt", "init"])
def test_a_file_is_read_by_its_content_under_any_name(tmp_path, name):
    start, model = net(), net()
    assert same(load_vanilla(save_vanilla(start, tmp_path / name), model), capture(start))
    torch.save(start.state_dict(), tmp_path / f"torch-{name}")
    torch.save(start.state_dict(), tmp_path / f"old-{name}", _use_new_zipfile_serialization=False)
    for path in (tmp_path / f"torch-{name}", tmp_path / f"old-{name}"):
        assert same(load_vanilla(path, model), capture(start))


@pytest.mark.parametrize("length", range(1, 200, 2))
def test_the_length_of_a_files_header_does_not_make_it_a_pickle(tmp_path, length):
    model = nn.Module()
    model.add_module("n" * length, nn.Linear(3, 2))
    path = save_vanilla(model, tmp_path / "w")
    with pytest.warns(UserWarning, match="own current weights"):
        assert same(load_vanilla(path, model), capture(model))


def test_a_pickle_of_the_old_format_is_read(tmp_path):
    model = net()
    torch.save(model.state_dict(), tmp_path / "w", _use_new_zipfile_serialization=False)
    assert same(load_vanilla(tmp_path / "w", net()), capture(model))


def test_files_of_other_programs_and_of_early_versions_have_no_digest_and_are_read(tmp_path):
    start = net()
    safetensors.torch.save_file(capture(start), tmp_path / "w.safetensors")
    assert same(load_vanilla(tmp_path / "w.safetensors", net()), capture(start))


def test_every_flipped_bit_of_the_weights_is_found(tmp_path):
    path = save_vanilla(net(), tmp_path / "w.safetensors")
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for position in range(begin, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read vanilla weights .* is damaged"):
            load_vanilla(path, net())


def test_a_truncated_file_of_any_length_is_an_error(tmp_path):
    path = save_vanilla(net(), tmp_path / "w.safetensors")
    whole = path.read_bytes()
    for length in (0, 3, 8, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot read vanilla weights"):
            load_vanilla(path, net())


def test_scores_and_masks_are_not_taken_for_weights_nor_the_reverse(tmp_path):
    model = nn.Linear(3, 2)
    like = {n: p.detach().abs() for n, p in model.named_parameters()}
    scores = save_scores(like, tmp_path / "scores.safetensors")
    mask = WeightMask({n: v > 0 for n, v in like.items()}).save(tmp_path / "mask.safetensors")
    weights = save_vanilla(model, tmp_path / "weights.safetensors")
    for path, kind in ((scores, "Scores"), (mask, "WeightMask")):
        with pytest.raises(ValueError, match=f"holds lightning_cwrf.{kind}/1 instead of vanilla weights"):
            load_vanilla(path, nn.Linear(3, 2))
    for path, kind in ((weights, "Vanilla"), (mask, "WeightMask")):
        with pytest.raises(ValueError, match=f"holds lightning_cwrf.{kind}/1 instead of scores"):
            load_scores(path)
    for path, kind in ((weights, "Vanilla"), (scores, "Scores")):
        with pytest.raises(ValueError, match=f"is not a weight mask, it holds lightning_cwrf.{kind}/1"):
            WeightMask.load(path)


@pytest.mark.parametrize("said", [{"global_step": 12, "epoch": 0}, {"epoch": 3}])
def test_a_checkpoint_from_after_training_is_refused_and_its_state_dict_is_accepted(tmp_path, said):
    start = net()
    torch.save({"state_dict": start.state_dict(), **said}, tmp_path / "w.ckpt")
    for source in (tmp_path / "w.ckpt", {"state_dict": start.state_dict(), **said}):
        with pytest.raises(ValueError, match=r"is a checkpoint from after training \((global_step is 12|epoch is 3)\)"):
            load_vanilla(source, net())
    taken = torch.load(tmp_path / "w.ckpt", weights_only=True)["state_dict"]
    assert same(load_vanilla(taken, net()), capture(start))
    torch.save({"state_dict": start.state_dict(), "global_step": 0, "epoch": 0}, tmp_path / "w.ckpt")
    assert same(load_vanilla(tmp_path / "w.ckpt", net()), capture(start))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_buffers_may_be(value):
    model, weights = net(), capture(net())
    weights["0.weight"][1, 1] = value
    with pytest.raises(ValueError, match=r"the vanilla weights '0\.weight' hold NaN or infinite values"):
        load_vanilla(weights, model)
    with pytest.raises(ValueError, match=r"the vanilla weights for '0\.weight' hold NaN"):
        WeightMask({"0.weight": torch.ones(4, 4).bool()}).rewind_(model, weights)
    model.register_buffer("hidden", torch.full((2,), float("-inf")))
    weights = capture(net()) | {"hidden": torch.full((2,), value)}
    assert not torch.isfinite(load_vanilla(weights, model)["hidden"]).any()


def test_errors_never_advise_to_unpickle(tmp_path):
    torch.save({"state_dict": {"w": NotPlain()}}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"it holds a \S*NotPlain\. Only tensors and plain values") as error:
        load_vanilla(tmp_path / "w.ckpt", net())
    assert "weights_only" not in str(error.value)
    (tmp_path / "w.pt").write_bytes(b"PK\x03\x04 junk")
    with pytest.raises(ValueError, match="it is damaged, or holds objects of other types"):
        load_vanilla(tmp_path / "w.pt", net())


def test_factories_that_are_none():
    with pytest.raises(TypeError, match=r"cannot be called without arguments \(missing a required argument: 'width'\)"):
        load_vanilla(lambda width: nn.Linear(width, 2), net())
    with pytest.raises(TypeError, match="must return an untrained module, not dict"):
        load_vanilla(dict, net())
    for nothing in (None, 3, 0.5):
        with pytest.raises(TypeError, match="a factory of modules or 'redraw', not"):
            PrivacyScoringCallback([], nothing)
    with pytest.raises(TypeError, match="not int"):
        CriticalRewindCallback(vanilla=3)


# --- Redrawing a model that is partly frozen, and copies.


def test_redraw_keeps_what_is_frozen():
    model = nn.Sequential(net(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(7)
    with pytest.warns(UserWarning, match="drawn again"):
        drawn = redraw(model)
    before = capture(model)
    for name in drawn:
        frozen = name.startswith("0.") or name == "1.bias"
        assert torch.equal(drawn[name], before[name]) == frozen, name


def test_redraw_asks_nothing_of_frozen_layers_without_reset_parameters():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.full((3,), 5.0), requires_grad=False)

    with pytest.warns(UserWarning, match="drawn again"):
        assert redraw(nn.Sequential(Token(), nn.Linear(2, 2)))["0.token"].tolist() == [5, 5, 5]


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Sequential cannot be copied \(attribute '0.lock' of type lock: "):
        copied(model)


def test_a_copy_with_other_weights_shares_their_memory_and_is_the_model_otherwise():
    model, weights = net(), capture(net())
    twin = copied(model, weights)
    assert same(capture(twin), weights)
    assert twin[0].weight.data_ptr() == weights["0.weight"].data_ptr()
    assert twin[1].running_mean.data_ptr() != weights["1.running_mean"].data_ptr()
    assert not same(capture(model), weights)
    half = copied(model.bfloat16(), weights)
    assert half[0].weight.dtype == torch.bfloat16


def test_a_model_that_saves_its_weights_in_a_form_of_its_own_is_copied_by_its_own_loading():
    class Doubled(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}doubled"] = destination.pop(f"{prefix}weight").detach() * 2

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}doubled") / 2
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model, other = Doubled(2, 2), Doubled(2, 2)
    assert torch.equal(copied(model, capture(other)).weight, other.weight)


def test_weights_without_values_or_of_another_kind_are_refused():
    model, weight = nn.Linear(2, 2), torch.ones(2, 2)
    for other, said in ((weight.int(), "torch.int32"), (weight.to("meta"), "torch.float32 on the meta device")):
        with pytest.raises(ValueError, match=f"vanilla weights have 'weight' as {said}"):
            load_vanilla({**capture(nn.Linear(2, 2)), "weight": other}, model)
