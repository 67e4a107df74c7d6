"""A user's own work for the CLI: a Python file, or an import path, that says what the model and the data are.

def model(): ...            an untrained module of the right shape
def data(): ...             {"forget": ..., "retain": ..., "held_out": ..., "unseen": ...}
def train(model, data): ... optional: trains a module on a data set, for `audit --retrain`
def forward(model, batch): ... optional: (logits, targets), where the model is not simply called on the inputs
def loss(logits, targets): ... optional: per-sample losses [B], for anything but classification
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from nabla_tau.arguments import check_kind
from nabla_tau.batch import Forward
from nabla_tau.evaluation import SampleLoss


@dataclass(frozen=True)
class Task:
    """What a task file gives; `data` has been called, `model` makes a new module at every call."""

    model: Callable[[], nn.Module]
    data: dict[str, Any]
    train: Callable[[nn.Module, Any], Any] | None
    forward: Forward | None
    loss: SampleLoss | None

    def new_model(self) -> nn.Module:
        """A new model. Raises TypeError where model() gives something else, and what it raises."""
        model = self.model()
        check_kind(model, nn.Module, "model() of the task")
        return model

    def require(self, *names: str) -> dict[str, Any]:
        """The named data sets. Raises ValueError for one that data() does not give."""
        missing = [name for name in names if self.data.get(name) is None]
        if missing:
            raise ValueError(f"data() of the task must give {', '.join(missing)}; it gives {', '.join(self.data)}")
        return {name: self.data[name] for name in names}


def load_task(where: str) -> Task:
    """Load a task from a file ("task.py") or an import path ("package.module").

    Raises FileNotFoundError, ImportError, or ValueError naming what is missing in it. What it raises itself passes
    through.
    """
    module = import_file(where)
    for name in ("model", "data"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"task {where} must define {name}()")
    data = module.data()
    if not isinstance(data, dict):
        raise ValueError(f"data() of task {where} must give a dict of data sets, got {type(data).__name__}")
    return Task(module.model, data, *(getattr(module, name, None) for name in ("train", "forward", "loss")))


def import_file(where: str) -> ModuleType:
    """The module of a file ("task.py") or an import path. Raises FileNotFoundError, ImportError, and what it raises."""
    path = Path(where)
    if path.suffix != ".py":
        if not all(part.isidentifier() for part in where.split(".")):
            raise ValueError(f"a task is a .py file or an import path such as package.module, got {where!r}")
        return importlib.import_module(where)
    if not path.is_file():
        raise FileNotFoundError(f"no task file at {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As when Python runs a file: what lies beside it can be imported, and its classes can be found by worker processes.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
