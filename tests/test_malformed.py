"""Public functions with arguments that make no sense: a TypeError, ValueError or OSError that says so, never an error
from deep inside; and the model that was given is bit for bit as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs, mlp

import nabla_tau
from nabla_tau import NonFiniteLossError, Unlearner, audit, digest, nabla_tau_loss, unlearn
from nabla_tau import membership as m
from nabla_tau.auditing import audit_signals
from nabla_tau.certified import CertifiedLinear, LastLayer, LogisticRegression, RidgeRegression
from nabla_tau.deletion_log import DeletionLog
from nabla_tau.evaluation import evaluate
from nabla_tau.functional import row_losses
from nabla_tau.methods import METHODS
from nabla_tau.optim import DualAdamW, DualSGD
from nabla_tau.recipes import ASCENT
from nabla_tau.row_objectives import grad_diff, npo
from nabla_tau.suites import Suite
from nabla_tau.suites.runs import compare_methods
from nabla_tau.suites.scenarios import Scenario, split

RUBBISH: dict[str, Any] = {
    "None": None,
    "text": "x",
    "absent file": "/no/such/file",
    "folder": "/",
    "bytes": b"x",
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "nan": float("nan"),
    "inf": float("inf"),
    "half": 0.5,
    "bool": True,
    "object": object(),
    "function": lambda *_, **__: None,
    "class": torch.nn.Linear,
    "empty list": [],
    "ragged list": [[1, 2], [3]],
    "dict": {},
    "set": {1, 2},
    "array of objects": np.array([object()] * 60),
    "array of text": np.array(["a"] * 60),
    "array of NaN": np.full(60, np.nan),
    "complex": np.zeros(60, complex),
    "no samples": np.zeros(0),
    "matrix": np.zeros((3, 4)),
    "NaN inputs": (torch.full((60, 8), torch.nan), torch.zeros(60).long()),
    "labels out of range": (torch.zeros(60, 8), torch.full((60,), 9)),
    "other features": (torch.zeros(60, 5), torch.zeros(60).long()),
    "float16": (torch.zeros(60, 8).half(), torch.zeros(60).long()),
    "integers": (torch.zeros(60, 8).long(), torch.zeros(60).long()),
    "no pairs": (torch.zeros(0, 8), torch.zeros(0).long()),
    "other lengths": (torch.zeros(60, 8), torch.zeros(59).long()),
}

MODEL = mlp()
FORGET, RETAIN, HELD_OUT, UNSEEN = (blobs(60, seed=seed) for seed in range(4))
_rng = np.random.default_rng(0)
A, B = _rng.normal(size=60), _rng.normal(size=80)
LABELS, CLASSES = _rng.random(60) < 0.5, _rng.integers(0, 5, 60)
LOGITS = _rng.normal(size=(60, 5))
GROUP, SCORES = _rng.random((16, 60)) < 0.5, _rng.normal(size=(16, 60))
PROBLEM = LogisticRegression(feature_norm=1.0, l2=0.1)
ROWS = 0.9 * torch.nn.functional.normalize(torch.randn(60, 4)), torch.randint(2, (60,))


def learner() -> CertifiedLinear:
    return CertifiedLinear(PROBLEM, eps=1.0, delta=1e-5, iterations=20)


def delete(ids: Any) -> None:
    fitted = learner()
    fitted.fit(*ROWS)
    fitted.delete(ids)


def call(function: Callable[..., Any], /, **right: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    return function, right


AUDIT = {"retrained": None, "original": None, "compare": None, "shadow": None, "forward": None, "loss": "auto"}
AUDIT |= {"batch_size": 64, "device": None, "record": None, "seconds": None, "bootstrap": 100, "confidence": 0.95}
MIXED = {"logits": torch.randn(6, 3), "targets": torch.randint(3, (6,)), "forget_mask": torch.arange(6) < 2}
SURE = {"confidence": 0.95, "random_state": 0}

# Every argument in turn is replaced by everything in RUBBISH.
CALLS = {
    "audit": call(audit, model=MODEL, forget=FORGET, unseen=UNSEEN, retain=RETAIN, **AUDIT, tolerance=0.03),
    "evaluate": call(evaluate, model=MODEL, data=FORGET, forward=None, loss=None, batch_size=64),
    "nabla_tau_loss": call(nabla_tau_loss, **MIXED, tau=1.0, alpha=0.5, gate="batch", power=2, class_weights=None),
    "Unlearner": call(Unlearner, model=MODEL, alpha=0.5, tau=1.0, gate="batch", balance=None, optimizer=None),
    "Recipe": call(
        lambda **others: dataclasses.replace(ASCENT, **others),
        **{name: getattr(ASCENT, name) for name in ("gate", "power", "alpha", "batch_size", "shrink", "noise")},
    ),
    "attack_p": call(m.attack_p, scores=A, population=B, classes=None, population_classes=None),
    "bootstrap_auc": call(m.bootstrap_auc, members={"m": A}, nonmembers={"m": B}, replicates=100, random_state=0),
    "class_thresholds": call(m.class_thresholds, scores=A, labels=LABELS, classes=CLASSES),
    "delong_test": call(m.delong_test, scores_a=A, scores_b=2 * A, labels=LABELS, confidence=0.95),
    "eps_bayes": call(m.eps_bayes, scores=A, labels=LABELS, delta=0.0, **SURE),
    "eps_clopper_pearson": call(m.eps_clopper_pearson, scores=A, labels=LABELS, delta=0.0, **SURE),
    "eps_one_run": call(m.eps_one_run, scores=A, labels=LABELS, guesses=None, delta=0.0, **SURE),
    "group_stats": call(m.group_stats, scores=SCORES, group=GROUP, center="mean"),
    "js_divergence": call(m.js_divergence, logits=LOGITS, other=2 * LOGITS),
    "klom": call(m.klom, unlearned=SCORES, retrained=SCORES, bins=20, clip=100.0, null_samples=16),
    "ks_quality": call(m.ks_quality, unlearned=A, retrained=B),
    "lira": call(m.lira, target=A, stats=m.group_stats(SCORES, GROUP), mode="online", variance="auto"),
    "logit_margin": call(m.logit_margin, logits=LOGITS, labels=CLASSES),
    "min_k": call(m.min_k, log_probs=-abs(LOGITS), k=0.2, mask=None),
    "neurips_forgetting": call(m.neurips_forgetting, unlearned=SCORES, retrained=SCORES, delta=1e-5, null_samples=16),
    "privleak": call(m.privleak, auc=0.6, auc_retrained=0.5),
    "quantile_attack": call(
        m.quantile_attack, scores=A, features=LOGITS, population_scores=A, population_features=LOGITS, regressor=None
    ),
    "roc": call(m.roc, scores=A, labels=LABELS),
    "simple_mia": call(m.simple_mia, members=A, nonmembers=B),
    "svc_mia": call(m.svc_mia, retain=LOGITS, test=LOGITS, forget=LOGITS, max_samples=50),
    "token_statistics": call(m.token_statistics, logits=LOGITS, targets=CLASSES),
    "ulira": call(m.ulira, target=A, unlearned=SCORES, retrained=SCORES, center="mean"),
    "yeom": call(m.yeom, member_losses=A, nonmember_losses=B, mean_train_loss=None, confidence=0.95),
    "LogisticRegression": call(LogisticRegression, feature_norm=1.0, l2=0.1, diameter=None, classes=2),
    "RidgeRegression": call(RidgeRegression, feature_norm=1.0, l2=0.1, target_norm=1.0, outputs=1),
    "CertifiedLinear": call(CertifiedLinear, problem=PROBLEM, eps=1.0, delta=1e-5, iterations=20, theorem=9),
    "CertifiedLinear.fit": call(lambda **data: learner().fit(**data), x=ROWS[0], y=ROWS[1]),
    "CertifiedLinear.delete": call(delete, ids=[]),
    "LastLayer": call(LastLayer, model=MODEL, learner=learner(), layer=None),
    "Suite": call(
        Suite, name="s", data=dict, model=dict, shadow=None, train=9, held_out=9, epochs=1, learning_rate=0.1
    ),
    "Scenario": call(Scenario, kind="random", amount=0.5),
    "split": call(split, data=UNSEEN, scenario=Scenario("random", 0.5), train=20, held_out=5, seed=0),
    "of_ids": call(digest.of_ids, ids=["a"]),
    "stated": call(digest.stated, digest="0" * 64, key=b"x" * 16),
    "DeletionLog.request": call(
        lambda **given: DeletionLog("a.log").request(**given), ids_fingerprint="0" * 64, count=1, note="x"
    ),
    "DeletionLog.note": call(lambda text: DeletionLog("a.log").note(text), text="x"),
    "DeletionLog.result": call(lambda result: DeletionLog("a.log").result(result), result={}),
    "DeletionLog.audit": call(lambda report: DeletionLog("a.log").audit(report), report=None),
    "DeletionLog.verify": call(lambda head: DeletionLog("a.log").verify(head), head=None),
    "AuditReport.load": call(nabla_tau.AuditReport.load, path="absent.json"),
    "AuditReport.from_dict": call(nabla_tau.AuditReport.from_dict, content={}),
}


RUN = {"forget": FORGET, "retain": RETAIN, "held_out": HELD_OUT, "seed": 0, "recipe": None, "method": "finetune"}
RUN |= {"forward": None, "loss": None, "micro_batch_size": None, "checkpoint_every": None, "process_group": "auto"}
NOT_ONE_NUMBER = {
    "two": torch.ones(2),
    "array": np.ones(3),
    "text": "3",
    "bool": True,
    "nan": float("nan"),
    "None": None,
}
NUMBER = re.compile(r"(int|float)( \| (Tensor|Target|None))*")
LOSSES = {"losses": torch.rand(6), "forget_mask": MIXED["forget_mask"]}
# Beside those of `CALLS`, functions of which every number is asked for, and is one.
NUMERIC = {
    "NablaTauLoss": call(nabla_tau.NablaTauLoss, tau=1.0, alpha=0.5),
    "Recipe": call(nabla_tau.Recipe, **vars(ASCENT)),
    "audit_signals": call(audit_signals, signals={}),
    "compare_methods": call(compare_methods, suite=None, scenario=None),
    "grad_diff": call(grad_diff, **LOSSES),
    "npo": call(npo, **LOSSES, reference=torch.rand(6)),
    "row_losses": call(row_losses, logits=MIXED["logits"], targets=MIXED["targets"]),
    "rmia": call(m.rmia, scores=None),
    "train_ensemble": call(m.train_ensemble),
    "train_shadow_models": call(m.train_shadow_models),
    "DualAdamW": call(DualAdamW, params=MODEL.parameters()),
    "DualSGD": call(DualSGD, params=MODEL.parameters()),
}


@pytest.mark.parametrize("name", CALLS | NUMERIC)
def test_what_is_not_one_number(name):
    function, right = (CALLS | NUMERIC)[name]
    for argument, parameter in inspect.signature(function).parameters.items():
        if not NUMBER.fullmatch(str(parameter.annotation)):
            continue
        for kind, value in NOT_ONE_NUMBER.items():
            many = argument == "tau" and kind in ("two", "array")  # the held-out losses themselves
            if many or (value is None and "None" in parameter.annotation):
                continue
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
                function(**(right | {argument: value}))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_whose_setting_is_not_one_number(name):
    for field in dataclasses.fields(METHODS[name]):
        for value in NOT_ONE_NUMBER.values() if NUMBER.fullmatch(field.type) else ():
            if value is not None or "None" not in field.type:
                with pytest.raises(
                    (TypeError, ValueError), match=rf"{type(METHODS[name]).__name__}: {field.name} must"
                ):
                    unlearn(MODEL, **(RUN | {"method": dataclasses.replace(METHODS[name], **{field.name: value})}))


@pytest.mark.parametrize("argument", ["seed", "micro_batch_size", "checkpoint_every"])
def test_a_run_whose_setting_is_not_one_number(argument):
    for value in NOT_ONE_NUMBER.values():
        if value is not None or argument == "seed":
            with pytest.raises((TypeError, ValueError), match=f"^{argument} must be"):
                unlearn(MODEL, **(RUN | {argument: value}))


def tried(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    before = [p.clone() for p in MODEL.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(TypeError, ValueError, OSError, NonFiniteLossError):
            function(**arguments)
    assert all(torch.equal(p, was) for p, was in zip(MODEL.parameters(), before, strict=True))
    assert MODEL.training


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_makes_no_sense(name):
    function, right = CALLS[name]
    for argument in right:
        for value in RUBBISH.values():
            tried(function, right | {argument: value})


NO_DATA = ["text", "ragged list", "labels out of range", "other features", "float16", "integers", "other lengths"]
WRONG = [
    *((name, value) for name in ("forget", "retain", "held_out") for value in ["None", "no pairs", *NO_DATA]),
    *(("seed", value) for value in ("None", "text", "negative", "huge", "half", "nan", "bool", "matrix")),
    *(("recipe", value) for value in ("text", "zero", "object", "dict", "class", "matrix", "function")),
    *(("method", value) for value in ("text", "zero", "object", "dict", "matrix", "function")),
    *((name, value) for name in ("forward", "loss") for value in ("text", "object", "function", "half")),
    *(("micro_batch_size", value) for value in ("text", "zero", "negative", "half")),
    *(("checkpoint_every", value) for value in ("text", "zero", "negative", "half")),
]


@pytest.mark.parametrize(("argument", "rubbish"), WRONG)
def test_a_run_that_makes_no_sense_is_refused_before_anything_is_changed(argument, rubbish):
    before = [p.clone() for p in MODEL.parameters()]
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)) as error:
        unlearn(MODEL, **(RUN | {argument: RUBBISH[rubbish]}), inplace=True)
    assert str(error.value)
    assert all(torch.equal(p, was) for p, was in zip(MODEL.parameters(), before, strict=True))
    assert MODEL.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rubbish", ["None", "text", "zero", "object", "matrix", "class", "function"])
def test_what_is_no_model(rubbish):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        unlearn(RUBBISH[rubbish], **RUN)


@pytest.mark.parametrize("device", ["meta", "moon", "cuda:99"])
def test_a_device_that_holds_no_weights_does_not_cost_them(device):
    """To "meta" a module can be moved, and never back."""
    before = [p.clone() for p in MODEL.parameters()]
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        audit(MODEL, forget=FORGET, unseen=UNSEEN, device=device)
    assert all(torch.equal(p, was) for p, was in zip(MODEL.parameters(), before, strict=True))
