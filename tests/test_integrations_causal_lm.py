"""Causal language models: losses through the fused head are those of the logits, and the logits are never stored."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import transformers
from record import peak_mb
from transformers_models import LENGTH, MODELS, PROMPT, Rows, gpt2, llama, memorise, text

import nabla_tau
from nabla_tau.functional import sample_losses
from nabla_tau.integrations import causal_lm
from nabla_tau.methods.grad_diff import GradDiff
from nabla_tau.methods.npo import NPO, SimNPO
from nabla_tau.row_objectives import npo_values

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def gradients_of(model: nn.Module, losses: torch.Tensor) -> list[torch.Tensor]:
    """Of a function of the losses in which each has another weight."""
    (losses * torch.linspace(-1, 2, len(losses), dtype=losses.dtype)).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_fused_losses_and_gradients_are_those_of_the_logits(name, dtype):
    model, batch = MODELS[name]().to(dtype), text(5, 1)
    plain = sample_losses(*causal_lm.logits_forward(model, batch))
    wanted = gradients_of(model, plain)
    model.zero_grad()
    forward, loss = causal_lm.fused(model)
    found = loss(*forward(model, batch))
    torch.testing.assert_close(found, plain, rtol=TOLERANCE[dtype], atol=0)
    for mine, theirs in zip(gradients_of(model, found), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype] * float(theirs.abs().max()))


def test_the_loss_is_the_models_own_on_the_completion():
    model, batch = gpt2(), text(4, 2)
    forward, loss = causal_lm.fused(model)
    for row in range(4):
        one = {name: column[row : row + 1] for name, column in batch.items()}
        torch.testing.assert_close(loss(*forward(model, one))[0], model(**one).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_what_follows_the_prompt_has_a_label(side):
    lengths, prompts = [4, 6], torch.tensor([1, 3])
    ids = torch.arange(1, 13).view(2, 6)
    position = torch.arange(6)
    mask = torch.stack([position >= 6 - n if side == "left" else position < n for n in lengths]).long()
    labels = causal_lm.completion_labels(ids, mask, prompts)
    first = 2 if side == "left" else 0
    assert labels[0].tolist() == [int(ids[0, t]) if first + 1 <= t < first + 4 else -100 for t in range(6)]
    assert labels[1].tolist() == [-100] * 3 + ids[1, 3:].tolist()


def unlearned(model: nn.Module, **settings) -> list[torch.Tensor]:
    sets = {"forget": text(12, 3), "retain": text(24, 4), "held_out": text(16, 5)}
    recipe = {} if "method" in settings else {"recipe": "paper"}
    result = nabla_tau.unlearn(model, **{**sets, **settings, **recipe}, inplace=True)
    return [p.detach() for p in result.model.parameters()]


@pytest.mark.filterwarnings("ignore:the gate:UserWarning", "ignore:there was hardly:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 5},
        {"method": NPO(epochs=1, learning_rate=1e-3)},
        {"method": SimNPO(epochs=1, learning_rate=1e-3)},
        {"method": GradDiff(epochs=1, learning_rate=1e-3)},
    ],
    ids=["nabla-tau", "micro-batches", "npo", "sim-npo", "grad-diff"],
)
def test_a_run_through_the_fused_head_is_that_of_the_logits(settings):
    model = llama().double()
    memorise(model, text(12, 3), steps=5)
    by_logits = unlearned(copy.deepcopy(model), forward=causal_lm.logits_forward, **settings)
    forward, loss = causal_lm.fused(model)
    before = [p.detach().clone() for p in model.parameters()]
    by_head = unlearned(model, forward=forward, loss=loss, **settings)
    assert max(float((a - b).abs().max()) for a, b in zip(by_head, before, strict=True)) > 1e-4
    # Adam divides by the root of tiny second moments, which magnifies rounding; a step moves a weight by 1e-3.
    for mine, theirs in zip(by_head, by_logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_memory_stays_below_one_copy_of_the_logits():
    vocabulary = 50_000
    model = llama(vocab_size=vocabulary)
    batch = {name: column.repeat(1, 4) for name, column in text(8, 6).items()}
    forward, loss = causal_lm.fused(model)

    def gradient(by_head: bool) -> object:
        losses = loss(*forward(model, batch)).mean() if by_head else model(**batch).loss
        return torch.autograd.grad(losses, list(model.parameters()))

    logits_mb = 8 * 4 * LENGTH * vocabulary * 4 / 1e6
    assert peak_mb(lambda: gradient(False), "cpu") > 2 * logits_mb
    assert peak_mb(lambda: gradient(True), "cpu") < logits_mb / 2


def test_a_head_that_is_not_plain_is_refused():
    model = llama()

    class Adapted(nn.Linear):
        """As adapters do: the weight is the head's own, and the output is not."""

    model.set_output_embeddings(Adapted(32, 200, bias=False))
    with pytest.raises(TypeError, match=r"got .*\.Adapted"):
        causal_lm.fused(model)
    with pytest.raises(TypeError, match="got builtins.NoneType"):
        causal_lm.fused(nn.Linear(2, 2))


def test_logits_that_are_not_the_heads_are_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    small |= {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 16}
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small))
    with pytest.raises(ValueError, match="capped"):
        causal_lm.fused(capped)
    scaled = transformers.CohereForCausalLM(transformers.CohereConfig(**small, logit_scale=0.5, pad_token_id=0))
    with pytest.raises(ValueError, match="not those of its head"):
        causal_lm.fused(scaled)


def test_a_sequence_without_labels_is_refused():
    model, batch = gpt2(), text(3, 7)
    batch["labels"][1] = -100
    forward, loss = causal_lm.fused(model)
    with pytest.raises(ValueError, match="sequence 1 of a batch of 3"):
        loss(*forward(model, batch))


def test_reference_losses_are_computed_once(tmp_path):
    model, data = gpt2(), text(9, 8)
    cache = tmp_path / "reference"
    logits, targets = causal_lm.logits_forward(model, data)
    wanted = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    found = causal_lm.reference_losses(model, DataLoader(Rows(data), batch_size=4), cache=cache)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=0)
    # Pushing where the model is as it was: the slope of NPO at its start.
    values = npo_values(found, found, beta=0.1)
    torch.testing.assert_close(values, torch.full_like(values, 2 / 0.1 * torch.tensor(2.0).log().item()))

    calls, written = [], cache.stat()
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    again = causal_lm.reference_losses(model, DataLoader(Rows(data), batch_size=4), cache=cache)
    assert torch.equal(again, found)
    assert cache.stat().st_ino == written.st_ino, "a whole file is read, and left alone"
    assert len(calls) == 2  # `fused` looks at two tokens, with and without the head
    with pytest.raises(ValueError, match="another data$"):
        causal_lm.reference_losses(model, DataLoader(Rows(text(9, 9)), batch_size=4), cache=cache)
    with torch.no_grad():
        model.lm_head.weight[PROMPT, 0] += 1
    with pytest.raises(ValueError, match="another model$"):
        causal_lm.reference_losses(model, DataLoader(Rows(data), batch_size=4), cache=cache)


def test_reference_losses_go_on_where_a_call_was_cut_off(tmp_path, monkeypatch):
    model, data = gpt2(), text(9, 8)
    cache = tmp_path / "reference"
    wanted = causal_lm.reference_losses(model, data, batch_size=9)
    monkeypatch.setattr(causal_lm, "WRITE_EVERY", 0)
    seen: list[int] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        seen.append(len(output.last_hidden_state))
        if sum(seen) == 1 + 1 + 4 + 4:  # `fused` looks at two tokens, with and without the head
            raise KeyboardInterrupt

    hook = model.base_model.register_forward_hook(note)
    with pytest.raises(KeyboardInterrupt):
        causal_lm.reference_losses(model, data, cache=cache, batch_size=4)
    assert len(list(tmp_path.iterdir())) == 1, "a whole file or none"
    with pytest.raises(ValueError, match="holds the reference losses of 4 of 9 samples"):
        unlearned(model, method=NPO(epochs=1, reference=cache), forget=data, forward=causal_lm.logits_forward)
    hook.remove()
    seen.clear()
    hook = model.base_model.register_forward_hook(note)
    # Of another size of batches, so that one of them is half known.
    found = causal_lm.reference_losses(model, DataLoader(Rows(data), batch_size=3), cache=cache)
    assert seen[2:] == [2, 3]
    hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_npo_reads_what_was_kept_of_the_model_as_it_was(tmp_path):
    model, forget, cache = llama().double(), text(12, 3), tmp_path / "reference"
    memorise(model, forget, steps=5)
    causal_lm.reference_losses(model, DataLoader(Rows(forget), batch_size=5), cache=cache)
    forward, loss = causal_lm.fused(model)
    settings = {"forward": forward, "loss": loss}
    method = NPO(epochs=2, learning_rate=1e-2, beta=1.0)
    computed = unlearned(copy.deepcopy(model), method=method, **settings)
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for reference in (None, cache):
        calls.clear()
        read = unlearned(copy.deepcopy(model), method=replace(method, reference=reference), **settings)
        counts.append(len(calls))
        assert all(torch.equal(a, b) for a, b in zip(read, computed, strict=True))
    assert counts[0] > counts[1]

    def refused(**changed: object) -> None:
        unlearned(copy.deepcopy(model), **{"method": replace(method, reference=cache), **settings, **changed})

    with pytest.raises(ValueError, match="another data$"):
        refused(forget=text(12, 4))
    with pytest.raises(ValueError, match="a DataLoader"):
        refused(forget=DataLoader(Rows(forget), batch_size=5))
    with torch.no_grad():
        model.lm_head.weight[PROMPT, 0] += 1
    with pytest.raises(ValueError, match="another model$"):
        refused()
    with pytest.raises(FileNotFoundError):
        refused(method=replace(method, reference=tmp_path / "absent"))
