"""The benchmarks' own arithmetic: a figure that is quoted means what it says. No test looks at an absolute time."""

from __future__ import annotations

import csv
import json
import mmap
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_course  # noqa: E402
import bench_quality  # noqa: E402
import bench_rows  # noqa: E402
import bench_unlearn  # noqa: E402
import compare  # noqa: E402
import plot  # noqa: E402
import record  # noqa: E402
import workloads  # noqa: E402
from record import Record, Timing, peak_mb, read_csv, read_head, records_of, timings, write_csv  # noqa: E402

from nabla_tau.suites.scenarios import Parts, Scenario  # noqa: E402

FAST, SLOW = Timing(0.9, 1.0, 1.2), Timing(3.9, 4.0, 4.4)
SAME = {"bench": "rows", "case": "8x4", "device": "cpu", "dtype": "float32", "threads": 1}


class Machine:
    """A clock that providers advance, on a machine that slows down all the time."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(record.time, "perf_counter", lambda: self.now)

    def provider(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + self.now)

        return run


def test_a_ratio_does_not_see_the_machine_slow_down(monkeypatch):
    machine = Machine(monkeypatch)
    found = timings({"a": machine.provider("a", 0.01), "b": machine.provider("b", 0.02)}, seconds=10, device="cpu")
    assert found["b"].p80 > 3 * found["b"].p20  # it did slow down
    assert found["b"].p50 / found["a"].p50 == pytest.approx(2, rel=0.1)


def test_providers_take_turns_in_changing_order(monkeypatch):
    machine = Machine(monkeypatch)
    timings({name: machine.provider(name, 0.01) for name in "abc"}, seconds=2, device="cpu")
    rounds = [tuple(machine.calls[i : i + 3]) for i in range(9, len(machine.calls), 3)]  # 3 calls each to warm up
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 2


def test_slow_providers_run_five_times_at_least(monkeypatch):
    machine = Machine(monkeypatch)
    timings({name: machine.provider(name, 1.0) for name in "ab"}, seconds=0.1, device="cpu")
    assert Counter(machine.calls) == {"a": 6, "b": 6}  # and once to warm up


def test_figures_follow_from_the_medians():
    eager, ours = records_of(
        {"eager": SLOW, "nabla_tau": FAST}, baseline="eager", floor_mb=2.0, copy=Timing(0.4, 0.5, 0.6), **SAME
    )
    assert (eager.ratio, ours.ratio) == (1, 4)
    assert (eager.gb_s, ours.gb_s) == (0.5, 2)  # a megabyte in a millisecond is a gigabyte in a second
    assert (eager.copy_share, ours.copy_share) == (0.125, 0.5)


def test_without_its_baseline_a_record_has_no_ratio():
    (ours,) = records_of({"nabla_tau": FAST}, baseline="eager", **SAME)
    assert (ours.ratio, ours.baseline) == (None, "")


def test_csv_keeps_what_was_measured(tmp_path):
    records = records_of({"eager": SLOW, "nabla_tau": FAST}, baseline="eager", peaks={"eager": 1 / 3}, **SAME)
    records.append(Record(provider="compile", unit="ms", note="skipped: no compiler", **SAME))
    write_csv(records, tmp_path / "new" / "rows.csv", "cpu")
    eager, ours, skipped = read_csv(tmp_path / "new" / "rows.csv")
    assert (eager["peak_mb"], ours["peak_mb"]) == ("0.33333", "")
    assert [float(ours[name]) for name in ("p20", "p50", "p80", "ratio")] == [*FAST, 4]
    assert (skipped["p50"], skipped["note"]) == ("", "skipped: no compiler")
    assert read_head(tmp_path / "new" / "rows.csv") == record.environment("cpu")


def test_a_figure_of_a_gpu_says_which_driver_and_which_triton(tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 0, "595.10\n595.10\n")
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    write_csv([], tmp_path / "rows.csv", "cuda")
    head = read_head(tmp_path / "rows.csv")
    assert (head["device"], head["driver"]) == ("a GPU", "595.10")
    assert {"torch", "cuda", "triton", "date"} <= head.keys()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*_c[pu][ud]*.csv")), ids=lambda path: path.name)
def test_committed_results_are_of_one_run_each(path):
    """Readable whatever version wrote them, and every ratio is that of the medians beside it."""
    rows = read_csv(path)
    assert {"device", "torch", "python", "date"} <= read_head(path).keys()
    keys = [tuple(row[key] for key in compare.KEY) for row in rows if row["ratio"]]
    assert len(keys) == len(set(keys))
    place = ("bench", "case", "device", "dtype", "setting")
    medians = {(*(row[key] for key in place), row["provider"], row["threads"]): row["p50"] for row in rows}
    for row in rows:
        if row["ratio"]:
            name, threads = ("nabla_tau", "1") if row["baseline"] == "1 thread" else (row["baseline"], row["threads"])
            base = medians[(*(row[key] for key in place), name, threads)]
            assert float(row["ratio"]) == pytest.approx(float(base) / float(row["p50"]), rel=1e-3), row


def written(path: Path, ratio: float, factor: float = 1, case: str = "8x4") -> str:
    """A CSV with one ratio, all of its times multiplied by the factor."""
    times = {"eager": Timing(*(factor * time for time in SLOW)), "nabla_tau": Timing(*[factor * 4 / ratio] * 3)}
    write_csv(records_of(times, baseline="eager", **SAME | {"case": case}), path, "cpu")
    return str(path)


@pytest.mark.parametrize(
    ("ratio", "factor", "case", "code"),
    [
        (4, 1, "8x4", 0),
        (4, 3, "8x4", 0),
        (3.3, 1, "8x4", 0),
        (3.1, 1, "8x4", 1),
        (3.1, 0.1, "8x4", 1),
        (4, 1, "9x4", 2),
    ],
    ids=["same", "slower machine", "within", "worse", "worse on a faster machine", "nothing in common"],
)
def test_compare_fails_on_a_lost_ratio_and_on_nothing_else(tmp_path, ratio, factor, case, code):
    old, new = written(tmp_path / "old.csv", 4), written(tmp_path / "new.csv", ratio, factor, case)
    assert compare.main([old, new]) == code


def test_compare_reads_files_without_the_newer_columns(tmp_path):
    new = written(tmp_path / "new.csv", 4)
    old_fields = [name for name in record.FIELDS if name not in ("setting", "floor_mb", "gb_s", "copy_share")]
    with open(tmp_path / "old.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, old_fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(read_csv(tmp_path / "new.csv"))
    assert compare.main([str(tmp_path / "old.csv"), new]) == 0


def test_peak_memory_is_what_lives_at_once():
    x = torch.randn(250_000)  # 1 MB

    def run() -> torch.Tensor:
        a = x + 1
        a = a * 2  # two alive while it is made
        b, c = a + 1, a + 2  # three alive
        del b
        return torch.cat([a, c])  # four alive, counting double the last

    assert peak_mb(run, "cpu") == pytest.approx(4, rel=0.01)
    assert peak_mb(lambda: np.ones(500_000), "cpu") == pytest.approx(4, rel=0.01)
    kept = mmap.mmap(-1, 4_000_000)  # a result from memory that a library keeps, beside a temporary
    assert peak_mb(
        lambda: torch.frombuffer(kept, dtype=torch.uint8).add_((x + 1).sum().byte()), "cpu"
    ) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("form", [bench_rows.LOSS, bench_rows.SIGNALS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_providers_do_the_same_work(form, dtype):
    batch = bench_rows.make_batch(16, 33, dtype, "cpu")
    found = {name: run() for name, run in bench_rows.providers(batch, form).items()}
    gradient, signals = found["nabla_tau"]
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    for name, (other, others) in found.items():
        torch.testing.assert_close(other, gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        for a, b in zip(others or (), signals or (), strict=True):
            torch.testing.assert_close(a.float(), b.float(), **tolerance)
    # Both halves of the batch take part: neither the forget nor the retain rows are without a gradient.
    assert bool((gradient.float().abs().sum(1) > 0).all())


def test_the_peak_holds_the_gradient():
    batch = bench_rows.make_batch(128, 1000, torch.float32, "cpu")
    for form in bench_rows.FORMS:
        for run in bench_rows.providers(batch, form).values():
            assert peak_mb(run, "cpu") > batch.logits.nbytes / 1e6


def test_the_floor_counts_every_input_and_output_once():
    batch = bench_rows.make_batch(16, 33, torch.bfloat16, "cpu")
    gradient, signals = bench_rows.providers(batch, bench_rows.SIGNALS)["nabla_tau"]()
    moved = sum(tensor.nbytes for tensor in (batch.logits, batch.targets, batch.forget, gradient))
    assert bench_rows.floor_bytes(batch.logits, False) == moved
    assert bench_rows.floor_bytes(batch.logits, True) == moved + sum(signal.nbytes for signal in signals)


def test_without_a_compiler_a_record_says_so(monkeypatch):
    def refuse(*_, **__):
        return lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler\nhere"))

    monkeypatch.setattr(torch, "compile", refuse)
    batch = bench_rows.make_batch(4, 5, torch.float32, "cpu")
    found = {r.provider: r for r in bench_rows.measure(batch, seconds=0.01, threads=1) if r.case == "4x5"}
    assert (found["compile"].p50, found["compile"].note) == (None, "skipped: RuntimeError: no compiler")
    assert found["nabla_tau"].p50 is not None


def test_rows_are_measured_under_both_settings_of_malloc(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "rows", "--quick", "--json", "rows.json"]
    # Not compiled: "compile" is then eager under another name, which is all that is needed here.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "MALLOC_TOP_PAD_": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "rows.json").read_text())["records"]
    providers = {"copy", "eager", "compile", "nabla_tau"}
    for setting in ("malloc default", "malloc tuned"):
        assert {row["provider"] for row in found if row["setting"] == setting} == providers
    keys = Counter(tuple(row[key] for key in compare.KEY) for row in found)
    assert max(keys.values()) == 1


def test_plots_show_ratios_with_their_spread_and_not_what_was_skipped(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    records = records_of(
        {"eager": SLOW, "nabla_tau": FAST}, baseline="eager", peaks={"eager": 6, "nabla_tau": 2}, **SAME
    )
    records.append(Record(provider="compile", unit="ms", baseline="eager", note="skipped", **SAME))
    write_csv(records, tmp_path / "rows_cpu.csv", "cpu")
    ((cases, panels),) = plot.layout(read_csv(tmp_path / "rows_cpu.csv"))
    (name, times), (_, memory) = panels
    assert (cases, name, set(times)) == (["8x4"], "time", {"nabla_tau"})
    assert times["nabla_tau"]["8x4"] == pytest.approx((4 / 1.2, 4, 4 / 0.9))
    assert memory["nabla_tau"]["8x4"][1] == 3
    plot.main([str(tmp_path), str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "rows_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_forget_is_when_it_became_as_good_for_good():
    def at(*looks):
        return [bench_unlearn.Look(seconds, auc, accuracy) for seconds, (auc, accuracy) in enumerate(looks)]

    good, leaks, poor = (0.515, 0.891), (0.53, 0.9), (0.5, 0.88)
    for looks, seconds in (
        (at(leaks, good, good), 1),
        (at(good, leaks, good), 2),
        (at(good, poor, good, good), 2),
        (at(good, good, leaks), None),
        (at(good, good, (0.47, 0.9)), None),
        (at((0.5, 0.99)), 0),
    ):
        assert bench_unlearn.time_to_forget(looks, auc=0.5, accuracy=0.9) == seconds


def test_the_clock_stands_still_while_a_model_is_looked_at(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_unlearn.time, "process_time", lambda: now[0])

    def quality(model, parts):
        now[0] += 100
        return 0.5, 0.9

    monkeypatch.setattr(bench_unlearn, "quality", quality)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = bench_unlearn.Watch({}, steps=24)
    watch.watching(model)
    with watch:
        for _ in range(24):
            now[0] += 1
            optimizer.step()
        now[0] += 5  # what a run does after its last step is part of it
    optimizer.step()
    assert [look.seconds for look in watch.looks] == [*range(2, 24, 2), 29]

    with bench_unlearn.Watch({}, steps=12, hooked=False) as watch:
        watch.watching(model)
        optimizer.step()
        watch.stepped({"loss": 0.0}, 0)  # as `unlearn` logs
    assert len(watch.looks) == 2


def test_quality_is_the_attack_on_the_losses_and_leaves_the_mode():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Dropout(0.9)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    sure, unsure = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    forget = sure.repeat(3, 1), torch.zeros(3, dtype=torch.long)
    unseen = torch.cat((sure, unsure)), torch.tensor([0, 0])
    parts = Parts(train=forget, forget=forget, retain=forget, held_out=unseen, unseen=unseen, test=unseen)
    assert bench_unlearn.quality(model, parts) == (0.75, 0.5)  # one of two unseen losses is as low as all forgotten
    assert model.training
    assert model[1].training


@pytest.mark.parametrize("what", [Scenario("random", 0.15), Scenario("classes", 1)], ids=str)
def test_the_official_split_keeps_training_and_test_images_apart(what):
    seen, others = ((torch.arange(start, start + n), torch.arange(n) % 5) for start, n in ((0, 200), (1000, 60)))
    parts, again = (workloads.official_split(seen, others, what, seed) for seed in (3, 3))
    numbers = {name: set(part[0].tolist()) for name, part in parts._asdict().items()}
    assert numbers == {name: set(part[0].tolist()) for name, part in again._asdict().items()}
    assert numbers["train"] == set(range(200))
    assert numbers["forget"] | numbers["retain"] == numbers["train"]
    assert not numbers["forget"] & numbers["retain"]
    assert numbers["held_out"] | numbers["test"] == set(range(1000, 1060))
    assert not numbers["held_out"] & numbers["test"]
    assert numbers["unseen"] <= numbers["test"]
    for x, y in parts:
        assert torch.equal(y, torch.where(x < 1000, x, x - 1000) % 5)
    if what.kind == "random":
        assert len(numbers["forget"]) == 30
        assert numbers["unseen"] == numbers["test"]
    else:
        (removed,) = set(parts.forget[1].tolist())
        assert set(parts.unseen[1].tolist()) == {removed}
        assert removed not in parts.retain[1]
    with pytest.raises(ValueError, match="random images or classes"):
        workloads.official_split(seen, others, Scenario("half a class"), 3)


def test_time_to_forget_is_drawn_from_its_rows(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    looks = [bench_unlearn.Look(seconds, 0.6 - seconds / 100, 0.9) for seconds in (0.0, 1.0, 4.0)]
    names = ("original", "retrain", "as published", *bench_unlearn.RECIPES)
    found = {name: bench_unlearn.Found(looks, {"auc_loss": 0.6}) for name in names}
    records = [*bench_unlearn.records_of(found, "MLP, table, 3%, seed 0", "cpu", 1)]
    times = {record.provider: (record.p50, record.ratio) for record in records if record.case.endswith("to forget")}
    assert times["retrain"] == (4, 1)
    assert times["nabla_tau"] == times["retrain, stopped early"] == (4, 1)
    assert "original" not in times
    ends = {record.provider: record.p50 for record in records if record.case.endswith("auc_loss at the end")}
    assert ends == dict.fromkeys(names, 0.6)
    write_csv(records, tmp_path / "unlearn_cpu.csv", "cpu")
    drawn = plot.curves(read_csv(tmp_path / "unlearn_cpu.csv"))
    assert drawn["AUC gap at"]["MLP, table, 3%"]["nabla_tau"] == [(1, 0.03), (4, 0)]
    plot.main([str(tmp_path), str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "time_to_forget_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_as_records_and_as_a_plot(tmp_path, monkeypatch):
    from nabla_tau.suites.measures import MEASURES
    from nabla_tau.suites.table import ComparisonTable, Row

    figures = {"gap_auc_loss": 0.02, "gap_test_accuracy": -0.01, "seconds": 3.0} | dict.fromkeys(
        ("gap_forget_accuracy", "gap_retain_accuracy", "gap_mia_loss"), 0.0
    )
    other = figures | {"gap_auc_loss": 0.04, "ulira": 0.7}
    rows = [Row("nabla-tau", 0, figures, []), Row("nabla-tau", 1, other, []), Row("unsir", 0, {}, ["not for this"])]
    settings = {"seeds": [0, 1], "shadow_models": 16, "device": "cpu", "threads": 1, "versions": {}}
    table = ComparisonTable("digits", "15% random", rows, {}, settings)
    found = {record.case: record for record in bench_quality.records_of(table)}
    record_of_auc = found["digits, 15% random: gap_auc_loss"]
    assert (record_of_auc.provider, record_of_auc.p50, record_of_auc.unit) == ("nabla-tau", pytest.approx(0.03), "gap")
    assert record_of_auc.p80 - record_of_auc.p50 == pytest.approx(np.std([0.02, 0.04], ddof=1))
    assert found["digits, 15% random: ulira"].p50 == 0.7, "of the one seed that has it"
    assert (found["digits, 15% random"].provider, found["digits, 15% random"].note) == ("unsir", "not for this")
    assert {case.partition(": ")[2] for case in found} - {"", "avg_d"} <= MEASURES.keys()
    assert found["digits, 15% random: avg_d"].p50 == pytest.approx(100 * 0.01 / 4)

    drawn = []
    monkeypatch.setattr(plot, "draw_points", lambda axes, points, title: drawn.append((points, title)))
    write_csv(list(found.values()), tmp_path / "quality_cpu.csv", "cpu")
    plot.plot_comparisons(tmp_path / "quality_cpu.csv", tmp_path)
    ((points, title),) = drawn
    assert title == "digits, 15% random forgotten"
    (((mean, deviation), (accuracy, _)),) = points.values()
    assert (list(points), mean, accuracy) == (["nabla-tau"], pytest.approx(0.03), pytest.approx(-0.01))
    assert deviation == pytest.approx(np.std([0.02, 0.04], ddof=1), rel=1e-3)
    assert (tmp_path / "comparison_digits_15_random.png").stat().st_size > 1000


def test_the_course_of_a_run_and_the_losses_that_it_leaves(tmp_path):
    steps = [float(step) for step in range(80)]
    history = {"step": steps} | {name: [2 * step for step in steps] for name in bench_course.COURSE}
    same = {"bench": "course", "provider": "nabla_tau", "device": "cpu", "dtype": "float32", "threads": 1}
    course = [*bench_course.of_steps(history, 4.0, **same)]
    forget = [record for record in course if record.case == "course: forget loss"]
    assert len(forget) == bench_course.WINDOWS
    assert (forget[0].p20, forget[0].p50, forget[0].p80) == pytest.approx((0.4, 1, 1.6)), "of steps 0 and 1"
    assert [record.note for record in forget[:2]] == ["0.050 passes", "0.150 passes"]

    model = torch.nn.Linear(3, 2)
    parts = {name: (torch.randn(30, 3), torch.randint(2, (30,))) for name in ("forget", "retain", "unseen")}
    left = [*bench_course.of_model(model, parts, **same)]
    x, y = parts["forget"]
    (accuracy,) = (record.p50 for record in left if record.case == "accuracy on the forget set")
    assert accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    quantiles = [record.p50 for record in left if record.case == "losses of the forget set"]
    assert quantiles == sorted(quantiles)
    assert len(quantiles) == bench_course.QUANTILES

    write_csv([*course, *left], tmp_path / "course_cpu.csv", "cpu")
    plot.main([str(tmp_path), str(tmp_path / "docs")])
    for name in ("course_cpu.png", "losses_cpu.png", "gates.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
