"""Every way to give data: how many samples, which labels, in which order, and nothing of the caller's moved."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nabla_tau.batch import tensors_of
from nabla_tau.sources import Stream, TensorSource, as_source, count_shared, split_held_out

N = 50
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 7
FULL = TensorDataset(X, Y)


class Pairs(Dataset):
    """Counts how many samples are loaded."""

    def __init__(self, x=X, y=Y):
        self.x, self.labels_of_items, self.loaded = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.loaded += 1
        return self.x[index], self.labels_of_items[index]


class Targets(Pairs):
    def __init__(self, y=Y, **attributes):
        super().__init__(y=y)
        self.targets = Y
        self.__dict__.update(attributes)


class Noisy(Pairs):
    """Draws from every random state that transforms use."""

    def __getitem__(self, index):
        noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[index] + noise, self.labels_of_items[index]


class NoisyTargets(Noisy):
    targets = Y


class Batches(Pairs):
    """A data set of batches."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return X[index * 4 : index * 4 + 4], Y[index * 4 : index * 4 + 4]


def generator():
    return torch.Generator().manual_seed(1)


LOADERS = {
    "plain": lambda: DataLoader(FULL, 8),
    "shuffled": lambda: DataLoader(FULL, 8, shuffle=True),
    "drop_last": lambda: DataLoader(FULL, 8, drop_last=True),
    "shuffled drop_last": lambda: DataLoader(FULL, 8, shuffle=True, drop_last=True),
    "subset": lambda: DataLoader(FULL, 8, sampler=SubsetRandomSampler(range(5, 25))),
    "fewer": lambda: DataLoader(FULL, 8, sampler=RandomSampler(FULL, num_samples=13)),
    "more": lambda: DataLoader(FULL, 8, sampler=RandomSampler(FULL, num_samples=70)),
    "weighted": lambda: DataLoader(FULL, 8, sampler=WeightedRandomSampler((Y == 2).double(), 19)),
    "batch sampler": lambda: DataLoader(FULL, batch_sampler=[[0, 1], [7, 8, 9], [3]]),
    "random batch sampler": lambda: DataLoader(FULL, batch_sampler=BatchSampler(RandomSampler(FULL), 8, True)),
    "batches": lambda: DataLoader(Batches(), batch_size=None),
}


def labels_of(batches):
    return torch.cat([batch[1] for batch in batches])


def same(one, other):
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", LOADERS)
def test_count_and_targets_of_a_loader_are_those_of_a_pass(name):
    source = as_source(LOADERS[name](), "forget")
    batches = list(source.read(0, seed=3))
    assert source.count == len(labels_of(batches))
    assert source.batches_per_pass(0) == len(batches)
    assert len(source.targets()) == source.count
    if name not in ("fewer", "more", "shuffled drop_last", "random batch sampler"):  # another pass gives other samples
        assert Counter(source.targets().tolist()) == Counter(labels_of(batches).tolist())


def test_stored_labels_follow_the_sampler_and_spare_the_samples():
    dataset = Targets()
    for sampler in (None, SubsetRandomSampler(torch.arange(30).tolist()), RandomSampler(dataset)):
        dataset.loaded = 0
        targets = as_source(DataLoader(dataset, 10, sampler=sampler), "x").targets()
        assert sorted(targets.tolist()) == sorted(Y[: len(targets)].tolist())
        assert 0 < dataset.loaded < 15


@pytest.mark.parametrize("data", [DataLoader(FULL, 64, drop_last=True), DataLoader(FULL, batch_sampler=[])])
def test_a_loader_without_a_batch_is_refused(data):
    with pytest.raises(ValueError, match="the forget DataLoader gives no batch"):
        as_source(data, "forget")


def test_refusals_name_the_set():
    with pytest.raises(ValueError, match="the retain set is empty"):
        as_source((X[:0], Y[:0]), "retain")
    with pytest.raises(ValueError, match="the retain set is empty"):
        as_source([], "retain")
    with pytest.raises(TypeError, match="retain must be tensors"):
        as_source(3, "retain")
    with pytest.raises(ValueError, match="retain: tensors must have the same number"):
        as_source((X, Y[:4]), "retain")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="retain: a DataLoader over an IterableDataset"):
        as_source(DataLoader(Stream()), "retain")


def ragged(samples):
    longest = max(len(sample) for sample in samples)
    padded = torch.stack([torch.nn.functional.pad(sample, (0, longest - len(sample))) for sample in samples])
    return {"input_ids": padded, "labels": padded}


@pytest.mark.parametrize(
    "data",
    [
        DataLoader([torch.arange(2 + i % 4) for i in range(20)], 4, collate_fn=ragged),
        (X, torch.zeros(N, 4)),
        (X, torch.zeros(N, 1)),
        [(X[i], torch.zeros(4)) for i in range(N)],
        [(X[i], "name") for i in range(N)],
        {"x": X, "labels": ["name"] * N},
        {"image": X, "class": Y},
        list(X),
        # Tokens in one line: numbers, but not of samples.
        DataLoader(TensorDataset(X, X), 8, collate_fn=lambda s: (torch.zeros(len(s)), torch.zeros(3 * len(s)).long())),
    ],
)
def test_targets_that_are_not_one_number_a_sample_are_none(data):
    assert as_source(data, "forget").targets() is None


@pytest.mark.parametrize(
    "dataset",
    [
        Targets(y=Y + 1, target_transform=lambda label: label + 1),
        Targets(y=Y + 1),
        Targets(y=torch.where(Y == 3, 0, Y)),  # one class only
        Targets(y=torch.where(Y == 3, 0, Y), targets=Y.tolist()),
        Targets(targets=[str(label) for label in Y.tolist()]),
        Targets(targets=[[label] * (1 + label) for label in Y.tolist()]),
        Targets(y=Y.flip(0), transforms=lambda image, label: (image, label)),
    ],
)
def test_attributes_that_do_not_say_what_the_items_say_are_not_believed(dataset):
    expected = dataset.labels_of_items
    assert torch.equal(as_source(dataset, "x").targets(), expected)
    assert torch.equal(as_source(DataLoader(dataset, 8, shuffle=False), "x").targets(), expected)
    assert torch.equal(as_source(Subset(dataset, range(3, 40)), "x").targets(), expected[3:40])


@pytest.mark.parametrize("name", ["target_transform", "transforms"])
def test_a_transform_of_the_target_is_not_believed_even_where_it_shows_in_no_probe(name):
    dataset = Targets(**{name: lambda *label: label})
    dataset.labels_of_items = Y.clone()
    dataset.labels_of_items[20] = 99
    assert as_source(dataset, "x").targets()[20] == 99


def test_transforms_of_the_image_only_leave_the_labels_believed():
    class Standard:  # as torchvision sets it
        transform, target_transform = abs, None

    dataset = Targets(transforms=Standard())
    assert torch.equal(as_source(dataset, "x").targets(), Y)
    assert dataset.loaded < 15


def test_a_tensor_dataset_with_items_of_its_own_is_a_dataset():
    class Shifted(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, y + 1

    source = as_source(Shifted(X, Y), "x")
    assert torch.equal(source.targets(), Y + 1)
    assert torch.equal(labels_of(source.read(8)), Y + 1)


NUMBERED = TensorDataset(X, torch.arange(N))


@pytest.mark.parametrize("data", [NUMBERED, Pairs(y=torch.arange(N)), DataLoader(NUMBERED, 8)])
def test_a_sample_is_drawn_from_everywhere(data):
    source = as_source(data, "x")
    first, again, other = (labels_of(source.sample(10, 4, seed)) for seed in (1, 1, 2))
    assert len(first) == len(set(first.tolist())) == 10
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert max(first) >= 10, "not the first rows"
    assert sorted(labels_of(source.sample(N + 5, 4, 1)).tolist()) == list(range(N))


def test_a_sample_of_a_loader_keeps_its_collation_and_its_subset():
    def collate(samples):
        return {"labels": torch.stack([y for _, y in samples]), "sizes": len(samples)}

    loader = DataLoader(NUMBERED, 4, sampler=SubsetRandomSampler(range(30, 50)), collate_fn=collate)
    batches = list(as_source(loader, "x").sample(10, 99, 0))
    assert [batch["sizes"] for batch in batches] == [4, 4, 2]
    assert all(30 <= label < 50 for batch in batches for label in batch["labels"].tolist())
    weighted = DataLoader(FULL, 8, sampler=WeightedRandomSampler((Y == 2).double(), 19))
    assert labels_of(as_source(weighted, "x").sample(3, 8, 0)).tolist() == [2] * 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.bfloat16, torch.complex64])
def test_batches_are_the_samples_in_their_layout(dtype):
    images = torch.arange(N * 2 * 3 * 4).view(N, 2, 3, 4).to(dtype)
    for laid_out in (
        images,
        images.contiguous(memory_format=torch.channels_last),
        images[:, :, ::2],
    ):
        order = torch.cat([labels for _, labels in as_source((laid_out, torch.arange(N)), "x").read(8, seed=3)])
        assert order.tolist() != list(range(N))
        for rows, labels in as_source((laid_out, torch.arange(N)), "x").read(8, seed=3):
            assert torch.equal(rows, laid_out[labels])
            assert rows.stride() == laid_out[labels].stride()


@pytest.mark.parametrize("count", [16, 17])
@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
def test_the_last_batch_has_what_is_left(kind, count):
    data = {"tensors": (X[:count], Y[:count]), "dataset": Subset(FULL, range(count))}
    data["loader"] = DataLoader(data["dataset"], 8)
    source = as_source(data[kind], "x")
    for seed in (None, 0):
        batches = list(source.read(8, seed))
        assert [len(y) for _, y in batches] == [8, 8, 1][: len(batches)]
        assert len(batches) == source.batches_per_pass(8) == (3 if count == 17 else 2)


RANDOM = {
    "dataset": lambda: Noisy(),
    "dataset with targets": lambda: NoisyTargets(),
    "loader": lambda: DataLoader(Noisy(), 8, shuffle=True),
    "loader generator": lambda: DataLoader(Noisy(), 8, shuffle=True, generator=generator()),
    "sampler generator": lambda: DataLoader(Noisy(), 8, sampler=RandomSampler(Noisy(), generator=generator())),
    "drawn late": lambda: DataLoader(
        Noisy(), 8, sampler=RandomSampler(Noisy(), True, num_samples=100, generator=generator())
    ),
    "batch sampler generator": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=generator()), 8, False)
    ),
    "weighted": lambda: DataLoader(Noisy(), 8, sampler=WeightedRandomSampler(torch.ones(N), 30)),
    "workers": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2),
}


def disturb():
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("name", RANDOM)
def test_a_resumed_pass_gives_the_very_batches(name):
    whole = list(as_source(RANDOM[name](), "x").read(8, seed=5))
    for skip in range(len(whole) + 1):
        disturb()
        rest = []
        for batch in as_source(RANDOM[name](), "x").read(8, seed=5, skip=skip):
            rest.append(batch)
            disturb()
        assert same(rest, whole[skip:])
    assert not same(whole, list(as_source(RANDOM[name](), "x").read(8, seed=6)))


@pytest.mark.parametrize("name", RANDOM)
def test_a_stream_goes_on_where_it_stood(name):
    stream = Stream(as_source(RANDOM[name](), "x"), 8, seed=1, role=0)
    for _ in range(9):
        stream.next()
    state = stream.state_dict()
    expected = [stream.next() for _ in range(4)]
    resumed = Stream(as_source(RANDOM[name](), "x"), 8, seed=1, role=0)
    resumed.load_state_dict(state)
    disturb()
    assert same([resumed.next() for _ in range(4)], expected)


@pytest.mark.parametrize("name", RANDOM)
def test_random_states_of_the_caller_are_not_moved(name):
    data = RANDOM[name]()
    holders = [data, *(getattr(data, key, None) for key in ("sampler", "batch_sampler"))]
    holders.append(getattr(holders[-1], "sampler", None))
    generators = [torch.default_generator]
    generators += [g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None]

    def states():
        numpy = np.random.get_state()  # noqa: NPY002
        return [g.get_state().tolist() for g in generators], random.getstate(), numpy[1].tolist(), numpy[2]

    before = states()
    source = as_source(data, "x")
    source.targets()
    assert states() == before
    for batches in (source.read(8), source.read(8, 3), source.sample(10, 4, 3)):
        for _ in batches:
            assert states() == before
    iterator = source.read(8, 3)
    next(iterator)
    iterator.close()
    assert states() == before


def test_loaders_that_share_a_generator_do_not_disturb_each_other():
    def streams():
        shared = generator()
        loaders = [DataLoader(FULL, 8, sampler=RandomSampler(FULL, True, generator=shared)) for _ in range(2)]
        return [Stream(as_source(loader, "x"), 8, 0, role) for role, loader in enumerate(loaders)]

    together = streams()
    mixed = [[stream.next() for stream in together] for _ in range(9)]
    for role, stream in enumerate(streams()):
        assert same([stream.next() for _ in range(9)], [pair[role] for pair in mixed])


def test_columns_that_are_no_tensors_are_read_by_sample():
    text = [f"line {i}" for i in range(N)]
    data = {
        "x": X,
        "text": text,
        "words": np.array(text),
        "weight": np.arange(N) / 2,
        "parts": [[i] * (i % 3) for i in range(N)],
        "meta": {"label": list(range(N))},
        "mask": None,
        "labels": Y.tolist(),
    }
    source = as_source(data, "forget")
    assert torch.equal(source.targets(), Y)
    for batch in source.read(8, seed=1):
        lines = batch["meta"]["label"].tolist()
        assert batch["text"] == batch["words"] == [text[i] for i in lines]
        assert batch["parts"] == [data["parts"][i] for i in lines]
        assert torch.equal(batch["x"], X[lines])
        assert torch.equal(batch["weight"], torch.tensor(lines).double() / 2)
        assert batch["mask"] is None


@pytest.mark.parametrize("wrong", [["a"] * (N - 1), np.zeros(3), object(), {1, 2}, np.array(2.0)])
def test_other_columns_are_refused_by_name(wrong):
    with pytest.raises(TypeError, match=r"forget\[meta.text\]"):
        as_source({"x": X, "meta": {"text": wrong}, "labels": Y}, "forget")


def test_a_list_of_columns_is_no_list_of_samples():
    for columns in ([X, Y], [X, X[:, 0].clone(), Y], [Y * 1.0, Y * 2.0]):
        source = as_source(columns, "x")
        assert isinstance(source, TensorSource)
        assert source.count == N
    tokens = [torch.arange(6) for _ in range(4)]  # samples of one length, for a forward of the caller's own
    assert as_source(tokens, "x").count == 4
    assert as_source([(X[0], Y[0]), (X[1], Y[1])], "x").count == 2


@pytest.mark.parametrize("data", [(X, torch.arange(N)), Pairs(y=torch.arange(N))])
def test_a_held_out_share_is_taken_out_of_the_rest(data):
    rest, part = split_held_out(as_source(data, "retain"), 0.2, seed=4)
    assert (rest.count, part.count) == (40, 10)
    both = torch.cat((rest.targets(), part.targets()))
    assert sorted(both.tolist()) == list(range(N))
    assert sorted(part.targets().tolist()) != list(range(10))
    assert torch.equal(split_held_out(as_source(data, "retain"), 0.2, seed=4)[1].targets(), part.targets())


def test_a_share_that_cannot_be_taken_is_refused():
    source = as_source((X[:3], Y[:3]), "retain")
    for share in (0.0, 1.0, 2.0, 0.1):
        with pytest.raises(ValueError, match="share"):
            split_held_out(source, share, 0)
    with pytest.raises(TypeError, match="DataLoader"):
        split_held_out(as_source(DataLoader(FULL, 8), "retain"), 0.2, 0)


def subset(dataset, start, stop):
    return Subset(dataset, range(start, stop))


@pytest.mark.parametrize(
    ("forget", "retain", "shared"),
    [
        (subset(FULL, 0, 20), subset(FULL, 15, 50), 5),
        (subset(subset(FULL, 10, 40), 0, 10), subset(FULL, 15, 50), 5),
        (subset(FULL, 0, 20), FULL, 20),
        (subset(FULL, 0, 20), (X[15:], Y[15:]), 5),
        ((X[:20], Y[:20]), TensorDataset(X[15:], Y[15:]), 5),
        ([X[:20], Y[:20]], (X[15:], Y[15:]), 5),
        ((X[:20], Y[:20]), (X[15:], Y[15:] + 1), 0),
        ((X[:20], Y[:20]), (X.double(), Y), 0),
        ((X[:20], Y[:20]), (X,), 0),
        ((X[:20], Y[:20]), Pairs(), 0),
        ({"x": X[:20], "labels": Y[:20]}, {"labels": Y[15:], "x": X[15:]}, 5),
        ({"x": X[:20], "labels": Y[:20]}, {"y": Y[15:], "x": X[15:]}, 0),
        ({"text": list("abc"), "labels": Y[:3] * 0}, {"text": list("cde"), "labels": Y[:3] * 0}, 1),
        (DataLoader(FULL, 8, sampler=SubsetRandomSampler(range(20))), DataLoader(subset(FULL, 15, 50), 8), 5),
        (DataLoader(subset(FULL, 0, 20), 8, True, drop_last=True), subset(FULL, 15, 50), 5),
        (DataLoader(FULL, 8, sampler=WeightedRandomSampler(torch.ones(N), 9)), FULL, 0),
        (DataLoader(FULL, 8, sampler=RandomSampler(FULL, True)), FULL, 0),
        ((X * 0, Y), (X.int() * 0, Y), 0),
        ({"x": X, "y": Y, "mode": "a"}, {"x": X, "y": Y, "mode": "b"}, 0),
        ([(X[0], 1)], [(X[0], 1)], 0),
    ],
)
def test_count_shared(forget, retain, shared):
    assert count_shared(forget, retain) == shared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.complex64])
def test_count_shared_of_any_dtype(dtype):
    rows = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).to(dtype)
    flags = torch.zeros(4, dtype=torch.bool)
    assert count_shared((rows[:2], flags[:2]), (rows[1:], flags[1:])) == 1
    assert count_shared((rows[:1], flags[:1]), (rows[1:], flags[1:])) == 0
    assert count_shared((rows[:2, :0], flags[:2]), (rows[1:, :0], flags[1:])) == 2


def test_count_shared_keeps_hashes_not_samples():
    x, y = torch.zeros(4000, 2048), torch.arange(4000)  # 33 MB
    tracemalloc.start()
    assert count_shared((x[:100], y[:100]), (x[50:], y[50:])) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.numel() * 4


def test_sequential_samplers_of_part_of_the_data_are_read():
    """A sampler is plain only over the whole dataset: one over another is not."""
    loader = DataLoader(FULL, 8, sampler=SequentialSampler(range(20)))
    source = as_source(loader, "x")
    assert source.count == 20
    assert torch.equal(source.targets(), Y[:20])
