"""Training shadow models: outputs, keys, base models and failures."""

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.shadows import train_shadows
from lightning_cwrf.shadows.train import model_seed
from tests import recipe_functions
from tests.helpers import digits, part
from tests.recipe_functions import Counted, quick, runs

train = functools.partial(train_shadows, workers=1, progress=False)


def test_outputs_are_those_of_the_trained_models(tmp_path):
    shadows = train(quick, part(0, 40), 2, population=part(60, 70), store=tmp_path, keep_weights=True)
    assert shadows.logits.shape == (2, 40, 10)
    assert shadows.population_logits.shape == (2, 10, 10)
    assert shadows.targets.tolist() == digits().tensors[1][:40].tolist()
    from tests.helpers import Classifier

    for i in range(2):
        model = Classifier().eval()
        model.load_state_dict(shadows.weights(i))
        with torch.no_grad():
            torch.testing.assert_close(model(digits().tensors[0][:40]), shadows.logits[i])
            torch.testing.assert_close(model(digits().tensors[0][60:70]), shadows.population_logits[i])
    assert not torch.equal(shadows.logits[0], shadows.logits[1])


def test_the_callers_rng_is_kept_and_does_not_matter(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = train(quick, part(0, 20), 2, store=tmp_path / "a")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    torch.manual_seed(123)
    np.random.seed(5)
    random.seed(6)
    second = train(quick, part(0, 20), 2, store=tmp_path / "b")
    assert torch.equal(first.logits, second.logits)


def test_nothing_is_trained_twice_and_more_models_add_to_the_first(tmp_path):
    recipe = Counted(tmp_path / "log")
    first = train(recipe, part(0, 20), 2, store=tmp_path)
    again = train(recipe, part(0, 20), 4, store=tmp_path)
    assert torch.equal(again.logits[:2], first.logits)
    assert runs(recipe.log) == [str(model_seed(0, i)) for i in range(4)]
    assert len(set(runs(recipe.log))) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "pool": part(1, 21)},
        lambda c: {**c, "pool": Subset(digits(), list(range(19, -1, -1)))},
        lambda c: {**c, "pool": TensorDataset(digits().tensors[0][:20], digits().tensors[1][:20].roll(1))},
        lambda c: {**c, "recipe": Counted(c["recipe"].log, fail_at=99)},
        lambda c: {**c, "seed": 1},
        lambda c: {**c, "population": part(70, 80)},
    ],
)
def test_other_data_recipe_or_seed_is_another_key(tmp_path, change):
    """Outputs are matched by content, not by position: all these have 20 rows."""
    case = {"recipe": Counted(tmp_path / "log"), "pool": part(0, 20), "population": part(60, 70), "seed": 0}
    first = train(**case, n=2, store=tmp_path)
    other = train(**change(case), n=2, store=tmp_path)
    assert first.store.key != other.store.key
    assert len(runs(case["recipe"].log)) == 4


def test_a_version_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_functions, "LOCK", __import__("threading").Lock(), raising=False)
    recipe = functools.partial(recipe_functions.setting, "LOCK")
    keys = [train(recipe, part(0, 20), 2, store=tmp_path, version=v).store.key for v in ("1", "2", "1", None)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


def test_a_recipe_must_return_a_module(tmp_path):
    with pytest.raises(RuntimeError, match="must return the trained module"):
        train(nothing, part(0, 20), 2, store=tmp_path)


def nothing(members, seed):
    return None


def test_a_failing_model_is_named_and_does_not_stop_the_others(tmp_path):
    recipe = Counted(tmp_path / "log", fail_at=3)
    with pytest.raises(RuntimeError, match=r"1 of 4 shadow models failed(.|\n)*shadow model 2 (.|\n)*the third one"):
        train(recipe, part(0, 20), 4, store=tmp_path)
    train(recipe, part(0, 20), 4, store=tmp_path)
    assert len(runs(recipe.log)) == 5


def fails(members, seed):
    raise ArithmeticError("boom")


def test_the_same_failure_is_reported_once(tmp_path):
    with pytest.raises(RuntimeError) as error:
        train(fails, part(0, 20), 4, store=tmp_path)
    assert str(error.value).count("Traceback") == 1
    assert all(f"shadow model {i} " in str(error.value) for i in range(4))


def test_base_models_are_fine_tuned(tmp_path):
    base_log, log = Counted(tmp_path / "base"), Counted(tmp_path / "log")
    pool = part(0, 20)
    base = train(base_log, pool, 4, store=tmp_path, keep_weights=True)
    tuned = train(log, pool, 4, store=tmp_path, base=base)
    assert torch.equal(tuned.membership, base.membership)
    assert runs(log.log) == runs(base_log.log)  # the same seeds
    assert not torch.equal(tuned.logits, base.logits)
    train(log, pool, 4, store=tmp_path, base=base)
    assert len(runs(log.log)) == 4
    with pytest.raises(ValueError, match="another pool"):
        train(log, part(1, 21), 4, store=tmp_path, base=base)
    with pytest.raises(ValueError, match="too few models or another seed"):
        train(log, pool, 6, store=tmp_path, base=base)
    with pytest.raises(ValueError, match="another seed"):
        train(log, pool, 4, store=tmp_path, base=base, seed=3)
    light = train(quick, pool, 2, store=tmp_path)
    with pytest.raises(FileNotFoundError, match="keep_weights=True"):
        train(log, pool, 2, store=tmp_path, base=light)


def test_float16_outputs_and_views(tmp_path):
    views = default_views()
    settings = {"population": part(60, 70), "views": views}
    full = train(quick, part(0, 40), 2, **settings, store=tmp_path)
    half = train(quick, part(0, 40), 2, **settings, store=tmp_path, dtype=torch.float16)
    assert full.store.key != half.store.key
    assert full.view_logits.shape == (2, len(views), 40, 10)
    torch.testing.assert_close(full.view_logits[:, 0], full.logits)  # the first view is the image itself
    for name in ("logits", "population_logits", "view_logits"):
        kept = getattr(half, name)
        assert kept.dtype == torch.float16
        torch.testing.assert_close(kept.float(), getattr(full, name), rtol=1e-3, atol=1e-3)
    sizes = [s.store.outputs_path(0).stat().st_size for s in (half, full)]
    assert sizes[0] < 0.6 * sizes[1]
    assert len({s.store.key for s in (full, train(quick, part(0, 40), 2, views=views[:2], store=tmp_path))}) == 2
    with pytest.raises(ValueError, match="float32 or float16, not"):
        train(quick, part(0, 40), 2, store=tmp_path, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"logits are not all finite as torch\.float16"):
        train(huge, part(0, 40), 2, store=tmp_path, dtype=torch.float16)


def huge(members, seed):
    model = quick(members, seed)
    for p in model.parameters():
        p.data *= 1e4
    return model


def with_base(members, seed, base):
    pytest.fail("it trained")


def no_training(members, seed):
    pytest.fail("it trained")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 2.0}, TypeError, "number of shadow models must be an integer"),
        ({"n": "2"}, TypeError, "number of shadow models must be an integer"),
        ({"n": -2}, ValueError, "even and at least 2"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer, not None"),
        ({"stack": 1.5}, TypeError, "stack must be an integer"),
        ({"stack": True}, TypeError, "stack must be an integer"),
        ({"stack": 0}, ValueError, "stack must be an integer of at least 1"),
        ({"workers": "2"}, TypeError, "workers must be an integer, not the str '2'"),
        ({"workers": 1.0}, TypeError, "workers must be an integer"),
        ({"workers": 0}, ValueError, "workers must not be 0"),
        ({"store": None}, TypeError, "store must be the path of a folder, not None"),
        ({"store": 3}, TypeError, "store must be the path of a folder"),
        ({"keep_weights": "yes"}, TypeError, "keep_weights must be True or False"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"dtype": "float16"}, ValueError, "float32 or float16, not float16"),
        ({"views": torch.flip}, TypeError, "views must be a list of functions"),
        ({"views": [1]}, TypeError, "views must be a list of functions"),
        ({"version": 3}, TypeError, "version must be a text"),
        ({"version": ""}, TypeError, "version must be a text"),
        ({"recipe": with_base}, TypeError, r"called as recipe\(members, seed\)(.|\n)*pass them as base="),
        ({"base": True}, TypeError, r"called as recipe\(members, seed, base\)(.|\n)*leave base out"),
        ({"recipe": lambda: None}, TypeError, r"called as recipe\(members, seed\)"),
        ({"recipe": lambda members, seed: None}, TypeError, "a lambda has no name"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise_before_any_training(tmp_path, arguments, error, message):
    if arguments.get("base") is True:
        arguments = {"base": train(quick, part(0, 20), 2, store=tmp_path, keep_weights=True)}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        train(**{"recipe": no_training, "pool": part(0, 20), "n": 2, "store": tmp_path, **arguments})
    assert sorted(tmp_path.rglob("*")) == before


class Counting(Dataset):
    """Counts how often its examples are read."""

    reads = 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        Counting.reads += 1
        return part(100 + i, 101 + i)[0]


def test_the_population_is_read_for_the_training_alone(tmp_path):
    shadows = train(Counted(tmp_path / "log"), part(0, 20), 2, population=Counting(), store=tmp_path)
    reads = Counting.reads
    targets, digests = shadows.read_population()
    some, few = shadows.part(torch.arange(20), torch.tensor([5, 2])).read_population()
    assert Counting.reads == reads
    again, same = replace(shadows, population_read=None).read_population()
    assert (again.tolist(), same) == (targets.tolist(), digests)
    assert (some.tolist(), few) == (targets[[5, 2]].tolist(), [digests[5], digests[2]])
