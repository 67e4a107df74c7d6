"""`Unlearner`: one step against the formula, mixed against two forwards, balanced gradients, state."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import blobs, mlp
from torch import nn
from torch.nn import functional as F

from nabla_tau import Unlearner
from nabla_tau.unlearner import MIXED

TAU, ALPHA = 3.0, 0.4


def convnet() -> nn.Sequential:
    trunk = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*trunk, nn.Linear(16, 3))


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def step_with(model: nn.Module, **settings) -> tuple[Unlearner, list[torch.Tensor]]:
    """One SGD step of lr 1, so that the change of a weight is the gradient that was used."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    unlearner = Unlearner(
        model, alpha=ALPHA, tau=TAU, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **settings
    )
    unlearner.step(images(5, 1), images(7, 2))
    return unlearner, [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


def plain_gradients(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    (x_f, y_f), (x_r, y_r) = images(5, 1), images(7, 2)
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    forget = ALPHA * F.relu(TAU - F.cross_entropy(model(x_f), y_f)) ** 2
    retain = (1 - ALPHA) * F.cross_entropy(model(x_r), y_r)
    return list(torch.autograd.grad(forget, parameters)), list(torch.autograd.grad(retain, parameters))


def test_step_is_one_mixed_pass_and_equals_two():
    torch.manual_seed(0)
    model = convnet().double().eval()
    unlearner, gradient = step_with(model)
    assert unlearner.forwards == MIXED
    forget, retain = plain_gradients(model)
    for ours, f, r in zip(gradient, forget, retain, strict=True):
        torch.testing.assert_close(ours, f + r, rtol=1e-9, atol=1e-12)


def test_batchnorm_in_train_mode_takes_two_forwards_and_equals_them():
    torch.manual_seed(0)
    model = convnet().double().train()
    unlearner, gradient = step_with(model)
    assert "statistics of its batch" in unlearner.forwards
    forget, retain = plain_gradients(model)
    for ours, f, r in zip(gradient, forget, retain, strict=True):
        torch.testing.assert_close(ours, f + r, rtol=1e-9, atol=1e-12)


class CentresItsBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def test_samples_that_influence_each_other_are_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), CentresItsBatch(), nn.Linear(36, 3)).double().eval()
    unlearner, gradient = step_with(model)
    assert "influence each other" in unlearner.forwards
    forget, retain = plain_gradients(model)
    for ours, f, r in zip(gradient, forget, retain, strict=True):
        torch.testing.assert_close(ours, f + r, rtol=1e-9, atol=1e-12)


def test_batches_that_do_not_concatenate():
    model = nn.EmbeddingBag(20, 3)

    def forward(model, batch):
        tokens, offsets, targets = batch
        return model(tokens, offsets), targets

    unlearner = Unlearner(model, alpha=ALPHA, tau=TAU, forward=forward)
    tokens = torch.randint(20, (9,))
    unlearner.step(
        (tokens, torch.tensor([0, 3]), torch.tensor([0, 1])), (tokens, torch.tensor([0, 1, 5]), torch.tensor([0, 1, 2]))
    )
    assert "cannot be concatenated" in unlearner.forwards


@pytest.mark.parametrize("cap", [0.05, 1e6])
def test_balanced_gradient(cap):
    torch.manual_seed(0)
    model = convnet().double().eval()
    _, gradient = step_with(model, balance=cap)
    forget, retain = plain_gradients(model)
    norm = [torch.cat([g.flatten() for g in part]).norm() for part in (forget, retain)]
    scale = min(1.0, (cap * norm[1] / norm[0]).item())
    assert (scale < 1) == (cap < 1), "the two cases must test both sides of the cap"
    for ours, f, r in zip(gradient, forget, retain, strict=True):
        torch.testing.assert_close(ours, scale * f + r, rtol=1e-9, atol=1e-12)


def test_dict_batches_and_model_outputs_in_the_hugging_face_manner():
    class Output(dict):
        @property
        def logits(self) -> torch.Tensor:
            return self["scores"]

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> Output:
            return Output(scores=self.linear(input_values * attention_mask))

    torch.manual_seed(0)
    model = Classifier()
    plain = copy.deepcopy(model.linear)

    def as_dict(data):
        return {"input_values": data[0], "attention_mask": torch.ones_like(data[0]), "labels": data[1]}

    for target, wrap in ((model, as_dict), (plain, lambda data: data)):
        unlearner = Unlearner(target, alpha=ALPHA, tau=TAU)
        unlearner.step(wrap(blobs(5, seed=1)), wrap(blobs(7, seed=2)))
        assert unlearner.forwards == MIXED
    assert torch.equal(model.linear.weight, plain.weight)


def test_frozen_parameters_stay():
    model = mlp()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    Unlearner(model, alpha=ALPHA, tau=TAU, balance=0.5).step(blobs(5), blobs(7))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_loss_of_ones_own():
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8).double()

    def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output[:, 0] - target) ** 2

    metrics = Unlearner(model, alpha=ALPHA, tau=TAU, loss=squared).step((x[:3], y[:3]), (x[3:], y[3:]))
    fresh = squared(nn.functional.linear(x, model.weight, model.bias), y)
    assert metrics.forget_loss.item() != fresh[:3].mean().item(), "metrics are of before the update"
    with pytest.raises(ValueError, match=r"one loss a sample, \[B\], got shape \(\)"):
        Unlearner(model, alpha=ALPHA, tau=TAU, loss=lambda z, t: squared(z, t).mean()).step((x, y), (x, y))


def test_state_dict_goes_on_exactly():
    torch.manual_seed(0)
    model = mlp()
    first = Unlearner(model, alpha=ALPHA, tau=torch.rand(50), gate="quantile", balance=0.5)
    first.step(blobs(5, seed=1), blobs(7, seed=2))
    other_model = copy.deepcopy(model)
    second = Unlearner(other_model, alpha=0.0, gate="quantile", balance=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for unlearner in (first, second):
        unlearner.step(blobs(5, seed=3), blobs(7, seed=4))
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refusals():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Unlearner(mlp().requires_grad_(False), alpha=0.5)
    with pytest.raises(ValueError, match="tau is not set"):
        Unlearner(mlp(), alpha=0.5).step(blobs(5), blobs(5))
    with pytest.raises(ValueError, match="got 1.2"):
        Unlearner(mlp(), alpha=1.2)
    with pytest.raises(ValueError, match="balance must be positive"):
        Unlearner(mlp(), alpha=0.5, balance=0.0)
    with pytest.raises(ValueError, match="mapping batch needs one of the keys"):
        Unlearner(mlp(), alpha=0.5, tau=1.0).step({"input": torch.zeros(2, 8)}, {"input": torch.zeros(2, 8)})
