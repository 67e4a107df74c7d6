"""Memory of a step: what is compared does the same work, and the fused head alone needs no memory for logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_lm_memory

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def after_a_step(provider: str) -> dict[str, torch.Tensor]:
    model = bench_lm_memory.make_model(TINY, 50, "cpu")
    batches = [bench_lm_memory.make_batch(50, 9, "cpu") for _ in range(2)]
    bench_lm_memory.PROVIDERS[provider](model, *batches)()
    return model.state_dict()


def test_the_step_is_the_same_with_and_without_logits():
    before = bench_lm_memory.make_model(TINY, 50, "cpu").state_dict()
    plain, fused = after_a_step("PyTorch"), after_a_step("nabla_tau")
    for name, weight in plain.items():
        assert float((weight - before[name]).abs().max()) > 1e-5, name
        torch.testing.assert_close(fused[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_fused_head_does_without_the_logits():
    vocabulary, length = 40_000, 64
    logits_mb = 2 * bench_lm_memory.SEQUENCES * length * vocabulary * 4 / 1e6
    gradients_mb = 2 * vocabulary * TINY["hidden_size"] * 4 / 1e6
    threads = torch.get_num_threads()
    found = {
        name: bench_lm_memory.measure(name, TINY, vocabulary, length, "cpu", threads)
        for name in bench_lm_memory.PROVIDERS
    }
    assert min(found["Trainer"], found["PyTorch"]) > 1.5 * logits_mb
    assert gradients_mb < found["nabla_tau"] < logits_mb
    assert gradients_mb < found["nabla_tau, balanced"] < logits_mb
