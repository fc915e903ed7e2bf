"""A user's folder, made once, in which every test of the commands runs."""

import importlib
import os
import shutil
import sys

import pytest

from tests.commands.user_code import MINE, first_training

NAME = "mine_for_commands"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / f"{NAME}.py").write_text(MINE)
    sys.path.insert(0, str(folder))
    try:
        first_training(folder, importlib.import_module(NAME))
    finally:
        sys.path.remove(str(folder))
    return folder


@pytest.fixture
def user(made_once, tmp_path, monkeypatch):
    """The current directory: a copy of the user's folder."""
    for path in made_once.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # shadow models in this process: others take seconds to start
    return tmp_path
