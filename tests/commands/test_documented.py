"""The commands and files that README and docs/command.md show are accepted."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_cwrf.auditing import AuditResult
from lightning_cwrf.commands import main
from tests.commands.conftest import NAME as M
from tests.commands.test_wrong_use import audit

ROOT = Path(__file__).parents[2]
PAGES = {"command": ROOT / "docs" / "command.md", "README": ROOT / "README.md"}


def shown():
    """Every line of a page that calls the command, once."""
    for name, page in PAGES.items():
        lines = re.findall(r"^\s*(?:- run: )?(cwrf .+)$", page.read_text(encoding="utf-8"), re.M)
        for i, line in enumerate(dict.fromkeys(lines)):
            yield pytest.param(line, id=f"{name}-{i}")


@pytest.mark.slow
@pytest.mark.parametrize("line", list(shown()))
def test_a_shown_command_is_accepted(line, user, capsys):
    (block,) = re.findall(r"```yaml\n# harden.yaml\n(.*?)```", PAGES["command"].read_text(encoding="utf-8"), re.S)
    Path("harden.yaml").write_text(block.replace("mine.", f"{M}."))
    words = shlex.split(line.replace("mine.", f"{M}."))[1:]
    if words[0] in ("report", "export"):
        assert main(audit(out="a.json")) == 0
        for path in (Path(word) for word in words if word.endswith(".json")):
            path.parent.mkdir(exist_ok=True)
            audited = AuditResult.load("a.json")
            # A report is of several models, a card of the audited one.
            (replace(audited, weights=path.stem) if words[0] == "report" else audited).save(path)
    if words[0] == "export":
        shutil.copy("finished.ckpt", words[words.index("--checkpoint") + 1])
    assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err


def test_the_shown_workflow_is_one():
    (block,) = re.findall(r"```yaml\n# .github[^\n]*\n(.*?)```", PAGES["command"].read_text(encoding="utf-8"), re.S)
    steps = yaml.safe_load(block)["jobs"]["audit"]["steps"]
    assert any(step.get("run", "").startswith("cwrf audit") for step in steps)
