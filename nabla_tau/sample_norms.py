"""Per-sample gradient norms and Fisher information, without per-sample gradients where a model's layers allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nabla_tau import capture
from nabla_tau.batch import Batch, Forward, default_forward, to_device, uses_batch_statistics
from nabla_tau.broadcasts import Broadcast
from nabla_tau.each_sample import Losses, SampleLoss, count_of, looped, sample_gradients
from nabla_tau.functional import has_loss
from nabla_tau.kernels.reference import compute_dtype
from nabla_tau.layers import Call, parts_of
from nabla_tau.parts import Dense, Part, merge

logger = logging.getLogger("nabla_tau")

# How far the norms of the two ways may differ on the samples of a model's first batch that are computed in both:
# rounding only.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}

# Of a model, what of it was looked at, and why its layers cannot be used; empty where they can.
_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def sample_gradient_norms(
    model: nn.Module, batch: Batch, *, forward: Forward | None = None, loss: SampleLoss | None = None
) -> Tensor:
    """Squared norm of the gradient of each sample's own loss by all trainable parameters together, [B].

    One forward and one backward that computes no weight's gradient; the norms follow from each layer's inputs and
    output gradients (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679). For which layers that is
    exact: as in `nabla_tau.gradients.DualGradients`; a model's first batch is checked on two of its samples. For other
    models the per-sample gradients are made by torch.func, some samples at a time, or where that fails one sample at
    a time; the log says so once.

    batch, forward: as in `nabla_tau.batch`. loss: (logits, targets) -> losses [B], instead of the cross-entropies. The
    model is used as it stands, so eval mode is the caller's choice; nothing of it is changed. The result is float32,
    or float64 where the parameters are. Raises ValueError for a model without trainable parameters, or one that
    normalises with the statistics of its batch: there a sample has no gradient of its own.
    """
    task = _Task.of(model, forward, loss)
    batch = to_device(batch, task.parameters[0].device)
    norms: list[Tensor] = []
    if task.by_layers(batch, lambda part: norms.append(part.norms())) is not None:
        return torch.stack(norms).sum(0)
    return torch.cat([_norms(gradients) for gradients in sample_gradients(task.losses, task.names, batch)])


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Batch], *, forward: Forward | None = None, loss: SampleLoss | None = None
) -> dict[str, Tensor]:
    """Mean over the samples of the squared gradient of a sample's loss, entry by entry: the diagonal of the empirical
    Fisher information, per sample (the squared gradient of a batch's mean loss is smaller by about the batch size).

    {name: tensor of the parameter's shape, float32 or, where the parameter is, float64} for the trainable parameters
    by `named_parameters`. Samples whose targets are all `ignore_index` do not count. Everything else as in
    `sample_gradient_norms`; raises ValueError also where no sample counts.
    """
    task = _Task.of(model, forward, loss)
    total = {name: torch.zeros_like(p, dtype=compute_dtype(p)) for name, p in zip(*task[1:3], strict=True)}
    names = {id(p): name for name, p in zip(*task[1:3], strict=True)}
    count = torch.zeros((), dtype=torch.int64, device=task.parameters[0].device)

    def add(part: Part) -> None:
        total[names[id(part.parameter)]] += part.squares()

    for batch in batches:
        batch = to_device(batch, task.parameters[0].device)
        targets = task.by_layers(batch, add)
        if targets is None:
            for gradients in sample_gradients(task.losses, task.names, batch):
                for name, gradient in zip(task.names, gradients, strict=True):
                    total[name] += gradient.to(total[name].dtype).square().sum(0)
            with torch.no_grad():
                targets = task.losses.of(batch)[1]
        count += has_loss(targets).sum() if loss is None else len(targets)
    if not int(count):
        raise ValueError("the Fisher information needs at least one sample with a loss, got none")
    return {name: square.div_(count) for name, square in total.items()}


def _norms(gradients: list[Tensor]) -> Tensor:
    """Squared norms [n] of gradients [n, ...]."""
    return torch.stack([g.flatten(1).to(compute_dtype(g)).square().sum(1) for g in gradients]).sum(0)


class _Task(NamedTuple):
    losses: Losses
    names: list[str]
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, forward: Forward | None, loss: SampleLoss | None) -> _Task:
        if (mixing := uses_batch_statistics(model)) is not None:
            raise ValueError(
                f"{mixing} normalises with the statistics of its batch, so a sample has no gradient of its own: "
                "put the model in eval mode first"
            )
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("the model has no trainable parameter (requires_grad is False everywhere)")
        losses = Losses(model, forward or default_forward, loss)
        return cls(losses, list(trainable), list(trainable.values()))

    def by_layers(self, batch: Batch, use: Callable[[Part], object]) -> Tensor | None:
        """Give every parameter's part, all samples and all uses of it together, to `use`; the batch's targets. None
        where that is not exact for this model: then nothing was given."""
        model = self.losses.model
        state = [(id(m), m.training) for m in model.modules()], self.names, self.losses.key()
        before, reason = _known.get(model, (None, ""))
        checked = before == state
        if checked and reason:
            return None
        with torch.enable_grad(), capture.recording(model, self.parameters) as tape:
            losses, targets = self.losses.of(batch)
        try:
            survey = tape.survey(losses, self.parameters)
            reason = tape.refusal or capture.why_not(model, survey, len(losses))
            if not reason and not checked:
                norms: list[Tensor] = []
                coarsest = self._parts(losses, survey, lambda part: norms.append(part.norms()), retain_graph=True)
                reason = self._difference(batch, norms, len(losses), coarsest)
            _known[model] = state, reason
            if reason:
                logger.info("per-sample gradients are made one by one: %s", reason)
                return None
            self._parts(losses, survey, use)
        finally:
            tape.clear()
        return targets

    def _parts(
        self, losses: Tensor, survey: capture.Survey, use: Callable[[Part], object], *, retain_graph: bool = False
    ) -> torch.dtype:
        """Give the parts to `use`; the coarsest dtype of a gradient on the way, which autocast chooses."""
        coarsest = torch.float64
        wanted = {id(p) for p in self.parameters}
        uses = survey.uses()
        waiting: dict[int, list[Part]] = {}

        def add(part: Part) -> None:
            if uses[id(part.parameter)] == 1:
                use(part)
            else:  # the norm of a sum is not the sum of norms
                waiting.setdefault(id(part.parameter), []).append(part)

        def receive(call: Call, gradient: Tensor) -> None:
            nonlocal coarsest
            coarsest = max(coarsest, gradient.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            for part in parts_of(call, gradient, len(losses), wanted):
                add(part)

        def receive_broadcast(broadcast: Broadcast, gradient: Tensor) -> None:
            gradients = broadcast.each(gradient, len(losses))
            for parameter, own in zip(broadcast.parameters, gradients, strict=True):
                if own is not None:
                    add(Dense(parameter, len(losses), own))

        ones = torch.ones_like(losses)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            capture.backward(losses, ones, survey, receive, receive_broadcast, retain_graph=retain_graph)
            for parts in waiting.values():
                use(merge(parts))
        return coarsest

    def _difference(self, batch: Batch, norms: list[Tensor], count: int, dtype: torch.dtype) -> str:
        """Whether the first and the last sample have these norms when each is alone in its batch."""
        if not norms:
            return "the losses reach no layer that has parameters"
        if count_of(batch) != count:
            return ""  # no sample can be cut out, as of bags that lie end to end
        places = sorted({0, count - 1})
        norm = torch.stack(norms).sum(0).double()
        found, rounding = norm[places], float(norm.max()) ** 0.5 * torch.finfo(dtype).eps
        alone = torch.cat([_norms(g) for g in looped(self.losses, self.names, batch, places)]).double()
        if torch.allclose(found.sqrt(), alone.sqrt(), rtol=TOLERANCES[dtype], atol=rounding, equal_nan=True):
            return ""
        return (
            "a sample's gradient is another one when the sample is alone: samples influence each other, or chance does"
        )


__all__ = ["fisher_diagonal", "sample_gradient_norms"]
