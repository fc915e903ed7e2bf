"""Models, batches and Trainer settings as people have them: each works, or is refused with what to do."""

import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    DPSGDMixin,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    ShadowRecipe,
    VanillaSnapshotCallback,
    audit,
    train_shadows,
)
from lightning_cwrf.classification import classification_step
from lightning_cwrf.weights.vanilla import load_vanilla
from tests.helpers import Classifier, digits, loader, part, trainer

pytestmark = pytest.mark.filterwarnings("ignore:vanilla='redraw'")


def cwrf(reference, vanilla="redraw"):
    return [PrivacyScoringCallback(reference, vanilla, steps=2), CriticalRewindCallback(0.1), GradientMaskCallback()]


class Words(Dataset):
    """Texts of one to three words, with a label."""

    def __init__(self, begin, end):
        self.places = range(begin, end)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        place = self.places[i]
        return f"word{place} " * (1 + place % 3), place % 10


class Tokenizes(Classifier):
    """Takes raw strings."""

    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.EmbeddingBag(128, 8), nn.Linear(8, 10)

    def forward(self, texts):
        ids = [torch.tensor([ord(letter) for letter in text]) for text in texts]
        starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        return self.net(self.embed(torch.cat(ids), starts))


class Sequences(Words):
    """The same as numbers, of different lengths."""

    def __getitem__(self, i):
        text, label = super().__getitem__(i)
        return {"ids": torch.tensor([ord(letter) for letter in text]), "label": label}


def padded(items):
    ids = nn.utils.rnn.pad_sequence([item["ids"] for item in items], batch_first=True)
    return {"ids": ids, "label": torch.tensor([item["label"] for item in items])}


class Embeds(Classifier):
    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Embedding(128, 8, padding_idx=0), nn.Linear(8, 10)

    def forward(self, ids):
        return self.net(self.embed(ids).sum(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["ids"]), batch["label"])


class WithPositions(Embeds):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(30, 8)

    def forward(self, ids):
        return self.net((self.embed(ids) + self.positions(torch.arange(ids.shape[1])[None])).sum(1))


def words(begin, end):
    return DataLoader(Words(begin, end), batch_size=16)


def sequences(begin, end):
    return DataLoader(Sequences(begin, end), batch_size=16, collate_fn=padded)


@pytest.mark.slow
def test_raw_strings_in_a_batch():
    privacy = MIAAuditCallback(words(200, 232))
    callbacks = [*cwrf(words(100, 140)), DefenseCallback("relaxloss"), privacy]
    model = Tokenizes()
    trainer(max_epochs=40).fit(model, words(0, 32))
    trainer(max_epochs=1, callbacks=callbacks).fit(model, words(0, 32))
    assert len(privacy.result.scores["loss"]) == 64
    with pytest.raises(ValueError, match="2 of the 32 examples of nonmembers are members"):
        audit(Tokenizes(), members=Words(0, 32), nonmembers=Words(30, 62))


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "data", "batches"), [(Tokenizes, Words, words), (Embeds, Sequences, sequences)])
def test_texts_in_shadow_models(tmp_path, cls, data, batches):
    model, run = cls(), trainer(max_epochs=1)
    run.fit(model, batches(0, 32))
    recipe = ShadowRecipe.like(run, model)
    shadows = train_shadows(recipe, data(0, 64), n=4, population=data(100, 132), store=tmp_path)
    result = audit(model, members=batches(0, 32), nonmembers=batches(32, 64), shadows=shadows)
    assert not result.failures
    assert {"lira", "rmia"} <= set(result.scores)


def test_padding_does_not_change_the_identity_of_texts():
    with pytest.raises(ValueError, match="1 of the 3 examples of nonmembers are members"):
        audit(Embeds(), members=sequences(0, 32), nonmembers=sequences(31, 34))


class NeedsLabels(Classifier):
    def forward(self, x, labels):
        return F.cross_entropy(self.net(x), labels), self.net(x)


def test_a_forward_that_requires_labels_raises_with_the_fix():
    with pytest.raises(TypeError, match=r"missing a required argument: 'labels'\)\. Logits must not depend on the tar"):
        classification_step(NeedsLabels(), next(iter(loader(0, 4))))


def test_an_entry_that_forward_does_not_take_is_named():
    batch = {"ids": torch.ones(2, 3, dtype=torch.long), "path": ["a.txt", "b.txt"], "label": torch.tensor([0, 1])}
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'path'\).* leave entries that it does not take"):
        classification_step(Embeds(), batch)


def test_an_error_inside_forward_stays_what_it_is():
    class Fails(Classifier):
        def forward(self, x):
            raise TypeError("inside")

    with pytest.raises(TypeError, match=r"^inside$"):
        classification_step(Fails(), next(iter(loader(0, 4))))


def test_an_index_in_the_batch_raises_with_the_fix():
    batch = [*digits()[:4], torch.arange(4)]
    with pytest.raises(TypeError, match="a list of length 3; define classification_step"):
        classification_step(Classifier(), batch)


def test_a_list_of_loaders_raises_with_the_fix():
    with pytest.raises(MisconfigurationException, match="a list of DataLoaders; instead of several loaders pass one"):
        trainer(callbacks=cwrf(loader(100, 140))).fit(Classifier(), [loader(0, 32), loader(32, 64)])
    with pytest.raises(TypeError, match="they are a list of 2; define classification_step"):
        trainer(callbacks=[DefenseCallback("relaxloss")]).fit(Classifier(), [loader(0, 32), loader(32, 64)])


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def test_lazy_layers_work_once_they_have_a_shape(tmp_path):
    model = Lazy()
    path = tmp_path / "init.safetensors"
    lazy = pytest.raises(ValueError, match=r"lazy parameters without a shape yet \(net\.1\.weight, net\.1\.bias\): run")
    with lazy:
        trainer(callbacks=[VanillaSnapshotCallback(path)]).fit(Lazy(), loader(0, 32))
    with lazy:
        trainer(callbacks=cwrf(loader(100, 140))).fit(Lazy(), loader(0, 32))
    model(torch.rand(2, 1, 8, 8))
    with lazy:
        load_vanilla(Lazy, model)
    with lazy:
        ShadowRecipe.like(trainer(), model, loader=loader(0, 32))
    trainer(max_epochs=10).fit(model, loader(0, 32))
    trainer(max_epochs=1, callbacks=[*cwrf(loader(100, 140)), DefenseCallback("relaxloss")]).fit(model, loader(0, 32))


def test_attaching_to_a_compiled_module_raises_with_the_fix():
    with pytest.raises(TypeError, match=r"compile it afterwards, torch\.compile\(RelaxLossMixin\.attach\(module\)\)"):
        RelaxLossMixin.attach(torch.compile(Classifier(), backend="eager"))


def test_a_weighted_sampler_cannot_be_carried_to_shadow_models():
    weighted = DataLoader(part(0, 64), batch_size=16, sampler=WeightedRandomSampler(torch.rand(64) + 0.1, 64))
    with pytest.raises(ValueError, match="its WeightedRandomSampler draws some examples, or some more often"):
        ShadowRecipe.like(trainer(), Classifier(), loader=weighted)


class Plateau(Classifier):
    def __init__(self, monitor="own_loss"):
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.hparams.monitor}}


def test_a_plateau_of_a_training_metric_is_carried_to_shadow_models_beside_validation_data(tmp_path):
    model, run = Plateau(), trainer(max_epochs=1)
    run.fit(model, loader(0, 32), loader(64, 96))
    recipe = ShadowRecipe.like(run, model)
    assert len(train_shadows(recipe, part(0, 64), n=2, workers=1, store=tmp_path)) == 2


def test_a_plateau_of_a_validation_metric_is_refused():
    model, run = Plateau("val_acc"), trainer(max_epochs=1)
    run.fit(model, loader(0, 32), loader(64, 96))
    with pytest.raises(ValueError, match="waits for 'val_acc', and shadow models have no validation data"):
        ShadowRecipe.like(run, model)


def test_validation_data_are_no_part_of_a_recipe():
    model, run = Classifier(), trainer(max_epochs=1)
    run.fit(model, loader(0, 32), loader(64, 96))
    assert ShadowRecipe.like(run, model).examples == 32


def test_a_profiler_that_hooks_the_modules_is_named(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path)
    run = trainer(callbacks=cwrf(loader(100, 140)), profiler=profiler, num_sanity_val_steps=1)
    with pytest.raises(TypeError, match="PyTorchProfiler's: pass that record_module_names=False"):
        run.fit(Classifier(), loader(0, 32), loader(64, 96))
    profiler.teardown("fit")  # it would go on recording


@pytest.mark.slow
def test_dp_sgd_recommends_freezing_for_position_embeddings():
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-2}
    freeze = r"positions\.weight has 1 gradients .*get_parameter\('positions\.weight'\)\.requires_grad_\(False\)"
    with pytest.raises(MisconfigurationException, match=freeze):
        trainer(max_epochs=1).fit(DPSGDMixin.attach(WithPositions(), **settings), sequences(0, 32))
    model = WithPositions()
    model.positions.weight.requires_grad_(False)
    trainer(max_epochs=1).fit(DPSGDMixin.attach(model, **settings), sequences(0, 32))
    assert model.privacy_spent.epsilon > 0


def test_labels_of_any_integer_type():
    images, labels = digits()[:32]
    model, data = Int32(), DataLoader(TensorDataset(images, labels.int()), batch_size=16)
    trainer(max_epochs=10).fit(model, data)
    trainer(max_epochs=1, callbacks=[*cwrf(part(100, 140)), DefenseCallback("relaxloss")]).fit(model, data)


class Int32(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1].long())
