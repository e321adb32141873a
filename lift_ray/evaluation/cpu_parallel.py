"""Forward passes over many batches on all cores of a CPU.

If torch splits each operation between the cores, every operation waits for the slowest core, and all cores wait while one decodes
images. Here each core processes its own batches, on one torch thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lift_ray.data.batches import Given, Made, in_order
from lift_ray.model.tower import FrozenTower

BATCH = 250  # crops of images, on a GPU
CPU_BATCH = 25  # images: their activations stay in the core's cache; more are not faster
ACTIVATION_BYTES = 32 * 2**20  # the allocator returns larger blocks to the system, which then maps new pages each time


def batch_size(device: torch.device, tower: FrozenTower, num_crops: int = 1, largest: int = BATCH) -> int:
    """Return the number of images of a batch: `largest` crops on a GPU; fewer on a CPU, at most 4 * `largest` on all its cores.

    Args:
        device: the device.
        tower: the backbone.
        num_crops: number of crops that the backbone gets of each image.
        largest: number of crops.
    """
    most = max(1, largest // num_crops)
    if device.type != "cpu":
        return most
    fit = ACTIVATION_BYTES // (tower.activation_bytes * num_crops)
    return max(1, min(most, CPU_BATCH, 4 * most // torch.get_num_threads(), fit))


def on_cores(device: torch.device, compute: Callable[[Given], Made], batches: Iterable[Given]) -> Iterator[Made]:
    """Yield `compute` of each batch, in order; on a CPU with several torch threads it runs on several batches at once.

    Args:
        device: the device.
        compute: must set torch's modes (inference, autocast) itself, because they are local to a thread.
        batches: only the calling thread iterates over them.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        yield from map(compute, batches)
        return

    def alone(batch: Given) -> Made:
        torch.set_num_threads(1)  # for this thread and threads started later, hence the reset below
        return compute(batch)

    try:
        with ThreadPoolExecutor(cores, "lift-forward") as pool:
            yield from in_order(pool, alone, batches, cores)
    finally:
        torch.set_num_threads(cores)
