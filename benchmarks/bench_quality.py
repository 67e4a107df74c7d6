"""quality: the demo's models over seeds, each figure beside that of the retrained model."""

from __future__ import annotations

from record import Record

from nabla_tau.demo import run_demo

MEASURES = {
    "auc_loss": "AUC",
    "mia_loss": "rate",
    "mia_entropy": "rate",
    "forget_accuracy": "rate",
    "retain_accuracy": "rate",
    "test_accuracy": "rate",
    "unseen_removed_accuracy": "rate",
    "seconds": "s",
}
CASES = [*((0.15, 0, seed) for seed in (0, 1, 2)), (0.03, 0, 0), (0.30, 0, 0), (0.15, 1, 0)]
QUICK_CASES = [(0.15, 0, 0)]


def run(device: str, threads: int, quick: bool) -> list[Record]:
    records = []
    for fraction, classes, seed in QUICK_CASES if quick else CASES:
        what = f"{classes} class" if classes else f"{fraction:.0%}"
        models = run_demo(fraction=fraction, classes=classes, seed=seed).to_dict()["models"]
        for name, figures in models.items():
            for measure, unit in MEASURES.items():
                value, wanted = figures[measure], models["retrained"][measure]
                if value is None:
                    continue
                low, high = figures["intervals"].get(measure) or (value, value)
                records.append(
                    Record(
                        bench="quality",
                        case=f"fashion_mnist {what} seed {seed} {measure}",
                        provider="nabla_tau" if name == "unlearned" else name,
                        device=device,
                        dtype="float32",
                        threads=threads,
                        p20=low,
                        p50=value,
                        p80=high,
                        unit=unit,
                        baseline="retrained",
                        ratio=wanted / value if unit == "s" else None,
                        note=f"gap {value - wanted:+.4f}",
                    )
                )
    return records
