"""Before the first step: the three data sets, what kind of forget set it is, and everything that can be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nabla_tau import fingerprint
from nabla_tau.batch import Forward, sample_count, split_targets, tensors_of, to_device
from nabla_tau.classes import ForgetKindReport, forget_kind
from nabla_tau.distributed import Ranks, unwrapped
from nabla_tau.evaluation import SampleLoss, device_of, forward_batches
from nabla_tau.functional import Task, check_labels, check_multilabel, infer_task
from nabla_tau.placement import free_memory, place_of, placed
from nabla_tau.sources import Source, TensorSource, as_source, count_shared, split_held_out


@dataclass(frozen=True)
class Prepared:
    """Data that has been looked at. task is None with a loss of the caller's own; fingerprints: of each data set and
    of the model's weights. counts: samples of each, over all ranks."""

    forget: Source
    retain: Source
    held_out: Source
    task: Task | None
    kind: ForgetKindReport
    fingerprints: dict[str, str]
    warnings: list[str]
    counts: dict[str, int]

    @property
    def places(self) -> dict[str, str]:
        """Where each set lies (`placement.place_of`)."""
        return {name: place_of(getattr(self, name)) for name in ("forget", "retain", "held_out")}


def prepare(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    held_out: Any,
    forward: Forward | None,
    loss: SampleLoss | None,
    retain_is_unseen: bool,
    seed: int,
    ranks: Ranks,
    sharded: bool,
    performance: str = "auto",
) -> Prepared:
    """Look at model and data once. Raises the TypeErrors and ValueErrors that `unlearn` promises."""
    if held_out is None:
        raise ValueError(
            "held_out is None: tau is the loss of data the model was never trained on, so it cannot be estimated "
            "without. If the model was never trained on retain, pass held_out=0.2 and retain_is_unseen=True"
        )
    sources = {"forget": as_source(forget, "forget"), "retain": as_source(retain, "retain")}
    if isinstance(held_out, float):
        if not retain_is_unseen:
            raise ValueError(
                f"held_out={held_out} takes a share of retain, which gives a tau only if the model was never trained "
                "on retain: say so with retain_is_unseen=True, or give held-out data"
            )
        sources["retain"], sources["held_out"] = split_held_out(sources["retain"], held_out, seed)
    else:
        sources["held_out"] = as_source(held_out, "held_out")
    targets = {name: None if loss else _targets(model, source, forward, ranks) for name, source in sources.items()}
    _check_alike(model, sources, forward)
    task = None if loss else _check_targets(model, sources["forget"], targets, forward)
    warnings = []
    shared = count_shared(forget, retain)
    if shared:
        count = sources["forget"].count
        warnings.append(f"{shared} of {count} forget samples are in the retain set too, which teaches them")
    if any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        warnings.append("the model has float16 weights, in which small updates are lost: use float32 or bfloat16")
    counts = {name: source.count for name, source in sources.items()}
    fingerprints = {name: fingerprint.of_source(source, targets[name]) for name, source in sources.items()}
    fingerprints["model"] = fingerprint.of_model(model)
    every = ranks.objects((targets if sharded else None, counts, fingerprints))
    if sharded:
        targets = {name: _joined([rank[0][name] for rank in every]) for name in sources}
        counts = {name: sum(rank[1][name] for rank in every) for name in sources}
        of_model = fingerprints.pop("model")
        fingerprints = {name: fingerprint.of_texts([rank[2][name] for rank in every]) for name in fingerprints}
        fingerprints["model"] = of_model
    for name in fingerprints:
        if len({rank[2][name] for rank in every}) > 1 and (name == "model" or not sharded):
            what = (
                "must have the same weights"
                if name == "model"
                else ("must give the whole data (each takes its share of every batch), or data_is_sharded=True")
            )
            raise ValueError(f"{name} differs between the ranks: all {what}")
    kind = forget_kind(targets["forget"], targets["retain"])
    if performance == "auto":
        device = device_of(model)
        sources = placed(sources, device, free_memory(device))
    return Prepared(**sources, task=task, kind=kind, fingerprints=fingerprints, warnings=warnings, counts=counts)


def _joined(labels: list[Tensor | None]) -> Tensor | None:
    return (
        None if any(part is None for part in labels) else torch.cat([part.cpu() for part in labels if part is not None])
    )


def _targets(model: nn.Module, source: Source, forward: Forward | None, ranks: Ranks) -> Tensor | None:
    """One label a sample, or None. A forward of the caller's own may take the targets from elsewhere in a batch, or
    make them; only where it does must the whole set go through the model to know them."""
    if forward is None or ranks.all(_gives_the_batch_s_own_targets(model, source, forward)):
        return source.targets()
    # Every rank reads what it was given: its answer is compared with, or joined to, those of the others.
    found = [
        targets.cpu()
        for _, batch, own in ranks.in_step(source.read(256), sample_count)
        for _, targets in forward_batches(unwrapped(model), [batch], forward)
        if own
    ]
    return torch.cat(found) if all(targets.ndim == 1 for targets in found) else None


def _gives_the_batch_s_own_targets(model: nn.Module, source: Source, forward: Forward) -> bool:
    """Whether the forward hands on the very tensor that is taken for the targets of a batch, seen on one batch."""
    batch = to_device(next(iter(source.read(2))), device_of(model))
    try:
        own = split_targets(batch)[2]
    except (TypeError, ValueError):
        return False
    ((_, targets),) = forward_batches(unwrapped(model), [batch], forward)
    return targets is own


def _check_targets(
    model: nn.Module, source: Source, targets: dict[str, Tensor | None], forward: Forward | None
) -> Task:
    """Task of the model's logits; ValueError for a label out of range, which no step on a GPU looks for."""
    logits, some = next(forward_batches(unwrapped(model), source.read(2), forward))
    task = infer_task(logits, some)
    for name, labels in targets.items():
        try:
            if task == "classification" and labels is not None:
                check_labels(labels, logits.shape[1])
            elif task == "multilabel" and labels is not None:
                check_multilabel(labels)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if task == "multilabel":
        check_multilabel(some)
    return task


def _check_alike(model: nn.Module, sources: dict[str, Source], forward: Forward | None) -> None:
    """ValueError for tensors that the model cannot take, in a set that is not of the forget set's shapes."""

    def shapes(source: TensorSource) -> list[Any]:
        return [(tensor.shape[1:], tensor.dtype) for tensor in tensors_of(source.tensors)]

    forget = sources["forget"]
    for name, source in sources.items():
        if isinstance(source, TensorSource) and isinstance(forget, TensorSource) and shapes(source) != shapes(forget):
            try:
                next(forward_batches(unwrapped(model), source.read(2), forward))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
