"""The C++ ops beside forward and backward: one-read gradient, fused objective, multi-label rows, gradient memory."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nabla_tau import _C
from nabla_tau.kernels import reference
from nabla_tau.objective import Target, objective

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (label_smoothing, whether there are class weights)
OPTIONS = [(0.0, False), (0.0, True), (0.1, False), (0.2, True)]


def to_numpy(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def to_torch(array):
    t = torch.from_numpy(array)
    return t.view(torch.bfloat16) if t.dtype == torch.uint16 else t


def batch(n, classes, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(n * 100003 + classes)
    logits = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(classes, (n,), generator=generator)
    weights = torch.randn(n, generator=generator, dtype=torch.float64).to(reference.compute_dtype(logits))
    return logits, targets, weights


def class_weights_of(logits, wanted):
    classes = logits.shape[1]
    return torch.linspace(0.1, 2.0, classes, dtype=reference.compute_dtype(logits)) if wanted else None


def gradient(logits, targets, weights=None, **options):
    *signals, result = _C.rows_gradient(
        to_numpy(logits), targets.numpy(), None if weights is None else weights.numpy(), **options
    )
    return reference.RowSignals(*map(torch.from_numpy, signals)), to_torch(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 10, 15, 16, 64, 65, 513, 9001])
@pytest.mark.parametrize(("smoothing", "weighted"), OPTIONS)
def test_one_read_gives_what_forward_and_backward_give(smoothing, weighted, classes, dtype):
    logits, targets, weights = batch(19 if classes < 9000 else 3, classes, dtype)
    targets[1] = reference.IGNORE_INDEX
    weights[2] = 0
    c = class_weights_of(logits, weighted)
    options = {"label_smoothing": smoothing, "class_weights": None if c is None else c.numpy()}
    signals, one_read = gradient(logits, targets, weights, **options)
    forward = _C.rows_forward(to_numpy(logits), targets.numpy(), **options)
    assert all(np.array_equal(a.numpy(), b, equal_nan=True) for a, b in zip(signals, forward, strict=True))
    backward = to_torch(
        _C.rows_backward(to_numpy(logits), targets.numpy(), forward[1], forward[3], weights.numpy(), **options)
    )
    truth = reference.rows_grad(logits.double(), targets, weights.double(), label_smoothing=smoothing, class_weights=c)
    for ours in (one_read, backward):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), truth, rtol=max(eps, 1e-6 if eps > 1e-10 else 1e-13), atol=8 * eps)
        assert not ours[1:3].any()


@pytest.mark.parametrize("classes", [3, 10, 100, 2000])
@pytest.mark.parametrize(("smoothing", "weighted"), OPTIONS)
def test_loss_and_gradient_are_those_of_torch(smoothing, weighted, classes):
    logits, targets, weights = batch(21, classes)
    targets[4] = -1
    c = class_weights_of(logits, weighted)
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, c, ignore_index=-1, label_smoothing=smoothing, reduction="none")
    loss.backward(weights)
    signals, ours = gradient(
        logits,
        targets,
        weights,
        ignore_index=-1,
        label_smoothing=smoothing,
        class_weights=None if c is None else c.numpy(),
    )
    torch.testing.assert_close(signals.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours, leaf.grad, rtol=1e-11, atol=1e-15)
    _, unit = gradient(
        logits, targets, ignore_index=-1, label_smoothing=smoothing, class_weights=None if c is None else c.numpy()
    )
    torch.testing.assert_close(signals.grad_sq, unit.square().sum(1), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_smoothed_row_at_its_optimum_has_next_to_no_gradient(classes):
    # Its entries are differences of nearly equal parts: the norm is not to be taken from sums over the parts.
    smoothing = 0.1
    low, high = smoothing / classes, 1 - smoothing + smoothing / classes
    logits = torch.full((1, classes), low).log()
    logits[0, 2] = torch.tensor(high).log()
    signals, ours = gradient(logits, torch.tensor([2]), label_smoothing=smoothing)
    assert signals.grad_sq.item() < 1e-12
    assert signals.grad_sq.item() == pytest.approx(ours.double().square().sum().item(), rel=1e-3)
    assert signals.loss.item() == pytest.approx(
        F.cross_entropy(logits.double(), torch.tensor([2]), label_smoothing=smoothing).item(), rel=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [7, 300, 9001])
def test_the_gradient_may_take_the_place_of_the_logits(classes, dtype):
    logits, targets, weights = batch(20, classes, dtype)
    signals, expected = gradient(logits, targets, weights)
    again, result = gradient(logits, targets, weights, out=to_numpy(logits))
    assert torch.equal(logits, expected)
    assert torch.equal(result, expected)
    assert all(map(torch.equal, signals, again))


@pytest.mark.parametrize(("n", "classes"), [(5003, 10), (701, 100), (301, 1000), (7, 32003)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_threads_change_nothing(n, classes, dtype, smoothing):
    logits, targets, weights = batch(n, classes, dtype)
    targets[::5] = reference.IGNORE_INDEX
    one, two = (
        gradient(logits, targets, weights, num_threads=threads, label_smoothing=smoothing) for threads in (1, 2)
    )
    assert all(map(torch.equal, one[0], two[0]))
    assert torch.equal(one[1], two[1])
    forget = np.arange(n) % 3 == 0
    fused = [
        _C.nabla_tau_rows(to_numpy(logits), targets.numpy(), forget, 9.0, 0.4, num_threads=t, label_smoothing=smoothing)
        for t in (1, 2)
    ]
    for a, b in zip(*(flat(f) for f in fused), strict=True):
        assert np.array_equal(a, b)


def flat(fused):
    terms, weights, signals, result = fused
    return [terms, weights, *signals, result]


def expected_objective(logits, targets, forget, tau, alpha, gate, power, base=None, counts=None, **options):
    """Terms, dtotal/dloss and dtotal/dlogits by `objective` and autograd over the reference."""
    leaf = logits.double().clone().requires_grad_()
    losses = reference.rows(leaf, targets, **options).loss if len(targets) else leaf.sum(1)
    losses.retain_grad()
    target = Target(torch.tensor(tau, dtype=torch.float64), None)
    if base is None:
        kept = targets != reference.IGNORE_INDEX
        terms = objective(losses, forget, target, alpha, gate=gate, power=power, counts=kept)
    else:
        sample, sample_forget, sample_kept = counts
        means = torch.zeros(len(sample_forget), dtype=torch.float64).index_add(0, sample, losses * base)
        terms = objective(means, sample_forget, target, alpha, gate=gate, power=power, counts=sample_kept)
    terms.total.backward()
    return terms, losses.grad, leaf.grad


def check_fused(logits, targets, forget, tau, alpha, gate, power, smoothing=0.0, c=None, **more):
    options = {"label_smoothing": smoothing, "class_weights": c}
    base = more.pop("base", None)
    counts = more.pop("counts", None)
    terms, weights, grad = expected_objective(logits, targets, forget, tau, alpha, gate, power, base, counts, **options)
    options["class_weights"] = None if c is None else c.to(reference.compute_dtype(logits)).numpy()
    if base is not None:
        base = base.to(reference.compute_dtype(logits)).numpy()
    arguments = to_numpy(logits), targets.numpy(), forget.numpy(), tau, alpha, gate, power, base
    our_terms, our_weights, signals, ours = _C.nabla_tau_rows(*arguments, **options, **more)
    eps = torch.finfo(logits.dtype).eps
    rtol = 1e-11 if logits.dtype == torch.float64 else 2e-5
    for name, a, b in zip(terms._fields, torch.from_numpy(our_terms), terms, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name} {m}")
    torch.testing.assert_close(torch.from_numpy(our_weights).double(), weights, rtol=rtol, atol=rtol * 1e-3)
    torch.testing.assert_close(to_torch(ours).double(), grad, rtol=max(rtol, eps), atol=max(rtol * 1e-2, eps * 1e-1))
    truth = reference.rows(logits.double(), targets, label_smoothing=smoothing, class_weights=c)
    torch.testing.assert_close(torch.from_numpy(signals[0]).double(), truth.loss, rtol=rtol, atol=rtol)
    without = _C.nabla_tau_rows(*arguments, **options, **more, with_gradient=False)
    assert without[3] is None
    pairs = zip(flat(without)[:-1], [our_terms, our_weights, *signals], strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
@pytest.mark.parametrize("tau", [0.3, 4.0, 30.0])
def test_fused_equals_objective_and_autograd(tau, gate, power, classes, dtype):
    logits, targets, _ = batch(41, classes, dtype)
    targets[::7] = reference.IGNORE_INDEX
    for forget in (torch.arange(41) < 15, torch.arange(41) % 3 == 1):
        check_fused(logits, targets, forget, tau, 0.3, gate, power)


@pytest.mark.parametrize(("smoothing", "weighted"), OPTIONS)
@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_fused_with_smoothing_and_class_weights(gate, smoothing, weighted):
    logits, targets, _ = batch(33, 70)
    check_fused(
        logits, targets, torch.arange(33) % 2 == 0, 6.0, 0.6, gate, 2, smoothing, class_weights_of(logits, weighted)
    )


@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
@pytest.mark.parametrize("kind", ["no forget", "no retain", "all ignored", "forget ignored", "one row", "none"])
def test_fused_with_an_empty_group(gate, kind):
    logits, targets, _ = batch({"one row": 1, "none": 0}.get(kind, 12), 10)
    forget = torch.arange(len(targets)) < 5
    if kind == "no forget":
        forget[:] = False
    if kind == "no retain":
        forget[:] = True
    if kind == "all ignored":
        targets[:] = reference.IGNORE_INDEX
    if kind == "forget ignored":
        targets[:5] = reference.IGNORE_INDEX
    check_fused(logits, targets, forget, 6.0, 0.3, gate, 2)


def test_base_weights_make_samples_of_rows():
    # Samples of 4 tokens in a mixed order, with masked tokens, one sample all masked.
    logits, targets, _ = batch(40, 30)
    sample = torch.arange(40) % 10
    sample_forget = torch.arange(10) % 3 == 0
    targets[5::9] = reference.IGNORE_INDEX
    targets[sample == 7] = reference.IGNORE_INDEX
    kept = (targets != reference.IGNORE_INDEX).double()
    tokens = torch.zeros(10, dtype=torch.float64).index_add(0, sample, kept)
    base = kept / tokens.clamp(min=1)[sample]
    counts = {
        "forget_count": float((sample_forget & (tokens > 0)).sum()),
        "retain_count": float((~sample_forget & (tokens > 0)).sum()),
    }
    for gate in ("batch", "two_sided"):
        for power in (1, 2):
            for tau in (2.0, 9.0):
                check_fused(
                    logits,
                    targets,
                    sample_forget[sample],
                    tau,
                    0.4,
                    gate,
                    power,
                    base=base,
                    counts=(sample, sample_forget, tokens > 0),
                    **counts,
                )


@pytest.mark.parametrize("classes", [10, 100])
def test_behind_a_closed_gate_the_forget_rows_are_not_read_again(classes):
    logits, targets, _ = batch(20, classes, torch.float32)
    forget = torch.arange(20) < 8
    # A row whose gradient would be NaN although its loss is finite: a class of +inf is the target.
    logits[3, targets[3]] = float("inf")
    terms, weights, _, ours = _C.nabla_tau_rows(logits.numpy(), targets.numpy(), forget.numpy(), -1.0, 0.5)
    assert terms[4] == 0
    assert not weights[:8].any()
    assert not ours[:8].any()
    assert np.isfinite(ours).all()
    assert ours[8:].any(axis=1).all()


@pytest.mark.parametrize("infinite", ["forget", "retain"])
@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_an_infinite_loss_stays_in_its_group(infinite, gate):
    logits, targets, _ = batch(12, 10, torch.float32)
    forget = torch.arange(12) < 5
    row = 2 if infinite == "forget" else 9
    logits[row, targets[row]] = float("-inf")
    terms, weights, signals, ours = _C.nabla_tau_rows(logits.numpy(), targets.numpy(), forget.numpy(), 6.0, 0.5, gate)
    total, forget_term, forget_loss, retain_loss, gate_open = terms.tolist()
    assert np.isfinite(weights).all()
    assert np.isfinite(ours).all()
    if infinite == "forget":
        assert forget_loss == np.inf
        assert np.isfinite([total, forget_term, retain_loss]).all()
        assert gate_open == pytest.approx(0.0 if gate == "batch" else (signals[0][:5] < 6.0).mean())
        assert weights[row] == 0
    else:
        assert retain_loss == total == np.inf
        assert np.isfinite([forget_term, forget_loss]).all()


def test_fused_arguments_that_do_not_fit_are_refused():
    logits, targets, weights = (t.numpy() for t in batch(8, 10, torch.float32))
    forget = np.arange(8) < 4
    with pytest.raises(ValueError, match="gate must be batch, two_sided or sample, got quantile"):
        _C.nabla_tau_rows(logits, targets, forget, 1.0, 0.5, "quantile")
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        _C.nabla_tau_rows(logits, targets, forget, 1.0, 0.5, power=3)
    with pytest.raises(ValueError, match="cannot be used with base"):
        _C.nabla_tau_rows(logits, targets, forget, 1.0, 0.5, "sample", base=weights)
    with pytest.raises(TypeError, match="forget must be bool, got int64"):
        _C.nabla_tau_rows(logits, targets, targets, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"targets\[2\] is 10; it must be in \[0, 10\)"):
        _C.nabla_tau_rows(logits, np.where(np.arange(8) == 2, 10, targets), forget, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        _C.rows_forward(logits, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"class_weights must have shape \(10,\), got \(8,\)"):
        _C.rows_gradient(logits, targets, class_weights=weights)
    with pytest.raises(TypeError, match="class_weights must be float32, got float64"):
        _C.rows_forward(logits, targets, class_weights=np.ones(10))


def labels_of(logits):
    generator = torch.Generator().manual_seed(1)
    hard = torch.randint(2, logits.shape, generator=generator).double()
    soft = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    rows = torch.arange(len(logits))[:, None]
    return torch.where(rows % 2 == 0, hard, soft).to(reference.compute_dtype(logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", [1, 5, 16, 33, 700])
def test_multilabel_rows_equal_the_oracle(labels, dtype):
    logits, _, weights = batch(40, labels, dtype)
    targets = labels_of(logits)
    logits[7] = torch.where(targets[7] > 0.5, 9.0, -9.0).to(dtype)
    weights[3] = 0
    signals = _C.multilabel_forward(to_numpy(logits), targets.numpy())
    truth = reference.multilabel_rows(logits.double(), targets.double())
    tol = 1e-13 if dtype == torch.float64 else 1e-6
    for name, a, b in zip(truth._fields, map(torch.from_numpy, signals), truth, strict=True):
        if name == "correct":
            assert torch.equal(a, b)
            assert a[7]
        else:
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")
    gradient = to_torch(_C.multilabel_backward(to_numpy(logits), targets.numpy(), weights.numpy()))
    expected = reference.multilabel_rows_grad(logits.double(), targets.double(), weights.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=max(tol, torch.finfo(dtype).eps), atol=tol)
    assert not gradient[3].any()


@pytest.mark.parametrize("height", [10.0, 30.0, 60.0])
def test_memorised_labels_keep_their_loss_and_gradient(height):
    logits = torch.tensor([[height, -height, height]])
    targets = torch.tensor([[1.0, 0.0, 1.0]])
    truth = reference.multilabel_rows(logits.double(), targets)
    ours = _C.multilabel_forward(logits.numpy(), targets.numpy())
    for k in (0, 2, 5):
        np.testing.assert_allclose(ours[k], truth[k], rtol=2e-6, atol=1e-37)
    gradient = _C.multilabel_backward(logits.numpy(), targets.numpy(), np.ones(1, np.float32))
    expected = reference.multilabel_rows_grad(logits.double(), targets, torch.ones(1))
    np.testing.assert_allclose(gradient, expected, rtol=2e-6, atol=0)
    assert (gradient != 0).all()


def test_multilabel_threads_and_out():
    logits, _, weights = batch(3001, 20, torch.float32)
    targets = labels_of(logits).numpy()
    arrays = logits.numpy(), targets
    one, two = (_C.multilabel_forward(*arrays, num_threads=t) for t in (1, 2))
    assert all(map(np.array_equal, one, two))
    expected = _C.multilabel_backward(*arrays, weights.numpy())
    assert np.array_equal(_C.multilabel_backward(*arrays, weights.numpy(), num_threads=2), expected)
    _C.multilabel_backward(*arrays, weights.numpy(), out=logits.numpy())
    assert np.array_equal(logits.numpy(), expected)
    with pytest.raises(TypeError, match="targets must be float32, got float64"):
        _C.multilabel_forward(logits.numpy(), targets.astype(np.float64))


def address(array):
    return array.__array_interface__["data"][0]


def test_a_freed_gradient_is_used_again_and_a_live_one_never():
    logits, targets, weights = batch(300, 1000, torch.float32)
    arrays = logits.numpy(), targets.numpy()

    def fresh():
        return _C.rows_gradient(*arrays, weights.numpy())[-1]

    first = fresh()
    copy = first.copy()
    place = address(first)
    second = fresh()
    assert address(second) != place
    assert not np.shares_memory(first, second)
    # A view, and a tensor made of it, keep the memory: what stays alive is never given away.
    tensor = torch.from_numpy(first[10:])
    del first
    third = fresh()
    assert address(third) not in (place, address(second))
    assert np.array_equal(tensor.numpy(), copy[10:])
    del tensor
    fourth = fresh()
    assert address(fourth) == place
    assert np.array_equal(fourth, copy)


def test_a_block_serves_what_is_not_much_smaller():
    def gradient_of(rows):
        logits, targets, weights = batch(rows, 1000, torch.float32)
        return _C.rows_gradient(logits.numpy(), targets.numpy(), weights.numpy())[-1]

    large = gradient_of(7001)
    place = address(large)
    del large
    assert address(gradient_of(5000)) == place
    small = gradient_of(3000)
    assert address(small) != place
    assert address(gradient_of(7001)) == place


def test_threads_that_ask_at_once_get_memory_of_their_own():
    logits, targets, weights = batch(200, 1000, torch.float32)
    _, expected = gradient(logits, targets, weights)
    failures = []

    def work(factor):
        scaled = weights * factor
        for _ in range(20):
            _, ours = gradient(logits, targets, scaled)
            if not torch.equal(ours, expected * factor):
                failures.append(factor)

    # Powers of two: the product is exact.
    threads = [threading.Thread(target=work, args=(2.0**k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
