"""What one call of a layer adds to the gradient of one parameter, kept as the factors that it is made of.

    Outer    W [q, p]:  sum_t c_t a_t^T          Linear
    Patches  the same over the patches of the input, group by group          Conv
    Lookup   W [V, p]:  row v is the sum of the values looked up at v          Embedding, EmbeddingBag
    Dense    the per-sample gradient itself          biases, norm layers

The squared norm of an outer sum is found without the gradient ("ghost norm"): of one row |a|^2 |c|^2 (Goodfellow 2015,
arXiv 1510.01799), of T rows sum_{t,s} (a_t . a_s)(c_t . c_s) (Li et al. 2022, arXiv 2110.05679), where that is less
work than the gradient (Bu et al. 2022, arXiv 2210.00038). All norms are computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_tau import _library
from nabla_tau.kernels.reference import compute_dtype

# Bytes of per-sample gradients and patches made at a time: on the CPU what stays in a cache.
CHUNK_BYTES = {"cpu": 2 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20


def chunks(samples: int, bytes_each: int, device_type: str) -> Iterator[slice]:
    """The samples in turns of about equal size, each within the budget, or of one sample."""
    size = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES_ELSEWHERE) // max(1, bytes_each))
    return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def prefers_grams(count: int, p: int, q: int) -> bool:
    """Whether two Grams of `count` rows take fewer multiplications than a gradient of p x q."""
    return count * (p + q) <= p * q


@dataclass(frozen=True, eq=False)
class Part:
    """Samples are numbered from 0 to `samples`."""

    parameter: Tensor
    samples: int

    def total(self) -> Tensor:
        """The gradient summed over the samples, in the shape of the parameter and the dtype it was computed in."""
        raise NotImplementedError

    def each(self, at: slice) -> Tensor:
        """The gradient of each of these samples, [n, *parameter.shape], in the computing dtype."""
        raise NotImplementedError

    def bytes_each(self) -> int:
        """Memory that `each` takes for a sample."""
        return self.parameter.numel() * compute_dtype(self.parameter).itemsize

    def norms(self) -> Tensor:
        """Squared norm of each sample's gradient, [samples]."""
        return torch.cat([self.each(at).flatten(1).square().sum(1) for at in self.chunks()])

    def squares(self) -> Tensor:
        """Sum over the samples of the squared gradient, entry by entry."""
        total = torch.zeros_like(self.parameter, dtype=compute_dtype(self.parameter))
        for at in self.chunks():
            total += self.each(at).square_().sum(0)
        return total

    def chunks(self) -> Iterator[slice]:
        return chunks(self.samples, self.bytes_each(), self.parameter.device.type)


@dataclass(frozen=True, eq=False)
class Dense(Part):
    values: Tensor  # [samples, *parameter.shape]

    def total(self) -> Tensor:
        return self.values.sum(0)

    def each(self, at: slice) -> Tensor:
        return self.values[at].to(compute_dtype(self.values))

    def norms(self) -> Tensor:
        return self.each(slice(None)).flatten(1).square().sum(1)

    def squares(self) -> Tensor:
        return self.each(slice(None)).square().sum(0)


@dataclass(frozen=True, eq=False)
class Outer(Part):
    inputs: Tensor  # [samples, T, p]
    gradients: Tensor  # [samples, T, q]

    def total(self) -> Tensor:
        return self.gradients.flatten(0, 1).t() @ self.inputs.flatten(0, 1)

    def each(self, at: slice) -> Tensor:
        dtype = compute_dtype(self.inputs)
        return torch.bmm(self.gradients[at].to(dtype).mT, self.inputs[at].to(dtype))

    def norms(self) -> Tensor:
        (_, count, p), q = self.inputs.shape, self.gradients.shape[2]
        if count == 1:
            return _square_norms(self.inputs) * _square_norms(self.gradients)
        if prefers_grams(count, p, q):
            return _library.gram_norms(self.inputs, self.gradients)
        return super().norms()

    def squares(self) -> Tensor:
        if self.inputs.shape[1] != 1:
            return super().squares()
        dtype = compute_dtype(self.inputs)
        a, c = self.inputs[:, 0].to(dtype), self.gradients[:, 0].to(dtype)
        return c.square().t() @ a.square()


def _square_norms(rows: Tensor) -> Tensor:
    rows = rows.flatten(1).to(compute_dtype(rows))
    norms: Tensor = torch.linalg.vecdot(rows, rows)
    return norms


@dataclass(frozen=True, eq=False)
class Patches(Part):
    """A convolution: inputs [rows, C, *size], gradients [rows, C', *out]."""

    inputs: Tensor
    gradients: Tensor
    conv: Any  # nn.Conv1d, Conv2d or Conv3d

    def _padded(self) -> tuple[Tensor, list[int]]:
        """The input with whatever padding is not plain zeros on both sides alike, and the padding that is left."""
        conv, inputs = self.conv, self.inputs
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            return inputs, list(conv.padding)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode), [0] * len(conv.kernel_size)

    def total(self) -> Tensor:
        conv = self.conv
        inputs, padding = self._padded()
        found: Tensor = torch.ops.aten.convolution_backward(
            self.gradients, inputs, conv.weight.detach().to(inputs.dtype), None, conv.stride, padding, conv.dilation,
            False, [0] * len(padding), conv.groups, [False, True, False],
        )[1]  # fmt: skip
        return found

    def bytes_each(self) -> int:
        conv, positions = self.conv, self.gradients.shape[2:].numel()
        patches = conv.weight.shape[1] * conv.groups * conv.weight.shape[2:].numel() * positions
        rows = len(self.inputs) // max(1, self.samples)
        return super().bytes_each() + int(rows * patches) * compute_dtype(self.inputs).itemsize

    def each(self, at: slice) -> Tensor:
        conv, k, dtype = self.conv, len(self.inputs) // self.samples, compute_dtype(self.inputs)
        rows = slice(at.start * k, at.stop * k)
        part = replace(self, inputs=self.inputs[rows].to(dtype))
        inputs, padding = part._padded()
        if any(padding):
            inputs = F.pad(inputs, [side for width in reversed(padding) for side in (width, width)])
        inputs = inputs.contiguous()
        gradients = self.gradients[rows].to(dtype)
        n, out, kernel = at.stop - at.start, gradients.shape[2:], conv.kernel_size
        lengths, strides = inputs.shape[2:], inputs.stride()[2:]
        assert len(lengths) == len(kernel)
        patches = inputs.as_strided(
            (len(inputs), inputs.shape[1], *kernel, *out),
            (
                *inputs.stride()[:2],
                *(s * d for s, d in zip(strides, conv.dilation, strict=True)),
                *(s * d for s, d in zip(strides, conv.stride, strict=True)),
            ),
            inputs.storage_offset(),
        )
        # [n k groups, C / groups x kernel, positions] and [n k groups, C' / groups, positions]
        a = patches.reshape(len(inputs) * conv.groups, -1, out.numel())
        c = gradients.reshape(len(inputs) * conv.groups, -1, out.numel())
        found = torch.bmm(c, a.mT)
        if k > 1:
            found = found.reshape(n, k, -1).sum(1)
        return found.reshape(n, *conv.weight.shape)


@dataclass(frozen=True, eq=False)
class Lookup(Part):
    """index [N], values [N, p], and the sample that each belongs to, [N] ascending; None: N / samples each."""

    index: Tensor
    values: Tensor
    padding: int | None = None
    sample: Tensor | None = None

    def total(self) -> Tensor:
        padding = -1 if self.padding is None else self.padding
        found: Tensor = torch.ops.aten.embedding_dense_backward(
            self.values, self.index, len(self.parameter), padding, False
        )
        return found

    def kept_values(self) -> Tensor:
        """The values in the computing dtype, those of the padding index 0."""
        values = self.values.to(compute_dtype(self.values))
        return values if self.padding is None else values * (self.index != self.padding).unsqueeze(1)

    def owners(self) -> Tensor:
        if self.sample is not None:
            return self.sample
        each = len(self.index) // max(1, self.samples)
        return torch.arange(self.samples, device=self.index.device).repeat_interleave(each, output_size=len(self.index))

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values of the same sample and index added up, [N, p] with zeros behind; their samples and indices [N]."""
        keys, order = (self.owners() * len(self.parameter) + self.index).sort()
        starts = torch.ones_like(keys)
        starts[1:] = keys[1:] != keys[:-1]
        place = starts.cumsum(0) - 1
        values = self.kept_values()
        sums = torch.zeros_like(values).index_add_(0, place, values[order])
        of = torch.zeros_like(keys).index_copy_(0, place, keys)
        return sums, of // len(self.parameter), of % len(self.parameter)

    def norms(self) -> Tensor:
        sums, sample, _ = self._summed()
        return sums.new_zeros(self.samples).index_add_(0, sample, sums.square().sum(1))

    def squares(self) -> Tensor:
        sums, _, index = self._summed()
        return torch.zeros_like(self.parameter, dtype=sums.dtype).index_add_(0, index, sums.square())

    def each(self, at: slice) -> Tensor:
        owners, values = self.owners(), self.kept_values()
        mine = (owners >= at.start) & (owners < at.stop)
        n, height = at.stop - at.start, len(self.parameter)
        # The others go to a row that is cut off, since choosing by a mask would make the host wait.
        place = torch.where(mine, (owners - at.start) * height + self.index, n * height)
        found = values.new_zeros(n * height + 1, values.shape[1]).index_add_(0, place, values)
        return found[:-1].view(n, *self.parameter.shape)


@dataclass(frozen=True, eq=False)
class Several(Part):
    """Uses of one parameter that do not merge into one form, such as those of an embedding that is the head too."""

    parts: tuple[Part, ...]

    def total(self) -> Tensor:
        first, *others = (part.total() for part in self.parts)
        return sum(others, start=first)

    def each(self, at: slice) -> Tensor:
        first, *others = (part.each(at) for part in self.parts)
        return sum(others, start=first)

    def norms(self) -> Tensor:
        outer = next((part for part in self.parts if isinstance(part, Outer)), None)
        lookup = next((part for part in self.parts if isinstance(part, Lookup)), None)
        if outer is None or lookup is None or len(self.parts) > 2 or lookup.sample is not None:
            return super().norms()
        # |U + W|^2 = |U|^2 + |W|^2 + 2 U . W with U . W = sum_{t,s} (a_t . v_s) c_t[index_s]
        values = lookup.kept_values().view(self.samples, -1, lookup.values.shape[1])
        index = lookup.index.view(self.samples, 1, -1).expand(-1, outer.inputs.shape[1], -1)
        products = torch.bmm(outer.inputs.to(values.dtype), values.mT)
        crossed = (products * outer.gradients.gather(2, index).to(values.dtype)).sum((1, 2))
        return (outer.norms() + lookup.norms() + 2 * crossed).clamp(min=0)


def merge(parts: list[Part]) -> Part:
    """All uses of one parameter as one part, so that norms and squares are those of the sum."""
    first = parts[0]
    merged: list[Part] = [part for part in parts if isinstance(part, Patches)]
    if outers := [part for part in parts if isinstance(part, Outer)]:
        inputs, gradients = (
            torch.cat(both, 1) for both in zip(*((o.inputs, o.gradients) for o in outers), strict=True)
        )
        merged.append(Outer(first.parameter, first.samples, inputs, gradients))
    if dense := [part for part in parts if isinstance(part, Dense)]:
        merged.append(Dense(first.parameter, first.samples, sum((d.values for d in dense[1:]), start=dense[0].values)))
    lookups = [part for part in parts if isinstance(part, Lookup)]
    if len(lookups) == 1:
        merged.append(lookups[0])
    elif lookups:
        index, values = (torch.cat(both) for both in zip(*((p.index, p.kept_values()) for p in lookups), strict=True))
        owners = torch.cat([part.owners() for part in lookups])
        merged.append(Lookup(first.parameter, first.samples, index, values, sample=owners))
    return merged[0] if len(merged) == 1 else Several(first.parameter, first.samples, tuple(merged))
