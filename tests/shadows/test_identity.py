"""What a recipe is known by: a change that reaches the training is another identity, wherever the code was defined."""

import functools
import importlib
import linecache
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_cwrf.shadows.identity import identity
from lightning_cwrf.shadows.jobs import recipe_identity

ROOT = Path(__file__).parents[2]
PYTHON = {**os.environ, "PYTHONPATH": str(ROOT)}


def cell(text, names=None, number=1):
    """Run a cell as a notebook does: compiled under a name of its own, with its source in linecache."""
    text = textwrap.dedent(text)
    name = f"<ipython-input-{number}-{abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"__name__": "__main__"} if names is None else names
    exec(compile(text, name, "exec"), names)
    return names


NET = """
    import functools
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.net = nn.Linear(64, width)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    def recipe(members, seed):
        return Net()
"""


@pytest.mark.parametrize(
    "change", [("width=16", "width=256"), ("Adam", "SGD"), ("1e-3", "1e-2"), ("Linear", "Bilinear")]
)
def test_a_class_defined_anew_in_a_notebook(change):
    names = cell(NET)
    before = [identity(names["recipe"]), identity(names["Net"]), identity(functools.partial(names["Net"]))]
    again = cell(NET, number=7)
    assert [identity(again["recipe"]), identity(again["Net"]), identity(functools.partial(again["Net"]))] == before
    cell(NET.split("def recipe")[0].replace(*change), names, 2)  # in the same kernel: the recipe is the old function
    after = [identity(names["recipe"]), identity(names["Net"]), identity(functools.partial(names["Net"]))]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_comments_and_places_change_nothing():
    moved = "# a comment\n\n" + textwrap.dedent(NET).replace("return Net()", "return Net()  # another")
    assert identity(cell(NET)["recipe"]) == identity(cell(moved)["recipe"])


def test_a_class_defined_twice_in_one_cell_is_the_last_one():
    class_ = NET.split("def recipe")[0]
    twice = class_ + class_.replace("16", "256")
    assert identity(cell(twice)["Net"]) != identity(cell(class_)["Net"])
    assert identity(cell(twice)["Net"]) == identity(cell(class_.replace("16", "256"))["Net"])


@pytest.mark.parametrize("names", [{}, {"__name__": "__main__"}, {"__name__": "__console__"}])
def test_code_without_readable_source(names):
    """Standard input, ``exec``: there is no source to read."""

    def run(text):
        scope = dict(names)
        exec(textwrap.dedent(text), scope)
        return identity(scope["recipe"]), identity(scope["Net"])

    before, after = run(NET), run(NET.replace("16", "256"))
    assert before == run(NET)
    assert before[0] != after[0]
    assert before[1] != after[1]


READS = {
    "dict": ("S = {'width': 16}", "S['width'] = 256", "S['width']"),
    "nested": ("S = {'a': [1, {'width': 16}]}", "S['a'][1]['width'] = 256", "S['a'][1]['width']"),
    "namespace": ("import types; S = types.SimpleNamespace(w=16)", "S.w = 256", "S.w"),
    "argparse": ("import argparse; S = argparse.Namespace(w=16)", "S.w = 256", "S.w"),
    "set": ("S = {16}", "S.clear(); S.add(256)", "min(S)"),
    "frozenset": ("S = frozenset({16})", "S = frozenset({256})", "min(S)"),
    "dataclass": ("import dataclasses as d\n@d.dataclass\nclass C:\n    w: int = 16\nS = C()", "S.w = 256", "S.w"),
    "extra attribute": ("import dataclasses as d\n@d.dataclass\nclass C:\n    w: int = 1\nS = C()", "S.v = 2", "S"),
    "partial": ("import functools; S = functools.partial(int, '16')", "S = functools.partial(int, '256')", "S()"),
    "class attribute": ("class S:\n    w = 16", "S.w = 256", "S.w"),
    "base class": ("class B:\n    w = 16\nclass S(B):\n    pass", "B.w = 256", "S.w"),
    "method": ("class S:\n    def w(self): return 16", "S.w = lambda self: 256", "S().w()"),
    "enum": ("import enum\nclass S(enum.Enum):\n    W = 16", "class S(enum.Enum):\n    W = 256", "S.W.value"),
    "object": ("class C:\n    def __init__(self): self.w = 16\nS = C()", "S.w = 256", "S.w"),
    "own dict": ("class C(dict):\n    def w(self): return 16\nS = C()", "C.w = lambda self: 256", "S.w()"),
    "own text": ("class C(str):\n    def w(self): return 16\nS = C('a')", "C.w = lambda self: 256", "S.w()"),
    "own list's attribute": ("class C(list):\n    pass\nS = C()\nS.w = 16", "S.w = 256", "S.w"),
    "named tuple": (
        "import collections\nclass S(collections.namedtuple('S', 'a')):\n    def w(self): return 16",
        "S.w = lambda self: 256",
        "S(1).w()",
    ),
    "slots": ("class C:\n    __slots__ = ('w',)\nS = C()\nS.w = 16", "S.w = 256", "S.w"),
    "function attribute": ("def S(): return 1\nS.w = 16", "S.w = 256", "S.w"),
    "default": ("def S(w=16): return w", "S.__defaults__ = (256,)", "S()"),
    "closure": ("def make(w):\n    return lambda: w\nS = make(16)", "S = make(256)", "S()"),
    "lambda": ("S = lambda: 16", "S = lambda: 256", "S()"),
    "bound method": ("class C:\n    w = 16\n    def f(self): return self.w\nc = C()\nS = c.f", "c.w = 256", "S()"),
    "deque": ("import collections; S = collections.deque([16])", "S.append(256)", "S[-1]"),
    "range": ("S = range(16)", "S = range(256)", "len(S)"),
    "tensor": ("import torch; S = torch.ones(2)", "S[0] = 2", "S"),
    "module": ("from torch import nn; S = nn.Dropout(0.1)", "S.p = 0.5", "S"),
    "weights": ("import torch; S = torch.nn.LayerNorm(2)", "S.weight.data[0] = 7", "S"),
    "rebound builtin": ("import re; S = re.compile('a').match", "S = re.compile('b').match", "S"),
    "cached": (
        "import functools\n@functools.lru_cache\ndef S(): return 16",
        "@functools.lru_cache\ndef S(): return 256",
        "S()",
    ),
    "dispatched": (
        "import functools\n@functools.singledispatch\ndef S(x): return x",
        "S.register(int, lambda x: 3)",
        "S(1)",
    ),
    "with a mark": ("S = {'w': 16, 'missing': object()}", "S['w'] = 256", "S['w']"),
    "torch function": ("from torch.nn.functional import relu as S", "from torch.nn.functional import gelu as S", "S"),
    "decorated": ("import torch\n@torch.no_grad()\ndef S(): return 16", "@torch.no_grad()\ndef S(): return 256", "S()"),
    "decorated by one's own": (
        "import functools\ndef deco(f):\n    @functools.wraps(f)\n    def g(): return f()\n    return g\n"
        "@deco\ndef S(): return 16",
        "@deco\ndef S(): return 256",
        "S()",
    ),
    "decorated method": (
        "import torch\nclass S:\n    @torch.no_grad()\n    def f(self): return 16",
        "class S:\n    @torch.no_grad()\n    def f(self): return 256",
        "S().f()",
    ),
    "property": (
        "class S:\n    @property\n    def f(self): return 16",
        "class S:\n    @property\n    def f(self): return 256",
        "S().f",
    ),
    "static method": (
        "class S:\n    @staticmethod\n    def f(): return 16",
        "class S:\n    @staticmethod\n    def f(): return 256",
        "S.f()",
    ),
    "class method": (
        "class S:\n    @classmethod\n    def f(cls): return 16",
        "class S:\n    @classmethod\n    def f(cls): return 256",
        "S.f()",
    ),
    "cached property": (
        "import functools\nclass S:\n    @functools.cached_property\n    def f(self): return 16",
        "class S:\n    @functools.cached_property\n    def f(self): return 256",
        "S().f",
    ),
    "far function": ("def far(): return 16\ndef S(): return far()", "def far(): return 256", "S()"),
    "inner function": ("w = 16\ndef S():\n    return [w for _ in range(2)]", "w = 256", "S()"),
    "class body": ("w = 16\ndef S():\n    class C:\n        v = w\n    return C.v", "w = 256", "S()"),
    "mixed keys": ("S = {1: 2, 'a': 3, None: 4}", "S[1] = 3", "S"),
    "numpy": ("import numpy as np; S = np.array(['a', 'b'])", "S[0] = 'c'", "S"),
    "numpy objects": ("import numpy as np; S = np.array([{1: 2}, None])", "S[0][1] = 3", "S"),
    "complex": ("S = 1 + 2j", "S = 1 + 3j", "S"),
    "one that refers to itself": ("S = {'w': 16}; S['self'] = S", "S['w'] = 256", "S"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READS)
def test_what_a_recipe_reads(kind):
    begin, change, use = READS[kind]
    recipe = f"def recipe(members, seed):\n    return {use}\n"
    names = cell(begin + "\n" + recipe)
    before = identity(names["recipe"])
    assert identity(names["recipe"]) == before
    names["recipe"](None, 0)  # a run leaves no trace
    assert identity(names["recipe"]) == before
    assert identity(cell(begin + "\n" + recipe)["recipe"]) == before
    cell(change, names)
    assert identity(names["recipe"]) != before


@pytest.mark.parametrize(
    "text",
    [
        "import logging\nS = logging.getLogger('x')\ndef recipe(m, s): S.info('a')",
        "S = object()\ndef recipe(m, s, start=None): return S",
        "from typing import TypeVar, Any\nS = TypeVar('S')\ndef recipe(m, s): return S, Any, list[int], int | None",
        "import datetime, decimal, fractions\nS = datetime.date(2020, 1, 1), decimal.Decimal(1)\n"
        "def recipe(m, s): return S",
        "import abc\nclass S(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\ndef recipe(m, s): return S",
        "import typing\nclass S(typing.NamedTuple):\n    a: int = 3\ndef recipe(m, s): return S(2)",
        "from torchmetrics.classification import MulticlassAccuracy as S\nM = S(10)\ndef recipe(m, s): return M",
        "from lightning.pytorch import LightningModule, Trainer\nimport torch\nclass S(LightningModule):\n"
        "    def training_step(self, b, i): return super().training_step(b, i)\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)\n"
        "def recipe(m, s): return S",
        "from torch.utils.data import DataLoader, TensorDataset\nimport torch\n"
        "S = DataLoader(TensorDataset(torch.ones(2, 2)))\ndef recipe(m, s): return S",
        "import torch, torchvision\nS = torchvision.transforms.Compose([torchvision.transforms.RandomCrop(3)])\n"
        "def recipe(m, s): return S",
        "import tqdm, numpy, sys\nS = numpy.random.default_rng(0)\ndef recipe(m, s): return S, tqdm.tqdm, sys.stdout",
        "import os\ndef recipe(m, s): os.environ['CWRF_SET'] = '1'; return os.path.join('a')",
        "try:\n    import nowhere_at_all\nexcept ImportError:\n    nowhere_at_all = None\n"
        "def recipe(m, s):\n    try:\n        import nowhere_at_all\n    except ImportError:\n        return 1\n",
    ],
)  # fmt: skip
def test_ordinary_code_is_told_and_stays_the_same(text):
    first = cell(text)
    assert identity(first["recipe"]) == identity(first["recipe"]) == identity(cell(text)["recipe"])


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
        ("import os\ndef recipe(m, s):\n    return [os.environ[n] for n in 'AB']", "environment .* no constant"),
        ("import os\ndef recipe(m, s):\n    return dict(os.environ)", "environment .* no constant"),
        ("def recipe(m, s):\n    from os import getenv\n    return getenv('A')", "environment .* no constant"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_way_out(text, what):
    recipe = cell(text)["recipe"]
    with pytest.raises(TypeError, match=what + "(.|\n)*pass version="):
        identity(recipe)
    first = identity(recipe, version="1")
    assert first == identity(recipe, version="1")
    assert first != identity(recipe, version="2")


def test_a_version_covers_only_what_cannot_be_told():
    text = "import threading\nLOCK, WIDTH = threading.Lock(), 16\ndef recipe(m, s): return LOCK, WIDTH"
    names = cell(text)
    first = identity(names["recipe"], version="1")
    names["WIDTH"] = 256
    assert identity(names["recipe"], version="1") != first
    assert identity(1, version="1") != identity(1)
    for bad in ("", 3, b"1"):
        with pytest.raises(TypeError, match="version must be a text"):
            identity(1, version=bad)


@pytest.mark.parametrize(
    "use",
    [
        "os.environ['CWRF_TEST']",
        "os.environ.get('CWRF_TEST')",
        "os.environ.get('CWRF_TEST', '3')",
        "os.environ.setdefault('CWRF_TEST', '1')",
        "os.getenv('CWRF_TEST')",
        "int(getenv('CWRF_TEST', 3))",
        "environ['CWRF_TEST']",
        "os.environ[NAME]",
        "os.getenv(NAME)",
        "'CWRF_TEST' in os.environ",
        "[os.getenv('CWRF_TEST') for _ in range(2)]",
    ],
)
def test_the_environment_that_a_recipe_reads(use, monkeypatch):
    monkeypatch.setenv("CWRF_TEST", "1")
    text = f"import os\nfrom os import environ, getenv\nNAME = 'CWRF_TEST'\ndef recipe(m, s): return {use}"
    recipe = cell(text)["recipe"]
    before = identity(recipe)
    monkeypatch.setenv("CWRF_OTHER", "1")
    assert identity(recipe) == before
    monkeypatch.setenv("CWRF_TEST", "2")
    changed = identity(recipe)
    assert changed != before
    monkeypatch.delenv("CWRF_TEST")
    assert identity(recipe) != changed


def test_how_much_of_a_machine_a_process_may_use_is_no_part_of_a_recipe(monkeypatch):
    """Worker processes are given GPUs and threads by these variables."""
    recipe = cell("import os\ndef recipe(m, s): return os.environ.get('CUDA_VISIBLE_DEVICES')")["recipe"]
    before = identity(recipe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert identity(recipe) == before


def test_what_a_recipe_sets_in_the_environment_is_not_what_it_reads(monkeypatch):
    monkeypatch.delenv("CWRF_TEST", raising=False)
    recipe = cell("import os\ndef recipe(m, s):\n    os.environ['CWRF_TEST'] = '1'")["recipe"]
    before = identity(recipe)
    recipe(None, 0)
    assert identity(recipe) == before


@pytest.mark.parametrize(
    "recipe",
    [
        "def recipe(m, s):\n    import cwrf_settings\n    return cwrf_settings.WIDTH",
        "def recipe(m, s):\n    import cwrf_settings as c\n    return c.width()",
        "def recipe(m, s):\n    from cwrf_settings import WIDTH\n    return WIDTH",
        "def recipe(m, s):\n    from cwrf_settings import width as w\n    return w()",
        "import cwrf_settings\ndef recipe(m, s):\n    return cwrf_settings.WIDTH",
        "import cwrf_settings\ndef recipe(m, s):\n    return getattr(cwrf_settings, 'WI' + 'DTH')",
        "import cwrf_package.inner\ndef recipe(m, s):\n    return cwrf_package.inner.WIDTH",
        "def recipe(m, s):\n    from cwrf_package import inner\n    return inner.WIDTH",
        "def recipe(m, s):\n    import cwrf_package.inner as i\n    return i.WIDTH",
    ],
)
def test_an_import_inside_a_function_and_modules_read_by_attribute(recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "import threading\nWIDTH = 16\nLOCK = threading.Lock()\ndef width(): return WIDTH\n"
    (tmp_path / "cwrf_settings.py").write_text(text if "getattr" not in recipe else "WIDTH = 16\n")
    (tmp_path / "cwrf_package").mkdir()
    (tmp_path / "cwrf_package" / "__init__.py").write_text("")
    (tmp_path / "cwrf_package" / "inner.py").write_text(text)
    importlib.invalidate_caches()
    try:
        names = cell(recipe)
        before = identity(names["recipe"])
        assert identity(names["recipe"]) == before
        for name in ("cwrf_settings", "cwrf_package.inner"):
            if name in sys.modules:
                sys.modules[name].WIDTH = 256
        assert identity(names["recipe"]) != before
    finally:
        for name in ("cwrf_settings", "cwrf_package", "cwrf_package.inner"):
            sys.modules.pop(name, None)


def test_an_installed_module_that_only_the_recipe_imports(monkeypatch):
    recipe = cell("def recipe(m, s):\n    import wave\n    import lightning.pytorch.demos\n    return wave")["recipe"]
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    before = identity(recipe)
    assert "wave" not in sys.modules
    recipe(None, 0)
    assert identity(recipe) == before


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
def test_what_a_loader_does_with_its_data(name):
    a, b = (DataLoader(DATA, **settings) for settings in LOADERS[name])
    assert identity(a) != identity(b)


def test_a_loader_that_was_read_or_has_workers_is_the_same():
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
def test_modules_are_known_by_what_is_trained_the_order_of_layers_and_hooks(changed):
    assert identity(module(**changed)) != identity(module())
    assert identity(module(**changed)) == identity(module(**changed))  # hooks are numbered in each process


def test_containers_that_are_more_than_their_content():
    assert identity(OrderedDict(a=1, b=2)) != identity(OrderedDict(b=2, a=1))
    assert identity(defaultdict(int, a=1)) != identity(defaultdict(list, a=1))


@pytest.mark.parametrize("how", ["globals()['WIDTH']", "eval('WIDTH')", "__import__('__main__').WIDTH"])
def test_names_that_are_looked_up_by_text_are_refused(how):
    recipe = cell(f"def recipe(members, seed):\n    return {how}")["recipe"]
    with pytest.raises(TypeError, match=r"what \w+\(\) looks up \(read as recipe\), so a change in it would go unseen"):
        identity(recipe)
    assert identity(recipe, version="1")
    assert identity(cell("def recipe(members, seed):\n    return members.eval()")["recipe"])  # a method of that name


@pytest.mark.parametrize("how", ["sys.argv[1]", "argparse.ArgumentParser().parse_args().width"])
def test_the_command_line_that_a_recipe_reads(how, monkeypatch):
    def now(*given):
        monkeypatch.setattr(sys, "argv", ["script.py", *given])
        return identity(cell(f"import argparse, sys\ndef recipe(members, seed):\n    return {how}")["recipe"])

    assert now("--width=8") == now("--width=8") != now("--width=16")


def test_the_default_dtype_is_part_of_a_training():
    before = recipe_identity(every_second, ())
    torch.set_default_dtype(torch.float64)
    try:
        assert recipe_identity(every_second, ()) != before
    finally:
        torch.set_default_dtype(torch.float32)
