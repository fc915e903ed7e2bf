"""Recipes for shadow models in the tests; a module of its own, so that worker processes can import them."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.helpers import Classifier, trainer


def quick(members, seed):
    """Trained for a few steps; what it draws from the global generators goes into the weights."""
    model = Classifier()
    for p in model.parameters():
        p.data += 1e-3 * (random.random() + np.random.rand())
    trainer(max_epochs=1).fit(model, DataLoader(members, batch_size=32, shuffle=True))
    return model


@dataclass(frozen=True)
class Memorise:
    epochs: int = 40

    def __call__(self, members, seed):
        torch.manual_seed(seed)
        model = Classifier(width=16)
        trainer(max_epochs=self.epochs).fit(model, DataLoader(members, batch_size=32, shuffle=True))
        return model


@dataclass(frozen=True)
class Counted:
    """Leaves one line in a file for each training, so that trainings can be counted over processes.

    A number in the file ``kill`` beside it kills the process at that training; it is no argument, so it changes no key.
    """

    log: Path
    fail_at: int | None = None

    def __call__(self, members, seed, base=None):
        with self.log.open("a") as file:
            file.write(f"{seed}\n")
        done = len(self.log.read_text().splitlines())
        kill = self.log.with_name("kill")
        if kill.exists() and done == int(kill.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        once = self.log.with_name("kill once")
        if once.exists() and done >= int(once.read_text()):
            once.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail_at is not None and done == self.fail_at:
            raise ArithmeticError("the third one fails")
        model = Classifier()
        if base is not None:
            model.load_state_dict(base)
        x, y = next(iter(DataLoader(members, batch_size=16)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return model


def runs(log):
    """The seeds of all trainings in a log."""
    return log.read_text().splitlines() if log.exists() else []


@dataclass(frozen=True)
class Slow:
    """Leaves a line in a file, and takes its time."""

    log: Path

    def __call__(self, members, seed):
        with self.log.open("a") as file:
            file.write(f"{seed}\n")
        time.sleep(0.5)
        return Classifier()


SETTINGS = {"width": 4}


def reads_width(members, seed):
    return Classifier(width=SETTINGS["width"])


def reads_environment(members, seed):
    return Classifier(width=int(os.environ["CWRF_TEST_WIDTH"]))


def setting(name, members, seed):
    """Reads a setting by its name."""
    return Classifier()


@dataclass(frozen=True)
class Pids:
    """Leaves the number of its process, and trains for long."""

    folder: Path

    def __call__(self, members, seed):
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(300)
