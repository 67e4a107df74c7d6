"""The C++ row kernels: equal to the oracle in float64, no worse than torch in low precision, exact at the edges."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nabla_tau import _C
from nabla_tau.kernels import reference

# Around the lane count 16, the narrow-row limit 64 and the block size 512, and one vocabulary that divides by nothing.
CLASSES = [1, 2, 7, 10, 15, 16, 17, 63, 64, 65, 100, 511, 512, 513, 1000, 1003, 32003]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """These matrices are small: a pool of torch threads spends its time waiting, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_numpy(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def to_torch(array):
    t = torch.from_numpy(array)
    return t.view(torch.bfloat16) if t.dtype == torch.uint16 else t


def forward(logits, targets, **options):
    return reference.RowSignals(*map(torch.from_numpy, _C.rows_forward(to_numpy(logits), targets.numpy(), **options)))


def backward(logits, targets, weights, **options):
    arrays = to_numpy(logits), targets.numpy()
    _, lse, _, margin, *_ = _C.rows_forward(*arrays)
    return to_torch(
        _C.rows_backward(*arrays, lse, margin, weights.to(reference.compute_dtype(logits)).numpy(), **options)
    )


def batch(n, classes, dtype=torch.float32, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(n * 100003 + classes)
    logits = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64) + offset).to(dtype)
    targets = torch.randint(classes, (n,), generator=generator)
    weights = torch.randn(n, generator=generator)
    return logits, targets, weights


def assert_signals_close(ours, truth, tol):
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        if name == "correct":
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


def error(value, truth):
    return (value.double() - truth).abs().max().item()


def gradient_by_torch(logits, targets, weights):
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="none")
    loss.backward(weights.to(loss.dtype))
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("classes", CLASSES)
def test_float64_equals_the_oracle(classes):
    logits, targets, weights = batch(37 if classes < 2000 else 3, classes, torch.float64)
    targets[1] = reference.IGNORE_INDEX
    assert_signals_close(forward(logits, targets), reference.rows(logits, targets), 1e-13)
    torch.testing.assert_close(
        backward(logits, targets, weights), reference.rows_grad(logits, targets, weights), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("classes", CLASSES)
def test_no_worse_than_torch_against_float64(classes, offset, dtype):
    logits, targets, weights = batch(33 if classes < 2000 else 3, classes, dtype, offset=offset)
    weights = weights.to(dtype)
    exact = logits.double()
    truth = reference.rows(exact, targets)
    loss, gradient = gradient_by_torch(logits, targets, weights)
    ours = forward(logits, targets)
    assert error(ours.loss, truth.loss) <= error(loss, truth.loss) + 3 * EPS * truth.loss.max()
    true_gradient = reference.rows_grad(exact, targets, weights.double())
    # The backward knows the normaliser as one float32 beside the target logit, good to the rounding of the loss.
    slack = EPS * truth.loss.max().clamp(min=1) * weights.abs().max()
    assert error(backward(logits, targets, weights), true_gradient) <= error(gradient, true_gradient) + slack
    # torch has no counterpart of these, so they are held to float32 itself.
    for name in ("lse", "entropy", "margin", "p_max", "grad_sq"):
        value, wanted = getattr(ours, name), getattr(truth, name)
        torch.testing.assert_close(value.double(), wanted, rtol=3e-6, atol=2e-6)
    assert torch.equal(ours.correct, truth.correct)


@pytest.mark.parametrize("classes", [10, 1000, 32003])
@pytest.mark.parametrize("height", [10.0, 26.0, 60.0, 200.0])
def test_a_memorised_row_keeps_its_loss_and_gradient(classes, height):
    logits = torch.zeros(3, classes)
    targets = torch.tensor([0, classes // 2, classes - 1])
    logits[torch.arange(3), targets] = height
    truth = reference.rows(logits.double(), targets)
    ours = forward(logits, targets)
    # float32 stops at 1e-38: at height 200 zero is the nearest value.
    for name in ("loss", "entropy", "margin", "p_max", "grad_sq"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), rtol=2e-6, atol=1e-37)
    gradient = backward(logits, targets, torch.ones(3)).double()
    expected = reference.rows_grad(logits.double(), targets, torch.ones(3))
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-37)
    if (classes, height) == (1000, 26.0):
        assert ours.loss[0].item() == pytest.approx(5.104e-9, rel=1e-3)
        assert F.cross_entropy(logits, targets).item() == 0.0


@pytest.mark.parametrize("classes", [5, 100, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_ruled_out_count_for_nothing(classes, dtype):
    logits, targets, weights = batch(20, classes, dtype)
    # Blocks of nothing but -inf before and after the possible classes, and finite stand-ins for -inf.
    lowest = torch.finfo(dtype).min
    for mask in (float("-inf"), lowest, max(lowest, -1e9)):
        wide = torch.full((20, 2 * classes), mask, dtype=dtype)
        wide[:, classes // 2 : classes // 2 + classes] = logits
        tol = 1e-13 if dtype == torch.float64 else 2e-6
        assert_signals_close(forward(wide, targets + classes // 2), reference.rows(logits.double(), targets), tol)
        gradient = backward(wide, targets + classes // 2, weights)
        assert not gradient[:, : classes // 2].any()
        inner = gradient[:, classes // 2 :][:, :classes]
        # The sums run in another order; at most that moves a low-precision number by one place.
        rtol = max(10 * tol, torch.finfo(dtype).eps)
        torch.testing.assert_close(inner, backward(logits, targets, weights), rtol=rtol, atol=tol)


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("low", [float("-inf"), -1e9, -3e38])
def test_a_hopeless_target_keeps_the_other_classes_right(classes, low):
    logits, targets, _ = batch(20, classes)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, targets[:, None], False)
    logits[~others] = low
    rest = logits[others].view(20, -1)
    ours = forward(logits, targets)
    assert torch.equal(ours.loss, torch.full((20,), -low))
    torch.testing.assert_close(ours.lse, rest.logsumexp(1))
    p = rest.double().softmax(1)
    torch.testing.assert_close(ours.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-6)
    gradient = backward(logits, targets, torch.ones(20))
    assert (gradient[~others] == -1).all()
    torch.testing.assert_close(gradient[others].view(20, -1).double(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [3, 200])
def test_one_possible_class_is_certain(classes):
    logits = torch.full((2, classes), float("-inf"))
    logits[:, 1] = 7.0
    ours = forward(logits, torch.tensor([1, 1]))
    assert ours.margin.tolist() == [float("inf")] * 2
    assert ours.loss.tolist() == ours.entropy.tolist() == [0.0, 0.0]
    assert ours.lse.tolist() == [7.0, 7.0]
    assert not backward(logits, torch.tensor([1, 1]), torch.ones(2)).any()


@pytest.mark.parametrize("classes", [4, 600])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_reaches_the_loss_of_its_row_only(classes, place):
    logits, targets, weights = batch(18, classes)
    targets[:] = 2
    logits[5, 2] = 50.0
    logits[5, place] = float("nan")
    ours = forward(logits, targets)
    assert ours.loss.isnan().nonzero().flatten().tolist() == [5]
    assert ours.entropy.isnan().nonzero().flatten().tolist() == [5]
    assert not ours.correct[5]
    assert backward(logits, targets, weights)[5].isnan().all()


@pytest.mark.parametrize("classes", [10, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_first_class(classes, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(2, (200, classes), generator=generator).to(dtype)
    logits[0] = 0
    targets = torch.randint(3, (200,), generator=generator)
    ours = forward(logits, targets)
    assert torch.equal(ours.correct, logits.double().argmax(1) == targets)
    assert 0 < ours.correct.sum() < 200


@pytest.mark.parametrize("classes", [10, 300])
def test_ignored_rows_have_no_loss_and_no_gradient(classes):
    logits, targets, weights = batch(50, classes)
    targets[::3] = -1
    ours = forward(logits, targets, ignore_index=-1)
    assert_signals_close(ours, reference.rows(logits.double(), targets, ignore_index=-1), 3e-6)
    kept = targets != -1
    assert not ours.loss[~kept].any()
    arrays = logits.numpy(), targets.numpy()
    gradient = _C.rows_backward(*arrays, ours.lse.numpy(), ours.margin.numpy(), weights.numpy(), ignore_index=-1)
    assert not gradient[::3].any()
    assert gradient[kept.numpy()].any(axis=1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_weight_zero_is_not_read(dtype):
    for classes in (10, 300):
        logits, targets, weights = batch(20, classes, dtype)
        expected = backward(logits, targets, weights)
        logits[3] = float("nan")
        weights[3] = 0
        gradient = backward(logits, targets, weights)
        expected[3] = 0
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("n", [0, 5])
def test_all_rows_ignored_or_none_given(n):
    logits = torch.randn(n, 10)
    targets = torch.full((n,), -100)
    ours = forward(logits, targets)
    assert ours.loss.tolist() == ours.margin.tolist() == [0.0] * n
    assert ours.correct.tolist() == [False] * n
    gradient = backward(logits, targets, torch.ones(n))
    assert gradient.shape == (n, 10)
    assert not gradient.any()


@pytest.mark.parametrize(("n", "classes"), [(5003, 10), (301, 1000), (7, 32003)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_do_not_change_a_row(n, classes, dtype):
    logits, targets, weights = batch(n, classes, dtype)
    one, two = (forward(logits, targets, num_threads=t) for t in (1, 2))
    assert all(map(torch.equal, one, two))
    gradient = backward(logits, targets, weights, num_threads=1)
    assert torch.equal(gradient, backward(logits, targets, weights, num_threads=2))
    alone = forward(logits[3:4].contiguous(), targets[3:4])
    assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, one, strict=True))
    assert torch.equal(backward(logits[3:4].contiguous(), targets[3:4], weights[3:4]), gradient[3:4])


@pytest.mark.parametrize("classes", [10, 1003, 32003])
def test_gradient_of_a_row_sums_to_zero(classes):
    logits, targets, _ = batch(40 if classes < 2000 else 3, classes, offset=100.0)
    gradient = backward(logits, targets, torch.ones(len(targets)))
    assert gradient.abs().sum(1).min() > 0.1
    assert gradient.double().sum(1).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradient_is_rounded_to_nearest_even(dtype):
    logits, targets, weights = batch(64, 100, dtype)
    full = backward(logits.float(), targets, weights)
    assert torch.equal(backward(logits, targets, weights), full.to(dtype))
    # Two equal classes: the target's entry is half the weight, here halfway between two numbers of the dtype.
    halfway = 1 + torch.arange(1, 128, 2) * torch.finfo(dtype).eps / 2
    equal, first = torch.zeros(64, 2, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    assert torch.equal(backward(equal, first, 2 * halfway)[:, 0], -halfway.to(dtype))


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_a_nan_of_any_payload(classes, dtype):
    logits, targets, _ = batch(2, classes, dtype)
    weights = torch.from_numpy(np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32))
    assert backward(logits, targets, weights).isnan().all()


def test_every_float16_is_read_as_it_is():
    # One class beside a second that is ruled out: lse is the logit itself.
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    logits = torch.stack([bits.view(torch.float16), torch.full((1 << 16,), -torch.inf).half()], 1)
    lse = forward(logits, torch.zeros(1 << 16, dtype=torch.int64)).lse
    number = logits[:, 0].isfinite()
    assert torch.equal(lse[number], logits[number, 0].float())
    assert lse[logits[:, 0].isnan()].isnan().all()


@pytest.mark.parametrize("classes", [2, 70])
def test_float16_is_written_as_torch_rounds_it(classes):
    # Equal logits: every other entry of the gradient is weight / classes, from subnormal numbers to infinities.
    sizes = torch.logspace(-10, 6, 4096, dtype=torch.float32)
    weights = classes * torch.cat([sizes, torch.tensor([65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1e38])])
    n = len(weights)
    gradient = backward(torch.zeros(n, classes).half(), torch.zeros(n, dtype=torch.int64), weights)
    wanted = backward(torch.zeros(n, classes), torch.zeros(n, dtype=torch.int64), weights).half()
    assert torch.equal(gradient, wanted)
    assert gradient.isinf().any()
    assert ((gradient[:, 1] > 0) & (gradient[:, 1] < torch.finfo(torch.float16).tiny)).any()


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_receives_the_gradient_and_may_be_the_logits(classes, dtype):
    logits, targets, weights = batch(35, classes, dtype)
    expected = backward(logits, targets, weights)
    other = torch.empty_like(logits)
    backward(logits, targets, weights, out=to_numpy(other))
    assert torch.equal(other, expected)
    backward(logits, targets, weights, out=to_numpy(logits))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("target", [10, -1, -101, 2**40])
def test_a_target_out_of_range_is_named(target):
    logits, targets, weights = batch(8, 10)
    targets[3] = target
    targets[5] = 99
    with pytest.raises(ValueError, match=rf"targets\[3\] is {target}; it must be in \[0, 10\)"):
        _C.rows_forward(logits.numpy(), targets.numpy())
    per_row = weights.numpy()
    with pytest.raises(ValueError, match=rf"targets\[3\] is {target};"):
        _C.rows_backward(logits.numpy(), targets.numpy(), per_row, per_row, per_row)


def test_arrays_that_do_not_fit_are_refused():
    logits, targets, weights = (t.numpy() for t in batch(8, 10))
    with pytest.raises(TypeError, match="logits must be float32, float64, float16 or uint16"):
        _C.rows_forward(logits.astype(np.int32), targets)
    with pytest.raises(TypeError, match="targets must be int64, got int32"):
        _C.rows_forward(logits, targets.astype(np.int32))
    with pytest.raises(ValueError, match=r"targets must have shape \(8,\), got \(7,\)"):
        _C.rows_forward(logits, targets[:7])
    with pytest.raises(ValueError, match=r"logits must be \[N, V\] with V >= 1, got \(8,\)"):
        _C.rows_forward(logits[:, 0].copy(), targets)
    with pytest.raises(ValueError, match=r"V >= 1, got \(0, 0\)"):
        _C.rows_forward(np.zeros((0, 0), np.float32), targets[:0])
    with pytest.raises(ValueError, match="logits must be C-contiguous"):
        _C.rows_forward(np.asfortranarray(logits), targets)
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        _C.rows_forward(logits, targets, num_threads=0)
    per_row = (weights, weights, weights)
    with pytest.raises(TypeError, match="weights must be float32, got float64"):
        _C.rows_backward(logits, targets, weights, weights, weights.astype(np.float64))
    with pytest.raises(TypeError, match="lse must be float64, got float32"):
        _C.rows_backward(logits.astype(np.float64), targets, *per_row)
    with pytest.raises(TypeError, match="out must be the dtype of logits, got float64"):
        _C.rows_backward(logits, targets, *per_row, out=np.empty((8, 10)))
    with pytest.raises(ValueError, match=r"out must have shape \(8, 10\), got \(10, 8\)"):
        _C.rows_backward(logits, targets, *per_row, out=np.empty((10, 8), np.float32))
    frozen = np.empty((8, 10), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        _C.rows_backward(logits, targets, *per_row, out=frozen)


VARIANT = """
import sys
import numpy as np
from nabla_tau import _C

def results(logits, targets, weights, labels):
    forget = weights < 0
    found = {}
    for smoothing in (0.0, 0.1):
        signals = _C.rows_forward(logits, targets, label_smoothing=smoothing)
        options = dict(label_smoothing=smoothing)
        found[f"forward {smoothing}"] = signals[:-1]
        found[f"backward {smoothing}"] = _C.rows_backward(logits, targets, signals[1], signals[3], weights, **options)
        found[f"gradient {smoothing}"] = _C.rows_gradient(logits, targets, weights, **options)[-1]
        found[f"fused {smoothing}"] = _C.nabla_tau_rows(logits, targets, forget, 9.0, 0.5, **options)[-1]
    found["labels"] = _C.multilabel_forward(logits, labels)[:-1]
    found["label gradient"] = _C.multilabel_backward(logits, labels, weights)
    return {name: np.stack(value) if isinstance(value, tuple) else value for name, value in found.items()}

if __name__ == "__main__":
    np.savez(sys.argv[2], **results(**np.load(sys.argv[1])))
    print(_C.simd_level())
"""


@pytest.mark.parametrize("level", ["baseline", "x86-64-v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("classes", [10, 1003])
def test_every_instruction_set_gives_the_same_rows(level, dtype, classes, tmp_path):
    logits, targets, weights = batch(50, classes, dtype)
    real = reference.compute_dtype(logits)
    labels = torch.randint(2, logits.shape).to(real)
    arrays = {"logits": logits, "targets": targets, "weights": weights.to(real), "labels": labels}
    arrays = {name: t.numpy() for name, t in arrays.items()}
    given, found = str(tmp_path / "given.npz"), str(tmp_path / "found.npz")
    np.savez(given, **arrays)
    environment = {**os.environ, "NABLA_TAU_SIMD": level}
    ran = subprocess.run(
        [sys.executable, "-c", VARIANT, given, found], env=environment, check=True, capture_output=True, text=True
    )
    assert ran.stdout.strip() in {level, "baseline"}
    script: dict = {"__name__": "variant"}
    exec(VARIANT, script)
    eps = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 1e-3}[dtype]
    with np.load(found) as theirs:
        for name, ours in script["results"](**arrays).items():
            np.testing.assert_allclose(theirs[name], ours, rtol=10 * eps, atol=eps, err_msg=name)


def test_an_unknown_instruction_set_is_refused():
    ran = subprocess.run(
        [sys.executable, "-c", "from nabla_tau import _C; _C.simd_level()"],
        env={**os.environ, "NABLA_TAU_SIMD": "mmx"},
        capture_output=True,
        text=True,
    )
    assert 'ValueError: NABLA_TAU_SIMD is "mmx"; it must be baseline, x86-64-v3 or x86-64-v4' in ran.stderr
