"""On a GPU: the same weights as on the CPU, and a step that never makes the host wait."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import blobs, mlp

from nabla_tau import Unlearner, unlearn
from nabla_tau.functional import sample_signals
from nabla_tau.recipes import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_those_of_the_cpu(recipe):
    torch.manual_seed(0)
    model = mlp().double()
    x, y = blobs(600)
    x = x.double()
    parts = {"forget": (x[:60], y[:60]), "retain": (x[60:400], y[60:400]), "held_out": (x[400:], y[400:])}
    on_cpu = unlearn(model, **parts, recipe=recipe).model
    moved = {name: tuple(tensor.cuda() for tensor in part) for name, part in parts.items()}
    for data in (moved, parts):
        on_gpu = unlearn(copy.deepcopy(model).cuda(), **data, recipe=recipe).model
        for a, b in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signals_are_those_of_the_cpu(dtype):
    logits, targets = (4 * torch.randn(37, 1003)).to(dtype), torch.randint(1003, (37,))
    here, there = sample_signals(logits, targets), sample_signals(logits.cuda(), targets.cuda())
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"balance": 0.25, "gate": "quantile", "power": 1, "hold": True}])
def test_a_step_never_makes_the_host_wait(settings):
    torch.manual_seed(0)
    model = mlp().cuda()
    forget, retain = (tuple(tensor.cuda() for tensor in blobs(size, seed=size)) for size in (16, 32))
    unlearner = Unlearner(model, alpha=0.5, tau=torch.rand(100), **settings)
    unlearner.step(forget, retain)  # the first step looks at the model, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = unlearner.step(forget, retain)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.retain_loss.isfinite()
