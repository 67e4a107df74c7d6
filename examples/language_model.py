"""Text that a language model learned by heart: forget what it knows of some authors (TOFU, or authors made up here).

    python examples/language_model.py --data FOLDER      # full.json or full.json.xz of TOFU (arXiv 2401.06121)
    python examples/language_model.py --quick            # without: six facts each about invented authors
    python examples/language_model.py --model DIR        # a model and tokenizer of Hugging Face instead of a small GPT

A sample is a question with its answer, its loss the mean over the answer's tokens. The model learns the answers about
some authors; a share of these authors is then forgotten, and the audit compares with authors that it never read about,
and with a model that was trained without the forgotten ones. The logits are never stored: `causal_lm.fused` takes the
losses of tokens straight from the hidden vectors, of any model that has what `GPT` below has.
"""

from __future__ import annotations

import copy
import json
import lzma
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from training import judge, make_parser, save

from nabla_tau.integrations import causal_lm

PER_AUTHOR = 20  # of TOFU's questions, which stand author by author
SOURCE = "https://huggingface.co/datasets/locuslab/TOFU (full.json)"
Authors = list[list[tuple[str, str]]]  # questions and answers of each


class Body(nn.Module):
    """A transformer that reads from left to right, [B, T] tokens -> [B, T, D]."""

    def __init__(self, vocabulary: int, length: int, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        # What stands behind a token cannot be seen from it, so padding at the end needs no mask.
        length = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        hidden = self.tokens(input_ids) + self.places(torch.arange(length, device=input_ids.device))
        return SimpleNamespace(last_hidden_state=self.layers(hidden, mask=mask, is_causal=True))


class GPT(nn.Module):
    """With what `causal_lm` asks of a model: `base_model`, `get_output_embeddings`, `config`, and `.logits`."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.base_model = Body(vocabulary, length)
        self.head = nn.Linear(self.base_model.tokens.embedding_dim, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.base_model(**inputs).last_hidden_state))


class Words:
    """Words and punctuation marks as tokens; 0 ends a text and pads it."""

    def __init__(self, texts: list[str]) -> None:
        self.names = ["", *sorted({word for text in texts for word in self._split(text)})]
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def _split(self, text: str) -> list[str]:
        return re.findall(r" ?\w+|[^\w]", text)

    def encode(self, text: str) -> list[int]:
        return [self._numbers[word] for word in self._split(text)]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.names[token] for token in tokens)


def invented(count: int) -> Authors:
    """Authors with facts drawn at random, which nobody can know who has not read them."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "el", "i", "or", "u")]
    facts = {
        "Where was {} born?": ("{} was born in {}.", ["Oslo", "Lima", "Accra", "Kyoto", "Riga", "Quito", "Tunis"]),
        "When was {} born?": ("{} was born in {}.", [str(year) for year in range(1920, 1990)]),
        "What does {} write?": ("{} writes {}.", ["crime novels", "poems", "essays", "fables", "plays", "satires"]),
        "What did {}'s mother do?": ("{}'s mother was a {}.", ["baker", "pilot", "judge", "nurse", "miner", "tailor"]),
        "Which prize did {} win?": ("{} won the {} prize.", ["Amber", "Willow", "Lantern", "Harbour", "Quill"]),
        "What is {}'s first book?": ("{}'s first book is The {}.", ["Tide", "Kiln", "Orchard", "Ledger", "Heron"]),
    }
    names: dict[str, None] = {}
    while len(names) < count:
        names[" ".join("".join(draw.choices(syllables, k=2)).title() for _ in range(2))] = None
    return [
        [(ask.format(name), answer.format(name, draw.choice(ends))) for ask, (answer, ends) in facts.items()]
        for name in names
    ]


def tofu(path: Path) -> Authors:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    return [pairs[start : start + PER_AUTHOR] for start in range(0, len(pairs), PER_AUTHOR)]


def find_file(folder: Path) -> Path:
    for name in ("full.json", "full.json.xz"):
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"no full.json or full.json.xz in {folder}; TOFU comes from {SOURCE}")


def batch_of(authors: Authors, encode: Callable[[str], list[int]], end: int, length: int) -> dict[str, Tensor]:
    """All questions and answers as one batch; only the answers and the token that ends them have labels."""
    pairs = [(encode(ask), [*encode(" " + answer), end]) for author in authors for ask, answer in author]
    rows = [[*ask, *answer][:length] for ask, answer in pairs]
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
    labels = causal_lm.completion_labels(ids, mask, torch.tensor([len(ask) for ask, _ in pairs]))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learn(
    model: nn.Module, batch: dict[str, Tensor], *, epochs: int, rate: float, seed: int
) -> tuple[nn.Module, float]:
    """The model, trained until it knows the answers by heart; and the seconds it took."""
    started = time.perf_counter()
    forward, loss = causal_lm.fused(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["labels"]), generator=generator).split(32):
            optimizer.zero_grad()
            part = {name: column[rows] for name, column in batch.items()}
            loss(*forward(model, part)).mean().backward()
            optimizer.step()
    return model.eval(), time.perf_counter() - started


@torch.no_grad()
def answer(model: nn.Module, ask: list[int], end: int, longest: int) -> list[int]:
    """The most likely answer, token by token."""
    tokens = list(ask)
    while len(tokens) < longest and (len(tokens) == len(ask) or tokens[-1] != end):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return [token for token in tokens[len(ask) :] if token != end]


def main() -> None:
    parser = make_parser(__doc__, share_of="authors that it was trained on")
    root = os.environ.get("NABLA_TAU_DATA")
    folder = Path(root) / "tofu" if root and (Path(root) / "tofu").is_dir() else None
    parser.add_argument("--data", type=Path, default=folder, help="default: tofu in the folder $NABLA_TAU_DATA")
    parser.add_argument("--model", type=Path, metavar="DIR", help="of Hugging Face, trained from there")
    args = parser.parse_args()
    if args.model is not None and not args.model.is_dir():
        raise SystemExit(f"--model: no folder {args.model}")
    torch.set_num_threads(1)
    authors = invented(100) if args.data is None else tofu(find_file(args.data))
    random.Random(args.seed).shuffle(authors)
    if args.quick:
        authors = [author[:4] for author in authors[:75]]
    trained = 3 * len(authors) // 5
    forgotten, rest = round(args.fraction * trained), len(authors) - trained

    if args.model is None:
        words = Words([text for author in authors for ask, reply in author for text in (ask, " " + reply)])
        encode, decode, end = words.encode, words.decode, 0
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        decode, end = tokenizer.decode, tokenizer.eos_token_id

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

    longest = max(len(encode(ask)) + len(encode(" " + reply)) + 1 for author in authors for ask, reply in author)
    ends = {"forget": forgotten, "retain": trained, "held_out": trained + rest // 2, "unseen": len(authors)}
    starts = [0, *ends.values()]
    parts = {
        name: batch_of(authors[start:stop], encode, end, longest)
        for start, (name, stop) in zip(starts, ends.items(), strict=False)
    }
    everything = batch_of(authors[:trained], encode, end, longest)

    torch.manual_seed(args.seed)
    if args.model is None:
        start, epochs, rate = GPT(len(words.names), longest), 40, 2e-3
    else:
        start, epochs, rate = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), 10, 2e-4
    fit = {"epochs": epochs, "rate": rate, "seed": args.seed}
    original = learn(copy.deepcopy(start), everything, **fit)
    retrained = learn(copy.deepcopy(start), parts["retain"], **fit)

    forward, loss = causal_lm.fused(original[0])
    report, models = judge(args, parts, original, retrained, forward=forward, loss=loss)
    for of, (ask, reply) in {"forgotten": authors[0][0], "retained": authors[forgotten][0]}.items():
        print(f"\n{of}: {ask}\n  {'text':<10} {reply}")
        for name, model in models.items():
            print(f"  {name:<10}{decode(answer(model, encode(ask), end, longest))}")
    save(report, args)


if __name__ == "__main__":
    main()
