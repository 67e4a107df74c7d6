# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""One optimizer step with two gradients for each parameter, in Triton. Formulas: `update_reference.py`.

A step is two launches for all parameters of a dtype. `_prepare_kernel`, one program, counts the step and makes each
parameter's few numbers of its settings, scales and (with projection) the inner products, in float64, from device
memory: nothing is read by the host, so that a step can be captured in a CUDA graph. `_adamw_kernel` or `_sgd_kernel`
then moves, for n float32 entries,

| op | bytes |
|---|---|
| AdamW, two gradients | 32 n, which is the floor: p, m, v, f, r read; p, m, v written |
| SGD with momentum, two gradients | 24 n |
| mask | n more |
| projection: the inner products | 8 n more |
| ball: the distance, the pull | 8 n and 12 n more |

Each program takes one chunk of one parameter and finds its addresses in the table (`update_table.py`). Sums are taken
chunk by chunk, and the chunks added in order by one program: the same result in every run.
"""

import triton
import triton.language as tl

from nabla_tau.kernels.update_chunks import (
    BETA1,
    BETA2,
    DAMPENING,
    DECAY,
    EPS,
    FIRST,
    FORGET,
    MOMENTUM,
    NESTEROV,
    NUMBER,
    PARAMETER,
    RATE,
    RATE_AT,
    RETAIN,
    SECOND,
    SIGN,
    STEP,
    WIDTH,
    chunk_of,
    moving_entries,
    pointer_to,
    read_chunk,
    setting,
    write_chunk,
)

_COEFFICIENTS = tl.constexpr(8)  # a parameter, float64


@triton.jit
def _prepare_kernel(
    table, coefficients, forget_scale, retain_scale, products, P,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a = tl.load(forget_scale).to(tl.float64)
    b = tl.load(retain_scale).to(tl.float64)
    if products is not None:
        cross = tl.load(products + 1)
        length = tl.load(products + 2)
        b -= a * (tl.where(cross < 0, cross, 0.0) / tl.where(length > 0, length, 1.0))
    for start in range(0, P, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < P
        rate_at = tl.load(table + rows * WIDTH + RATE_AT, mask=inside, other=0)
        on_device = tl.load(rate_at.to(tl.pointer_type(tl.float32)), mask=inside & (rate_at != 0), other=0.0)
        rate = tl.where(rate_at != 0, on_device.to(tl.float64), setting(table, rows, RATE, inside))
        decay = setting(table, rows, DECAY, inside)
        sign = setting(table, rows, SIGN, inside)
        out = coefficients + rows * _COEFFICIENTS
        tl.store(out, sign * a, mask=inside)
        tl.store(out + 1, sign * b, mask=inside)
        if RULE == "adamw":
            steps = tl.load(table + rows * WIDTH + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
            step = tl.load(steps, mask=inside, other=0.0) + 1.0
            tl.store(steps, step, mask=inside)
            t = step.to(tl.float64)
            beta1 = setting(table, rows, BETA1, inside)
            beta2 = setting(table, rows, BETA2, inside)
            tl.store(out + 2, 1 - rate * decay, mask=inside)
            tl.store(out + 3, beta1, mask=inside)
            tl.store(out + 4, beta2, mask=inside)
            # beta^t; a beta of 0 has the logarithm -inf and the power 0.
            tl.store(out + 5, rate / (1 - tl.exp(t * tl.log(beta1))), mask=inside)
            tl.store(out + 6, 1 / tl.sqrt(1 - tl.exp(t * tl.log(beta2))), mask=inside)
            tl.store(out + 7, setting(table, rows, EPS, inside), mask=inside)
        else:
            tl.store(out + 2, rate, mask=inside)
            tl.store(out + 3, decay, mask=inside)
            tl.store(out + 4, setting(table, rows, MOMENTUM, inside), mask=inside)
            tl.store(out + 5, 1 - setting(table, rows, DAMPENING, inside), mask=inside)
            tl.store(out + 6, setting(table, rows, NESTEROV, inside), mask=inside)


@triton.jit
def _log(u):
    # To rounding also beside 1, where the hardware's logarithm is good to 2^-22 only; for normal numbers.
    if u.dtype == tl.float64:
        return tl.log(u)
    else:
        offset = u.to(tl.int32, bitcast=True) - 0x3F3504F3
        k = (offset >> 23).to(tl.float32)
        f = ((offset & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        s = f / (2.0 + f)
        t = s * s
        tail = t * (0.6666666667 + t * (0.4 + t * (0.2857142857 + t * 0.2222222222)))
        half = 0.5 * f * f
        return k * 0.693359375 + (f + (s * (half + tail) - half + k * -2.12194440e-4))


@triton.jit
def _turn(x, Real: tl.constexpr):
    # cos and sin of 2 pi x / 2^32. Those of the library have a path for huge angles, which spills.
    half = x.to(tl.int32, bitcast=True)
    if Real == tl.float64:
        angle = half.to(tl.float64) * (6.283185307179586 * 2.0**-32)
        return tl.cos(angle), tl.sin(angle)
    else:
        # The nearest half turn goes into the sign; what is left lies within a quarter turn.
        turned = x + 0x40000000
        rest = (turned & 0x7FFFFFFF).to(tl.int32) - 0x40000000
        sign = tl.where(turned >= 0x80000000, -1.0, 1.0)
        a = rest.to(tl.float32) * (6.283185307179586 * 2.0**-32)
        s = a * a
        c = s * (s * (s * (s * (s * (s * -1.1470745e-11 + 2.0876757e-9) - 2.7557319e-7) + 2.4801587e-5) - 1.3888889e-3)
                 + 4.1666667e-2) - 0.5  # fmt: skip
        d = s * (s * (s * (s * (s * (s * 1.6059044e-10 - 2.5052108e-8) + 2.7557319e-6) - 1.9841270e-4) + 8.3333333e-3)
                 - 0.16666667)  # fmt: skip
        return sign * (c * s + 1.0), sign * (d * a + a)


@triton.jit
def _pair(radial, angular, Real: tl.constexpr):
    radius = tl.sqrt(-2.0 * _log(radial.to(Real) * (2.0**-32) + (2.0**-33)))
    cosine, sine = _turn(angular, Real)
    return radius * cosine, radius * sine


@triton.jit
def _normals(number, begin, seed, step, Real: tl.constexpr, BLOCK: tl.constexpr):
    counter = (begin // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    key = tl.load(seed)
    t = tl.load(step)
    x0, x1, x2, x3 = tl.philox(key, counter, number.to(tl.int32), t.to(tl.int32), (t >> 32).to(tl.int32))
    n0, n1 = _pair(x0, x1, Real)
    n2, n3 = _pair(x2, x3, Real)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def _gradient(
    table, row, begin, left, a, b, noise_std, seed, step,
    T: tl.constexpr, Real: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.zeros([BLOCK], Real)
    forget = pointer_to(table, row, begin, FORGET, T, ALIGNED)
    retain = pointer_to(table, row, begin, RETAIN, T, ALIGNED)
    # The branches are the same for a whole program. Adding to 0 changes nothing.
    if tl.load(table + row * WIDTH + FORGET) != 0:
        g += a.to(Real) * read_chunk(forget, left, Real, FULL, BLOCK)
    if tl.load(table + row * WIDTH + RETAIN) != 0:
        g += b.to(Real) * read_chunk(retain, left, Real, FULL, BLOCK)
    if noise_std is not None:
        number = tl.load(table + row * WIDTH + NUMBER)
        g += tl.load(noise_std).to(Real) * _normals(number, begin, seed, step, Real, BLOCK)
    return g


@triton.jit
def _adamw_chunk(
    table, row, begin, left, coefficients, noise_std, seed, step,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = coefficients + row * _COEFFICIENTS
    a, b = tl.load(at), tl.load(at + 1)
    beta1, beta2 = tl.load(at + 3), tl.load(at + 4)
    kept, size = tl.load(at + 2).to(Real), tl.load(at + 5).to(Real)
    root, eps = tl.load(at + 6).to(Real), tl.load(at + 7).to(Real)
    g = _gradient(table, row, begin, left, a, b, noise_std, seed, step, T, Real, ALIGNED, FULL, BLOCK)
    parameter = pointer_to(table, row, begin, PARAMETER, T, ALIGNED)
    first = pointer_to(table, row, begin, FIRST, T, ALIGNED)
    second = pointer_to(table, row, begin, SECOND, T, ALIGNED)
    p = read_chunk(parameter, left, Real, FULL, BLOCK)
    m = read_chunk(first, left, Real, FULL, BLOCK)
    v = read_chunk(second, left, Real, FULL, BLOCK)
    # Interpolated from the nearer end, as torch.lerp does.
    near = 1 - beta1 < 0.5
    mean = tl.where(near, m, g) + tl.where(near, 1 - beta1, -beta1).to(Real) * (g - m)
    square = beta2.to(Real) * v + (1 - beta2).to(Real) * g * g
    moved = kept * p - size * mean / (tl.sqrt(square) * root + eps)
    moves = moving_entries(table, row, begin, left, MASKED, ALIGNED, FULL, BLOCK)
    write_chunk(parameter, moved, p, moves, left, FULL, MASKED, BLOCK)
    write_chunk(first, mean, m, moves, left, FULL, MASKED, BLOCK)
    write_chunk(second, square, v, moves, left, FULL, MASKED, BLOCK)


@triton.jit
def _adamw_kernel(
    table, chunks, coefficients, noise_std, seed, step,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Whole chunks by themselves: with a bound on its entries a load is not of 128 bits.
    row, begin, left = chunk_of(table, chunks, BLOCK)
    if left >= BLOCK:
        _adamw_chunk(
            table, row, begin, left, coefficients, noise_std, seed, step, T, Real, MASKED, ALIGNED, True, BLOCK
        )
    else:
        _adamw_chunk(
            table, row, begin, left, coefficients, noise_std, seed, step, T, Real, MASKED, ALIGNED, False, BLOCK
        )


@triton.jit
def _sgd_chunk(
    table, row, begin, left, coefficients, noise_std, seed, step,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = coefficients + row * _COEFFICIENTS
    a, b = tl.load(at), tl.load(at + 1)
    rate, decay = tl.load(at + 2).to(Real), tl.load(at + 3).to(Real)
    momentum, rest = tl.load(at + 4).to(Real), tl.load(at + 5).to(Real)
    nesterov = tl.load(at + 6) != 0
    g = _gradient(table, row, begin, left, a, b, noise_std, seed, step, T, Real, ALIGNED, FULL, BLOCK)
    moves = moving_entries(table, row, begin, left, MASKED, ALIGNED, FULL, BLOCK)
    parameter = pointer_to(table, row, begin, PARAMETER, T, ALIGNED)
    p = read_chunk(parameter, left, Real, FULL, BLOCK)
    g += decay * p
    if tl.load(table + row * WIDTH + FIRST) != 0:
        buffer = pointer_to(table, row, begin, FIRST, T, ALIGNED)
        held = read_chunk(buffer, left, Real, FULL, BLOCK)
        u = momentum * held + rest * g
        write_chunk(buffer, u, held, moves, left, FULL, MASKED, BLOCK)
        g = tl.where(nesterov, g + momentum * u, u)
    write_chunk(parameter, p - rate * g, p, moves, left, FULL, MASKED, BLOCK)


@triton.jit
def _sgd_kernel(
    table, chunks, coefficients, noise_std, seed, step,
    T: tl.constexpr, Real: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left = chunk_of(table, chunks, BLOCK)
    if left >= BLOCK:
        _sgd_chunk(table, row, begin, left, coefficients, noise_std, seed, step, T, Real, MASKED, ALIGNED, True, BLOCK)
    else:
        _sgd_chunk(table, row, begin, left, coefficients, noise_std, seed, step, T, Real, MASKED, ALIGNED, False, BLOCK)
