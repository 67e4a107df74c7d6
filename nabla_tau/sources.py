"""Where batches come from: tensors, Datasets and DataLoaders behind one interface, in an order that can be resumed.

The order of every pass is a function of (seed, role, pass number) alone, so a run that was cut off finds its place
again without having stored a permutation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from nabla_tau.batch import LABEL_KEYS, Batch, map_tensors, split_targets, tensors_of


class Source(Protocol):
    """A finite set of samples that can be read batch by batch, in a seeded order or (seed None) as it stands."""

    count: int

    def batches_per_pass(self, batch_size: int) -> int: ...
    def read(self, batch_size: int, seed: int | None = None, skip: int = 0) -> Iterator[Batch]: ...
    def targets(self) -> Tensor: ...


def derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _permutation(count: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class TensorSource:
    """Tensors with one line a sample: batches are gathered on the device that holds them."""

    def __init__(self, tensors: Batch, name: str) -> None:
        lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors_of(tensors)}
        if len(lengths) != 1:
            shapes = [tuple(tensor.shape) for tensor in tensors_of(tensors)]
            raise ValueError(f"{name}: tensors must have the same number of samples, got shapes {shapes}")
        self.tensors = tensors
        self.count = lengths.pop()

    def batches_per_pass(self, batch_size: int) -> int:
        return math.ceil(self.count / batch_size)

    def read(self, batch_size: int, seed: int | None = None, skip: int = 0) -> Iterator[Batch]:
        order = _permutation(self.count, seed).to(tensors_of(self.tensors)[0].device)
        for start in range(skip * batch_size, self.count, batch_size):
            index = order[start : start + batch_size]
            yield map_tensors(lambda tensor, index=index: tensor[index.to(tensor.device)], self.tensors)

    def targets(self) -> Tensor:
        return split_targets(self.tensors)[2]


class DatasetSource:
    """A map-style Dataset, collated as a DataLoader does."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.count = len(dataset)  # type: ignore[arg-type]

    def batches_per_pass(self, batch_size: int) -> int:
        return math.ceil(self.count / batch_size)

    def read(self, batch_size: int, seed: int | None = None, skip: int = 0) -> Iterator[Batch]:
        order = torch.split(_permutation(self.count, seed), batch_size)[skip:]
        return iter(DataLoader(self.dataset, batch_sampler=[index.tolist() for index in order]))

    def targets(self) -> Tensor:
        found = dataset_targets(self.dataset)
        return _read_targets(self.read(256)) if found is None else found


class LoaderSource:
    """The caller's own DataLoader: its batch size, sampler, workers and collation are kept."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.count = len(loader.dataset)  # type: ignore[arg-type]

    def batches_per_pass(self, batch_size: int) -> int:
        return len(self.loader)

    def read(self, batch_size: int, seed: int | None = None, skip: int = 0) -> Iterator[Batch]:
        if seed is None:
            yield from self.loader
            return
        # A sampler draws its order when the first batch is asked for, from the loader's generator or from the global
        # one. What comes later (random transforms) goes on with the global state, which a checkpoint holds: so the
        # batches that a resumed run skips are read in here, and no further one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.loader.generator is not None:
                self.loader.generator.manual_seed(seed)
            iterator = iter(self.loader)
            opening = list(itertools.islice(iterator, max(skip, 1)))
        yield from opening[skip:]
        yield from iterator

    def targets(self) -> Tensor:
        found = dataset_targets(self.loader.dataset)
        return _read_targets(self.read(0)) if found is None else found


def dataset_targets(dataset: Dataset[Any]) -> Tensor | None:
    """All targets of a dataset without loading its samples, where it has them at hand; else None."""
    if isinstance(dataset, Subset):
        whole = dataset_targets(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    for name in ("targets", *LABEL_KEYS):
        value = getattr(dataset, name, None)
        if isinstance(value, (Tensor, np.ndarray, list)) and len(value) == len(dataset):  # type: ignore[arg-type]
            return torch.as_tensor(value)
    return None


def _read_targets(batches: Iterable[Batch]) -> Tensor:
    return torch.cat([split_targets(batch)[2].cpu() for batch in batches])


def as_source(data: Any, name: str) -> Source:
    """Source of what a caller gives as a data set: tensors `(x, y)` or a mapping of them, a Dataset, a DataLoader.

    Raises TypeError for anything else and ValueError for an empty set, naming it.
    """
    source: Source
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            raise TypeError(f"{name}: a DataLoader over an IterableDataset has no length; give a map-style Dataset")
        source = LoaderSource(data)
    elif isinstance(data, TensorDataset):
        source = TensorSource(data.tensors, name)
    elif isinstance(data, (tuple, Mapping)) and tensors_of(data):
        source = TensorSource(data, name)
    elif (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (Tensor, str, tuple, Mapping))
    ):
        source = DatasetSource(data)
    else:
        raise TypeError(
            f"{name} must be tensors (inputs, ..., targets), a mapping of tensors with labels, a map-style Dataset "
            f"or a DataLoader, got {type(data).__name__}"
        )
    if source.count == 0:
        raise ValueError(f"the {name} set is empty")
    return source


def split_held_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """What is left of a source, and a random share of it in (0, 1). Raises TypeError for a DataLoader."""
    if not 0 < share < 1:
        raise ValueError(f"held_out as a share must be in (0, 1), got {share}")
    order = _permutation(source.count, seed)
    taken = round(share * source.count)
    if not 0 < taken < source.count:
        raise ValueError(f"a held-out share of {share} of {source.count} samples leaves one of the two sets empty")
    if isinstance(source, TensorSource):
        parts = [
            map_tensors(lambda t, index=index: t[index.to(t.device)], source.tensors)
            for index in (order[taken:], order[:taken])
        ]
        return TensorSource(parts[0], "retain"), TensorSource(parts[1], "held_out")
    if isinstance(source, DatasetSource):
        rest, part = (Subset(source.dataset, index.tolist()) for index in (order[taken:], order[:taken]))
        return DatasetSource(rest), DatasetSource(part)
    raise TypeError("held_out as a share needs retain as tensors or a Dataset, got a DataLoader")


class Stream:
    """Endless batches of a source, pass after pass, each in its own seeded order; remembers where it stands."""

    def __init__(self, source: Source, batch_size: int, seed: int, role: int) -> None:
        self.source, self.batch_size, self.seed, self.role = source, batch_size, seed, role
        self.passes = 0
        self.position = 0
        self._batches: Iterator[Batch] | None = None

    def _open(self) -> Iterator[Batch]:
        seed = derive_seed(self.seed, self.role, self.passes)
        return self.source.read(self.batch_size, seed, self.position)

    def next(self) -> Batch:
        for _ in range(2):
            if self._batches is None:
                self._batches = self._open()
            for batch in self._batches:
                self.position += 1
                return batch
            self.restart()
        raise ValueError("a data set gave no batch (drop_last with fewer samples than a batch?)")

    def restart(self) -> None:
        """Go on with the next pass, whatever is left of this one."""
        self.passes, self.position, self._batches = self.passes + 1, 0, None

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.passes, self.position, self._batches = state["passes"], state["position"], None


def count_shared(forget: Any, retain: Any) -> int:
    """How many forget samples also stand in the retain set, as far as that can be told.

    Subsets of one dataset are compared by index; tensors (and TensorDatasets) by the bytes of the whole sample. For
    anything else 0.
    """
    forget, retain = (data.dataset if isinstance(data, DataLoader) else data for data in (forget, retain))
    if isinstance(forget, Subset) and isinstance(retain, Subset):
        if forget.dataset is not retain.dataset:
            return 0
        return len(set(map(int, forget.indices)) & set(map(int, retain.indices)))
    forget, retain = (data.tensors if isinstance(data, TensorDataset) else data for data in (forget, retain))
    both = tensors_of(forget), tensors_of(retain)
    if not both[0] or len(both[0]) != len(both[1]):
        return 0
    rows = [_sample_bytes(tensors) for tensors in both]
    known = set(rows[1])
    return sum(row in known for row in rows[0])


def _sample_bytes(tensors: list[Tensor]) -> list[bytes]:
    columns = [
        t.detach().reshape(len(t), -1).cpu().contiguous().view(torch.uint8).numpy() if t.numel() else None
        for t in tensors
    ]
    table = np.concatenate([column for column in columns if column is not None], axis=1)
    return [row.tobytes() for row in table]
