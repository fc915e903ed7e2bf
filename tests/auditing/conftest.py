"""Shadow models and the audit of a model that memorised its members, trained once."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cwrf import MIAAuditCallback
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.shadows import train_shadows
from tests.helpers import Classifier, part, trainer
from tests.recipe_functions import Memorise

HERE = Path(__file__).parent
MEMBERS, NONMEMBERS, POPULATION = part(0, 100), part(100, 200), part(400, 700)


def pytest_collection_modifyitems(items):
    """Tests on the shadow models are slow: each process trains them first."""
    for item in items:
        if item.path.parent == HERE and "shadows" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shadows(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    data = {"population": POPULATION, "views": default_views()}
    return train_shadows(Memorise(), part(0, 200), 8, **data, store=store, workers=1, progress=False)


@pytest.fixture(scope="session")
def audited(shadows):
    """The model of the same recipe, trained on the first half of the pool, and its audit."""
    torch.manual_seed(99)
    callback = MIAAuditCallback(NONMEMBERS, shadows=shadows, every_n_epochs=20)
    run = trainer(max_epochs=40, callbacks=[callback])
    model = Classifier(width=16)
    run.fit(model, DataLoader(MEMBERS, batch_size=32, shuffle=True))
    return model, callback, run
