"""Environment variables and the command line that a recipe reads are part of its identity."""

import sys

import pytest

from lightning_cwrf.shadows.identity import identity
from tests.shadows.test_code import cell


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


def test_the_share_of_the_machine_is_not_part_of_a_recipe(monkeypatch):
    """Worker processes are given GPUs and threads by these variables."""
    recipe = cell("import os\ndef recipe(m, s): return os.environ.get('CUDA_VISIBLE_DEVICES')")["recipe"]
    before = identity(recipe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert identity(recipe) == before


def test_variables_that_a_recipe_sets_do_not_count(monkeypatch):
    monkeypatch.delenv("CWRF_TEST", raising=False)
    recipe = cell("import os\ndef recipe(m, s):\n    os.environ['CWRF_TEST'] = '1'")["recipe"]
    before = identity(recipe)
    recipe(None, 0)
    assert identity(recipe) == before


@pytest.mark.parametrize("how", ["sys.argv[1]", "argparse.ArgumentParser().parse_args().width"])
def test_the_command_line_that_a_recipe_reads(how, monkeypatch):
    def now(*given):
        monkeypatch.setattr(sys, "argv", ["script.py", *given])
        return identity(cell(f"import argparse, sys\ndef recipe(members, seed):\n    return {how}")["recipe"])

    assert now("--width=8") == now("--width=8") != now("--width=16")
