"""The forward pass over many batches on all cores of a CPU.

A batch whose operations are each shared out to the cores waits for the slowest core at every one of them, and for all of them while
one decodes pictures. Here each core takes batches of its own, on one torch thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lift_ray.data.batches import Given, Made, in_order
from lift_ray.model.resnet import AnyTower

BATCH, BATCH_OF_CROPS = 250, 50  # pictures, on a GPU
CPU_BATCH = 25  # pictures: their activations stay near the core; more are not faster
ACTIVATION_BYTES = 32 * 2**20  # a larger piece of memory comes from the system each time, page by page


def batch_size(device: torch.device, tower: AnyTower, crops: bool = False, largest: int | None = None) -> int:
    """Pictures of a batch: the largest on a GPU; fewer on a CPU, four times as many at most on all its cores.

    Args:
        crops: whether the tower looks at five crops of a picture.
        largest: BATCH when not given, BATCH_OF_CROPS with crops.
    """
    largest = largest or (BATCH_OF_CROPS if crops else BATCH)
    if device.type != "cpu":
        return largest
    fit = ACTIVATION_BYTES // (tower.activation_bytes * (5 if crops else 1))
    return max(1, min(largest, CPU_BATCH, 4 * largest // torch.get_num_threads(), fit))


def on_cores(device: torch.device, compute: Callable[[Given], Made], batches: Iterable[Given]) -> Iterator[Made]:
    """`compute` of each batch, in order; on a CPU with several torch threads of several batches at a time.

    Args:
        compute: it sets torch's modes (inference, autocast) itself: they are a thread's own.
        batches: asked for by this thread alone.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        yield from map(compute, batches)
        return

    def alone(batch: Given) -> Made:
        torch.set_num_threads(1)  # of this thread, and of those to come
        return compute(batch)

    try:
        with ThreadPoolExecutor(cores, "lift-forward") as pool:
            yield from in_order(pool, alone, batches, cores)
    finally:
        torch.set_num_threads(cores)
