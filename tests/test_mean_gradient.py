"""The mean loss and its gradient in one call are those of autograd on the losses, however the samples are made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_tau import _C
from nabla_tau.fused import mean_gradient, serves_mean
from nabla_tau.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # float64 is what they are held to


def batch(task: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = {"few": (7, 5), "wide": (7, 300), "sequence": (7, 4, 70)}[task]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets[3] = reference.IGNORE_INDEX  # a whole sample without a loss
    if task == "sequence":
        targets[0, 2:] = reference.IGNORE_INDEX
    return logits, targets


def by_autograd(
    logits: Tensor, targets: Tensor, weight: float, count: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    leaf = logits.to(dtype, copy=True).requires_grad_()
    tokens = F.cross_entropy(leaf.flatten(0, -2), targets.flatten(), reduction="none").view(len(targets), -1)
    kept = (targets != reference.IGNORE_INDEX).view(len(targets), -1)
    losses = (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)
    mean = weight * losses.sum() / (kept.any(1).sum() if count is None else count)
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


@pytest.mark.parametrize("count", [None, 11.0])
@pytest.mark.parametrize("weight", [1.0, -0.3])
@pytest.mark.parametrize("task", ["few", "wide", "sequence"])
def test_it_is_the_gradient_of_the_mean(task, weight, count):
    """count: that of all processes, where there are several."""
    logits, targets = batch(task)
    seen = []
    total = None if count is None else lambda own: seen.append(int(own)) or torch.tensor(count)
    found = mean_gradient(logits, targets, weight, total)
    assert seen == ([] if count is None else [6])
    for ours, wanted in zip(found, by_autograd(logits, targets, weight, count), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", ["few", "wide", "sequence"])
def test_it_is_no_worse_than_torch_in_the_same_precision(task, dtype):
    logits, targets = batch(task, dtype)
    mean, gradient = mean_gradient(logits, targets, 0.7)
    assert gradient.dtype == dtype
    assert gradient.shape == logits.shape
    exact, of_torch = by_autograd(logits, targets, 0.7), by_autograd(logits, targets, 0.7, dtype=dtype)
    for ours, theirs, wanted in zip((mean, gradient), of_torch, exact, strict=True):
        error, other = ((t.double() - wanted).abs().max() for t in (ours, theirs))
        assert error <= 1.05 * other + torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("total", [None, lambda own: own + 2], ids=["alone", "of several"])
def test_the_implementations_agree(total, dtype, tolerance, monkeypatch):
    for task in ("few", "wide", "sequence"):
        logits, targets = batch(task, dtype)
        found = mean_gradient(logits, targets, 0.7, total)
        with monkeypatch.context() as context:
            context.setattr("nabla_tau._library.row_provider", lambda _: "reference")
            wanted = mean_gradient(logits, targets, 0.7, total)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 100)


def test_of_samples_that_are_all_left_out_there_is_nothing():
    for task in ("few", "sequence"):
        logits, targets = batch(task)
        mean, gradient = mean_gradient(logits, torch.full_like(targets, reference.IGNORE_INDEX), 1.0)
        assert mean.item() == 0
        assert not gradient.any()


def test_a_memorised_sample_keeps_its_gradient():
    """softmax(z) - onehot(y) cancels in float32 where p_y is within 1e-8 of 1; from the margin it does not."""
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    mean, gradient = mean_gradient(logits, torch.tensor([0]), 1.0)
    wanted = by_autograd(logits, torch.tensor([0]), 1.0)
    torch.testing.assert_close(mean.double(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=1e-5, atol=0)


def test_a_loss_that_is_not_finite_shows():
    logits, targets = batch("few")
    logits[0, 0] = torch.nan
    assert not mean_gradient(logits, targets, 1.0)[0].isfinite()


def test_what_it_serves():
    logits, targets = batch("few")
    assert serves_mean(logits, targets)
    assert not serves_mean(logits, torch.rand(7, 5))
    assert not serves_mean(logits, torch.rand(7, 5) > 0.5)


@pytest.mark.parametrize("task", ["few", "sequence"])
def test_a_label_out_of_range_is_refused_in_the_usual_words(task):
    logits, targets = batch(task)
    targets.view(-1)[1] = 99
    with pytest.raises(ValueError, match=r"label out of range: target 99 in row 1, but the logits have \d+ classes"):
        mean_gradient(logits, targets, 1.0)


def test_the_binding_refuses_what_it_cannot_read():
    logits, targets = (t.numpy() for t in batch("few"))
    with pytest.raises(ValueError, match="base needs the number of samples"):
        _C.rows_mean(logits, targets, base=np.ones(7))
    with pytest.raises(ValueError, match=r"base must have shape \(7,\)"):
        _C.rows_mean(logits, targets, base=np.ones(6), samples=7.0)
    with pytest.raises(ValueError, match="samples must not be negative, got -3"):
        _C.rows_mean(logits, targets, base=np.ones(7), samples=-3.0)
    with pytest.raises(TypeError, match="base must be float64"):
        _C.rows_mean(logits, targets, base=np.ones(7, np.float32), samples=7.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_binding_takes_smoothing_and_class_weights(smoothing, weighted):
    logits, targets = batch("wide")
    weights = torch.linspace(0.1, 2, 300, dtype=torch.float64) if weighted else None
    mean, gradient = _C.rows_mean(
        logits.numpy(),
        targets.numpy(),
        2.0,
        label_smoothing=smoothing,
        class_weights=None if weights is None else weights.numpy(),
    )
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf, targets, weights, label_smoothing=smoothing, reduction="none")
    wanted = 2 * losses.sum() / 6
    wanted.backward()
    np.testing.assert_allclose(mean, wanted.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-10, atol=1e-15)
