"""The paper's ablations and controls, as plain arguments of the callbacks (§4.4)."""

import pytest
import torch
from torch import nn

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights import WeightMask
from lightning_cwrf.weights.scores import learnability_scores
from tests.callbacks.helpers import finished
from tests.helpers import Classifier, loader, trained, trainer


def run(rewind=None, mask=None, scoring=None, seed=0, epochs=2, **trainer_settings):
    model, vanilla = trained(seed, epochs=5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callbacks = [
        PrivacyScoringCallback(loader(100, 140), vanilla, steps=2, **(scoring or {})),
        CriticalRewindCallback(**{"rate": 0.2, **(rewind or {})}),
        GradientMaskCallback(**(mask or {})),
    ]
    trainer(max_epochs=epochs, callbacks=callbacks, **trainer_settings).fit(model, loader(0, 64))
    return model, callbacks, before, vanilla


def test_a1_removes_instead_of_rewinding():
    model, callbacks, *_ = run(rewind={"values": "zero"})
    for name, p in model.named_parameters():
        assert (p[callbacks[1].mask.masks[name]] == 0).all()


def test_a2_tunes_the_rewound_weights_alone():
    model, callbacks, before, vanilla = run(mask={"tune": "masked"})
    moved = 0
    for name, p in model.named_parameters():
        m = callbacks[1].mask.masks[name]
        assert torch.equal(p[~m], before[name][~m])
        moved += int((p[m] != vanilla[name][m]).sum())
    assert moved > 0.9 * callbacks[1].mask.count


def test_a2_survives_a_resume(tmp_path):
    _model, callbacks, before, vanilla = run(mask={"tune": "masked"}, epochs=1, default_root_dir=tmp_path)
    callbacks[0]._module()._trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = Classifier()
    resumed = [
        PrivacyScoringCallback([], vanilla, steps=2),
        CriticalRewindCallback(rate=0.2),
        GradientMaskCallback(tune="masked"),
    ]
    trainer(max_epochs=2, callbacks=resumed).fit(again, loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    for name, p in again.named_parameters():
        m = callbacks[1].mask.masks[name]
        assert torch.equal(p[~m], before[name][~m])


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_rate(rate):
    model, callbacks, _before, vanilla = run(rewind={"rate": rate})
    assert callbacks[1].mask.count == rate * callbacks[1].mask.total
    for name, p in model.named_parameters():
        assert torch.equal(p, vanilla[name]) == (rate == 1.0)


def test_learnability_and_random_scores():
    _, learn, _, _ = run(
        scoring={"kind": "learnability", "lr": 0.0, "members": list(loader(0, 64)), "keep_scores": True}
    )
    expected = learnability_scores(finished()[0], list(loader(0, 64)), steps=2, lr=0.0)
    assert all(torch.equal(learn[0].scores[n], s) for n, s in expected.items())
    _, first, _, _ = run(scoring={"kind": "random"})
    _, again, _, _ = run(scoring={"kind": "random"})
    _, other, _, _ = run(scoring={"kind": "random"}, seed=1)
    same = [
        all(torch.equal(first[1].mask.masks[n], x[1].mask.masks[n]) for n in first[1].mask.masks)
        for x in (again, other)
    ]
    assert same == [True, False]
    assert first[1].mask.count == learn[1].mask.count


def test_per_layer_shares():
    _, callbacks, *_ = run(rewind={"per_layer": True})
    masks = callbacks[1].mask.masks
    assert abs(int(masks["net.0.weight"].sum() + masks["net.0.bias"].sum()) - 0.2 * 80) <= 1


def test_whole_units_are_rewound_and_held():
    _, callbacks, *_ = run(rewind={"structured": True})
    mask = callbacks[1].mask
    assert 0 < mask.count <= round(0.2 * mask.total)
    for name, chosen in mask.masks.items():
        units = chosen.flatten(1) if chosen.ndim > 1 else chosen.unsqueeze(1)
        assert torch.equal(units.all(1), units.any(1))
        bias = mask.masks.get(name.replace("weight", "bias"))
        assert bias is None or torch.equal(units.all(1), bias)


class Attending(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 12), Attention(), nn.Flatten(), nn.Linear(96, 10))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, words):  # the rows of an image
        return self.attention(words, words, words, need_weights=False)[0]


def rewound_heads(rate):
    torch.manual_seed(0)
    model = Attending()
    vanilla = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(max_epochs=5).fit(model, loader(0, 64))
    callbacks = [
        PrivacyScoringCallback(loader(100, 140), vanilla, steps=2, kind="random"),
        CriticalRewindCallback(rate, structured="heads"),
        GradientMaskCallback(),
    ]
    trainer(max_epochs=2, callbacks=callbacks).fit(model, loader(0, 64))
    name = "net.2.attention.in_proj_weight"
    return callbacks[1].mask.masks[name], model.get_parameter(name), vanilla[name]


def test_whole_heads_are_rewound_and_held():
    mask, weights, vanilla = rewound_heads(0.7)
    heads = mask.reshape(3, 3, 4, 12).transpose(0, 1).flatten(1)  # queries, keys and values, by head
    assert torch.equal(heads.all(1), heads.any(1))
    assert heads.any()
    assert not heads.all()
    assert torch.equal(weights[mask], vanilla[mask])
    assert (weights != vanilla)[~mask].all()


def test_a_rate_below_that_of_a_head_is_a_warning():
    with pytest.warns(UserWarning, match=r"rate=0\.05 chose no head: the units .* are others\. Raise the rate"):
        mask, *_ = rewound_heads(0.05)
    assert not mask.any()


def test_whole_heads_of_a_model_without_attention_are_an_error_before_anything_runs():
    with pytest.raises(
        ValueError, match=r"needs an nn\.MultiheadAttention.* and the model has none: pass structured=True"
    ):
        run(rewind={"structured": "heads"})


def test_a_given_mask_needs_no_heads():
    _, callbacks, *_ = run()
    mask = WeightMask(callbacks[1].mask.masks)
    _, again, *_ = run(rewind={"mask": mask, "structured": "heads"})
    assert again[1].mask.count == mask.count


def test_few_whole_units_are_a_warning_that_says_how_few():
    with pytest.warns(UserWarning, match=r"whole units fill \d+ of the \d+ weights that rate=0\.004 allows"):
        run(rewind={"structured": True, "rate": 0.004})
    with pytest.warns(UserWarning, match="is less than one: nothing is rewound"):
        run(rewind={"structured": True, "rate": 1e-5})


def test_random_scores_do_not_depend_on_the_mode():
    masks = [run(scoring={"kind": "random", "mode": mode})[1][1].mask.masks for mode in ("eval", "train")]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_scores_in_train_mode():
    _, callbacks, *_ = run(
        scoring={"kind": "learnability", "mode": "train", "members": list(loader(0, 64)), "keep_scores": True}
    )
    in_eval = learnability_scores(finished()[0], list(loader(0, 64)), steps=2)
    assert callbacks[0].scores.keys() == in_eval.keys()
    assert not all(torch.equal(callbacks[0].scores[name], score) for name, score in in_eval.items())


def test_unknown_words():
    with pytest.raises(ValueError, match="values must be 'initial' or 'fresh' or 'trained' or 'zero', not 'init'"):
        CriticalRewindCallback(values="init")
    with pytest.raises(ValueError, match="tune must be"):
        GradientMaskCallback(tune="all")
    with pytest.raises(ValueError, match="mode must be 'eval' or 'train', not True"):
        PrivacyScoringCallback([], "redraw", mode=True)
    with pytest.raises(ValueError, match="mode must be 'eval' or 'train', not 'test'"):
        learnability_scores(finished()[0], list(loader(0, 64)), mode="test")
    with pytest.raises(ValueError, match="kind must be"):
        PrivacyScoringCallback([], "redraw", kind="loss")
