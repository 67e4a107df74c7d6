"""Pairs of neighbouring modules that together cost less than apart, and compute the same.

- A convolution or linear layer and frozen BatchNorm: y = gamma (W x + b - mean) / sqrt(var + eps) + beta is one linear
  layer with the weight W gamma / sqrt(var + eps). That is computed from the parameters in each forward, so autograd
  gives W, b, gamma and beta the gradients they have apart. Two passes over the activations less, forward and backward;
  results differ by rounding.
- ReLU and max pooling: they commute, with the same gradients, and after pooling there is less to do.

While `rewritten` lasts the modules compute that; the model itself is not changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class Pair(NamedTuple):
    """Two modules of which the second alone takes what the first gives: a layer and its norm, or ReLU and a pool."""

    first: Any
    second: Any

    @property
    def is_norm(self) -> bool:
        return isinstance(self.second, NORMS)

    @property
    def holds(self) -> bool:
        return not (self.is_norm and self.second.training)

    def forwards(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What each of the two computes instead."""
        if self.is_norm:
            return self._layer_and_norm, _same
        pool = type(self.second).forward
        return _same, lambda x: F.relu(pool(self.second, x))

    def _layer_and_norm(self, x: Tensor) -> Tensor:
        layer, norm = self.first, self.second
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        linear = F.linear if type(layer) is nn.Linear else layer._conv_forward
        found: Tensor = linear(x, weight, shift)
        return found


@contextlib.contextmanager
def rewritten(pairs: Sequence[Pair]) -> Iterator[None]:
    """Within, the modules of the pairs compute the cheaper form, but for norms that are not in eval mode."""
    done: list[nn.Module] = []
    try:
        for pair in pairs:
            if pair.holds:
                pair.first.forward, pair.second.forward = pair.forwards()
                done += pair
        yield
    finally:
        for module in done:
            del module.forward


def find_pairs(model: nn.Module, run: Callable[[], Tensor]) -> list[Pair]:
    """The pairs of a model, from one forward: `run` calls the model on some samples and returns its logits.

    Two modules are a pair where the very tensor that one returned goes into the other, each is called once, nothing
    else in the graph of the logits takes that tensor, and neither has hooks, parametrisations or a forward of its own.
    Where the logits come out otherwise with the pairs than without them there are none.
    """
    plain = [module for module in model.modules() if _is_plain(module)]
    if not any(isinstance(module, (*NORMS, *POOLS)) for module in plain):
        return []
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        calls.setdefault(module, []).append((args[0] if args else None, out))

    handles = [module.register_forward_hook(note) for module in plain]
    try:
        with torch.enable_grad():
            logits = run()
    finally:
        for handle in handles:
            handle.remove()
    once = {module: found[0] for module, found in calls.items() if len(found) == 1}
    made_by = {id(out): module for module, (_, out) in once.items()}
    users = _users(logits)
    pairs = []
    for second, (x, out) in once.items():
        first = made_by.get(id(x))
        if first is None or not isinstance(x, Tensor) or x.grad_fn is None or users.get(x.grad_fn) != [out.grad_fn]:
            continue
        if isinstance(second, NORMS):
            fits = isinstance(first, CONVOLUTIONS) or (isinstance(first, nn.Linear) and x.ndim == 2)
        else:
            fits = isinstance(second, POOLS) and isinstance(first, nn.ReLU)
        if fits:
            pairs.append(Pair(first, second))
    if pairs:
        with torch.no_grad(), rewritten(pairs):
            again = run()
        tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
        scale = float(logits.detach().abs().max()) if logits.numel() else 0.0
        if again.shape != logits.shape or not torch.allclose(again, logits, rtol=tolerance, atol=tolerance * scale):
            return []
    return pairs


def _same(x: Tensor) -> Tensor:
    return x


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes just what its class says, and nobody watches."""
    if type(module) not in (*CONVOLUTIONS, nn.Linear, *NORMS, nn.ReLU, *POOLS) or "forward" in vars(module):
        return False
    if isinstance(module, NORMS) and (module.running_mean is None or module.training):
        return False
    if isinstance(module, POOLS) and module.return_indices:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name) for name in hooks)


def _users(value: Tensor) -> dict[Node, list[Node]]:
    """Of each node in the graph of a tensor, the nodes that take what it made."""
    found: dict[Node, list[Node]] = {}
    waiting = [] if value.grad_fn is None else [value.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            found.setdefault(source, []).append(node)
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return found
