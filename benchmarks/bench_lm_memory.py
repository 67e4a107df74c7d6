"""lm_memory: peak memory of a step that forgets some sequences and keeps others, of causal language models.

Four forget and four retained sequences, one step of SGD, which keeps nothing, in float32. Providers: "Trainer", the
Trainer of Hugging Face transformers with the model's own loss on the eight sequences; "PyTorch", the objective in plain
PyTorch, a forward of each and cross-entropies of their logits; "nabla_tau", `Unlearner.step` through the fused head;
"nabla_tau, balanced", which keeps the gradients of the two parts apart, as the recipes "ascent" and "gentle" do.

On the CPU it is what the process takes at its highest beyond what it held before the step (case.process_peak_mb, Linux
only), which is all there is, scratch of libraries too; each in a process of its own, after a step to warm up. On a GPU
it is what PyTorch's allocator gave out, in one process. Gradients are part of it for all; the note says how much they
are. Weights are random, which memory does not depend on. ratio: of "Trainer" over a provider.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import process_peak_mb
from record import Record, peak_mb
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau import Unlearner
from nabla_tau.integrations import causal_lm

Batch = dict[str, Tensor]
Step = Callable[[], object]

SEQUENCES = 4  # of each kind
ALPHA, TAU = 0.25, 100.0  # far above the losses: an open gate, or the ascent would be left out
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
SIZES = [("4 layers", SMALL, vocabulary) for vocabulary in (8_192, 32_000, 50_257)]
SIZES.append(("SmolLM2-135M", SMOLLM2, 49_152))
LENGTHS = (128, 512)
QUICK_SIZES = [("4 layers", SMALL, 8_192)]


def trainer_step(model: nn.Module, forget: Batch, retain: Batch) -> Step:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:  # which it does not write to without a training
        arguments = TrainingArguments(folder, use_cpu=not next(model.parameters()).is_cuda, report_to=[])
        trainer = Trainer(model, arguments)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = {name: torch.cat([column, retain[name]]) for name, column in forget.items()}

    def step() -> None:
        trainer.training_step(model, batch)
        optimizer.step()

    return step


def pytorch_step(model: nn.Module, forget: Batch, retain: Batch) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss(batch: Batch) -> Tensor:
        logits, targets = causal_lm.logits_forward(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step() -> None:
        (ALPHA * F.relu(TAU - loss(forget)) ** 2 + (1 - ALPHA) * loss(retain)).backward()
        optimizer.step()

    return step


def nabla_tau_step(model: nn.Module, forget: Batch, retain: Batch, balance: float | None = None) -> Step:
    forward, loss = causal_lm.fused(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    unlearner = Unlearner(model, alpha=ALPHA, tau=TAU, balance=balance, optimizer=optimizer, forward=forward, loss=loss)
    return lambda: unlearner.step(forget, retain)


PROVIDERS: dict[str, Callable[[nn.Module, Batch, Batch], Step]] = {
    "Trainer": trainer_step,
    "PyTorch": pytorch_step,
    "nabla_tau": nabla_tau_step,
    "nabla_tau, balanced": lambda *given: nabla_tau_step(*given, balance=0.25),
}


def make_model(config: dict[str, Any], vocabulary: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**config, vocab_size=vocabulary, use_cache=False))
    return model.to(device)


def make_batch(vocabulary: int, length: int, device: str) -> Batch:
    ids = torch.randint(vocabulary, (SEQUENCES, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measure(provider: str, config: dict[str, Any], vocabulary: int, length: int, device: str, threads: int) -> float:
    """Megabytes of one step."""
    torch.set_num_threads(threads)
    model = make_model(config, vocabulary, device)
    step = PROVIDERS[provider](model, *(make_batch(vocabulary, length, device) for _ in range(2)))

    def whole() -> None:
        step()
        model.zero_grad()  # so that each step makes its gradients anew

    whole()
    return peak_mb(whole, device) if device == "cuda" else process_peak_mb(whole)


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SystemExit("lm_memory: transformers is not installed: pip install transformers accelerate") from None
    for name, config, vocabulary in QUICK_SIZES if quick else SIZES:
        model = make_model(config, vocabulary, "cpu")
        gradients = sum(p.numel() for p in model.parameters()) * 4 / 1e6
        for length in LENGTHS[:1] if quick else LENGTHS:
            found = {}
            for provider in PROVIDERS:
                given = (provider, config, vocabulary, length, device, threads)
                if device == "cuda":
                    found[provider] = measure(*given)
                else:
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        found[provider] = pool.apply(measure, given)
                yield Record(
                    bench="lm_memory",
                    case=f"{name}, V = {vocabulary:,}, {2 * SEQUENCES} x {length} tokens",
                    provider=provider,
                    device=device,
                    dtype="float32",
                    threads=threads,
                    p50=found[provider],
                    unit="MB",
                    ratio=found["Trainer"] / found[provider],
                    baseline="Trainer",
                    peak_mb=found[provider],
                    note=f"gradients {gradients:.0f} MB",
                )
