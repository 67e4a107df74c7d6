"""Text with several labels: forget Reddit comments that an emotion classifier was trained on (GoEmotions).

    python examples/goemotions.py --data FOLDER        # the folder that holds train.tsv or train.tsv.xz

A bag of embeddings memorises comments and their emotions. A share of the comments is then forgotten with the default
recipe and with the published one, and both are audited against a model trained without those comments.
"""

from __future__ import annotations

import lzma
import os
import zlib
from pathlib import Path

import torch
from torch import nn
from training import Data, fit, judge, make_parser, save, split

LABELS, BUCKETS, TOKENS = 28, 16_384, 30
SOURCE = "https://github.com/google-research/google-research/tree/master/goemotions (data/train.tsv)"


def find_file(folder: Path | None) -> Path:
    """train.tsv or train.tsv.xz in the folder; where there is none, exit and say where the data comes from."""
    if folder is None:
        raise SystemExit(f"say with --data where GoEmotions is, or set NABLA_TAU_DATA; it comes from {SOURCE}")
    for name in ("train.tsv", "train.tsv.xz"):
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"no train.tsv or train.tsv.xz in {folder}; GoEmotions comes from {SOURCE}")


def hashed_tokens(text: str) -> tuple[int, ...]:
    """The first 30 words as numbers of hash buckets; 0 pads. (Python's own hash differs from run to run.)"""
    words = text.lower().split()[:TOKENS]
    numbers = [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words]
    # One length for all rows: only then can forget and retain rows go through the model as one batch.
    return tuple(numbers + [0] * (TOKENS - len(numbers)))


def load(path: Path) -> Data:
    """Tokens [N, 30], and targets [N, 28] of zeros and ones: floating targets of the logits' shape are multi-label."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    # A comment that is there twice could be forgotten and retained at once.
    comments = {hashed_tokens(text): labels for text, labels, _ in rows}
    targets = torch.zeros(len(comments), LABELS)
    for row, labels in enumerate(comments.values()):
        targets[row, [int(label) for label in labels.split(",")]] = 1
    return torch.tensor(list(comments)), targets


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.EmbeddingBag(BUCKETS, 64, padding_idx=0),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, LABELS),
    )


def main() -> None:
    parser = make_parser(__doc__)
    root = os.environ.get("NABLA_TAU_DATA")
    folder = Path(root) / "goemotions" if root else None
    parser.add_argument("--data", type=Path, default=folder, help="default: goemotions in the folder $NABLA_TAU_DATA")
    args = parser.parse_args()
    # Layers as small as these lose more by waiting for a second thread than it brings them.
    torch.set_num_threads(1)
    data = load(find_file(args.data))
    rows, epochs = (1_500, 40) if args.quick else (8_000, 25)
    parts = split(data, train=rows, held_out=rows // 4, unseen=rows // 2, fraction=args.fraction, seed=args.seed)

    loss = nn.functional.binary_cross_entropy_with_logits  # the mean over the labels too, as the engine takes it
    original = fit(make_model, parts["train"], loss, epochs=epochs, seed=args.seed)
    retrained = fit(make_model, parts["retain"], loss, epochs=epochs, seed=args.seed + 1)

    report, _ = judge(args, parts, original, retrained)
    save(report, args)


if __name__ == "__main__":
    main()
