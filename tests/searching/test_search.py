"""The search over real trainings, which are tiny."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer

from lightning_cwrf import (
    CWRFConfig,
    RecipeSearch,
    ShadowRecipe,
    audit_recipe,
    default_candidates,
    search_recipes,
    train_shadows,
)
from lightning_cwrf.defenses import available_defenses, create_defense, defense_class
from lightning_cwrf.searching.run import _halves
from tests.helpers import Classifier, loader, part, trained, trainer
from tests.recipes.modules import Plain, stackable

POOL, POPULATION, REFERENCE = part(0, 160), part(200, 260), part(300, 340)


def tuned(alpha, rate=0.0, **settings):
    cwrf = CWRFConfig(REFERENCE, rate=rate, steps=2, batch_size=32) if rate else None
    recipe = stackable(Plain, max_epochs=1)
    return replace(recipe, defense=create_defense("relaxloss", alpha=alpha), cwrf=cwrf, **settings)


def timed():
    return [Timer()]


BASE = stackable(Plain, max_epochs=3)
CANDIDATES = {
    "weak": tuned(0.1),
    "strong": tuned(2.5),
    "weak, rewound": tuned(0.1, 0.1),
    "one by one": tuned(0.5, callbacks=timed),
}


def search(folder, candidates=CANDIDATES, **settings):
    given = {"population": POPULATION, "models": (8, 10), "floor": 0.3, "workers": 1, "stack": 8, "progress": False}
    return search_recipes(BASE, candidates, POOL, store=folder, **{**given, **settings})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def found(store):
    return search(store)


pytestmark = pytest.mark.slow


def test_every_candidate_has_a_fate_and_finalists_have_the_most_models(found):
    assert [trial.name for trial in found.trials] == list(CANDIDATES)
    assert {trial.models for trial in found.finalists} == {10}
    assert len(found.finalists) == 2
    assert {trial.models for trial in found.trials if trial.dropped} == {8}
    assert {each.rewinds for each in found.finalists} == {True, False}
    assert set(found.audits) == {"no defense", *(trial.name for trial in found.finalists)}


def test_the_figures_are_of_examples_that_took_no_part_in_the_choice(found, store):
    base = train_shadows(BASE, POOL, 10, population=POPULATION, store=store, keep_weights=True, progress=False)
    name = found.finalists[0].name
    outputs = train_shadows(CANDIDATES[name], POOL, 10, population=POPULATION, store=store, base=base, progress=False)
    choose, show = _halves(outputs, 0)
    chosen = audit_recipe(outputs.part(*choose), attacks=["lira"], progress=False)
    shown = audit_recipe(outputs.part(*show), attacks=["lira"], progress=False)
    assert found.finalists[0].leak == chosen.estimates["lira"]["auroc"]
    assert found.audits[name].estimates["lira"]["auroc"] == shown.estimates["lira"]["auroc"]
    assert found.audits[name].model_metrics["test_accuracy"] == shown.model_metrics["test_accuracy"]
    assert not set(choose[0].tolist()) & set(show[0].tolist())


def test_a_search_that_runs_again_trains_nothing_and_finds_the_same(found, store, monkeypatch, tmp_path):
    monkeypatch.setattr(ShadowRecipe, "__call__", None)
    monkeypatch.setattr(ShadowRecipe, "train_stack", None)
    again = search(store)
    assert found.save(tmp_path / "a.json").read_text() == again.save(tmp_path / "b.json").read_text()


def test_a_saved_search_is_read_as_it_was(found, tmp_path):
    found.save(tmp_path / "search.json")
    again = RecipeSearch.load(tmp_path / "search.json")
    assert str(again) == str(found)
    assert again.to_markdown() == found.to_markdown()
    assert again.front == found.front
    with pytest.raises(ValueError, match="loaded from a file has no recipes"):
        _ = again.recipe
    content = json.loads((tmp_path / "search.json").read_text())
    content["floor"] = 0.5
    (tmp_path / "search.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="digest"):
        RecipeSearch.load(tmp_path / "search.json")
    assert found.plot(tmp_path / "front").stat().st_size > 5_000


def test_the_best_hardens_a_finished_model(found):
    rewinding = replace(found, best="weak, rewound")
    model, vanilla = trained(width=4)
    recipe = replace(CANDIDATES["weak, rewound"], build_module=Classifier)
    rewinding = replace(rewinding, recipes={"weak, rewound": recipe})
    callbacks = rewinding.callbacks(vanilla)
    trainer(max_epochs=1, callbacks=callbacks).fit(model, loader(0, 64))
    kept = [(p == vanilla[name]).flatten() for name, p in model.named_parameters()]
    assert abs(int(torch.cat(kept).sum()) - 0.1 * len(torch.cat(kept))) <= 1
    assert type(model) is Classifier
    with pytest.raises(ValueError, match="vanilla='own', and your own hardening redraws, which is another recipe"):
        rewinding.callbacks("redraw")


def test_conclusions_name_the_best_with_its_uncertainty_and_its_rival(found):
    told = "\n".join(found.conclusions())
    assert told.startswith(f"Best: {found.best}. AUC of LiRA ")
    rival = next(each.name for each in found.finalists if each.name != found.best)
    assert rival in told
    none = replace(found, best=None)
    assert none.conclusions()[0].startswith("No candidate loses at most 30 points of test accuracy.")
    with pytest.raises(ValueError, match="no candidate loses at most 30% of test accuracy: raise floor"):
        _ = none.recipe


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (0.1, None),
        (0.29, "may exceed the floor of 30 points"),
        (0.31, "The estimate of the loss of accuracy, 31 points, exceeds the floor of 30 points"),
        (0.9, "loses more accuracy than the floor of 30 points"),
    ],
)
def test_conclusions_say_whether_the_floor_may_be_or_is_exceeded(found, loss, said):
    base = found.audits["no defense"]
    accuracy = base.jackknives["test_accuracy"]
    lower = replace(accuracy, value=accuracy.value - loss, cells=accuracy.cells.flip(1))  # flipped: with an error
    worse = replace(found.audits[found.best], jackknives={**base.jackknives, "test_accuracy": lower})
    told = " ".join(replace(found, audits={**found.audits, found.best: worse}).conclusions())
    shown = [each for each in ("may exceed", "The estimate of the loss", "loses more accuracy") if each in told]
    assert shown == [each for each in shown if each in (said or "")]
    assert (said or "but of the same models") in told


def test_conclusions_say_what_the_audit_of_the_best_remarks(found):
    remark = "model 0: it does no better than guessing"
    audits = {**found.audits, found.best: replace(found.audits[found.best], remarks=[remark])}
    told = f"{found.best}: {remark}"
    assert told in replace(found, audits=audits).conclusions()
    assert told not in replace(found, audits={**found.audits, "no defense": audits[found.best]}).conclusions()


def test_a_candidate_that_fails_is_named(store):
    candidates = {"fine": tuned(0.1), "fails": tuned(0.1, build_module=Fails)}
    with pytest.raises(RuntimeError, match=r"(?s)the search ends at 'fails', whose training failed: .*no more"):
        search(store, candidates)


class Fails(Plain):
    def configure_optimizers(self):
        raise ArithmeticError("no more")


def test_conclusions_say_what_was_not_shown(found):
    nothing = replace(found, audits=dict.fromkeys(found.audits, found.audits["no defense"]))
    assert any("was not shown to leak less than no defense" in line for line in nothing.conclusions())
    swapped = dict.fromkeys(found.audits, found.audits["no defense"])
    worse = found.best
    swapped["no defense"] = found.audits[worse]
    better = replace(found, audits=swapped, floor=1.0)
    shown = better.audits[worse].minus(better.audits["no defense"], "test_accuracy").interval.low > 0
    assert shown == any("made the test accuracy higher" in line for line in better.conclusions())


def test_a_floor_that_nothing_keeps_has_no_best(store):
    found = search(store, {"strong": tuned(2.5), "stronger": tuned(2.4)}, floor=0.0, models=(8,))
    assert found.best is None


def test_a_budget_ends_the_search_before_it_is_exceeded(store):
    found = search(store, budget=4 * 8 + 3)  # two more models of two candidates would be four
    assert {trial.models for trial in found.trials} == {8}
    assert "budget ended the search after 8 models" in str(found)
    with pytest.raises(ValueError, match="budget must be an integer of at least 32, not 31"):
        search(store, budget=31)


def test_time_that_is_over_ends_the_search_after_the_last_complete_round(store, tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: 60.0 * next(now))
    found = search(store, minutes=5.5)  # one reading for the start, one for each of four candidates, one more
    assert {trial.models for trial in found.trials} == {8}
    assert "the time was over in the round of 10 models" in str(found)
    with pytest.raises(RuntimeError, match="the time was over after 2 of 4 candidates of the first round"):
        search(store, minutes=2.5)


def test_no_base_models_are_trained_when_the_time_is_over(store, monkeypatch):
    now, trained = iter(range(1000)), []
    monkeypatch.setattr("time.monotonic", lambda: 60.0 * next(now))
    train = importlib.import_module("lightning_cwrf.searching.run").train_shadows
    monkeypatch.setattr(
        "lightning_cwrf.searching.run.train_shadows",
        lambda *given, **settings: trained.append(given[2]) or train(*given, **settings),
    )
    found = search(store, minutes=4.5)  # one reading for the start, one for each of four candidates
    assert "the time was over in the round of 10 models" in str(found)
    assert set(trained) == {8}


def test_copies_are_in_the_same_half():
    class Given:
        digests = [bytes([i % 20]) for i in range(60)]
        read_population = staticmethod(lambda: ([], [bytes([i // 3]) for i in range(30)]))

    first, second = _halves(Given(), 0)
    for i, digests in enumerate((Given.digests, Given.read_population()[1])):
        halves = [{digests[j] for j in half[i].tolist()} for half in (first, second)]
        assert not halves[0] & halves[1]
        assert sorted([*first[i].tolist(), *second[i].tolist()]) == list(range(len(digests)))
        assert len(halves[0]) == len(halves[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"candidates": [tuned(1.0)]}, TypeError, "must be recipes by name"),
        ({"candidates": {"a": tuned(1.0)}}, ValueError, "at least two candidates"),
        ({"candidates": {"a": 1, "b": tuned(1.0)}}, TypeError, "a must be a ShadowRecipe, not int"),
        ({"candidates": {"a": tuned(1.0, 0.1), "b": tuned(2.0, 0.1)}}, ValueError, "must not rewind"),
        ({"candidates": {"no defense": tuned(1.0), "b": tuned(2.0)}}, ValueError, "give the candidate another name"),
        ({"floor": 2}, ValueError, r"floor must be a number in \[0, 1\]"),
        ({"measure": "auroc"}, ValueError, "'<attack>/<metric>'"),
        ({"measure": "lira/nothing"}, ValueError, "'lira/nothing' is no measure that is lower the less a model leaks"),
        ({"measure": "lira/p1"}, ValueError, "'lira/p1' is no measure that is lower the less a model leaks"),
        (
            {"measure": "rmia/auroc", "population": None},
            ValueError,
            "'rmia/auroc' needs a population: pass population=",
        ),
        ({"measure": "nothing/auroc"}, ValueError, "nothing"),
        ({"models": (4, 8)}, ValueError, "models must be an integer of at least 8"),
        ({"models": (8, 8)}, ValueError, "increasing even numbers"),
        ({"models": 8}, ValueError, "increasing even numbers"),
        ({"minutes": 0}, ValueError, "minutes"),
    ],
)
def test_wrong_arguments_are_errors_before_any_training(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        search(tmp_path, **{"candidates": CANDIDATES, **settings})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_base_with_a_defense_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="without defense and cwrf"):
        search_recipes(tuned(1.0), CANDIDATES, POOL, store=tmp_path)


def test_the_default_candidates_have_every_strength_with_and_without_rewinding():
    tune = ShadowRecipe(LightningModule, {"max_epochs": 4}, batch_size=16, callbacks=lambda: [Timer()])
    found = default_candidates(tune, REFERENCE, rates=(0, 0.05), lam=0.9)
    strong = {name: defense_class(name).strengths for name in available_defenses()}
    assert len(found) == 2 * sum(map(len, strong.values()))
    assert {name.split()[0] for name in found} == {name for name, each in strong.items() if each}
    for name, recipe in found.items():
        assert (recipe.cwrf is None) == name.endswith("r = 0")
        assert recipe.cwrf is None or (recipe.cwrf.rate, recipe.cwrf.lam) == (0.05, 0.9)
        assert recipe.callbacks is tune.callbacks
    assert "past lam=0.001, r = 0.05" in found
    assert not any("past" in name for name in default_candidates(tune, rates=[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": (0.03,)}, "rates must contain 0"),
        ({"rates": (0, 2)}, r"rates must be a number in \[0, 1\]"),
        ({"nonmembers": None}, "pass nonmembers="),
        ({"nonmembers": None, "rates": [0], "defenses": ["past"]}, "past needs data"),
        ({"defenses": ["dpsgd"]}, "dpsgd has no strengths"),
        ({"defenses": "relaxloss"}, "must be a list of names"),
        ({"tune": replace(BASE, defense=create_defense("relaxloss"))}, "tune must have no defense"),
    ],
)
def test_wrong_default_candidates_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        default_candidates(**{"tune": BASE, "nonmembers": REFERENCE, **settings})
