"""`unlearn`: from a model and its data to the run of a method, or of those that the default takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nabla_tau import outcome
from nabla_tau.arguments import check_fields, check_kind, check_seed, whole
from nabla_tau.batch import Forward
from nabla_tau.distributed import ProcessGroup, Ranks, can_be_copied, ranks_of, unwrapped
from nabla_tau.evaluation import SampleLoss, device_of, evaluation_mode
from nabla_tau.history import Log
from nabla_tau.job import GLOBAL, CannotServeError, Job
from nabla_tau.methods import METHODS, NABLA_TAU
from nabla_tau.methods.restart import Restart, Weights
from nabla_tau.methods.stages import Method
from nabla_tau.preparation import prepare
from nabla_tau.recipes import ASCENT, GENTLE, RECIPES, Recipe
from nabla_tau.result import NonFiniteLossError, UnlearnResult
from nabla_tau.run import Attempt, Run
from nabla_tau.run_files import check_writable, exists, method_of_run
from nabla_tau.sources import derive_seed

DEFAULT = "default"  # stands for neither method nor recipe
REGAINED = 0.9  # of the way from untrained weights to the original's usefulness


def unlearn(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    held_out: Any,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    method: str | Method | None = None,
    recipe: str | Recipe | None = None,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    retain_is_unseen: bool = False,
    seed: int = 0,
    inplace: bool = False,
    micro_batch_size: int | None = None,
    process_group: ProcessGroup | Literal["auto"] | None = "auto",
    data_is_sharded: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log: Log | None = None,
    progress: bool = False,
    performance: Literal["auto", "off"] = "auto",
) -> UnlearnResult:
    """Remove the influence of `forget` from a trained model, keeping what `retain` taught it.

        result = unlearn(model, forget=(x_f, y_f), retain=(x_r, y_r), held_out=(x_v, y_v)); result.model

    forget, retain, held_out: tensors or arrays (also np.memmap) `(inputs, ..., targets)`, or a mapping of them with
    "labels"; map-style Datasets; DataLoaders. held_out must never have been trained on: its loss is what the forget
    loss is brought to. A number in (0, 1) takes that share of `retain` instead, and only with retain_is_unseen=True,
    which states that the model was never trained on `retain`. forward: (model, batch) -> (logits, targets), where the
    model is not simply called on the inputs. loss: (logits, targets) -> per-sample losses [B], for anything but
    classification.

    With neither method nor recipe (or recipe="default") the model is trained anew on the retained samples, by a
    schedule that takes a fraction of the first training (`nabla_tau.methods.restart.Restart`): nothing of the forget
    set is left, and nothing need be tuned to it. Where that cannot be, or ends far from the original's held-out
    accuracy, as of a pretrained model, nabla-tau's recipe "gentle" is run on the original weights instead, and the
    first of the result's warnings says why. initial: what the first training began with, a model or its state dict,
    where that were not fresh weights: the pretrained model that was finetuned, which must not know the forget set. How
    far each tensor was taken from there sets its learning rate, and its result is kept, with warnings of what was lost.

    method: "nabla-tau" itself, or one that it is compared with: a name of `nabla_tau.methods.METHODS`, or one of its
    dataclasses with settings of your own. recipe: of nabla-tau, "ascent", "gentle", "paper" (the published settings,
    arXiv 2403.14339) or a `nabla_tau.recipes.Recipe`. What a run did not reach is in the result's warnings.

    The model runs in eval mode (norm statistics frozen, dropout off) but where a method says otherwise. It is copied
    unless inplace=True; its modes and the global random state are as before afterwards. seed fixes the data order and
    whatever else is drawn. micro_batch_size: samples
    that go through the model at once, on each process; it changes the memory that a step takes, not the step.
    checkpoint: file written atomically every `checkpoint_every` steps (default: as often as tau is measured);
    resume=True goes on from it where it exists, and gives the very weights that an uninterrupted run gives (on the CPU;
    a data set whose own random state, or that of persistent workers, goes on from pass to pass cannot be resumed). A
    checkpoint that cannot be written (a full disk) does not end the run: the last good one stays, the "nabla_tau"
    logger warns at once, the next one is tried, and the result's warnings say how many were lost. log: called as
    log(values, step) for every step, some steps late. progress: a bar on a terminal. performance: "auto" runs the model
    in a faster form, the same but for rounding (`nabla_tau.performance`), "off" as it is.

    Several processes (torchrun): every rank calls this with the same arguments and the whole data, and works on its
    share of every batch, so that their number changes the speed and nothing else (but for the numbers that random
    transforms of a Dataset draw). The model is in DistributedDataParallel, or fully_shard was applied to it (which
    cannot be copied: inplace=True), or it is a plain model, the same on all ranks of `process_group` (see `Unlearner`).
    data_is_sharded=True: each rank gives samples of its own instead (or DataLoaders with a DistributedSampler); the
    recipe's batch sizes are those of all ranks together. tau, gate, history and result are those of all ranks. Bars,
    warnings and `log` come from rank 0, which also writes the checkpoint; of a sharded model it is a folder, which all
    ranks write with torch.distributed.checkpoint. Any number of ranks may resume it, unless the data is sharded.

    Raises TypeError and ValueError for data, labels, settings or a checkpoint that do not fit or are damaged, and
    OSError for a checkpoint that cannot be read or where none can be written, before anything is changed;
    NonFiniteLossError, with the last good weights, when a loss becomes nan or infinite.
    """
    check_kind(model, nn.Module, "model")
    chosen = _chosen(method, recipe)
    first = _restart(model, initial, chosen)
    check_seed(seed)
    for steps, name in ((checkpoint_every, "checkpoint_every"), (micro_batch_size, "micro_batch_size")):
        if steps is not None:
            whole(steps, name, least=1)
    path = None if checkpoint is None else Path(checkpoint)
    ranks = ranks_of(model, process_group)
    if path is not None and not resume and not ranks.all(not path.exists()):
        raise ValueError(f"checkpoint {path} exists: pass resume=True to go on from it, or remove it")
    if not inplace and not can_be_copied(model):
        raise ValueError(
            "a model to which fully_shard was applied, or in DistributedDataParallel on a group of some processes, "
            "cannot be copied: pass inplace=True"
        )
    if path is not None:
        check_writable(path, ranks)
    with torch.enable_grad(), torch.random.fork_rng(devices=_cuda_devices(device_of(model))):
        torch.manual_seed(derive_seed(seed, GLOBAL))
        data = prepare(
            model,
            forget=forget,
            retain=retain,
            held_out=held_out,
            forward=forward,
            loss=loss,
            retain_is_unseen=retain_is_unseen,
            seed=seed,
            ranks=ranks,
            sharded=data_is_sharded,
            performance=performance,
        )

        def execute(
            own: nn.Module, method: Method | Recipe, attempt: Attempt | None = None, *, resume: bool = resume
        ) -> UnlearnResult:
            with evaluation_mode(own):
                job = Job(
                    own,
                    data,
                    ranks,
                    data_is_sharded,
                    forward,
                    loss,
                    seed,
                    micro_batch_size=micro_batch_size,
                    process_group=process_group,
                    performance=performance,
                )
                run = Run(job, method, log, attempt)
                return run.execute(path, checkpoint_every, progress and ranks.rank == 0, resume=resume)

        if chosen is not None:
            result = execute(model if inplace else copy.deepcopy(model), chosen)
        else:
            result = _automatic(model, first, inplace, execute, path if resume else None, ranks)
    for message in result.warnings if ranks.rank == 0 else ():
        warnings.warn(message, stacklevel=2)
    return result


def _automatic(
    model: nn.Module,
    first: Restart,
    inplace: bool,
    execute: Callable[..., UnlearnResult],
    begun: Path | None,
    ranks: Ranks,
) -> UnlearnResult:
    """Fresh weights, or those before the training where they were given; and where that cannot serve the model, or
    fresh ones fall far short of it, the gentle recipe on the original weights."""
    second = GENTLE
    keep = inplace and ranks.parallel != "fsdp"  # which fresh weights refuse before they change anything
    original = {name: tensor.clone() for name, tensor in unwrapped(model).state_dict().items()} if keep else None
    attempt = None
    at_second = begun is not None and exists(begun, ranks) and method_of_run(begun, ranks) == repr(second)
    if not at_second:
        try:
            result = execute(model if inplace else copy.deepcopy(model), first)
        except CannotServeError as error:
            attempt = Attempt(f"fresh weights were not tried: {error}")
        except NonFiniteLossError as error:
            attempt = Attempt(f"fresh weights failed: {error}", error.step, error.result.seconds)
        else:
            if first.initial is not None or not outcome.regained(result.settings) < REGAINED:
                return result
            steps = result.settings["steps"]
            reason = f"fresh weights would not do: after {steps} steps {outcome.missed(result.settings)}"
            attempt = Attempt(reason, steps, result.seconds)
        if original is not None:
            unwrapped(model).load_state_dict(original)
    return execute(model if inplace else copy.deepcopy(model), second, attempt, resume=at_second)


def _restart(
    model: nn.Module, initial: nn.Module | Mapping[str, Tensor] | None, chosen: Method | Recipe | None
) -> Restart:
    """The default's first attempt: from fresh weights, or from the caller's where there are any."""
    if initial is None:
        return Restart()
    if chosen is not None:
        raise ValueError("initial is what the default begins with: give it without method and recipe")
    given = unwrapped(initial).state_dict() if isinstance(initial, nn.Module) else dict(initial)
    wanted = unwrapped(model).state_dict()
    for name in sorted(given.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"initial must be weights of this model: {name} has shape {shapes[0]}, not {shapes[1]}")
    return Restart(initial=Weights({name: tensor.clone() for name, tensor in given.items()}))


def _chosen(method: str | Method | None, recipe: str | Recipe | None) -> Method | Recipe | None:
    """What was asked for; None for what the engine thinks best."""
    recipes = [*RECIPES]
    if method is None:
        if recipe is None or (isinstance(recipe, str) and recipe == DEFAULT):
            return None
        method, recipes = NABLA_TAU, [DEFAULT, *RECIPES]
    if not isinstance(method, str) and not hasattr(method, "stages"):
        raise TypeError(f"method must be a name or an object of nabla_tau.methods, got {method!r}")
    if isinstance(method, str) and method not in (NABLA_TAU, *METHODS):
        raise ValueError(f"method must be one of {', '.join([NABLA_TAU, *METHODS])}, got {method!r}")
    if method != NABLA_TAU:
        if recipe is not None:
            raise ValueError(f"recipe is of nabla-tau, got recipe {recipe!r} and method {method!r}")
        if isinstance(method, str):
            return METHODS[method]
        check_fields(method)
        return method
    if recipe is None or isinstance(recipe, str):
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(recipes)} or a Recipe, got {recipe!r}")
        return RECIPES[recipe or ASCENT.name]
    check_kind(recipe, Recipe, "recipe")
    return recipe


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
