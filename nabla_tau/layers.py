"""Layers whose parameters' gradients are sums over rows, and those gradients from a layer's input and the gradient of
its output: over some samples (`Part.total`), sample by sample (`samples`), their squared norms (`norms`) and the sum of
their squares (`squares`).

A row belongs to the sample of the same number, or rows k i to k i + k - 1 belong to sample i.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau.parts import Dense, Lookup, Outer, Part, Patches

LINEAR, CONV = nn.Linear, (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS: tuple[type[nn.Module], ...] = (
    LINEAR, *CONV, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORM
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer on `rows` rows. `offsets` and `scales` are those of an EmbeddingBag."""

    module: nn.Module
    input: Tensor
    rows: int
    offsets: Tensor | None = None
    scales: Tensor | None = None

    def narrow(self, start: int, stop: int) -> Call:
        """The call on these rows alone."""
        if self.offsets is None:
            scales = None if self.scales is None else self.scales[start:stop]
            return replace(self, input=self.input[start:stop], rows=stop - start, scales=scales)
        edges = [*self.offsets.tolist(), len(self.input)]
        first, last = edges[start], edges[stop]
        scales = None if self.scales is None else self.scales[first:last]
        offsets = self.offsets[start:stop] - first
        return replace(self, input=self.input[first:last], rows=stop - start, offsets=offsets, scales=scales)


def is_layer(module: nn.Module) -> bool:
    """Whether a module computes what its class says, with parameters that are its own."""
    kind = type(module)
    known = next((layer for layer in LAYERS if isinstance(module, layer)), None)
    if known is None or "forward" in vars(module):
        return False
    same = all(getattr(kind, name, None) is getattr(known, name, None) for name in ("forward", "_conv_forward"))
    # A weight that is computed (weight_norm, parametrizations) is no parameter of the module.
    own = module._parameters
    return same and own.keys() <= {"weight", "bias"} and "weight" in own


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Call | None:
    """The call as rows, or None where its rows cannot be told apart."""
    given = args[0] if args else kwargs.get("input", kwargs.get("x"))
    if not isinstance(given, Tensor) or type(output) is not Tensor or output.ndim == 0:
        return None
    given = given.detach()
    if isinstance(module, nn.EmbeddingBag):
        return _bag_call(module, given, args, kwargs, output)
    if isinstance(module, CONV):
        apart = given.ndim == len(module.kernel_size) + 2
    elif isinstance(module, nn.Embedding):
        apart = given.ndim >= 1 and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        apart = given.ndim > len(module.normalized_shape)
    elif isinstance(module, BATCH_NORM):
        apart = not module.training and module.running_mean is not None
    else:
        apart = given.ndim >= 2
    return Call(module, given, given.shape[0]) if apart else None


def _bag_call(
    module: nn.EmbeddingBag, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Call | None:
    names = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
    offsets, scales = names.get("offsets"), names.get("per_sample_weights")
    scales = None if scales is None else scales.detach()
    if module.mode == "max" or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    if offsets is None:
        return Call(module, given, given.shape[0], scales=scales)
    if offsets.device.type != "cpu":  # where a bag begins could only be read by waiting for the device
        return None
    offsets = offsets[:-1] if module.include_last_offset else offsets
    return Call(module, given, output.shape[0], offsets, scales)


def parts_of(call: Call, gradient: Tensor, samples: int, wanted: Container[int]) -> list[Part]:
    """What this call adds to the gradient of each of its parameters whose id is wanted.

    gradient is that of the call's output; its rows are `samples` times a whole number. Computed in the gradient's
    dtype, which under autocast is what the layer computed in.
    """
    module, given = call.module, call.input
    weight, bias = (p if id(p) in wanted else None for p in map(module._parameters.get, ("weight", "bias")))
    found: list[Part] = []
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return [_lookup(call, gradient, samples)] if weight is not None else []
    if isinstance(module, CONV):
        if weight is not None:
            found.append(Patches(weight, samples, given.to(gradient.dtype), gradient, module))
        if bias is not None:
            found.append(_dense(bias, samples, gradient, 1, 1))
    elif isinstance(module, LINEAR):
        if weight is not None:
            inputs = given.to(gradient.dtype).reshape(samples, -1, weight.shape[1])
            found.append(Outer(weight, samples, inputs, gradient.reshape(samples, -1, weight.shape[0])))
        if bias is not None:
            found.append(_dense(bias, samples, gradient, gradient.ndim - 1, 1))
    else:
        axis, ndim = 1, 1
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            ndim = len(module.normalized_shape)
            axis = gradient.ndim - ndim
        if weight is not None:
            found.append(_dense(weight, samples, gradient * _normalised(module, given.to(gradient.dtype)), axis, ndim))
        if bias is not None:
            found.append(_dense(bias, samples, gradient, axis, ndim))
    return found


def _dense(parameter: Tensor, samples: int, values: Tensor, axis: int, ndim: int) -> Dense:
    """A parameter that lies along the `ndim` axes of the values from `axis` on: the others are summed, sample by
    sample."""
    behind = values.shape[axis + ndim :].numel()
    values = values.reshape(samples, -1, parameter.numel(), behind)
    # One axis after the other: each sum reads memory in order.
    each = values.sum(3) if behind > 1 else values.squeeze(3)
    each = each.sum(1) if each.shape[1] > 1 else each.squeeze(1)
    return Dense(parameter, samples, each.reshape(samples, *parameter.shape))


def _normalised(module: nn.Module, given: Tensor) -> Tensor:
    """The output of a norm layer before its weight and bias."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(given, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(given, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(given, module.num_groups, None, None, module.eps)
    assert isinstance(module, BATCH_NORM)
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, var = module.running_mean.to(given.dtype), module.running_var.to(given.dtype)
    return F.batch_norm(given, mean, var, None, None, False, 0.0, module.eps)


def _lookup(call: Call, gradient: Tensor, samples: int) -> Lookup:
    module, index = call.module, call.input
    width = gradient.shape[-1]
    if isinstance(module, nn.Embedding):
        index, values = index.reshape(samples, -1), gradient.reshape(samples, -1, width)
        return Lookup(module.weight, samples, index.flatten(), values.flatten(0, 1), padding=module.padding_idx)
    assert isinstance(module, nn.EmbeddingBag)
    if call.offsets is None:
        bag = torch.arange(call.rows, device=index.device).repeat_interleave(index.shape[1])
    else:
        here = torch.arange(len(index), device=index.device)
        bag = torch.searchsorted(call.offsets.to(here.dtype), here, right=True) - 1
    index = index.flatten()
    values = gradient[bag]
    if call.scales is not None:
        values = values * call.scales.flatten().to(values.dtype).unsqueeze(1)
    if module.mode == "mean":
        kept = torch.ones_like(bag) if module.padding_idx is None else (index != module.padding_idx).to(bag.dtype)
        counts = torch.zeros(call.rows, dtype=bag.dtype, device=bag.device).index_add_(0, bag, kept)
        values = values / counts.clamp(min=1)[bag].unsqueeze(1)
    sample = bag // (call.rows // samples) if samples else bag
    return Lookup(module.weight, samples, index, values, padding=module.padding_idx, sample=sample)
