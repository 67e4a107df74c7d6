"""recipe="paper" is the published method: a plain loop, written here from the formulas alone, gives the same weights.

alpha * relu(tau - mean_f)^2 + (1 - alpha) * mean_r, two forwards, AdamW 1e-3, LinearLR 1 -> 0.1 over E forget epochs,
alpha from 5/3 |D_f|/|D_train| linearly to 0, tau from held-out data every 5 epochs, model in eval mode, the retain
pass started anew every |R| // |F| epochs (arXiv 2403.14339 and its public notebooks).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nabla_tau


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def small_resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(6),
        Residual(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def plain_published_loop(model: nn.Module, forget: DataLoader, retain: DataLoader, held_out: DataLoader) -> int:
    forget_count, retain_count = len(forget.dataset), len(retain.dataset)
    epochs = int(len(retain) / (2 * len(forget)) * 6)
    alpha0 = alpha = 5 / 3 * forget_count / (forget_count + retain_count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=epochs)
    model.eval()
    steps, tau, retain_batches = 0, 0.0, iter(retain)
    for epoch in range(epochs):
        if epoch % 5 == 0:
            with torch.no_grad():
                losses = [F.cross_entropy(model(x), y, reduction="none") for x, y in held_out]
            tau = torch.cat(losses).mean()
        if epoch % (len(retain) // len(forget)) == 0:
            retain_batches = iter(retain)
        for x, y in forget:
            x_retain, y_retain = next(retain_batches)
            forget_mean = F.cross_entropy(model(x), y)
            retain_mean = F.cross_entropy(model(x_retain), y_retain)
            optimizer.zero_grad()
            (alpha * F.relu(tau - forget_mean) ** 2 + (1 - alpha) * retain_mean).backward()
            optimizer.step()
            steps += 1
        scheduler.step()
        alpha -= alpha0 / epochs
    return steps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_paper_recipe_is_the_published_loop(dtype, tolerance):
    torch.manual_seed(7)
    model = small_resnet().to(dtype)
    x, y = torch.randn(460, 1, 8, 8, dtype=dtype), torch.randint(3, (460,))
    with torch.no_grad():
        model.train()
        model(x)  # running statistics other than (0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):  # memorise the forget set a little, so that the gate opens
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(x[:312]), y[:312]).backward()
        optimizer.step()

    def loader(start: int, stop: int) -> DataLoader:
        return DataLoader(TensorDataset(x[start:stop], y[start:stop]), batch_size=16, shuffle=False)

    forget, retain, held_out = loader(0, 40), loader(40, 312), loader(312, 460)
    expected = copy.deepcopy(model)
    steps = plain_published_loop(expected, forget, retain, held_out)
    result = nabla_tau.unlearn(model, forget=forget, retain=retain, held_out=held_out, recipe="paper")

    assert result.settings["steps"] == steps == 51
    assert result.settings["forwards"] == "one mixed forward and backward"
    assert result.settings["gate_open_fraction"] > 0
    moved = 0.0
    for (name, ours), theirs, before in zip(
        result.model.state_dict().items(), expected.state_dict().values(), model.state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), name
            moved = max(moved, ((theirs - before).norm() / before.norm()).item())
    assert moved > 0.01, "the run must change the weights by far more than the tolerance"
