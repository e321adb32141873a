"""Batches over all cores of a CPU: the same results in the same order, one torch thread for each, and everything put back after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lift_ray.evaluation import cpu_parallel
from lift_ray.evaluation.cpu_parallel import CPU_BATCH, batch_size, on_cores
from lift_ray.model.blocks import BlockShape
from lift_ray.model.resnet import ResNetTower
from lift_ray.model.tower import FrozenTower, Tower

CPU = torch.device("cpu")
BATCH = 7
SMALL = Tower(BlockShape(8, num_heads=1, hidden=16, activation=F.gelu), num_blocks=1, patch_px=8, resolution_px=16)


@pytest.fixture
def three_threads(same_threads: None) -> None:
    torch.set_num_threads(3)


def test_results_come_in_order_each_made_on_one_torch_thread_with_several_at_a_time(three_threads: None) -> None:
    together = threading.Barrier(3)  # breaks when three are never at work at once
    asked_by = []

    def batches() -> Iterator[int]:
        for number in range(12):
            asked_by.append(threading.current_thread())
            yield number

    def compute(number: int) -> tuple[int, int]:
        together.wait(100)
        time.sleep(0.02 * (3 - number % 3))
        return number, torch.get_num_threads()

    assert list(on_cores(CPU, compute, batches())) == [(number, 1) for number in range(12)]
    assert set(asked_by) == {threading.current_thread()}


def test_the_threads_of_torch_are_restored_at_the_end_after_an_error_and_when_nobody_reads_on(
    three_threads: None,
) -> None:
    def threads_of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    def compute(number: int) -> int:
        if number == 4:
            raise ValueError("four")
        return number

    def check() -> None:
        assert torch.get_num_threads() == threads_of_a_new_thread() == 3
        assert not [thread for thread in threading.enumerate() if "lift-forward" in thread.name]

    assert list(on_cores(CPU, compute, range(3))) == [0, 1, 2]
    check()
    with pytest.raises(ValueError, match="four"):
        list(on_cores(CPU, compute, range(100)))
    check()
    some = on_cores(CPU, compute, iter(lambda: 0, 1))  # without end
    assert next(some) == 0
    some.close()  # type: ignore[attr-defined]
    check()


def test_one_torch_thread_and_a_gpu_take_a_batch_after_the_other_in_this_thread(three_threads: None) -> None:
    here = threading.current_thread()
    assert set(on_cores(torch.device("cuda"), lambda _: threading.current_thread(), range(5))) == {here}
    torch.set_num_threads(1)
    assert set(on_cores(CPU, lambda _: threading.current_thread(), range(5))) == {here}


def test_batches_are_small_on_a_cpu_only() -> None:
    assert batch_size(torch.device("cuda"), SMALL) == 250
    assert batch_size(CPU, SMALL) == CPU_BATCH < 250
    assert batch_size(CPU, SMALL, largest=5) == 5


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made of a batch."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and len(out) == BATCH:  # not what is made of the weights
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


@pytest.mark.parametrize(
    "tower",
    [
        Tower(BlockShape(64, num_heads=2, hidden=1024, activation=F.gelu), num_blocks=2, patch_px=16, resolution_px=64),
        ResNetTower(layers=[1, 1, 1, 1], stem_width=16, width=64, num_heads=2, resolution_px=64),
    ],
    ids=["transformer", "residual network"],
)
def test_batches_are_as_small_as_a_towers_activations_require(
    tower: FrozenTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Largest() as largest, torch.inference_mode():
        tower.eval()(torch.rand(BATCH, 3, 64, 64))
    assert largest.num_bytes == BATCH * tower.activation_bytes
    monkeypatch.setattr(cpu_parallel, "ACTIVATION_BYTES", 12 * tower.activation_bytes)
    assert batch_size(CPU, tower) == 12
    assert batch_size(CPU, tower, num_crops=5) == 2
    monkeypatch.setattr(cpu_parallel, "ACTIVATION_BYTES", 1)
    assert batch_size(CPU, tower) == 1
    assert batch_size(torch.device("cuda"), tower, num_crops=10, largest=100) == 10
    assert batch_size(torch.device("cuda"), tower, num_crops=5) == 50


def test_many_cores_hold_four_times_the_images_of_one_batch_at_most(three_threads: None) -> None:
    torch.set_num_threads(64)
    assert batch_size(CPU, SMALL) == 15
    assert batch_size(CPU, SMALL, largest=4) == 1
