"""nabla_tau: remove the influence of part of the training data from a trained PyTorch model, and show that it is gone.

result = nabla_tau.unlearn(model, forget=..., retain=..., held_out=...)
report = nabla_tau.audit(result.model, forget=..., unseen=..., retrained=...)
"""

from importlib.metadata import version as _version

from nabla_tau.auditing import AuditReport, audit
from nabla_tau.loop import NonFiniteLossError, UnlearnResult, unlearn
from nabla_tau.loss import NablaTauLoss, nabla_tau_loss
from nabla_tau.recipes import Recipe
from nabla_tau.unlearner import Unlearner

__version__ = _version("nabla_tau")
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
