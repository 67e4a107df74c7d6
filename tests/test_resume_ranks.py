"""Two processes of a run that are killed with SIGKILL at any moment, both or one, and started again, end in the very
weights of an uninterrupted run."""

from __future__ import annotations

import datetime
import itertools
import random
import shutil
import warnings
from pathlib import Path

import killing
import pytest
import torch
import torch.distributed as dist
from test_distributed_runs import RECIPES, make_parts, prepared, state_of

from nabla_tau import unlearn

KILLS = 5


def rank_of_two(rank: int, kind: str, meeting_point: Path, checkpoint: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    model, settings = prepared(kind)
    settings |= {"checkpoint": checkpoint, "checkpoint_every": 2, "resume": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained model has nothing to forget
        result = unlearn(model, **make_parts(), recipe=RECIPES["ascent"], **settings)
    found = [state_of(result.model), result.history["forget_loss"]]
    if rank == 0:
        partial = output.with_suffix(".part")
        torch.save(found, partial)
        partial.replace(output)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_ranks_resume_bit_for_bit(tmp_path, kind):
    numbers, moments = itertools.count(), random.Random(3)

    def start(name: str) -> list[killing.BaseProcess]:
        shared = kind, tmp_path / f"meeting {next(numbers)}", tmp_path / f"{name} checkpoint", tmp_path / f"{name}.pt"
        return [killing.start(rank_of_two, rank, *shared) for rank in range(2)]

    for process in start("whole"):
        killing.finish(process)
    wanted = torch.load(tmp_path / "whole.pt")
    kills = tries = 0
    for _ in range(killing.MOST):
        processes = start("cut")
        # Later and later, until the run comes to its end; now and then one rank dies before the other.
        processes[0].join(moments.uniform(0, 0.5 * 1.05**tries))
        tries += 1
        for process in moments.sample(processes, 2):
            process.kill()
            process.join(moments.choice([0, 0.05]))
        for process in processes:
            process.join()
        kills += sum(process.exitcode == -9 for process in processes)
        if (tmp_path / "cut.pt").exists():
            if kills >= KILLS:
                break
            tries = 0  # a fast machine: it came to its end before it was killed often enough
            (tmp_path / "cut.pt").unlink()
            checkpoint = tmp_path / "cut checkpoint"
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    weights, losses = torch.load(tmp_path / "cut.pt")
    assert all(torch.equal(value, weights[name]) for name, value in wanted[0].items())
    assert losses == wanted[1]
