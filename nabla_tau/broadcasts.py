"""Parameters used outside of layers, where they are broadcast over the samples: position embeddings and class tokens,
scales and shifts written out by hand.

Of x + f(p), x * f(p) and f(p).expand(...), with f(p) the same for all samples, the gradient of the result still has the
samples apart; autograd sums it over them on its way to f(p). Summed over some samples only, and passed on from f(p)
down by autograd, it is their part of p's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# Names of autograd's nodes, whose attributes are those of derivatives.yaml.
ADD, MUL, EXPAND = "AddBackward0", "MulBackward0", "ExpandBackward0"


@dataclass(frozen=True, eq=False)
class Broadcast:
    """`edge` is where the gradient of the result [rows, ...] arrives, `branch` what leads on to f(p), of this shape and
    dtype; `factor` [rows, ...] is what f(p) is multiplied by; `parameters` are those among the watched."""

    edge: GradientEdge
    branch: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    factor: Tensor | None
    parameters: list[Tensor]

    @property
    def rows(self) -> int:
        return int(_meta(self.edge.node, self.edge.output_nr).shape[0])

    def total(self, gradient: Tensor, start: int, stop: int) -> list[Tensor | None]:
        """Gradient by each of the parameters, of rows start to stop; gradient [rows, ...] is that of the result."""
        return self._pass_on(self._scaled(gradient, start, stop).sum_to_size(self.shape).to(self.dtype))

    def each(self, gradient: Tensor, samples: int) -> list[Tensor | None]:
        """The same for each sample, [samples, *parameter.shape]."""
        scaled = self._scaled(gradient, 0, self.rows)
        scaled = scaled.reshape(samples, -1, *scaled.shape[1:])
        # The sum over every axis that f(p) does not have, or has once, except that of the samples.
        behind = (1,) * (scaled.ndim - 1 - len(self.shape)) + tuple(self.shape)
        own = scaled.sum_to_size(samples, *behind).reshape(samples, *self.shape).to(self.dtype)
        return self._pass_on(own, batched=True)

    def _scaled(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        part = gradient[start:stop]
        return part if self.factor is None else part * self.factor[start:stop]

    def _pass_on(self, gradient: Tensor, batched: bool = False) -> list[Tensor | None]:
        if type(self.branch.node).__name__ == "AccumulateGrad":
            return [gradient]
        # The graph is kept for the other samples; it is freed with the losses.
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
        return list(torch.autograd.grad([self.branch], self.parameters, [gradient], **options))


def _meta(node: Any, number: int) -> Any:
    return node._input_metadata[number]


def broadcasts_of(node: Any, watched: set[int]) -> tuple[list[Broadcast], list[Any]]:
    """What of this node's inputs is broadcast over the samples and depends on watched parameters, and the nodes of its
    other inputs."""
    name = node.name()
    if name not in (ADD, MUL, EXPAND) or (name == ADD and node._saved_alpha != 1):
        return [], [child for child, _ in node.next_functions if child is not None]
    result = _meta(node, 0)
    found, others = [], []
    for place, (child, number) in enumerate(node.next_functions):
        if child is None:
            continue
        given = _meta(child, number)
        size, whole = list(given.shape), list(result.shape)
        spread = len(whole) > 0 and (len(size) < len(whole) or size[0] < whole[0])
        if spread and (parameters := list(_below(child, watched))):
            factor = (node._saved_other if place == 0 else node._saved_self) if name == MUL else None
            if factor is None or (factor.ndim == len(whole) and factor.shape[0] == whole[0]):
                edge, branch = GradientEdge(node, 0), GradientEdge(child, number)
                found.append(Broadcast(edge, branch, torch.Size(size), given.dtype, factor, parameters))
                continue
        others.append(child)
    return found, others


def _below(start: Any, watched: set[int]) -> Iterator[Tensor]:
    """The watched parameters that a node leads to."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in watched:
            yield variable
        fresh = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= fresh
        stack.extend(fresh)
