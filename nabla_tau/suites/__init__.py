"""Suites: pairs of real data and a model that memorises it, on which methods are compared.

A suite of your own is five lines of Python, in a file that `nabla-tau compare --data FILE.py` takes:

    from nabla_tau.suites import Suite
    def data(): ...                      # -> inputs [N, ...] and labels [N]
    def model(): ...                     # -> a new torch.nn.Module
    SUITE = Suite("mine", data, model, shadow=model, train=2_000, held_out=500, epochs=20)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from nabla_tau.arguments import positive, whole
from nabla_tau.progress import progress_bar
from nabla_tau.suites import data as sets
from nabla_tau.suites import models
from nabla_tau.suites.data import Data
from nabla_tau.suites.resnet import resnet18


@dataclass(frozen=True)
class Suite:
    """data: () -> inputs [N, ...] and labels [N]. model: () -> a new model. shadow: () -> a smaller one without
    BatchNorm, of which an attack trains many at once; None to leave that attack out. train, held_out: samples for
    either, the others are unseen. epochs, batch_size, learning_rate: AdamW, whose learning rate falls to 0 over the
    last fifth of the steps, until the data is memorised.

    Raises TypeError and ValueError for settings that make no sense."""

    name: str
    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    shadow: Callable[[], nn.Module] | None
    train: int
    held_out: int
    epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):  # it names a folder
            raise ValueError(f"the name of a suite must be of letters, digits, '.', '-' and '_', got {self.name!r}")
        for name in ("data", "model", "shadow"):
            if not callable(getattr(self, name)) and (name, self.shadow) != ("shadow", None):
                raise TypeError(f"{name} of a suite must be a function, got {getattr(self, name)!r}")
        for name in ("train", "held_out", "epochs", "batch_size"):
            whole(getattr(self, name), f"{name} of a suite", least=1)
        positive(self.learning_rate, "learning_rate of a suite")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device of a suite: {error}") from error


_mlp, _deep = partial(partial, models.mlp), partial(partial, models.mlp, layers=2)
_bag, _transformer = partial(partial, models.embedding_bag), partial(partial, models.SmallTransformer)
_images = partial(Suite, model=models.small_cnn, shadow=_mlp(784, 64, 10), epochs=20)
_texts = partial(Suite, shadow=None, train=6_000, held_out=1_500, epochs=15, learning_rate=3e-3)

SUITES = {
    suite.name: suite
    for suite in (
        _images("fashion_mnist", sets.fashion_mnist, train=6_000, held_out=1_500),
        _images("mnist_5k", sets.mnist_5k, train=3_000, held_out=750),
        Suite("digits", sets.digits, _mlp(64, 128, 10), _mlp(64, 64, 10), 1_000, 300, epochs=60, batch_size=64),
        Suite("breast_cancer", sets.breast_cancer, _deep(30, 128, 2), _mlp(30, 64, 2), 300, 100, 100, batch_size=32),
        Suite("diamonds", sets.diamonds, _deep(22, 256, 5), _mlp(22, 128, 5), 5_000, 1_250, 80, learning_rate=3e-3),
        _texts("clinc150", sets.clinc150, _bag(150)),
        _texts("goemotions", sets.goemotions, _bag(28)),
        _texts("clinc150_transformer", sets.clinc150, _transformer(150), epochs=20, learning_rate=2e-3),
        Suite("cifar10", sets.cifar10, resnet18, None, train=40_000, held_out=5_000, epochs=30, device="cuda"),
    )
}


def train(
    make_model: Callable[[], nn.Module],
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    name: str = "training",
    progress: bool = False,
) -> nn.Module:
    """A model trained until it has memorised its data: AdamW, no augmentation, the learning rate falling to 0 over
    the last fifth of the steps. Raises ValueError where the loss becomes non-finite, and what the model raises."""
    x, y = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model().to(x.device)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    with progress_bar(name, epochs, enabled=progress) as update:
        for epoch in range(epochs):
            total = 0.0
            for index in torch.split(torch.randperm(len(x), generator=generator).to(x.device), batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[index]), y[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item() * len(index)
            if not math.isfinite(total):
                raise ValueError(
                    f"{name}: the loss became non-finite in epoch {epoch + 1} of {epochs}: look for non-finite inputs, "
                    f"or lower the learning rate of {learning_rate}"
                )
            update(epoch + 1, f"loss {total / len(x):.4f}")
    return model.eval()
