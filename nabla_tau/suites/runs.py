"""Every method on the same original and retrained models of a suite, which are trained once and kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import nabla_tau
from nabla_tau import fingerprint
from nabla_tau.arguments import check_kind, numbers_checked
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint, write_atomic
from nabla_tau.evaluation import forward_batches
from nabla_tau.loop import DEFAULT, unlearn
from nabla_tau.methods import METHODS, NABLA_TAU
from nabla_tau.progress import progress_bar
from nabla_tau.provenance import versions
from nabla_tau.recipes import RECIPES
from nabla_tau.result import NonFiniteLossError, UnlearnResult
from nabla_tau.suites import SUITES, Suite, train
from nabla_tau.suites.data import Data
from nabla_tau.suites.measures import Answers, answers, compared, remarks
from nabla_tau.suites.scenarios import Parts, Scenario, split
from nabla_tau.suites.shadows import Shadows
from nabla_tau.suites.table import ComparisonTable, Row
from nabla_tau.task import import_file

T = TypeVar("T")
ORIGINAL, RETRAINED = "original", "retrained again"
SHADOWS = 16
SHORT = 2.0  # seconds: whatever else the machine does would show in what takes less
# "retrain" is what all are measured against, with the suite's own training; "retrained again" is its noise.
ALL = (DEFAULT, NABLA_TAU, "nabla-tau (paper)", *(name for name in METHODS if name not in ("restart", "retrain")))


def method_of(name: str) -> dict[str, str]:
    """What `unlearn` is given for a name of `ALL`. Raises ValueError for any other."""
    if name == DEFAULT:
        return {}
    if name == "nabla-tau (paper)":
        return {"recipe": "paper"}
    if name != NABLA_TAU and name not in METHODS:
        raise ValueError(f"methods must be of {', '.join(ALL)}, got {name!r}")
    return {"method": name}


def quick(suite: Suite) -> Suite:
    """A quarter of the samples: to see that it runs, and roughly how methods stand."""
    return dataclasses.replace(suite, train=suite.train // 4, held_out=suite.held_out // 4)


def load_suite(where: str) -> Suite:
    """A suite by name, or the SUITE of a Python file. Raises ValueError, FileNotFoundError or ImportError."""
    if where in SUITES:
        return SUITES[where]
    if Path(where).suffix != ".py":
        raise ValueError(f"data must be one of {', '.join(SUITES)} or a Python file with a SUITE, got {where!r}")
    suite = getattr(import_file(where), "SUITE", None)
    if not isinstance(suite, Suite):
        raise ValueError(f"{where} must define SUITE, a nabla_tau.suites.Suite, got {suite!r}")
    return suite


@numbers_checked
def compare_methods(
    suite: Suite,
    scenario: Scenario,
    *,
    methods: Sequence[str] = ALL,
    seeds: Sequence[int] = (0, 1, 2),
    shadows: int = SHADOWS,
    cache: Path | None = None,
    progress: bool = False,
) -> ComparisonTable:
    """Unlearn the same samples from the same model by each method, and measure how far each is from retraining.

    Of every seed the split, the original, the model retrained without the forget set and one more retrained with
    another seed are made once and kept in `cache` (default: nabla_tau in the user's cache folder), and so is every row
    that is finished: a run that was cut off goes on where it was. Seconds are those of one training or run; of one that
    takes less than two, the median of three. shadows: models of the U-LiRA attack, on the first seed; 0 leaves it out.
    A method that cannot serve the suite has a row that says why.

    Raises ValueError for unknown methods, a scenario that the data cannot fill, and what `Suite` raises.
    """
    for name in methods:
        method_of(name)
    if shadows and shadows < SHADOWS:
        raise ValueError(f"U-LiRA needs at least {SHADOWS} shadow models, got {shadows}")
    data = _data(suite)
    store = _Store(cache or _default_cache(), _key(suite, scenario, data))
    rows: list[Row] = []
    names = (ORIGINAL, RETRAINED, *methods)
    with progress_bar(f"{suite.name}, {scenario}", len(seeds) * len(names), enabled=progress) as update:
        for seed in seeds:
            update(len(rows), f"seed {seed}: original and retrained")
            case = _Case(suite, scenario, data, seed, store, shadows if seed == seeds[0] else 0)
            for name in names:
                update(len(rows), f"seed {seed}: {name}")
                rows.append(case.row(name))
        update(len(rows), "")
    return ComparisonTable(
        suite=suite.name,
        scenario=str(scenario),
        rows=rows,
        counts={name: len(part[0]) for name, part in case.parts._asdict().items()},
        settings={
            "seeds": list(seeds),
            "shadow_models": shadows if suite.shadow is not None else 0,
            "threads": torch.get_num_threads(),
            "device": suite.device,
            "versions": versions(),
        },
    )


def _data(suite: Suite) -> Data:
    """The suite's data on its device. ValueError and TypeError for data that is none, or that its model cannot take."""
    given = suite.data()
    kinds = [type(column).__name__ for column in given] if isinstance(given, tuple) else type(given).__name__
    if kinds != ["Tensor", "Tensor"]:
        raise TypeError(f"data() of suite {suite.name} must give two tensors, inputs and labels, got {kinds}")
    x, y = given
    if x.ndim < 1 or y.shape != x.shape[:1] or y.dtype != torch.int64 or y.numel() == 0 or int(y.min()) < 0:
        raise ValueError(
            f"data() of suite {suite.name} must give inputs [N, ...] and int64 labels [N] from 0, got "
            f"{list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}"
        )
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError(f"data() of suite {suite.name} gives inputs that are not finite")
    model = suite.model()
    check_kind(model, nn.Module, f"model() of suite {suite.name}")
    logits, _ = next(forward_batches(model, [(x[:2], y[:2])]))
    if logits.ndim != 2 or logits.shape[1] <= int(y.max()):
        raise ValueError(
            f"the model of suite {suite.name} must give logits [N, C] of more than {int(y.max())} classes, got "
            f"{list(logits.shape)}"
        )
    return x.to(suite.device), y.to(suite.device)


class _Case:
    """One seed: its parts, and the models that all methods share."""

    def __init__(self, suite: Suite, scenario: Scenario, data: Data, seed: int, store: _Store, shadows: int) -> None:
        self.suite, self.seed, self.store = suite, seed, store
        fit = functools.partial(
            train, suite.model, epochs=suite.epochs, batch_size=suite.batch_size, learning_rate=suite.learning_rate
        )
        self.parts: Parts = split(
            data,
            scenario,
            train=suite.train,
            held_out=suite.held_out,
            seed=seed,
            reference=functools.partial(fit, seed=seed),
        )
        self.models: dict[str, tuple[nn.Module, float]] = {}
        for name, part, own_seed in (
            (ORIGINAL, self.parts.train, seed),
            ("retrained", self.parts.retain, seed + 1000),
            (RETRAINED, self.parts.retain, seed + 2000),
        ):
            self.models[name] = self.store.model(f"{name} {seed}", suite, functools.partial(fit, part, seed=own_seed))
        self._shadow_count = shadows if suite.shadow is not None else 0

    @functools.cached_property
    def answers(self) -> dict[str, Answers]:
        return {name: answers(model, self.parts) for name, (model, _) in self.models.items()}

    @functools.cached_property
    def shadows(self) -> Shadows:
        return Shadows(self.suite, self.parts, models=self._shadow_count, seed=self.seed)

    def row(self, name: str) -> Row:
        what = f"{name} {self.seed} {self._shadow_count} {METHODS.get(name, RECIPES)!r}"
        return self.store.row(what, lambda: self._row(name))

    def _row(self, name: str) -> Row:
        retrained, training = self.answers["retrained"], self.models["retrained"][1]
        if name in self.models:
            _, seconds = self.models[name]
            measures = compared(self.answers[name], retrained) | {"seconds": seconds, "share": seconds / training}
            if self._shadow_count:
                measures |= self._attacked(lambda model, *_: model) if name == ORIGINAL else self._exact()
            return Row(name, self.seed, measures, [])
        try:
            result, seconds = _timed(lambda: self._unlearned(name))
        except ValueError as error:
            return Row(name, self.seed, {}, [f"not for this: {error}"])
        except NonFiniteLossError as error:
            return Row(name, self.seed, {}, [f"failed: a loss became non-finite in step {error.step}"])
        found = answers(result.model, self.parts)
        measures = compared(found, retrained) | {"seconds": seconds, "share": seconds / training}
        attempt = result.settings.get("attempt")
        said = [*([attempt["reason"]] if attempt else []), *remarks(found, self.answers[ORIGINAL], retrained)]
        if self._shadow_count:
            try:
                measures |= self._attacked(lambda *given: self._unlearn(name, *given).model)
            except (ValueError, NonFiniteLossError) as error:
                said.append(f"U-LiRA failed: {error}")
        return Row(name, self.seed, measures, said)

    def _attacked(self, unlearn: Callable[[nn.Module, Data, int], nn.Module]) -> dict[str, float]:
        return {"ulira": self.shadows.ulira(unlearn), "ruli": self.shadows.ruli(unlearn)}

    def _exact(self) -> dict[str, float]:
        """Of retraining, whichever half of the forget set was there before."""
        return {"ulira": self.shadows.control, "ruli": self.shadows.control}

    def _unlearned(self, name: str) -> tuple[UnlearnResult, float]:
        result = self._unlearn(name, self.models[ORIGINAL][0], self.parts.forget, self.seed)
        return result, result.seconds

    def _unlearn(self, name: str, model: nn.Module, forget: Data, seed: int) -> UnlearnResult:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what a method fails to do is what is measured
            return unlearn(
                model,
                forget=forget,
                retain=self.parts.retain,
                held_out=self.parts.held_out,
                seed=seed,
                **method_of(name),  # type: ignore[arg-type]
            )


class _Store:
    """Trained models and finished rows of one suite and scenario, in a folder of the cache."""

    def __init__(self, cache: Path, key: str) -> None:
        self.folder = cache / key

    def model(self, name: str, suite: Suite, make: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
        path = self.folder / f"{name.replace(' ', '_')}.ckpt"
        if path.is_file():
            state = load_checkpoint(path, torch.device(suite.device))
            model = suite.model().to(suite.device).eval()
            try:
                model.load_state_dict(state["model"])
                return model, float(state["seconds"])
            except (KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"{path} is of another model: remove it, and it is made again ({error})") from error

        def made() -> tuple[nn.Module, float]:
            started = time.perf_counter()
            return make(), time.perf_counter() - started

        model, seconds = _timed(made)
        save_checkpoint(path, {"model": model.state_dict(), "seconds": seconds})
        return model, seconds

    def row(self, what: str, make: Callable[[], Row]) -> Row:
        digest = hashlib.sha256(f"{what} {_code()}".encode()).hexdigest()[:24]
        path = self.folder / f"row-{digest}.json"
        if path.is_file():
            try:
                return Row(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged: remove it, and it is made again ({error})") from error
        row = make()
        write_atomic(path, json.dumps(dataclasses.asdict(row)).encode())
        return row


def _timed(run: Callable[[], tuple[T, float]]) -> tuple[T, float]:
    """What `run` gives the first time, and its seconds: the median of three where they are few (`SHORT`)."""
    found, seconds = run()
    times = [seconds, *(run()[1] for _ in range(2) if seconds < SHORT)]
    return found, statistics.median(times)


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nabla_tau" / "compare"


def _key(suite: Suite, scenario: Scenario, data: Data) -> str:
    """A folder for everything that the trained models depend on; the model's code by its parameters' shapes."""
    shapes = [tuple(tensor.shape) for tensor in suite.model().state_dict().values()]
    settings = (suite.train, suite.held_out, suite.epochs, suite.batch_size, suite.learning_rate, suite.device)
    text = f"{settings} {scenario!r} {shapes} {fingerprint.of_tensors(data)} {torch.__version__}"
    return f"{suite.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.cache
def _code() -> str:
    """Fingerprint of this package's own files: a row is of the code that made it."""
    root = Path(nabla_tau.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
