"""nabla_tau: remove the influence of part of the training data from a trained PyTorch model, and show that it is gone.

    result = nabla_tau.unlearn(model, forget=..., retain=..., held_out=...)
    report = nabla_tau.audit(result.model, forget=..., unseen=..., retrained=...)

The names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_tau.auditing import AuditReport, audit
    from nabla_tau.loop import unlearn
    from nabla_tau.loss import NablaTauLoss, nabla_tau_loss
    from nabla_tau.recipes import Recipe
    from nabla_tau.result import NonFiniteLossError, UnlearnResult
    from nabla_tau.unlearner import Unlearner

__all__ = [
    "AuditReport",
    "NablaTauLoss",
    "NonFiniteLossError",
    "Recipe",
    "UnlearnResult",
    "Unlearner",
    "audit",
    "nabla_tau_loss",
    "unlearn",
]

_HOMES = {
    "AuditReport": "auditing",
    "NablaTauLoss": "loss",
    "NonFiniteLossError": "result",
    "Recipe": "recipes",
    "UnlearnResult": "result",
    "Unlearner": "unlearner",
    "audit": "auditing",
    "nabla_tau_loss": "loss",
    "unlearn": "loop",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("nabla_tau")
    if name in _HOMES:
        return getattr(import_module(f"nabla_tau.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
