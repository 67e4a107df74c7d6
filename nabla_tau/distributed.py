"""The processes that take one step together, under DistributedDataParallel, FSDP2 or with a plain model on each.

The gate is not linear in the losses, so a step of k processes is that of one only if the gate sees the forget losses of
all of them. `Ranks` is what a step needs for that: the losses of all ranks, sums instead of DDP's and FSDP's averages,
norms of gradients that are whole. Of one process (`Ranks()`) every method gives back what it was given.

What ranks tell each other goes over process groups of their own, so that it never waits behind buckets of gradients:
sizes over gloo, from host to host, so that a GPU is not waited for; losses over the backend of the model's device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla_tau.arguments import check_kind

ProcessGroup: TypeAlias = Any  # torch.distributed.ProcessGroup, which a build without it does not have
Parallel: TypeAlias = Literal["alone", "plain", "ddp", "fsdp"]


class Share(NamedTuple):
    """Which rows of every batch are this process's: the `rank`-th of `size` slices of nearly one length."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


WHOLE = Share()


class _Groups(NamedTuple):
    world: Any  # the default group when these were made: another one means another run
    host: Any
    values: Any


_groups: dict[tuple[int, ...], _Groups] = {}


def _groups_of(members: tuple[int, ...], device: torch.device) -> _Groups:
    found = _groups.get(members)
    if found is None or found.world is not dist.group.WORLD:
        # Only the members make it: other ranks may be at something else (pipeline stages, tensor parallelism).
        partly = len(members) < dist.get_world_size()
        host = dist.new_group(list(members), backend="gloo", use_local_synchronization=partly)
        values = host if device.type == "cpu" else dist.new_group(list(members), use_local_synchronization=partly)
        found = _groups[members] = _Groups(dist.group.WORLD, host, values)
    return found


class Ranks:
    """The processes of one model. rank and size: this one's number, and how many there are. parallel: who reduces the
    gradients: DDP's and FSDP2's own hooks, or for a "plain" model `finish`."""

    def __init__(
        self, parallel: Parallel = "alone", members: Sequence[int] = (0,), device: torch.device | None = None
    ) -> None:
        self.parallel = parallel
        self.size = len(members)
        self.rank = 0 if parallel == "alone" else list(members).index(dist.get_rank())
        self._groups = None if parallel == "alone" else _groups_of(tuple(members), device or torch.device("cpu"))

    @property
    def lockstep(self) -> bool:
        """Whether a forward or backward of one rank waits for that of every other."""
        return self.parallel in ("ddp", "fsdp")

    @property
    def host(self) -> ProcessGroup | None:
        """The group of host-to-host messages; None where there is one process."""
        return None if self._groups is None else self._groups.host

    @property
    def averaging(self) -> float:
        """What the gradients are divided by when they are reduced; the losses' weights are multiplied by it."""
        return float(self.size) if self.lockstep else 1.0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.size)

    def objects(self, value: Any) -> list[Any]:
        """What each rank has given, by rank; for a few things now and then. Pickled, among processes of one job."""
        if self._groups is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._groups.host)
        return found

    def numbers(self, *values: int) -> list[list[int]]:
        """The whole numbers that each rank has given, [size][len(values)]."""
        if self._groups is None:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._groups.host)
        return [row.tolist() for row in found]

    def all(self, value: bool) -> bool:
        return all(row[0] for row in self.numbers(int(value)))

    def gather(self, rows: Tensor) -> tuple[Tensor, slice]:
        """Rows [n, k] of all ranks, one after another [N, k], without gradient, and where this rank's are. n may be
        another on every rank, and 0."""
        if self._groups is None:
            return rows, slice(0, len(rows))
        counts = [row[0] for row in self.numbers(len(rows))]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=self._groups.values)
        start = sum(counts[: self.rank])
        joined = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
        return joined, slice(start, start + len(rows))

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self._groups is not None:
            value = value.clone()
            dist.all_reduce(value, group=self._groups.values)
        return value

    def in_step(self, batches: Iterable[Any], count: Callable[[Any], int]) -> Iterator[tuple[int, Any, bool]]:
        """Batches with their numbers, and whether they are this rank's own: FSDP2 gathers its weights in every forward,
        so a rank that has no batch, or an empty one, goes through another one with those that have. Else empty ones are
        left out."""
        iterator, number, spare = iter(batches), 0, None
        while True:
            batch = next(iterator, None)
            filled = batch is not None and count(batch) > 0
            spare = batch if filled or spare is None else spare
            states = [[batch is not None, filled]]
            if self.parallel == "fsdp":
                states = [[bool(value) for value in row] for row in self.numbers(*map(int, states[0]))]
            if not any(there for there, _ in states):
                return
            if filled or any(some for _, some in states):
                yield number, batch if filled else spare, filled
            number += 1

    @contextlib.contextmanager
    def gradients_stay(self, model: nn.Module, stay: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch that is not the last: DDP is not to reduce yet. (FSDP2 reduces
        every time: else each rank would hold whole gradients.)"""
        with model.no_sync() if stay and self.parallel == "ddp" else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def finish(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of a plain model over the ranks; one that no rank has stays None."""
        if self.parallel != "plain":
            return
        assert self._groups is not None
        rows = self.numbers(*(int(p.grad is not None) for p in parameters))
        for index, parameter in enumerate(parameters):
            if any(row[index] for row in rows) and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for dtype in sorted({g.dtype for g in gradients}, key=str):
            same = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in same])
            dist.all_reduce(flat, group=self._groups.values)
            for gradient, part in zip(same, torch.split(flat, [g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel; any other as it is."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _members_of(process_group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(process_group))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2's fully_shard was applied to the model or a part of it."""
    return dist.is_available() and any(_fsdp_groups(module) for module in model.modules())


def can_be_copied(model: nn.Module) -> bool:
    """Whether copy.deepcopy works: FSDP2 refuses, and a copy of DDP is on the default group."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return bool(model.process_group == dist.group.WORLD)
    return not is_sharded(model)


def _fsdp_groups(module: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return []
    return list(module._get_fsdp_state()._fsdp_param_groups)


def _fsdp_members(model: nn.Module) -> tuple[int, ...]:
    groups = [group for module in model.modules() for group in _fsdp_groups(module)]
    meshes = {tuple(group.mesh_info.mesh.mesh.flatten().tolist()) for group in groups}
    if len(meshes) != 1:
        raise ValueError(f"the parts of an FSDP2 model must be sharded over the same ranks, got {sorted(meshes)}")
    if any(group.gradient_divide_factor not in (None, len(next(iter(meshes)))) for group in groups):
        raise ValueError(
            "set_gradient_divide_factor was called on this model: leave the average over the ranks to FSDP2"
        )
    apart = [name for name, p in model.named_parameters() if p.requires_grad and not hasattr(p, "device_mesh")]
    if apart:
        raise ValueError(
            f"parameter {apart[0]} is not sharded, so nothing sums its gradient over the ranks: call fully_shard on "
            "the whole model too, or freeze it"
        )
    return meshes.pop()


def ranks_of(model: nn.Module, process_group: ProcessGroup | Literal["auto"] | None = "auto") -> Ranks:
    """The processes of a model. "auto": those that DistributedDataParallel or fully_shard were given; a plain model is
    alone, unless torch.distributed runs several processes: whether each of them is alone or all are one must then be
    said. A process group: the plain model is the same on all of its ranks. None: a plain model is alone.

    Raises ValueError where it is not said, and for models and groups that do not go together.
    """
    check_kind(model, nn.Module, "model")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    running = dist.is_available() and dist.is_initialized()
    parallel: Parallel
    if isinstance(model, nn.parallel.DistributedDataParallel):
        members, parallel = _members_of(model.process_group), "ddp"
    elif running and is_sharded(model):
        members, parallel = _fsdp_members(model), "fsdp"
    elif running and process_group not in ("auto", None):
        members, parallel = _members_of(process_group), "plain"
    elif process_group == "auto" and running and dist.get_world_size() > 1:
        raise ValueError(
            f"torch.distributed runs {dist.get_world_size()} processes, but this model is not wrapped, so each would "
            "step on its own gate: wrap it in DistributedDataParallel or fully_shard, or pass "
            "process_group=torch.distributed.group.WORLD where all hold the same model, or process_group=None where "
            "each is to work alone"
        )
    else:
        return Ranks()
    if process_group not in ("auto", None) and set(_members_of(process_group)) != set(members):
        raise ValueError("process_group is not the one that the model is wrapped for: leave it out")
    return Ranks(parallel, members, device)


def full_tensor(tensor: Tensor | Any) -> Tensor:
    """The whole of a sharded tensor (every rank must ask); any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def local_tensor(tensor: Tensor | Any) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Set a parameter, or this rank's part of one that is sharded, from the whole value that every rank has."""
    sharded: Any = parameter
    if hasattr(sharded, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    parameter.copy_(whole)


def gradient_norm(gradient: Sequence[Tensor | None], *, like: Tensor) -> Tensor:
    """Norm of all gradients together, 0-d; of sharded ones that of the whole."""
    kinds: dict[Any, list[Any]] = {}
    part: Any
    for part in gradient:
        if part is not None:
            kind = (part.device_mesh, part.placements) if hasattr(part, "device_mesh") else None
            kinds.setdefault(kind, []).append(part)
    norms = [_norm_of_kind(kind, parts).to(like) for kind, parts in kinds.items()]
    return torch.stack(norms).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros_like(like)


def _norm_of_kind(kind: Any, parts: list[Any]) -> Tensor:
    if kind is None:
        found: Tensor = torch.stack(torch._foreach_norm(parts)).norm()
        return found
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = kind
    local = torch.stack(torch._foreach_norm([local_tensor(part) for part in parts])).norm()
    summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    # float64: the square of a small float32 norm would be 0.
    squares = DTensor.from_local(local.double() ** 2, mesh, summed, run_check=False)
    return full_tensor(squares).sqrt()
