"""Going on with a hardening: what was scored and rewound is kept, so other settings are an error that says so."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    WeightMask,
)
from lightning_cwrf.weights import save_scores
from lightning_cwrf.weights.vanilla import save_vanilla
from tests.callbacks.helpers import finished
from tests.helpers import Classifier, loader, trainer


def cwrf(vanilla, scoring=None, rewind=None, mask=None):
    return [
        PrivacyScoringCallback(loader(100, 140), vanilla, **{"steps": 2, **(scoring or {})}),
        CriticalRewindCallback(**{"rate": 0.2, **(rewind or {})}),
        GradientMaskCallback(**(mask or {})),
    ]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A hardening after its first epoch."""
    folder = tmp_path_factory.mktemp("half")
    model, vanilla = finished()
    save_vanilla(vanilla, folder / "vanilla.safetensors")
    callbacks = cwrf(folder / "vanilla.safetensors")
    run = trainer(folder, callbacks=callbacks, max_epochs=1)
    run.fit(RelaxLossMixin.attach(model, alpha=0.5), loader(0, 32))
    run.save_checkpoint(folder / "half.ckpt")
    return folder, callbacks


def go_on(half, callbacks, attach=True):
    model = finished()[0]
    model = RelaxLossMixin.attach(model, alpha=0.5) if attach else model
    trainer(callbacks=callbacks, max_epochs=2).fit(model, loader(0, 32), ckpt_path=half[0] / "half.ckpt")
    return model


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewind": {"rate": 0.4}}, r"CriticalRewindCallback did its work with rate=0\.2, and now it has rate=0\.4: "),
        ({"rewind": {"per_layer": True}}, "per_layer=False, and now it has per_layer=True"),
        ({"rewind": {"structured": True}}, "structured=False, and now it has structured=True"),
        ({"scoring": {"mode": "train"}}, "mode='eval', and now it has mode='train'"),
        ({"rewind": {"values": "zero"}}, "values='initial', and now it has values='zero'"),
        ({"rewind": {"batchnorm": "reset"}}, "batchnorm='keep', and now it has batchnorm='reset'"),
        ({"scoring": {"lam": 0.9}}, r"PrivacyScoringCallback did its work with lam=0\.7, and now it has lam=0\.9"),
        ({"scoring": {"kind": "learnability"}}, "kind='privacy', and now it has kind='learnability'"),
        ({"scoring": {"steps": 3}}, "steps=2, and now it has steps=3"),
        ({"scoring": {"lr": 0.5}}, r"lr=0\.001, and now it has lr=0\.5"),
        ({"mask": {"tune": "masked"}}, "tune='rest', and now it has tune='masked'"),
    ],
)
def test_changed_settings_are_an_error_that_names_old_and_new_and_the_fix(half, changed, message):
    with pytest.raises(MisconfigurationException, match=message) as error:
        go_on(half, cwrf(half[0] / "vanilla.safetensors", **changed))
    assert "Pass the old settings; or, to harden again, load the finished weights" in str(error.value)


def test_other_vanilla_weights_are_an_error_wherever_they_are_given(half, tmp_path):
    other = {n: t + 1 for n, t in finished()[1].items()}
    save_vanilla(other, tmp_path / "other.safetensors")
    for vanilla in (other, tmp_path / "other.safetensors", "redraw"):
        with pytest.raises(
            MisconfigurationException, match=r"did its work with vanilla='weights [0-9a-f]{32}', and now"
        ):
            go_on(half, cwrf(vanilla))


def test_the_same_weights_in_another_form_or_a_file_that_is_gone_are_no_change(half):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*moved.*")
        for vanilla in (finished()[1], str(half[0] / "vanilla.safetensors"), "gone.safetensors", Classifier):
            model = go_on(half, cwrf(vanilla))
            for name, mask in half[1][1].mask.masks.items():
                assert torch.equal(model.get_parameter(name)[mask], finished()[1][name][mask])


def test_resuming_without_the_mask_callback_is_an_error(half):
    vanilla = half[0] / "vanilla.safetensors"
    with pytest.raises(MisconfigurationException, match="nothing would hold the rewound weights: put GradientMask"):
        go_on(half, cwrf(vanilla)[:2])
    not_held = cwrf(vanilla, rewind={"hold": False})[:2]
    for callbacks in (not_held, cwrf(vanilla)[:1], [MIAAuditCallback(loader(100, 140))]):
        with pytest.raises(MisconfigurationException, match="GradientMaskCallback, which is not in this Trainer"):
            go_on(half, callbacks)


def test_resuming_without_the_defense_is_an_error(half):
    with pytest.raises(MisconfigurationException, match="made with the defense RelaxLossMixin, and Classifier has non"):
        go_on(half, cwrf(half[0] / "vanilla.safetensors"), attach=False)


def test_a_checkpoint_can_be_tested_without_defense_and_mask(half):
    run = trainer(callbacks=[MIAAuditCallback(loader(100, 140))])
    assert run.validate(Classifier(), loader(100, 140), ckpt_path=half[0] / "half.ckpt", verbose=False)


def test_settings_that_change_between_two_fits_of_one_module_are_an_error():
    model, vanilla = finished()
    callbacks = cwrf(vanilla)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    mask = callbacks[1].mask
    callbacks[1].rate = 0.5
    with pytest.raises(MisconfigurationException, match=r"rate=0\.2, and now it has rate=0\.5"):
        trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert callbacks[1].mask is mask
    trainer(callbacks=callbacks, max_epochs=1).fit(finished()[0], loader(0, 32))  # another module begins anew
    assert callbacks[1].mask.count == round(0.5 * mask.total)


@pytest.mark.slow
def test_given_masks_and_scores_are_compared_by_content(tmp_path):
    model, vanilla = finished()
    masks = [WeightMask({n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters()}) for _ in range(2)]
    scores = [{n: torch.rand(p.shape) for n, p in model.named_parameters()} for _ in range(2)]
    files = [mask.save(tmp_path / f"mask{i}.safetensors") for i, mask in enumerate(masks)]
    files += [save_scores(given, tmp_path / f"scores{i}.safetensors") for i, given in enumerate(scores)]
    makers = [
        ("mask", masks, files[:2], lambda given: [GradientMaskCallback(mask=given)]),
        (
            "mask",
            masks,
            files[:2],
            lambda given: [CriticalRewindCallback(mask=given, vanilla=vanilla), GradientMaskCallback()],
        ),
        (
            "scores",
            scores,
            files[2:],
            lambda given: [CriticalRewindCallback(scores=given, vanilla=vanilla), GradientMaskCallback()],
        ),
    ]
    for name, values, paths, make in makers:
        model = finished()[0]
        run = trainer(tmp_path, callbacks=make(values[0]), max_epochs=1)
        run.fit(model, loader(0, 32))
        run.save_checkpoint(tmp_path / "half.ckpt")
        for same in (values[0], paths[0], tmp_path / "gone.safetensors"):
            again = make(same)
            trainer(callbacks=again, max_epochs=2).fit(finished()[0], loader(0, 32), ckpt_path=tmp_path / "half.ckpt")
        for other in (values[1], paths[1]):
            with pytest.raises(MisconfigurationException, match=f"did its work with {name}="):
                trainer(callbacks=make(other), max_epochs=2).fit(
                    finished()[0], loader(0, 32), ckpt_path=tmp_path / "half.ckpt"
                )


def old_checkpoint(half, path):
    """What a version without settings and packed masks wrote: bool masks, all scores, nothing of the mask callback."""
    checkpoint = torch.load(half[0] / "half.ckpt", weights_only=True)
    states = checkpoint["callbacks"]
    mask = WeightMask.from_state_dict({k: v for k, v in states["CriticalRewindCallback"].items() if k != "settings"})
    states["CriticalRewindCallback"] = {
        "masks": dict(mask.masks),
        "values": states["CriticalRewindCallback"]["values"],
    }
    states["PrivacyScoringCallback"] = {"scores": {n: torch.rand(m.shape) for n, m in mask.masks.items()}}
    del states["GradientMaskCallback"]
    torch.save(checkpoint, path)
    return mask, states["PrivacyScoringCallback"]["scores"]


def test_checkpoints_of_earlier_versions_can_be_resumed(half, tmp_path):
    mask, scores = old_checkpoint(half, tmp_path / "half.ckpt")
    callbacks = cwrf(half[0] / "vanilla.safetensors")
    model = go_on((tmp_path,), callbacks)
    assert all(torch.equal(callbacks[0].scores[n], s) for n, s in scores.items())
    assert all(torch.equal(callbacks[1].mask.masks[n], m) for n, m in mask.masks.items())
    assert callbacks[1].mask.moved(model) == {}
    assert all(torch.equal(model.get_parameter(n)[m], finished()[1][n][m]) for n, m in mask.masks.items())
    with pytest.raises(MisconfigurationException, match=r"rate=0\.1999, and now it has rate=0\.4"):
        go_on((tmp_path,), cwrf(half[0] / "vanilla.safetensors", rewind={"rate": 0.4}))


def test_a_resumed_run_knows_that_scores_are_not_kept(half, tmp_path):
    callbacks = cwrf(half[0] / "vanilla.safetensors")
    go_on(half, callbacks)
    with pytest.raises(RuntimeError, match=r"keep_scores=True\) in the run that scores"):
        callbacks[0].save_scores(tmp_path / "scores.safetensors")


def test_scores_that_no_mask_was_made_of_are_kept(tmp_path):
    model, vanilla = finished()
    scoring = PrivacyScoringCallback(loader(100, 140), vanilla, steps=2)
    run = trainer(tmp_path, callbacks=[scoring], max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = PrivacyScoringCallback(loader(100, 140), vanilla, steps=2)
    trainer(callbacks=[again], max_epochs=2).fit(finished()[0], loader(0, 32), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(again.scores[n], s) for n, s in scoring.scores.items())


def test_weights_that_were_moved_in_the_checkpoint_are_put_back(half, tmp_path):
    checkpoint = torch.load(half[0] / "half.ckpt", weights_only=True)
    checkpoint["state_dict"] = {n: t + 1 for n, t in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "half.ckpt")
    callbacks = cwrf(half[0] / "vanilla.safetensors")
    with pytest.warns(UserWarning, match=f"moved {half[1][1].mask.count} frozen weights before the training went on"):
        model = go_on((tmp_path,), callbacks)
    assert callbacks[1].mask.moved(model) == {}


def test_two_of_a_kind_and_classes_in_place_of_callbacks_are_clear_errors():
    model, vanilla = finished()
    for i, name in enumerate(("PrivacyScoringCallback", "CriticalRewindCallback", "GradientMaskCallback")):
        callbacks = cwrf(vanilla)
        callbacks.insert(i, copy.deepcopy(callbacks[i]))
        with pytest.raises(MisconfigurationException, match=f"there are 2 {name}s in this Trainer; keep one"):
            trainer(callbacks=callbacks).fit(model, loader(0, 32))
        callbacks = cwrf(vanilla)
        callbacks[i] = type(callbacks[i])
        with pytest.raises(MisconfigurationException, match=rf"the class {name}: pass an instance, {name}\(...\)"):
            trainer(callbacks=callbacks).fit(model, loader(0, 32))
        with pytest.raises(MisconfigurationException, match=f"the class {name}"):
            trainer(callbacks=[callbacks[i]]).fit(model, loader(0, 32))
    from lightning_cwrf import VanillaSnapshotCallback

    with pytest.raises(MisconfigurationException, match="the class VanillaSnapshotCallback"):
        trainer(callbacks=[VanillaSnapshotCallback]).fit(model, loader(0, 32))
