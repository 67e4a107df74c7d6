"""Dual gradients: of the samples to forget and of the samples to keep, apart, from one forward and one backward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nabla_tau import capture
from nabla_tau.broadcasts import Broadcast
from nabla_tau.layers import Call, parts_of

logger = logging.getLogger("nabla_tau")

ONE = "one backward"
Gradients: TypeAlias = list[Tensor | None]

# How far the two ways may differ, relative to the gradient: rounding only. A wrong split is off by about 1. By the
# coarsest dtype of a gradient on the way, which autocast makes another one than the parameters'.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}


class DualGradients:
    """The gradients of sum_{i < n} w_i l_i and of sum_{i >= n} w_i l_i of one mixed batch, kept apart.

        dual = DualGradients(model, parameters)
        with dual.watch():
            losses = ...                                          # [B], of one forward, samples to forget first
        forget, retain = dual.backward(losses, weights, n)        # lists in the order of `parameters`

    model: any module, used as it stands; hooks are on its layers inside `watch` only. parameters: its trainable ones.

    A weight's gradient is a sum over rows of the layer's input and output gradient, which one backward passes by; the
    rows of each part are summed apart, so it costs what a plain backward does (book-keeping: Bu et al. 2022,
    arXiv 2210.00038). That holds for Linear, Conv, Embedding, EmbeddingBag (not by max), LayerNorm, GroupNorm, RMSNorm
    and BatchNorm with frozen statistics, whose rows are samples or whole runs of rows a sample, however often they are
    called and whatever they share. For anything else there are two backwards over the same graph. Both ways are
    compared on the first batch, and again when modules, their modes or what requires a gradient change; every batch's
    graph is searched for other uses of the parameters. `how` says which way it is, and why if it is two; a reason is
    also logged, once.

    The gradients are those of this process; averaging them over processes is the caller's.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Raises ValueError for no parameters, or one that is not the model's, not trainable, or given twice."""
        self.model = model
        self.parameters = list(parameters)
        own = {id(parameter) for parameter in model.parameters()}
        if not self.parameters:
            raise ValueError("parameters is empty: there is no gradient to compute")
        for place, parameter in enumerate(self.parameters):
            if id(parameter) not in own:
                raise ValueError(f"parameters[{place}], of shape {tuple(parameter.shape)}, is not one of the model's")
            if not parameter.requires_grad:
                raise ValueError(f"parameters[{place}], of shape {tuple(parameter.shape)}, does not require a gradient")
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise ValueError(f"parameters has {len(self.parameters)} entries, some of them the same")
        self.how = "not chosen yet"
        self._state: object = None  # of the model, when `how` was chosen
        self._tape: capture.Tape | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around the forward of the mixed batch. Nothing of the model is different afterwards, also after an error."""
        self._tape = None
        state = [(id(m), m.training) for m in self.model.modules()], [p.requires_grad for p in self.parameters]
        if state != self._state:
            self._state, self.how = state, "not chosen yet"
        if self.how not in (ONE, "not chosen yet"):
            self._tape = capture.Tape(refusal=self.how)
            yield
            return
        with capture.recording(self.model, self.parameters) as tape:
            yield
        self._tape = tape

    def backward(self, losses: Tensor, weights: Tensor, n_forget: int) -> tuple[Gradients, Gradients]:
        """Gradients of the first `n_forget` samples' and of the other samples' weighted losses.

        losses [B] of the forward in `watch`, weights [B]; the graph is freed. A gradient has its parameter's shape and
        dtype, and is None where the losses do not depend on the parameter, or where a part has no samples or, on the
        CPU, only weights of 0: nothing is computed for such a part. (On a GPU, to look would be to wait.)

        Raises RuntimeError without a forward in `watch` before, or a second time for the same one; TypeError for
        weights that require a gradient, ValueError for shapes that do not fit.
        """
        tape, self._tape = self._tape, None
        if tape is None:
            raise RuntimeError("backward needs one forward inside `with dual.watch():`, and takes it once")
        if losses.ndim != 1 or weights.shape != losses.shape:
            raise ValueError(
                f"losses and weights must both be [B], got shapes {tuple(losses.shape)} and {tuple(weights.shape)}"
            )
        if weights.requires_grad:
            raise TypeError("weights must not require a gradient: detach them")
        if not 0 <= n_forget <= len(losses):
            raise ValueError(f"n_forget must be between 0 and {len(losses)}, the number of losses, got {n_forget}")
        weights = weights.to(losses)
        split = _Split(self.parameters, len(losses), n_forget, weights)
        try:
            with torch.autocast(losses.device.type, enabled=False):  # a gradient has the precision of its forward
                return self._backward(tape, losses, split)
        finally:
            tape.clear()

    def _backward(self, tape: capture.Tape, losses: Tensor, split: _Split) -> tuple[Gradients, Gradients]:
        if not all(split.alive) or not losses.requires_grad:
            return split.two_backwards(losses)  # of which there is one at most
        survey = self._survey(tape, losses)
        if survey is not None and self.how != ONE:
            self._verify(losses, survey)
        if survey is not None and self.how == ONE:
            return split.one_backward(losses, survey)
        return split.two_backwards(losses)

    def _survey(self, tape: capture.Tape, losses: Tensor) -> capture.Survey | None:
        """The calls that one backward would do with, or None, and the reason is told."""
        if self.how not in (ONE, "not chosen yet"):
            return None
        survey = tape.survey(losses, self.parameters)
        if reason := tape.refusal or capture.why_not(self.model, survey, len(losses)):
            self._fall_back(reason)
            return None
        return survey

    def _fall_back(self, reason: str) -> None:
        self.how = f"two backwards: {reason}"
        logger.info("dual gradients take %s", self.how)

    def _verify(self, losses: Tensor, survey: capture.Survey) -> None:
        """Whether both ways agree on this graph, with the samples halved and weights of 1: the caller's may be 0, with
        which any split would pass."""
        split = _Split(self.parameters, len(losses), len(losses) // 2, torch.ones_like(losses))
        wanted = split.two_backwards(losses, retain_graph=True)
        if not all(bool(g.isfinite().all()) for half in wanted for g in half if g is not None):
            return
        found = split.one_backward(losses, survey, retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            scale = _total_norm(theirs)
            for parameter, a, b in zip(self.parameters, ours, theirs, strict=True):
                if not _alike(a, b, scale, split.coarsest):
                    owner = capture.owner(self.model, parameter).split(":")[0]
                    self._fall_back(f"{owner}: its gradient by rows is not that of the samples")
                    return
        self.how = ONE


class _Split:
    """The two parts of a batch: [0, n_forget) and the rest."""

    def __init__(self, parameters: list[nn.Parameter], samples: int, n_forget: int, weights: Tensor) -> None:
        self.parameters = parameters
        self.samples = samples
        self.parts = ((0, n_forget), (n_forget, samples))
        self.weights = weights
        self.coarsest = torch.float64
        on_cpu = weights.device.type == "cpu"
        self.alive = [a < b and not (on_cpu and not bool(weights[a:b].any())) for a, b in self.parts]

    def nothing(self) -> Gradients:
        return [None] * len(self.parameters)

    def two_backwards(self, losses: Tensor, *, retain_graph: bool = False) -> tuple[Gradients, Gradients]:
        found = []
        for which, (start, stop) in enumerate(self.parts):
            if not self.alive[which] or not losses.requires_grad:
                found.append(self.nothing())
                continue
            weights = torch.zeros_like(self.weights)
            weights[start:stop] = self.weights[start:stop]
            keep = retain_graph or (which == 0 and self.alive[1])
            trainable = [p for p in self.parameters if p.requires_grad]
            gradients = iter(torch.autograd.grad(losses, trainable, weights, retain_graph=keep, allow_unused=True))
            found.append([next(gradients) if p.requires_grad else None for p in self.parameters])
        return found[0], found[1]

    def one_backward(
        self, losses: Tensor, survey: capture.Survey, *, retain_graph: bool = False
    ) -> tuple[Gradients, Gradients]:
        place = {id(p): at for at, p in enumerate(self.parameters) if p.requires_grad}
        sums = self.nothing(), self.nothing()

        def add(which: int, parameter: Tensor, gradient: Tensor | None) -> None:
            if gradient is not None:
                into, at = sums[which], place[id(parameter)]
                gradient, before = gradient.to(parameter.dtype), into[at]
                into[at] = gradient if before is None else before + gradient

        def receive(call: Call, gradient: Tensor) -> None:
            self.coarsest = max(self.coarsest, gradient.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            each = call.rows // self.samples
            for which, (start, stop) in enumerate(self.parts):
                if start < stop:
                    rows = slice(start * each, stop * each)
                    for part in parts_of(call.narrow(rows.start, rows.stop), gradient[rows], stop - start, place):
                        add(which, part.parameter, part.total())

        def receive_broadcast(broadcast: Broadcast, gradient: Tensor) -> None:
            each = broadcast.rows // self.samples
            for which, (start, stop) in enumerate(self.parts):
                if start < stop:
                    totals = broadcast.total(gradient, start * each, stop * each)
                    for parameter, total in zip(broadcast.parameters, totals, strict=True):
                        add(which, parameter, total)

        with torch.no_grad():
            capture.backward(losses, self.weights, survey, receive, receive_broadcast, retain_graph=retain_graph)
        return sums


def _total_norm(gradients: Gradients) -> float:
    found = [g.double().norm() for g in gradients if g is not None]
    return float(torch.stack(found).norm()) if found else 0.0


def _alike(a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype) -> bool:
    if a is None or b is None:
        return a is b
    # A gradient that is 0 but for rounding, such as that of a bias before a norm, is held to the rounding of the rest.
    rounding = 16 * torch.finfo(dtype).eps * scale
    return float((a.double() - b.double()).norm()) <= TOLERANCES[dtype] * float(b.double().norm()) + rounding
