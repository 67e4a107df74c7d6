"""Small models and data that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

# The tensors here are small: a second thread costs more than it brings.
torch.set_num_threads(1)

Data = tuple[Tensor, Tensor]


def blobs(count: int, classes: int = 4, features: int = 8, seed: int = 0, noise: float = 1.5) -> Data:
    """Overlapping Gaussian classes: a model can memorise the training part and not the rest."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, features, generator=generator), labels


class Pairs(Dataset):
    """A map-style Dataset of (inputs, targets)."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> Data:
        return self.data[0][index], self.data[1][index]


def mlp(features: int = 8, classes: int = 4, width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


def train(model: nn.Module, data: Data, epochs: int = 60, learning_rate: float = 1e-2) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(autouse=True)
def _away_from_the_sources(tmp_path, monkeypatch):
    """`python -c` puts its working folder first: in the root it would find the sources instead of what is installed."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def interpreter(monkeypatch):
    """For tests of Triton kernels that `interpreted.load_kernels` gave: their environment while they run."""
    from interpreted import INTERPRETED

    for name, value in INTERPRETED.items():
        monkeypatch.setenv(name, value)
    # NumPy warns of the infinities that a GPU computes without a word.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Workers for the tests of several processes."""
    from processes import Processes

    # The server that they are forked from takes its working folder for the first place to import from.
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("workers"))
    try:
        found = Processes(3)
    finally:
        os.chdir(here)
    yield found
    found.close()


@pytest.fixture(scope="session")
def memorised() -> tuple[nn.Module, dict[str, Data]]:
    """An MLP that memorised 400 samples, and its forget, retain, held-out and unseen parts."""
    x, y = blobs(1000)
    parts = {
        "forget": (x[:60], y[:60]),
        "retain": (x[60:400], y[60:400]),
        "held_out": (x[400:700], y[400:700]),
        "unseen": (x[700:], y[700:]),
    }
    torch.manual_seed(0)
    return train(mlp(), (x[:400], y[:400]), epochs=300), parts
