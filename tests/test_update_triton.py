"""The Triton update kernels: equal to the reference in float64, over chunks, dtypes and every option.

On a machine with a GPU the kernels run there. Elsewhere they run in Triton's interpreter, on CPU tensors, one program
after the other: that shows what they compute, tables of addresses included, not that their programs do not race.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, ON_GPU, load_kernels

from nabla_tau.kernels import update_reference as reference
from nabla_tau.kernels.update_reference import Noise, Row, Settings

launch, _, _, _, update_launch = load_kernels("launch", "update_chunks", "update", "update_sums", "update_launch")

SIZES = [1, 3, 17, 64, 150]
# Hardly any two alike; the last is for SGD, and the rate of the first for nothing but to differ.
ADAMW = [Settings(1e-2 * (i + 1), 0.1 * i, (-1.0) ** i, 0.9 - 0.2 * i, 0.99, 1e-8 * i) for i in range(5)]
SGD = [Settings(1e-2, 0.1 * i, (-1.0) ** i, 0, 0, 0, 0.9, 0.0 if i % 2 else 0.3, float(i % 2)) for i in range(5)]
SETTINGS = {"adamw": ADAMW, "sgd": SGD}


@pytest.fixture(autouse=True)
def chunks_of_64(monkeypatch, interpreter):
    """Whole ones, a last one that is not whole, and parameters shorter than one."""
    monkeypatch.setattr(launch, "chunk", lambda _: launch.Launch(1, 64, 32))


def make_rows(dtype=torch.float64, *, masked=False, momentum=True):
    """The second parameter has no forget, the third no retain gradient; with masks the fourth has none."""
    generator = torch.Generator().manual_seed(0)

    def numbers(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    rows = []
    for i, size in enumerate(SIZES):
        moves = torch.rand(size, generator=generator) < 0.5
        rows.append(
            Row(
                numbers(size),
                7 * i,
                forget=None if i == 1 else numbers(size),
                retain=None if i == 2 else numbers(size),
                mask=moves.to(DEVICE) if masked and i != 3 else None,
                first=numbers(size) if momentum else None,
                second=numbers(size).abs(),
                step=torch.tensor(float(i), device=DEVICE),
                centre=numbers(size),
            )
        )
    return rows


def assert_rows_close(ours, truth, tolerance):
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        for name in ("parameter", "first", "second", "step"):
            x, y = getattr(a, name), getattr(b, name)
            if y is not None:
                torch.testing.assert_close(
                    x.double(), y.double(), **tolerance, msg=lambda m, at=f"{name} of {i}": f"{at}: {m}"
                )


EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("noise", [None, Noise(0.3, 2**63 + 77, 2**34 + 1)])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_step_is_that_of_the_reference(rule, noise, masked, project):
    ours, truth = make_rows(masked=masked), make_rows(masked=masked)
    work = update_launch.Workspace()
    wanted = reference.gradient_products(truth)
    # Given in another sign the forget gradient conflicts, or does not.
    for sign in (-1.0, 1.0):
        found = work.products([ours]) if project else None
        if found is not None:
            torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-13, atol=1e-13)
            found = found._replace(cross=sign * found.cross)
            scale = wanted._replace(cross=sign * wanted.cross).projected(0.7, -0.4)
        work.step(rule, ours, SETTINGS[rule], 0.7, -0.4, found, noise)
        getattr(reference, rule)(truth, SETTINGS[rule], 0.7, scale if project else -0.4, noise)
        assert_rows_close(ours, truth, EXACT)


@pytest.mark.parametrize("nesterov", [0.0, 1.0])
def test_sgd_without_momentum_has_no_buffer(nesterov):
    ours, truth = make_rows(momentum=False), make_rows(momentum=False)
    settings = [Settings(0.1, 0.2, nesterov=nesterov)] * len(ours)
    update_launch.Workspace().step("sgd", ours, settings, 1.0, 1.0, None, None)
    reference.sgd(truth, settings, 1.0, 1.0)
    assert_rows_close(ours, truth, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_low_precision_is_no_worse_than_torch(rule, dtype):
    """Of both, the error against a step in float64 from the same numbers."""
    ours, by_torch, truth = make_rows(dtype), make_rows(dtype), make_rows(dtype)
    widened = [
        row._replace(**{k: getattr(row, k).double() for k in ("parameter", "first", "second")},
                     **{k: None if getattr(row, k) is None else getattr(row, k).double() for k in ("forget", "retain")})
        for row in truth
    ]  # fmt: skip
    update_launch.Workspace().step(rule, ours, SETTINGS[rule], 0.7, -0.4, None, None)
    getattr(reference, rule)(by_torch, SETTINGS[rule], 0.7, -0.4)
    getattr(reference, rule)(widened, SETTINGS[rule], 0.7, -0.4)
    # The interpreter cuts a float32 off where a GPU rounds it to the nearest bfloat16.
    slack = torch.finfo(dtype).eps * (1 if ON_GPU else 2)
    for a, b, c in zip(ours, by_torch, widened, strict=True):
        for name in ("parameter", "first", "second"):
            exact = getattr(c, name)
            errors = [(getattr(x, name).double() - exact).abs().max() for x in (a, b)]
            assert errors[0] <= errors[1] + slack * exact.abs().max(), name


def test_a_first_mean_is_right_to_rounding():
    """Interpolated from the far end it would be what is left of two numbers a thousand times as large."""
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0))[:100].to(DEVICE)
    for beta in (0.999, 0.001):
        old = torch.zeros_like(g) if beta > 0.5 else 1e3 * g
        row = Row(
            torch.zeros_like(g),
            0,
            retain=g,
            first=old.clone(),
            second=old.square(),
            step=torch.zeros((), device=DEVICE),
        )
        settings = [Settings(1e-3, 0.0, 1.0, beta, 0.99, 1e-8)]
        update_launch.Workspace().step("adamw", [row], settings, 1.0, 1.0, None, None)
        wanted = beta * old.double() + (1 - beta) * g.double()
        torch.testing.assert_close(row.first.double(), wanted, rtol=3e-7, atol=0)


def test_noise_in_float32_is_that_of_the_reference_to_rounding():
    size = 150
    rows = [Row(torch.zeros(size, device=DEVICE), 5, retain=torch.zeros(size, device=DEVICE))]
    noise = Noise(
        torch.tensor(2.0, device=DEVICE), torch.tensor(-3, device=DEVICE), torch.tensor(2**40 + 1, device=DEVICE)
    )
    update_launch.Workspace().step("sgd", rows, [Settings(-1.0, 0.0)], 1.0, 1.0, None, noise)
    drawn = reference.normals(size, 5, -3, 2**40 + 1, torch.float32, torch.device(DEVICE))
    torch.testing.assert_close(rows[0].parameter, 2 * drawn, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("radius", [2.0, 1e3])
def test_the_ball_is_that_of_the_reference(radius, masked):
    ours, truth = make_rows(masked=masked), make_rows(masked=masked)
    # Two dtypes, hence two launches, and one norm.
    mixed = [[row for i, row in enumerate(ours) if i % 2 == part] for part in (0, 1)]
    update_launch.Workspace().ball(mixed, torch.tensor(radius, device=DEVICE))
    before = [row.parameter.clone() for row in truth]
    reference.pull(truth, reference.squared_distance(truth), radius)
    assert_rows_close(ours, truth, EXACT)
    if radius == 1e3:
        assert all(torch.equal(row.parameter, p) for row, p in zip(ours, before, strict=True))


def test_products_of_several_dtypes_are_added():
    low, high = make_rows(torch.float32), make_rows(torch.float64)
    found = update_launch.Workspace().products([low, high])
    wanted = reference.gradient_products([*low, *high])
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-6, atol=1e-6)


def test_scales_and_rate_may_be_tensors_that_change_without_a_new_table():
    ours, truth = make_rows(), make_rows()
    forget_scale, retain_scale = (torch.tensor(value, device=DEVICE) for value in (0.7, -0.4))
    work = update_launch.Workspace()
    for value in (0.25, -1.5):
        forget_scale.fill_(value)
        work.step("adamw", ours, ADAMW, forget_scale, retain_scale, None, None)
        reference.adamw(truth, ADAMW, value, retain_scale)
        assert_rows_close(ours, truth, {"rtol": 1e-7, "atol": 1e-7})


def test_a_table_is_written_again_only_when_an_address_changed():
    rows = make_rows()
    work = update_launch.Workspace()
    work.step("adamw", rows, ADAMW, 1.0, 1.0, None, None)
    (part,) = work._parts.values()
    table, written = part._table, part._written
    work.step("adamw", rows, ADAMW, 1.0, 1.0, None, None)
    assert part._written is written
    moved = [row._replace(retain=None if row.retain is None else row.retain.clone()) for row in rows]
    work.step("adamw", moved, ADAMW, 1.0, 1.0, None, None)
    assert part._written != written
    assert part._table is table


def test_addresses_that_16_does_not_divide_are_served():
    ours, truth = make_rows(), make_rows()
    for i, row in enumerate(ours):
        if row.forget is not None:
            place = torch.empty(len(row.forget) + 1, dtype=torch.float64, device=DEVICE)[1:]
            ours[i] = row._replace(forget=place.copy_(row.forget))
    assert any(row.forget is not None and row.forget.data_ptr() % 16 for row in ours)
    update_launch.Workspace().step("adamw", ours, ADAMW, 0.7, -0.4, None, None)
    reference.adamw(truth, ADAMW, 0.7, -0.4)
    assert_rows_close(ours, truth, EXACT)
