"""Adapters of peft: they alone are unlearned, and what they hold is in the merged weights too."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers_models import llama, memorise, text

import nabla_tau
from nabla_tau.functional import sample_losses
from nabla_tau.integrations import causal_lm
from nabla_tau.recipes import RECIPES

FORGET = text(12, 3)


def adapted(base: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["v_proj", "up_proj", "down_proj"])
    return peft.get_peft_model(base, config).eval()


def forget_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(sample_losses(*causal_lm.logits_forward(model, FORGET)).mean())


def unlearned(model: nn.Module) -> nn.Module:
    forward, loss = causal_lm.fused(model)
    sets = {"forget": FORGET, "retain": text(24, 4), "held_out": text(16, 5)}
    recipe = dataclasses.replace(RECIPES["ascent"], min_steps=60)
    return nabla_tau.unlearn(model, **sets, forward=forward, loss=loss, recipe=recipe).model


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A model whose adapter has memorised the forget set, and the same unlearned."""
    base = llama()
    memorise(base, text(24, 4), steps=40)
    model = adapted(base)
    memorise(model, FORGET, steps=60, rate=5e-3)
    return model, unlearned(model)


def test_only_the_adapter_moves_and_it_forgets(models):
    before, after = models
    moved = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved == {name for name, _ in before.named_parameters() if "lora_" in name}
    unseen = 5.3  # about ln 200, what a text has that says nothing to the model
    assert forget_loss(before) < 2
    assert forget_loss(after) > unseen - 1
    with before.disable_adapter(), after.disable_adapter():
        assert forget_loss(before) == forget_loss(after)


def test_merged_weights_give_the_same_losses(models):
    _, after = models
    with torch.no_grad():
        unmerged = causal_lm.logits_forward(after, FORGET)[0]
        merged = causal_lm.logits_forward(copy.deepcopy(after).merge_and_unload(), FORGET)[0]
        with after.disable_adapter():
            base = causal_lm.logits_forward(after, FORGET)[0]
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert float((base - unmerged).abs().max()) > 0.1


def test_what_the_base_model_knows_is_only_hidden_by_a_new_adapter():
    base = llama()
    memorise(base, FORGET, steps=80)
    known = forget_loss(base)
    after = unlearned(adapted(base))
    assert forget_loss(after) > known + 0.5
    with after.disable_adapter():
        assert forget_loss(after) == pytest.approx(known, rel=1e-6)


def test_an_adapter_on_the_head_is_refused():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match="must be a torch.nn.Linear, got peft.tuners.lora.layer.Linear"):
        causal_lm.fused(peft.get_peft_model(llama(), config))


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="not those of its head"):
        causal_lm.fused(peft.get_peft_model(llama(), config))
