"""The commands on a user's real model and data, from the first check to the report."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_cwrf import AuditResult, WeightMask, audit
from lightning_cwrf.commands import main
from lightning_cwrf.weights.vanilla import load_vanilla
from tests.commands.conftest import NAME as M
from tests.commands.test_wrong_use import GOOD, HARDEN, harden, words
from tests.commands.test_wrong_use import audit as audit_words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def check(*more, **settings):
    return words("check", {**HARDEN, **settings}, *more)


def mine():
    return sys.modules[M]


def test_check_of_a_good_setup(user, capsys):
    assert main(check()) == 0
    said = capsys.readouterr().out
    for name in (
        "batch form",
        "outputs",
        "labels",
        "trainable",
        "vanilla",
        "layers",
        "augmentation",
        "sampler",
        "overlap",
    ):
        assert re.search(rf"^OK       {name} ", said, re.M), said
    assert "scoring takes" in said
    assert "fine-tuning takes" in said


FAULTS = {
    "overlap": ({"data": f"{M}.Overlapping"}, "ERROR    overlap .*50 of the 200 examples of nonmembers are members"),
    "augmentation": ({"data": f"{M}.Augmented"}, "ERROR    augmentation .*members read differently"),
    "vanilla": ({"vanilla": "weights.pt"}, "ERROR    vanilla .*the model is untrained"),
    "dpsgd": ({"model": f"{M}.Normed", "checkpoint": "normed.pt", "defense": "dpsgd"}, "ERROR    layers .*net.2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_a_hardening_stops_at_them(fault, user, capsys):
    settings, message = FAULTS[fault]
    torch.save(mine().Normed().state_dict(), "normed.pt")
    more = ("--defense.noise_multiplier", "1.0", "--defense.max_grad_norm", "1.0") if fault == "dpsgd" else ()
    assert main(check(*more, **settings)) == 1
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    assert re.search(message, said), said
    assert main(harden(*more, **settings)) == 1
    assert "nothing was trained or written" in capsys.readouterr().out
    assert not Path("hardened").exists()


def test_plain_members_beside_augmented_ones(user):
    assert main(check(data=f"{M}.Augmented", plain=f"{M}.members")) == 0
    assert main(audit_words(data=f"{M}.Augmented", plain=f"{M}.members")) == 0


def test_a_hardening(user, capsys):
    before = (user / "finished.ckpt").read_bytes()
    assert main(harden("--control", "--defense.alpha", "0.5", rate="0.1", steps="4", max_epochs="2")) == 0
    said = capsys.readouterr().out
    files = {path.name for path in Path("hardened").iterdir()}
    assert {"hardened.ckpt", "mask.safetensors", "finished.json", "hardened.json", "control.json"} <= files
    assert "report.html" in files
    assert (user / "finished.ckpt").read_bytes() == before
    assert re.search(r"finished +control, r = 0 +hardened, r = 0.1", said)
    hardened = mine().Net.load_from_checkpoint("hardened/hardened.ckpt")
    assert type(hardened) is mine().Net
    mask = WeightMask.load("hardened/mask.safetensors")
    assert mask.count == round(0.1 * mask.total)
    vanilla = load_vanilla("init.safetensors", mine().Net())
    for name, parameter in hardened.named_parameters():
        chosen = mask.masks[name]
        assert torch.equal(parameter[chosen], vanilla[name][chosen])
    saved = {name: AuditResult.load(f"hardened/{name}.json") for name in ("finished", "control", "hardened")}
    data = mine().Data()
    sides = {"members": data.train_dataloader(), "nonmembers": data.test_dataloader()}
    for name, model in {"hardened": hardened, "finished": mine().Net.load_from_checkpoint("finished.ckpt")}.items():
        assert audit(model, **sides).values() == saved[name].values()
    assert len({saved[name].values()["loss/auroc"] for name in saved}) == 3
    # A second run would overwrite the first.
    kept = (user / "hardened" / "hardened.ckpt").read_bytes()
    assert main(harden("--control")) == 2
    assert "hardened.ckpt" in capsys.readouterr().err
    assert (user / "hardened" / "hardened.ckpt").read_bytes() == kept
    assert main(["report", "hardened/finished.json", "hardened/hardened.json"]) == 0
    assert "hardened" in Path("report.html").read_text(encoding="utf-8")
    assert main(["report", "hardened/finished.json"]) == 2


def test_the_hardened_model_is_not_audited_on_its_reference_data(user, capsys):
    assert main(harden("--overwrite", steps="2")) == 0
    settings = {"checkpoint": "hardened/hardened.ckpt"}
    assert main(audit_words(**settings)) == 0
    capsys.readouterr()
    assert main(audit_words(nonmembers="val", **settings)) == 1
    assert "reference data of the scoring" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_model(user):
    for out in ("a", "b"):
        assert main(harden(out=out, steps="2")) == 0
    a, b = (torch.load(f"{out}/hardened.ckpt", weights_only=True)["state_dict"] for out in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_hardening_with_other_values_that_are_not_held(user, capsys):
    levers = {"values": "fresh", "hold": "false", "seed": 3}
    assert main(harden("--dry-run", rate="0.1", **levers)) == 0
    assert "10.00% of them are then rewound to fresh values and not held" in capsys.readouterr().out
    assert main(harden(rate="0.1", steps="2", **levers)) == 0
    assert "hardened, r = 0.1, rewound to fresh values and not held" in capsys.readouterr().out
    page = Path("hardened/report.html").read_text(encoding="utf-8")
    assert "were rewound to fresh values and not held" in page
    settings = json.loads(Path("hardened/settings.json").read_text())["settings"]
    assert {name: settings[name] for name in ("values", "hold", "batchnorm")} == {
        "values": "fresh", "hold": "False", "batchnorm": "keep"
    }  # fmt: skip
    rewind = torch.load("hardened/hardened.ckpt", weights_only=True)["callbacks"]["CriticalRewindCallback"]["settings"]
    assert (rewind["values"], rewind["seed"], rewind["hold"]) == ("fresh", 3, False)


def test_a_hardening_with_shadow_models(user, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    more = ("--training.max_epochs", "3", "--fail-above", "lira/auroc=0.99")
    assert main(harden(*more, shadows="4", population=f"{M}.population", steps="2")) == 0
    for name in ("finished", "hardened"):
        result = AuditResult.load(f"hardened/{name}.json")
        assert set(result.estimates) == {"loss", "lira", "rmia"}
        assert not [remark for remark in result.remarks if "not trained as this model" in remark]
    assert "pass  lira/auroc" in capsys.readouterr().out


def test_an_audit_with_shadow_models(user):
    assert main(audit_words("--training.max_epochs", "3", shadows="4", attacks="[lira]", out="a.json")) == 0
    assert set(AuditResult.load("a.json").estimates) == {"lira"}


def test_the_population_is_read_by_its_own_loader(user):
    for name, population in (("plain", "population"), ("raw", "raw_population")):
        more = ("--training.max_epochs", "3", "--population", f"{M}.{population}")
        assert main(audit_words(*more, shadows="4", attacks="[rmia]", out=f"{name}.json")) == 0
    plain, raw = (AuditResult.load(f"{name}.json") for name in ("plain", "raw"))
    assert torch.allclose(plain.scores["rmia"], raw.scores["rmia"], atol=1e-6)


def test_thresholds_decide_by_the_bound_or_the_value(user, capsys):
    assert main(audit_words(out="a.json")) == 0
    estimate = AuditResult.load("a.json").estimates["loss"]["auroc"]
    between = (estimate.value + estimate.interval.high) / 2
    gate = ("--fail-above", f"loss/auroc={between}")
    capsys.readouterr()
    assert main(audit_words(*gate)) == 3
    said = capsys.readouterr().out
    assert "FAIL  loss/auroc" in said
    assert "these examples cannot show it" in said
    assert main(audit_words(*gate, "--judge", "value")) == 0
    assert "pass  loss/auroc" in capsys.readouterr().out
    assert main(audit_words(*gate, "--fail-above", "loss_gap=100", "--judge", "value")) == 0
    assert main(audit_words("--fail-above", "loss_gap=100", "--fail-above", "loss/auroc=0.1")) == 3


@pytest.mark.parametrize("place", ["before", "after"])
def test_thresholds_of_the_file_and_of_the_command_line_are_joined(place, user, capsys):
    Path("gate.yaml").write_text(yaml.safe_dump({"fail_above": ["loss_gap=100"]}))
    gate, file = ["--fail-above", "loss/auroc=0.1"], ["--config", "gate.yaml"]
    more = file + gate if place == "before" else gate + file
    assert main(audit_words(*more)) == 3
    said = capsys.readouterr().out
    assert "FAIL  loss/auroc" in said
    assert "pass  loss_gap" in said


def test_a_threshold_below_is_for_what_is_better_high(user, capsys):
    assert main(audit_words("--fail-below", "test_accuracy=0.5")) == 0
    assert "pass  test_accuracy" in capsys.readouterr().out
    assert main(audit_words("--fail-below", "test_accuracy=1.0", "--fail-above", "loss/auroc=1")) == 3
    assert "FAIL  test_accuracy" in capsys.readouterr().out


def test_a_value_at_the_threshold_passes(user):
    assert main(audit_words(out="a.json")) == 0
    value = AuditResult.load("a.json").estimates["loss"]["auroc"].value
    assert main(audit_words("--fail-above", f"loss/auroc={value!r}", "--judge", "value")) == 0


def test_swapped_sides_do_not_pass(user, capsys):
    swapped = {"members": "test", "nonmembers": "train"}
    assert main(audit_words("--fail-above", "loss/auroc=0.9", **swapped)) == 1
    assert "swapped" in capsys.readouterr().err
    assert main(audit_words("--fail-above", "loss_gap=100", **swapped)) == 1
    assert "swapped" in capsys.readouterr().err
    assert main(audit_words(**swapped)) == 0  # its remarks say it


def test_a_metric_without_an_upper_bound_does_not_pass(user, capsys):
    gate = ("--fail-above", "loss/epsilon_lower_bound=100")
    assert main(audit_words(*gate)) == 1
    assert "pass --judge value" in capsys.readouterr().err
    assert main(audit_words(*gate, "--judge", "value")) == 0


def test_a_failed_hardening_does_not_block_the_next(user, capsys):
    settings = {"steps": "2", "model": f"{M}.FailingNet"}
    Path("fail").touch()
    assert main(harden(**settings)) == 1
    assert "no such disk" in capsys.readouterr().err
    Path("fail").unlink()
    assert main(harden(**settings)) == 0
    assert not Path("hardened/unfinished").exists()
    assert Path("hardened/finished.json").exists()


def test_a_threshold_in_a_hardening(user):
    assert main(harden("--fail-above", "loss/auroc=0.1", steps="2")) == 3
    assert Path("hardened/hardened.ckpt").exists()


def test_a_dry_run_writes_nothing(user, capsys):
    before = sorted(user.iterdir())
    for given in (harden("--control", "--dry-run"), audit_words("--dry-run", out="a.json"), check("--dry-run")):
        assert main(given) == 0
        assert capsys.readouterr().out.startswith("This would be done:")
    assert [path for path in sorted(user.iterdir()) if path.name != "__pycache__"] == before


def test_a_printed_configuration_gives_the_same_options(user, capsys):
    given = audit_words("--model.width", "16", "--fail-above", "loss/auroc=0.9", "--data.members", "150")
    assert main([*given, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == {"class_path": f"{M}.Net", "init_args": {"width": 16}}
    assert printed["data"]["init_args"] == {"members": 150}
    Path("audit.yaml").write_text(yaml.safe_dump(printed))
    assert main(["audit", "--config", "audit.yaml", "--out", "a.json", "--judge", "value"]) == 0
    assert int(AuditResult.load("a.json").is_member.sum()) == 150
    # The command line wins over the file, and changes one argument alone.
    assert (
        main(["audit", "--config", "audit.yaml", "--data.members", "100", "--out", "b.json", "--judge", "value"]) == 0
    )
    assert int(AuditResult.load("b.json").is_member.sum()) == 100


def test_files_of_weights_of_every_kind(user):
    save_file(torch.load("weights.pt", weights_only=True), "weights.safetensors")
    for checkpoint in ("finished.ckpt", "weights.pt", "weights.safetensors"):
        assert main(audit_words(checkpoint=checkpoint)) == 0
    assert main(check(checkpoint="weights.pt", vanilla=f"{M}.fresh")) == 0


def test_a_checkpoint_with_other_objects_is_read_only_when_asked(user, capsys):
    content = torch.load("finished.ckpt", weights_only=True)
    content["hyper_parameters"]["lr"] = Path("1")  # an object of another type
    torch.save(content, "odd.ckpt")
    assert main(audit_words(checkpoint="odd.ckpt")) == 2
    assert "--unpickle" in capsys.readouterr().err
    assert main(audit_words("--unpickle", "--model.lr", "0.1", checkpoint="odd.ckpt")) == 0


def test_datasets_need_a_batch_size_for_a_fit_alone(user, capsys):
    settings = {"members": f"{M}.members", "nonmembers": f"{M}.population"}
    assert main(audit_words("--members.count", "50", out="a.json", **settings)) == 0
    assert int(AuditResult.load("a.json").is_member.sum()) == 50
    assert main(harden(**settings)) == 2
    assert "pass --batch_size" in capsys.readouterr().err
    assert main(harden(batch_size="32", steps="2", **settings)) == 0


@pytest.mark.parametrize("command", ["check", "harden", "audit", "report"])
def test_help_of_a_command_has_an_example_and_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"  cwrf {command} " in said  # an example
    assert "exit codes:" in said
    assert "--dry-run" in said
    assert "_args" not in said
    assert main(["--help"]) == 0
    assert f"  {command} " in capsys.readouterr().out


def test_it_says_nothing_without_a_command(capsys):
    assert main([]) == 2
    assert "usage: cwrf" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning_cwrf ")


def test_the_surroundings_stay_as_they_were(user):
    path, filters, level = [*sys.path], [*warnings.filters], logging.getLogger("lightning.pytorch").level
    assert main(audit_words()) == 0
    assert sys.path == path
    assert warnings.filters == filters
    assert logging.getLogger("lightning.pytorch").level == level


def test_the_current_folder_can_be_imported_from(user):
    given = [sys.executable, "-m", "lightning_cwrf", *words("audit", GOOD), "--fail-above", "loss/auroc=0.1"]
    run = subprocess.run(
        given, capture_output=True, text=True, cwd=user, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert run.returncode == 3, run.stderr
    assert "FAIL  loss/auroc" in run.stdout
