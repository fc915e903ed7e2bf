"""Kinds of clipping, and schedules of the noise: against loops over single examples, and by the noise itself."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cwrf import GradientMaskCallback, WeightMask
from lightning_cwrf.defenses import DPSGD, DPSGDMixin
from lightning_cwrf.defenses.dpsgd.clipping import AdaptiveClipping, AutomaticClipping, Clipping, PerLayerClipping
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from tests.defenses.dpsgd.cases import Adaptive, Automatic, PerLayer, Tokens, by_hand, fresh, wide
from tests.helpers import Classifier, loader, trainer

LAYERS = {"net.0": 0.2, "net.1": 0.1, "net.4": 0.3}
KINDS = {
    "per_layer": ({"max_grad_norm": 0.3}, lambda: PerLayer(dict.fromkeys(LAYERS, 0.3 / math.sqrt(3)))),
    "per_layer, given": ({"layer_norms": LAYERS}, lambda: PerLayer(LAYERS)),
    "automatic": ({"max_grad_norm": 0.3, "stability": 0.05}, lambda: Automatic(0.3, 0.05)),
    "adaptive": (
        {"max_grad_norm": 1.5, "target_unclipped_quantile": 0.3, "clipbound_learning_rate": 0.7},
        lambda: Adaptive(1.5, 0.3, 0.7),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("held", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_loop_over_single_examples(kind, ghost, held):
    """With accumulation, physical batches, and weights that are frozen before the norms are taken."""
    settings, rule = KINDS[kind]
    model = fresh(optimizer="sgd", lr=0.1).double()
    twin = copy.deepcopy(model)
    mask = WeightMask.top({n: torch.rand(p.shape) for n, p in model.named_parameters()}, 0.4) if held else None
    name = kind.partition(",")[0]
    DPSGDMixin.attach(model, noise_multiplier=0, clipping=name, max_physical_batch_size=7, ghost=ghost, **settings)
    callbacks = [GradientMaskCallback(mask)] if held else []
    trainer(precision="64-true", accumulate_grad_batches=2, callbacks=callbacks).fit(model, wide())
    rule = rule()
    expected = by_hand(twin, model.defense_state.batches, 6, rule, mask)
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[weight], rtol=1e-5, atol=1e-6)
    if name == "adaptive":
        assert model.defense_state.ledger.clip_norm == pytest.approx(rule.clip) != 1.5


class Zoo(Classifier):
    """Layers of the kinds whose sums ghost clipping takes from inputs and output gradients, in several forms."""

    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.5)
        self.net = None
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.same = nn.Conv1d(6, 40, 3, padding="same")
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(40)])
        self.long, self.short, self.twice = nn.Linear(40, 4), nn.Linear(24, 20), nn.Linear(20, 20, bias=False)
        self.deep, self.head = nn.Linear(5, 7), nn.Linear(28, 10)

    def forward(self, x):
        x = self.norms[0](self.conv(x)).relu_()  # (n, 4, 4, 4)
        x = self.norms[1](self.grouped(x)).tanh()
        x = self.norms[2](self.same(x.flatten(2)).transpose(1, 2))  # (n, 16, 40)
        x = self.long(x)  # few weights for so long a sequence
        x = self.short(x[:, :12].reshape(len(x), 2, 24))  # (n, 2, 20)
        x = self.twice(self.twice(x).tanh())
        return self.head(self.deep(x.reshape(len(x), 2, 4, 5))[:, :, :2].flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_ghost_clipping_of_many_layers_is_the_loop(clipping, held):
    model = fresh(Zoo).double()
    twin = copy.deepcopy(model)
    mask = WeightMask.top({n: torch.rand(p.shape) for n, p in model.named_parameters()}, 0.4) if held else None
    layers = list(dict.fromkeys(n.rpartition(".")[0] for n, _ in model.named_parameters()))
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, clipping=clipping, ghost=True)
    callbacks = [GradientMaskCallback(mask)] if held else []
    trainer(precision="64-true", max_epochs=1, callbacks=callbacks).fit(model, wide())
    rule = 0.3 if clipping == "flat" else PerLayer(dict.fromkeys(layers, 0.3 / math.sqrt(len(layers))))
    expected = by_hand(twin, model.defense_state.batches, 6, rule, mask)
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[weight], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ghost", [False, True])
def test_an_input_that_is_overwritten_afterwards_raises(ghost):
    class Overwrites(Classifier):
        def __init__(self):
            super().__init__()
            self.net, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, x):
            hidden = self.net(x.flatten(1)).relu()
            logits = self.head(hidden)
            hidden.mul_(2)
            return logits

    with pytest.raises(
        (MisconfigurationException, RuntimeError), match=r"overwritten|modified by an inplace operation"
    ):
        trainer(max_epochs=1).fit(DPSGDMixin.attach(Overwrites(), noise_multiplier=1.0, ghost=ghost), loader(0, 64))


class Large(Classifier):
    """Enough weights for the standard deviation of one step's noise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 120), nn.Tanh(), nn.Linear(120, 120), nn.Linear(120, 10))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Gradients(Callback):
    """The gradients that the optimizer gets, step by step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


@pytest.mark.parametrize(
    ("settings", "std"),
    [
        ({"clipping": "per_layer", "max_grad_norm": 2.0}, 50 * 2.0),
        ({"clipping": "per_layer", "layer_norms": {"net.1": 1.0, "net.3": 2.0, "net.4": 2.0}}, 50 * 3.0),
        ({"clipping": "automatic", "max_grad_norm": 2.0}, 50 * 2.0),
        (
            {"clipping": "adaptive", "max_grad_norm": 2.0, "unclipped_num_std": 30.0},
            2.0 / math.sqrt(1 / 50**2 - 1 / 60**2),
        ),
        # 16 / 20 is below the noise multiplier, so the count's noise is 50, and 1/σ² = 1/50² - 1/100².
        ({"clipping": "adaptive", "max_grad_norm": 2.0}, 2.0 * 50 / math.sqrt(0.75)),
        ({"max_grad_norm": 2.0, "ghost": True}, 50 * 2.0),
    ],
)
def test_noise_has_the_stated_size(settings, std):
    """23,530 normal draws: their standard deviation has a standard error of 0.46 %; the gradients are below 0.1 %."""
    torch.manual_seed(1)
    model, gradients = DPSGDMixin.attach(Large(), noise_multiplier=50.0, **settings), Gradients()
    trainer(max_steps=1, callbacks=[gradients]).fit(model, loader(0, 96))
    assert float(gradients.seen[0].std()) == pytest.approx(std / 16, rel=0.02)
    assert model.defense_state.ledger.accountant.history == [(50.0, 1 / 6, 1)]


def test_a_layer_that_is_frozen_gets_no_share_and_stays_as_it_is():
    """The two other layers have bounds of C/√2, and frozen weights neither a gradient nor noise."""
    torch.manual_seed(1)
    model, gradients = Large(), Gradients()
    mask = WeightMask({n: torch.full(p.shape, n.startswith("net.3")) for n, p in model.named_parameters()})
    DPSGDMixin.attach(model, noise_multiplier=50.0, max_grad_norm=2.0, clipping="per_layer")
    before = model.net[3].weight.clone()
    trainer(max_steps=1, callbacks=[GradientMaskCallback(mask), gradients]).fit(model, loader(0, 96))
    assert torch.equal(model.net[3].weight, before)
    assert not gradients.seen[0][64 * 120 + 120 : -1210].any()
    live = torch.cat([gradients.seen[0][: 64 * 120 + 120], gradients.seen[0][-1210:]])
    assert float(live.std()) == pytest.approx(50 * 2.0 / 16, rel=0.03)  # 9,010 draws: a standard error of 0.75 %
    with pytest.raises(MisconfigurationException, match=r"lacks 'net\.4' and names 'head'. The layers are 'net\.1', "):
        settings = {"clipping": "per_layer", "layer_norms": {"net.1": 1.0, "net.3": 1.0, "head": 1.0}}
        trainer().fit(DPSGDMixin.attach(Large(), noise_multiplier=1.0, **settings), loader(0, 96))


@pytest.mark.slow
def test_a_scheduled_noise_is_that_of_each_step_and_of_the_account():
    torch.manual_seed(1)
    settings = {"noise_gamma": 0.5, "noise_step_size": 2, "accountant": "rdp"}
    model, gradients = DPSGDMixin.attach(Large(), noise_multiplier=64.0, **settings), Gradients()
    trainer(max_epochs=5, accumulate_grad_batches=3, callbacks=[gradients]).fit(model, loader(0, 96))
    wanted = [64.0] * 4 + [32.0] * 4 + [16.0] * 2
    for found, noise in zip(gradients.seen, wanted, strict=True):
        assert float(found.std()) == pytest.approx(noise / 48, rel=0.02)
    assert model.defense_state.ledger.accountant.history == [(64.0, 0.5, 4), (32.0, 0.5, 4), (16.0, 0.5, 2)]


class Warm(DPSGDMixin, Large):
    def noise_schedule(self, epoch):
        return [1.0, 3.0, 0.5][epoch]


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 15}])
def test_a_schedule_stays_within_the_target(limits):
    """A schedule of one's own, whole and with an epoch that ends early; the first noise follows from all steps."""
    model = Warm(target_epsilon=2.0, accountant="rdp")
    run = trainer(**limits)
    run.fit(model, loader(0, 96))
    ledger = model.defense_state.ledger
    first = ledger.noise_multiplier
    last = 15 if "max_steps" in limits else 18
    assert ledger.accountant.history == [(first, 1 / 6, 6), (3 * first, 1 / 6, 6), (first / 2, 1 / 6, last - 12)]
    assert 1.98 <= model.privacy_spent.epsilon <= 2.0
    with pytest.raises(MisconfigurationException, match=rf"{last} steps are done and 6 to come.* above target_epsilon"):
        trainer(max_epochs=1).fit(model, loader(0, 96))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_schedule_must_give_numbers_above_zero(factor):
    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0)
    model.noise_schedule = lambda epoch: factor
    with pytest.raises(ValueError, match="noise_schedule must give a number above 0 for every epoch"):
        trainer(max_epochs=1).fit(model, loader(0, 96))


def test_many_noises_are_slow_to_account_for_by_prv():
    """The first noise is found before the warning's reason is met again at each epoch's end."""
    model = DPSGDMixin.attach(fresh(), target_epsilon=8.0, noise_gamma=0.99)
    run = trainer(max_epochs=11, limit_train_batches=1)
    model.defense_state.ledger.noise_for = lambda *_: 1.0  # the search itself would take a while
    model.on_train_start = lambda: (_ for _ in ()).throw(KeyError("stop"))
    slow = pytest.warns(UserWarning, match=r'11 noise multipliers, and the prv accountant.*accountant="rdp" is fast')
    with slow, pytest.raises(KeyError, match="stop"):
        run.fit(model, loader(0, 96))


def adaptive(**settings):
    given = {"quantile": 0.5, "learning_rate": 0.2, "count_std": None, "expected_size": 100.0, **settings}
    return AdaptiveClipping(Ledger("rdp"), 0.7, **given)


RULES = {
    "flat": lambda: Clipping(0.7),
    "automatic": lambda: AutomaticClipping(0.7, 0.01),
    "per_layer": lambda: PerLayerClipping([0, 0, 1, 2], [0.3, 0.5, 0.2]),
    "adaptive": adaptive,
}


@pytest.mark.parametrize("name", RULES)
def test_no_example_adds_more_than_the_sensitivity(name):
    """Whatever its gradient: zero, tiny, huge, or in one layer alone."""
    torch.manual_seed(0)
    clipping = RULES[name]()
    norms = torch.rand(4, 500, dtype=torch.float64) * 10.0 ** torch.randint(-8, 9, (4, 500))
    norms[:, 0] = 0
    norms[1:, 1:50] = 0
    norms[torch.rand(4, 500) < 0.2] = 0
    added = (clipping.factors(norms) * norms).norm(2, dim=0)
    assert added.isfinite().all()
    assert float(added.max()) <= clipping.sensitivity * (1 + 1e-12)
    assert float(added.max()) > clipping.sensitivity * 0.99
    assert clipping.sensitivity == pytest.approx(math.sqrt(0.3**2 + 0.5**2 + 0.2**2) if name == "per_layer" else 0.7)


def test_the_clip_norm_finds_the_quantile_of_the_norms():
    torch.manual_seed(0)
    clipping, generator = adaptive(quantile=0.3), torch.Generator().manual_seed(0)
    for _ in range(200):
        size = int(torch.poisson(torch.tensor(100.0)))
        clipping.factors(10 * torch.rand(1, size))
        clipping.end_step(1.0, generator, False)
    # Norms are uniform up to 10; a step moves the norm by 0.2 times an error of about 0.07.
    assert clipping.max_grad_norm == clipping.ledger.clip_norm == pytest.approx(3.0, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "given", "std"), [(1.0, 7.0, 7.0), (1.0, None, 5.0), (9.0, None, 9.0), (0, None, 0)])
def test_the_count_of_unclipped_examples_has_noise_of_the_stated_size(noise, given, std):
    """4,000 draws: a standard error of 1.1 %. The two releases together are as private as the noise multiplier says."""
    clipping, generator = adaptive(count_std=given), torch.Generator().manual_seed(0)
    moves = []
    for _ in range(4000):
        before = clipping.max_grad_norm
        clipping.factors(torch.full((1, 60), 1e-9))
        clipping.end_step(noise, generator, False)
        moves.append(math.log(clipping.max_grad_norm / before) / -0.2)
        clipping.max_grad_norm = before
    counts = 100 * torch.tensor(moves, dtype=torch.float64)  # unclipped + 20 (half of those that are not there) - 50
    assert float(counts.std()) == pytest.approx(std, rel=0.05, abs=1e-9)
    assert float(counts.mean()) == pytest.approx(30.0, abs=5 * std / math.sqrt(4000) + 1e-9)
    if noise:
        own = clipping.gradient_noise(noise)
        assert 1 / own**2 + 0.5**2 / std**2 == pytest.approx(1 / noise**2)
    else:
        assert clipping.gradient_noise(noise) == 0


def test_adaptive_clipping_refuses_what_it_cannot_keep():
    model = DPSGDMixin.attach(fresh(), noise_multiplier=2.0, clipping="adaptive", unclipped_num_std=1.0)
    with pytest.raises(
        MisconfigurationException, match=r"unclipped_num_std=1 is too small for a noise .* more than 1\."
    ):
        trainer(max_epochs=1).fit(model, loader(0, 96))
    clipping = adaptive(learning_rate=1e4)
    clipping.factors(torch.zeros(1, 100))
    with pytest.raises(MisconfigurationException, match=r"has moved the clip norm to 0.*Lower clipbound_learning_rate"):
        clipping.end_step(0.0, torch.Generator(), False)


def test_the_clip_norm_is_logged_and_goes_on_in_a_second_fit():
    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, clipping="adaptive", accountant="rdp")
    run = trainer(max_epochs=1)
    run.fit(model, loader(0, 96))
    first = model.defense_state.ledger.clip_norm
    assert float(run.callback_metrics["clip_norm"]) == pytest.approx(first)
    assert first != 1.0
    again = trainer(max_epochs=1)
    again.fit(model, loader(0, 96))
    assert abs(math.log(model.defense_state.ledger.clip_norm / first)) < 6 * 0.2 * 2  # not from 1.0 again
    assert DPSGDMixin.attach(DPSGDMixin.detach(model), noise_multiplier=1.0).defense_state.ledger.clip_norm is None


def test_ghost_clipping_weighs_whole_examples_where_a_layer_is_not_known():
    settings = {"noise_multiplier": 1.0, "clipping": "per_layer", "ghost": True, "fix": True}
    with pytest.raises(MisconfigurationException, match=r"where a model has DPSGDTokens \(DPSGDTokens\), so it cannot"):
        trainer(max_epochs=1).fit(DPSGDMixin.attach(Tokens(), **settings), loader(0, 64))


def test_settings_of_clipping_as_yaml_gives_them():
    defense = DPSGD(noise_multiplier=1.0, clipping="per_layer", layer_norms={"net.0": 1, "net.1": 0.5})
    assert defense.plain()["layer_norms"] == {"net.0": 1, "net.1": 0.5}
    assert DPSGD(**defense.plain()) == defense
    for wrong, message in (
        (3, "must be a dict"),
        ({1: 2.0}, "names of layers as keys"),
        ({"a": "1"}, "must be a number"),
    ):
        with pytest.raises(TypeError, match=message):
            DPSGD(noise_multiplier=1.0, clipping="per_layer", layer_norms=wrong)
