"""TOFU for a causal language model: questions with answers as batches, and all that is measured of a model on them.

Model utility is that of the paper (Maini et al. 2024, arXiv 2401.06121): the harmonic mean of nine means, probability,
ROUGE-L recall and truth score (`nabla_tau.membership.tofu`) on each of three sets, retained authors, real authors and
world facts. Probabilities are P(a|q)^(1/|a|); of the last two sets that of the right answer among the false ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nabla_tau.batch import split_targets, to_device
from nabla_tau.evaluation import device_of, evaluation_mode
from nabla_tau.integrations import causal_lm
from nabla_tau.kernels.reference import IGNORE_INDEX
from nabla_tau.membership import (
    choice_probability,
    min_k,
    min_k_pp,
    model_utility,
    rouge_l_recall,
    token_statistics,
    truth_ratio,
    truth_score,
)
from nabla_tau.membership.text import TokenStatistics
from nabla_tau.performance import autocast_dtype
from nabla_tau.suites.data import tofu

Values = NDArray[np.float64]
Pair = tuple[str, str]  # question and answer


class Question(NamedTuple):
    """paraphrase: of the answer; the answer itself in the sets that have none."""

    question: str
    answer: str
    paraphrase: str
    false_answers: tuple[str, ...]


class Scores(NamedTuple):
    """Of members and of others, higher for members."""

    members: Values
    others: Values


class Measured(NamedTuple):
    """truth_ratio: of the forget set, [N]; utilities: the nine means that model utility is made of."""

    truth_ratio: Values
    utility: float
    utilities: dict[str, float]
    min_k: Scores
    min_k_pp: Scores


def pairs(part: str) -> list[Pair]:
    return [(row["question"], row["answer"]) for row in tofu(part)]


def questions(part: str) -> list[Question]:
    return [
        Question(
            row["question"], row["answer"], row.get("paraphrased_answer", row["answer"]), tuple(row["perturbed_answer"])
        )
        for row in tofu(part)
    ]


class Reader:
    """A tokenizer, and how many sequences go through a model at once when it is measured."""

    def __init__(self, tokenizer: Any, batch_size: int) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def prompt(self, question: str) -> list[int]:
        return self.tokens(f"Question: {question}\nAnswer:")

    def encode(self, some: Sequence[Pair]) -> dict[str, Tensor]:
        """A batch as the model takes it; labels are the answer and the end of the text."""
        prompts = [self.prompt(question) for question, _ in some]
        ends = [[*self.tokens(f" {answer}"), self.tokenizer.eos_token_id] for _, answer in some]
        rows = [torch.tensor(prompt + end) for prompt, end in zip(prompts, ends, strict=True)]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_token_id)
        labels = causal_lm.completion_labels(ids, mask, torch.tensor([len(prompt) for prompt in prompts]))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def batches(self, some: Sequence[Pair]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(some), self.batch_size):
            yield self.encode(some[start : start + self.batch_size])

    def losses(self, model: nn.Module, some: Sequence[Pair]) -> Values:
        """Mean loss over each answer's tokens, [N]."""
        of_sequences = causal_lm.SequenceMean()
        found = []
        with measuring(model):
            for batch in self.batches(some):
                losses, targets = causal_lm.fused_forward(model, to_device(batch, device_of(model)))
                found.append(of_sequences(losses, targets).double().cpu())
        return torch.cat(found).numpy()

    def token_statistics(self, model: nn.Module, some: Sequence[Pair]) -> list[TokenStatistics]:
        """Of each answer's tokens. Logits exist of the answers of one batch."""
        found = []
        with measuring(model):
            for batch in self.batches(some):
                _, inputs, labels = split_targets(to_device(batch, device_of(model)))
                targets = causal_lm.next_tokens(labels)
                counts = targets != IGNORE_INDEX
                hidden = causal_lm.hidden_states(model, inputs)[counts]
                of_batch = token_statistics(causal_lm.head_of(model)(hidden), targets[counts])
                ends = counts.sum(1).cumsum(0)[:-1].cpu().numpy()
                columns = (np.split(x, ends) for x in (of_batch.log_prob, of_batch.mean, of_batch.variance))
                found += [TokenStatistics(*row) for row in zip(*columns, strict=True)]
        return found

    def generate(self, model: nn.Module, some: Sequence[Question]) -> list[str]:
        """What the model answers, by the most probable token each time, in as many tokens as the longest answer has."""
        pad, found = self.tokenizer.eos_token_id, []
        longest = max(len(self.tokens(f" {one.answer}")) for one in some)
        with measuring(model):
            for start in range(0, len(some), self.batch_size):
                prompts = [torch.tensor(self.prompt(one.question)) for one in some[start : start + self.batch_size]]
                ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
                ones = [torch.ones_like(prompt) for prompt in prompts]
                mask = pad_sequence(ones, batch_first=True, padding_side="left")
                inputs = to_device({"input_ids": ids, "attention_mask": mask}, device_of(model))
                written = model.generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=pad)
                found += self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return found

    def measure(
        self, model: nn.Module, sets: dict[str, list[Question]], members: list[Pair], others: list[Pair]
    ) -> Measured:
        """sets: "forget", and those of utility: "retain", "real authors", "world facts"."""
        ratio, measures = np.empty(0), {}
        for name, asked in sets.items():
            answers = [(one.question, text) for one in asked for text in (*one[1:3], *one.false_answers)]
            losses = self.losses(model, answers).reshape(len(asked), -1)
            of_set = truth_ratio(losses[:, 1], losses[:, 2:])
            if name == "forget":
                ratio = of_set
                continue
            is_choice = name != "retain"
            said = self.generate(model, asked)
            measures[f"{name} probability"] = (
                choice_probability(losses[:, 0], losses[:, 2:]) if is_choice else np.exp(-losses[:, 0])
            )
            measures[f"{name} ROUGE-L"] = np.array(
                [rouge_l_recall(text, one.answer) for text, one in zip(said, asked, strict=True)]
            )
            measures[f"{name} truth"] = truth_score(of_set)
        found = self.token_statistics(model, [*members, *others])
        columns = [[getattr(text, name) for text in found] for name in ("log_prob", "mean", "variance")]
        n = len(members)
        scores = [result.score for result in (min_k(columns[0]), min_k_pp(*columns))]
        return Measured(
            ratio,
            model_utility(list(measures.values())),
            {name: float(values.mean()) for name, values in measures.items()},
            *(Scores(score[:n], score[n:]) for score in scores),
        )


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, in the precision that the model was trained in."""
    dtype = autocast_dtype(model)
    casting = contextlib.nullcontext() if dtype is None else torch.autocast("cuda", dtype)
    with evaluation_mode(model), torch.no_grad(), casting:
        yield
