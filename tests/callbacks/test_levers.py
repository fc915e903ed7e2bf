"""The levers of rewinding: which values, held or not, and BatchNorm's statistics afterwards."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    export,
)
from lightning_cwrf.weights.redraw import fresh_weights
from tests.callbacks.helpers import assert_frozen, finished, run_with_resume
from tests.helpers import Classifier, loader, trainer

LEVERS = [
    {"values": "fresh"},
    {"values": "fresh", "seed": 3},
    {"values": "zero"},
    {"values": "trained"},
    {"hold": False},
    {"values": "fresh", "hold": False},
    {"values": "zero", "hold": False},
    {"batchnorm": "reset"},
    {"batchnorm": "estimate"},
    {"values": "trained", "batchnorm": "reset"},
]


class Start(Callback):
    """The module's state after the rewind, before the first step. It must come after the callbacks of CWRF."""

    state = None

    def on_train_start(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def levers(vanilla, **rewind):
    callbacks = [
        PrivacyScoringCallback(loader(100, 140), vanilla, steps=2),
        CriticalRewindCallback(rate=0.2, **rewind),
        GradientMaskCallback(),
    ]
    return [each for each in callbacks if rewind.get("hold", True) or not isinstance(each, GradientMaskCallback)]


def hardened(epochs=2, **rewind):
    model, vanilla = finished()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callbacks = [*levers(vanilla, **rewind), start := Start()]
    run = trainer(max_epochs=epochs, callbacks=callbacks)
    run.fit(model, loader(0, 64))
    return model, callbacks, before, vanilla, start.state, run


def expected(values, model, before, vanilla, seed=0):
    source = {"initial": vanilla, "trained": before, "zero": {n: torch.zeros_like(v) for n, v in before.items()}}
    return fresh_weights(model, seed, vanilla) if values == "fresh" else source[values]


@pytest.mark.slow
@pytest.mark.parametrize("rewind", LEVERS, ids=str)
def test_each_lever_sets_the_chosen_weights_alone_and_holds_them_or_not(rewind):
    model, callbacks, before, vanilla, start, _ = hardened(**rewind)
    mask = callbacks[1].mask
    values = expected(rewind.get("values", "initial"), model, before, vanilla, rewind.get("seed", 0))
    moved = 0
    for name, p in model.named_parameters():
        m = mask.masks[name]
        assert torch.equal(start[name][m], values[name][m])
        assert torch.equal(start[name][~m], before[name][~m])
        moved += int((p.detach()[m] != values[name][m]).sum())
    if rewind.get("hold", True):
        assert moved == 0
        assert_frozen(model, mask, values)
    else:
        dead = rewind.get("values") == "zero"  # units without an output have no gradient
        assert moved > (0 if dead else 0.9 * mask.count)
        assert not mask.is_frozen  # it has no values that anything could hold


@pytest.mark.parametrize("mode", ["keep", "reset", "estimate"])
def test_statistics_after_the_rewind(mode):
    _, _, before, _, start, _ = hardened(batchnorm=mode)
    mean, var = start["net.1.running_mean"], start["net.1.running_var"]
    if mode == "keep":
        assert torch.equal(mean, before["net.1.running_mean"])
        assert torch.equal(var, before["net.1.running_var"])
    elif mode == "reset":
        assert not mean.any()
        assert set(var.tolist()) == {1.0}
    else:
        first = Classifier().net[0]
        first.load_state_dict({name: start[f"net.0.{name}"] for name in ("weight", "bias")})
        images = torch.stack([image for image, _ in loader(0, 64).dataset])
        outputs = first(images).transpose(0, 1).flatten(1)  # all 64 examples are one batch
        torch.testing.assert_close(mean, outputs.mean(1))
        torch.testing.assert_close(var, outputs.var(1))
        assert not torch.equal(mean, before["net.1.running_mean"])


@pytest.mark.slow
def test_statistics_at_the_start_of_a_long_fine_tuning_do_not_matter():
    """With the usual momentum of 0.1, 200 steps in train mode leave 1e-9 of them; gradients do not read them."""
    results = [hardened(epochs=50, batchnorm=mode)[0].state_dict() for mode in ("keep", "reset", "estimate")]
    for other in results[1:]:
        for name, value in results[0].items():
            if "num_batches" not in name:
                torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


def test_a_model_without_statistics_is_an_error_before_the_scoring():
    class NoNorm(Classifier):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.Identity()

    for mode in ("reset", "estimate"):
        model = NoNorm()
        vanilla = {name: value + 1 for name, value in model.state_dict().items()}
        callbacks = levers(vanilla, batchnorm=mode)
        with pytest.raises(ValueError, match=r"no BatchNorm layer in train mode .* leave batchnorm at 'keep'"):
            trainer(callbacks=callbacks).fit(model, loader(0, 64))
        assert callbacks[0].scores is None


@pytest.mark.slow
@pytest.mark.parametrize("rewind", LEVERS, ids=str)
def test_a_resumed_run_ends_at_the_same_weights(tmp_path, rewind):
    def make():
        model, vanilla = finished()
        model.net[4].p = 0.0  # dropout draws random numbers that a checkpoint does not carry
        return model, levers(vanilla, **rewind)

    (whole, first), (resumed, callbacks) = run_with_resume(tmp_path, make, 2, 4)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(m, callbacks[1].mask.masks[n]) for n, m in first[1].mask.masks.items())
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["CriticalRewindCallback"]["settings"] == (
        callbacks[1].done_with
    )


def test_another_lever_in_a_resumed_run_is_an_error(tmp_path):
    *_, run = hardened(epochs=1, values="fresh", seed=1, hold=False)
    run.save_checkpoint(tmp_path / "half.ckpt")
    for other, message in (
        ({"values": "fresh", "seed": 2, "hold": False}, "seed=1, and now it has seed=2"),
        ({"values": "fresh", "hold": False}, "seed=1, and now it has seed=0"),
        ({"values": "fresh", "seed": 1}, "hold=False, and now it has hold=True"),
        ({"hold": False}, "values='fresh', and now it has values='initial'"),
    ):
        model, vanilla = finished()
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callbacks=levers(vanilla, **other)).fit(model, loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    *_, run = hardened(epochs=1)
    run.save_checkpoint(tmp_path / "held.ckpt")
    with pytest.raises(MisconfigurationException, match="GradientMaskCallback, which is not in this Trainer"):
        trainer(callbacks=levers(vanilla, hold=False)).fit(
            finished()[0], loader(0, 64), ckpt_path=tmp_path / "held.ckpt"
        )


def test_a_checkpoint_of_the_previous_release_goes_on(tmp_path):
    *_, vanilla, _, run = hardened(epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    old = checkpoint["callbacks"]["CriticalRewindCallback"]["settings"]
    for name in ("values", "hold", "batchnorm", "seed", "structured"):
        del old[name]
    del checkpoint["callbacks"]["PrivacyScoringCallback"]["settings"]["mode"]
    old["to"] = "vanilla"
    torch.save(checkpoint, tmp_path / "half.ckpt")
    callbacks = levers(vanilla)
    model = finished()[0]
    trainer(callbacks=callbacks, max_epochs=2).fit(model, loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    assert_frozen(model, callbacks[1].mask, vanilla)
    with pytest.raises(MisconfigurationException, match="values='initial', and now it has values='zero'"):
        trainer(callbacks=levers(vanilla, values="zero"), max_epochs=2).fit(
            finished()[0], loader(0, 64), ckpt_path=tmp_path / "half.ckpt"
        )
    for number, name, now in ((1, "structured", True), (1, "batchnorm", "reset"), (0, "mode", "train")):
        changed = levers(vanilla)
        setattr(changed[number], name, now)
        with pytest.raises(MisconfigurationException, match=f"and now it has {name}={now!r}"):
            trainer(callbacks=changed, max_epochs=2).fit(finished()[0], loader(0, 64), ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"values": "vanilla"}, ValueError, "values must be 'initial' or 'fresh' or 'trained' or 'zero', not 'vanil"),
        ({"values": "trained", "hold": False}, ValueError, "changes nothing and holds nothing: for that, pass rate=0"),
        ({"hold": 0}, TypeError, "hold must be True or False, not the int 0"),
        ({"batchnorm": "new"}, ValueError, "batchnorm must be 'keep' or 'reset' or 'estimate', not 'new'"),
        ({"seed": 1}, ValueError, "seed draws fresh values, and values is 'initial'"),
        ({"values": "fresh", "seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"values": "fresh", "vanilla": "redraw"}, ValueError, "vanilla has the initial values, and values is 'fresh'"),
        ({"values": "trained", "vanilla": "redraw"}, ValueError, "and values is 'trained': leave it out here"),
    ],
)
def test_wrong_combinations_raise(settings, error, message):
    with pytest.raises(error, match=message):
        CriticalRewindCallback(**settings)


@pytest.mark.parametrize("tune", ["rest", "masked"])
def test_weights_that_are_not_held_beside_a_callback_that_holds_them(tune):
    model, vanilla = finished()
    callbacks = [*levers(vanilla, hold=False), GradientMaskCallback(tune=tune)]
    with pytest.raises(MisconfigurationException, match=r"hold=False\) trains the rewound weights on, and Gradient"):
        trainer(callbacks=callbacks).fit(model, loader(0, 64))


class Own(Classifier):
    def __init__(self, **kwargs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_model_that_cannot_be_drawn_again_is_told_so():
    model, vanilla = finished(cls=Own)
    with pytest.raises(ValueError, match=r"values='fresh' cannot draw .*\(Own: scale\): no reset_parameters .* 'init"):
        trainer(callbacks=levers(vanilla, values="fresh")).fit(model, loader(0, 64))


def test_no_warning_of_a_plain_rewind_that_is_not_held():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rewound|held|hold).*")
        hardened(hold=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewind", "said"),
    [
        ({}, None),
        ({"values": "fresh"}, None),
        ({"hold": False}, "277 of 1,386 weights were rewound and not held."),
        ({"values": "zero", "hold": False}, "277 of 1,386 weights were rewound to zero and not held."),
        ({"values": "trained"}, "277 of 1,386 weights were held at their trained values."),
    ],
    ids=str,
)
def test_audits_and_cards_say_what_was_done(rewind, said, tmp_path):
    model, vanilla = finished()
    audit = MIAAuditCallback(loader(200, 264))
    trainer(max_epochs=1, callbacks=[*levers(vanilla, **rewind), audit]).fit(model, loader(0, 64))
    told = [remark for remark in audit.result.remarks if "weights were" in remark]
    assert told == ([] if said is None else [said])
    card = export(model, tmp_path / "model.ckpt").with_suffix(".md").read_text()
    assert f"| rewinding: hold | {rewind.get('hold', True)} |" in card
    assert f"| rewinding: values | {rewind.get('values', 'initial')} |" in card
    how = {None: "rewound and held"}.get(said, (said or "").partition("were ")[2].rstrip("."))
    how = "rewound to fresh values and held" if rewind.get("values") == "fresh" else how
    assert f"| {how} | 277 of 1,386 weights |" in card
