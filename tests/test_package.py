import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_cwrf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_cwrf"
ROOMS = ("attacks", "audit", "metrics", "metrics/functional", "shadows")
FILES = (
    "canaries", "checks", "classification", "data", "descent", "examples", "files", "frozen", "loading", "masks",
    "outputs", "overlap", "rng", "sampling", "scores", "seen", "top_share", "vanilla",
)  # fmt: skip
PURE = [path for room in ROOMS for path in PACKAGE.glob(f"{room}/*.py")] + [PACKAGE / f"{name}.py" for name in FILES]


def test_public_names_exist_and_are_all_listed():
    for name in lightning_cwrf.__all__:
        assert getattr(lightning_cwrf, name) is not None
    assert set(dir(lightning_cwrf)) == set(lightning_cwrf.__all__)
    assert set(lightning_cwrf._HOMES) == set(lightning_cwrf.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = lightning_cwrf.nothing


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_cwrf; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", PURE, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_the_ground_floor_knows_no_lightning(path):
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
