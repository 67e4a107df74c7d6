"""What the layers of a model saw in one forward: each one's input, and the gradient of its output as the backward
passes it.

A gradient of a layer's weight is a sum over rows of (input, output gradient), so from these pairs it can be summed
over some samples only (`gradients.py`) or its norm be taken sample by sample (`sample_norms.py`), where autograd would
have summed over all of them. Asked for the gradients of the first layers' outputs alone, autograd leaves every
weight's gradient out: nothing is computed twice, and no parameter is touched.

This is exact only where every use of a parameter is such a call. `Tape.survey` walks the autograd graph, jumps over
the calls that were recorded, and names any parameter that it still meets.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nabla_tau.broadcasts import Broadcast, broadcasts_of
from nabla_tau.layers import Call, call_of, is_layer


@dataclass(eq=False)
class Recorded:
    """A call of a layer; `receive` gets the call and the gradient of its output while a backward runs."""

    call: Call
    version: int
    receive: Callable[[Call, Tensor], None] | None = None

    def deliver(self, gradient: Tensor | None) -> None:
        # No reference to the output or its node: a hook that holds its own node is never freed.
        if self.receive is not None and gradient is not None:
            if self.call.input._version != self.version:
                # Autograd looks at this only where it computes the weight's gradient itself.
                raise RuntimeError(
                    f"the input of {type(self.call.module).__name__} (shape {tuple(self.call.input.shape)}) was "
                    "modified in place after the layer had read it, so its gradient cannot be computed"
                )
            self.receive(self.call, gradient)


class Survey(NamedTuple):
    """`calls` and `broadcasts` are those that the loss depends on, `roots` the calls' outputs below which there is
    neither, `ends` the broadcasts below which there is neither; `stray` is the first parameter found that is used
    outside of all of them, None where there is none."""

    calls: list[Recorded]
    roots: list[GradientEdge]
    broadcasts: list[Broadcast]
    ends: list[Broadcast]
    stray: Tensor | None

    def uses(self) -> Counter[int]:
        """How often each parameter is used, by its id."""
        used = [own for recorded in self.calls for own in recorded.call.module._parameters.values()]
        return Counter(map(id, used + [own for broadcast in self.broadcasts for own in broadcast.parameters]))


@dataclass(eq=False)
class Tape:
    """What one forward recorded. `refusal` says why it cannot be used, empty where it can."""

    refusal: str = ""
    _calls: dict[Any, tuple[Recorded, GradientEdge, list[GradientEdge]]] = field(default_factory=dict)

    def clear(self) -> None:
        self._calls.clear()

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook. What is no call of rows stays unrecorded, and the survey meets its parameters."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if _saves_through_hooks():
            self.refusal = "activations are saved through hooks (checkpointing, offloading), and would be kept here"
            return
        call = call_of(module, args, kwargs, output)
        if call is None:
            return
        recorded = Recorded(call, call.input._version)
        output.register_hook(recorded.deliver)  # type: ignore[no-untyped-call]
        edge = get_gradient_edge(output)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad)
        self._calls[edge.node] = recorded, edge, [get_gradient_edge(tensor) for tensor in tensors]

    def survey(self, losses: Tensor, parameters: Sequence[Tensor]) -> Survey:
        """Which calls the losses depend on. Some microseconds a node of the graph."""
        watched = {id(parameter) for parameter in parameters}
        found = Survey([], [], [], [], None)
        if not losses.requires_grad:
            return found
        start = get_gradient_edge(losses).node
        reaches: dict[Any, bool] = {}  # whether a call or a broadcast lies at or below a node
        spread: dict[Any, list[Broadcast]] = {}
        stack: list[tuple[Any, list[Any] | None]] = [(start, None)]
        while stack:
            node, children = stack.pop()
            here = self._calls.get(node)
            if children is None:
                if node in reaches:
                    continue
                reaches[node] = False
                variable = getattr(node, "variable", None)
                if variable is not None and id(variable) in watched:
                    return found._replace(stray=variable)
                if here:
                    children = [edge.node for edge in here[2]]
                else:
                    spread[node], children = broadcasts_of(node, watched)
                stack.append((node, children))
                stack.extend((child, None) for child in children if child not in reaches)
            else:
                below = any(reaches[child] for child in children)
                sides = spread.get(node, [])
                found.broadcasts.extend(sides)
                if not below:
                    found.ends.extend(sides)
                reaches[node] = below or here is not None or bool(sides)
                if here:
                    found.calls.append(here[0])
                    if not below:
                        found.roots.append(here[1])
        return found


def _saves_through_hooks() -> bool:
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return look is not None and look(True) is not None


@contextlib.contextmanager
def recording(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[Tape]:
    """Record the calls of the model's layers that hold one of the parameters. The model has hooks only inside."""
    tape = Tape(_hidden_from_hooks(model))
    watched = set() if tape.refusal else {id(parameter) for parameter in parameters}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if is_layer(module) and any(id(own) in watched for own in module._parameters.values()):
                # First of all hooks: another may put something else in the output's place.
                handle = module.register_forward_hook(tape.note, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
        yield tape


def _hidden_from_hooks(model: nn.Module) -> str:
    """Why hooks on this model's layers would not see what it computes; empty where they do."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "OptimizedModule" in kinds or module._compiled_call_impl is not None:
            return f"{name or 'the model'} ({type(module).__name__}) is compiled"
        for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
            if wrapper in kinds:
                return f"{name or 'the model'} ({type(module).__name__}) manages its own gradients"
    return ""


def backward(
    losses: Tensor,
    weights: Tensor,
    survey: Survey,
    receive: Callable[[Call, Tensor], None],
    receive_broadcast: Callable[[Broadcast, Tensor], None],
    *,
    retain_graph: bool = False,
) -> None:
    """Hand the gradient of sum_i weights_i losses_i by the output of every call and by the result of every broadcast
    to who receives it, as the backward passes them."""
    inputs = survey.roots + [broadcast.edge for broadcast in survey.ends]
    if not inputs:
        return
    passed = [broadcast for broadcast in survey.broadcasts if broadcast not in survey.ends]
    with contextlib.ExitStack() as stack:
        for recorded in survey.calls:
            recorded.receive = receive
            stack.callback(setattr, recorded, "receive", None)
        for broadcast in passed:

            def look(gradients: tuple[Tensor | None, ...], broadcast: Broadcast = broadcast) -> None:
                if gradients[0] is not None:
                    receive_broadcast(broadcast, gradients[0])

            stack.callback(broadcast.edge.node.register_prehook(look).remove)
        found = torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)
    for broadcast, gradient in zip(survey.ends, found[len(survey.roots) :], strict=True):
        if gradient is not None:
            receive_broadcast(broadcast, gradient)


def owner(model: nn.Module, parameter: Tensor) -> str:
    """Where a parameter lives, for a message: "name (Type): why its gradient cannot be taken apart"."""
    for name, module in model.named_modules():
        for own, value in module._parameters.items():
            if value is parameter:
                called = f"{name or 'the model'} ({type(module).__name__})"
                if is_layer(module):
                    return f"{called}: {own} is used outside of the module, or by a call that is not one row a sample"
                return f"{called}: {own} is not the weight of a layer whose gradient is a sum over rows"
    return "a parameter that is not the model's"


def why_not(model: nn.Module, survey: Survey, samples: int) -> str:
    """What keeps the calls from being all uses of the parameters, with rows of samples; empty where they may be."""
    if survey.stray is not None:
        return owner(model, survey.stray)
    for recorded in survey.calls:
        if samples and recorded.call.rows % samples:
            name = next(name for name, module in model.named_modules() if module is recorded.call.module)
            kind = type(recorded.call.module).__name__
            return f"{name} ({kind}): its {recorded.call.rows} rows are not those of {samples} samples"
    for broadcast in survey.broadcasts:
        if samples and broadcast.rows % samples:
            return f"{owner(model, broadcast.parameters[0])}, {broadcast.rows} rows for {samples} samples"
    return ""
