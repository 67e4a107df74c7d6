"""The C++ update kernels: equal to the reference in float64, no worse than torch in low precision, at any number of
threads and on any instruction set, with every option."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nabla_tau import _C
from nabla_tau._library_update import Updates
from nabla_tau.kernels import update_reference as reference
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings
from nabla_tau.kernels.update_table import COLUMNS, table_of

SIZES = [1, 3, 17, 1000, 100003]
ADAMW = [Settings(1e-2 * (i + 1), 0.1 * i, (-1.0) ** i, 0.9 - 0.2 * i, 0.99, 1e-8 * i) for i in range(5)]
SGD = [Settings(1e-2, 0.1 * i, (-1.0) ** i, 0, 0, 0, 0.9, 0.0 if i % 2 else 0.3, float(i % 2)) for i in range(5)]
SETTINGS = {"adamw": ADAMW, "sgd": SGD}
NOISE = Noise(0.3, 2**63 + 77, 2**34 + 1)
WIDE = ("parameter", "forget", "retain", "first", "second", "centre")


@pytest.fixture(autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_rows(dtype=torch.float64, *, masked=False, momentum=True, sizes=SIZES):
    """The second parameter has no forget, the third no retain gradient; with masks the fourth has none."""
    generator = torch.Generator().manual_seed(0)

    def numbers(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rows = []
    for i, size in enumerate(sizes):
        moves = torch.rand(size, generator=generator) < 0.5
        rows.append(
            Row(
                numbers(size),
                7 * i,
                forget=None if i == 1 else numbers(size),
                retain=None if i == 2 else numbers(size),
                mask=moves if masked and i != 3 else None,
                first=numbers(size) if momentum else None,
                second=numbers(size).abs(),
                step=torch.tensor(float(i)),
                centre=numbers(size),
            )
        )
    return rows


def copied(rows, dtype=None):
    def copy(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype is not None and name in WIDE else value.clone()

    return [Row(**{name: copy(name, value) for name, value in row._asdict().items()}) for row in rows]


def assert_rows_close(ours, truth, **tolerance):
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        for name in ("parameter", "first", "second", "step"):
            x, y = getattr(a, name), getattr(b, name)
            if y is not None:
                torch.testing.assert_close(
                    x.double(), y.double(), **tolerance, msg=lambda m, at=f"{name} of {i}": f"{at}: {m}"
                )


def same(ours, others):
    names = ("parameter", "first", "second", "step")
    return all(
        getattr(a, name) is None or torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, others, strict=True)
        for name in names
    )


def stepped(rule, rows, *, products=None, noise=None, forget_scale=0.7, retain_scale=-0.4):
    Updates().step(rule, rows, SETTINGS[rule], forget_scale, retain_scale, products, noise)
    return rows


def test_columns_are_those_of_python():
    assert _C.UPDATE_COLUMNS == COLUMNS


@pytest.mark.parametrize("conflict", [None, True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_float64_equals_the_reference(rule, noise, masked, conflict):
    ours = make_rows(masked=masked)
    truth = copied(ours)
    products = scale = None
    if conflict is not None:
        products = Updates().products(ours)
        products = products._replace(cross=-products.cross.abs() if conflict else products.cross.abs())
        scale = products.projected(0.7, -0.4)
        assert (scale == -0.4) != conflict
    stepped(rule, ours, products=products, noise=noise)
    getattr(reference, rule)(truth, SETTINGS[rule], 0.7, -0.4 if scale is None else scale, noise)
    assert_rows_close(ours, truth, rtol=1e-12, atol=1e-14)


def test_projection_takes_the_retain_gradient_out_of_the_forget_gradient():
    """By the definition of PCGrad, on flat gradients, not by the one-scale form of it."""
    rows = make_rows()
    f, r = (
        torch.cat([torch.zeros_like(row.parameter) if g is None else g for row in rows for g in [getattr(row, name)]])
        for name in ("forget", "retain")
    )
    f -= 0.5 * r  # now they conflict
    parts = [(a.clone(), b.clone()) for a, b in zip(f.split(SIZES), r.split(SIZES), strict=True)]
    rows = [row._replace(forget=a, retain=b, first=None) for row, (a, b) in zip(rows, parts, strict=True)]
    products = Updates().products(rows)
    for found, wanted in zip(products, (f @ f, f @ r, r @ r), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-9)
    before = torch.cat([row.parameter for row in rows])
    Updates().step("sgd", rows, [Settings(0.1, 0.0)] * 5, 0.7, 0.4, products)
    projected = f - (f @ r) / (r @ r) * r
    assert abs(projected @ r) < 1e-9 * (f.norm() * r.norm())
    wanted = before - 0.1 * (0.7 * projected + 0.4 * r)
    torch.testing.assert_close(torch.cat([row.parameter for row in rows]), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_low_precision_is_no_worse_than_torch(rule, dtype):
    ours = make_rows(dtype)
    by_torch, truth = copied(ours), copied(ours, torch.float64)
    stepped(rule, ours)
    for rows in (by_torch, truth):
        getattr(reference, rule)(rows, SETTINGS[rule], 0.7, -0.4)
    for a, b, c in zip(ours, by_torch, truth, strict=True):
        for name in ("parameter", "first", "second"):
            exact = getattr(c, name)
            errors = [(getattr(x, name).double() - exact).abs().max() for x in (a, b)]
            assert errors[0] <= errors[1] + 2 * torch.finfo(torch.float32).eps * exact.abs().max(), name


def test_a_first_mean_is_right_to_rounding():
    """Interpolated from the far end it would be what is left of two numbers a thousand times as large."""
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for beta in (0.999, 0.001):
        old = torch.zeros_like(g) if beta > 0.5 else 1e3 * g
        row = Row(torch.zeros_like(g), 0, retain=g, first=old.clone(), second=old.square(), step=torch.zeros(()))
        Updates().step("adamw", [row], [Settings(1e-3, 0.0, 1.0, beta, 0.99, 1e-8)], 1.0, 1.0)
        wanted = beta * old.double() + (1 - beta) * g.double()
        torch.testing.assert_close(row.first.double(), wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_threads_do_not_change_a_bit(rule, dtype, masked):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = make_rows(dtype, masked=masked)
        products = Updates().products(rows)
        products = products._replace(cross=-products.cross.abs())
        stepped(rule, rows, products=products, noise=NOISE)
        Updates().into_ball(rows, 100.0)
        found.append((rows, torch.stack(products)))
    assert same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_many_tensors_in_one_call_are_those_one_by_one():
    """Noise included: it depends on the parameter's number and not on its place in the list."""
    sizes = list(range(200))
    together, apart = make_rows(torch.float32, sizes=sizes), make_rows(torch.float32, sizes=sizes)
    Updates().step("adamw", together, [ADAMW[0]] * 200, 0.7, -0.4, None, NOISE)
    for row in reversed(apart):
        Updates().step("adamw", [row], [ADAMW[0]], 0.7, -0.4, None, NOISE)
    assert same(together, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_the_reference_and_normal(dtype):
    size = 200_003
    for seed, step in ((0, 0), (2**64 - 1, 2**40 + 5), (-1, 3)):
        row = Row(torch.zeros(size, dtype=dtype), 5, retain=torch.zeros(size, dtype=dtype))
        Updates().step("sgd", [row], [Settings(-1.0, 0.0)], 1.0, 1.0, None, Noise(2.0, seed, step))
        drawn = reference.normals(size, 5, seed, step, dtype, torch.device("cpu"))
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(row.parameter, 2 * drawn, rtol=tolerance, atol=tolerance)
    # Moments within five standard errors, and neighbours without correlation.
    n = drawn.double()
    for power, (mean, deviation) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], 1):
        assert abs((n**power).mean() - mean) < 5 * deviation / size**0.5
    for lag in (1, 2, 3, 4):
        assert abs((n[lag:] * n[:-lag]).mean()) < 5 / size**0.5
    tails = [((n.abs() > t).double().mean(), torch.special.erfc(torch.tensor(t / 2**0.5))) for t in (1.0, 2.0, 3.0)]
    for share, wanted in tails:
        assert abs(share - wanted) < 5 * (wanted / size) ** 0.5


def test_philox_gives_the_published_numbers():
    """The known answers that Random123 publishes for philox4x32_10."""
    known = {
        (0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF, 2**64 - 1): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (word, key), wanted in known.items():
        counter = tuple(torch.tensor([word]) for _ in range(4))
        assert tuple(int(x) for x in reference.philox(counter, key)) == wanted


@pytest.mark.parametrize("other", ["seed", "step", "number"])
def test_noise_is_another_for_another_seed_step_and_parameter(other):
    given = {"seed": 1, "step": 2, "number": 3}

    def draw(seed, step, number):
        row = Row(torch.zeros(400), number, retain=torch.zeros(400))
        Updates().step("sgd", [row], [Settings(-1.0, 0.0)], 1.0, 1.0, None, Noise(1.0, seed, step))
        return row.parameter

    first = draw(**given)
    for change in (1, 2**20, 2**31 - 10):
        again = draw(**given | {other: given[other] + change})
        assert abs(torch.corrcoef(torch.stack([first, again]))[0, 1]) < 0.25


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_entries_are_left_alone_even_where_they_are_nan(rule, dtype):
    rows = make_rows(dtype, masked=True)
    for row in rows:
        if row.mask is not None:
            for name in ("forget", "retain"):
                if getattr(row, name) is not None:
                    getattr(row, name)[~row.mask] = float("nan")
    before = copied(rows)
    products = Updates().products(rows)
    assert torch.stack(products).isfinite().all()
    stepped(rule, rows, products=products, noise=NOISE)
    Updates().into_ball(rows, 1.0)
    for row, old in zip(rows, before, strict=True):
        if row.mask is not None:
            for name in ("parameter", "first", "second"):
                assert torch.equal(getattr(row, name)[~row.mask], getattr(old, name)[~row.mask])
        assert row.parameter.isfinite().all()
        moved = row.parameter != old.parameter
        assert moved[row.mask if row.mask is not None else ...].float().mean() > 0.9 or row.parameter.numel() < 20


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ball(dtype, masked):
    rows = make_rows(dtype, masked=masked)
    truth = copied(rows)
    distance = reference.squared_distance(truth).sqrt()
    Updates().into_ball(rows, distance.item() * (1 + 1e-6))
    assert same(rows, truth)  # inside: not a bit moves
    Updates().into_ball(rows, 10.0)
    reference.pull(truth, distance**2, 10.0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_rows_close(rows, truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reference.squared_distance(rows).sqrt().item(), 10.0, rtol=1e-6, atol=0)


def test_cosine_and_balance():
    products = Products(*(torch.tensor(value, dtype=torch.float64) for value in (16.0, -6.0, 9.0)))
    assert products.cosine().item() == -0.5
    assert products.balance(0.4).item() == pytest.approx(0.4 * 3 / 4)
    assert products.balance(4.0).item() == 1.0
    nothing = Products(*torch.zeros(3, dtype=torch.float64))
    assert nothing.cosine().item() == 0
    assert nothing.projected(0.7, 0.4).item() == pytest.approx(0.4)


def numpy_table(rows, settings=None):
    return np.frombuffer(table_of(rows, settings), np.int64).reshape(len(rows), len(COLUMNS)).copy()


def test_tables_that_do_not_fit_are_refused_and_nothing_is_written():
    rows = make_rows(torch.float32)
    before = copied(rows)
    table = numpy_table(rows, ADAMW)
    with pytest.raises(ValueError, match=r"table must have shape \(5, 20\), got \(5, 19\)"):
        _C.adamw(table[:, :19].copy(), "float32", 1.0, 1.0)
    with pytest.raises(TypeError, match="table must be int64, got float64"):
        _C.adamw(table.astype(np.float64), "float32", 1.0, 1.0)
    with pytest.raises(ValueError, match="dtype must be float32, float64, float16 or bfloat16, got int8"):
        _C.adamw(table, "int8", 1.0, 1.0)
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        _C.sgd(table, "float32", 1.0, 1.0, num_threads=0)
    for name in ("parameter", "first", "second", "step"):
        hole = table.copy()
        hole[4, COLUMNS.index(name)] = 0
        with pytest.raises(ValueError, match=f"{name} is missing in row 4"):
            _C.adamw(hole, "float32", 1.0, 1.0)
    hole = table.copy()
    hole[3, [COLUMNS.index("forget"), COLUMNS.index("retain")]] = 0
    with pytest.raises(ValueError, match="forget and retain are missing in row 3"):
        _C.sgd(hole, "float32", 1.0, 1.0)
    hole = table.copy()
    hole[2, COLUMNS.index("centre")] = 0
    for call in (lambda: _C.squared_distance(hole, "float32"), lambda: _C.pull(hole, "float32", 0.5)):
        with pytest.raises(ValueError, match="centre is missing in row 2"):
            call()
    assert same(rows, before)


VARIANT = """
import sys
import numpy as np
import test_update_cpp as here
import torch
from nabla_tau import _C

found = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for rule, masked in here.itertools.product(("adamw", "sgd"), (False, True)):
        rows = here.make_rows(dtype, masked=masked)
        products = here.Updates().products(rows)
        here.stepped(rule, rows, products=products, noise=here.NOISE)
        here.Updates().into_ball(rows, 100.0)
        for number, row in enumerate(rows):
            for name in ("parameter", "first", "second"):
                found[f"{dtype} {rule} {masked} {number} {name}"] = getattr(row, name).double().numpy()
        found[f"{dtype} {rule} {masked} products"] = torch.stack(products).numpy()
np.savez(sys.argv[1], **found)
print(_C.simd_level())
"""


def test_every_instruction_set_gives_the_same_step(tmp_path):
    levels, results = [], []
    for level in ("baseline", "x86-64-v3", "x86-64-v4"):
        path = str(tmp_path / f"{level}.npz")
        environment = {**os.environ, "NABLA_TAU_SIMD": level}
        environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        ran = subprocess.run(
            [sys.executable, "-c", VARIANT, path], env=environment, check=True, capture_output=True, text=True
        )
        levels.append(ran.stdout.strip())
        with np.load(path) as found:
            results.append(dict(found))
    assert levels[0] == "baseline"
    for (name, wanted), other in itertools.product(results[0].items(), results[1:]):
        tolerance = 1e-12 if "float64" in name or "products" in name else 1e-2 if "bfloat16" in name else 2e-6
        np.testing.assert_allclose(other[name], wanted, rtol=tolerance, atol=tolerance, err_msg=name)
