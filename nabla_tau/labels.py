"""What can be known of a data set without loading its samples: which of them a loader gives, and their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from nabla_tau.batch import LABEL_KEYS, Batch, split_targets
from nabla_tau.seeding import RandomState

Collate = Callable[[list[Any]], Batch]

PROBES = 32  # labels that are compared with what the data set really gives


def drawn_indices(loader: DataLoader[Any]) -> Sequence[int] | None:
    """Indices of the samples that a pass of a loader goes through, in some order, each once; None where it may not.

    With drop_last the last ones in the order of that pass are left out.
    """
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler: Any = loader.batch_sampler.sampler
    indices: Sequence[int] | None = None
    if type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement):
        indices = range(len(loader.dataset))  # type: ignore[arg-type]
    elif type(sampler) is SubsetRandomSampler:
        indices = [int(index) for index in sampler.indices]
    return indices if indices is not None and len(sampler) == len(indices) else None


def fetch(dataset: Dataset[Any], indices: list[int], collate: Collate) -> Batch:
    """The batch of these samples, as a DataLoader makes it."""
    many = getattr(dataset, "__getitems__", None)
    samples = many(indices) if many else [dataset[index] for index in indices]
    try:
        return collate(samples)
    except RuntimeError as error:  # as default_collate raises for samples of different shapes
        raise ValueError(f"samples {indices[:5]} of a data set cannot be put into one batch: {error}") from error


def batch_labels(batch: Batch) -> Tensor | None:
    """Targets of a batch where they are one number a sample, [B]; else None."""
    try:
        targets = split_targets(batch)[2]
    except (TypeError, ValueError):
        return None
    return targets if targets.ndim == 1 else None


def read_labels(batches: Iterable[Batch], count: int) -> Tensor | None:
    """Labels of all batches on the CPU, [N]; None where they are not one number a sample (of `count` samples)."""
    parts: list[Tensor] = []
    for batch in batches:
        labels = batch_labels(batch)
        if labels is None:
            return None
        parts.append(labels.cpu())
    # More numbers than samples are no labels of samples (tokens in one line). A collate_fn may drop some.
    return torch.cat(parts) if parts and sum(map(len, parts)) <= count else None


def stored_labels(dataset: Dataset[Any], indices: Sequence[int], collate: Collate) -> Tensor | None:
    """Labels of these samples from an attribute of the data set, [N]; None where it has none to be believed.

    They are believed when samples of every label (of at most PROBES) are given with that very label.
    """
    stored = _attribute(dataset)
    if stored is None:
        return None
    stored = stored[torch.as_tensor(indices, dtype=torch.long)]
    first = np.unique(stored.double().numpy(), return_index=True)[1]
    chosen = first[np.linspace(0, len(first) - 1, min(PROBES, len(first))).astype(int)]
    spread = np.linspace(0, len(stored) - 1, min(4, len(stored))).astype(int)
    probes = torch.as_tensor(np.union1d(chosen, spread))
    with RandomState():
        given = batch_labels(fetch(dataset, [int(indices[probe]) for probe in probes.tolist()], collate))
    if given is None or not torch.equal(given.cpu().double(), stored[probes].double()):
        return None
    return stored.to(given.dtype)


def _attribute(dataset: Any) -> Tensor | None:
    """What a data set holds as labels, unchecked."""
    transforms = getattr(dataset, "transforms", None)  # torchvision joins both transforms in it, mostly to no effect
    if (
        getattr(dataset, "target_transform", None) is not None
        or getattr(transforms, "target_transform", transforms) is not None
    ):
        return None
    if isinstance(dataset, Subset):
        whole = _attribute(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    values = [getattr(dataset, name, None) for name in ("targets", *LABEL_KEYS)]
    if isinstance(dataset, TensorDataset):
        values = [dataset.tensors[-1]]
    for value in values:
        if isinstance(value, (Tensor, np.ndarray, list)) and len(value) == len(dataset):
            try:
                labels = torch.as_tensor(value).detach().cpu()
            except (TypeError, ValueError, RuntimeError):  # strings, or lists of different lengths
                continue
            return labels if labels.ndim == 1 else None
    return None
