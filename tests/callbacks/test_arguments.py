"""Arguments of the callbacks: defaults, and errors before the first step."""

import pytest
import torch

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    VanillaSnapshotCallback,
)
from lightning_cwrf.weights.vanilla import capture, save_vanilla
from tests.callbacks.helpers import cwrf, finished
from tests.helpers import Classifier, loader, trainer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: cwrf("nowhere.safetensors"), "no vanilla weights at nowhere.safetensors"),
        (lambda v: cwrf({**v, "net.5.bias": torch.zeros(3)}), r"'net.5.bias' of shape \(3,\) instead of \(10,\)"),
        (lambda v: cwrf({n: t for n, t in v.items() if n != "net.5.weight"}), "lack 'net.5.weight'"),
        (lambda v: [PrivacyScoringCallback(loader(60, 90), v)], "are members"),
        (lambda v: [PrivacyScoringCallback([], v)], "nonmembers holds no batch"),
        (
            lambda v: [CriticalRewindCallback(scores={"a": torch.ones(2)}, vanilla=v, hold=False)],
            "are no such parameters",
        ),
    ],
)
def test_bad_data_is_an_error_before_the_first_step(make, message):
    model, vanilla = finished()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(callbacks=make(vanilla)).fit(model, loader(0, 64))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_bad_settings_raise():
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\], not 3"):
        CriticalRewindCallback(rate=3)
    with pytest.raises(ValueError, match="not both"):
        CriticalRewindCallback(scores={}, mask="m")
    with pytest.raises(ValueError, match="lam must be a number in"):
        PrivacyScoringCallback([], "redraw", lam=2)


def test_files_of_scores_and_masks_are_checked_before_the_first_step(tmp_path):
    _, vanilla = finished()
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"x" * 64)
    weights = save_vanilla(vanilla, tmp_path / "vanilla.safetensors")
    cases = [
        ({"scores": junk}, "junk.safetensors is no file of scores"),
        ({"scores": weights}, "holds lightning_cwrf.Vanilla/1 instead of scores"),
        ({"mask": junk}, "junk.safetensors is no weight mask"),
        ({"mask": weights}, "is not a weight mask, it holds lightning_cwrf.Vanilla/1"),
        ({"scores": {"net.5.bias": torch.ones(3)}}, "or have another shape"),
    ]
    for arguments, message in cases:
        callbacks = [CriticalRewindCallback(vanilla=vanilla, **arguments), GradientMaskCallback()]
        with pytest.raises(ValueError, match=message):
            trainer(callbacks=callbacks).fit(finished()[0], loader(0, 32))


def test_scores_that_lack_parameters_are_taken_with_a_warning():
    model, vanilla = finished()
    rewind = CriticalRewindCallback(rate=0.5, scores={"net.5.bias": torch.rand(10)}, vanilla=vanilla)
    with pytest.warns(UserWarning, match=r"the scores lack 5 of 6 trainable parameters \(net.0.bias, net.0.weight, "):
        trainer(callbacks=[rewind, GradientMaskCallback()], max_epochs=1).fit(model, loader(0, 32))
    assert (rewind.mask.count, rewind.mask.total) == (5, 10)


def test_scores_that_are_no_tensors_or_all_zero():
    weights = capture(Classifier())
    names = [name for name, _ in Classifier().named_parameters()]
    with pytest.raises(TypeError, match=r"scores of 'net\.0\.weight' must be a tensor, not a ndarray"):
        CriticalRewindCallback(scores={name: weights[name].numpy() for name in names})
    scores = {name: torch.zeros_like(weights[name]) for name in names}
    callbacks = [CriticalRewindCallback(scores=scores, vanilla=weights), GradientMaskCallback()]
    with pytest.warns(UserWarning, match="all scores are 0"):
        trainer(callbacks=callbacks, max_epochs=1).fit(Classifier(), loader(0, 16))


@pytest.mark.parametrize("data", [None, torch.ones(3), 3])
def test_data_that_are_none_are_an_error_where_they_are_given(data):
    with pytest.raises(TypeError, match="nonmembers: expected a DataLoader, a Dataset or an iterable of batches"):
        PrivacyScoringCallback(data, "redraw")
    if data is not None:
        with pytest.raises(TypeError, match="members: expected a DataLoader"):
            PrivacyScoringCallback([], "redraw", members=data)
    with pytest.raises(TypeError, match="nonmembers: expected a DataLoader, a Dataset or an iterable of batches"):
        MIAAuditCallback(data)


def test_words_that_name_no_split_are_an_error_where_they_are_given():
    for given in ({"nonmembers": "data"}, {"nonmembers": [], "members": "data"}):
        with pytest.raises(ValueError, match="members must be 'train' or 'val' or 'test' or 'predict', not 'data'"):
            PrivacyScoringCallback(vanilla="redraw", **given)


def test_defaults_are_the_published_settings():
    """λ = 0.7, 30 batches of 256; the rate is in the middle of the searched range; everything else is off."""
    assert PrivacyScoringCallback([], "redraw").settings() == {
        "kind": "privacy", "lam": 0.7, "steps": 30, "lr": 1e-3, "batch_size": 256, "mode": "eval", "vanilla": "redraw"
    }  # fmt: skip
    assert CriticalRewindCallback().settings() == {
        "rate": 0.03, "per_layer": False, "scores": None, "values": "initial", "hold": True, "batchnorm": "keep",
        "seed": None, "vanilla": None, "structured": False
    }  # fmt: skip
    assert GradientMaskCallback().settings() == {"tune": "rest", "mask": None}
    assert VanillaSnapshotCallback().overwrite is False


def test_vanilla_weights_are_a_setting_of_the_rewind_where_it_uses_them():
    assert CriticalRewindCallback(vanilla="redraw").settings()["vanilla"] == "redraw"
    with pytest.raises(ValueError, match="vanilla has the initial values, and values is 'zero': leave it out here"):
        CriticalRewindCallback(vanilla="redraw", values="zero")
