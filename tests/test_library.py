"""The row ops inside PyTorch: the fused loss is the objective, whatever else autograd, the compiler, autocast and
checkpointing do around it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nabla_tau import NablaTauLoss, _library, nabla_tau_loss
from nabla_tau.functional import differentiable_signals, has_loss, row_losses, row_signals, sample_losses
from nabla_tau.loss import as_target, nabla_tau_terms
from nabla_tau.objective import GATES, objective

FORGET = torch.tensor([True, False, True, True, False, False, True])


def batch(task: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = {"classification": (7, 5), "wide": (7, 200), "sequence": (7, 4, 70), "multilabel": (7, 5)}[task]
    logits = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if task == "multilabel":
        return logits, torch.randint(2, shape, generator=generator).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets[3] = -100  # a whole sample without a loss
    if task == "sequence":
        targets[0, 2:] = -100
    return logits, targets


TASKS = ["classification", "wide", "sequence", "multilabel"]
WEIGHTS = {"classification": 5, "wide": 200, "sequence": 70}


def parts(terms, signals) -> list[Tensor]:
    return [*terms, *signals]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mask", [FORGET, ~FORGET & False, FORGET | True, torch.arange(7) == 3])
def test_the_fused_loss_is_the_objective(task, gate, power, mask):
    logits, targets = batch(task)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for tau in (torch.linspace(0.1, 9, 40, dtype=torch.float64), torch.full((3,), 1e-3, dtype=torch.float64)):
        options = {"alpha": 0.3, "gate": gate, "power": power}
        found = nabla_tau_terms(mine, targets, mask, tau=tau, **options)
        signals = differentiable_signals(theirs, targets)
        target = as_target(tau, gate, like=signals.loss)
        expected = objective(signals.loss, mask, target, 0.3, gate=gate, power=power, counts=has_loss(targets)), signals
        for a, b in zip(parts(*found), parts(*expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        (g,), (h,) = (torch.autograd.grad(pair[0].total, z) for pair, z in ((found, mine), (expected, theirs)))
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["classification", "wide", "sequence"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_and_class_weights_are_those_of_cross_entropy(task, dtype, smoothing, weighted):
    logits, targets = batch(task, dtype)
    classes = WEIGHTS[task]
    weights = torch.linspace(0.2, 2, classes) if weighted else None
    exact = logits.detach().clone().double().requires_grad_()
    rows = F.cross_entropy(
        exact.reshape(-1, classes),
        targets.flatten(),
        weight=None if weights is None else weights.double(),
        label_smoothing=smoothing,
        reduction="none",
    )
    kept = (targets != -100).view(7, -1)
    losses = rows.view(7, -1).sum(1) / kept.sum(1).clamp(min=1)
    counts = kept.any(1)
    forget, retain = losses[FORGET & counts], losses[~FORGET & counts]
    expected = 0.3 * (9.0 - forget.mean()).relu() ** 2 + 0.7 * retain.mean()
    expected.backward()
    leaf = logits.clone().requires_grad_()
    options = {"label_smoothing": smoothing, "class_weights": weights}
    value = nabla_tau_loss(leaf, targets, FORGET, tau=9.0, alpha=0.3, **options)
    value.backward()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 1e-2)
    module = NablaTauLoss(tau=9.0, alpha=0.3, **options)
    assert module(logits, targets, FORGET).item() == pytest.approx(value.item(), rel=1e-6)
    alone = sample_losses(logits, targets, **options)
    torch.testing.assert_close(alone.double(), losses.detach(), rtol=1e-5, atol=1e-6)


def test_bad_options_are_refused():
    logits, targets = batch("classification")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        row_losses(logits, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"class_weights must be floating \[5\], one a class, got torch.int64"):
        nabla_tau_loss(logits, targets, FORGET, tau=1.0, alpha=0.5, class_weights=torch.arange(5))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(4,\)"):
        row_losses(logits, targets, class_weights=torch.ones(4))
    with pytest.raises(ValueError, match="must not require a gradient"):
        row_losses(logits, targets, class_weights=torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match="not for multi-label targets"):
        sample_losses(*batch("multilabel"), label_smoothing=0.1)
    for gate in ("batch", "sample", "quantile"):
        with pytest.raises(ValueError, match="tau must be finite"):
            nabla_tau_loss(logits, targets, FORGET, tau=torch.tensor([1.0, torch.nan]), alpha=0.5, gate=gate)
        with pytest.raises(ValueError, match="at least one held-out loss"):
            nabla_tau_loss(logits, targets, FORGET, tau=torch.empty(0), alpha=0.5, gate=gate)
    with pytest.raises(ValueError, match="tau must be finite, got nan"):
        nabla_tau_loss(logits, targets, FORGET, tau=float("nan"), alpha=0.5)
    targets[2] = 5
    for call in (row_losses, sample_losses, row_signals):
        with pytest.raises(ValueError, match="label out of range: target 5 in row 2"):
            call(logits, targets)
    with pytest.raises(ValueError, match="label out of range: target 5 in row 2"):
        nabla_tau_loss(logits, targets, FORGET, tau=1.0, alpha=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["classification", "sequence"])
def test_the_upstream_gradient_multiplies_and_a_second_backward_repeats(task, dtype):
    logits, targets = batch(task, dtype)
    leaf = logits.clone().requires_grad_()
    loss = nabla_tau_loss(leaf, targets, FORGET, tau=9.0, alpha=0.3)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (eighth,) = torch.autograd.grad(loss / 8, leaf)
    assert torch.equal(once, again)
    tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6
    torch.testing.assert_close(8 * eighth, once, rtol=tolerance, atol=1e-5)


def test_a_scaled_float16_loss_does_not_underflow():
    """1/n of a small probability is below float16: what a gradient scaler multiplies must come before the rounding."""
    logits = torch.randn(4096, 1000, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    targets = torch.zeros(4096, dtype=torch.int64)
    forget = torch.arange(4096) < 2048
    (2.0**16 * nabla_tau_loss(logits, targets, forget, tau=9.0, alpha=0.3)).backward()
    exact = logits.detach().float().requires_grad_()
    (2.0**16 * nabla_tau_loss(exact, targets, forget, tau=9.0, alpha=0.3)).backward()
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=2e-3, atol=1e-6)
    assert (logits.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("task", TASKS)
def test_double_backward_is_refused(task):
    logits, targets = batch(task)
    logits.requires_grad_()
    for loss in (nabla_tau_loss(logits, targets, FORGET, tau=9.0, alpha=0.3), sample_losses(logits, targets).sum()):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("graded", [torch.enable_grad, torch.no_grad])
def test_a_derivative_in_forward_mode_is_refused_and_not_left_away(task, graded):
    logits, targets = batch(task)
    for loss in (partial(nabla_tau_loss, forget_mask=FORGET, tau=9.0, alpha=0.3), sample_losses):
        with graded(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            loss(forward_ad.make_dual(logits, torch.ones_like(logits)), targets)


@pytest.mark.parametrize("task", TASKS)
def test_signals_hold_no_graph_whatever_computes_them(task, monkeypatch):
    monkeypatch.setattr(_library, "row_provider", lambda _: "reference")
    logits, targets = batch(task)
    logits.requires_grad_()
    for found in (
        differentiable_signals(logits, targets),
        nabla_tau_terms(logits, targets, FORGET, tau=9.0, alpha=0.3)[1],
    ):
        assert found.loss.requires_grad
        assert not any(signal.requires_grad for signal in found[1:])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "empty"])
def test_any_layout_and_an_empty_batch(task, layout):
    logits, targets = batch(task)
    mask = FORGET
    if layout == "transposed":
        odd = logits.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        odd = torch.stack((logits, logits + 1), dim=-1)[..., 0]
    elif layout == "expanded":
        odd, logits = logits[:1].expand_as(logits), logits[:1].expand_as(logits).contiguous()
    else:
        odd, logits, targets, mask = logits[:0], logits[:0], targets[:0], mask[:0]
    assert layout == "empty" or not odd.is_contiguous()
    found, expected = odd.detach().requires_grad_(), logits.clone().requires_grad_()
    value, wanted = (nabla_tau_loss(z, targets, mask, tau=9.0, alpha=0.3) for z in (found, expected))
    assert value == wanted
    for a, b in ((value, wanted), (sample_losses(found, targets).sum(), sample_losses(expected, targets).sum())):
        (g,), (h,) = torch.autograd.grad(a, found), torch.autograd.grad(b, expected)
        assert torch.equal(g, h)


OPERATORS = {
    "rows_forward": _library.rows_forward_op,
    "rows_backward": _library.rows_backward_op,
    "multilabel_forward": _library.multilabel_forward_op,
    "multilabel_backward": _library.multilabel_backward_op,
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_pass_opcheck(name, dtype):
    logits, targets = batch("multilabel" if "multilabel" in name else "classification", dtype)
    weights = torch.linspace(0.5, 1, 5).to(_library.compute_dtype(logits))
    per_row = torch.rand(7, dtype=weights.dtype)
    if name == "rows_forward":
        samples = [(logits.requires_grad_(), targets, -100, 0.0, None), (logits, targets, -100, 0.1, weights)]
    elif name == "rows_backward":
        signals = row_signals(logits, targets)
        samples = [(logits, targets, signals.lse, signals.margin, per_row, -100, 0.1, weights)]
    elif name == "multilabel_forward":
        samples = [(logits.requires_grad_(), targets)]
    else:
        samples = [(logits, targets, per_row)]
    for arguments in samples:
        torch.library.opcheck(OPERATORS[name], arguments)


def step(model: nn.Module, inputs: Tensor, targets: Tensor, mask: Tensor, gate: str) -> Tensor:
    tau = torch.linspace(0.5, 9, 20, dtype=inputs.dtype)
    return nabla_tau_loss(model(inputs), targets, mask, tau=tau, alpha=0.3, gate=gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_compiles_to_one_graph(task, gate):
    torch._dynamo.reset()
    model = nn.Linear(5, 5).double()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    logits, targets = batch(task)
    for rows in (7, 6, 5):
        arguments = model, logits[:rows], targets[:rows], FORGET[:rows], gate
        wanted = torch.autograd.grad(step(*arguments), model.weight)[0]
        found = torch.autograd.grad(compiled(*arguments), model.weight)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_inductor_gives_the_same_gradient():
    torch._dynamo.reset()
    model = nn.Linear(5, 5)
    logits, targets = batch("classification", torch.float32)
    arguments = model, logits, targets, FORGET, "batch"
    wanted = torch.autograd.grad(step(*arguments), model.weight)[0]
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*arguments), model.weight)[0]
    torch.testing.assert_close(found, wanted)


def test_autocast_logits_are_computed_in_float32():
    model = nn.Linear(5, 5)
    inputs, targets = batch("classification", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)
        assert logits.dtype == torch.bfloat16
        loss = nabla_tau_loss(logits, targets, FORGET, tau=9.0, alpha=0.3)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    exact = nabla_tau_loss(logits.detach().double(), targets, FORGET, tau=9.0, alpha=0.3)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trunk_may_be_checkpointed(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    inputs, targets = batch("classification")
    inputs.requires_grad_()  # reentrant checkpoints need it
    wanted = torch.autograd.grad(step(model, inputs, targets, FORGET, "batch"), model[0].weight)[0]
    loss = step(lambda x: checkpoint(model, x, use_reentrant=reentrant), inputs, targets, FORGET, "batch")
    loss.backward()
    torch.testing.assert_close(model[0].weight.grad, wanted, rtol=1e-12, atol=1e-14)
