"""A step that is recorded and replayed is the step itself, bit for bit; and where it cannot be recorded it runs as it
is and says so. On the CPU, with a stand-in for CUDA graphs (`recording.py`); with real ones in test_gpu.py."""

import contextlib
import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import blobs, mlp
from recording import Recorder
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from nabla_tau import Unlearner, _library, functional, unlearn
from nabla_tau import unlearner as module
from nabla_tau.accumulation import Accumulation
from nabla_tau.cuda_graph import CudaRecorder
from nabla_tau.methods import setup, stages
from nabla_tau.recipes import RECIPES
from nabla_tau.step_graph import GRAPHS, WARM_UP, StepGraphs, _first_line, refusal

DEFAULT = {"gate": "quantile", "power": 1, "balance": 0.25, "hold": True}
PAPER = {"gate": "batch", "power": 2}


class NeverSkips(Accumulation):
    """As on a GPU, where a look at a number is not free."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._may_skip = False


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Nothing reads a value, and the kernels are those that the dispatcher sees."""
    monkeypatch.setattr(_library, "row_provider", lambda _: "reference")
    monkeypatch.setattr(functional, "check_labels", lambda *_: None)
    monkeypatch.setattr(functional, "check_multilabel", lambda *_: None)
    monkeypatch.setattr(module, "Accumulation", NeverSkips)
    monkeypatch.setattr(Unlearner, "_note_gate", lambda *_: None)
    monkeypatch.setattr(Recorder, "recorded", 0)


def cnn():
    layers = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 4))


def images(count, seed=0):
    x, y = blobs(count, features=2 * 6 * 6, seed=seed)
    return x.view(count, 2, 6, 6), y


def capturable(model, rate=0.01):
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate), fused=True, capturable=True)


def steps_of(model, recorder=Recorder, performance="auto", **settings):
    """An Unlearner as on a GPU: nothing is looked at, and (recorder not None) steps are recorded."""
    settings = {"alpha": 0.5, "tau": torch.linspace(0.5, 4, 50), "optimizer": capturable(model), **settings}
    found = Unlearner(model, performance=performance, **settings)
    found._graphs._make_recorder = recorder
    found._graphs._refused = None if recorder else "as it is"
    return found


def batches(make, sizes, dtype=torch.float64):
    for number, (forget, retain) in enumerate(sizes):
        (a, b), (c, d) = make(forget, seed=2 * number), make(retain, seed=2 * number + 1)
        yield (a.to(dtype), b), (c.to(dtype), d)


def metrics_and_weights(unlearner, sizes, make):
    """A run in which all changes that a recipe changes: alpha, learning rate, tau, the last batches of passes."""
    kept = []
    for step, (forget, retain) in enumerate(batches(make, sizes)):
        if step % 7 == 0:
            unlearner.set_tau(torch.linspace(0.2, 3 + 0.1 * step, 40 + step))
        unlearner.set_alpha(0.5 - 0.01 * step)
        unlearner.set_learning_rate(0.02 / (1 + step))
        kept += unlearner.step(forget, retain)
        kept += [None if p.grad is None else p.grad.clone() for p in unlearner.model.parameters()]
    return [*kept, *unlearner.model.state_dict().values(), unlearner._rank]


def same(found, wanted):
    """Bit for bit; None where the other is None."""

    def equal(a, b):
        return a is b or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))

    return all(map(equal, found, wanted)) and len(found) == len(wanted)


RAGGED = [(8, 16), (8, 16), (5, 16), (8, 9)] * 10 + [(5, 9)] * 2


@pytest.mark.parametrize("make", [blobs, images])
@pytest.mark.parametrize("settings", [DEFAULT, PAPER, {"gate": "sample"}, {**PAPER, "balance": 1.0}], ids=str)
def test_weights_metrics_and_gradients_are_those_of_a_step_that_was_not_recorded(settings, make):
    torch.manual_seed(0)
    model = (mlp() if make is blobs else cnn()).double().eval()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder, **settings) for recorder in (None, Recorder))
    wanted, found = (metrics_and_weights(unlearner, RAGGED, make) for unlearner in (eager, recorded))
    assert recorded.step_graph == "captured"
    assert Recorder.recorded == 3, "one for each pair of shapes but that which came twice"
    assert same(found, wanted)


def test_a_number_that_python_holds_is_built_in():
    """What the stand-in is for: a loss of which Python changes a number."""
    model = mlp().double()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder) for recorder in (None, Recorder))
    for number, (forget, retain) in enumerate(batches(blobs, [(8, 16)] * (WARM_UP + 3))):
        for unlearner in (eager, recorded):
            unlearner._loss = lambda logits, y, by=number: functional.sample_losses(logits, y) + by * logits[:, 0]
            unlearner.step(forget, retain)
    differ = [a - b for a, b in zip(eager.parameters, recorded.parameters, strict=True)]
    assert any(d.any() for d in differ)


def test_norms_that_learn_are_recorded_too():
    torch.manual_seed(0)
    model = cnn().double().train()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder, **PAPER) for recorder in (None, Recorder))
    wanted, found = (metrics_and_weights(unlearner, [(8, 16)] * 8, images) for unlearner in (eager, recorded))
    assert recorded.step_graph == "captured"
    assert same(found, wanted)


def test_the_caller_s_batches_stay_as_they_are():
    unlearner = steps_of(mlp().double())
    given = list(batches(blobs, [(8, 16)] * (WARM_UP + 3)))
    before = copy.deepcopy(given)
    for batch in given:
        unlearner.step(*batch)
    assert unlearner.step_graph == "captured"
    for (f, r), (g, q) in zip(given, before, strict=True):
        assert same([*f, *r], [*g, *q])


class Waits(nn.Module):
    def __init__(self, rows=None):
        super().__init__()
        self.layers, self.rows = mlp(), rows

    def forward(self, x):
        waits = self.rows in (None, len(x)) and x.sum().item() == 0
        return self.layers(x) * (2.0 if waits else 1.0)


def test_a_shape_that_cannot_be_captured_ends_it_for_all():
    model = Waits(rows=8 + 9).double().eval()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder, **PAPER) for recorder in (None, Recorder))
    sizes = [(8, 16)] * 6 + [(8, 9)] * 6
    wanted, found = (metrics_and_weights(unlearner, sizes, blobs) for unlearner in (eager, recorded))
    assert same(found, wanted)
    assert Recorder.recorded == 1
    assert recorded.step_graph.startswith("eager: it could not be captured")


def test_a_model_that_waits_runs_as_it_is_and_says_so_once(caplog):
    torch.manual_seed(0)
    model = Waits().double().eval()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder, **DEFAULT) for recorder in (None, Recorder))
    wanted, found = (metrics_and_weights(unlearner, [(8, 16)] * 8, blobs) for unlearner in (eager, recorded))
    assert same(found, wanted), "as if nothing had been tried"
    assert recorded.step_graph.startswith("eager: it could not be captured (RuntimeError: operation not permitted")
    assert len(caplog.records) == 1
    assert Recorder.recorded == 0


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random], ids=["torch", "random"])
def test_a_step_that_draws_random_numbers_runs_as_it_is(draw):
    model = mlp().double()

    def forward(model, batch):
        return model(batch[0]) * (1 + float(draw())), batch[1]

    unlearner = steps_of(model, forward=forward)
    metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
    assert unlearner.step_graph == "eager: a step draws random numbers"


def test_modules_that_somebody_watches_are_called():
    model, seen = mlp().double(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    unlearner = steps_of(model, balance=1.0)
    metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
    assert unlearner.step_graph == "eager: Linear has hooks, which a graph does not call"
    assert len(seen) == 12


def hook(unlearner, seen):
    unlearner.model[0].register_forward_hook(lambda *_: seen.append(1))


def hook_tensor(unlearner, seen):
    unlearner.parameters[0].register_post_accumulate_grad_hook(lambda *_: seen.append(1))


def hook_optimizer(unlearner, seen):
    unlearner.optimizer.register_step_post_hook(lambda *_: seen.append(1))


def move_weights(unlearner, _):
    for parameter in unlearner.parameters:
        parameter.data = parameter.data.clone()


def load_optimizer(unlearner, _):
    unlearner.optimizer.load_state_dict(copy.deepcopy(unlearner.optimizer.state_dict()))


def load_all(unlearner, _):
    unlearner.load_state_dict(copy.deepcopy(unlearner.state_dict()))


def freeze(unlearner, _):
    unlearner.parameters[0].requires_grad_(False)


def decay(unlearner, _):
    unlearner.optimizer.param_groups[0]["weight_decay"] = 0.5


def balance(unlearner, _):
    unlearner.balance = 0.05


def take_gradients(unlearner, _):
    unlearner.optimizer.zero_grad(set_to_none=True)


HOOKS = [hook, hook_tensor, hook_optimizer]
CHANGES = [*HOOKS, move_weights, load_optimizer, load_all, freeze, decay, balance, take_gradients]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_has_built_in_may_change(change):
    torch.manual_seed(0)
    model = mlp().double().eval()
    eager, recorded = (steps_of(copy.deepcopy(model), recorder, **DEFAULT) for recorder in (None, Recorder))
    found = []
    for unlearner in (eager, recorded):
        kept, seen = metrics_and_weights(unlearner, [(8, 16)] * 6, blobs), []
        change(unlearner, seen)
        kept += metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
        found.append((kept, len(seen)))
    assert found[0][1] == found[1][1], "a hook is called in every step"
    assert same(found[0][0], found[1][0])
    assert Recorder.recorded == (1 if change in (*HOOKS, take_gradients) else 2)


@pytest.mark.parametrize(
    ("register", "of"),
    [
        (register_module_forward_hook, "there are hooks of all modules"),
        (register_optimizer_step_post_hook, "AdamW has hooks"),
    ],
)
def test_hooks_of_everything_are_called_in_every_step(register, of):
    unlearner, seen = steps_of(mlp().double()), []
    for hooked, said in (
        (True, f"eager: {of}, which a graph does not call"),
        (False, "captured"),
        (True, "captured"),  # once it was
    ):
        before, handle = len(seen), register(lambda *_: seen.append(1)) if hooked else None
        metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
        if handle is not None:
            handle.remove()
            assert len(seen) >= before + 6
        assert unlearner.step_graph == said


def test_a_metric_is_not_written_over_by_the_next_step():
    unlearner = steps_of(mlp().double())
    steps = list(batches(blobs, [(8, 16)] * (WARM_UP + 4)))
    found = [unlearner.step(*batch).loss for batch in steps]
    assert len({float(loss) for loss in found}) == len(found)


def test_no_more_than_a_few_graphs():
    unlearner = steps_of(mlp().double())
    sizes = [(8, 16 + i % 7) for i in range(7 * (WARM_UP + 2))]
    metrics_and_weights(unlearner, sizes, blobs)
    assert Recorder.recorded == GRAPHS


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD cannot be captured"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, capturable=True), "AdamW cannot be captured"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True), "AdamW cannot be captured"),
    ],
)
def test_an_optimizer_that_cannot_be_captured_is_run_as_it_is(optimizer, said):
    model = mlp().double()
    unlearner = steps_of(model, optimizer=optimizer(model.parameters()))
    metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
    assert unlearner.step_graph.startswith(f"eager: {said}")


def test_batches_of_other_things_than_tensors_are_not_recorded():
    unlearner = steps_of(mlp().double(), forward=lambda model, batch: (model(batch[0]), batch[2]))
    for (x, y), (u, v) in batches(blobs, [(3, 4)] * 6):
        unlearner.step((x, ["a", "b", "c"], y), (u, ["d", "e", "f", "g"], v))
    assert unlearner.step_graph == f"eager: no batches of the same shapes came {WARM_UP + 1} times"


def test_where_it_is_not_tried():
    model = mlp()
    plain = {"performance": "auto", "ranks": Unlearner(model, alpha=0.5).ranks, "micro_batch_size": None}
    here, there = list(model.parameters()), torch.device("cuda", 0)
    assert refusal(here, torch.device("cpu"), **plain) == "the model is on cpu"
    assert refusal(here, there, **(plain | {"performance": "off"})) == 'performance="off"'
    assert refusal(here, there, **plain) == "the model is on several devices"
    assert refusal([], there, **(plain | {"micro_batch_size": 4})) == "micro-batches"
    assert refusal([], there, **plain) is None


@pytest.fixture
def recorded_runs(monkeypatch):
    """`unlearn` as on a GPU, all steps recorded."""
    for own in (module, setup):
        monkeypatch.setattr(own, "refusal", lambda *_, **__: None)
    for own in (module, stages):
        monkeypatch.setattr(own, "CudaRecorder", lambda _: Recorder())
    monkeypatch.setattr(stages, "serves_mean", lambda logits, targets: not targets.is_floating_point())


# The default is a stage after another, "eu-k" moves some of the parameters.
RUNS = [*({"recipe": name} for name in RECIPES), {}, {"method": "finetune"}, {"method": "eu-k"}]


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_a_run_and_its_resumption_are_recorded_and_give_the_same_weights(
    settings, recorded_runs, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    model = mlp().eval()
    x, y = blobs(1300)
    parts = {"forget": (x[:60], y[:60]), "retain": (x[60:1000], y[60:1000]), "held_out": (x[1000:], y[1000:])}
    with monkeypatch.context() as context:
        context.setattr(StepGraphs, "__call__", lambda self, *batch: self._step(*batch))
        eager = unlearn(model, **parts, **settings)
    assert Recorder.recorded == 0
    whole = unlearn(model, **parts, **settings)
    assert Recorder.recorded > 0, whole.settings["step_graph"]
    assert whole.settings["step_graph"] == "captured"
    assert eager.settings["step_graph"].startswith("eager: ")
    for a, b in zip(eager.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)

    class Stopped(Exception):
        pass

    def stop(values, step):
        if step > 5:
            raise Stopped

    file = tmp_path / "run"
    with pytest.raises(Stopped):
        unlearn(model, **parts, **settings, checkpoint=file, checkpoint_every=6, log=stop)
    resumed = unlearn(model, **parts, **settings, checkpoint=file, resume=True)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_method_of_which_every_step_is_another_says_so(recorded_runs):
    x, y = blobs(1300)
    parts = {"forget": (x[:60], y[:60]), "retain": (x[60:1000], y[60:1000]), "held_out": (x[1000:], y[1000:])}
    result = unlearn(mlp().eval(), **parts, method="l1-sparse")
    assert result.settings["step_graph"] == "eager: the steps of l1-sparse are not all alike"
    assert Recorder.recorded == 0


@dataclasses.dataclass(frozen=True)
class Stages:
    """Stages of ten steps on one optimizer."""

    kinds: tuple
    name: str = "in stages"

    def stages(self, setup):
        def down(step, forget, retain):
            return [stages.Term("retain_term", retain.batch)]

        def up(step, forget, retain):
            return [stages.Term("forget_term", retain.batch, weight=-0.1)]

        def drawn(step, forget, retain):
            return [
                stages.Term("forget_term", given.batch) for given in (forget, retain) if given is not stages.NOTHING
            ]

        kinds = {
            "down": {"terms": down, "retain": 32, "repeats": True},
            "up": {"terms": up, "retain": 32, "repeats": True},
            "each by itself": {"terms": up, "retain": 32},
            "forget": {"terms": drawn, "forget": 32, "repeats": True},
            "retain": {"terms": drawn, "retain": 32, "repeats": True},
        }
        found = [stages.Stage(10, **kinds[kind]) for kind in self.kinds]
        found[0].optimizer = lambda moved: setup.adamw([(moved, 1e-3)])
        return found


@pytest.mark.parametrize(
    ("kinds", "recorded"),
    [
        (("down", "down"), 1),
        (("down", "up"), 2),
        (("down", "each by itself", "down"), 2),
        (("forget", "retain"), 2),
    ],
)
def test_a_stage_is_recorded_anew_where_it_is_another(kinds, recorded, recorded_runs, monkeypatch):
    """On the optimizer of the stage before: a graph has the terms of its stage built in, and of what sets they are."""
    x, y = blobs(1300)
    parts = {"forget": (x[:64], y[:64]), "retain": (x[64:1024], y[64:1024]), "held_out": (x[1024:], y[1024:])}
    torch.manual_seed(0)
    model = mlp().eval()
    found = unlearn(model, **parts, method=Stages(kinds))
    assert Recorder.recorded == recorded
    assert found.settings["step_graph"] == "captured"
    monkeypatch.setattr(StepGraphs, "__call__", lambda self, *batch: self._step(*batch))
    wanted = unlearn(model, **parts, method=Stages(kinds))
    assert same(list(found.model.state_dict().values()), list(wanted.model.state_dict().values()))
    for name in ("loss", "forget_term", "retain_term"):
        np.testing.assert_array_equal(found.history[name], wanted.history[name])


def test_optimizer_state_goes_from_one_device_to_the_other():
    """What says where it is computed does not come along: a GPU's is capturable and holds its learning rate there."""
    torch.manual_seed(0)
    model = mlp()
    here, there = Unlearner(copy.deepcopy(model), alpha=0.5, tau=2.0), steps_of(copy.deepcopy(model), tau=2.0)
    (forget, retain), *_ = batches(blobs, [(8, 16)], torch.float32)
    rate = there.optimizer.param_groups[0]["lr"]
    for source, target in ((there, here), (here, there), (there, here)):
        source.set_learning_rate(0.25)
        source.step(forget, retain)
        target.model.load_state_dict(source.model.state_dict())
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        for unlearner in (source, target):
            unlearner.step(forget, retain)
        for a, b in zip(source.parameters, target.parameters, strict=True):
            torch.testing.assert_close(a, b)
        assert target.learning_rate == 0.25
    assert here.optimizer.param_groups[0]["capturable"] is False
    assert isinstance(here.optimizer.param_groups[0]["lr"], float)
    assert there.optimizer.param_groups[0]["capturable"] is True
    assert there.optimizer.param_groups[0]["lr"] is rate


class SeesWaits(Recorder):
    def warm_up(self, run, *, last):
        return run(), last


def test_a_wait_that_a_warm_up_shows_is_not_tried_to_be_captured():
    unlearner = steps_of(mlp().double(), SeesWaits)
    metrics_and_weights(unlearner, [(8, 16)] * 6, blobs)
    assert unlearner.step_graph == "eager: the host waits for the device in a step"


def test_a_checkpoint_of_parts_holds_the_learning_rate_as_a_number(tmp_path):
    """A folder, as a sharded model writes it, goes on on one GPU, where the rate is a tensor."""
    from nabla_tau.distributed import Ranks
    from nabla_tau.run_files import load_parts, load_run, save_run

    (forget, retain), *_ = batches(blobs, [(8, 16)], torch.float32)
    there, here = steps_of(mlp(), tau=2.0), Unlearner(mlp(), alpha=0.5, tau=2.0)
    for source, target in ((here, there), (there, here)):
        source.set_learning_rate(0.125)
        source.step(forget, retain)
        folder = tmp_path / str(id(source))
        folder.mkdir()
        state = {"steps": source.state_dict(), "step": 1}
        save_run(folder, state, source.model, source.optimizer, Ranks())
        state = load_run(folder, torch.device("cpu"), Ranks())
        load_parts(folder, state, target.model, target.optimizer, Ranks())
        target.load_state_dict(state["steps"] | {"optimizer": target.optimizer.state_dict()})
        for unlearner in (source, target):
            unlearner.step(forget, retain)
        for a, b in zip(source.parameters, target.parameters, strict=True):
            torch.testing.assert_close(a, b)
        assert target.learning_rate == 0.125
    assert isinstance(there.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert isinstance(here.optimizer.param_groups[0]["lr"], float)


def test_what_pytorch_leaves_behind_after_a_failed_capture_is_put_right(monkeypatch):
    """torch.cuda.graph does not leave its stream where the capture ends in an error, nor does the generator recover."""
    now, asked = {"stream": "the caller's"}, []

    class Stream:
        device_index = 0

        def __init__(self, device):
            pass

        def wait_stream(self, other):
            asked.append("wait")

    class Capturing:
        def __init__(self, graph, *, pool, stream, capture_error_mode):
            self.stream = stream
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            now["stream"] = self.stream

        def __exit__(self, *_):
            raise RuntimeError("the capture ended early")

    class Generator:
        def get_state(self):
            return torch.get_rng_state()

        def graphsafe_set_state(self, fresh):
            asked.append(torch.equal(fresh.get_state(), torch.get_rng_state()))

    here = Stream(None)
    now["stream"] = here
    fakes = {
        "Stream": Stream,
        "CUDAGraph": object,
        "graph": Capturing,
        "graph_pool_handle": object,
        "default_generators": [Generator()],
        "current_stream": lambda _: now["stream"],
        "set_stream": lambda stream: now.update(stream=stream),
        "device": lambda _: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def run():
        raise ValueError("what it was\nand more")

    with pytest.raises(RuntimeError, match="ended early") as caught:
        CudaRecorder(torch.device("cpu")).record(run)
    assert now["stream"] is here
    assert asked == [True]
    assert _first_line(caught.value) == "ValueError: what it was"
