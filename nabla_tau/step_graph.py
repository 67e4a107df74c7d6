"""A whole step (forward, loss, backward, update) recorded once as a CUDA graph and replayed with one launch.

Everything that changes from step to step is a tensor at a fixed address: the batches are copied into buffers, and tau,
quantiles, alpha, running rank, learning rate and step count are device tensors anyway. A graph serves one set of batch
shapes; the smaller last batches of a pass get one of their own once they have come often enough, so nothing is padded
and a replayed step is bit for bit the one that was recorded. All graphs share one pool of memory.

The first WARM_UP steps on batches of some shapes are ordinary ones, the next is recorded. A step is not recorded where
that could be felt: it draws random numbers, waits for the device, or somebody watches it through hooks. Where recording
fails the step runs as it is, from the state before the attempt: recording executes nothing on the device.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from nabla_tau.batch import Batch, map_leaves, map_tensors, tensors_of
from nabla_tau.cuda_graph import Recorder
from nabla_tau.distributed import Ranks
from nabla_tau.optimizer_state import hooks_of

logger = logging.getLogger("nabla_tau")

WARM_UP = 3  # steps of the same shapes that run as they are; kernels are compiled and workspaces made in them
GRAPHS = 4  # whole and last batches of both groups
SHAPES = 64  # sets of shapes that are counted; beyond them none is likely to come again
CAPTURED = "captured"
_GLOBAL_HOOKS: tuple[Any, ...] = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)

Step = Callable[..., Sequence[Tensor]]


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    inputs: list[Tensor]
    metrics: Tensor
    gradients: list[tuple[nn.Parameter, Tensor | None]]


class StepGraphs:
    """Runs a step, by itself or from a graph.

    step: (batch, ...) -> 0-d tensors; it must end with the optimizer's update. refused: why no step may
    be recorded (`refusal`), None where it may. recorder: makes what records them, anew whenever they are dropped.
    settings: what else the step reads that is no tensor, such as which gate it is.
    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        refused: str | None,
        recorder: Callable[[], Recorder],
        settings: Callable[[], tuple[Any, ...]] = tuple,
    ) -> None:
        self._step, self._model, self._optimizer = step, model, optimizer
        self._refused, self._failed = refused, False
        self._make_recorder, self._settings = recorder, settings
        self._replayed = False
        self.drop()

    @property
    def said(self) -> str:
        """For a result: "captured", or "eager: " and why."""
        if self._replayed and not self._failed:
            return CAPTURED
        return (
            f"eager: {self._refused or self._refused_now or f'no batches of the same shapes came {WARM_UP + 1} times'}"
        )

    def drop(self) -> None:
        """Forget all graphs; what comes is recorded anew."""
        self._recorded: dict[str, _Recorded] = {}
        self._seen: dict[str, int] = {}
        self._watched: list[Any] = []
        self._refused_now: str | None = None
        self._state: Any = None
        self._recorder: Recorder | None = None

    def __call__(self, *batches: Batch) -> Sequence[Tensor]:
        if self._refused is None:
            self._look()
        shapes = None if self._refused or self._refused_now else _shapes(*batches)
        if shapes is None:
            return self._step(*batches)
        recorded = self._recorded.get(shapes)
        if recorded is not None:
            torch._foreach_copy_(recorded.inputs, tensors_of(batches))
            return self._replay(recorded)
        seen = self._seen.get(shapes, 0) + 1
        if len(self._recorded) == GRAPHS or (seen == 1 and len(self._seen) == SHAPES):
            return self._step(*batches)
        self._seen[shapes] = seen
        if seen <= WARM_UP:
            return self._warm_up(batches, last=seen == WARM_UP)
        recorded = self._record(batches)
        if recorded is None:
            return self._step(*batches)
        self._recorded[shapes] = recorded
        return self._replay(recorded)

    def _look(self) -> None:
        """Drop the graphs where something that they have built in is another now."""
        watched, state = [*_built_in(self._model, self._optimizer), self._settings()], self._optimizer.state
        if watched != self._watched or state is not self._state:
            self.drop()
            self._watched, self._state = watched, state
            self._refused_now = _obstacle(self._model, self._optimizer)

    def _warm_up(self, batches: tuple[Batch, ...], *, last: bool) -> Sequence[Tensor]:
        self._recorder = self._recorder or self._make_recorder()
        device = next(self._model.parameters()).device
        before = _random_states(device) if last else b""
        found, waited = self._recorder.warm_up(lambda: self._step(*batches), last=last)
        if last and _random_states(device) != before:
            self._refused_now = "a step draws random numbers"
        elif waited:
            self._refused_now = "the host waits for the device in a step"
        return found

    def _record(self, batches: tuple[Batch, ...]) -> _Recorded | None:
        inputs = [map_tensors(torch.clone, batch) for batch in batches]
        assert self._recorder is not None
        try:
            replay, metrics = self._recorder.record(lambda: torch.stack(list(self._step(*inputs))))
        except Exception as error:
            self.drop()
            self._refused, self._failed = f"it could not be captured ({_first_line(error)})", True
            logger.warning("steps run without a CUDA graph: %s", self._refused)
            return None
        gradients = [(p, p.grad) for p in self._model.parameters() if p.requires_grad]
        return _Recorded(replay, tensors_of(inputs), metrics, gradients)

    def _replay(self, recorded: _Recorded) -> Sequence[Tensor]:
        recorded.replay()
        self._replayed = True
        # Somebody may have taken them away, and each graph has its own.
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        # The next replay writes over them, and a history reads them much later.
        return recorded.metrics.clone().unbind()


def _first_line(error: BaseException) -> str:
    """Of the first of the errors that came of one another: the others say that a capture ended early."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def refusal(
    parameters: Sequence[Tensor],
    device: torch.device,
    *,
    performance: str,
    ranks: Ranks,
    micro_batch_size: int | None,
) -> str | None:
    """Why no step of these settings may be captured; None where it may."""
    if performance == "off":
        return 'performance="off"'
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if any(p.device != device for p in parameters):
        return "the model is on several devices"
    if ranks.parallel != "alone":
        return "several processes take a step together"
    return None if micro_batch_size is None else "micro-batches"


def _modules_and_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    for module in model.modules():
        tensors = itertools.chain(module._parameters.values(), module._buffers.values())
        yield module, [tensor for tensor in tensors if tensor is not None]


def _built_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """What a graph has built in and would not notice: addresses, modes, hooks and the optimizer's numbers.

    Looked at in every step, so without `modules()`, which takes as long as the rest.
    """
    found: list[Any] = [torch.is_grad_enabled(), torch.is_autocast_enabled(next(model.parameters()).device.type)]
    found += map(len, (*_GLOBAL_HOOKS, *hooks_of(optimizer)))
    modules = [model]
    for module in modules:  # grows meanwhile
        found += (module.training, *map(len, _hooks_of(module)))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.requires_grad, _has_hooks(tensor))
        modules += [child for child in module._modules.values() if child is not None]
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                found.append(value.data_ptr() if isinstance(value, Tensor) else value)
    return found


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _obstacle(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    if any(_GLOBAL_HOOKS):
        return "there are hooks of all modules, which a graph does not call"
    for module, tensors in _modules_and_tensors(model):
        if any(_hooks_of(module)) or any(map(_has_hooks, tensors)):
            return f"{type(module).__name__} has hooks, which a graph does not call"
    if any(hooks_of(optimizer)):
        return f"{type(optimizer).__name__} has hooks, which a graph does not call"
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not group.get("capturable") or not isinstance(rate, Tensor) or rate.device != device:
            kind = type(optimizer).__name__
            return f"{kind} cannot be captured: it takes capturable=True and, as lr, a tensor on the device"
    if torch.is_autocast_enabled(device.type):
        return "the caller's autocast keeps copies of the weights"
    return None


def _shapes(*batches: Batch) -> str | None:
    """What batches must have in common to be served by one graph; None where none can serve them."""

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.requires_grad:
            return leaf.dtype, leaf.shape, leaf.stride()
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise TypeError

    try:
        return repr([map_leaves(describe, batch) for batch in batches])
    except TypeError:
        return None


def _random_states(device: torch.device) -> bytes:
    """All that a step could draw from."""
    states = [torch.get_rng_state().numpy()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy())
    return pickle.dumps((states, random.getstate(), np.random.get_state()))  # noqa: NPY002 - not drawn from
