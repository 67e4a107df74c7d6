"""One forward pass over a data set: every signal that tau, the history and the audit need."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nabla_tau.arguments import numbers_checked, whole
from nabla_tau.batch import Batch, Forward, default_forward, sample_count, tensors_of, to_device
from nabla_tau.distributed import WHOLE, ProcessGroup, Ranks, Share, ranks_of, unwrapped
from nabla_tau.functional import Task, has_loss, infer_task, sample_losses, sample_signals
from nabla_tau.sources import as_source

SampleLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Signals:
    """What an attacker (or an auditor) sees of each sample, 1-D arrays in the order of the data set.

    loss, entropy and margin are float64 (margin = log p_y - log(1 - p_y)); correct is bool; target is the int64 label
    in classification, None otherwise. With a loss function of one's own only `loss` is known: the others are None.
    """

    loss: NDArray[np.float64]
    entropy: NDArray[np.float64] | None
    margin: NDArray[np.float64] | None
    correct: NDArray[np.bool_] | None
    target: NDArray[np.int64] | None
    task: Task | None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def accuracy(self) -> float | None:
        """Share of correct samples; in multi-label tasks of samples with every label right."""
        return None if self.correct is None else float(np.mean(self.correct))

    def select(self, mask: NDArray[np.bool_]) -> Signals:
        """The signals of the samples where mask [N] is True."""

        def cut(column: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if column is None else column[mask]

        return dataclasses.replace(
            self,
            loss=self.loss[mask],
            entropy=cut(self.entropy),
            margin=cut(self.margin),
            correct=cut(self.correct),
            target=cut(self.target),
        )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def forward_batches(
    model: nn.Module, batches: Iterable[Batch], forward: Forward | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets batch by batch, in eval mode and without gradient."""
    device = device_of(model)
    for batch in batches:
        # Not around the loop: between two batches the caller's own modes hold.
        with evaluation_mode(model), torch.no_grad():
            output = _output(model, to_device(batch, device), forward or default_forward)
        yield output


def _output(model: nn.Module, batch: Batch, forward: Forward) -> tuple[Tensor, Tensor]:
    try:
        output: Any = forward(model, batch)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, IndexError) as error:
        if not _from_torch(error):
            raise
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors_of(batch))
        raise ValueError(f"the model cannot take a batch of {shapes}: {error}") from error
    if not isinstance(output, (tuple, list)) or [isinstance(entry, Tensor) for entry in output] != [True, True]:
        raise TypeError(f"forward must give two tensors, (logits, targets), got {type(output).__name__}")
    logits, targets = output
    return logits, targets


def _from_torch(error: Exception) -> bool:
    """Whether it is PyTorch that says no, and not code of the caller's own."""
    frame = [*traceback.walk_tb(error.__traceback__)][-1][0]
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"


def over_samples(
    model: nn.Module,
    read: Callable[[Share], Iterable[Batch]],
    compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    *,
    forward: Forward | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> list[Tensor]:
    """What `compute` makes of the logits and targets of each batch, some tensors [B, ...], of all samples [N, ...].

    read: the batches, of which a rank looks at its share; everyone gets all of it, in the order of one process. With
    `sharded` data each rank reads its own, and the order is that of the ranks.
    """
    ranks = ranks or Ranks()
    parts: list[tuple[Tensor, ...]] = []
    numbers: list[int] = []
    batches = read(WHOLE if sharded else ranks.share)
    # DDP would send buffers around, which nothing changes here.
    for number, batch, own in ranks.in_step(batches, sample_count):
        for logits, targets in forward_batches(unwrapped(model), [batch], forward):
            if own:
                parts.append(compute(logits, targets))
                numbers += [number] * len(parts[-1][0])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if ranks.size == 1:
        return columns
    gathered = [found for found in ranks.objects((numbers, [c.cpu() for c in columns])) if found[0]]
    order = torch.tensor([number for found in gathered for number in found[0]])
    order = torch.arange(len(order)) if sharded else order.argsort(stable=True)
    device = device_of(model)
    return [torch.cat(column)[order].to(device) for column in zip(*(found[1] for found in gathered), strict=True)]


def checked_losses(loss: SampleLoss | None, logits: Tensor, targets: Tensor) -> Tensor:
    """Per-sample losses [B], by the caller's function where there is one; ValueError for any other shape."""
    losses = (loss or sample_losses)(logits, targets)
    if not isinstance(losses, Tensor):
        raise TypeError(f"the loss function must give a tensor of losses, [B], got {type(losses).__name__}")
    if losses.ndim != 1:
        raise ValueError(f"the loss function must give one loss a sample, [B], got shape {tuple(losses.shape)}")
    return losses


def counting_losses(loss: SampleLoss | None, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`checked_losses` [B], and which samples count [B] (`functional.has_loss`)."""
    losses = checked_losses(loss, logits, targets)
    return losses, has_loss(targets) if loss is None else torch.ones_like(losses, dtype=torch.bool)


def mean_loss(
    model: nn.Module,
    read: Callable[[Share], Iterable[Batch]],
    *,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> float:
    """Mean loss of the samples of some batches (`over_samples`), in eval mode and without gradient."""
    losses, counts = over_samples(
        model, read, lambda *output: counting_losses(loss, *output), forward=forward, ranks=ranks, sharded=sharded
    )
    return float(losses[counts].double().mean())


@numbers_checked
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    batch_size: int = 256,
    process_group: ProcessGroup | None = None,
) -> Signals:
    """Signals of every sample of a data set, in eval mode; the model's modes and gradients are left as they were.

    data: tensors, Dataset or DataLoader (`nabla_tau.sources.as_source`). forward: (model, batch) -> (logits, targets),
    where the model is not simply called on the inputs. loss: (logits, targets) -> per-sample losses [B], for a model
    that is not a classifier. Raises TypeError and ValueError for data and shapes that do not fit.

    A model under DDP or FSDP2 is evaluated by all of its ranks, each on a share of every batch, and so is a plain model
    that is the same on every rank of `process_group`: all must call this, with the same data, and all get the signals
    of all samples, in the order of one process.
    """
    whole(batch_size, "batch_size", least=1)
    source = as_source(data, "data")
    ranks = ranks_of(model, process_group)
    tasks: list[Task] = []

    def signals_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        if loss is not None:
            return (checked_losses(loss, logits, targets),)
        tasks.append(infer_task(logits, targets))
        signals = sample_signals(logits, targets)
        labels = (targets,) if tasks[-1] == "classification" else ()
        return signals.loss, signals.entropy, signals.margin, signals.correct, *labels

    columns = over_samples(
        model, lambda share: source.read(batch_size, share=share), signals_of, forward=forward, ranks=ranks
    )
    task = next((found for found in ranks.objects(tasks[-1] if tasks else None) if found is not None), None)
    joined = [column.cpu() for column in columns]
    arrays: list[NDArray[Any]] = [c.double().numpy() if c.is_floating_point() else c.numpy() for c in joined]
    if len(arrays) == 1:
        return Signals(arrays[0], None, None, None, None, None)
    target = arrays[4].astype(np.int64) if task == "classification" else None
    return Signals(arrays[0], arrays[1], arrays[2], arrays[3], target, task)
