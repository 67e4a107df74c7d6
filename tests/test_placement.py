"""Where data lies changes nothing but the time it takes: the batches are the same, and so is where a run stands."""

import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blobs, mlp

from nabla_tau import prefetch, unlearn
from nabla_tau.batch import tensors_of
from nabla_tau.fingerprint import of_source
from nabla_tau.placement import fits, placed, size_of
from nabla_tau.prefetch import AHEAD, PrefetchedSource, ahead, can_be_prefetched
from nabla_tau.sources import Stream, as_source, count_shared, split_held_out

N = 50
CPU, META = torch.device("cpu"), torch.device("meta")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "nabla_tau prefetch"]


def nobody_is_left(within=5.0):
    until = time.monotonic() + within
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not threads()


def mapped(path, array):
    array = np.asarray(array)
    file = np.memmap(path, dtype=array.dtype, mode="w+", shape=array.shape)
    file[...] = array
    file.flush()
    return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


def prefetched(data):
    source = as_source(data, "data")
    return source, PrefetchedSource(source, CPU)


COLUMNS = {
    "float32": torch.randn(N, 3, 4, 4),
    "channels_last": torch.randn(N, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "every other row": torch.randn(2 * N, 5)[::2],
    "uint8": torch.randint(255, (N, 7), dtype=torch.uint8),
    "bfloat16": torch.randn(N, 5).bfloat16(),
    "bool": torch.rand(N, 2) > 0.5,
    "no width": torch.randn(N, 0),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_prefetched_batches_are_those_that_would_be_read(name):
    source, ahead_of_it = prefetched({"x": COLUMNS[name], "labels": torch.arange(N), "mask": None})
    assert can_be_prefetched(source)
    reads = (
        lambda s: s.read(8, seed=3),
        lambda s: s.read(8),
        lambda s: s.read(7, seed=3, skip=2),
        lambda s: s.sample(20, 8, seed=1),
    )
    for read in reads:
        found, wanted = list(read(ahead_of_it)), list(read(source))
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours["mask"] is None
            for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_a_batch_of_rows_that_do_not_lie_side_by_side_does_not_copy_all_of_them():
    x = torch.zeros(2000, 1000)[::2]
    _, ahead_of_it = prefetched((x, torch.arange(1000)))
    tracemalloc.start()
    next(ahead_of_it.read(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert nobody_is_left()
    assert peak < x.numel() * x.element_size() / 4


def test_a_stream_stands_where_its_batches_were_used_and_not_where_they_were_gathered():
    source, ahead_of_it = prefetched(blobs(N))
    stream, plain = (Stream(s, 8, seed=1, role=0) for s in (ahead_of_it, source))
    for _ in range(10):
        assert torch.equal(stream.next()[0], plain.next()[0])
        assert stream.state_dict() == plain.state_dict()
    resumed = Stream(ahead_of_it, 8, seed=1, role=0)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(10):
        assert torch.equal(resumed.next()[0], plain.next()[0])


def test_no_thread_outlives_its_batch():
    _, ahead_of_it = prefetched(blobs(N))
    stream = Stream(ahead_of_it, 8, seed=1, role=0)
    stream.next()
    assert nobody_is_left(), "though the stream still stands in the middle of a pass"
    stream.restart()
    stream.next()
    del stream
    gc.collect()
    assert nobody_is_left()


def test_an_error_comes_where_its_batch_is_asked_for(monkeypatch):
    _, ahead_of_it = prefetched(blobs(N))
    take = prefetch._take

    def broken(column, index, **options):
        if index[0] == 16:
            raise OSError("the file is gone")
        return take(column, index, **options)

    monkeypatch.setattr(prefetch, "_take", broken)
    batches = ahead_of_it.read(8)
    next(batches), next(batches)
    with pytest.raises(OSError, match="the file is gone"):
        next(batches)
    assert nobody_is_left()


def test_so_many_are_at_work_and_no_more():
    started, may_end = [], threading.Event()

    def make(number):
        started.append(number)
        may_end.wait(5)
        return number

    results = ahead(lambda n=n: make(n) for n in range(6))
    assert not started, "nobody asked yet"
    first = threading.Thread(target=lambda: next(results))
    first.start()
    until = time.monotonic() + 5
    while len(started) <= AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(started) == list(range(1 + AHEAD))
    may_end.set()
    first.join()
    assert list(results) == [1, 2, 3, 4, 5]


def test_nobody_s_random_numbers_are_moved():
    _, ahead_of_it = prefetched(blobs(N))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(ahead_of_it.read(8, seed=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


@pytest.mark.parametrize("kind", ["tuple", "mapping", "beside a tensor"])
def test_mapped_files_are_data_like_any_other(kind, tmp_path):
    x, y = blobs(N)
    files = mapped(tmp_path / "x", x), mapped(tmp_path / "y", y)
    files = files if kind != "beside a tensor" else (files[0], torch.tensor(files[1]))
    give = {
        "tuple": lambda x, y: (x, y),
        "mapping": lambda x, y: {"x": x, "labels": y},
        "beside a tensor": lambda x, y: (x, torch.as_tensor(y)),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = as_source(give(*files), "retain")
    plain = as_source(give(x, y), "retain")
    assert source.mapped
    assert not plain.mapped
    assert torch.equal(source.targets(), y)
    assert of_source(source, None) == of_source(plain, None)
    assert count_shared(give(files[0][:9], files[1][:9]), give(x, y)) == 9
    (found,) = placed({"retain": source}, CPU, 0).values()
    assert isinstance(found, PrefetchedSource)
    for ours, theirs in zip(found.read(8, seed=2), plain.read(8, seed=2), strict=True):
        assert all(map(torch.equal, tensors_of(ours), tensors_of(theirs)))


def test_arrays_in_memory_are_taken_and_not_prefetched_on_the_cpu():
    x, y = blobs(N)
    source = as_source((x.numpy(), y.numpy()), "retain")
    assert torch.equal(next(source.read(N))[0], x)
    assert placed({"retain": source}, CPU, 0) == {"retain": source}


def test_a_held_out_share_of_a_mapped_file_is_not_copied(tmp_path):
    x, y = blobs(N)
    given = as_source((mapped(tmp_path / "x", x), mapped(tmp_path / "y", y)), "retain")
    parts, plain = (split_held_out(source, 0.2, seed=3) for source in (given, as_source((x, y), "retain")))
    for part, wanted in zip(parts, plain, strict=True):
        assert part.count == wanted.count
        assert tensors_of(part.tensors)[0].data_ptr() == tensors_of(given.tensors)[0].data_ptr()
        assert torch.equal(part.targets(), wanted.targets())
        (found,) = placed({"x": part}, CPU, 0).values()
        assert isinstance(found, PrefetchedSource)
        for ours, theirs in zip(found.read(8, seed=2), wanted.read(8, seed=2), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert len({of_source(part, None) for part in (given, *parts)}) == 3


def test_a_run_on_a_mapped_file_does_not_hold_it(tmp_path):
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    script = Path(__file__).with_name("mapped_file.py")
    # Away from the sources: what is measured is what was installed.
    command = [sys.executable, str(script), str(tmp_path / "x")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found["data"].values()) == {"prefetched"}
    assert found["grown"] < 0.3 * found["file"]
    assert found["threads"] == []


def test_what_fits_goes_to_the_device_in_turn_and_the_rest_is_prefetched():
    assert fits(25, 100)
    assert not fits(26, 100)
    sources = {name: as_source(blobs(n), name) for name, n in (("forget", 10), ("retain", 80), ("held_out", 20))}
    sizes = {name: size_of(source) for name, source in sources.items()}
    assert sizes["forget"] == 10 * (8 * 4 + 8)
    small = 4 * (sizes["forget"] + sizes["held_out"])
    for free, wanted in (
        (4 * sum(sizes.values()), ["device", "device", "device"]),
        (small, ["device", "prefetched", "device"]),
        (small - 1, ["device", "prefetched", "prefetched"]),
        (0, ["prefetched", "prefetched", "prefetched"]),
    ):
        found = placed(sources, META, free)
        kinds = ["prefetched" if isinstance(source, PrefetchedSource) else "device" for source in found.values()]
        assert kinds == wanted
        for name, source in found.items():
            on = META if not isinstance(source, PrefetchedSource) else CPU
            assert {tensor.device for tensor in tensors_of(source.tensors)} == {on}
            assert source.count == sources[name].count


def test_texts_datasets_and_loaders_stay_where_they_are():
    x, y = blobs(N)
    dataset = torch.utils.data.TensorDataset(x, y)
    sources = {
        "texts": as_source({"x": x, "text": ["a"] * N, "labels": y}, "texts"),
        "dataset": as_source(torch.utils.data.Subset(dataset, range(N)), "dataset"),
        "loader": as_source(torch.utils.data.DataLoader(dataset), "loader"),
    }
    assert placed(sources, META, 10**12) == sources


def test_a_result_says_where_the_data_was_and_a_mapped_file_gives_the_same_weights(tmp_path):
    torch.manual_seed(0)
    model, (x, y) = mlp(), blobs(400)
    cuts = {"forget": slice(0, 40), "retain": slice(40, 300), "held_out": slice(300, 400)}
    files = mapped(tmp_path / "x", x), mapped(tmp_path / "y", y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = unlearn(model, **{name: (x[cut], y[cut]) for name, cut in cuts.items()})
        found = unlearn(model, **{name: (files[0][cut], files[1][cut]) for name, cut in cuts.items()})
        off = unlearn(model, **{n: (files[0][c], files[1][c]) for n, c in cuts.items()}, performance="off")
    assert set(plain.settings["data"].values()) == set(off.settings["data"].values()) == {"in memory"}
    assert set(found.settings["data"].values()) == {"prefetched"}
    assert all(map(torch.equal, found.model.parameters(), plain.model.parameters()))
    assert nobody_is_left()
