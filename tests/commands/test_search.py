"""``cwrf search``, from the options to those of the hardening that follows."""

import pytest

from lightning_cwrf import RecipeSearch
from lightning_cwrf.commands import main
from tests.commands.conftest import NAME

GIVEN = ["--model", f"{NAME}.Net", "--data", f"{NAME}.Data", "--accelerator", "cpu"]
TRAINED = ["--training.max_epochs", "2", "--max_epochs", "1"]
FEW = [*TRAINED, "--defenses", "[hamp]", "--rates", "[0,0.1]", "--steps", "2", "--models", "[8]"]


@pytest.mark.slow
def test_a_search_names_the_options_of_the_hardening(user, capsys):
    few = [*FEW, "--workers", "1", "--stack", "8", "--floor", "1"]
    assert main(["search", *GIVEN, *few]) == 0
    said = capsys.readouterr().out
    found = RecipeSearch.load("searched/search.json")
    assert len(found.trials) == 6
    assert f"Best: {found.best}." in said
    assert found.to_markdown() == (user / "searched" / "search.md").read_text()
    words = said.partition("next: cwrf harden ")[2].partition(", with your model's options")[0].split()
    assert words[-2:] == ["--max_epochs", "1"]
    more = ["--checkpoint", "finished.ckpt", "--vanilla", "init.safetensors", "--dry-run"]
    assert main(["harden", *GIVEN, *words, *more]) == 0
    assert main(["search", *GIVEN, *few]) == 2
    assert "searched/search.json" in capsys.readouterr().err


def test_a_dry_run_lists_the_candidates(user, capsys):
    assert main(["search", *GIVEN, *FEW, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "fine-tune 8 of them by each of 6 candidates: 48 models" in said
    assert "candidate: hamp gamma=0.95 alpha=1, r = 0.1" in said
    assert not (user / "searched").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defenses", "[hamp]"], "cwrf search trains models as yours was trained first"),
        ([*TRAINED, "--defenses", "[dpsgd]"], "dpsgd has no strengths to try"),
        ([*TRAINED, "--defenses", "[nothing]"], "nothing"),
        ([*TRAINED, "--rates", "[0.03]"], "rates must contain 0"),
        ([*TRAINED, "--models", "[6]"], "models must be an integer of at least 8"),
        ([*TRAINED, "--floor", "2"], "floor must be a number in"),
        ([*TRAINED, "--budget", "3"], "budget must be an integer of at least"),
    ],
)
def test_wrong_use_is_found_before_any_training(words, message, user, capsys):
    assert main(["search", *GIVEN, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (user / "searched").exists()
