"""The Triton row kernels: equal to the oracle in float64, no worse than torch in low precision, exact at the edges.

On a machine with a GPU the kernels run there. Elsewhere they run in Triton's interpreter, on CPU tensors, one program
after the other: that shows what they compute, not that their programs do not race (`benchmarks/gpu.sh` looks at that).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from interpreted import DEVICE, ON_GPU, load_kernels
from torch.nn import functional as F

from nabla_tau.kernels import reference
from nabla_tau.objective import Target, objective

launch, rows, multilabel = load_kernels("launch", "rows", "multilabel")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
INF = float("inf")

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(params=["tile", "online"])
def form(request, monkeypatch):
    """Both kernels on the same small rows: whole rows in registers, and rows in blocks of 32 classes."""
    if request.param == "online":
        monkeypatch.setattr(launch, "rows", lambda *_, **__: launch.Launch(1, 32, 32, online=True))
    return request.param


def batch(n, classes, dtype=torch.float32, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(n * 100003 + classes)
    logits = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64) + offset).to(dtype)
    targets = torch.randint(classes, (n,), generator=generator)
    weights = torch.randn(n, generator=generator)
    return logits.to(DEVICE), targets.to(DEVICE), weights.to(DEVICE)


def gradients(logits, targets, weights, **options):
    """By each of the two ways, which have to agree with one and the same truth."""
    signals, gradient = rows.rows_gradient(logits, targets, weights, **options)
    again = rows.rows_backward(logits, targets, signals.lse, signals.margin, weights, **options)
    return signals, [gradient, again]


def assert_signals_close(ours, truth, tol):
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        if name == "correct":
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(
                a.double(), b.double(), rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}"
            )


def error(value, truth):
    return (value.double() - truth).abs().max().item()


def resolution(dtype):
    # The interpreter cuts a float32 off where a GPU rounds it to the nearest bfloat16.
    return torch.finfo(dtype).eps * (0.5 if ON_GPU else 1)


@pytest.mark.parametrize("classes", [1, 2, 7, 16, 33, 100, 300])
def test_float64_equals_the_oracle(classes, form):
    logits, targets, weights = batch(5, classes, torch.float64)
    targets[1] = reference.IGNORE_INDEX
    signals, both = gradients(logits, targets, weights)
    assert_signals_close(signals, reference.rows(logits, targets), 1e-13)
    assert_signals_close(rows.rows_forward(logits, targets), signals, 0)
    for gradient in both:
        truth = reference.rows_grad(logits, targets, weights)
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("classes", [10, 203])
def test_no_worse_than_torch_against_float64(classes, offset, dtype, form):
    logits, targets, weights = batch(7, classes, dtype, offset=offset)
    exact = logits.double()
    truth = reference.rows(exact, targets)
    true_gradient = reference.rows_grad(exact, targets, weights.double())
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="none")
    loss.backward(weights.to(loss.dtype))
    signals, both = gradients(logits, targets, weights)
    assert error(signals.loss, truth.loss) <= error(loss, truth.loss) + 3 * EPS * truth.loss.max()
    # The backward knows the normaliser as one float32 beside the target logit, good to the rounding of the loss.
    slack = (EPS * truth.loss.max().clamp(min=1) + resolution(dtype)) * weights.abs().max()
    for gradient in both:
        assert gradient.dtype == dtype
        assert error(gradient, true_gradient) <= error(leaf.grad, true_gradient) + slack
    # torch has no counterpart of these, so they are held to float32 itself.
    for name in ("lse", "entropy", "margin", "p_max", "grad_sq"):
        value, wanted = getattr(signals, name), getattr(truth, name)
        torch.testing.assert_close(value.double(), wanted, rtol=3e-6, atol=3e-6)
    assert torch.equal(signals.correct, truth.correct)


def test_a_vocabulary_beyond_one_block():
    """The launch rule itself sends these rows, of a length that divides by nothing, through the blockwise kernel."""
    assert launch.rows(33003, torch.float32).online
    logits, targets, weights = batch(2, 33003)
    logits[1, targets[1]] = 40.0
    signals, both = gradients(logits, targets, weights)
    assert_signals_close(signals, reference.rows(logits.double(), targets), 2e-5)
    for gradient in both:
        assert error(gradient, reference.rows_grad(logits.double(), targets, weights.double())) < 1e-6


@pytest.mark.parametrize("height", [10.0, 26.0, 60.0, 200.0])
def test_a_memorised_row_keeps_its_loss_and_gradient(height, form):
    logits = torch.zeros(3, 1000, device=DEVICE)
    targets = torch.tensor([0, 500, 999], device=DEVICE)
    logits[torch.arange(3, device=DEVICE), targets] = height
    ones = torch.ones(3, device=DEVICE)
    truth, true_gradient = reference.rows(logits.double(), targets), reference.rows_grad(logits.double(), targets, ones)
    signals, both = gradients(logits, targets, ones)
    # float32 stops at 1e-38: at height 200 zero is the nearest value.
    for name in ("loss", "entropy", "margin"):
        torch.testing.assert_close(getattr(signals, name).double(), getattr(truth, name), rtol=3e-6, atol=1e-37)
    for gradient in both:
        # Of the others, e^(z - lse): the exponent itself is a float32.
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-6 + height * EPS, atol=1e-37)
    if height == 26.0:
        assert signals.loss[0].item() == pytest.approx(5.104e-9, rel=1e-3)
        assert -both[0][0, 0].item() == pytest.approx(5.104e-9, rel=1e-3)
        assert F.cross_entropy(logits, targets).item() == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smoothing_and_class_weights_are_those_of_torch(smoothing, weighted, dtype, form):
    logits, targets, weights = batch(6, 45, dtype, offset=-300.0)
    targets[2] = -1
    class_weights = torch.linspace(0, 2, 45, dtype=dtype, device=DEVICE) if weighted else None
    options = {"label_smoothing": smoothing, "class_weights": class_weights, "ignore_index": -1}
    signals, both = gradients(logits, targets, weights.to(dtype), **options)
    assert_signals_close(rows.rows_forward(logits, targets, **options), signals, 0)
    leaf = logits.double().requires_grad_()
    c = None if class_weights is None else class_weights.double()
    loss = F.cross_entropy(leaf, targets, c, reduction="none", label_smoothing=smoothing, ignore_index=-1)
    loss.backward(weights.double())
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(signals.loss.double(), loss.detach(), rtol=tol, atol=tol)
    for gradient in both:
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=tol, atol=tol)
    assert_signals_close(signals, reference.rows(logits.double(), targets, **{**options, "class_weights": c}), 2 * tol)


@pytest.mark.parametrize("dtype", LOW)
def test_ignored_rows_and_rows_of_weight_zero(dtype, form):
    logits, targets, weights = batch(9, 40, dtype)
    targets[::4] = -100
    weights[1] = 0
    expected = reference.rows_grad(logits, targets, weights)
    plain = rows.rows_forward(logits, targets)
    for name in ("loss", "margin", "grad_sq", "correct"):
        assert not getattr(plain, name)[::4].any(), name
    assert_signals_close(plain, reference.rows(logits.double(), targets), 3e-6)
    logits[0], logits[1] = float("nan"), float("nan")
    signals, both = gradients(logits, targets, weights)
    assert signals.loss[0] == 0
    for gradient in both:
        assert not gradient[targets == -100].any()
        assert not gradient[1].any()
        torch.testing.assert_close(gradient, expected, rtol=4 * resolution(dtype), atol=1e-6)


def test_all_rows_ignored(form):
    logits, targets, weights = batch(3, 10)
    targets[:] = -100
    signals, both = gradients(logits, targets, weights)
    assert signals.loss.tolist() == signals.margin.tolist() == signals.grad_sq.tolist() == [0.0] * 3
    assert not any(gradient.any() for gradient in both)
    forget, half = torch.tensor([True, False, True], device=DEVICE), torch.tensor(0.5, device=DEVICE)
    terms, row_weights, _ = rows.nabla_tau_rows(logits, targets, forget, half, half)
    assert not terms.any()
    assert not row_weights.any()


def test_an_empty_batch_launches_nothing(monkeypatch):
    for module in (rows, multilabel):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, None)
    logits, targets, weights = batch(0, 10, torch.bfloat16)
    signals, both = gradients(logits, targets, weights)
    assert [value.shape for value in (*signals, *both)] == 7 * [(0,)] + 2 * [(0, 10)]
    terms, row_weights, _ = rows.nabla_tau_rows(logits, targets, targets > 0, weights.sum(), weights.sum())
    assert terms.tolist() == [0.0] * 5
    assert row_weights.shape == (0,)
    assert multilabel.multilabel_forward(logits, logits).loss.shape == (0,)
    assert multilabel.multilabel_backward(logits, logits, weights).shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_ruled_out_count_for_nothing(dtype, form):
    logits, targets, weights = batch(4, 40, dtype)
    tol = 1e-13 if dtype == torch.float64 else 3e-6
    # Blocks of nothing but -inf before and after the possible classes, and a finite stand-in for -inf.
    for mask in (-INF, torch.finfo(dtype).min):
        wide = torch.full((4, 160), mask, dtype=dtype, device=DEVICE)
        wide[:, 70:110] = logits
        signals, both = gradients(wide, targets + 70, weights)
        assert_signals_close(signals, reference.rows(logits.double(), targets), tol)
        for gradient in both:
            assert not gradient[:, :70].any()
            truth = reference.rows_grad(logits, targets, weights)
            torch.testing.assert_close(gradient[:, 70:110], truth, rtol=max(4 * tol, 4 * resolution(dtype)), atol=tol)


@pytest.mark.parametrize("low", [-INF, -1e9, -3e38])
def test_a_hopeless_target_keeps_the_other_classes_right(low, form):
    logits, targets, _ = batch(4, 50)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, targets[:, None], False)
    logits[~others] = low
    rest = logits[others].view(4, -1)
    signals, both = gradients(logits, targets, torch.ones(4, device=DEVICE))
    assert signals.loss.tolist() == [-low if low == -INF else pytest.approx(-low)] * 4
    torch.testing.assert_close(signals.lse, rest.logsumexp(1))
    p = rest.double().softmax(1)
    torch.testing.assert_close(signals.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-6)
    for gradient in both:
        assert (gradient[~others] == -1).all()
        torch.testing.assert_close(gradient[others].view(4, -1).double(), p, rtol=1e-5, atol=1e-7)


def test_one_possible_class_is_certain(form):
    logits = torch.full((2, 40), -INF, device=DEVICE)
    logits[:, 1] = 7.0
    targets = torch.tensor([1, 1], device=DEVICE)
    signals, both = gradients(logits, targets, torch.ones(2, device=DEVICE))
    assert signals.margin.tolist() == [INF] * 2
    assert signals.loss.tolist() == signals.entropy.tolist() == signals.grad_sq.tolist() == [0.0, 0.0]
    assert signals.p_max.tolist() == [1.0, 1.0]
    assert signals.lse.tolist() == [7.0, 7.0]
    assert signals.correct.all()
    assert not any(gradient.any() for gradient in both)


@pytest.mark.parametrize("place", [0, 2, 39])
def test_nan_reaches_the_loss_of_its_row_only(place, form):
    logits, targets, weights = batch(4, 40)
    targets[:] = 2
    logits[1, 2] = 50.0
    logits[1, place] = float("nan")
    signals, both = gradients(logits, targets, weights)
    for name in ("loss", "entropy", "margin", "p_max", "grad_sq"):
        assert getattr(signals, name).isnan().tolist() == [False, True, False, False], name
    assert not signals.correct[1]
    for gradient in both:
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("target", [40, -1, 2**40])
def test_a_label_out_of_range_is_nan_and_not_a_fault(target, form):
    logits, targets, weights = batch(3, 40)
    targets[1] = target
    signals, both = gradients(logits, targets, weights)
    assert signals.loss.isnan().tolist() == [False, True, False]
    assert all(gradient.isnan().any(1).tolist() == [False, True, False] for gradient in both)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_first_class(dtype, form):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(2, (12, 70), generator=generator).to(dtype)
    logits[:, 40:] = 1
    logits[0], logits[1] = 0, 0
    logits[2, :33] = 0
    logits[3, :32] = 0
    targets = torch.tensor([0, 1, 33, 40, *range(8)])
    ours = rows.rows_forward(logits.to(DEVICE), targets.to(DEVICE)).correct.cpu()
    assert torch.equal(ours, logits.double().argmax(1) == targets)
    assert 0 < ours.sum() < 12


@pytest.mark.parametrize("first", [0, 63, 64, 300, 301, 499])
def test_a_tie_is_found_wherever_it_is_in_a_long_row(first):
    """A program of one row looks for it part by part."""
    logits = torch.zeros(1, 500, device=DEVICE)
    logits[0, [first, 300]] = 1.0
    correct = rows.rows_forward(logits, torch.tensor([300], device=DEVICE)).correct
    assert correct.item() == (first >= 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_do_not_change_a_row(dtype, form):
    logits, targets, weights = batch(4, 48, dtype)
    wide = torch.full((4, 70), 9.0, dtype=dtype, device=DEVICE)
    wide[:, 5:53] = logits
    expected, both = gradients(logits, targets, weights)
    for view in (wide[:, 5:53], logits.t().contiguous().t(), torch.stack([logits, logits], 1)[:, 1]):
        assert not view.is_contiguous()
        ours, again = gradients(view, targets, weights)
        assert all(map(torch.equal, expected, ours))
        assert all(map(torch.equal, both, again))
    one = weights[:1].expand(4)
    expanded = logits[:1].expand(4, 48)
    ours, again = gradients(expanded, targets, one)
    expected, both = gradients(expanded.contiguous(), targets, one.contiguous())
    assert all(map(torch.equal, expected, ours))
    assert all(map(torch.equal, both, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_receives_the_gradient_and_may_be_the_logits(dtype, form):
    logits, targets, weights = batch(5, 70, dtype)
    signals, expected = rows.rows_gradient(logits, targets, weights)
    other = torch.full((5, 80), 9.0, dtype=dtype, device=DEVICE)
    rows.rows_gradient(logits, targets, weights, out=other[:, :70])
    assert torch.equal(other[:, :70], expected)
    assert (other[:, 70:] == 9).all()
    ours, gradient = rows.rows_gradient(logits, targets, weights, out=logits)
    assert gradient is logits
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, ours, signals))


def test_unit_weights_are_the_default(form):
    logits, targets, _ = batch(5, 70)
    targets[3] = -100
    _, gradient = rows.rows_gradient(logits, targets)
    assert torch.equal(gradient, rows.rows_gradient(logits, targets, torch.ones(5, device=DEVICE))[1])


def mixed(dtype=torch.float64, n=11):
    logits, targets, _ = batch(n, 12, dtype)
    forget = torch.arange(n, device=DEVICE) % 3 == 0
    targets[4], targets[6] = -100, -100
    return logits, targets, forget


def truth_of(logits, targets, forget, tau, alpha, gate, power):
    """Terms, and the derivative by the loss of each row, by autograd through `objective`."""
    losses = reference.rows(logits, targets).loss.requires_grad_()
    terms = objective(losses, forget, Target(tau, None), alpha, gate=gate, power=power, counts=targets != -100)
    (weights,) = torch.autograd.grad(terms.total, losses)
    return terms, weights


@pytest.fixture(params=["last program", "launch"])
def gate_in(request, monkeypatch):
    """Both places of the gate, a few rows at a time."""
    monkeypatch.setattr(launch, "GATE_BLOCK", 4)
    monkeypatch.setattr(launch, "gate", lambda: launch.Launch(4, 1, 32))
    if request.param == "launch":
        monkeypatch.setattr(launch, "GATE_ROWS", 0)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
@pytest.mark.parametrize("tau", [9.0, 3.5, 0.01])
def test_objective_of_a_mixed_batch(gate, power, tau, gate_in):
    logits, targets, forget = mixed()
    tau, alpha = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (tau, 0.3))
    truth, true_weights = truth_of(logits, targets, forget, tau, alpha, gate, power)
    terms, weights, signals = rows.nabla_tau_rows(logits, targets, forget, tau, alpha, gate=gate, power=power)
    torch.testing.assert_close(terms, torch.stack([term.detach() for term in truth]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, true_weights, rtol=1e-12, atol=1e-14)
    assert_signals_close(signals, reference.rows(logits, targets), 1e-13)
    again = rows.nabla_tau_rows(logits, targets, forget, tau, alpha, gate=gate, power=power)
    assert torch.equal(terms, again[0])
    assert torch.equal(weights, again[1])


@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
@pytest.mark.parametrize("all_forget", [True, False])
def test_an_empty_group_contributes_nothing(gate, all_forget, gate_in):
    logits, targets, forget = mixed()
    forget[:] = all_forget
    tau, alpha = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (6.0, 0.3))
    truth, true_weights = truth_of(logits, targets, forget, tau, alpha, gate, 2)
    terms, weights, _ = rows.nabla_tau_rows(logits, targets, forget, tau, alpha, gate=gate)
    torch.testing.assert_close(terms, torch.stack([term.detach() for term in truth]))
    torch.testing.assert_close(weights, true_weights)


@pytest.mark.parametrize("gate", ["batch", "sample"])
@pytest.mark.parametrize("row", [0, 1])
def test_an_infinite_loss_stays_in_its_group(gate, row, gate_in):
    logits, targets, forget = mixed(torch.float32)
    logits[row, targets[row]] = -INF
    tau, alpha = (torch.tensor(x, device=DEVICE) for x in (6.0, 0.3))
    terms, weights, signals = rows.nabla_tau_rows(logits, targets, forget, tau, alpha, gate=gate)
    assert signals.loss[row] == INF
    assert not terms.isnan().any()
    assert weights.isfinite().all()
    forget_loss, retain_loss = terms[2:4].tolist()
    assert (forget_loss == INF) == (row == 0)
    assert (retain_loss == INF) == (row == 1)


@pytest.mark.parametrize("gate", ["batch", "two_sided"])
@pytest.mark.parametrize("tau", [6.0, 0.1])
def test_sequences_weigh_their_tokens(gate, tau, gate_in):
    """Samples of several tokens: the base weights give the objective of the mean losses of the samples."""
    logits, targets, _ = batch(15, 12, torch.float64)
    sample = torch.arange(15, device=DEVICE) // 3
    targets[[1, 5, 9, 10, 11]] = -100  # the fourth sample has no token left
    kept = (targets != -100).double()
    tokens = torch.zeros(5, dtype=torch.float64, device=DEVICE).index_add_(0, sample, kept)
    base = kept / tokens.clamp(min=1)[sample]
    forget_sample = torch.tensor([True, False, False, True, True], device=DEVICE)
    losses = reference.rows(logits, targets).loss.requires_grad_()
    means = torch.zeros(5, dtype=torch.float64, device=DEVICE).index_add(0, sample, base * losses)
    counts = tokens > 0
    tau, alpha = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (tau, 0.3))
    truth = objective(means, forget_sample, Target(tau, None), alpha, gate=gate, counts=counts)
    (true_weights,) = torch.autograd.grad(truth.total, losses)
    terms, weights, _ = rows.nabla_tau_rows(
        logits,
        targets,
        forget_sample[sample],
        tau,
        alpha,
        gate=gate,
        base=base,
        forget_count=(forget_sample & counts).sum(),
        retain_count=(~forget_sample & counts).sum(),
    )
    torch.testing.assert_close(terms, torch.stack([term.detach() for term in truth]))
    torch.testing.assert_close(weights, true_weights)


def test_a_row_of_base_zero_is_in_no_group(gate_in):
    logits, targets, forget = mixed(n=7)
    base = torch.tensor([1.0, 0.5, 0.5, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64, device=DEVICE)
    half, one = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (0.5, 1.0))
    options = {"base": base, "forget_count": one, "retain_count": 2 * one}
    terms, weights, _ = rows.nabla_tau_rows(logits, targets, forget, 9 * one, half, **options)
    logits[3, targets[3]] = -INF
    again, again_weights, signals = rows.nabla_tau_rows(logits, targets, forget, 9 * one, half, **options)
    assert signals.loss[3] == INF
    assert torch.equal(terms, again)
    assert torch.equal(weights, again_weights)
    assert weights[3] == 0
    assert weights[0] != 0


def test_the_counter_is_ready_for_the_next_launch(monkeypatch, form):
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(rows, "_counter", lambda _: counter)
    half = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    found = []
    # Launches of different numbers of programs follow each other.
    for n in (11, 3, 11):
        logits, targets, forget = mixed(n=11)
        found.append(rows.nabla_tau_rows(logits[:n], targets[:n], forget[:n], 9 * half, half)[:2])
        assert counter.item() == 0
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_launches_give_the_gradient_of_the_objective(dtype):
    logits, targets, forget = mixed(dtype, n=40)
    tau, alpha = (torch.tensor(x, device=DEVICE) for x in (6.0, 0.3))
    _, weights, signals = rows.nabla_tau_rows(logits, targets, forget, tau, alpha)
    gradient = rows.rows_backward(logits, targets, signals.lse, signals.margin, weights)
    leaf = logits.double().requires_grad_()
    kept = targets != -100
    losses = F.cross_entropy(leaf, targets, reduction="none")
    gap = 6.0 - losses[forget & kept].mean()
    (0.3 * gap.relu() ** 2 + 0.7 * losses[~forget & kept].mean()).backward()
    atol = 1e-6 + resolution(dtype) * leaf.grad.abs().max().item()
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=resolution(dtype) + 1e-5, atol=atol)


@pytest.mark.parametrize("labels", [1, 7, 20, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multilabel_equals_the_oracle(labels, dtype):
    generator = torch.Generator().manual_seed(labels)
    logits = (6 * torch.randn(5, labels, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.rand(5, labels, generator=generator, dtype=torch.float64).to(dtype)
    targets[:3] = targets[:3].round()
    targets[1] = (logits[1] > 0).to(dtype)
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], device=DEVICE)
    truth = reference.multilabel_rows(logits.double(), targets.double())
    tol = 1e-13 if dtype == torch.float64 else 3e-6
    assert_signals_close(multilabel.multilabel_forward(logits, targets), truth, tol)
    true_gradient = reference.multilabel_rows_grad(logits.double(), targets.double(), weights)
    logits[2] = float("nan")
    gradient = multilabel.multilabel_backward(logits, targets, weights)
    rtol, smallest = 4 * max(tol, resolution(dtype)), 6e-8 if dtype == torch.float16 else 1e-37
    # Relative where labels are 0 or 1, since the small entries are the memorised ones; between them the parts cancel.
    torch.testing.assert_close(gradient[:3].double(), true_gradient[:3], rtol=rtol, atol=smallest)
    torch.testing.assert_close(gradient[3:].double(), true_gradient[3:], rtol=rtol, atol=max(tol, smallest))


def test_multilabel_layouts_and_bool_targets():
    logits, targets = batch(4, 48)[0], batch(4, 48, scale=1.0)[0] > 0
    weights = torch.full((1,), 0.5, device=DEVICE).expand(4)
    wide = torch.zeros(4, 99, device=DEVICE)
    wide[:, 7:55] = logits
    expected = multilabel.multilabel_forward(logits, targets.float())
    assert all(map(torch.equal, expected, multilabel.multilabel_forward(wide[:, 7:55], targets)))
    gradient = multilabel.multilabel_backward(wide[:, 7:55], targets, weights)
    assert torch.equal(gradient, multilabel.multilabel_backward(logits, targets.float(), weights.contiguous()))


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_launch_rules(real, smoothing, gate):
    sizes = [1, 2, 10, 256, 257, 1000, 1024, 1025, 4096, 32768, 32769, 128256, 262144]
    configs = [launch.rows(size, real, smoothing=smoothing, gate=gate) for size in sizes]
    for size, config in zip(sizes, configs, strict=True):
        # A thread without a logit of its own would read what another is about to overwrite (out=logits).
        assert config.rows * config.classes >= config.threads
        assert config.threads in {32, 64, 128, 256, 512, 1024}
        assert config.online or size <= config.classes
        assert not gate or config.threads >= 128
    assert all(b.online for a, b in pairwise(configs) if a.online)
    if real == torch.float32 and not smoothing:
        assert [config.online for config in configs].index(True) == sizes.index(32769)


def test_alignment_is_the_one_that_all_sizes_share():
    assert [launch.alignment(n) for n in (1000, 128256, 252, 50257, 0)] == [8, 16, 4, 1, 16]
    assert launch.alignment(1024, 1030) == 2


@pytest.mark.skipif(not ON_GPU, reason="no GPU on this machine")
class TestOnGPU:
    def test_more_logits_than_an_int32_counts(self):
        n, classes = 17000, 131072
        if torch.cuda.mem_get_info()[0] < 10e9:
            pytest.skip("needs 10 GB")
        logits = torch.zeros(n, classes, dtype=torch.bfloat16, device="cuda")
        targets = torch.zeros(n, dtype=torch.int64, device="cuda")
        logits[-1, 7] = 20.0
        targets[-1] = 7
        signals = rows.rows_forward(logits, targets)
        assert signals.correct.all()
        assert signals.loss[-1] < 1e-3
        assert signals.loss[0].item() == pytest.approx(np.log(classes))
        rows.rows_gradient(logits, targets, out=logits)
        assert logits[-1, 7].item() == pytest.approx(-signals.loss[-1].item(), rel=0.02)
        assert logits[-2, 0].item() == pytest.approx(-1, rel=0.01)

    @pytest.mark.parametrize("classes", [10, 1000, 40000])
    def test_runs_agree_bit_for_bit_and_in_graphs(self, classes):
        logits, targets, weights = batch(3000, classes, torch.bfloat16)
        forget, half = weights > 0, torch.tensor(0.5, device="cuda")

        def run():
            return rows.nabla_tau_rows(logits, targets, forget, half, half)

        first = run()
        for _ in range(20):
            assert all(map(torch.equal, (*first[:2], *first[2]), (*(again := run())[:2], *again[2])))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(3):
            captured[0].zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured[0], first[0])
            assert torch.equal(captured[1], first[1])
        assert torch.equal(run()[0], first[0])

    def test_the_host_never_waits(self):
        logits, targets, weights = batch(64, 100)
        half = torch.tensor(0.5, device="cuda")
        for _ in range(2):
            _, row_weights, signals = rows.nabla_tau_rows(logits, targets, weights > 0, half, half)
            rows.rows_backward(logits, targets, signals.lse, signals.margin, row_weights)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_gradient_is_rounded_to_nearest(self, dtype):
        logits, targets, weights = batch(64, 100, dtype)
        _, exact = rows.rows_gradient(logits.float(), targets, weights)
        assert torch.equal(rows.rows_gradient(logits, targets, weights)[1], exact.to(dtype))
