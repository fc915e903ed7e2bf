"""Every registered defense, read from the registry: a new one is tested and looked up here without being named."""

import copy
import dataclasses
import inspect
import math
import pickle
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cwrf.commands import main
from lightning_cwrf.defenses import (
    Defense,
    DefenseMixin,
    available_defenses,
    create_defense,
    defense_class,
    register_defense,
)
from lightning_cwrf.defenses.registry import DEFENSES
from tests.defenses.cases import MODELS
from tests.helpers import Classifier, loader, part, trainer

PAGES = Path(__file__).parents[2] / "docs" / "defenses"
NEEDED = {"dpsgd": {"noise_multiplier": 1.0, "accountant": "rdp", "fix": True}, **MODELS}
KEPT = {"_dpsgd_ledger", "_lightning_cwrf_seen", "_hparams", "_hparams_initial"}
"""Attributes that outlive detach: what the weights have spent, and what they have seen; and Lightning's own."""


def minimal(name):
    """The settings without which a defense cannot be made."""
    return {**dict.fromkeys(defense_class(name).data_names(), part(300, 400)), **NEEDED.get(name, {})}


def check_settings(name):
    """The constructor, attach and create_defense take the same settings, with the same defaults."""
    cls, given = defense_class(name), minimal(name)
    parameters = inspect.signature(cls.mixin.__init__).parameters
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == fields
    made = create_defense(name, **given)
    own = type("Own", (cls.mixin, Classifier), {})
    for model in (cls.mixin.attach(Classifier(), **given), made.attach(Classifier()), own(**given)):
        assert model.defense == made
        assert model.hparams["defense"] == {"name": cls.mixin.__name__, **model.defense_settings}
        assert not set(model.defense_settings) & set(made.data_settings)
    assert pickle.loads(pickle.dumps(dataclasses.replace(made))).settings.keys() == made.settings.keys()


def check_types(name):
    """Strings, bools and None are no numbers, and NaN is none either; the message has the setting's name."""
    cls = defense_class(name)
    for field in dataclasses.fields(cls):
        wrong = {"float": ["1", True, None], "int": ["1", True, 1.5, None], "bool": ["no", 1, None]}.get(field.type, [])
        for value in wrong:
            with pytest.raises(TypeError, match=field.name):
                create_defense(name, **{**minimal(name), field.name: value})
        if field.type == "float":
            with pytest.raises(ValueError, match=field.name):
                create_defense(name, **{**minimal(name), field.name: math.nan})


def check_training(name):
    """It trains, its checkpoint holds plain settings, and detach leaves the module as it was."""
    torch.manual_seed(0)
    model = Classifier()
    defense = create_defense(name, **minimal(name))
    before, hparams = set(vars(model)), copy.deepcopy(dict(model.hparams))
    defense.attach(model)
    run = trainer(max_steps=2)
    run.fit(model, loader(0, 64))
    assert math.isfinite(run.callback_metrics["train_loss"])
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    assert checkpoint["lightning_cwrf_defense"] == defense.named()
    DefenseMixin.detach(model)
    plain = Classifier()
    trainer(max_steps=1).fit(plain, loader(0, 64))
    assert type(model) is Classifier
    assert dict(model.hparams) == hparams == dict(model.hparams_initial)
    assert set(vars(model)) - before <= KEPT | set(vars(plain))


ON_THE_HOST = ("torch/optim/", "torch/utils/data/", "defenses/nonmembers.py", "_beta")
"""Files and functions that read values that are on the CPU on every machine: step counts, places of examples, draws."""


class Syncs(TorchDispatchMode):
    """Counts what waits for the device: a value that is read by Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"):
            stack = [f"{frame.filename} {frame.name}" for frame in traceback.extract_stack()]
            step = max(i for i, each in enumerate(stack) if each.endswith("defenses/base.py training_step"))
            self.count += not any(host in each for each in stack[step:] for host in ON_THE_HOST)
        return function(*args, **(kwargs or {}))


def syncs_of(name):
    """Host synchronisations in each training step after the first epoch."""
    model = create_defense(name, **minimal(name)).attach(Classifier())
    step, counts = model.training_step, []

    def counted(batch, batch_idx):
        with Syncs() as syncs:
            loss = step(batch, batch_idx)
        if model.current_epoch:  # in the first, non-members are compared with members, and DP-SGD checks a batch
            counts.append(syncs.count)
        return loss

    model.training_step = counted
    trainer(max_epochs=2).fit(model, loader(0, 64))
    assert counts
    return max(counts)


@pytest.mark.parametrize("name", available_defenses())
def test_a_step_waits_for_the_device_once(name):
    """The one check of labels, logits and loss; Mixup+MMD reads a batch's labels besides, to draw the same classes."""
    assert syncs_of(name) == 1


def is_listed(name):
    """Whether the index of the pages links to the defense's page, and the page to every setting with its default."""
    page, index = PAGES / f"{name}.md", (PAGES / "README.md").read_text(encoding="utf-8")
    if not page.exists() or f"| [`{name}`]({name}.md) |" not in index:
        return False
    text = page.read_text(encoding="utf-8")
    for field in dataclasses.fields(defense_class(name)):
        row = re.search(rf"^\|.*`{field.name}`.*$", text, re.M)
        default = row[0].split("|")[2].strip().strip('`"') if row else None
        if field.metadata.get("data"):
            fits = default == "required"
        elif isinstance(field.default, float):
            fits = default is not None and float(default) == field.default
        else:
            fits = default == str(field.default)
        if not fits:
            return False
    return True


def is_tested(name):
    """Whether the tests of some defense name it."""
    return any(f'"{name}"' in path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


CHECKS = [check_settings, check_types, check_training]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", available_defenses())
def test_every_registered_defense(name, check):
    check(name)


@pytest.mark.parametrize("name", available_defenses())
def test_every_registered_defense_is_documented_and_tested(name):
    assert is_listed(name)
    assert is_tested(name)


@dataclass(frozen=True)
class Focal(Defense):
    gamma: float = 2.0

    def __post_init__(self):
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, not {self.gamma}.")


class FocalMixin(DefenseMixin, settings=Focal):
    def defense_loss(self, logits, targets):
        losses = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - (-losses).exp()) ** self.defense.gamma * losses).mean()


def test_a_defense_registered_at_run_time_is_found_everywhere(capsys):
    """One class and its mixin, and one line to register it; nothing else names it."""
    with DEFENSES.temporary():
        register_defense("focal_loss")(Focal)
        assert "focal_loss" in available_defenses()
        assert create_defense("focal_loss", gamma=1.0) == Focal(gamma=1.0)
        check_settings("focal_loss")
        check_training("focal_loss")
        for value in ("3", None, True):
            with pytest.raises(TypeError, match="Focal: gamma must be float"):
                create_defense("focal_loss", gamma=value)
        with pytest.raises(ValueError, match="gamma must not be negative"):
            FocalMixin.attach(Classifier(), gamma=-1.0)
        assert syncs_of("focal_loss") == 1
        assert main(["harden", "--help"]) == 0
        assert re.search(r"^  focal_loss +gamma$", capsys.readouterr().out, re.M)
        assert not is_listed("focal_loss")  # the docs check asks for its page


def test_settings_that_the_user_wrote_are_checked_when_the_defense_is_made():
    """Also without a __post_init__, and before it."""

    @dataclass(frozen=True)
    class Unchecked(Defense):
        cap: float = 1.0

    for value in ("x", None, True):
        for make in (Focal, Unchecked):
            with pytest.raises(TypeError, match=f"{make.__name__}: .* must be float"):
                make(value)
    with pytest.raises(ValueError, match="cap must be a number, not nan"):
        Unchecked(cap=math.nan)
    with pytest.raises(TypeError, match="must be float"):
        dataclasses.replace(Unchecked(), cap="1")
    assert copy.deepcopy(Unchecked(cap=2)) == Unchecked(2)
    with pytest.raises(TypeError, match="frozen dataclass"):
        register_defense("unchecked")(type("Plain", (Defense,), {}))
    with pytest.raises(TypeError, match="per_example of Mean belongs into its settings class"):
        type("Mean", (DefenseMixin,), {"per_example": True})
