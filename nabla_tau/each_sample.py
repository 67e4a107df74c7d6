"""Per-sample gradients of any model, made as such: what is left where its layers do not give them away."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch, Forward, map_leaves, map_tensors, tensors_of
from nabla_tau.functional import infer_task, sample_losses, samples_of_rows
from nabla_tau.kernels import reference

SampleLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
CHUNK_BYTES = 256 << 20  # of per-sample gradients


class Losses(nn.Module):
    """Per-sample losses [B] of a batch as a module, so that torch.func can put other parameters in place."""

    def __init__(self, model: nn.Module, forward: Forward, loss: SampleLoss | None) -> None:
        super().__init__()
        self.model = model
        self._forward, self._loss = forward, loss

    def key(self) -> list[object]:
        """Tells one forward and loss from another, without keeping alive what they may refer to."""
        return [getattr(function, "__code__", type(function)) for function in (self._forward, self._loss)]

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses and targets of a batch, as the model stands."""
        found: tuple[Tensor, Tensor] = self(batch)
        return found

    def forward(self, batch: Batch, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Losses and targets; ValueError for losses that are not [B]. plain: by operations that torch.func knows."""
        logits, targets = self._forward(self.model, batch)
        losses = (self._loss or (_plain_losses if plain else sample_losses))(logits, targets)
        if losses.ndim != 1:
            raise ValueError(f"the loss function must give one loss a sample, [B], got shape {tuple(losses.shape)}")
        return losses, targets


def _plain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    task = infer_task(logits, targets)
    if task == "multilabel":
        return reference.multilabel_rows(logits, targets).loss
    if task == "classification":
        return reference.rows(logits, targets.long()).loss
    rows = reference.rows(logits.flatten(0, 1), targets.long().flatten())
    return samples_of_rows(rows, targets.long() != reference.IGNORE_INDEX).loss


def count_of(batch: Batch) -> int:
    """Samples of a batch: the length of its first tensor."""
    lengths = [len(tensor) for tensor in tensors_of(batch) if tensor.ndim]
    if not lengths:
        raise ValueError("the batch has no tensor with one entry a sample")
    return lengths[0]


def one_of(batch: Batch, at: int) -> Batch:
    """The batch of the sample at this place alone."""
    count = count_of(batch)

    def cut(leaf: Any) -> Any:
        per_sample = (isinstance(leaf, Tensor) and leaf.ndim > 0) or isinstance(leaf, (list, tuple))
        return leaf[at : at + 1] if per_sample and len(leaf) == count else leaf

    return map_leaves(cut, batch)


def looped(losses: Losses, names: Sequence[str], batch: Batch, places: Sequence[int]) -> Iterator[list[Tensor]]:
    """Gradients [1, ...] by each named parameter, sample by sample."""
    found = dict(losses.model.named_parameters())
    parameters = [found[name] for name in names]
    for at in places:
        own, _ = losses.of(one_of(batch, at))
        if own.shape != (1,):
            raise ValueError(f"cannot cut one sample out of the batch: it then has {len(own)} losses instead of one")
        gradients = torch.autograd.grad(own.sum(), parameters, allow_unused=True)
        yield [(torch.zeros_like(p) if g is None else g)[None] for p, g in zip(parameters, gradients, strict=True)]


def vectorised(losses: Losses, names: Sequence[str], batch: Batch) -> Iterator[list[Tensor]]:
    """The same [n, ...] for n samples at a time, by torch.func; raises whatever it cannot do."""
    own = {f"model.{name}": p.detach() for name, p in losses.model.named_parameters()}
    wanted = {f"model.{name}": own.pop(f"model.{name}") for name in names}
    count = count_of(batch)

    def loss_of(parameters: dict[str, Tensor], at: Tensor) -> Tensor:
        one = map_tensors(lambda t: t.index_select(0, at) if t.ndim and len(t) == count else t, batch)
        found: Tensor = torch.func.functional_call(losses, (parameters, own), (one, True))[0]
        return found.sum()

    gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0), randomness="different")
    size = min(64, max(1, CHUNK_BYTES // max(1, sum(p.nbytes for p in wanted.values()))))
    places = torch.arange(count, device=tensors_of(batch)[0].device).unsqueeze(1)
    for start in range(0, count, size):
        found = gradients(wanted, places[start : start + size])
        yield [found[name] for name in wanted]


def sample_gradients(losses: Losses, names: Sequence[str], batch: Batch) -> Iterator[list[Tensor]]:
    """Gradients of each sample's loss by the named parameters, each [n, ...], some samples at a time."""
    count = count_of(batch)
    if all(not isinstance(leaf, (list, tuple)) for leaf in _others(batch)):
        done = 0
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                for part in vectorised(losses, names, batch):
                    yield part
                    done += len(part[0])
        except Exception:  # torch.func does not say beforehand what it cannot do
            if done:
                raise
        if done:
            return
    yield from looped(losses, names, batch, range(count))


def _others(batch: Batch) -> list[Any]:
    found: list[Any] = []
    map_leaves(lambda leaf: None if isinstance(leaf, Tensor) else found.append(leaf), batch)
    return found
