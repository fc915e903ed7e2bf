"""What a recipe's code does and reads is part of its identity, wherever it was defined."""

import functools
import importlib
import linecache
import shutil
import sys
import textwrap
from dataclasses import dataclass

import pytest

from lightning_cwrf.shadows.identity import identity


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
def test_a_redefined_class_in_a_notebook(change):
    names = cell(NET)
    before = [identity(names["recipe"]), identity(names["Net"]), identity(functools.partial(names["Net"]))]
    again = cell(NET, number=7)
    assert [identity(again["recipe"]), identity(again["Net"]), identity(functools.partial(again["Net"]))] == before
    cell(NET.split("def recipe")[0].replace(*change), names, 2)  # in the same kernel: the recipe is the old function
    after = [identity(names["recipe"]), identity(names["Net"]), identity(functools.partial(names["Net"]))]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_comments_and_positions_change_nothing():
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
def test_values_that_a_recipe_reads(kind):
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
def test_ordinary_code_has_a_stable_identity(text):
    first = cell(text)
    assert identity(first["recipe"]) == identity(first["recipe"]) == identity(cell(text)["recipe"])


WIDTH = 3


def reads_a_constant(members, seed):
    return [WIDTH for _ in range(2)] or helper()


def helper():
    return WIDTH


@dataclass(frozen=True)
class ReadsToo:
    def __call__(self, members, seed):
        return helper()


@pytest.mark.parametrize("recipe", [reads_a_constant, ReadsToo(), functools.partial(reads_a_constant, seed=1)])
def test_identity_sees_the_constants_that_a_recipe_reads(monkeypatch, recipe):
    before = identity(recipe)
    assert identity(recipe) == before
    monkeypatch.setitem(globals(), "WIDTH", 4)
    assert identity(recipe) != before


def test_identity_sees_the_users_other_modules(tmp_path, monkeypatch):
    """The network in one file, its base class in another, the recipe in a third."""
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "cwrf_base": "class Base:\n    momentum = 0.9\n    def f(self): return 1\n",
        "cwrf_net": "import cwrf_base\nfrom cwrf_base import Base\nclass Net(Base):\n    pass\ndef width(): return 3\n",
        "cwrf_recipe": "import cwrf_net\nfrom cwrf_net import Net\ndef recipe(m, s): return Net(), cwrf_net.width()\n",
    }
    seen = []
    for change in (None, ("cwrf_base", "0.9", "0.8"), ("cwrf_net", "return 3", "return 4")):
        if change is not None:
            files[change[0]] = files[change[0]].replace(change[1], change[2])
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        linecache.clearcache()
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        seen.append(identity(importlib.import_module("cwrf_recipe").recipe))
    assert len(set(seen)) == 3


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
