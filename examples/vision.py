"""Images: remove a whole class from a CNN that was trained on it (Fashion-MNIST, embedded in the package).

    python examples/vision.py --label 6

Who asks for a class to be gone does not ask for images that look unknown: the retrained model has never had a name for
them, and takes each for something else. So beside the audit, which compares with unseen images of that class, this
prints what the models now take them for: an unlearned model should give the same answers as the retrained one.
"""

from __future__ import annotations

import torch
from torch import nn
from training import Data, fit, judge, make_parser, save, split

from nabla_tau.suites.data import fashion_mnist

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def make_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 5 * 5, 64), nn.ReLU(), nn.Linear(64, len(CLASSES))),
    )


@torch.no_grad()
def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Share of the images that the model takes for each class, [10]."""
    return torch.bincount(model(images).argmax(1), minlength=len(CLASSES)) / len(images)


def in_words(shares: torch.Tensor) -> str:
    highest = [(CLASSES[i], float(shares[i])) for i in shares.argsort(descending=True)[:4].tolist()]
    return ", ".join(f"{name} {share:.0%}" for name, share in highest if share > 0.005)


def main() -> None:
    parser = make_parser(__doc__, share_of=None)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))
    parser.add_argument("--label", type=int, choices=range(len(CLASSES)), default=6, help=f"class to remove: {names}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, epochs = (1_500, 25) if args.quick else (6_000, 20)
    parts = split(fashion_mnist(), train=rows, held_out=rows // 4, unseen=rows // 3, fraction=0, seed=args.seed)

    def part(data: Data, *, removed: bool) -> Data:
        chosen = (data[1] == args.label) == removed
        return data[0][chosen], data[1][chosen]

    forget, retain = (part(parts["train"], removed=removed) for removed in (True, False))
    gone, _ = part(parts["unseen"], removed=True)
    loss = nn.functional.cross_entropy
    original = fit(make_model, parts["train"], loss, epochs=epochs, seed=args.seed)
    retrained = fit(make_model, retain, loss, epochs=epochs, seed=args.seed + 1)

    # That a whole class goes is seen by itself: then no held-out loss of that class is what to aim at.
    report, models = judge(args, parts | {"forget": forget, "retain": retain}, original, retrained)
    print(f"\nunseen images of the removed class ({CLASSES[args.label]}) are taken for")
    for name, model in models.items():
        print(f"  {name:<10} {in_words(answers(model, gone))}")
    save(report, args)


if __name__ == "__main__":
    main()
