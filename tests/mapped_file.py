"""A run on a mapped file, in a process of its own: prints where the data lay, and how many bytes the process grew by.

128 MB of pictures as bytes, of which the forward takes a corner; a run takes a small part of that. Started with
MALLOC_ARENA_MAX=1 and MALLOC_MMAP_THRESHOLD_=65536: else glibc soon takes batches from its heap, and what that keeps of
freed ones (another amount at each start, more with a heap for each thread) is as much again as what the run holds.
"""

import dataclasses
import json
import sys
import threading
import warnings

import numpy as np
import torch

from nabla_tau import unlearn
from nabla_tau.recipes import RECIPES


def anonymous_kib():
    """Memory of this process that no file backs (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def main(path):
    warnings.simplefilter("ignore")
    count, width = 131_072, 1024
    images = np.memmap(path, dtype=np.uint8, mode="w+", shape=(count, width))  # sparse: zeros take no room
    images[:, 0] = np.arange(count) % 251
    labels = (torch.arange(count) % 4).numpy()
    model = torch.nn.Linear(8, 4)

    def forward(model, batch):
        return model(batch[0][:, :8].float() / 255), batch[1]

    few = (images[:64], labels[:64])
    unlearn(model, forget=few, retain=few, held_out=few, forward=forward)  # loads what PyTorch loads late
    short = dataclasses.replace(RECIPES["paper"], schedule="retain_passes", retain_passes=1.0, tau_every=0.5)
    held, most, done = anonymous_kib(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most.append(anonymous_kib())

    watching = threading.Thread(target=watch)
    watching.start()
    result = unlearn(
        model,
        forget=(images[:4096], labels[:4096]),
        retain=(images[4096:60_000], labels[4096:60_000]),
        held_out=(images[60_000:], labels[60_000:]),
        forward=forward,
        recipe=short,
    )
    done.set()
    watching.join()
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    grown = 1024 * (max(most) - held)
    print(json.dumps({"data": result.settings["data"], "grown": grown, "file": images.nbytes, "threads": threads}))


if __name__ == "__main__":
    main(sys.argv[1])
