"""Examples that stand on two sides: found by inputs and label or by key, told, dropped or allowed."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_cwrf import (
    CWRFConfig,
    MIAAuditCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
    train_shadows,
    without_overlap,
)
from lightning_cwrf.auditing import AuditResult, audit
from lightning_cwrf.auditing.sides import apart
from lightning_cwrf.data import example_digests, example_ids, fingerprints
from lightning_cwrf.data.seen import load_seen_state, record_seen, seen_by, seen_state
from lightning_cwrf.defenses import create_defense
from lightning_cwrf.outputs import ModelOutputs
from tests.helpers import Classifier, digits, loader, part, trained, trainer
from tests.recipe_functions import Memorise

MEMBERS, OTHERS, POPULATION = part(0, 60), part(100, 160), part(200, 300)
MIXED = ConcatDataset([part(100, 140), part(10, 30)])  # places 40 to 59 are members


def test_an_overlap_is_an_error_with_counts_and_places():
    with pytest.raises(
        ValueError, match=r"20 of the 60 examples of nonmembers are members \(the same inputs and label"
    ) as e:
        audit(Classifier(), members=MEMBERS, nonmembers=MIXED)
    assert "at places 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, ..." in str(e.value)
    for way_out in ("without_overlap", 'overlap="drop"', "key=", 'overlap="allow"'):
        assert way_out in str(e.value)


def test_an_overlap_can_be_dropped_or_allowed(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    attacks = ["loss", "attack_p", "quantile_regression", "augmentation"]
    population = ConcatDataset([POPULATION, part(0, 5), part(100, 103)])
    given = {"members": MEMBERS, "attacks": attacks}
    dropped = audit(model, nonmembers=MIXED, population=population, overlap="drop", **given)
    exact = audit(model, nonmembers=part(100, 140), population=POPULATION, **given)
    assert dropped.values() == exact.values()
    assert dropped.overlap == {"nonmembers": list(range(40, 60)), "population": list(range(100, 108))}
    assert "20 examples of nonmembers are also in another set; they were left out" in str(dropped)
    allowed = audit(model, nonmembers=MIXED, population=population, overlap="allow", **given)
    assert len(allowed.losses) == 120
    assert allowed.overlap == dropped.overlap
    assert "also in another set; they were kept" in str(allowed)
    again = AuditResult.load(allowed.save(tmp_path / "a.json"))
    assert (again.overlap, again.overlap_policy) == (allowed.overlap, "allow")
    assert exact.overlap == {}
    with pytest.raises(ValueError, match="every example of nonmembers is on another side"):
        audit(model, members=MEMBERS, nonmembers=part(0, 20), overlap="drop")
    for wrong in ("keep", None, True):
        with pytest.raises(ValueError, match="overlap must be 'error' or 'drop' or 'allow'"):
            audit(model, members=MEMBERS, nonmembers=OTHERS, overlap=wrong)
        with pytest.raises(ValueError, match="overlap must be"):
            MIAAuditCallback(OTHERS, overlap=wrong)


@pytest.mark.parametrize("name", ["drop", "allow"])
def test_the_callback_drops_or_allows(name):
    callback = MIAAuditCallback(MIXED, overlap=name, every_n_epochs=0)
    trainer(max_epochs=1, callbacks=[callback]).fit(Classifier(), DataLoader(MEMBERS, batch_size=20))
    assert callback.result.overlap == {"nonmembers": list(range(40, 60))}
    assert len(callback.result.losses) == {"drop": 100, "allow": 120}[name]


@pytest.fixture(scope="module")
def shadows(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    pool = ConcatDataset([MEMBERS, OTHERS])
    return train_shadows(Memorise(), pool, 4, population=POPULATION, store=store, progress=False, workers=1)


def test_dropped_examples_leave_the_shadow_models_signals_too(shadows):
    torch.manual_seed(0)
    model = Classifier(width=16)
    both = ConcatDataset([OTHERS, part(0, 7)])
    record_seen(
        model, "non-members that PAST trains against", example_ids(DataLoader(part(200, 210), 10).__iter__().__next__())
    )
    given = {"members": MEMBERS, "shadows": shadows, "overlap": "drop"}
    dropped = audit(model, nonmembers=both, **given)
    assert dropped.overlap == {"nonmembers": list(range(60, 67)), "population": list(range(10))}
    assert set(dropped.scores) == {"loss", "lira", "rmia"}
    assert torch.equal(dropped.scores["lira"], audit(model, nonmembers=OTHERS, **given).scores["lira"])


class Relabelled(Dataset):
    def __init__(self, data, places):
        self.data = data
        self.places = places

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x, (y + 1) % 10 if i in self.places else y


def test_labels_that_differ_from_the_pools_are_told(shadows):
    """They were audited: LiRA compared losses of two labels."""
    model = Classifier(width=16)
    flipped = Relabelled(MEMBERS, {3, 5})
    with pytest.raises(
        ValueError,
        match=r"2 of the 120 audited examples have another label in the .* pool \(the first, number 3",
    ):
        audit(model, members=flipped, nonmembers=OTHERS, shadows=shadows)
    audit(model, members=flipped, nonmembers=OTHERS)


def test_another_number_of_classes_is_told(shadows):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    with pytest.raises(ValueError, match="the audited model has 12 classes, the shadow models 10"):
        audit(wide, members=MEMBERS, nonmembers=OTHERS, shadows=shadows)


def test_a_non_member_with_the_inputs_of_a_member_and_another_label_is_told():
    with pytest.warns(UserWarning, match="2 of the 60 non-members have the inputs of a member and another label"):
        result = audit(
            Classifier(), members=MEMBERS, nonmembers=Relabelled(ConcatDataset([part(100, 158), part(0, 2)]), {58, 59})
        )
    assert "2 of the 60 non-members have the inputs" in str(result)


class Categorical(Dataset):
    """People of whom three answers are known: many answer alike."""

    def __init__(self, people):
        answers = torch.randint(4, (1000, 3), generator=torch.Generator().manual_seed(0))
        self.rows = [(answers[i].float(), answers[i].sum() % 2, f"person {i}") for i in people]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def classification_step(self, batch):
        return self.layer(batch[0]), batch[1]


def test_people_who_share_their_answers_are_told_apart_by_a_key():
    """405 of 542 were members by content; there was no way to audit them."""
    members, others = Categorical(range(500)), Categorical(range(500, 1000))
    plain = [
        TensorDataset(torch.stack([r[0] for r in d.rows]), torch.stack([r[1] for r in d.rows]))
        for d in (members, others)
    ]
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"\d+ of the 500 examples of nonmembers are members"):
        audit(model, members=plain[0], nonmembers=plain[1])
    allowed = audit(model, members=plain[0], nonmembers=plain[1], overlap="allow")
    keyed = audit(
        Linear(),
        members=members,
        nonmembers=DataLoader(others, batch_size=32),
        key=lambda person: person[2],
    )
    assert len(keyed.losses) == len(allowed.losses) == 1000
    assert keyed.overlap == {}
    assert len(allowed.overlap["nonmembers"]) > 400
    twice = Categorical([*range(500, 900), *range(3)])
    with pytest.raises(
        ValueError, match=r"3 of the 403 examples of nonmembers are members \(the same key\), at places 400, 401, 402"
    ):
        audit(Linear(), members=members, nonmembers=twice, key=lambda person: person[2])
    assert len(without_overlap(twice, members, key=lambda person: person[2])) == 400


def test_categorical_shadow_pools_can_have_a_population(tmp_path):
    """The scoring, the defenses and train_shadows warn where content tells nobody apart."""
    data = Categorical(range(1000))
    plain = TensorDataset(torch.stack([r[0] for r in data.rows]), torch.stack([r[1] for r in data.rows]))
    pool, population = Subset(plain, range(200)), Subset(plain, range(200, 260))
    with pytest.warns(UserWarning, match="examples of the population are in the pool.* this may be chance"):
        shadows = train_shadows(fit_linear, pool, 4, population=population, store=tmp_path, progress=False, workers=1)
    sides = {"members": Subset(plain, range(100)), "nonmembers": Subset(plain, range(100, 200))}
    result = audit(nn.Linear(3, 2), **sides, shadows=shadows, overlap="allow")
    assert set(result.scores) == {"loss", "lira", "rmia"}


def fit_linear(members, seed):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in DataLoader(members, batch_size=20):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("key", "message"),
    [(3, "key must be a function of one example"), (lambda e: e[0], "not a list"), (lambda e: None, "not a NoneType")],
)
def test_keys_that_are_none(key, message):
    with pytest.raises(TypeError, match=message):
        audit(Classifier(), members=MEMBERS, nonmembers=OTHERS, key=key)


def test_a_key_gets_an_example_in_the_form_of_its_batch():
    x, y = torch.arange(6.0).view(3, 2), torch.tensor([7, 8, 9])
    seen = []
    ids = example_ids({"x": x, "label": y, "name": ["a", "b", "c"]}, lambda e: seen.append(e) or e["name"])
    assert ids == [("a", None), ("b", None), ("c", None)]
    assert torch.equal(seen[1]["x"], x[1])
    assert example_ids([x, y], lambda e: e[1]) == [(7, None), (8, None), (9, None)]
    assert example_ids((x, {"id": y.numpy()}), lambda e: e[1]["id"]) == [(7, None), (8, None), (9, None)]


def test_padding_is_no_content():
    """18 of 32 were found: the others stood in batches of another length."""
    rows = [torch.arange(1, n) for n in (3, 6, 4, 9)]

    def batch(chosen, pad=0):
        width = max(len(rows[i]) for i in chosen)
        ids = torch.stack([nn.functional.pad(rows[i], (0, width - len(rows[i])), value=pad) for i in chosen])
        mask = torch.stack([torch.arange(width) < len(rows[i]) for i in chosen]).long()
        return {"input_ids": ids, "attention_mask": mask}

    whole, few = fingerprints(batch([0, 1, 2, 3])), fingerprints(batch([0, 2]))
    assert few == [whole[0], whole[2]]
    assert len(set(whole)) == 4
    assert fingerprints(batch([0, 2], pad=1)) == [fingerprints(batch([0, 3], pad=1))[0], whole[2]]
    assert fingerprints(batch([0, 3])["input_ids"])[0] == fingerprints(batch([0])["input_ids"])[0]
    assert fingerprints(torch.tensor([[0, 3], [3, 0]]))[0] != fingerprints(torch.tensor([[0, 3], [3, 0]]))[1]
    assert fingerprints(torch.zeros(1, 2)) != fingerprints(torch.zeros(1, 3))  # floats are no padding
    assert fingerprints(torch.zeros(2, 0, dtype=torch.long))[0]
    pairs = [
        ({"a": torch.tensor([[1, 0]]), "b": torch.tensor([[2]])}),
        ({"a": torch.tensor([[1]]), "b": torch.tensor([[2]])}),
    ]
    assert fingerprints(pairs[0]) == fingerprints(pairs[1])
    apart = [torch.tensor([[1, 2], [1, 0]]), torch.tensor([[3, 0], [2, 3]])]
    assert len(set(fingerprints(apart))) == 2  # one row does not run on into the next


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "samples", "frames"])
def test_what_a_mask_leaves_out_is_no_content(left, kind):
    """Decoders pad at the left, and audio is padded too."""
    torch.manual_seed(0)
    rows = [torch.randn(n, 3) for n in (3, 6, 4)]
    rows = {"tokens": [r[:, 0].gt(0).long() for r in rows], "samples": [r[:, 0] for r in rows], "frames": rows}[kind]

    def batch(chosen):
        width = max(len(rows[i]) for i in chosen)
        x, mask = (
            torch.zeros(len(chosen), width, *rows[0].shape[1:], dtype=rows[0].dtype),
            torch.zeros(len(chosen), width),
        )
        for line, i in enumerate(chosen):
            places = slice(width - len(rows[i]), None) if left else slice(len(rows[i]))
            x[line, places], mask[line, places] = rows[i], 1
        return {"x": x, "attention_mask": mask.long()}

    whole = fingerprints(batch([0, 1, 2]))
    assert len(set(whole)) == 3
    assert fingerprints(batch([2, 0])) == [whole[2], whole[0]]


def test_many_examples_are_dropped_in_one_pass():
    """A lookup of each among all that are dropped would take minutes."""
    n = 30_000
    outputs = ModelOutputs(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), [b"%d" % i for i in range(n)])
    others = ModelOutputs(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), [b"%d" % (i + 9) for i in range(n)])
    assert len(apart(outputs, others, None, seen={}, overlap="drop").nonmembers) == 9


@pytest.mark.parametrize("form", ["dict", "named", "texts", "triple"])
def test_an_index_in_the_batch_hides_no_overlap(form):
    """Each data set numbers its own examples, so a copy has another number."""

    class Numbered(Dataset):
        def __init__(self, begin, end):
            self.examples = part(begin, end)

        def __len__(self):
            return len(self.examples)

        def __getitem__(self, i):
            x, y = self.examples[i]
            if form == "triple":
                return x, y, i
            name, known = {"dict": ("idx", i), "named": ("Sample_ID", i), "texts": ("id", f"no {i}")}[form]
            return {"x": x, name: known, "labels": y}

    class Own(Classifier):
        def classification_step(self, batch):
            x, y = (batch["x"], batch["labels"]) if isinstance(batch, dict) else batch[:2]
            return self(x), y

    model = Own()
    with pytest.raises(ValueError, match="20 of the 40 examples of nonmembers are members"):
        audit(model, members=Numbered(0, 40), nonmembers=Numbered(20, 60))
    assert len(without_overlap(Numbered(20, 60), Numbered(0, 40))) == 20
    audit(model, members=Numbered(0, 40), nonmembers=Numbered(40, 80))


def test_numbers_that_are_all_there_is_are_content():
    ids, ages = torch.tensor([1, 2]), torch.tensor([30, 30])
    assert len(set(example_digests(({"id": ids}, ages)))) == 2
    assert len(set(example_digests((ids, ages, ages)))) == 2
    assert len(set(example_digests(({"age": ids, "x": ages}, ages)))) == 2
    assert len(set(example_digests(({"input_ids": torch.tensor([[1, 2], [1, 3]]), "x": ages}, ages)))) == 2


def test_sparse_inputs_have_content():
    x = torch.eye(3)
    assert fingerprints(x.to_sparse()) == fingerprints(x)


def test_data_without_the_overlap():
    clean = without_overlap(MIXED, MEMBERS)
    assert [float(x.sum()) for x, _ in clean] == [float(digits()[i][0].sum()) for i in range(100, 140)]
    batches = without_overlap(DataLoader(MIXED, batch_size=16, shuffle=True), MEMBERS, part(100, 110))
    assert isinstance(batches, DataLoader)
    assert [len(y) for _, y in batches] == [16, 14]
    audit(Classifier(), members=MEMBERS, nonmembers=clean)
    with pytest.raises(TypeError, match="map-style data set or a DataLoader of one, not list"):
        without_overlap([1], MEMBERS)
    with pytest.raises(TypeError, match="the data must be read whole"):
        without_overlap(MIXED, Numbers())
    with pytest.raises(ValueError, match="read differently each time"):
        without_overlap(Noisy(), MEMBERS)


class Numbers(IterableDataset):
    def __iter__(self):
        return iter([digits()[0]])


class Noisy(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(3), 0


@pytest.mark.parametrize("name", ["mixup_mmd", "past", "adversarial_regularization"])
def test_non_members_that_a_defense_trained_on_are_told(name, tmp_path):
    """The audit took them: .631 in place of .698."""
    reference = part(300, 400)
    model = create_defense(name, nonmembers=DataLoader(reference, batch_size=16)).attach(Classifier())
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, DataLoader(MEMBERS, batch_size=16))
    half = ConcatDataset([OTHERS, part(300, 320)])
    with pytest.raises(ValueError, match=r"20 of the 80 examples of nonmembers are non-members that .* trains against"):
        audit(model, members=MEMBERS, nonmembers=half)
    with pytest.raises(ValueError, match=r"20 of the 80 examples of population are non-members that .* trains against"):
        audit(model, members=MEMBERS, nonmembers=part(160, 200), population=half, attacks=["attack_p"])
    assert audit(model, members=MEMBERS, nonmembers=half, overlap="drop").overlap == {"nonmembers": list(range(60, 80))}
    # Inside another module, without the defense, and from a checkpoint, they are known too.
    with pytest.raises(ValueError, match="trains against"):
        audit(nn.Sequential(type(model).detach(model)), members=MEMBERS, nonmembers=half)
    fresh = create_defense(name, nonmembers=reference).attach(Classifier())
    fresh.on_load_checkpoint({"lightning_cwrf_seen": seen_state(model)})
    assert seen_by(fresh) == seen_by(model)


def test_the_record_is_in_the_checkpoint_and_the_users_class_loads_it(tmp_path):
    model = create_defense("past", nonmembers=part(300, 340)).attach(Classifier())
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, DataLoader(MEMBERS, batch_size=16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_cwrf_seen"]
    plain = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(plain) is Classifier
    other = Classifier()
    load_seen_state(other, seen_state(model))
    assert seen_by(other) == seen_by(model)
    assert len(seen_by(other)["non-members that PAST trains against"]) == 40
    record_seen(other, "x", [(b"a" * 16, None)])
    third = nn.Linear(1, 1)
    load_seen_state(third, seen_state(other))
    assert seen_by(third) == seen_by(other)


def test_a_stream_of_non_members_is_recorded_as_it_is_drawn():
    batches = [next(iter(loader(300, 320, batch_size=20)))]
    model = create_defense("past", nonmembers=Again(batches)).attach(Classifier())
    trainer(max_epochs=1).fit(model, DataLoader(MEMBERS, batch_size=16))
    with pytest.raises(ValueError, match="20 of the 20 examples of nonmembers are non-members that PAST"):
        audit(model, members=MEMBERS, nonmembers=part(300, 320))


class Again:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_reference_data_of_the_scoring_are_told_wherever_the_audit_stands():
    model, vanilla = trained()
    scoring = PrivacyScoringCallback(loader(300, 340), vanilla, steps=1)
    trainer(max_epochs=1, callbacks=[scoring]).fit(model, loader(0, 64))
    with pytest.raises(ValueError, match="40 of the 40 examples of nonmembers are reference data of the scoring"):
        audit(model, members=part(0, 64), nonmembers=part(300, 340))
    audit(model, members=part(0, 64), nonmembers=OTHERS)
    control = PrivacyScoringCallback(loader(300, 340), vanilla, steps=1, kind="learnability")
    other, _ = trained()
    trainer(max_epochs=1, callbacks=[control]).fit(other, loader(0, 64))
    assert seen_by(other) == {}


def test_recipes_tell_pool_and_population_from_what_their_models_see():
    base = {"build_module": Classifier, "trainer_kwargs": {"max_epochs": 1}, "batch_size": 16}
    for recipe, what in (
        (ShadowRecipe(**base, cwrf=CWRFConfig(part(200, 220))), "CWRF's nonmembers"),
        (ShadowRecipe(**base, defense=create_defense("past", nonmembers=part(200, 220))), "PASTMixin's nonmembers"),
    ):
        recipe.check(part(0, 100), base=True, stack=1, population=part(300, 320))
        with pytest.raises(ValueError, match=f"20 of the 20 examples of {what} are members"):
            recipe.check(part(190, 290), base=True, stack=1)
        with pytest.raises(ValueError, match=f"5 of the 20 examples of {what} are in the population"):
            recipe.check(part(0, 100), base=True, stack=1, population=part(215, 320))


def test_an_overlap_by_chance_in_categorical_reference_data_is_a_warning():
    from lightning_cwrf.weights.scores import privacy_vulnerability_scores

    data = Categorical(range(400))
    plain = TensorDataset(torch.stack([r[0] for r in data.rows]), torch.stack([r[1] for r in data.rows]))
    members, reference = Subset(plain, range(200)), Subset(plain, range(200, 400))
    with pytest.warns(UserWarning, match="share their content with one another"):
        privacy_vulnerability_scores(nn.Linear(3, 2), nn.Linear(3, 2), members, reference, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        privacy_vulnerability_scores(Classifier(), Classifier(), MEMBERS, OTHERS, steps=1)


def test_dropping_many_examples_of_categorical_data_is_remarked_on():
    """A model that treats all examples alike, on few distinct inputs: what is left is unlike the members."""
    x = torch.arange(40).remainder(8).float().unsqueeze(1)
    members = TensorDataset(x[:20], torch.zeros(20, dtype=torch.long))
    nonmembers = TensorDataset(x[20:] + 4, torch.zeros(20, dtype=torch.long))
    shared = sum(float(value) in x[:20] for value in x[20:, 0] + 4)
    with pytest.warns(UserWarning, match=f"{shared} of the 20 nonmembers were left out.*pass key="):
        dropped = audit(nn.Linear(1, 2), members=members, nonmembers=nonmembers, overlap="drop")
    assert any("attacks look stronger" in remark for remark in dropped.remarks)
    allowed = audit(nn.Linear(1, 2), members=members, nonmembers=nonmembers, overlap="allow")
    assert not any("left out" in remark for remark in allowed.remarks)
