"""A run's checkpoint on disk: one file, or for a sharded model a folder that all ranks write.

The folder holds `run`, a file as of `checkpoint.py` with all that is small, and beside it the weights and the
optimizer's state as torch.distributed.checkpoint writes them, by name, so that any number of ranks can read them. `run`
says which parts belong to it and their SHA-256; it is replaced last, as one: whatever happens, the folder holds the old
checkpoint or the new. Neither is ever unpickled into code (`folder_reader`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nabla_tau import checkpoint
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint, sha256
from nabla_tau.distributed import Ranks, unwrapped

RUN = "run"


def exists(path: Path, ranks: Ranks) -> bool:
    """Whether there is a checkpoint; ValueError where only some ranks see it."""
    seen = [row[0] for row in ranks.numbers(int(path.is_file() or (path / RUN).is_file()))]
    if len(set(seen)) > 1:
        raise ValueError(f"checkpoint {path} is seen by some ranks only: give a path that all of them see")
    return bool(seen[0])


def check_writable(path: Path, ranks: Ranks) -> None:
    """`checkpoint.check_writable` of what rank 0 will write, raised on every rank."""
    of_all = path / RUN if ranks.parallel == "fsdp" or (path / RUN).is_file() else path
    _on_rank_0(lambda: checkpoint.check_writable(of_all), ranks)


def save_run(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Write the state of a run (`_Run.state_dict`). Raises OSError on every rank, the old checkpoint left as it was."""
    if ranks.parallel == "fsdp" or path.is_dir():
        state = {name: value for name, value in state.items() if name != "model"}
        state["steps"] = {name: value for name, value in state["steps"].items() if name != "optimizer"}
        state["parts"] = _save_parts(path, int(state["step"]), model, optimizer, ranks)
        _on_rank_0(lambda: save_checkpoint(path / RUN, state), ranks)
        _on_rank_0(lambda: _remove_parts(path, keep=state["parts"]["folder"]), ranks)
    else:
        _on_rank_0(lambda: save_checkpoint(path, state), ranks)


def load_run(path: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """The state that was written; of a folder without weights and optimizer, which `load_parts` reads.

    Raises ValueError for what is no checkpoint, is damaged, or does not serve this model.
    """
    if path.is_file() and ranks.parallel == "fsdp":
        raise ValueError(f"checkpoint {path} is of a model that was not sharded: resume it without fully_shard")
    state = load_checkpoint(path if path.is_file() else path / RUN, device)
    if "parts" in state:
        folder, digests = path / state["parts"]["folder"], state["parts"]["sha256"]
        names = sorted(digests)[ranks.rank :: ranks.size]
        damaged = [name for name in names if not (folder / name).is_file() or sha256(folder / name) != digests[name]]
        found = [name for of_rank in ranks.objects(damaged) for name in of_rank]
        if found:
            raise ValueError(f"checkpoint {path} is damaged: {', '.join(found)} in {folder.name}")
    return state


def method_of_run(path: Path, ranks: Ranks) -> str:
    """Of which method a checkpoint is; what `load_run` raises."""
    return str(load_run(path, torch.device("cpu"), ranks)["identity"]["method"])


def load_parts(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Weights and optimizer state from a folder, into a model sharded in any way or not at all. ValueError for what is
    damaged, or holds anything but tensors and plain values."""
    from torch.distributed.checkpoint import state_dict as by_name
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from nabla_tau.folder_reader import Planner, Reader

    parts = _parts(model, optimizer)
    try:
        load(
            parts,
            storage_reader=Reader(path / state["parts"]["folder"]),
            # What no gradient ever reached has no state there, but may be asked for here.
            planner=Planner(allow_partial_load=True),
            process_group=ranks.host,
            no_dist=ranks.host is None,
        )
    except CheckpointException as error:  # no Exception, which whoever calls could catch
        raise ValueError(f"checkpoint {path} is not read: {str(error).strip().splitlines()[-1]}") from error
    by_name.set_model_state_dict(unwrapped(model), parts["model"])
    by_name.set_optimizer_state_dict(unwrapped(model), optimizer, parts["optimizer"])


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as by_name

    inner = unwrapped(model)
    found: dict[str, Any] = by_name.get_optimizer_state_dict(inner, optimizer)
    for group in found["param_groups"]:
        group["lr"] = float(group["lr"])  # a tensor where steps are captured; a number fits everywhere
    return {"model": by_name.get_model_state_dict(inner), "optimizer": found}


def _save_parts(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = path / f"step-{step:08d}"
    if folder.exists() and (path / RUN).is_file():
        current = load_checkpoint(path / RUN, torch.device("cpu"))["parts"]["folder"]
        folder = path / f"{folder.name}b" if current == folder.name else folder
    folder = Path(ranks.objects(str(folder))[0])
    _on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True), ranks)
    save(_parts(model, optimizer), checkpoint_id=folder, process_group=ranks.host, no_dist=ranks.host is None)
    names = sorted(entry.name for entry in folder.iterdir())
    mine = {name: sha256(folder / name) for name in names[ranks.rank :: ranks.size]}
    digests = {name: digest for of_rank in ranks.objects(mine) for name, digest in of_rank.items()}
    return {"folder": folder.name, "sha256": digests}


def _remove_parts(path: Path, keep: str) -> None:
    for folder in path.glob("step-*"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _on_rank_0(work: Any, ranks: Ranks) -> None:
    """Done by one; if it fails, it fails for all."""
    error: OSError | None = None
    if ranks.rank == 0:
        try:
            work()
        except OSError as raised:
            error = raised
    first = ranks.objects(error)[0]
    if first is not None:
        raise first
