import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_cwrf import AuditResult
from lightning_cwrf.defenses.dpsgd.clipping import Clipping

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example as a script in this process, where it trains its shadow models too; gives what it prints."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for name in [name for name, each in sys.modules.items() if "/examples/" in str(getattr(each, "__file__", ""))]:
        del sys.modules[name]


def test_harden_digits_runs_and_resumes(tmp_path, example):
    """The main job, made small: it prints the table, saves the report and the plots, and trains nothing twice."""
    words = ["--out", str(tmp_path), "--seed", "3", "--shadows", "8", "--epochs", "4", "--tune-epochs", "2"]
    words += ["--rate", "0.05", "--alpha", "0.4"]
    command = [sys.executable, str(EXAMPLES / "harden_digits.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [done.stdout, example("harden_digits.py", *words)]
    head = next(line for line in tables[0].splitlines() if "unprotected" in line)
    assert [cell.strip() for cell in re.split(r"\s{2,}", head.strip())] == [
        "unprotected",
        "fine-tuned, r = 0",
        "CWRF, r = 0.05",
    ]
    for row in (
        "train accuracy",
        "test accuracy",
        "loss gap",
        "LiRA AUC",
        "RMIA AUC",
        "LiRA TPR at 0.1% FPR",
    ):
        line = next(line for line in tables[0].splitlines() if line.startswith(row))
        assert len(re.findall(r"\d\.\d+ \[", line)) == 3, line
    for name in ("roc.png", "tradeoff.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    shared = ("CWRF, r = 0.05", "Verdict", "Rewound weights", "ROC of LiRA", "tune_epochs")
    for page, own in (("report.html", "8 models each, on halves of 600"), ("models.html", "Most exposed members")):
        report = (tmp_path / page).read_text(encoding="utf-8")
        assert all(text in report for text in (*shared, own)), page
    models = sorted((tmp_path / "shadows").rglob("model-*.safetensors"))
    assert len(models) == 32  # three recipes of eight, and the weights of the base models
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("words", "message"), [(["3"], "even"), (["8", "--rate", "0"], "r = 0 is run in any case")])
def test_bad_arguments_raise_before_any_training(tmp_path, example, capsys, words, message):
    with pytest.raises(SystemExit):
        example("harden_digits.py", "--out", tmp_path, "--shadows", *words)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_search_on_the_digits_is_the_same_when_it_resumes(tmp_path, example):
    words = ["--out", tmp_path, "--workers", 1, "--defenses", "hamp", "--rates", 0, 0.1, "--epochs", 2]
    words += ["--tune-epochs", 1, "--models", 8, "--floor", 0.5]
    written = []
    for _ in range(2):
        assert "Best: hamp" in example("search_digits.py", *words)
        written.append((tmp_path / "search.json").read_text())
    assert written[0] == written[1]
    assert (tmp_path / "search.png").stat().st_size > 10_000
    assert (tmp_path / "search.md").read_text().startswith("search over 6 recipes, 6 with 8 models")


def test_private_finetuning_prints_its_table(tmp_path, example):
    said = example("private_finetuning.py", "--quick", "--out", tmp_path)
    rows = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "| test accuracy at ε = | 2 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| exponential mechanism", "| DP-SGD", "| DP-SGD on whitened features"
    ]  # fmt: skip
    assert float(rows[2].split(" | ")[1].rstrip(" |")) > 0.75
    assert "exponential mechanism, the last: exponential mechanism: ε = 2 at δ = 1e-05 after 10 draws" in said


def test_a_forest_is_audited_from_its_outputs(tmp_path, example):
    said = example("audit_forest.py", "--quick", "--out", tmp_path)
    found = AuditResult.load(tmp_path / "forest.json")
    assert {name: each["auroc"].interval.low > 0.75 for name, each in found.estimates.items()} == {
        "loss": True,
        "lira": True,
        "rmia": True,
    }
    assert str(found).splitlines()[0] in said


def test_digits_are_reconstructed_with_a_prior_and_one_is_split(tmp_path, example):
    said = example("reconstruct_digits.py", "--quick", "--out", tmp_path)
    findings = [line for line in said.splitlines() if "a failed attack shows nothing about another prior" in line]
    assert len(findings) == 3
    assert findings[0].startswith(("members are told apart", "members are reconstructed"))
    assert "kept in [-0.8, 0.8]" in findings[2]
    residuals = [float(line.split()[-1]) for line in said.partition("not split")[2].splitlines()[:4]]
    assert residuals[1] - residuals[0] < 0.005
    assert residuals[3] > residuals[0] + 0.005
    assert (tmp_path / "reconstructions.png").stat().st_size > 10_000


def test_an_audit_of_dp_sgd_comes_near_its_epsilon_and_finds_half_the_noise(monkeypatch):
    """Within a factor of two of the accountant's ε; a fault that halves the noise is above it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from audit_dpsgd import audit, parse

    arguments = parse(["--canaries", "1000", "--epochs", "12", "--examples", "100"])
    found = audit(arguments)
    assert found["steps"] == 24
    assert found["accountant"] / 2 < found["independent"] < found["accountant"]
    assert 0 < found["one run"] < found["accountant"]
    monkeypatch.setattr(Clipping, "gradient_noise", lambda clipping, noise: noise / 2)
    assert audit(arguments)["independent"] > found["accountant"]
