"""The share of its examples that a training draws."""

import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf import MIAAuditCallback
from lightning_cwrf.callbacks.coverage import check_coverage, unseen_share
from tests.helpers import Classifier, loader, part, trainer


@pytest.mark.parametrize(
    ("share", "error", "warned", "fast"),
    [(0.01, False, False, False), (0.011, False, True, False), (0.1, False, True, False), (0.101, True, False, False),
     (0.9, False, True, True)],
)  # fmt: skip
def test_members_that_training_leaves_out_warn_or_raise(share, error, warned, fast, monkeypatch, recwarn):
    monkeypatch.setattr("lightning_cwrf.callbacks.coverage.unseen_share", lambda trainer: share)
    if error:
        with pytest.raises(
            MisconfigurationException, match=r"leaves out about 10% of the examples .*Train on a Subset"
        ):
            check_coverage(SimpleNamespace(fast_dev_run=fast, reload_dataloaders_every_n_epochs=0))
    else:
        assert check_coverage(SimpleNamespace(fast_dev_run=fast, reload_dataloaders_every_n_epochs=0)) == share
    assert [str(w.message).startswith("the training leaves out about") for w in recwarn] == [True] * warned


@pytest.mark.parametrize(
    ("epochs", "steps", "accumulate", "share"),
    [
        (1, -1, 1, 0.5),  # half of the data in each epoch, drawn anew
        (3, -1, 1, 0.125),
        (3, 2, 1, 0.5),  # two steps are an epoch of two batches
        (3, 2, 2, 0.25),
        (1, 9, 2, 0.5),
        (None, 4, 1, 0.25),
        (-1, 4, 1, 0.25),
        (None, -1, 1, 0.0),
        (-1, -1, 1, 0.0),
    ],
)
def test_the_share_that_training_leaves_out_by_hand(epochs, steps, accumulate, share):
    half = SimpleNamespace(
        train_dataloader=loader(0, 64, shuffle=True), num_training_batches=2, max_epochs=epochs, max_steps=steps,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert unseen_share(half) == pytest.approx(share, abs=1e-6)
    for batches in (0, math.inf):
        assert unseen_share(SimpleNamespace(**{**vars(half), "num_training_batches": batches})) == 0
    for other in ([1, 2], DataLoader(Stream(), batch_size=4)):
        assert unseen_share(SimpleNamespace(**{**vars(half), "train_dataloader": other})) == 0


class Stream(IterableDataset):
    def __iter__(self):
        yield from part(0, 8)


def test_a_training_that_draws_what_was_planned_has_no_remark():
    """Three epochs of 6 of 10 batches are planned to leave out 6 % of the examples, and do."""
    audit = MIAAuditCallback(loader(300, 340), every_n_epochs=0)
    with pytest.warns(UserWarning, match="leaves out about 6% of the examples"):
        trainer(callbacks=[audit], max_epochs=3, limit_train_batches=6).fit(Classifier(), loader(0, 160, shuffle=True))
    assert audit.result.remarks == []
