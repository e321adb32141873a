"""What a trial needs, and how many fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.errors import BadInput
from lift_ray.ray_runtime.capacity import Need, need, num_fitting, num_slots
from lift_ray.settings.search import ScaleConfig

CPU8 = {"CPU": 8.0}
GPU4 = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("wanted", "nodes", "fitting"),
    [
        (Need(1, 1, 0), [], 0),
        (Need(1, 1, 0), [CPU8], 8),
        (Need(1, 3, 0), [CPU8], 2),
        (Need(2, 3, 0), [CPU8], 1),
        (Need(1, 9, 0), [CPU8], 0),
        (Need(1, 9, 0), [CPU8] * 4, 0),
        (Need(3, 4, 0), [CPU8, CPU8], 1),
        (Need(2, 5, 0), [CPU8, CPU8], 1),
        (Need(1, 1, 1), [CPU8], 0),
        (Need(1, 1, 1), [CPU8, GPU4], 4),
        (Need(1, 8, 1), [GPU4], 2),
        (Need(4, 1, 1), [GPU4, GPU4], 2),
        (Need(3, 1, 1), [GPU4, GPU4], 2),
        (Need(1, 4, 0), [{"CPU": 7.9}, {"CPU": 0.0}, {"memory": 3.0}], 1),
    ],
)
def test_each_worker_is_whole_on_one_node(wanted: Need, nodes: list[dict[str, float]], fitting: int) -> None:
    assert num_fitting(wanted, nodes) == fitting


@given(workers=st.integers(1, 5), cpus=st.integers(1, 5), nodes=st.lists(st.integers(0, 12), max_size=6))
def test_trials_that_fit_use_no_more_than_there_is(workers: int, cpus: int, nodes: list[int]) -> None:
    fitting = num_fitting(Need(workers, cpus, 0), [{"CPU": float(node)} for node in nodes])
    placed = sum(node // cpus for node in nodes)
    assert fitting * workers <= placed < (fitting + 1) * workers


@pytest.mark.parametrize(
    ("use_gpu", "has_gpu", "gpus"),
    [
        ("auto", True, 1),
        ("auto", False, 0),
        (True, False, 1),
        (False, True, 0),
    ],
)
def test_auto_takes_a_gpu_when_there_is_one(use_gpu: bool, has_gpu: bool, gpus: int) -> None:
    wanted = need(ScaleConfig(workers_per_trial=2, cpus_per_worker=3, use_gpu=use_gpu), has_gpu)
    assert wanted == Need(2, 3, gpus)
    assert wanted.bundle() == ({"CPU": 3.0, "GPU": 1.0} if gpus else {"CPU": 3.0})
    assert str(wanted) == ("2 x (3 CPU + 1 GPU)" if gpus else "2 x (3 CPU)")


@pytest.mark.parametrize(
    ("scale", "nodes", "slots"),
    [
        (ScaleConfig(), [CPU8], 8),
        (ScaleConfig(max_concurrent=3), [CPU8], 3),
        (ScaleConfig(max_concurrent=99), [CPU8], 8),
        (ScaleConfig(), [CPU8, GPU4], 4),
        (ScaleConfig(use_gpu=False), [CPU8, GPU4], 24),
        (ScaleConfig(workers_per_trial=5), [CPU8, CPU8], 3),
    ],
)
def test_there_are_as_many_slots_as_fit_or_were_asked_for(
    scale: ScaleConfig, nodes: list[dict[str, float]], slots: int
) -> None:
    assert num_slots(scale, nodes)[1] == slots


def test_a_trial_that_fits_nowhere_gives_a_one_line_error_before_anything_starts() -> None:
    with pytest.raises(BadInput) as caught:
        num_slots(ScaleConfig(workers_per_trial=2, cpus_per_worker=16, use_gpu=True), [CPU8, GPU4])
    assert str(caught.value) == (
        "scale: a trial must fit the cluster, but got 2 x (16 CPU + 1 GPU) for 2 nodes with 24 CPU, 4 GPU in all; "
        "lower scale.workers_per_trial or scale.cpus_per_worker, or set scale.use_gpu=false"
    )
    with pytest.raises(BadInput, match=r"for 0 nodes with 0 CPU, 0 GPU"):
        num_slots(ScaleConfig(), [])
