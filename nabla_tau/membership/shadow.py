"""Shadow models: many models, each trained on a random half of the samples, and every sample's score on each of them.

What a model answers on a sample it was trained on, and what on one it was not, differs from sample to sample; shadow
models say by how much (`nabla_tau.membership.likelihood_ratio`, `rmia`). Carlini et al. 2022, arXiv 2112.03570.

Two ways to train them give the same folder (`shadow_store`): `train_shadow_models`, one model at a time in as many
processes as one likes, for any training code; and `train_shadow_ensemble`, all at once as one vectorised model, for
small ones. The processes are joblib's, so they may be on other machines:

    with joblib.parallel_config(backend="loky", n_jobs=8):       # the default backend: processes on this machine
        train_shadow_models("shadow", sets=..., models=64, train=train)

    client = dask.distributed.Client(scheduler)                  # Dask
    with joblib.parallel_config(backend="dask"):
        ...

    ray.util.joblib.register_ray()                               # Ray
    with joblib.parallel_config(backend="ray"):
        ...

The folder must then be one that every worker sees; and workers must be processes, as threads would share their random
states. Given to `train`, a function of a module is found by its name and
must be importable there; one of the main script or of a notebook is sent along. Data that it closes over is sent with
every model: load big data inside it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from nabla_tau.arguments import check_kind, check_seed, numbers_checked, whole
from nabla_tau.batch import Forward, concatenate
from nabla_tau.evaluation import SampleLoss, evaluate
from nabla_tau.membership.audit_report import json_able
from nabla_tau.membership.ensemble import train_ensemble
from nabla_tau.membership.shadow_samples import balanced_membership, fingerprint
from nabla_tau.membership.shadow_store import DTYPES, Packed, ShadowFolder, ShadowPlan, ShadowScores, unpack
from nabla_tau.progress import progress_bar
from nabla_tau.seeding import RandomState
from nabla_tau.sources import TensorSource, as_source, derive_seed

Indices = NDArray[np.int64]
Train = Callable[[Indices, int], nn.Module]
Unlearn = Callable[[nn.Module, Indices, int], nn.Module]


@numbers_checked
def train_shadow_models(
    folder: str | os.PathLike[str],
    *,
    sets: Mapping[str, Any],
    models: int,
    train: Train,
    unlearn: Unlearn | None = None,
    probability: float = 0.5,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
    n_jobs: int | None = None,
    threads: int = 1,
    progress: bool = False,
) -> ShadowScores:
    """Train shadow models, or those that an earlier call left to train, and store the score of every sample on each.

    The result depends on the arguments alone: not on the number of processes, nor on whether a run was interrupted.

    Args:
        folder: of this run. One that holds a part of the same run is gone on with; one of another run is refused.
        sets: name -> tensors or Dataset: the samples that each model is trained on or not, and scored on. An audit
            takes "forget" and "unseen". Samples that are always to be trained on need not be here: `train` adds them.
        models: how many. 16 at the least for an attack to say anything, 64 to 256 for a good one.
        train: (indices, seed) -> model, trained on the samples at these indices of all sets put one after the other.
            Random states (torch's on the CPU, NumPy's, Python's) are seeded before the call, and restored after it.
        unlearn: (model, indices, seed) -> model that has forgotten these samples, for U-LiRA.
        probability: share of the models that a sample is trained on by.
        settings: what else the models depend on, JSON-able: kept, and compared when a run is gone on with.
        forward, loss, batch_size: as in `nabla_tau.evaluation.evaluate`; with a loss of one's own the score is -loss.
        dtype: "float32" or "float16", which is fine for margins (beyond +-65504 they are clipped).
        n_jobs: processes; None takes what `joblib.parallel_config` says, or 1. threads: PyTorch's in each of them.

    Raises ValueError for a folder of another run and for files that are damaged; TypeError for sets that are no
    tensors or Datasets. What `train` raises passes through; models that are finished stay.
    """
    _check_jobs(n_jobs)
    job = _begin(folder, sets, models, unlearn, probability, seed, settings, forward, loss, dtype, batch_size, threads)
    missing = job.folder.missing()
    with progress_bar("shadow models", models, enabled=progress) as update:
        update(models - len(missing), "")
        calls = ((_train_and_store, (job, model, train)) for model in missing)
        for done, _ in enumerate(_parallel(calls, n_jobs), models - len(missing) + 1):
            update(done, "")
    job.folder.join()
    return ShadowScores.load(folder)


@numbers_checked
def train_shadow_ensemble(
    folder: str | os.PathLike[str],
    *,
    sets: Mapping[str, Any],
    models: int,
    make_model: Callable[[], nn.Module],
    epochs: int,
    always: Any = None,
    train_batch_size: int = 128,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    at_once: int = 32,
    unlearn: Unlearn | None = None,
    probability: float = 0.5,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
    n_jobs: int | None = None,
    threads: int = 1,
    progress: bool = False,
) -> ShadowScores:
    """`train_shadow_models` for small models: `at_once` of them are trained as one (`ensemble.train_ensemble`, which
    says what models and optimizers that takes). An interrupted run goes on with the models that are not stored.

    sets must be tensors. always: further samples, of the same structure, that every model is trained on.
    make_model, epochs, optimizer, schedule: as there; train_batch_size is the number of samples, members or not, that
    a step takes. n_jobs and threads serve `unlearn` and the scoring. `settings` should name the optimizer.
    """
    for number, argument in ((epochs, "epochs"), (train_batch_size, "train_batch_size"), (at_once, "at_once")):
        whole(number, argument, least=1)
    data, fixed_samples = None, 0
    for name, of_set in [*sets.items(), *([("always", always)] if always is not None else [])]:
        source = as_source(of_set, name)
        if not isinstance(source, TensorSource):
            raise TypeError(f"{name}: an ensemble is trained on tensors; train_shadow_models takes any Dataset")
        data = source.tensors if data is None else concatenate(data, source.tensors)
        if data is None:
            raise ValueError(f"{name} has not the structure and the shapes of the sets before it")
        if name == "always":
            fixed_samples = source.count
    settings = {
        "trained": "as one vectorised ensemble",
        "epochs": epochs,
        "batch_size": train_batch_size,
        "always_trained_on": fixed_samples,
    } | dict(settings or {})
    _check_jobs(n_jobs)
    job = _begin(folder, sets, models, unlearn, probability, seed, settings, forward, loss, dtype, batch_size, threads)
    missing = job.folder.missing()
    members = unpack(job.packed, job.folder.plan.samples)
    fixed = np.ones((models, fixed_samples), bool)
    steps = epochs * -(-(members.shape[1] + fixed.shape[1]) // train_batch_size)
    for start in range(0, len(missing), at_once):
        group = missing[start : start + at_once]
        started = time.perf_counter()
        with progress_bar(f"shadow models {group[0]} to {group[-1]}", steps, enabled=progress) as update:
            ensemble = train_ensemble(
                make_model,
                data,
                np.concatenate((members[group], fixed[group]), axis=1),
                epochs=epochs,
                batch_size=train_batch_size,
                optimizer=optimizer,
                schedule=schedule,
                forward=forward,
                loss=loss,
                seed=seed,
                model_seeds=[derive_seed(seed, model) for model in group],
                on_step=functools.partial(_advance, update),
            )
        seconds = (time.perf_counter() - started) / len(group)
        with progress_bar("unlearn and score", len(group), enabled=progress and unlearn is not None) as update:
            calls = ((_finish_and_store, (job, model, ensemble.model(i), seconds)) for i, model in enumerate(group))
            for done, _ in enumerate(_parallel(calls, n_jobs), 1):
                update(done, "")
    job.folder.join()
    return ShadowScores.load(folder)


@dataclass(frozen=True)
class _Job:
    """What every worker needs."""

    folder: ShadowFolder
    packed: Packed
    sets: Mapping[str, Any]
    unlearn: Unlearn | None
    forward: Forward | None
    loss: SampleLoss | None
    batch_size: int
    threads: int

    def indices(self, model: int) -> Indices:
        return np.flatnonzero(unpack(self.packed[model], self.folder.plan.samples))

    def seed(self, model: int) -> int:
        return derive_seed(self.folder.plan.seed, model)


def _begin(
    folder: str | os.PathLike[str],
    sets: Mapping[str, Any],
    models: int,
    unlearn: Unlearn | None,
    probability: float,
    seed: int,
    settings: Mapping[str, Any] | None,
    forward: Forward | None,
    loss: SampleLoss | None,
    dtype: str,
    batch_size: int,
    threads: int,
) -> _Job:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    for number, argument in ((batch_size, "batch_size"), (threads, "threads")):
        whole(number, argument, least=1)
    check_seed(seed)
    check_kind(sets, Mapping, "sets")
    if not sets:
        raise ValueError("sets is empty: there is nothing to train on")
    counts, fingerprints = {}, {}
    for name, of_set in sets.items():
        if isinstance(of_set, DataLoader):
            raise TypeError(f"{name}: samples are chosen by their index: give tensors or a Dataset, not a DataLoader")
        counts[name] = as_source(of_set, name).count
        fingerprints[name] = fingerprint(of_set, name)
    plan = ShadowPlan(
        models=models,
        sets=counts,
        fingerprints=fingerprints,
        probability=probability,
        seed=seed,
        dtype=dtype,
        unlearns=unlearn is not None,
        settings=json_able(settings or {}, "settings"),
    )
    packed = balanced_membership(models, plan.samples, probability=probability, seed=seed)
    store = ShadowFolder(Path(folder).absolute(), plan, packed)
    return _Job(store, packed, sets, unlearn, forward, loss, batch_size, threads)


def _check_jobs(n_jobs: int | None) -> None:
    if n_jobs == 0:
        raise ValueError("n_jobs must be a number of processes, or negative, counting from all cores; got 0")


def _advance(update: Callable[[int, str], None], step: int) -> None:
    update(step, "")


def _parallel(calls: Iterator[tuple[Callable[..., None], tuple[Any, ...]]], n_jobs: int | None) -> Iterator[None]:
    """One item for each call that is done, from joblib's workers."""
    from joblib import Parallel, delayed

    try:
        parallel = Parallel(n_jobs=n_jobs, batch_size=1, return_as="generator_unordered")
    except ValueError:  # some backends, such as Ray's, give nothing before all is done
        parallel = Parallel(n_jobs=n_jobs, batch_size=1)
    yield from parallel(delayed(function)(*arguments) for function, arguments in calls)


def _train_and_store(job: _Job, model: int, train: Train) -> None:
    started = time.perf_counter()
    with _own_state(job, model):
        trained = train(job.indices(model), job.seed(model))
    check_kind(trained, nn.Module, "what train gives")
    _finish_and_store(job, model, trained, time.perf_counter() - started)


def _finish_and_store(job: _Job, model: int, trained: nn.Module, seconds: float) -> None:
    with _own_state(job, model):
        rows = [_scores(job, trained)]
        if job.unlearn is not None:
            unlearned = job.unlearn(trained, job.indices(model), job.seed(model))
            check_kind(unlearned, nn.Module, "what unlearn gives")
            rows.append(_scores(job, unlearned))
    signal = rows[0][1]
    job.folder.write(model, np.stack([row for row, _ in rows]), signal=signal, seconds=seconds)


def _scores(job: _Job, model: nn.Module) -> tuple[NDArray[np.float64], str]:
    found = [
        evaluate(model, of_set, forward=job.forward, loss=job.loss, batch_size=job.batch_size)
        for of_set in job.sets.values()
    ]
    margins = [signals.margin for signals in found if signals.margin is not None]
    if len(margins) == len(found):
        return np.concatenate(margins), "margin"
    return -np.concatenate([signals.loss for signals in found]), "loss"


@contextlib.contextmanager
def _own_state(job: _Job, model: int) -> Iterator[None]:
    """Random states and a number of threads of one's own: so a model does not depend on the process it is made in."""
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with RandomState(job.seed(model)):
            yield
    finally:
        torch.set_num_threads(before)
