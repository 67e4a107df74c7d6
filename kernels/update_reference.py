"""One optimizer step with two gradients for each parameter, in plain PyTorch: AdamW and SGD, the inner products of the
gradients, the noise, and the ball. The oracle of the update kernels, and their fallback.

With f and r the gradients of the forget and the retain part, of which a parameter may lack one (then 0),

    g = sign (s_f f + s_r r) + std n,        sign = -1 where the group maximizes
    s_r <- s_r - s_f min(<f, r>, 0) / <r, r>      with projection

The second line is PCGrad's projection of f alone (Yu et al. 2020, arXiv 2001.06782), f <- f - <f, r> / <r, r> r where
<f, r> < 0: since it moves f along r, it is a change of one scale. Then, as torch.optim does,

    AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), t the step count, from 1:
        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        p <- (1 - lr decay) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    SGD:
        g <- g + decay p,    u <- momentum u + (1 - dampening) g    (the first u is g)
        p <- p - lr u,  nesterov: p - lr (g + momentum u),  without momentum: p - lr g

Numbers are computed in float32 (float64 for float64 parameters); p, m, v and u are stored in the parameter's dtype.

The noise n_j of entry j, in memory order, of parameter number i is a function of (seed, step, i, j) alone. With
x_0 ... x_3 the output of Philox4x32-10 (Salmon et al. 2011) for the counter (j div 4, i, step mod 2^32, step div 2^32)
and the key (seed mod 2^32, seed div 2^32), and u(x) = x 2^-32 + 2^-33, the entries 4k ... 4k + 3 get

    sqrt(-2 ln u(x_0)) (cos, sin)(2 pi x_1 2^-32),     sqrt(-2 ln u(x_2)) (cos, sin)(2 pi x_3 2^-32)

(Box and Muller), in the computing dtype. The bits are the same everywhere, the normal numbers up to its rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nabla_tau.kernels.reference import compute_dtype

_LOW = 0xFFFFFFFF


class Noise(NamedTuple):
    """Gaussian noise of standard deviation `std` on every entry of the gradient, drawn for (seed, step): give every
    step another number. Numbers, or 0-d tensors on the parameters' device (`std` floating, the others int64)."""

    std: float | Tensor
    seed: int | Tensor
    step: int | Tensor


class Products(NamedTuple):
    """Inner products of the forget and the retain gradient over all parameters, 0-d float64: <f, f>, <f, r>, <r, r>."""

    forget: Tensor
    cross: Tensor
    retain: Tensor

    def cosine(self) -> Tensor:
        """Of the angle between the two gradients; 0 where one of them is 0. Below 0 they conflict."""
        norms = (self.forget * self.retain).sqrt()
        return torch.where(norms > 0, self.cross / norms, torch.zeros_like(norms))

    def balance(self, cap: float) -> Tensor:
        """The scale min(1, cap |r| / |f|), which keeps the forget gradient to `cap` times the norm of the other."""
        tiny = torch.finfo(self.forget.dtype).tiny
        return (cap * (self.retain / self.forget.clamp(min=tiny)).sqrt()).clamp(max=1.0)

    def projected(self, forget_scale: float | Tensor, retain_scale: float | Tensor) -> Tensor:
        """The retain scale with which the projected forget gradient is added (the second line above)."""
        conflict = self.cross.clamp(max=0.0) / torch.where(self.retain > 0, self.retain, 1.0)
        return retain_scale - forget_scale * conflict


class Row(NamedTuple):
    """A parameter and what belongs to it; tensors of one shape and dtype (mask: bool), in the parameter's order."""

    parameter: Tensor
    number: int
    forget: Tensor | None = None
    retain: Tensor | None = None
    mask: Tensor | None = None
    first: Tensor | None = None  # AdamW: m; SGD: the momentum buffer
    second: Tensor | None = None  # AdamW: v
    step: Tensor | None = None  # AdamW: t before this step, 0-d float32
    centre: Tensor | None = None


class Settings(NamedTuple):
    """Of a parameter's group; `rate` may be a 0-d tensor. AdamW reads the betas and eps, SGD the last three."""

    rate: float | Tensor
    decay: float
    sign: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: float = 0.0


def philox(counter: tuple[Tensor, ...], seed: int | Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four int64 tensors that hold 32 bits each, and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (low0, high0), (low2, high2) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # Low and high half of a 64-bit product, in two parts that int64 holds.
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return ((high & 0xFFFF) << 16) | (low & 0xFFFF), high >> 16


def normals(
    size: int, number: int, seed: int | Tensor, step: int | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The noise of a parameter for std 1, [size] in dtype, which is float32 or float64."""
    block = torch.arange((size + 3) // 4, device=device)
    c1, c2, c3 = (torch.zeros_like(block) + part for part in (number, step & _LOW, (step >> 32) & _LOW))
    x0, x1, x2, x3 = philox((block & _LOW, c1, c2, c3), seed)
    found = []
    for radial, angular in ((x0, x1), (x2, x3)):
        radius = (-2 * (radial.to(dtype) * 2.0**-32 + 2.0**-33).log()).sqrt()
        # From whole turns to [-1/2, 1/2): in float32 a larger angle has a larger error.
        angle = torch.where(angular >= 2**31, angular - 2**32, angular).to(dtype) * (2 * torch.pi * 2.0**-32)
        found += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(found, 1).flatten()[:size]


def gradient_products(rows: list[Row]) -> Products:
    """Of the entries that the masks let move."""
    device = rows[0].parameter.device if rows else None
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for row in rows:
        f, r = (
            None if g is None else (g if row.mask is None else torch.where(row.mask, g, 0)).double()
            for g in (row.forget, row.retain)
        )
        pairs = ((f, f), (f, r), (r, r))
        sums += torch.stack([sums.new_zeros(()) if a is None or b is None else (a * b).sum() for a, b in pairs])
    return Products(*sums)


def _gradient(
    row: Row, sign: float, forget_scale: float | Tensor, retain_scale: float | Tensor, noise: Noise | None
) -> Tensor:
    real = compute_dtype(row.parameter)
    parts = [
        g.to(real) * _number(sign * scale, real)
        for g, scale in ((row.forget, forget_scale), (row.retain, retain_scale))
        if g is not None
    ]
    gradient = sum(parts[1:], parts[0])
    if noise is not None:
        p = row.parameter
        drawn = normals(p.numel(), row.number, noise.seed, noise.step, real, p.device)
        gradient = gradient + _number(noise.std, real) * drawn.as_strided(p.shape, p.stride())
    return gradient


def _number(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _write(row: Row, to: Tensor, value: Tensor) -> None:
    value = value.to(to.dtype)
    to.copy_(value if row.mask is None else torch.where(row.mask, value, to))


def adamw(
    rows: list[Row],
    settings: list[Settings],
    forget_scale: float | Tensor,
    retain_scale: float | Tensor,
    noise: Noise | None = None,
) -> None:
    """One step of AdamW, in place; each row's step count goes up by one."""
    for row, s in zip(rows, settings, strict=True):
        assert row.first is not None
        assert row.second is not None
        assert row.step is not None
        g = _gradient(row, s.sign, forget_scale, retain_scale, noise)
        row.step.add_(1)
        t = row.step.double()
        m = torch.lerp(row.first.to(g.dtype), g, 1 - s.beta1)
        v = s.beta2 * row.second.to(g.dtype) + (1 - s.beta2) * g.square()
        size, root = s.rate / (1 - s.beta1**t), (1 - s.beta2**t).sqrt()
        kept = _number(1 - s.rate * s.decay, g.dtype) * row.parameter.to(g.dtype)
        p = kept - size.to(g.dtype) * m / (v.sqrt() / root.to(g.dtype) + s.eps)
        for to, value in ((row.parameter, p), (row.first, m), (row.second, v)):
            _write(row, to, value)


def sgd(
    rows: list[Row],
    settings: list[Settings],
    forget_scale: float | Tensor,
    retain_scale: float | Tensor,
    noise: Noise | None = None,
) -> None:
    """One step of SGD, in place. A first buffer is zeros, with dampening 0."""
    for row, s in zip(rows, settings, strict=True):
        g = _gradient(row, s.sign, forget_scale, retain_scale, noise)
        p = row.parameter.to(g.dtype)
        g = direction = g + s.decay * p
        if row.first is not None:
            u = s.momentum * row.first.to(g.dtype) + (1 - s.dampening) * g
            direction = g + s.momentum * u if s.nesterov else u
            _write(row, row.first, u)
        _write(row, row.parameter, p - _number(s.rate, g.dtype) * direction)


def squared_distance(rows: list[Row]) -> Tensor:
    """Of the parameters from their centres, of the entries that the masks let move; 0-d float64."""
    total = torch.zeros((), dtype=torch.float64, device=rows[0].parameter.device if rows else None)
    for row in rows:
        assert row.centre is not None
        away = row.parameter.double() - row.centre.double()
        total += (away if row.mask is None else torch.where(row.mask, away, 0.0)).square().sum()
    return total


def pull(rows: list[Row], squared: Tensor, radius: float | Tensor) -> None:
    """p <- c + (p - c) min(1, radius / |p - c|), in place, |p - c|^2 = squared; inside the ball nothing changes."""
    distance = squared.sqrt()
    for row in rows:
        assert row.centre is not None
        real = compute_dtype(row.parameter)
        p, c = row.parameter.to(real), row.centre.to(real)
        factor = (radius / distance).to(real)
        _write(row, row.parameter, torch.where(distance > radius, c + factor * (p - c), p))
