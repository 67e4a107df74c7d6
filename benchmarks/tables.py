"""python benchmarks/tables.py [--check]: the tables of README.md and docs/ from the committed CSVs.

A table stands between <!-- table NAME --> and <!-- end -->; NAME is a key of TABLES. --check: change nothing, say which
are not those of the CSVs, and exit with 1 if one is.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from record import read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUITES = {
    "clinc150": "CLINC150, bag of embeddings",
    "clinc150_transformer": "CLINC150, transformer",
    "goemotions": "GoEmotions, bag of embeddings",
    "diamonds": "diamonds, MLP",
    "digits": "digits, MLP",
    "mnist_5k": "MNIST, 5,000, CNN",
    "breast_cancer": "breast cancer, MLP",
    "fashion_mnist": "Fashion-MNIST, CNN",
}
AGAIN, DEFAULT, ASCENT, PAPER, FINETUNE, ORIGINAL = (
    "retrained again", "default", "nabla-tau", "nabla-tau (paper)", "finetune", "original",
)  # fmt: skip
NAMES = {ASCENT: 'nabla-tau, `"ascent"`', PAPER: 'nabla-tau, `"paper"`', DEFAULT: "**default**"}
METHODS = {"eu-k": "EU-k", "sfr-on": "SFR-on", "ug-clu": "UG-CLU", "salun": "SalUn", "random-label": "random label"}
METHODS |= {"neg-grad-plus": "NegGrad+", "scrub": "SCRUB"}
OTHERS = ("3%", "30%", "1 class", "half a class", "5% mislabelled", "100 outliers")
RANDOM = "15% random"
Lines = Iterator[str]


@functools.cache
def values(file: str) -> dict[tuple[str, str], float]:
    """(case, provider) -> value, of what was measured."""
    rows = read_csv(RESULTS / f"{file}_cpu.csv")
    return {(row["case"], row["provider"]): float(row["p50"]) for row in rows if row["p50"]}


def found(file: str, suite: str, measure: str, provider: str, scenario: str = RANDOM) -> float | None:
    return values(file).get((f"{suite}, {scenario}: {measure}", provider))


def known(value: float | None) -> float:
    assert value is not None
    return value


def gap(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def auc(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1)


def of_each(show: Callable[[float], str], given: list[float | None], bold: int = 1) -> str:
    """One after another, the default's in bold; nothing where it was not measured."""
    if any(value is None for value in given):
        return ""
    shown = [show(known(value)) for value in given]
    return " / ".join(f"**{text}**" if position == bold else text for position, text in enumerate(shown))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> Lines:
    yield row(*cells)
    yield "|---" * len(cells) + "|"


def suites() -> Lines:
    yield from head("suite", "AUC gap", "MIA gap", "forget / retain / test", "U-LiRA", "RULI", "time")
    for suite, title in SUITES.items():
        of = functools.partial(found, "defaults", suite)
        models = (AGAIN, DEFAULT, ASCENT, PAPER, ORIGINAL)
        accuracies = [known(of(f"gap_{part}_accuracy", DEFAULT)) for part in ("forget", "retain", "test")]
        attacks = [[found("attacks", suite, name, model) for model in models] for name in ("ulira", "ruli")]
        yield row(
            title,
            of_each(gap, [of("gap_auc_loss", model) for model in models]),
            of_each(gap, [of("gap_mia_loss", model) for model in models[:2]]),
            " / ".join(map(points, accuracies)),
            *(of_each(auc, attack) for attack in attacks),
            f"{100 * known(of('share', DEFAULT)):.0f} %",
        )


def other_forget_sets() -> Lines:
    scenarios = [f"{name} random" if name.endswith("%") else name for name in OTHERS]
    yield from head("", *(name.replace("%", " %").replace("1 class", "one class") for name in OTHERS))
    for suite, title in SUITES.items():
        if found("defaults", suite, "gap_auc_loss", DEFAULT, scenarios[0]) is None:
            continue
        cells = []
        for scenario in scenarios:
            of = functools.partial(found, "defaults", suite, scenario=scenario)
            aucs = of_each(gap, [of("gap_auc_loss", model) for model in (DEFAULT, ASCENT, ORIGINAL)], bold=0)
            test, time = (known(of(measure, DEFAULT)) for measure in ("gap_test_accuracy", "share"))
            cells.append(f"{aucs}; {points(test)}; {100 * time:.0f} %")
        yield row(title, *cells)


def attacks() -> Lines:
    lengths = [f"retrained, {share} of the epochs" for share in ("25%", "50%", "75%")]
    yield from head("", "U-LiRA", "RULI", "U-LiRA of retraining for 25 / 50 / 75 % of its epochs")
    for suite, title in SUITES.items():
        of = functools.partial(found, "attacks", suite)
        if of("ulira", DEFAULT) is not None:
            models = (AGAIN, DEFAULT, ASCENT, PAPER, FINETUNE, ORIGINAL)
            both = (of_each(auc, [of(name, model) for model in models]) for name in ("ulira", "ruli"))
            yield row(title, *both, " / ".join(auc(known(of("ulira", length))) for length in lengths))


def ablation() -> Lines:
    yield from head("", "AUC", "MIA", "retain, points", "test, points: size, lowest", "time")
    for variant in dict.fromkeys(provider for _, provider in values("ablation")):

        def of(measure: str, kind: str = "mean size", variant: str = variant) -> float:
            return values("ablation")[f"{measure}: {kind}", variant]

        sizes = [f"{of(f'gap_{name}_loss'):.3f}"[1:] for name in ("auc", "mia")]
        test = f"{100 * of('gap_test_accuracy'):.1f}, {points(of('gap_test_accuracy', 'lowest'))}"
        yield row(variant, *sizes, f"{100 * of('gap_retain_accuracy'):.1f}", test, f"{100 * of('share'):.0f} %")


def leave_one_out() -> Lines:
    rows = read_csv(RESULTS / "leave_one_out_cpu.csv")
    chosen = {r["case"].split(":")[0]: r["note"] for r in rows if r["provider"] == "chosen without it"}
    gaps = "AUC gap / test, points"
    yield from head("left out", "chosen on the others", f"there: {gaps}", f"default: {gaps}")
    for suite, title in SUITES.items():
        if suite in chosen:
            both = []
            for provider in ("chosen without it", DEFAULT):
                of = [
                    values("leave_one_out")[f"{suite}: gap_{name}", provider] for name in ("auc_loss", "test_accuracy")
                ]
                both.append(f"{gap(of[0])} / {points(of[1])}")
            rate, length = (part.split()[0] for part in chosen[suite].split(", "))
            changed = [
                f"{number} of the {name}" for number, name in ((rate, "rate"), (length, "length")) if number != "1"
            ]
            times = ", ".join(changed).replace("2 of", "twice").replace("4 of", "four times")
            yield row(title, times or "the default's", *both)


def distances() -> dict[str, dict[str, float]]:
    """Suite -> method -> Avg. D, of all methods that serve it."""
    found = {}
    for suite in SUITES:
        case = f"{suite}, {RANDOM}: avg_d"
        files = ("quality",) if suite == "fashion_mnist" else ("rank", "defaults")
        found[suite] = {provider: d for file in files for (of, provider), d in values(file).items() if of == case}
    return found


def all_methods() -> Lines:
    every = distances()
    ranked = set.intersection(*({*of} for of in every.values())) - {AGAIN, ORIGINAL}
    ranks = {
        method: float(np.mean([1 + sum(of[other] < of[method] for other in ranked) for of in every.values()]))
        for method in ranked
    }
    short = [title if "transformer" in title else title.partition(", ")[0] for title in SUITES.values()]
    yield from head(f"of {len(ranked)}", "mean rank", *short)
    best = sorted(ranks, key=lambda method: (ranks[method], method))[:8]
    for method in (*best, AGAIN, ORIGINAL):
        name = NAMES.get(method) or METHODS.get(method, method)
        rank = f"{ranks[method]:.1f}" if method in ranks else ""
        yield row(name, rank, *(f"{of[method]:.1f}" for of in every.values()))


def comparison() -> Lines:
    accuracy, time = "forget / retain / test accuracy, points", "seconds as a share of retraining"
    yield from head("method", "Avg. D", "AUC of the loss attack", "MIA", "U-LiRA (AUC; .5 is exact)", accuracy, time)
    of = functools.partial(found, "quality", "fashion_mnist")
    shown = [AGAIN, DEFAULT, ASCENT, PAPER, FINETUNE, ORIGINAL, "eu-k", "salun", "sfr-on", "neg-grad-plus", "scrub"]
    for method in sorted(shown, key=lambda method: known(of("avg_d", method))):
        accuracies = [known(of(f"gap_{part}_accuracy", method)) for part in ("forget", "retain", "test")]
        share = "" if method == ORIGINAL else f"{100 * known(of('share', method)):.0f} %"
        yield row(
            NAMES.get(method) or METHODS.get(method, method),
            f"{known(of('avg_d', method)):.1f}",
            *(gap(known(of(f"gap_{name}_loss", method))) for name in ("auc", "mia")),
            auc(known(of("ulira", method))),
            " / ".join(map(points, accuracies)),
            share,
        )


def finetuned() -> Lines:
    """Means over seeds."""
    rows = read_csv(RESULTS / "finetuned_cpu.csv")
    ways = {"original": "original, nothing done", "default, initial=": "**default, `initial=`**"}
    ways |= {"default": 'default without: nabla-tau, `"gentle"`', "paper": NAMES[PAPER]}
    yield from head("", "", "AUC gap", "MIA gap", "forget / retain / test, points", "time, of finetuning's")
    for case in dict.fromkeys(row["case"].partition(": ")[0] for row in rows):
        for way, title in ways.items():

            def of(measure: str, case: str = case, way: str = way) -> float:
                same = [r for r in rows if (r["case"], r["provider"]) == (f"{case}: {measure}", way)]
                return float(np.mean([float(r["p50"]) for r in same]))

            accuracies = [of(f"gap_{part}_accuracy") for part in ("forget", "retain", "test")]
            time = "" if way == "original" else f"{100 * of('share'):.0f} %"
            yield row(
                case if way == "original" else "",
                title,
                gap(of("gap_auc_loss")),
                gap(of("gap_mia_loss")),
                " / ".join(map(points, accuracies)),
                time,
            )


def setting_of_the_paper() -> Lines:
    """What each model is like, not how far from the retrained one."""
    rows = read_csv(RESULTS / "paper_cpu.csv")
    ends = {
        (row["case"].rsplit(", ", 1)[1].removesuffix(" at the end"), row["provider"]): float(row["p50"])
        for row in rows
        if row["case"].endswith(" at the end")
    }
    seconds = {row["provider"]: float(row["note"].removesuffix(" s")) for row in rows if "AUC gap at" in row["case"]}
    ways = {
        "original": "original, nothing done",
        "retrain": "retrained",
        "as published": "published recipe, plain PyTorch",
    }
    ways |= {f"nabla_tau, {name}": f'nabla-tau, `"{name}"`' for name in ("paper", "ascent")}
    ways |= {"nabla_tau": "**default**"}
    yield from head("", "AUC", "MIA, loss / entropy", "forget / retain / test, %", "seconds", "of retraining")
    for way, title in ways.items():
        mias = (f"{ends[f'mia_{of}', way]:.3f}".removeprefix("0") for of in ("loss", "entropy"))
        accuracies = (f"{100 * ends[f'{of}_accuracy', way]:.1f}" for of in ("forget", "retain", "test"))
        taken = seconds.get(way)
        times = ("", "") if taken is None else (f"{taken:.0f}", f"{100 * taken / seconds['retrain']:.0f} %")
        auc = f"{ends['auc_loss', way]:.3f}".removeprefix("0")
        yield row(title, auc, " / ".join(mias), " / ".join(accuracies), *times)


def of_timing(file: str, **wanted: str) -> tuple[float, float | None]:
    """Median in milliseconds of the one row with these fields, and how many times faster than its baseline that is."""
    rows = [r for r in read_csv(RESULTS / f"{file}_cpu.csv") if all(r[name] == value for name, value in wanted.items())]
    assert len(rows) == 1, (file, wanted, len(rows))
    return float(rows[0]["p50"]), float(rows[0]["ratio"]) if rows[0]["ratio"] else None


def digits(value: float, number: int = 3) -> str:
    """So many significant ones, without a leading 0."""
    shown = f"{value:.{number}g}" if value < 10**number else f"{value:.0f}"
    return shown.removeprefix("0") if shown.startswith("0.") else shown


def loss_layer() -> Lines:
    yield from head("rows x classes", "malloc default", "", "malloc tuned", "")
    for case in ("4096x10", "4096x1000", "1024x32000", "512x128256"):
        for form in ("", " + signals"):
            cells = []
            for setting in ("malloc default", "malloc tuned"):
                same = {"case": case + form, "threads": "1", "setting": setting}
                found = [of_timing("rows", provider=name, **same) for name in ("eager", "compile", "nabla_tau")]
                cells += [" / ".join(digits(time) for time, _ in found), f"{digits(known(found[-1][1]), 2)}x"]
            yield row((case + form).replace("x", " x "), *cells)


def steps() -> Lines:
    names = {"as published": "", "plain": ": mixed batch, fused AdamW, channels_last", "plain, compiled": ""}
    names |= {"nabla_tau": "", "nabla_tau, gate closed": ""}
    yield from head("", *(name + more for name, more in names.items()), "against published", "against plain")
    for case in ("CNN, Fashion-MNIST, 15%", "CNN, Fashion-MNIST, 30%", "MLP, table, 15%", "MLP, table, 30%"):
        same = {"case": case, "baseline": "plain"}
        found = {name: of_timing("step", provider=name, **same) for name in names}
        _, published = of_timing("step", provider="nabla_tau", case=case, baseline="as published")
        ratios = [f"{digits(known(ratio))}x" for ratio in (published, found["nabla_tau"][1])]
        yield row(case.replace("%", " %"), *(digits(time) for time, _ in found.values()), *ratios)


def descent() -> Lines:
    names = ("loader", "plain", "plain, compiled", "nabla_tau")
    yield from head("", *names, "against loader", "against plain")
    cases = dict.fromkeys(r["case"] for r in read_csv(RESULTS / "descent_cpu.csv"))
    for case in cases:
        found = [of_timing("descent", provider=name, case=case, baseline="plain") for name in names]
        _, loader = of_timing("descent", provider="nabla_tau", case=case, baseline="loader")
        ratios = [f"{digits(known(ratio))}x" for ratio in (loader, found[-1][1])]
        yield row(case, *(digits(time) for time, _ in found), *ratios)


TABLES: dict[str, Callable[[], Lines]] = {
    "suites": suites,
    "other forget sets": other_forget_sets,
    "attacks": attacks,
    "ablation": ablation,
    "leave one out": leave_one_out,
    "all methods": all_methods,
    "comparison": comparison,
    "finetuned": finetuned,
    "setting of the paper": setting_of_the_paper,
    "loss layer": loss_layer,
    "steps": steps,
    "descent": descent,
}
PLACE = re.compile(r"(?P<start><!-- table (?P<name>[\w ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as they are now."""
    return PLACE.sub(lambda m: m["start"] + "".join(f"{line}\n" for line in TABLES[m["name"]]()) + m["end"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'not those of the CSVs' if check else 'tables written'}")
        if not check:
            page.write_text(filled(page.read_text()))
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
