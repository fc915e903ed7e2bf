import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_cwrf
from lightning_cwrf import _deprecated

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_cwrf"
PURE = ("attacks", "auditing", "data", "metrics", "shadows", "weights", "checks", "classification", "files", "outputs")
PURE_FILES = [
    path for name in PURE for path in [PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")] if path.exists()
]


def test_public_names_exist_and_are_all_listed():
    for name in dir(lightning_cwrf):
        assert getattr(lightning_cwrf, name) is not None
    assert set(lightning_cwrf.__all__) < set(dir(lightning_cwrf))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lightning_cwrf.nothing


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_cwrf; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)


def test_every_subpackage_is_reachable_after_a_plain_import():
    code = "import lightning_cwrf; lightning_cwrf.metrics.TPRAtFPR; lightning_cwrf.weights.masks; lightning_cwrf.report"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_moved_modules_warn_at_the_line_that_imports_them():
    moved = list(_deprecated._MODULES)
    done = run_python("\n".join(f"import {old}" for old in moved))
    assert done.returncode == 0, done.stderr
    for line, old in enumerate(moved, 1):
        assert f"<string>:{line}: FutureWarning: {old} is now" in done.stderr


def test_audit_stays_a_function_when_the_old_module_of_that_name_is_imported():
    code = (
        "import lightning_cwrf; from lightning_cwrf.audit import AuditResult\n"
        "from lightning_cwrf import audit\n"
        "assert AuditResult is lightning_cwrf.AuditResult\n"
        "try: audit()\n"
        "except TypeError as e: assert 'missing' in str(e), e\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PURE_FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_lower_layers_do_not_import_lightning(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if n.split(".")[0] == "lightning" or n.startswith("lightning_cwrf.callbacks")]


def test_files_are_read_without_pickle():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = ast.unparse(node.func.value)
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                assert owner not in ("torch", "joblib", "pickle") or safe, f"{path}:{node.lineno}"


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
