"""The identity of values, and what has none."""

import functools
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_cwrf import CWRFConfig, ShadowRecipe
from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.jobs import recipe_identity
from tests.helpers import part
from tests.recipe_functions import Memorise, quick
from tests.shadows.test_code import cell


@dataclass(frozen=True)
class Settings:
    rate: float
    weights: torch.Tensor


def test_identity_is_of_content():
    def values():
        return [
            *(None, True, 1, 1.0, "1", b"1", Path("1"), [1], (1, 2), {"a": 1}, torch.float32, torch.device("cpu")),
            *(torch.ones(2), torch.ones(1, 2), torch.ones(2, dtype=torch.int32), np.zeros(2), np.float32(0)),
            *(quick, functools.partial(quick, seed=1), functools.partial(quick, seed=2), Settings),
            *(Settings(1.0, torch.ones(1)), Settings(1.0, torch.zeros(1)), Settings(2.0, torch.ones(1))),
        ]

    first = [identity(value) for value in values()]
    assert first == [identity(value) for value in values()]
    assert len(set(first)) == len(first)


def test_closures_lambdas_and_marks_raise():
    rate = 0.3
    with pytest.raises(TypeError, match=r"closure over \('rate',\)"):
        identity(lambda members, seed: rate)
    with pytest.raises(TypeError, match="lambda has no name"):
        identity(lambda members, seed: None)
    with pytest.raises(TypeError, match="content of an object"):
        identity({"a": object()})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import threading\nS = threading.Lock()\ndef recipe(m, s): return S", r"a lock \(read as recipe → S\)"),
        ("S = (i for i in range(3))\ndef recipe(m, s): return S", r"a generator \(read as recipe → S\)"),
        ("S = {'a': [open('/dev/null')]}\ndef recipe(m, s): return S", r"a TextIOWrapper \(read as recipe → S\)"),
        (
            "class S:\n    import threading\n    lock = threading.RLock()\n    def f(self): return self.lock\n"
            "def recipe(m, s): return S().f()",
            r"a RLock \(read as recipe → S → lock\)",
        ),
        ("import os\ndef recipe(m, s):\n    return [os.environ[n] for n in 'AB']", "environment .* not constant"),
        ("import os\ndef recipe(m, s):\n    return dict(os.environ)", "environment .* not constant"),
        ("def recipe(m, s):\n    from os import getenv\n    return getenv('A')", "environment .* not constant"),
    ],
)
def test_values_without_content_raise_with_a_fix(text, what):
    recipe = cell(text)["recipe"]
    with pytest.raises(TypeError, match=what + "(.|\n)*pass version="):
        identity(recipe)
    first = identity(recipe, version="1")
    assert first == identity(recipe, version="1")
    assert first != identity(recipe, version="2")


def test_a_version_covers_only_values_without_content():
    text = "import threading\nLOCK, WIDTH = threading.Lock(), 16\ndef recipe(m, s): return LOCK, WIDTH"
    names = cell(text)
    first = identity(names["recipe"], version="1")
    names["WIDTH"] = 256
    assert identity(names["recipe"], version="1") != first
    assert identity(1, version="1") != identity(1)
    for bad in ("", 3, b"1"):
        with pytest.raises(TypeError, match="version must be a text"):
            identity(1, version=bad)


@pytest.mark.parametrize("how", ["globals()['WIDTH']", "eval('WIDTH')", "__import__('__main__').WIDTH"])
def test_lookups_by_text_raise(how):
    recipe = cell(f"def recipe(members, seed):\n    return {how}")["recipe"]
    with pytest.raises(TypeError, match=r"what \w+\(\) looks up \(read as recipe\) .* a change in it would go unseen"):
        identity(recipe)
    assert identity(recipe, version="1")
    assert identity(cell("def recipe(members, seed):\n    return members.eval()")["recipe"])  # a method of that name


def test_values_as_arguments():
    values = [
        {1, 2}, frozenset({1, 3}), 1j, np.array(["a"]), np.array([None]), nn.Linear(2, 2), range(3), slice(1, 2),
        torch.ones(2).to_sparse().to_dense() * 3, {1: 2, "1": 3},
    ]  # fmt: skip
    said = [identity(value) for value in values]
    assert len(set(said)) == len(said)
    assert said == [identity(value) for value in values]
    with pytest.raises(TypeError, match=r"a tensor of layout torch\.sparse_coo"):
        identity(torch.ones(2).to_sparse())


DATA = TensorDataset(torch.arange(20.0), torch.arange(20) % 2)


def every_second(examples):
    return default_collate(examples[::2])


def generator(seed):
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "sampler": [{"sampler": SubsetRandomSampler([0, 1])}, {"sampler": SubsetRandomSampler([2, 3])}],
    "weights": [{"sampler": WeightedRandomSampler([1.0] * 20, 5)}, {"sampler": WeightedRandomSampler([1.0, 0.0], 5)}],
    "batches": [{"batch_sampler": [[0, 1], [2]]}, {"batch_sampler": [[0, 1], [3]]}],
    "collate": [{}, {"collate_fn": every_second}],
    "order": [{}, {"shuffle": True}],
    "seed of the order": [{"shuffle": True, "generator": generator(seed)} for seed in (0, 1)],
    "workers' seeds": [{}, {"worker_init_fn": every_second}],
    "batch size": [{"batch_size": 2}, {"batch_size": 3}],
    "last batch": [{"batch_size": 3}, {"batch_size": 3, "drop_last": True}],
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_are_identified_by_how_they_read(name):
    a, b = (DataLoader(DATA, **settings) for settings in LOADERS[name])
    assert identity(a) != identity(b)


def test_reading_and_workers_do_not_change_a_loaders_identity():
    loader = DataLoader(DATA, shuffle=True, generator=generator(0))
    before = identity(loader)
    list(loader)
    assert identity(loader) == before
    assert identity(DataLoader(DATA, num_workers=2)) == identity(DataLoader(DATA))


def module(*, frozen=False, order="rt", hook=None):
    torch.manual_seed(0)
    parts = {"r": nn.ReLU(), "t": nn.Tanh()}
    made = nn.Sequential(OrderedDict([("l", nn.Linear(2, 2)), *((name, parts[name]) for name in order)]))
    made.l.requires_grad_(not frozen)
    if hook is not None:
        made.register_forward_hook(hook)
    return made


@pytest.mark.parametrize("changed", [{"frozen": True}, {"order": "tr"}, {"hook": every_second}])
def test_modules_are_identified_by_trained_weights_order_and_hooks(changed):
    assert identity(module(**changed)) != identity(module())
    assert identity(module(**changed)) == identity(module(**changed))  # hooks are numbered in each process


def test_containers_with_more_than_their_content():
    assert identity(OrderedDict(a=1, b=2)) != identity(OrderedDict(b=2, a=1))
    assert identity(defaultdict(int, a=1)) != identity(defaultdict(list, a=1))


class Jittered(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(1, 8, 8), 0


def test_data_sets_are_identified_by_content():
    assert identity(part(0, 20)) == identity(part(0, 20))
    assert identity(part(0, 20)) != identity(part(1, 21))
    assert identity(DataLoader(part(0, 20), 4)) != identity(DataLoader(part(0, 20), 5))
    with pytest.raises(TypeError, match="reads differently each time"):
        identity(Jittered())


def test_the_default_dtype_is_part_of_a_training():
    before = recipe_identity(every_second, ())
    torch.set_default_dtype(torch.float64)
    try:
        assert recipe_identity(every_second, ()) != before
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_keys_of_stores_do_not_change():
    """A change of these digests makes every user train their shadow models again."""
    data = TensorDataset(torch.arange(6.0).view(6, 1), torch.arange(6) % 2)
    recipe = ShadowRecipe(LightningModule, {"max_epochs": 60}, batch_size=32, collate_fn=default_collate)
    containers = [{"a": 1, "b": [2.5, None, "x", b"y"]}, OrderedDict(a=1), {1, 2}, range(3)]
    values = [
        recipe,
        replace(recipe, cwrf=CWRFConfig(data, rate=0.1)),
        [*containers, torch.ones(2, 3), data, torch.float16, functools.partial(LightningModule, 3), nn.ReLU],
    ]
    assert [identity(value)[:32] for value in values] == [
        "cd795f44bf47d13769e657aefe4de80e",
        "879199999d155bdcac9a1e9ea95611f2",
        "46e4f4af995348e6fccc2e43a6e18449",
    ]
    assert identity([{"a": (i for i in range(3))}], version="1")[:32] == "76f6cf110475cfeef685fc192b6af0af"


def test_every_setting_of_cwrf_has_its_part_in_a_key():
    """A field that came later has none at its default, so that stores from before are found."""
    data = part(0, 5)
    changed = [
        {}, {"values": "fresh"}, {"values": "zero"}, {"values": "trained"}, {"hold": False}, {"batchnorm": "reset"},
        {"batchnorm": "estimate"}, {"values": "fresh", "hold": False}, {"rate": 0.1}, {"tune": "masked"},
    ]  # fmt: skip
    found = [identity(CWRFConfig(data, **settings)) for settings in changed]
    assert len(set(found)) == len(changed)
    assert identity(CWRFConfig(data, values="initial", hold=True, batchnorm="keep")) == found[0]


def test_recipes_are_identified_by_their_arguments():
    assert identity(Memorise(3)) != identity(Memorise(4))


ROOT = Path(__file__).parents[2]


PYTHON = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_the_same_in_every_process_and_under_every_hash_seed():
    """The script comes by standard input; its small recipe is known in this process by the same digest."""
    script = textwrap.dedent(
        """
        import functools
        from dataclasses import dataclass, field
        from enum import Enum
        from tests.helpers import Classifier, digits
        from tests.recipe_functions import Counted
        from lightning_cwrf import ShadowRecipe
        from lightning_cwrf.defenses import create_defense
        from lightning_cwrf.shadows.identity import identity
        import numpy as np, torch, types

        class Kind(Enum):
            A = "a"
            B = "b"

        @dataclass
        class Settings:
            names: set = field(default_factory=lambda: {"a", "b", "c", "d"})
            kinds: frozenset = frozenset({Kind.A, Kind.B})

        S = Settings()
        N = types.SimpleNamespace(z={"x", "y", "z"}, criterion=torch.nn.CrossEntropyLoss())

        def recipe(members, seed):
            if seed in {"one", "two", "three"}:
                return S.names, Kind, N
            return Classifier

        shadow = ShadowRecipe(functools.partial(Classifier, width=4), {"max_epochs": 1}, batch_size=8,
                              defense=create_defense("relaxloss", alpha=0.5))
        def small(m, s):
            return 16

        print(identity([recipe, Settings, Classifier, shadow, Counted, digits()]), identity(small))
        """
    )
    said = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-"], input=script, env={**PYTHON, "PYTHONHASHSEED": seed}, cwd=ROOT, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        said.add(done.stdout)
    assert len(said) == 1
    assert said.pop().split()[1] == identity(cell("def small(m, s):\n    return 16")["small"])
