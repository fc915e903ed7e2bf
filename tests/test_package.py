import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import lightning
import pytest
import torch

import lightning_cwrf
from lightning_cwrf import _deprecated
from tests.helpers import Classifier

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_cwrf"
# Lowest layer first, as in docs/architecture.md: each may import those before it.
PURE = ("_version", "_deprecated", "checks", "targets", "classification", "files", "registry", "lightning_private",
        "data", "arrays", "outputs", "weights", "metrics", "mechanism", "attacks", "shadows", "auditing",
        "reconstruction", "report")  # fmt: skip
LAYERS = (
    *PURE,
    "trainers",
    "defenses",
    "callbacks",
    "recipes",
    "searching",
    "exporting",
    "preflight",
    "commands",
    "__main__",
)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """The package's files that a file imports, also inside functions and for type checkers alone."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {each for each in submodules if each.removeprefix("lightning_cwrf.") in FILES}
            found |= files if len(files) == len(submodules) else {*files, node.module}
    inside = {
        each.removeprefix("lightning_cwrf").removeprefix(".") for each in found if each.startswith("lightning_cw")
    }
    return (inside & set(FILES)) - {name, ""}


def test_public_names_exist_and_are_all_listed():
    for name in dir(lightning_cwrf):
        assert getattr(lightning_cwrf, name) is not None
    assert set(lightning_cwrf.__all__) < set(dir(lightning_cwrf))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lightning_cwrf.nothing


def test_type_checkers_see_the_same_public_names():
    """The names under TYPE_CHECKING are written out, because a type checker does not run the table."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    written = {alias.asname for node in guarded.body for alias in node.names}
    assert written == set(lightning_cwrf.__all__) - {"__version__"}
    for node in guarded.body:
        for alias in node.names:
            assert getattr(importlib.import_module(node.module), alias.name) is getattr(lightning_cwrf, alias.asname)


def run_python(code, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_plain_import_is_light_and_reaches_every_subpackage():
    run_python(
        "import sys, lightning_cwrf; assert not {'torch', 'lightning'} & set(sys.modules)\n"
        "lightning_cwrf.metrics.TPRAtFPR; lightning_cwrf.weights.masks; lightning_cwrf.report"
    )


HARDENING = """
import sys, lightning.pytorch, sklearn.datasets
before = {name.partition(".")[0] for name in sys.modules}  # Lightning itself imports some of them, where it can
from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback, RelaxLossMixin
from tests.helpers import loader, trained, trainer
model, vanilla = trained(epochs=5)
scoring = PrivacyScoringCallback(loader(100, 140), vanilla, steps=1)
callbacks = [scoring, CriticalRewindCallback(), GradientMaskCallback()]
trainer(callbacks=callbacks, max_epochs=1).fit(RelaxLossMixin.attach(model), loader(0, 32))
new = {name.partition(".")[0] for name in sys.modules} - before
assert not new & {"opacus", "torchvision", "matplotlib", "ray", "dask"}, new
"""


@pytest.mark.slow
def test_a_hardening_does_not_import_what_it_does_not_use():
    run_python(HARDENING)
    top_level = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else node.module.partition(".")[0]
        for name, tree in FILES.items()
        if not name.startswith("report")  # plots alone
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not top_level & {"opacus", "torchvision", "matplotlib", "sklearn", "ray", "dask"}


@pytest.mark.slow
def test_moved_modules_warn_where_they_are_imported_and_audit_stays_a_function():
    moved = list(_deprecated._MODULES)
    done = run_python(
        "\n".join(f"import {old}" for old in moved)
        + "\nfrom lightning_cwrf.audit import AuditResult"
        + "\nfrom lightning_cwrf import audit"
        + "\nassert AuditResult is lightning_cwrf.AuditResult"
        + "\ntry: audit()"
        + "\nexcept TypeError as error: assert 'missing' in str(error), error"
    )
    for line, old in enumerate(moved, 1):
        assert f"<string>:{line}: FutureWarning: {old} is now" in done.stderr


def test_files_do_not_import_each_other_in_a_circle():
    graph = {name: imports_of(name) for name in FILES if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_each_layer_imports_only_lower_ones():
    assert {name.partition(".")[0] for name in FILES} == {*LAYERS, ""}
    for name in FILES:
        layer = name.partition(".")[0]
        for other in imports_of(name) if layer in LAYERS else ():
            allowed = LAYERS[: LAYERS.index(layer) + 1]
            assert other.partition(".")[0] in allowed, f"{name} imports {other}, of a higher layer"


@pytest.mark.parametrize("name", [name for name in FILES if name.partition(".")[0] in PURE])
def test_lower_layers_do_not_import_lightning(name):
    for node in ast.walk(FILES[name]):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if n.split(".")[0] in ("lightning", "pytorch_lightning")]


def test_files_and_functions_are_short():
    """300 lines a file; 60 a function, without its docstring."""
    long_files = {name for name in FILES if len((path_of(name)).read_text().splitlines()) > 300}
    assert long_files == set()
    long_functions = set()
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                documentation = node.body[0] if ast.get_docstring(node) is not None else None
                documented = 0 if documentation is None else documentation.end_lineno - documentation.lineno + 1
                if node.end_lineno - node.lineno + 1 - documented > 60:
                    long_functions.add(f"{name}.{node.name}")
    assert long_functions == set()


def path_of(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.slow
def test_private_attributes_of_lightning_are_read_in_one_file():
    """By the names that Lightning's source gives to private attributes, where PyTorch and this package have no such."""
    written = re.compile(r"(?:self\.|def )(_[a-z]\w*)")
    theirs = {name for path in Path(lightning.__path__[0]).rglob("*.py") for name in written.findall(path.read_text())}
    theirs -= {*dir(torch.nn.Module()), *dir(torch.Tensor), "_generate_state_key"}  # documented, for state_key
    own = set().union(*map(assigned_names, FILES.values())) - set(dir(Classifier()))
    used = {name for name, tree in FILES.items() if (private_names(tree) & theirs) - own}
    assert used == {"lightning_private"}


def private_names(tree):
    """Private attributes, read as ``thing._name`` or by name from ``thing`` or ``vars(thing)``."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).rpartition(".")[2] in ("getattr", "hasattr", "setattr", "get", "pop"):
            found |= {
                each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def assigned_names(tree):
    """The attributes and methods that a file's own classes define."""
    attributes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    ]
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return methods | {node.attr for node in attributes if ast.unparse(node.value) in ("self", "cls")}


def test_files_are_read_without_pickle():
    unsafe = set()
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = ast.unparse(node.func.value)
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                if owner in ("torch", "joblib", "pickle") and not safe:
                    unsafe.add((name, ast.unparse(node)))
    assert unsafe == {("weights.reading", "torch.load(path, map_location='cpu', weights_only=False)")}  # --unpickle


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
