"""Losses of a linear head without its logits: those of the logits, and never a matrix of their size."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nabla_tau import _library, nabla_tau_loss
from nabla_tau.kernels import linear_rows, reference
from nabla_tau.linear import _losses_op, linear_nabla_tau_loss, linear_row_losses, linear_row_signals
from nabla_tau.objective import Target, objective, target_from_losses
from nabla_tau.row_objectives import npo, wga

CLASSES, WIDTH = 9, 6
# Several chunks in each group, of which a sample's four tokens lie in two.
SHAPES = {"rows": (11,), "sequences": (5, 4)}
ORDERS = {
    "forget first": lambda size: torch.arange(size) < size // 2,
    "forget last": lambda size: torch.arange(size) >= size // 2,
    "mixed": lambda size: torch.arange(size) % 2 == 0,
    "no forget": lambda size: torch.zeros(size, dtype=torch.bool),
    "only forget": lambda size: torch.ones(size, dtype=torch.bool),
}


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear_rows, "chunk_rows", lambda rows, *_: min(rows, 3))


def batch(shape: tuple[int, ...], *, bias: bool = True, dtype=torch.float64, seed: int = 0):
    """hidden, weight, bias, targets with a quarter ignored; sequences of different lengths, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, weight, offset = random(*shape, WIDTH), random(CLASSES, WIDTH), random(CLASSES)
    targets = torch.randint(CLASSES, shape, generator=generator)
    targets.flatten()[::4] = -100
    if len(shape) == 2:
        targets[1] = -100
        targets[2, 1:] = -100
        targets[3, 2] = -100
    floats = (hidden, weight, offset) if bias else (hidden, weight)
    hidden, weight, *offset = (tensor.to(dtype).requires_grad_() for tensor in floats)
    return hidden, weight, offset[0] if bias else None, targets


def plain_rows(hidden, weight, targets, *, bias=None, **options) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    rows = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
        weight=options.get("class_weights"),
    )
    return rows.view(targets.shape)


def plain(hidden, weight, targets, forget, *, tau, alpha, gate="batch", power=2, bias=None, **options) -> Tensor:
    """The definition, from torch.nn.functional on whole logits."""
    losses, kept = plain_rows(hidden, weight, targets, bias=bias, **options), targets != -100
    counts = kept
    if targets.ndim == 2:
        losses, counts = losses.sum(1) / kept.sum(1).clamp(min=1), kept.any(1)
    held_out = torch.as_tensor(tau, dtype=losses.dtype)
    target = target_from_losses(held_out) if held_out.ndim else Target(held_out, None)
    return objective(losses, forget, target, alpha, gate=gate, power=power, counts=counts).total


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    # Not 1: the gradients were made in the forward and must follow what comes after.
    return list(torch.autograd.grad(3 * loss, [tensor for tensor in inputs if tensor is not None]))


def assert_same(ours, theirs, rtol=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2 * rtol)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("provider", ["own", "reference"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample", "quantile"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_whole_logits(shape, gate, order, provider, monkeypatch):
    if provider == "reference":
        monkeypatch.setattr(_library, "row_provider", lambda _: "reference")
    forget = ORDERS[order](SHAPES[shape][0])
    held_out = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    class_weights = held_out[:CLASSES] + 0.5
    # Targets above every loss, and below some: the gate open and closed.
    for factor, power, bias, smoothing, weights in (
        (20, 2, False, 0.0, None),
        (20, 1, True, 0.1, None),
        (20, 2, True, 0.0, class_weights),
        (0.5, 2, True, 0.1, class_weights),
        (0.5, 1, False, 0.0, class_weights),
        (0.5, 2, False, 0.1, None),
    ):
        hidden, weight, offset, targets = batch(SHAPES[shape], bias=bias)
        arguments = {
            "tau": factor * held_out if gate == "quantile" else factor,
            "alpha": 0.3,
            "gate": gate,
            "power": power,
            "bias": offset,
            "label_smoothing": smoothing,
            "class_weights": weights,
        }
        ours = linear_nabla_tau_loss(hidden, weight, targets, forget, **arguments)
        theirs = plain(hidden, weight, targets, forget, **arguments)
        assert_same([ours], [theirs])
        assert_same(gradients(ours, hidden, weight, offset), gradients(theirs, hidden, weight, offset))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_that_of_nabla_tau_loss(shape):
    hidden, weight, bias, targets = batch(SHAPES[shape])
    forget = ORDERS["mixed"](len(hidden))
    settings = {"tau": torch.tensor([5.0, 7.0]), "alpha": torch.tensor(0.3, dtype=torch.float64)}
    ours = linear_nabla_tau_loss(hidden, weight, targets, forget, bias=bias, **settings)
    theirs = nabla_tau_loss(F.linear(hidden, weight, bias), targets, forget, **settings)
    assert_same([ours], [theirs])
    assert_same(gradients(ours, hidden, weight, bias), gradients(theirs, hidden, weight, bias))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_function_of_the_row_losses(shape, smoothing):
    hidden, weight, bias, targets = batch(SHAPES[shape])
    kept = (targets != -100).flatten()
    forget = torch.arange(len(kept)) % 3 == 0
    objectives = (
        lambda losses: npo(losses, forget, losses.detach().flip(0), counts=kept),
        lambda losses: wga(losses, forget, counts=kept),
        torch.sum,
    )
    for function in objectives:
        found = []
        for op in (linear_row_losses, plain_rows):
            losses = op(hidden, weight, targets, bias=bias, label_smoothing=smoothing)
            found.append([losses, *gradients(function(losses.flatten()), hidden, weight, bias)])
        assert_same(*found)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("shape", SHAPES)
def test_signals_are_those_of_whole_logits(shape):
    hidden, weight, bias, targets = batch(SHAPES[shape])
    ours = linear_row_signals(hidden, weight, targets, bias=bias)
    theirs = reference.rows(F.linear(hidden, weight, bias).flatten(0, -2), targets.flatten())
    assert ours.loss.shape == targets.shape
    assert not ours.loss.requires_grad
    assert_same((signal.flatten() for signal in ours[:6]), theirs[:6])
    assert torch.equal(ours.correct.flatten(), theirs.correct)


TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("order", ["forget first", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch_in_the_same_precision(shape, order, dtype):
    low = batch(SHAPES[shape], dtype=dtype)
    high = [tensor.detach().double().requires_grad_() for tensor in low[:3]] + [low[3]]
    settings = {"tau": 20.0, "alpha": 0.3}
    forget = ORDERS[order](len(low[0]))
    found = {}
    for name, loss, (hidden, weight, bias, targets) in (
        ("truth", plain, high),
        ("torch", plain, low),
        ("ours", linear_nabla_tau_loss, low),
    ):
        total = loss(hidden, weight, targets, forget, bias=bias, **settings)
        found[name] = [total, *gradients(total, hidden, weight, bias)]
    for truth, torchs, ours, given in zip(*found.values(), (None, *low[:3]), strict=True):
        assert given is None or ours.dtype == given.dtype
        error, allowed = ((value.double() - truth).norm() / truth.norm() for value in (ours, torchs))
        assert error <= allowed + TOLERANCES[dtype]


@pytest.mark.parametrize("alpha", [0.999, 1.0])
def test_float16_gradients_do_not_underflow_before_a_scaler_lifts_them(alpha):
    hidden, weight, bias, targets = batch((4, 600), dtype=torch.float16)
    forget = torch.tensor([True, False, False, True])
    targets = targets.clamp(min=0)
    scale, settings = 2.0**16, {"tau": 2.5, "alpha": alpha}
    total = linear_nabla_tau_loss(hidden, weight, targets, forget, bias=bias, **settings)
    ours = torch.autograd.grad(scale * total, (hidden, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    total = plain(exact[0], exact[1], targets, forget, bias=exact[2], **settings)
    truths = torch.autograd.grad(scale * total, exact[:2])
    pairs = [(ours[1], truths[1]), (ours[0][forget], truths[0][forget]), (ours[0][~forget], truths[0][~forget])]
    for found, truth in pairs:
        assert (found - truth).norm() <= 3e-3 * truth.norm()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("op", ["nabla_tau", "rows"])
def test_autocast_computes_as_it_does_for_a_linear_layer(op):
    hidden, weight, bias, targets = batch((11,), dtype=torch.float32)
    forget = ORDERS["mixed"](11)
    settings = {"tau": 20.0, "alpha": 0.3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = nabla_tau_loss(F.linear(hidden, weight, bias), targets, forget, **settings)
        if op == "rows":
            losses = linear_row_losses(hidden, weight, targets, bias=bias)
            target = Target(torch.tensor(20.0), None)
            ours = objective(losses, forget, target, 0.3, counts=targets != -100).total
        else:
            ours = linear_nabla_tau_loss(hidden, weight, targets, forget, bias=bias, **settings)
    assert_same([ours], [theirs], rtol=1e-6)
    found = gradients(ours, hidden, weight, bias)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    for found_one, expected in zip(found, gradients(theirs, hidden, weight, bias), strict=True):
        assert (found_one - expected).norm() <= 1e-2 * expected.norm()
    assert not torch.equal(found[1], found[1].bfloat16().float())  # the sum over rows never went through bfloat16


def test_a_backward_under_autocast_leaves_the_precision_of_the_forward():
    hidden, weight, bias, targets = batch((11,), dtype=torch.float32)
    losses = linear_row_losses(hidden, weight, targets, bias=bias)
    expected = gradients(losses.sum(), hidden, weight, bias)
    losses = linear_row_losses(hidden, weight, targets, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(losses.sum(), hidden, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_sum_over_chunks_is_in_float32(monkeypatch):
    *floats, targets = batch((200,), dtype=torch.float32)
    found = []
    for size in (3, 200):
        monkeypatch.setattr(linear_rows, "chunk_rows", lambda rows, *_, size=size: min(rows, size))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = linear_row_losses(*floats[:2], targets, bias=floats[2])
        found.append(gradients(losses.sum(), *floats))
    (_, few_weight, few_bias), (_, weight, bias) = found
    assert (few_bias - bias).norm() <= 1e-6 * bias.norm()
    assert (few_weight - weight).norm() <= 2e-3 * weight.norm()  # a product may be rounded, the sum is not


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made, and the shapes of products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        for tensor in made:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                if "mm" in str(func):
                    self.products.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["nabla_tau", "rows", "signals"])
def test_no_tensor_is_as_large_as_the_logits(op, dtype):
    count, classes, width = 800, 32000, 4
    hidden = torch.randn(count, width).to(dtype).requires_grad_()
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    targets = torch.randint(classes, (count,))
    with Allocations() as seen:
        if op == "signals":
            linear_row_signals(hidden, weight, targets)
        elif op == "rows":
            linear_row_losses(hidden, weight, targets).sum().backward()
        else:
            forget = torch.arange(count) < 64
            linear_nabla_tau_loss(hidden, weight, targets, forget, tau=20.0, alpha=0.5).backward()
    assert seen.largest <= (32 << 20) // dtype.itemsize < count * classes


@pytest.mark.parametrize(("order", "copies"), [("forget first", False), ("forget last", False), ("mixed", True)])
def test_groups_that_lie_together_are_not_copied(order, copies):
    class Gathers(TorchDispatchMode):
        found = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            is_hidden = isinstance(args[0], Tensor) and args[0].shape[-1:] == (WIDTH,)
            self.found |= is_hidden and func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
            return result

    hidden, weight, bias, targets = batch((12,))
    with Gathers() as seen:
        linear_nabla_tau_loss(hidden, weight, targets.clamp(min=0), ORDERS[order](12), tau=20.0, alpha=0.5, bias=bias)
    assert seen.found == copies


@pytest.mark.parametrize("classes", [1, 10, 1000, 32000, 128256, 256000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_even_and_within_their_budget(device, classes):
    budget, least = (32 << 20, 128) if device == "cpu" else (512 << 20, 2048)
    for rows, itemsize in itertools.product((0, 1, 127, 2048, 8192, 100_003), (2, 4, 8)):
        size = linear_rows.chunk_rows(rows, classes, itemsize, device)
        assert 0 <= size <= rows
        assert size * classes * itemsize <= max(budget, least * classes * itemsize)
        if rows:
            chunks = -(-rows // size)
            assert rows - (chunks - 1) * size > size - 128 * chunks  # the last is not a small rest
            assert chunks == 1 or size >= least


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("op", ["nabla_tau", "rows"])
def test_only_what_is_needed_is_computed(op, needed):
    hidden, weight, bias, targets = batch((11,))
    forget = ORDERS["forget first"](11)

    def total(loss=linear_nabla_tau_loss, rows=linear_row_losses):
        if op == "rows":
            return rows(hidden, weight, targets, bias=bias).mean()
        return loss(hidden, weight, targets, forget, tau=20.0, alpha=0.3, bias=bias)

    inputs = hidden, weight, bias
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    expected = torch.autograd.grad(total(plain, plain_rows), wanted) if wanted else ()
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    with Allocations() as seen:
        ours = total()
        found = torch.autograd.grad(ours, wanted) if wanted else ()
    assert ours.requires_grad == any(needed)
    assert_same(found, expected)
    assert any(shape[1] == WIDTH and shape[0] <= 3 for shape in seen.products) == needed[0]
    assert ((CLASSES, WIDTH) in seen.products) == needed[1]


@pytest.mark.usefixtures("short_chunks")
def test_without_gradient_only_the_logits_are_made():
    hidden, weight, bias, targets = batch((11,))
    forget = ORDERS["mixed"](11)
    expected = plain(hidden, weight, targets, forget, tau=20.0, alpha=0.3, bias=bias)
    with torch.no_grad(), Allocations() as seen:
        found = linear_nabla_tau_loss(hidden, weight, targets, forget, tau=20.0, alpha=0.3, bias=bias)
    assert not found.requires_grad
    assert_same([found], [expected.detach()])
    assert {shape[1] for shape in seen.products} == {CLASSES}


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("op", [linear_nabla_tau_loss, linear_row_losses])
def test_backward_again_gives_the_same(op):
    hidden, weight, bias, targets = batch((11,))
    settings = {"forget_mask": ORDERS["mixed"](11), "tau": 20.0, "alpha": 0.3} if op is linear_nabla_tau_loss else {}
    total = op(hidden, weight, targets, bias=bias, **settings).sum()
    inputs = hidden, weight, bias
    total.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad.zero_()  # as optimizers do: the saved gradients must not be what was handed out
    (2 * total).backward(retain_graph=True)
    assert_same([tensor.grad for tensor in inputs], [2 * gradient for gradient in first])
    again = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("op", [linear_nabla_tau_loss, linear_row_losses])
def test_second_derivative_is_refused(op):
    hidden, weight, bias, targets = batch((11,))
    settings = {"forget_mask": ORDERS["mixed"](11), "tau": 20.0, "alpha": 0.3} if op is linear_nabla_tau_loss else {}
    total = op(hidden, weight, targets, bias=bias, **settings).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total, hidden, create_graph=True)


class Tied(nn.Module):
    """A causal model of one layer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, tokens: Tensor, recompute: bool = False) -> Tensor:
        embedded = self.embedding(tokens)
        return checkpoint(self.trunk, embedded, use_reentrant=False) if recompute else self.trunk(embedded)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("how", ["plain", "trunk checkpointed", "all checkpointed"])
def test_tied_weights_and_checkpointing(how):
    torch.manual_seed(0)
    model = Tied().double()
    tokens = torch.randint(CLASSES, (5, 5))
    forget = ORDERS["mixed"](5)
    settings = {"tau": 20.0, "alpha": 0.3}

    def total(model, recompute, loss):
        hidden = model(tokens[:, :-1], recompute)
        return loss(hidden, model.embedding.weight, tokens[:, 1:], forget, **settings)

    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    if how == "all checkpointed":
        checkpoint(total, ours, False, linear_nabla_tau_loss, use_reentrant=False).backward()
    else:
        total(ours, how == "trunk checkpointed", linear_nabla_tau_loss).backward()
    total(theirs, False, plain).backward()
    assert_same((p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters()))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("loss", [linear_nabla_tau_loss, plain])
def test_views_and_expanded_vectors(loss):
    def of(hidden, weight, targets):
        return loss(hidden, weight, targets, ORDERS["mixed"](len(targets)), tau=20.0, alpha=0.3)

    whole, weight, _, targets = batch((5, 5))
    found = torch.autograd.grad(of(whole[:, :-1], weight, targets[:, 1:]), (whole, weight))
    base = whole[:, :-1].detach().clone().requires_grad_()
    expected = torch.autograd.grad(
        plain(base, weight, targets[:, 1:], ORDERS["mixed"](5), tau=20.0, alpha=0.3), (base, weight)
    )
    assert_same((found[0][:, :-1], found[1]), expected)

    row = torch.randn(1, WIDTH, dtype=torch.float64, requires_grad=True)
    across = torch.randn(WIDTH, CLASSES, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(of(row.expand(11, WIDTH), across.t(), torch.arange(11) % CLASSES), (row, across))
    rows, upright = row.detach().repeat(11, 1).requires_grad_(), across.detach().t().contiguous().requires_grad_()
    expected = torch.autograd.grad(
        plain(rows, upright, torch.arange(11) % CLASSES, ORDERS["mixed"](11), tau=20.0, alpha=0.3), (rows, upright)
    )
    assert_same(found, (expected[0].sum(0, keepdim=True), expected[1].t()))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (11,), (5, 4)])
def test_batches_without_a_loss(shape):
    hidden = torch.randn(*shape, WIDTH, requires_grad=True)
    weight, bias = torch.randn(CLASSES, WIDTH, requires_grad=True), torch.randn(CLASSES, requires_grad=True)
    targets = torch.full(shape, -100)
    forget = torch.arange(shape[0]) < shape[0] // 2
    inputs = hidden, weight, bias
    for total in (
        linear_nabla_tau_loss(hidden, weight, targets, forget, tau=2.0, alpha=0.3, bias=bias),
        linear_row_losses(hidden, weight, targets, bias=bias).sum(),
    ):
        assert total.item() == 0
        for tensor, gradient in zip(inputs, torch.autograd.grad(total, inputs), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))
    assert linear_row_signals(hidden, weight, targets, bias=bias).loss.shape == shape


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float16, 1e-2)])
@pytest.mark.parametrize("gate", ["batch", "two_sided"])
def test_an_infinite_loss_to_forget_leaves_the_retained_gradients_alone(gate, dtype, rtol):
    *floats, targets = batch((11,), dtype=dtype)
    forget = ORDERS["forget first"](11)
    targets = targets.clamp(min=0) % (CLASSES - 1)
    targets[0] = CLASSES - 1
    with torch.no_grad():
        floats[2][-1] = -torch.inf
    found = []
    for loss, (hidden, weight, bias) in (
        (linear_nabla_tau_loss, floats),
        (plain, [tensor.detach().double().requires_grad_() for tensor in floats]),
    ):
        total = loss(hidden, weight, targets, forget, tau=20.0, alpha=0.3, gate=gate, bias=bias)
        found.append(torch.autograd.grad(total, hidden)[0][~forget].double())
    ours, truth = found
    assert truth.norm() > 0
    assert (ours - truth).norm() <= rtol * truth.norm()


def test_a_memorised_row_keeps_its_gradient():
    hidden = torch.eye(4, requires_grad=True)
    weight = 26 * torch.eye(4)
    total = linear_nabla_tau_loss(hidden, weight, torch.arange(4), torch.ones(4, dtype=torch.bool), tau=1.0, alpha=1.0)
    (found,) = torch.autograd.grad(total, hidden)
    exact = hidden.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(
        plain(exact, weight.double(), torch.arange(4), torch.ones(4, dtype=torch.bool), tau=1.0, alpha=1.0), exact
    )
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def test_the_same_bits_every_time():
    hidden, weight, bias, targets = batch((64,), dtype=torch.float32)
    found = []
    for _ in range(2):
        total = linear_nabla_tau_loss(hidden, weight, targets, ORDERS["mixed"](64), tau=20.0, alpha=0.3, bias=bias)
        found.append([total, *gradients(total, hidden, weight, bias)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_in_one_graph(shape):
    hidden, weight, bias, targets = batch(SHAPES[shape])
    forget, tau = ORDERS["mixed"](len(hidden)), torch.tensor(20.0)
    inputs = hidden, weight, bias

    def loss(hidden, weight, bias):
        return linear_nabla_tau_loss(hidden, weight, targets, forget, tau=tau, alpha=0.3, bias=bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [[run(*inputs), *gradients(run(*inputs), *inputs)] for run in (loss, compiled)]
    assert_same(*found)


@pytest.mark.parametrize("bias", [False, True])
def test_operator_is_well_formed(bias):
    hidden, weight, offset, targets = batch((11,), bias=bias)
    torch.library.opcheck(_losses_op, (hidden, weight, offset, targets, None, -100, 0.1, torch.float64))


def test_sharded_weights_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        hidden, weight, _, targets = batch((11,))
        sharded = DTensor.from_local(weight, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"weight is a DTensor of shape \(9, 6\)"):
            linear_row_losses(hidden, sharded, targets)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(11)}, ValueError, r"hidden must be \[B, D\].*\(11,\)"),
        ({"weight": torch.zeros(9, 5, dtype=torch.float64)}, ValueError, r"weight \(9, 5\)"),
        (
            {"weight": torch.zeros(9, 6)},
            TypeError,
            "of one dtype, got hidden .* torch.float64, weight .* torch.float32",
        ),
        ({"hidden": torch.zeros(11, 6).long()}, TypeError, "floating"),
        ({"targets": torch.zeros(11)}, TypeError, "integer class labels"),
        ({"targets": torch.zeros(10).long()}, ValueError, r"targets must be \(11,\)"),
        ({"targets": torch.full((11,), 9)}, ValueError, "label out of range: target 9"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, ValueError, r"bias must be \[9\]"),
        ({"class_weights": torch.ones(8)}, ValueError, r"class_weights must be floating \[9\]"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"forget_mask": torch.zeros(11)}, TypeError, "forget_mask must be bool"),
        ({"forget_mask": torch.zeros(10).bool()}, ValueError, r"forget_mask must be \[11\]"),
        ({"gate": "soft"}, ValueError, "gate must be one of"),
        ({"gate": "quantile"}, ValueError, "held-out losses"),
        ({"power": 3}, ValueError, "power"),
        ({"alpha": 2.0}, ValueError, "alpha"),
        ({"tau": float("nan")}, ValueError, "tau must be finite"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    hidden, weight, bias, targets = batch((11,))
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "forget_mask": ORDERS["mixed"](11)}
    arguments |= {"tau": 20.0, "alpha": 0.3, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_nabla_tau_loss(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
class TestOnGpu:
    @pytest.mark.parametrize("mask_on", ["cpu", "cuda"])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_same_as_on_the_cpu_and_no_wait(self, dtype, shape, order, mask_on, short_chunks):
        here = batch(SHAPES[shape], dtype=dtype)
        there = [tensor.detach().cuda() for tensor in here]
        for tensor in there[:3]:
            tensor.requires_grad_()
        forget = ORDERS[order](len(here[0]))
        found = []
        for (hidden, weight, bias, targets), mask in ((here, forget), (there, forget.to(mask_on))):
            tau, alpha = (torch.tensor(value, device=hidden.device) for value in (20.0, 0.3))
            for attempt in range(2):  # the first may compile kernels
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if attempt else "default")
                try:
                    total = linear_nabla_tau_loss(hidden, weight, targets, mask, tau=tau, alpha=alpha, bias=bias)
                    gradient = gradients(total, hidden, weight, bias)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            found.append([value.float().cpu() for value in (total, *gradient)])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * (b.norm() + 1e-3)
