"""On a GPU: the same weights as on the CPU, kernels that are right at every size, and a step that never makes the host
wait, so that it can be captured in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import blobs, mlp
from torch import nn

from nabla_tau import Unlearner, nabla_tau_loss, preparation, unlearn
from nabla_tau.distributed import Ranks
from nabla_tau.functional import row_losses, row_signals, sample_losses, sample_signals
from nabla_tau.fused import mean_gradient
from nabla_tau.gradients import ONE, DualGradients
from nabla_tau.job import Job
from nabla_tau.kernels import reference
from nabla_tau.linear import linear_nabla_tau_loss
from nabla_tau.methods import Finetune
from nabla_tau.methods.stages import StagedSteps
from nabla_tau.optim import Ball, DualAdamW, DualSGD, Noise
from nabla_tau.prefetch import PrefetchedSource
from nabla_tau.recipes import RECIPES
from nabla_tau.sample_norms import sample_gradient_norms
from nabla_tau.sources import as_source
from nabla_tau.step_graph import WARM_UP, StepGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_those_of_the_cpu(recipe):
    torch.manual_seed(0)
    model = mlp().double()
    x, y = blobs(600)
    x = x.double()
    parts = {"forget": (x[:60], y[:60]), "retain": (x[60:400], y[60:400]), "held_out": (x[400:], y[400:])}
    on_cpu = unlearn(model, **parts, recipe=recipe).model
    moved = {name: tuple(tensor.cuda() for tensor in part) for name, part in parts.items()}
    for data in (moved, parts):
        on_gpu = unlearn(copy.deepcopy(model).cuda(), **data, recipe=recipe).model
        for a, b in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signals_are_those_of_the_cpu(dtype):
    logits, targets = (4 * torch.randn(37, 1003)).to(dtype), torch.randint(1003, (37,))
    here, there = sample_signals(logits, targets), sample_signals(logits.cuda(), targets.cuda())
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)


DEFAULT = {"balance": 0.25, "gate": "quantile", "power": 1, "hold": True}


@pytest.mark.parametrize("performance", ["auto", "off"])
@pytest.mark.parametrize("settings", [{}, DEFAULT], ids=["paper", "default"])
def test_a_step_never_makes_the_host_wait(settings, performance):
    torch.manual_seed(0)
    model = mlp().cuda()
    forget, retain = (tuple(tensor.cuda() for tensor in blobs(size, seed=size)) for size in (16, 32))
    unlearner = Unlearner(model, alpha=0.5, tau=torch.rand(100), performance=performance, **settings)
    waits_once = 1 if performance == "off" else WARM_UP + 1  # the first step looks at the model, the last is captured
    for _ in range(waits_once):
        unlearner.step(forget, retain)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = unlearner.step(forget, retain)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.retain_loss.isfinite()
    assert unlearner.step_graph == ('eager: performance="off"' if performance == "off" else "captured")


def cnn():
    norm = nn.BatchNorm2d(8)
    layers = nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 16, 4))


def images(count, seed=0):
    x, y = blobs(count, features=3 * 8 * 8, seed=seed)
    return x.view(count, 3, 8, 8), y


class Waits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers(x) * (1.0 if x.sum().item() != 0 else 2.0)


class WaitsUnseen(Waits):
    """Waits where no warning tells of it, so that the capture itself fails."""

    def forward(self, x):
        torch.cuda.synchronize()
        return self.layers(x)


def steps(model, make, sizes, settings, *, captured):
    """Metrics and weights of some steps in which all changes that a recipe changes."""
    unlearner = Unlearner(copy.deepcopy(model).cuda(), alpha=0.5, tau=torch.linspace(0.5, 4, 50), **settings)
    if not captured:
        unlearner._graphs._refused = "a test compares with it"
    found = []
    for step, size in enumerate(sizes):
        if step % 7 == 0:
            unlearner.set_tau(torch.linspace(0.2, 3 + 0.1 * step, 40 + step))
        unlearner.set_alpha(0.5 - 0.01 * step)
        unlearner.set_learning_rate(0.02 / (1 + step))
        batches = (tuple(t.cuda() for t in make(count, seed=2 * step + i)) for i, count in enumerate(size))
        found += unlearner.step(*batches)
    return [t.cpu() for t in (*found, *unlearner.model.state_dict().values())], unlearner


@pytest.fixture
def exact_sums():
    """The same kernels on the same numbers give the same sums only where none of them adds in the order of arrival."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("make", [blobs, images])
@pytest.mark.parametrize("settings", [{}, DEFAULT, {"gate": "sample"}], ids=["paper", "default", "sample"])
def test_captured_steps_are_those_that_were_not(settings, make, exact_sums):
    torch.manual_seed(0)
    model = (mlp() if make is blobs else cnn()).eval()
    sizes = [(8, 16), (8, 16), (5, 16), (8, 9)] * 10
    wanted, _ = steps(model, make, sizes, settings, captured=False)
    found, unlearner = steps(model, make, sizes, settings, captured=True)
    assert unlearner.step_graph == "captured"
    assert len(unlearner._graphs._recorded) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model", [Waits, WaitsUnseen])
def test_a_model_that_waits_runs_as_it_is(model, exact_sums):
    torch.manual_seed(0)
    model, sizes = model().eval(), [(8, 16)] * 8
    wanted, _ = steps(model, blobs, sizes, DEFAULT, captured=False)
    random = torch.cuda.get_rng_state()
    found, unlearner = steps(model, blobs, sizes, DEFAULT, captured=True)
    assert unlearner.step_graph.startswith("eager: ")
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(8, device="cuda").isfinite().all()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_with_dropout_is_not_captured():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 4)).train()
    _, unlearner = steps(model, blobs, [(8, 16)] * 6, {}, captured=True)
    assert unlearner.step_graph == "eager: a step draws random numbers"


def in_parts(count=1300):
    x, y = blobs(count)
    return {"forget": (x[:60], y[:60]), "retain": (x[60:1000], y[60:1000]), "held_out": (x[1000:], y[1000:])}


class Stopped(Exception):
    pass


def cut_off(model, parts, checkpoint, **settings):
    """A run that leaves the checkpoint of its sixth step."""

    def stop(values, step):
        if step > 5:
            raise Stopped

    with pytest.raises(Stopped):
        unlearn(model, **parts, checkpoint=checkpoint, checkpoint_every=6, log=stop, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("resumed_on", ["cuda", "cpu"])
def test_a_captured_run_is_resumed_here_and_on_the_cpu(resumed_on, tmp_path, exact_sums):
    torch.manual_seed(0)
    model, parts = mlp(), in_parts()
    whole = unlearn(copy.deepcopy(model).cuda(), **parts, recipe="paper")
    assert whole.settings["step_graph"] == "captured"
    cut_off(copy.deepcopy(model).cuda(), parts, tmp_path / "run", recipe="paper")
    again = unlearn(model.to(resumed_on), **parts, recipe="paper", checkpoint=tmp_path / "run", resume=True)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        if resumed_on == "cuda":
            assert torch.equal(a, b)
        else:  # in bfloat16 there, in float32 here
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", [{}, {"method": "finetune"}, {"method": "eu-k"}], ids=str)
@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))])
def test_captured_stages_are_those_that_were_not(make, settings, monkeypatch, exact_sums):
    """Training with norms that learn, from one stage to the next."""
    torch.manual_seed(0)
    model, parts = make().cuda(), in_parts()
    captured = unlearn(model, **parts, **settings)
    assert captured.settings["step_graph"] == "captured"
    monkeypatch.setattr(StepGraphs, "__call__", lambda self, *batches: self._step(*batches))
    eager = unlearn(model, **parts, **settings)
    assert eager.settings["step_graph"].startswith("eager: ")
    for a, b in zip(captured.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_step_of_a_stage_never_makes_the_host_wait():
    model, parts = mlp().cuda(), in_parts()
    job = Job(
        model,
        preparation.prepare(
            model,
            **parts,
            forward=None,
            loss=None,
            retain_is_unseen=False,
            seed=0,
            ranks=Ranks(),
            sharded=False,
            performance="auto",
        ),
        Ranks(),
        False,
        None,
        None,
        0,
        micro_batch_size=None,
        process_group=None,
        performance="auto",
    )
    steps = StagedSteps(Finetune(batch_size=94), job)
    for step in range(WARM_UP + 1):
        steps.step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = steps.step(WARM_UP + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.metrics["loss"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 10), (33, 1003), (5, 7, 257)], ids=str)
def test_a_mean_and_its_gradient_are_those_of_the_cpu(shape, dtype):
    logits, targets = (3 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])
    targets.view(-1)[::3] = -100
    here, there = mean_gradient(logits, targets, 0.7), mean_gradient(logits.cuda(), targets.cuda(), 0.7)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-2)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_the_cpu_is_resumed_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    model, parts = mlp(), in_parts()
    cut_off(model, parts, tmp_path / "run")
    result = unlearn(copy.deepcopy(model).cuda(), **parts, checkpoint=tmp_path / "run", resume=True)
    assert result.settings["step_graph"] == "captured"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_do_not_depend_on_where_the_data_lies(monkeypatch, exact_sums):
    torch.manual_seed(0)
    model, parts = mlp().cuda(), in_parts()
    found = {}
    for place, free in (("on the device", 2**40), ("prefetched", 0)):
        monkeypatch.setattr(preparation, "free_memory", lambda _, free=free: free)
        result = unlearn(model, **parts)
        assert set(result.settings["data"].values()) == {place}
        found[place] = list(result.model.parameters())
    assert all(map(torch.equal, *found.values()))


def test_prefetched_batches_arrive_whole():
    """Large ones, used at once on a stream that did not copy them, and their memory given out again."""
    x = torch.arange(4096.0).unsqueeze(1).expand(-1, 4096).contiguous()
    source = PrefetchedSource(as_source((x, torch.arange(4096)), "x"), torch.device("cuda", 0))
    for _ in range(3):
        for rows, labels in source.read(512, seed=1):
            assert rows.is_cuda
            difference = (rows - labels.unsqueeze(1)).abs().sum()
            del rows
            scratch = torch.full((512, 4096), -1.0, device="cuda")
            assert difference.item() == 0
            del scratch


def mixed(rows: int, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + classes)
    logits = (3 * torch.randn(rows, classes, generator=generator, device="cuda")).to(dtype).requires_grad_()
    targets = torch.randint(classes, (rows,), generator=generator, device="cuda")
    return logits, targets, torch.arange(rows, device="cuda") < rows // 2


def loss_and_gradient(logits, targets, forget, **settings):
    loss = nabla_tau_loss(logits, targets, forget, tau=20.0, alpha=0.5, **settings)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
@pytest.mark.parametrize(("rows", "classes"), [(4096, 10), (513, 257), (300, 1000), (37, 32768), (9, 128256)])
def test_the_loss_is_that_of_the_cpu_and_repeats_bit_for_bit(rows, classes, gate, dtype):
    logits, targets, forget = mixed(rows, classes, dtype)
    loss, gradient = loss_and_gradient(logits, targets, forget, gate=gate)
    here = logits.detach().cpu().double().requires_grad_()
    wanted, wanted_gradient = loss_and_gradient(here, targets.cpu(), forget.cpu(), gate=gate)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=1e-5, atol=0)
    rtol = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)
    torch.testing.assert_close(gradient.cpu().double(), wanted_gradient, rtol=rtol, atol=1e-7)
    for _ in range(5):
        again = loss_and_gradient(logits, targets, forget, gate=gate)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)


def test_more_than_two_to_the_31_logits():
    rows, classes = 70_000, 32_768
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, classes, device="cuda")
    targets = torch.arange(rows, device="cuda") % classes
    leaf, few = logits.requires_grad_(), logits[-3:].detach().clone().requires_grad_()
    losses, wanted = row_losses(leaf, targets), row_losses(few, targets[-3:])
    assert torch.equal(losses[-3:], wanted)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.equal(gradient[-3:], torch.autograd.grad(wanted.sum(), few)[0])


@pytest.mark.parametrize("classes", [10, 1000, 50257])
def test_the_loss_is_captured_in_a_cuda_graph(classes):
    logits, targets, forget = mixed(64, classes, torch.float32)
    tau = torch.tensor(20.0, device="cuda")
    alpha = torch.tensor(0.5, device="cuda")

    def step():
        loss = nabla_tau_loss(logits, targets, forget, tau=tau, alpha=alpha)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in range(3):
        with torch.no_grad():
            logits.copy_(3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
            alpha.fill_(0.1 * (seed + 1))
        graph.replay()
        for a, b in zip(found, step(), strict=True):
            assert torch.equal(a, b)


def test_compiles_to_one_graph():
    logits, targets, forget = mixed(64, 1000, torch.float32)
    compiled = torch.compile(loss_and_gradient_sum, fullgraph=True)
    wanted = torch.autograd.grad(loss_and_gradient_sum(logits, targets, forget), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, targets, forget), logits)[0], wanted)


def loss_and_gradient_sum(logits, targets, forget):
    return nabla_tau_loss(logits, targets, forget, tau=20.0, alpha=0.5) + row_losses(logits, targets).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_loss_is_that_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (5000, 1003))
    targets, forget = torch.randint(1003, (5000,), generator=generator), torch.arange(5000) < 1500

    def gradients(h, w, targets, forget):
        h, w = h.requires_grad_(), w.requires_grad_()
        loss = linear_nabla_tau_loss(h, w, targets, forget, tau=60.0, alpha=0.5)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    wanted = gradients(hidden.double(), weight.double(), targets, forget)
    found = gradients(*(tensor.cuda() for tensor in (hidden, weight, targets, forget)))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for a, b in zip(found, wanted, strict=True):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()


def test_the_loss_never_makes_the_host_wait():
    logits, targets, forget = mixed(64, 1000, torch.float32)
    hidden, weight = torch.randn(64, 32, device="cuda", requires_grad=True), torch.randn(1000, 32, device="cuda")
    loss_and_gradient(logits, targets, forget)  # kernels are compiled here
    linear_nabla_tau_loss(hidden, weight, targets, forget, tau=20.0, alpha=0.5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = loss_and_gradient(logits, targets, forget)
        row_signals(logits.detach(), targets)
        linear_nabla_tau_loss(hidden, weight, targets, forget, tau=20.0, alpha=0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def parameters_and_gradients(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1,), (17, 3), (2048,), (5000,), (64, 32, 3, 3)]
    return [[torch.randn(size, generator=generator).to(dtype).cuda() for size in sizes] for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [DualAdamW, DualSGD])
def test_an_optimizer_step_is_that_of_the_cpu(kind, dtype):
    found = []
    for device in ("cuda", "cpu"):
        start, forget, retain = ([t.to(device) for t in part] for part in parameters_and_gradients(dtype))
        parameters = [p.clone() for p in start]
        optimizer = kind(parameters, 0.01, **({"momentum": 0.9} if kind is DualSGD else {}))
        for step in range(3):
            options = {"mask": [p > -1 for p in start], "noise": Noise(0.1, 7, step), "ball": Ball(start, 0.05)}
            products = optimizer.step_dual(forget, retain, -0.5, 1.0, project=True, **options)
        found.append([*parameters, torch.stack(products)])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [DualAdamW, DualSGD])
def test_an_optimizer_step_is_captured_and_never_makes_the_host_wait(kind):
    start, forget, retain = parameters_and_gradients(torch.float32)
    options = {"momentum": 0.9} if kind is DualSGD else {}
    captured, plain = [p.clone() for p in start], [p.clone() for p in start]
    scale, count = torch.tensor(0.5, device="cuda"), torch.tensor(0, device="cuda")

    def step(optimizer):
        noise = Noise(scale, 3, count)
        return optimizer.step_dual(forget, retain, scale, 1.0, project=True, noise=noise, ball=Ball(start, 5.0))

    one, other = kind(captured, 0.01, **options), kind(plain, 0.01, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(one)
    torch.cuda.current_stream().wait_stream(side)
    step(other)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(one)
        for turn in range(3):
            scale.fill_(0.1 * (turn + 1))
            count.fill_(turn + 1)
            graph.replay()
            step(other)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, captured, plain))
    step(one)  # by itself again, after replays that wrote a table of their own
    step(other)
    assert all(map(torch.equal, captured, plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "p", "q"), [(1, 64, 8), (17, 33, 70), (300, 256, 128), (1024, 72, 1000)])
def test_gram_norms_are_those_of_the_gradient(count, p, q, dtype):
    from nabla_tau.kernels.gram import gram_norms

    generator = torch.Generator().manual_seed(count)
    a, g = (torch.randn(5, count, width, generator=generator).to(dtype) for width in (p, q))
    wanted = reference.gram_norms(a.double(), g.double())
    found = gram_norms(a.cuda(), g.cuda())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=0)
    assert torch.equal(gram_norms(a.cuda(), g.cuda()), found)


def test_norms_and_dual_gradients_are_those_of_the_cpu_and_never_make_the_host_wait():
    torch.manual_seed(0)
    model, (x, y) = mlp(width=64), blobs(40)
    weights = torch.rand(40)

    def dual(model, x, y, weights):
        parameters = list(model.parameters())
        taken = DualGradients(model, parameters)
        for batch in range(2):  # the first is compared, and waits
            if batch and x.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                with taken.watch():
                    losses = sample_losses(model(x), y)
                found = taken.backward(losses, weights, 15)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert taken.how == ONE
        return found

    norms, here = sample_gradient_norms(model, (x, y)), dual(model, x, y, weights)
    model = model.cuda()
    there = dual(model, x.cuda(), y.cuda(), weights.cuda())
    torch.testing.assert_close(sample_gradient_norms(model, (x, y)).cpu(), norms, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(there, here, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
