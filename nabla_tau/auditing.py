"""`audit`: how well did a model forget, shown by membership inference against models that never saw the forget set.

An audit is evidence, not a certificate: it says what these attacks find on these samples. It never looks at how the
model was made, so it serves any unlearning method.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from nabla_tau import fingerprint
from nabla_tau.arguments import check_kind, numbers_checked
from nabla_tau.batch import Forward
from nabla_tau.evaluation import SampleLoss, Signals, device_of, evaluate
from nabla_tau.membership.assessment import SUBJECT, audit_signals, check_counts, check_record, check_statistics
from nabla_tau.membership.audit_report import AuditReport
from nabla_tau.membership.measures import ModelAudit
from nabla_tau.membership.shadow_samples import check_samples
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.progress import progress_bar
from nabla_tau.provenance import hardware
from nabla_tau.sources import Source, as_source

__all__ = ["AuditReport", "ModelAudit", "audit", "audit_signals"]


@numbers_checked
def audit(
    model: nn.Module,
    *,
    forget: Any,
    unseen: Any,
    retain: Any = None,
    retrained: nn.Module | Sequence[nn.Module] | None = None,
    original: nn.Module | None = None,
    compare: Mapping[str, nn.Module] | None = None,
    shadow: ShadowScores | str | os.PathLike[str] | None = None,
    forward: Forward | None = None,
    loss: SampleLoss | Literal["auto"] | None = "auto",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    record: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    tolerance: float = 0.03,
    random_state: int = 0,
    progress: bool = False,
) -> AuditReport:
    """Audit an unlearned model: attack it on the forget set, and compare it with models retrained without that set.

    Every model is evaluated once on every set, in eval mode, and left as it was. Give `retrained` if at all possible:
    without it the attack can only be compared with chance. The report is evidence, not a certificate.

    Args:
        model: the model that should have forgotten; called "unlearned" in the report.
        forget, unseen, retain: tensors, Dataset or DataLoader. `unseen` are samples of the same kind that no model was
            trained on (nor tuned on: not the held-out set that unlearning used). `retain` is only measured. A
            DataLoader that shuffles or drops the last batch is read whole, in the order of its dataset.
        retrained: model(s) trained without the forget set, as the original was; several are averaged, and their
            spread is shown.
        original: the model before unlearning. compare: further models by name, such as other methods.
        shadow: shadow models' scores of the "forget" and the "unseen" samples, or the folder of them
            (`nabla_tau.membership.shadow`): every model is attacked by LiRA and RMIA too, and by U-LiRA where
            these models unlearned. Without them three or more retrained models serve LiRA and RMIA, offline.
        forward: (model, batch) -> (logits, targets); loss: (logits, targets) -> per-sample losses [B]. Both only for
            models that are not plain classifiers; with a loss of one's own only the loss is attacked.
        device: where to evaluate; each model is moved there and back. Default: where it is.
        record: what was asked and done, JSON-able, put in the report (histories thinned to 2000 steps), which warns
            where its "fingerprints" are not those of what is audited. Its "removed_classes" says which classes were
            removed whole; else that is found from the targets of `forget` and `retain`, for which `retain` must then
            be all that was retained.
        seconds: wall time of each model by its name.
        bootstrap: replicates of the intervals. tolerance: AUC gap to the reference that still counts as forgotten.
        progress: a bar on a terminal.

    Raises ValueError for names that clash, models that disagree on the samples, fewer than 20 samples to compare,
    shadow models of other samples, and forgotten classes without unseen samples; TypeError for what is not a model.
    """
    started = time.perf_counter()
    runs = [] if retrained is None else [retrained] if isinstance(retrained, nn.Module) else list(retrained)
    run_names = ["retrained"] if len(runs) == 1 else [f"retrained {i + 1}" for i in range(len(runs))]
    models: dict[str, Any] = {} if original is None else {"original": original}
    models |= dict(zip(run_names, runs, strict=True)) | {SUBJECT: model}
    compare = {} if compare is None else compare
    check_kind(compare, Mapping, "compare")
    for name, other in compare.items():
        if name in models or name == "retrained":
            raise ValueError(f"compare: the name {name!r} is already used in this audit")
        models[name] = other
    for name, entry in models.items():
        check_kind(entry, nn.Module, name)
    data = {name: _in_order(of_set) for name, of_set in (("forget", forget), ("unseen", unseen), ("retain", retain))}
    check_record(record)
    check_statistics(bootstrap, confidence, tolerance, random_state)
    check_kind({} if seconds is None else seconds, Mapping, "seconds")
    device = None if device is None else _device(device)
    if shadow is not None:
        shadow = shadow if isinstance(shadow, ShadowScores) else ShadowScores.load(shadow)
        check_samples(shadow, {name: data[name] for name in ("forget", "unseen")})
    # Made once: counting what a loader gives may take a pass over it.
    given = {name: as_source(of_set, name) for name, of_set in data.items() if name != "retain" or of_set is not None}
    check_counts(given["forget"].count, given["unseen"].count)
    signals: dict[str, dict[str, Signals]] = {}
    with progress_bar("audit", len(models) * len(given), enabled=progress) as update:
        for name, entry in models.items():
            with _on_device(entry, device):
                for set_name, of_set in given.items():
                    signals.setdefault(name, {})[set_name] = evaluate(
                        entry, of_set, forward=forward, loss=None if loss == "auto" else loss, batch_size=batch_size
                    )
                    update(sum(map(len, signals.values())), f"{name}, {set_name} set")
    report = audit_signals(
        signals,
        retrained=run_names if runs else (),
        original=None if original is None else "original",
        shadow=shadow,
        record=record,
        fingerprints={
            "models": {name: fingerprint.of_model(entry) for name, entry in models.items()},
            "sets": {name: _of_source(source, signals[SUBJECT][name].target) for name, source in given.items()},
        },
        seconds=seconds,
        bootstrap=bootstrap,
        confidence=confidence,
        tolerance=tolerance,
        random_state=random_state,
    )
    return dataclasses.replace(
        report,
        hardware=hardware(torch.device(device) if device is not None else device_of(model)),
        seconds=time.perf_counter() - started,
    )


def _of_source(source: Source, targets: NDArray[np.int64] | None) -> str:
    return fingerprint.of_source(source, None if targets is None else torch.from_numpy(targets))


def _in_order(data: Any) -> Any:
    """A loader that reads all of its dataset in its order, for one that shuffles or drops the last batch.

    Samples are paired over models, and none may be left out. A sampler of the caller's own is kept, as it may choose.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset) or data.batch_size is None:
        return data
    if isinstance(data.sampler, RandomSampler):
        sampler = None
    elif data.drop_last:
        sampler = data.sampler
    else:
        return data
    return DataLoader(
        data.dataset,
        batch_size=data.batch_size,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
    )


def _device(device: torch.device | str) -> torch.device:
    """ValueError for what is no device, and for "meta", from which no weights come back."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is none: {error}") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no weights to evaluate")
    return found


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    home = device_of(model)
    if device is not None:
        model.to(device)
    try:
        yield
    finally:
        if device is not None:
            model.to(home)
