"""What the commands say at the end, and what a report of saved audits has beside them."""

import re
import shutil
from pathlib import Path

import pytest
from torch.nn import functional as F

from lightning_cwrf import AuditResult, WeightMask
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.commands import main
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.report.changes import conclusion
from tests.commands.conftest import NAME as M
from tests.commands.test_runs import mine
from tests.commands.test_wrong_use import audit as audit_words
from tests.commands.test_wrong_use import export, harden
from tests.report.cases import Page

pytestmark = pytest.mark.slow


@pytest.fixture
def hardened(user, capsys):
    """What a hardening with default strength printed; its files are in the folder hardened."""
    assert main(harden("--control", steps="2", max_epochs="2")) == 0
    return capsys.readouterr()


def page_of(path):
    return Page(Path(path).read_text(encoding="utf-8"))


def test_a_hardening_says_what_it_used_and_what_came_of_it(hardened):
    (loss,) = set(re.findall(r"alpha = (\S+) \(the finished model's loss on the reference data\)", hardened.out))
    tuning = f"fine-tuning: 2 epochs with relaxloss, alpha = {loss} (the finished model's loss on the reference data), "
    tuning += "upper = 1.0 (default); change it with --max_epochs, --defense.alpha"
    assert hardened.out.count(tuning) == 2  # before it, and in the summary
    model = mine().Net.load_from_checkpoint("finished.ckpt")
    outputs = collect_outputs(model, mine().Data().val_dataloader())
    assert loss == str(float(f"{F.cross_entropy(outputs.logits, outputs.targets):.2g}"))
    files = {"finished": "finished", "control, r = 0": "control", "hardened, r = 0.03": "hardened"}
    said = conclusion({name: AuditResult.load(f"hardened/{file}.json") for name, file in files.items()})
    assert hardened.out.endswith("\n".join(["What this shows:", *(f"  {line}" for line in said)]) + "\n")
    assert all(line in page_of("hardened/report.html").text for line in said if "→" in line)
    seconds = re.search(r"^seconds +(\S+) +\S+ +\S+$", hardened.out, re.M)
    assert seconds[1] == "–"
    assert "\r" not in hardened.err


def test_the_plan_says_how_strong_the_defense_is(user, capsys):
    assert main(harden("--dry-run", "--defense.alpha", "0.5", "--defense.upper", "0.9", max_epochs="7")) == 0
    assert "fine-tune 7 epochs with relaxloss, alpha = 0.5, upper = 0.9; change" in capsys.readouterr().out
    assert main(harden("--dry-run")) == 0
    assert "relaxloss, alpha = the finished model's loss on the reference data, upper" in capsys.readouterr().out


def test_a_given_strength_is_used(user, capsys):
    assert main(harden("--defense.alpha", "0.7", steps="2", max_epochs="1")) == 0
    out = capsys.readouterr().out
    assert out.count("relaxloss, alpha = 0.7, upper = 1.0 (default)") == 2
    assert "loss on the reference data" not in out


def test_reference_data_without_true_labels_give_no_strength(user, capsys):
    unlabelled = ("--reference", f"{M}.unlabelled")
    assert main(harden(*unlabelled, steps="2", max_epochs="1")) == 2
    said = capsys.readouterr().err
    assert "--defense.alpha is the finished model's loss on the reference data where it is not given" in said
    assert not Path("hardened").exists()
    assert main(harden(*unlabelled, "--defense.alpha", "0.5", steps="2", max_epochs="1")) == 0


def test_an_audit_ends_with_its_verdict(user, capsys):
    assert main(audit_words(out="a.json")) == 0
    (line,) = conclusion({"the model": AuditResult.load("a.json")})
    assert capsys.readouterr().out.endswith(f"What this shows:\n  {line}\n")


def test_a_report_of_saved_audits_has_the_settings_the_mask_and_the_seconds(hardened, capsys):
    files = [f"hardened/{name}.json" for name in ("finished", "control", "hardened")]
    assert main(["report", *files]) == 0
    first, again = page_of("hardened/report.html"), page_of("report.html")
    mask = WeightMask.load("hardened/mask.safetensors")
    assert f"{mask.count:,} of {mask.total:,} weights" in again.text
    settings = [row for row in first.cells if row[0] in ("rate", "defense.alpha", "max_epochs", "checkpoint")]
    assert len(settings) == 4
    for row in [*settings, next(row for row in first.cells if row[0] == "seconds")]:
        assert row in again.cells
    assert "What this shows:" in capsys.readouterr().out
    # The finished model alone was not hardened.
    assert main(["report", files[0], "--out", "alone.html"]) == 0
    assert "Rewound weights" not in page_of("alone.html").text
    assert "No settings were given" in page_of("alone.html").text


def test_a_report_takes_a_mask_by_its_file(hardened):
    Path("elsewhere").mkdir()
    for name in ("finished.json", "hardened.json"):
        shutil.copy(f"hardened/{name}", f"elsewhere/{name}")
    given = ["report", "elsewhere/finished.json", "elsewhere/hardened.json"]
    assert main(given) == 0
    assert "Rewound weights" not in page_of("report.html").text
    assert main([*given, "--mask", "hardened/mask.safetensors", "--overwrite"]) == 0
    assert "Rewound weights" in page_of("report.html").text


def test_what_does_not_belong_together_is_an_error(hardened, capsys):
    given = ["report", "hardened/finished.json", "hardened/hardened.json"]
    mask = WeightMask.load("hardened/mask.safetensors")
    (~mask).save("other.safetensors")
    assert main([*given, "--mask", "other.safetensors"]) == 2
    assert "other.safetensors is not the mask of the hardening that hardened" in capsys.readouterr().err
    assert main([*given, "--mask", "finished.ckpt"]) == 2
    (~mask).save("hardened/mask.safetensors")
    assert main(given) == 2
    assert "is not the mask of the hardening" in capsys.readouterr().err
    Path("hardened/mask.safetensors").unlink()
    assert main(given) == 0
    assert "the report does not show the rewound weights" in capsys.readouterr().out
    shutil.copy("hardened/control.json", "hardened/hardened.json")
    assert main([*given, "--overwrite"]) == 2
    assert "is another audit than the one that the hardening wrote" in capsys.readouterr().err


def test_a_fine_tuning_tells_its_epochs_in_lines_where_there_is_no_terminal(hardened):
    assert re.findall(r"^epoch .*", hardened.err, re.M) == 2 * ["epoch 1 of 2", "epoch 2 of 2"]


def test_a_model_is_exported_with_its_card(user, capsys):
    assert main(audit_words(out="a.json")) == 0
    capsys.readouterr()
    given = export(out="given/model.ckpt", audit="a.json", title="Digits")
    assert main([*given, "--dry-run"]) == 0
    assert "write given" in capsys.readouterr().out
    assert not Path("given").exists()
    assert main(given) == 0
    card = Path("given/model.md").read_text(encoding="utf-8")
    assert card.startswith("# Digits")
    assert "loss attack" in card
    assert main(audit_words(checkpoint="given/model.ckpt", out="b.json")) == 0
    assert AuditResult.load("a.json").values() == AuditResult.load("b.json").values()
    assert main(given) == 2
    assert main([*given, "--overwrite"]) == 0
    assert main(export(out="model.safetensors", model=f"{M}.HookedNet")) == 0


def card_of(path):
    return Path(path).with_suffix(".md").read_text(encoding="utf-8")


def test_the_card_of_a_hardened_model_says_how_it_was_hardened(hardened, capsys):
    given = export(out="given/model.ckpt", checkpoint="hardened/hardened.ckpt", audit="hardened/hardened.json")
    assert main(given) == 0
    card = card_of("given/model")
    count = WeightMask.load("hardened/mask.safetensors").count
    for line in (
        "defense: name | RelaxLossMixin",
        "defense: alpha taken from | the finished model's loss on the reference data",
        "rewinding: rate | 0.03",
        "rewinding: vanilla | init.safetensors",
        "fine-tuning: max_epochs | 2",
        "scoring: steps | 2",
    ):
        assert f"| {line} |" in card, card
    assert f"| rewinding: chosen | {count:,} of " in card
    assert "not known" not in card
    # Elsewhere, the settings are named.
    shutil.copy("hardened/hardened.ckpt", "elsewhere.ckpt")
    assert main(export(out="b.ckpt", checkpoint="elsewhere.ckpt")) == 0
    assert "Nothing is known" in card_of("b")
    assert main(export(out="c.ckpt", checkpoint="elsewhere.ckpt", settings="hardened/settings.json")) == 0
    assert "| defense: alpha | " in card_of("c")


def test_the_card_has_no_settings_of_another_hardening(hardened, capsys):
    own = "hardened/settings.json"
    assert main(export(out="a.ckpt", settings=own)) == 2  # of the model before the hardening
    assert f"{own} is of a hardening that gave other weights than those of finished.ckpt" in capsys.readouterr().err
    assert not Path("a.ckpt").exists()
    shutil.copy("finished.ckpt", "hardened/finished.ckpt")
    assert main(export(out="a.ckpt", checkpoint="hardened/finished.ckpt")) == 0
    assert "gave other weights than those of hardened/finished.ckpt: the card has no" in capsys.readouterr().out
    assert "Nothing is known" in card_of("a")
    shutil.copy("hardened/hardened.json", own)
    assert main(export(out="b.ckpt", checkpoint="hardened/hardened.ckpt")) == 2
    assert f"{own} is not a record of a hardening" in capsys.readouterr().err
    assert main(export("--overwrite", out="a.ckpt", checkpoint="hardened/finished.ckpt")) == 0
    assert f"{own} is no record of a hardening: the card has no settings" in capsys.readouterr().out


def test_the_card_says_where_it_is_not_known_whose_settings_they_are(hardened):
    record = read_json("hardened/settings.json", "lightning_cwrf.Hardening/1")
    del record["weights"]  # as an early version wrote it
    write_json(record, "hardened/settings.json")
    assert main(export(out="a.ckpt", checkpoint="hardened/hardened.ckpt")) == 0
    assert "| of these weights | not known |" in card_of("a")
    assert "| defense: alpha | " in card_of("a")


def test_shadow_models_are_trained_on_a_pool_that_holds_all_and_more(user):
    pool = ("--pool", f"{M}.members", "--pool.count", "1100")
    assert main(audit_words("--training.max_epochs", "2", *pool, shadows="4", out="a.json")) == 0
    assert set(AuditResult.load("a.json").estimates) == {"loss", "lira"}
