"""The methods of unlearning: nabla-tau itself, and those it is compared with, on the same data, loop and kernels.

    unlearn(model, ..., method="scrub")            # with its published settings
    unlearn(model, ..., method=Scrub(epochs=5))    # with others

A method is a frozen dataclass of settings that makes `stages`; `METHODS` has one of each by name. nabla-tau's own
settings are a `Recipe` (`unlearn(recipe=...)`).
"""

from __future__ import annotations

from nabla_tau.job import Job, Steps
from nabla_tau.methods.amnesiac import Amnesiac
from nabla_tau.methods.bad_teacher import BadTeacher
from nabla_tau.methods.finetune import Finetune
from nabla_tau.methods.fisher_forgetting import FisherForgetting
from nabla_tau.methods.grad_diff import GradDiff
from nabla_tau.methods.influence import Influence
from nabla_tau.methods.l1_sparse import L1Sparse
from nabla_tau.methods.last_layers import CFk, EUk
from nabla_tau.methods.nabla_tau import NablaTauSteps
from nabla_tau.methods.neg_grad import NegGrad, NegGradPlus
from nabla_tau.methods.ng_diff import NGDiff
from nabla_tau.methods.npo import NPO, SimNPO
from nabla_tau.methods.random_label import RandomLabel
from nabla_tau.methods.restart import Restart
from nabla_tau.methods.retrain import Retrain
from nabla_tau.methods.rmu import RMU
from nabla_tau.methods.salun import SalUn
from nabla_tau.methods.scrub import Scrub, ScrubR
from nabla_tau.methods.sfr_on import SFRon
from nabla_tau.methods.ssd import SSD
from nabla_tau.methods.stages import Method, StagedSteps
from nabla_tau.methods.token_weights import WGA, SatImp
from nabla_tau.methods.ug_clu import UGCLU
from nabla_tau.methods.undial import UNDIAL
from nabla_tau.methods.unsir import UNSIR
from nabla_tau.recipes import Recipe

# By kind: descent, ascent, layers; relearning; one shot; saliency and streams; losses that language models are
# unlearned with.
_ALL: tuple[Method, ...] = (
    *(Restart(), Retrain(), Finetune(), L1Sparse(), CFk(), EUk()),
    *(NegGrad(), NegGradPlus(), NGDiff()),
    *(RandomLabel(), Amnesiac(), SalUn(), Scrub(), ScrubR(), BadTeacher(), UNSIR()),
    *(SSD(), FisherForgetting(), Influence()),
    *(SFRon(), UGCLU()),
    *(GradDiff(), NPO(), SimNPO(), WGA(), SatImp(), UNDIAL(), RMU()),
)
METHODS = {method.name: method for method in _ALL}
NABLA_TAU = "nabla-tau"


def steps_of(method: Method | Recipe, job: Job) -> Steps:
    return NablaTauSteps(method, job) if isinstance(method, Recipe) else StagedSteps(method, job)
