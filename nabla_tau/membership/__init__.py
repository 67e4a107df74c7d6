"""Membership-inference statistics: how well can an attacker tell members of the training data from non-members?

Everywhere in this package a *score* is oriented so that a higher value means "more likely a member", and an attack is
judged on members (here: the forget set) against non-members (unseen samples of the same kind).
"""

from nabla_tau.membership.audit_report import AuditReport
from nabla_tau.membership.bootstrap import AucBootstrap, bootstrap_auc
from nabla_tau.membership.comparison import Comparison, choose_comparison
from nabla_tau.membership.curve import RocResult, roc
from nabla_tau.membership.logistic import MiaResult, simple_mia
from nabla_tau.membership.verdict import Finding, Verdict, judge

__all__ = [
    "AucBootstrap",
    "AuditReport",
    "Comparison",
    "Finding",
    "MiaResult",
    "RocResult",
    "Verdict",
    "bootstrap_auc",
    "choose_comparison",
    "judge",
    "roc",
    "simple_mia",
]
