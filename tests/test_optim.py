"""DualAdamW and DualSGD: torch's optimizers step by step, and with two gradients what torch makes of their sum."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from nabla_tau.optim import Ball, DualAdamW, DualSGD, Noise

SHAPES = [(1,), (17, 3), (8, 3, 3, 3), (100,)]
ADAMW = [
    {},
    {"lr": 0.1, "betas": (0.3, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True, "betas": (0.0, 0.0)},
    {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.0},
]
SGD = [
    {},
    {"lr": 0.1, "weight_decay": 0.2},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.8, "nesterov": True},
]
EVERY = [(DualAdamW, torch.optim.AdamW, options) for options in ADAMW] + [
    (DualSGD, torch.optim.SGD, options) for options in SGD
]
PAIRS = [(DualAdamW, torch.optim.AdamW, {"lr": 0.01}), (DualSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9})]


def make(dtype=torch.float64, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def leaves(dtype=torch.float64):
    return [p.requires_grad_() for p in make(dtype)]


def assert_same(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance)


def train(optimizer, parameters, steps, first=0):
    """Gradients that depend on the parameters, and every third step one parameter without any."""
    for step in range(first, first + steps):
        noise = make(torch.float64, 100 + step, [p.shape for p in parameters])
        for number, (p, n) in enumerate(zip(parameters, noise, strict=True)):
            p.grad = None if step % 3 == 1 and number == 2 else (0.3 * p.detach().double() + n).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("ours", "theirs", "options"), EVERY)
def test_a_step_is_that_of_torch(ours, theirs, options):
    a, b = leaves(), leaves()
    one, other = ours(a, **options), theirs(b, **options)
    for step in range(20):
        train(one, a, 1, step)
        train(other, b, 1, step)
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "options"), EVERY)
def test_low_precision_is_no_worse_than_torch(ours, theirs, options, dtype):
    # Of all three the same parameters and the same gradients, rounded to dtype, in float64 too.
    start = make(dtype)
    a, b, exact = ([p.to(kind, copy=True).requires_grad_() for p in start] for kind in (dtype, dtype, torch.float64))
    optimizers = ours(a, **options), theirs(b, **options), theirs(exact, **options)
    for step in range(10):
        for p, q, r, g in zip(a, b, exact, make(dtype, 7 + step), strict=True):
            p.grad, q.grad, r.grad = g, g.clone(), g.double()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, r in zip(a, b, exact, strict=True):
        errors = [(x.detach().double() - r.detach()).abs().max() for x in (p, q)]
        assert errors[0] <= errors[1] + 4 * torch.finfo(dtype).eps * r.detach().abs().max()


def test_groups_keep_their_own_settings():
    a, b = leaves(), leaves()
    groups = [
        [{"params": p[:2], "lr": 0.1, "weight_decay": 0.5}, {"params": p[2:], "betas": (0.5, 0.6), "eps": 1e-2}]
        for p in (a, b)
    ]
    one, other = DualAdamW(groups[0], maximize=True), torch.optim.AdamW(groups[1], maximize=True)
    train(one, a, 5)
    train(other, b, 5)
    assert_same(a, b)


@pytest.mark.parametrize("direction", ["from torch", "to torch", "to itself"])
@pytest.mark.parametrize("more", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}])
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_training_goes_on_with_the_state_of_the_other(ours, theirs, options, more, direction):
    if direction != "from torch":
        more = {name: value for name, value in more.items() if name == "maximize"}
    a, b = leaves(), leaves()
    source = (theirs if direction == "from torch" else ours)(a, **options, **more)
    through = theirs(b, **options, **more)
    train(source, a, 4)
    train(through, b, 4)
    target = (theirs if direction == "to torch" else ours)(a, lr=123.0)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(target, a, 4, 4)
    train(through, b, 4, 4)
    assert_same(a, b)
    # And back: what was loaded names the same settings and the same state.
    back = theirs(b)
    back.load_state_dict(target.state_dict())
    assert [set(state) for state in back.state.values()] == [set(state) for state in through.state.values()]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_two_gradients_are_their_scaled_sum(ours, theirs, options):
    a, b = leaves(), leaves()
    one, other = ours(a, **options), theirs(b, **options)
    for step in range(6):
        forget, retain = make(seed=2 * step), make(seed=2 * step + 1)
        forget[0] = retain[1] = forget[3] = retain[3] = None
        assert one.step_dual(forget, retain, 0.7, torch.tensor(-0.4, dtype=torch.float64)) is None
        for p, f, r in zip(b, forget, retain, strict=True):
            parts = [s * g for s, g in ((0.7, f), (-0.4, r)) if g is not None]
            p.grad = sum(parts) if parts else None
        other.step()
        assert_same(a, b)
    assert torch.equal(a[3], make()[3])  # no gradient, no decay
    one.step_dual(None, retain)
    one.step_dual(forget, None)


@pytest.mark.parametrize("conflict", [True, False])
def test_conflicting_gradients_are_projected(conflict):
    a, b = leaves(), leaves()
    one, other = DualSGD(a, 0.1, momentum=0.9), torch.optim.SGD(b, 0.1, momentum=0.9)
    retain = make(seed=1)
    forget = [n + (-0.5 if conflict else 0.5) * r for n, r in zip(make(seed=2), retain, strict=True)]
    f, r = (torch.cat([g.flatten() for g in part]) for part in (forget, retain))
    products = one.step_dual(forget, retain, 2.0, 0.5, project=True)
    assert ((f @ r) < 0) == conflict
    torch.testing.assert_close(products.cosine(), torch.nn.functional.cosine_similarity(f, r, 0))
    torch.testing.assert_close(products.balance(0.1), (0.1 * r.norm() / f.norm()))
    if conflict:
        f = f - (f @ r) / (r @ r) * r
    for p, g in zip(b, (2.0 * f + 0.5 * r).split([p.numel() for p in b]), strict=True):
        p.grad = g.view_as(p)
    other.step()
    assert_same(a, b)
    c = leaves()
    again = DualSGD(c, 0.1, momentum=0.9)
    known = again.products(forget, retain)
    assert all(map(torch.equal, known, products))
    again.step_dual(forget, retain, 2.0, 0.5, project=True, products=known)
    assert all(map(torch.equal, a, c))


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_masked_entries_are_as_if_frozen(ours, theirs, options):
    a, b = leaves(), leaves()
    mask = [torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.5 for p in a]
    mask[3] = None
    one = ours(a, **options, weight_decay=0.1)
    chosen = [p.detach() if m is None else p.detach()[m] for p, m in zip(b, mask, strict=True)]
    other = theirs(chosen, **options, weight_decay=0.1)
    for step in range(4):
        retain = make(seed=step)
        one.step_dual(None, retain, mask=mask)
        for p, g, m in zip(chosen, retain, mask, strict=True):
            p.grad = g if m is None else g[m]
        other.step()
    for p, before, m, moved in zip(a, b, mask, chosen, strict=True):
        assert_same([p if m is None else p.detach()[m]], [moved])
        if m is not None:
            assert torch.equal(p.detach()[~m], before.detach()[~m])
            for value in one.state[p].values():
                assert value.ndim == 0 or not value[~m].any()


def test_noise_is_added_after_the_scales_and_repeats():
    found = []
    for seed, step, std in ((1, 5, 0.5), (1, 5, torch.tensor(0.5)), (1, 6, 0.5), (2, 5, 0.5)):
        a = leaves()
        DualSGD(a, 1.0).step_dual(None, [torch.zeros_like(p) for p in a], 1.0, 1e9, noise=Noise(std, seed, step))
        found.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(a, make(), strict=True)]))
    assert torch.equal(found[0], found[1])
    assert 0.4 < found[0].std() < 0.6
    for other in found[2:]:
        assert (found[0] - other).std() > 0.5


def test_the_ball_is_around_all_parameters():
    a, centres = leaves(), make(seed=9)
    optimizer = DualAdamW(a, 0.01)
    gradients = [*make(seed=1)[:3], None]  # the last parameter does not move, and counts all the same
    optimizer.step_dual(None, gradients, ball=Ball(centres, 2.0))
    away = torch.cat([(p.detach() - c).flatten() for p, c in zip(a, centres, strict=True)])
    torch.testing.assert_close(away.norm().item(), 2.0)
    b = leaves()
    other = DualAdamW(b, 0.01)
    other.step_dual(None, gradients)
    before = torch.cat([(p.detach() - c).flatten() for p, c in zip(b, centres, strict=True)])
    torch.testing.assert_close(away, before * (2 / before.norm()), rtol=1e-12, atol=1e-12)
    values = [p.detach().clone() for p in b]
    other.step_dual([None] * 4, None, ball=Ball(centres, torch.tensor(1e3)))
    assert all(map(torch.equal, values, b))


def odd_layouts():
    """Channels last, transposed, every other column of a matrix; with gradients that lie in the usual order."""
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    image, matrix = make(seed=4)[2].to(memory_format=torch.channels_last), make(seed=4)[1].t()
    return [p.requires_grad_() for p in (image, matrix, whole[:, ::2])], whole


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_any_memory_layout(ours, theirs, options):
    (a, whole), (b, _) = odd_layouts(), odd_layouts()
    gaps = whole[:, 1::2].clone()
    one, other = ours(a, **options), theirs(b, **options)
    train(one, a, 6)
    train(other, b, 6)
    assert_same(a, b)
    assert torch.equal(whole[:, 1::2], gaps)


WRONG = {
    "shape": (ValueError, r"retain\[2\] must have the shape \(8, 3, 3, 3\) of its parameter, got \(8, 27\)"),
    "dtype": (TypeError, r"retain\[2\] must be torch.float64, got torch.float32"),
    "sparse": (TypeError, r"retain\[2\] must be an ordinary dense tensor, got layout torch.sparse_coo"),
    "device": (ValueError, r"retain\[2\] must be on cpu as its parameter is, got meta"),
    "none": (TypeError, r"retain\[2\] must be a tensor, got float"),
    "length": (ValueError, "retain must have an entry for each of the 4 parameters, got 3 entries"),
    "tensor": (ValueError, "retain must have an entry for each of the 4 parameters, got one tensor"),
    "mask dtype": (TypeError, r"mask\[2\] must be torch.bool, got torch.float64"),
    "mask shape": (ValueError, r"mask\[2\] must have the shape"),
    "centres": (TypeError, r"ball.centres\[1\] must be a tensor, got NoneType"),
    "radius": (ValueError, "ball.radius must be a number, not negative, got -1"),
    "scale shape": (ValueError, r"forget_scale must be a number or a 0-d tensor, got shape \(2,\)"),
    "scale dtype": (TypeError, "forget_scale must be floating point, got torch.int64"),
    "scale nan": (ValueError, "forget_scale must be a number, got nan"),
    "std": (ValueError, "noise.std must be a number, not negative, got -0.5"),
    "seed": (ValueError, "noise.seed must be an integer, got 0.5"),
    "step": (TypeError, "noise.step must be int64, got torch.float32"),
    "products": (ValueError, "products are for project=True"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("ours", [DualAdamW, DualSGD])
def test_what_does_not_fit_is_refused_before_anything_is_written(ours, wrong):
    a = leaves()
    optimizer = ours(a, 0.1)
    optimizer.step_dual(None, make(seed=1))
    before = copy.deepcopy((a, optimizer.state_dict()))
    retain = make(seed=2)
    image = retain[2]
    masks, centres = [torch.ones(p.shape, dtype=torch.bool) for p in a], make()
    arguments = {"forget": make(seed=3), "retain": retain}
    match wrong:
        case "shape":
            retain[2] = image.flatten(1)
        case "dtype":
            retain[2] = image.float()
        case "sparse":
            retain[2] = image.to_sparse()
        case "device":
            retain[2] = image.to("meta")
        case "none":
            retain[2] = 0.0
        case "length":
            arguments["retain"] = retain[:3]
        case "tensor":
            arguments["retain"] = torch.zeros(4)
        case "mask dtype":
            arguments["mask"] = [*masks[:2], image, None]
        case "mask shape":
            arguments["mask"] = [*masks[:2], masks[0], None]
        case "centres":
            arguments["ball"] = Ball([centres[0], None, *centres[2:]], 1.0)
        case "radius":
            arguments["ball"] = Ball(centres, -1)
        case "scale shape":
            arguments["forget_scale"] = torch.ones(2)
        case "scale dtype":
            arguments["forget_scale"] = torch.tensor(1)
        case "scale nan":
            arguments["forget_scale"] = float("nan")
        case "std":
            arguments["noise"] = Noise(-0.5, 0, 0)
        case "seed":
            arguments["noise"] = Noise(0.5, 0.5, 0)
        case "step":
            arguments["noise"] = Noise(0.5, 0, torch.tensor(0.0))
        case "products":
            arguments["products"] = optimizer.products(retain, retain)
    error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        optimizer.step_dual(**arguments)
    assert all(map(torch.equal, a, before[0]))
    torch.testing.assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)


def test_a_sparse_gradient_is_refused_in_step():
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = DualAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"grad\[0\] must be an ordinary dense tensor, got layout torch.sparse_coo"):
        optimizer.step()


def test_parameters_that_are_no_real_numbers_are_refused():
    optimizer = DualAdamW(leaves())
    for parameter in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=f"parameter 0 is {parameter.dtype}: only real floating point"):
            optimizer.add_param_group({"params": [parameter]})
        with pytest.raises(TypeError):
            DualSGD([parameter], 0.1)
    with pytest.raises(ValueError, match="lr must be 0 or more, got -1"):
        optimizer.add_param_group({"params": leaves(), "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"amsgrad": True}, "DualAdamW does not have the maximum of past second moments"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DualAdamW(leaves(), **options)


@pytest.mark.parametrize("options", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_a_momentum(options):
    with pytest.raises(ValueError, match="nesterov needs a momentum, and dampening 0"):
        DualSGD(leaves(), 0.1, **options)


@pytest.mark.parametrize("flag", ["amsgrad", "differentiable", "Adam", "shape"])
def test_a_state_that_cannot_be_continued_is_refused(flag):
    a, b = leaves(), leaves()
    mine = DualAdamW(a, 0.5)
    train(mine, a, 2)
    if flag == "Adam":
        theirs = torch.optim.Adam(b, weight_decay=0.1)
    else:
        theirs = torch.optim.AdamW(b, **{flag: True} if flag != "shape" else {})
    state = theirs.state_dict()
    if flag == "shape":
        train(theirs, b, 1)
        state = copy.deepcopy(theirs.state_dict())
        state["state"][1]["exp_avg"] = torch.zeros(3)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(
        ValueError, match={"Adam": "torch.optim.Adam", "shape": "exp_avg of parameter 1"}.get(flag, flag)
    ):
        mine.load_state_dict(state)
    torch.testing.assert_close(mine.state_dict(), before, rtol=0, atol=0)


def test_a_parameter_that_changed_its_dtype_is_named():
    (p,) = a = [torch.nn.Parameter(torch.ones(3))]
    optimizer = DualAdamW(a)
    optimizer.step_dual(None, [torch.ones(3)])
    p.data = p.data.double()
    with pytest.raises(TypeError, match=r"the state of parameter 0 is torch.float32, the parameter torch.float64"):
        optimizer.step_dual(None, [torch.ones(3, dtype=torch.float64)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_by_itself(copied):
    a, b = leaves(), leaves()
    one, other = DualAdamW(a), torch.optim.AdamW(b)
    train(one, a, 2)
    train(other, b, 4)
    again = copied(one)
    train(again, again.param_groups[0]["params"], 2, 2)
    assert_same(again.param_groups[0]["params"], b)


def test_closure_hooks_and_schedulers():
    a, b = leaves(), leaves()
    one, other = DualAdamW(a, 0.1), torch.optim.AdamW(b, 0.1)
    seen = []
    one.register_step_pre_hook(lambda *_: seen.append("before"))
    one.register_step_post_hook(lambda *_: seen.append("after"))
    mine, theirs = (torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (one, other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns that no step was taken
        for step in range(3):
            gradients = make(seed=step)
            one.step_dual(None, gradients)
            for p, g in zip(b, gradients, strict=True):
                p.grad = g
            other.step()
            mine.step()
            theirs.step()
    assert_same(a, b)
    assert seen == ["before", "after"] * 3

    def closure():
        assert torch.is_grad_enabled()
        loss = sum(p.square().sum() for p in a)
        one.zero_grad()
        loss.backward()
        return loss

    before = sum(p.square().sum() for p in a).item()
    assert one.step(closure).item() == before
    assert sum(p.square().sum() for p in a).item() < before


def test_autograd_sees_that_the_parameters_changed():
    (p,) = a = [torch.nn.Parameter(torch.ones(3))]
    loss = p.square().sum()
    DualSGD(a, 0.1).step_dual(None, [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_parameters_and_no_gradients():
    a = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = DualAdamW(a)
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    products = optimizer.step_dual([torch.zeros(0, 3), None], [None, torch.ones(2)], project=True)
    assert [value.item() for value in products] == [0, 0, 2]
    assert (a[1] < 1).all()
