"""The folder of a run of shadow models: whole or absent files, and all that a later reader must know of them.

    index.json        schema, what was asked (`ShadowPlan`), and, once complete, SHA-256 of the arrays
    membership.npy    uint8 [K, ceil(N / 8)]: numpy.packbits(trained on, axis=1)
    model-00007.part  scores of one finished model, while others are still missing
    scores.npy        float16 or float32 [K, N]: one row a model, higher is more likely a member
    unlearned.npy     the same after each model has unlearned its samples, where that was asked for

Each file appears at once, so a run that is killed goes on with the models whose part is missing. When all are there
the parts are joined into one array, which `ShadowScores.load` maps into memory without reading it into a copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nabla_tau.arguments import whole
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint, sha256, write_atomic

SCHEMA = "nabla_tau.shadow/1"
DTYPES = ("float16", "float32")
Packed = NDArray[np.uint8]


@dataclass(frozen=True)
class ShadowPlan:
    """What makes two runs the same run. sets: name -> number of samples, in the order of the columns; fingerprints: of
    their content; settings: whatever else the models depend on, JSON-able."""

    models: int
    sets: Mapping[str, int]
    fingerprints: Mapping[str, str]
    probability: float
    seed: int
    dtype: str
    unlearns: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(self.sets.values())

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("scores", "unlearned") if self.unlearns else ("scores",)


@dataclass(frozen=True, eq=False)
class ShadowScores:
    """Scores of every sample on every shadow model.

    scores: [K, N] float16 or float32, mapped from the file: logit margins, or negative losses where `signal` is "loss".
    unlearned: the same after each model unlearned its samples, or None. packed: numpy.packbits(membership, axis=1).
    sets: name -> number of samples; the columns are those of the sets one after the other. seconds: training time.
    """

    scores: NDArray[Any]
    unlearned: NDArray[Any] | None
    packed: Packed
    plan: ShadowPlan
    signal: str
    seconds: float

    @property
    def membership(self) -> NDArray[np.bool_]:
        """[K, N]: whether the model was trained on the sample."""
        return unpack(self.packed, self.plan.samples)

    def columns(self, name: str) -> slice:
        """Where the samples of a set stand. ValueError for a set that was not scored."""
        if name not in self.plan.sets:
            raise ValueError(f"the shadow models scored the sets {', '.join(self.plan.sets)}, not {name!r}")
        names = list(self.plan.sets)
        start = sum(self.plan.sets[before] for before in names[: names.index(name)])
        return slice(start, start + self.plan.sets[name])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ShadowScores:
        """The finished run in a folder. FileNotFoundError where there is none, ValueError where models are missing or
        a file is damaged (its SHA-256 is compared, which reads it once)."""
        folder = Path(folder)
        plan, index = read_index(folder)
        if not index.get("complete"):
            done = len(list(folder.glob("model-*.part")))
            raise ValueError(f"{folder} holds {done} of {plan.models} shadow models: train the others first")
        arrays = {name: _mapped(folder / f"{name}.npy", plan, index) for name in plan.arrays}
        return cls(
            scores=arrays["scores"],
            unlearned=arrays.get("unlearned"),
            packed=_read_membership(folder, plan),
            plan=plan,
            signal=index["signal"],
            seconds=index["seconds"],
        )


def unpack(packed: Packed, samples: int) -> NDArray[np.bool_]:
    return np.unpackbits(packed, axis=-1, count=samples).view(np.bool_)


class ShadowFolder:
    """A run on disk, begun or gone on with. ValueError, naming what differs, for a folder of another run."""

    def __init__(self, path: Path, plan: ShadowPlan, packed: Packed) -> None:
        self.path, self.plan = path, plan
        self._index = {"schema": SCHEMA, "plan": json.loads(json.dumps(asdict(plan))), "complete": False}
        if (path / "index.json").exists():
            found, self._index = read_index(path)
            if found != plan:
                both = {name: (value, asdict(plan)[name]) for name, value in asdict(found).items()}
                different = [
                    f"{name}: {there} there, {here} here" for name, (there, here) in both.items() if there != here
                ]
                raise ValueError(f"{path} holds another run of shadow models ({'; '.join(different)})")
            if not np.array_equal(_read_membership(path, plan), packed):
                raise ValueError(f"{path / 'membership.npy'} is not the one that the seed {plan.seed} gives")
        else:
            if path.exists() and any(path.iterdir()):
                raise ValueError(f"{path} is not empty and holds no shadow models: choose another folder")
            _write_array(path / "membership.npy", packed)
            self._write_index()

    @property
    def complete(self) -> bool:
        return bool(self._index["complete"])

    def missing(self) -> list[int]:
        """Models without a part. ValueError for a part that is damaged or from another run."""
        if self.complete:
            return []
        for temporary in self.path.glob("*.tmp"):
            temporary.unlink()
        missing = [model for model in range(self.plan.models) if not self._part(model).exists()]
        for model in set(range(self.plan.models)).difference(missing):
            self._read_part(model)
        return missing

    def write(self, model: int, scores: NDArray[Any], *, signal: str, seconds: float) -> None:
        """Scores [arrays of the plan, N] of one model."""
        limit = np.finfo(self.plan.dtype).max
        kept = torch.from_numpy(np.clip(scores, -limit, limit).astype(self.plan.dtype))
        state = {"run": self._run, "model": model, "scores": kept, "signal": signal, "seconds": seconds}
        save_checkpoint(self._part(model), state)

    def join(self) -> None:
        """All parts as one array a kind; then the parts go."""
        if not self.complete:
            absent = [model for model in range(self.plan.models) if not self._part(model).exists()]
            if absent:
                raise ValueError(
                    f"{self.path}: the files of {len(absent)} models, the first {absent[0]}, are not there: the folder "
                    "must be one that all workers see"
                )
            signals, seconds = set(), 0.0
            joined = {name: self._new_array(name) for name in self.plan.arrays}
            for model in range(self.plan.models):
                part = self._read_part(model)
                signals.add(part["signal"])
                seconds += part["seconds"]
                for name, row in zip(self.plan.arrays, part["scores"].numpy(), strict=True):
                    joined[name][model] = row
            for name, array in joined.items():
                array.flush()
                os.replace(self.path / f"{name}.npy.tmp", self.path / f"{name}.npy")
            (signal,) = signals
            files = {f"{name}.npy": sha256(self.path / f"{name}.npy") for name in self.plan.arrays}
            self._index |= {"complete": True, "signal": signal, "seconds": seconds, "sha256": files}
            self._write_index()
        for part_file in self.path.glob("model-*.part"):
            part_file.unlink()

    def _new_array(self, name: str) -> Any:
        shape = self.plan.models, self.plan.samples
        return np.lib.format.open_memmap(self.path / f"{name}.npy.tmp", mode="w+", dtype=self.plan.dtype, shape=shape)

    @property
    def _run(self) -> str:
        return json.dumps(self._index["plan"], sort_keys=True)

    def _part(self, model: int) -> Path:
        return self.path / f"model-{model:05d}.part"

    def _read_part(self, model: int) -> dict[str, Any]:
        path = self._part(model)
        remedy = "remove it, and only that model is trained again"
        try:
            state = load_checkpoint(path, torch.device("cpu"))
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if state.get("run") != self._run or state.get("model") != model:
            raise ValueError(f"{path} comes from another run or model; {remedy}")
        return state

    def _write_index(self) -> None:
        write_atomic(self.path / "index.json", (json.dumps(self._index, indent=1, allow_nan=False) + "\n").encode())


def read_index(folder: Path) -> tuple[ShadowPlan, dict[str, Any]]:
    """The plan of a run, and its whole index. FileNotFoundError without one, ValueError for one that is foreign or
    damaged."""
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"no shadow models in {folder}: it has no index.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        schema = index["schema"]
        plan = _plan(index) if schema == SCHEMA else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged index of shadow models: {type(error).__name__} {error}") from error
    if plan is None:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    return plan, index


def _plan(index: Mapping[str, Any]) -> ShadowPlan:
    """The plan that an index states. Raises TypeError, ValueError or KeyError for what cannot be one."""
    plan = ShadowPlan(**index["plan"])
    for name in ("sets", "fingerprints", "settings"):
        if not isinstance(getattr(plan, name), dict):
            raise TypeError(f"{name} is {getattr(plan, name)!r}")
    for name, number in {"models": plan.models, **plan.sets}.items():
        whole(number, name, least=1)
    if plan.dtype not in DTYPES:
        raise ValueError(f"dtype is {plan.dtype!r}")
    if index.get("complete"):
        float(index["seconds"])
        if index["signal"] not in ("margin", "loss") or not isinstance(index["sha256"], dict):
            raise ValueError("signal or sha256 are not those of shadow models")
    return plan


def _write_array(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _mapped(path: Path, plan: ShadowPlan, index: Mapping[str, Any]) -> NDArray[Any]:
    if not path.is_file() or sha256(path) != index["sha256"].get(path.name):
        raise ValueError(f"{path} is absent or damaged: its SHA-256 is not the one in the index")
    return _read_array(path, plan.dtype, (plan.models, plan.samples), mmap_mode="r")


def _read_membership(folder: Path, plan: ShadowPlan) -> Packed:
    return _read_array(folder / "membership.npy", "uint8", (plan.models, -(-plan.samples // 8)))


def _read_array(path: Path, dtype: str, shape: tuple[int, int], mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """ValueError for anything but such an array; objects, which are pickles, are not read."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        found = f"{array.dtype} {list(array.shape)}"
    except Exception as error:  # whatever the bytes of a damaged file lead to
        raise ValueError(f"{path} is absent or damaged: {error}") from error
    if found != f"{dtype} {list(shape)}":
        raise ValueError(f"{path} must hold {dtype} {list(shape)}, holds {found}")
    return array
