"""Membership-inference statistics: how well can an attacker tell members of the training data from non-members?

Everywhere in this package a *score* is oriented so that a higher value means "more likely a member", and an attack is
judged on members (here: the forget set) against non-members (unseen samples of the same kind).
"""

from nabla_tau.membership.audit_report import AuditReport
from nabla_tau.membership.bootstrap import AucBootstrap, TprBootstrap, bootstrap_auc
from nabla_tau.membership.closeness import JsResult, js_divergence, tow
from nabla_tau.membership.comparison import Comparison, choose_comparison
from nabla_tau.membership.curve import RocResult, roc
from nabla_tau.membership.delong import DelongResult, delong_test
from nabla_tau.membership.ensemble import Ensemble, train_ensemble
from nabla_tau.membership.forgetting import ForgettingResult, neurips_forgetting
from nabla_tau.membership.groups import GroupStats, group_stats
from nabla_tau.membership.likelihood_ratio import LiraResult, lira, ulira
from nabla_tau.membership.logistic import MiaResult, simple_mia
from nabla_tau.membership.margin_divergence import KlomResult, klom
from nabla_tau.membership.margins import logit_margin
from nabla_tau.membership.one_run import eps_one_run
from nabla_tau.membership.population import PopulationResult, attack_p, attack_r, quantile_attack
from nabla_tau.membership.privacy import EpsilonBound, eps_bayes, eps_clopper_pearson
from nabla_tau.membership.relative_membership import RmiaResult, rmia
from nabla_tau.membership.shadow import train_shadow_ensemble, train_shadow_models
from nabla_tau.membership.shadow_attacks import sample_scores
from nabla_tau.membership.shadow_samples import balanced_membership
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.membership.signal_thresholds import SongMittalResult, song_mittal
from nabla_tau.membership.svc import SvcMiaResult, svc_mia
from nabla_tau.membership.text import (
    KsResult,
    PrivLeakResult,
    TextScores,
    ks_quality,
    min_k,
    min_k_pp,
    privleak,
    reference_difference,
    token_statistics,
    zlib_ratio,
)
from nabla_tau.membership.thresholds import ClassThresholds, class_thresholds, yeom
from nabla_tau.membership.tofu import choice_probability, model_utility, rouge_l_recall, truth_ratio, truth_score
from nabla_tau.membership.verdict import Finding, Verdict, judge

__all__ = [
    "AucBootstrap",
    "AuditReport",
    "ClassThresholds",
    "Comparison",
    "DelongResult",
    "Ensemble",
    "EpsilonBound",
    "Finding",
    "ForgettingResult",
    "GroupStats",
    "JsResult",
    "KlomResult",
    "KsResult",
    "LiraResult",
    "MiaResult",
    "PopulationResult",
    "PrivLeakResult",
    "RmiaResult",
    "RocResult",
    "ShadowScores",
    "SongMittalResult",
    "SvcMiaResult",
    "TextScores",
    "TprBootstrap",
    "Verdict",
    "attack_p",
    "attack_r",
    "balanced_membership",
    "bootstrap_auc",
    "choice_probability",
    "choose_comparison",
    "class_thresholds",
    "delong_test",
    "eps_bayes",
    "eps_clopper_pearson",
    "eps_one_run",
    "group_stats",
    "js_divergence",
    "judge",
    "klom",
    "ks_quality",
    "lira",
    "logit_margin",
    "min_k",
    "min_k_pp",
    "model_utility",
    "neurips_forgetting",
    "privleak",
    "quantile_attack",
    "reference_difference",
    "rmia",
    "roc",
    "rouge_l_recall",
    "sample_scores",
    "simple_mia",
    "song_mittal",
    "svc_mia",
    "token_statistics",
    "tow",
    "train_ensemble",
    "train_shadow_ensemble",
    "train_shadow_models",
    "truth_ratio",
    "truth_score",
    "ulira",
    "yeom",
    "zlib_ratio",
]
