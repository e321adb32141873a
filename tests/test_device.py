"""The device that a process computes on, and what is refused on it.

CPU is real here. Of CUDA, XPU and MPS only the choices are tested, on the answers that torch would give: no such device is here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lift_ray.errors import BadInput
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.inference.classifier import Classifier
from lift_ray.methods.world import Ranks
from lift_ray.model import device as devices
from lift_ray.model.device import CPU
from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching.jobs import SlotSettings
from lift_ray.searching.worker import Worker
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

GPUS = ["cuda", "xpu", "mps"]


def with_gpu(monkeypatch: pytest.MonkeyPatch, kind: str, count: int = 1) -> torch.device:
    """Let torch.accelerator answer as on a machine with such a GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    return torch.device(kind)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize("kind", GPUS)
def test_the_accelerator_that_torch_finds_is_used(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    there = with_gpu(monkeypatch, kind)
    assert devices.best_device() == devices.accelerator() == there


def test_without_one_it_is_the_cpu_and_a_worker_with_a_gpu_says_so(no_gpu: None) -> None:
    assert devices.best_device() == CPU
    with pytest.raises(BadInput) as caught:
        Ranks.alone(use_gpu=True)
    assert str(caught.value) == (
        f"scale.use_gpu: requires a torch that can use the GPU, but got torch {torch.__version__}, which finds none; "
        "install another torch, or set it to false"
    )


@pytest.mark.parametrize(("kind", "name"), [("cuda", "nccl"), ("xpu", "xccl"), ("mps", "gloo"), ("cpu", "gloo")])
def test_each_device_has_its_backend(kind: str, name: str) -> None:
    assert devices.backend(torch.device(kind)) == name


def test_names_of_torch_are_devices_if_they_are_here(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    assert devices.device_named("cpu") == CPU
    faults = {
        "tpu": "must be a name of torch, as cpu, cuda:1, xpu or mps, but got 'tpu'",
        "cuda": "must be a device of this machine, but got 'cuda'; torch finds cpu",
    }
    for name, fault in faults.items():
        with pytest.raises(BadInput) as caught:
            devices.device_named(name)
        assert str(caught.value) == f"device: {fault}"
    with_gpu(monkeypatch, "cuda", count=2)
    assert devices.device_named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BadInput, match=r"but got 'cuda:2'; torch finds cpu, cuda, cuda:1$"):
        devices.device_named("cuda:2")
    with pytest.raises(BadInput, match=r"but got 'mps'; torch finds cpu, cuda, cuda:1$"):
        devices.device_named("mps")


def fault(precision: str, kind: str) -> str:
    return str(devices.precision_fault(precision, torch.device(kind)) or "")


ON_CPU = "backbone.precision: must be fp32 on a CPU, but got {}; set backbone.precision=fp32, or use a GPU"
EMULATED = (
    "backbone.precision: must be fp32 or fp16 on this device ({}), which only emulates bf16, but got bf16; "
    "set backbone.precision=fp16"
)


def test_a_precision_that_a_device_only_emulates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [fault(precision, "cpu") for precision in ("fp32", "bf16", "fp16")] == [
        "",
        ON_CPU.format("bf16"),
        ON_CPU.format("fp16"),
    ]
    for has_bf16 in (False, True):
        for module in (torch.cuda, torch.xpu):
            answer = {True: True, False: has_bf16}  # by including_emulation
            monkeypatch.setattr(
                module, "is_bf16_supported", lambda including_emulation, a=answer: a[including_emulation]
            )
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda m="Apple M4 Pro" if has_bf16 else "Apple M1": m)
        for kind in GPUS:
            assert fault("fp32", kind) == fault("fp16", kind) == ""
            assert fault("bf16", kind) == ("" if has_bf16 else EMULATED.format(kind))


def test_a_precision_that_cannot_be_used_is_one_line(small_data: str, small_clip: str) -> None:
    config = RunConfig.model_validate({"backbone": {"model": small_clip, "precision": "bf16"}})
    with pytest.raises(BadInput) as caught:
        Run(config, Workspace(small_data, Ranks.alone()))
    assert str(caught.value) == ON_CPU.format("bf16")


def test_sums_of_float64_are_on_the_cpu_if_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [devices.counting_device(torch.device(kind)).type for kind in ("cpu", "cuda", "mps")] == [
        "cpu",
        "cuda",
        "cpu",
    ]
    for has_fp64 in (True, False):
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda device, h=has_fp64: type("", (), {"has_fp64": h})
        )
        assert devices.counting_device(torch.device("xpu")).type == ("xpu" if has_fp64 else "cpu")
    batch = LogitBatch(*(torch.ones(2, 3, device="meta") for _ in range(2)), {"a": torch.ones(1, device="meta")})
    assert batch.on(torch.device("meta")) is batch
    moved = LogitBatch(torch.ones(2, 3), torch.ones(2), {"a": torch.ones(1)}, [torch.ones(1)]).on(torch.device("meta"))
    every = [moved.logits, moved.labels, *moved.branches.values(), *moved.members]
    assert [tensor.device.type for tensor in every] == ["meta"] * 4


@pytest.mark.parametrize(
    ("kind", "is_only", "gpus", "found"),
    [
        ("mps", True, 0, "mps"),
        ("mps", False, 0, "cpu"),
        ("cuda", True, 0, "cpu"),  # Ray counts it, and gave none
        ("cuda", False, 1, "cuda"),
        ("xpu", True, 1, "xpu"),
    ],
)
def test_a_slot_takes_the_gpu_of_ray_or_as_the_only_one_that_of_apple(
    monkeypatch: pytest.MonkeyPatch, kind: str, is_only: bool, gpus: int, found: str
) -> None:
    with_gpu(monkeypatch, kind)
    slot = SlotSettings("data", Need(1, 1, gpus), "out", "study", is_only=is_only)
    worker = Worker(slot)
    assert worker._device() == torch.device(found)


def test_the_random_numbers_of_the_host_continue_whatever_the_device_was() -> None:
    states = devices.random_state(CPU)
    assert list(states) == ["random/cpu"]
    drawn = torch.rand(3)
    devices.set_random_state(CPU, states | {"random/cuda": torch.zeros(1)})
    assert torch.equal(torch.rand(3), drawn)
    assert devices.peak_memory(CPU) is None


def test_a_classifier_is_loaded_on_a_device_by_its_name(
    tmp_path: Path, small_data: str, small_clip: str, no_gpu: None
) -> None:
    run = Run(
        RunConfig.model_validate({"backbone": {"model": small_clip}, "optim": {"global_batch_size": 16}}),
        Workspace(small_data, Ranks.alone()),
    )
    run.save(tmp_path / "checkpoint")
    one = Classifier.load(tmp_path / "checkpoint", device="cpu", temperature=1.0)
    assert one.ranks.device == CPU
    with pytest.raises(BadInput, match=r"^device: must be a device of this machine, but got 'mps'; torch finds cpu$"):
        Classifier.load(tmp_path / "checkpoint", device="mps")
