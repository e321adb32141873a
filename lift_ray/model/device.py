"""The device of this process, chosen through torch.accelerator, and what torch can do on it.

CPU and CUDA were run. The answers for XPU (Intel) and MPS (Apple) follow torch's source, and were never run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lift_ray.errors import BadInput

CPU = torch.device("cpu")
WITH_STREAMS = (
    "cuda",
    "xpu",
)  # torch counts the memory of these, and copies to them while the host works


def best_device() -> torch.device:
    """Return the accelerator that torch finds (CUDA, also as ROCm; XPU; MPS), or else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or CPU


def accelerator() -> torch.device:
    """Return the accelerator of a process that was given a GPU. Raises BadInput if torch finds none."""
    if (found := best_device()) == CPU:
        got = f"torch {torch.__version__}, which finds none"
        raise BadInput(
            "scale.use_gpu", "requires a torch that can use the GPU", got, "install another torch, or set it to false"
        )
    return found


def device_named(name: str) -> torch.device:
    """Return the device with a name of torch, as `cpu`, `cuda:1` or `mps`. Raises BadInput if it is not one of this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput("device", "must be a name of torch, as cpu, cuda:1, xpu or mps", f"{name!r}") from None
    here = best_device()
    if device != CPU and (device.type != here.type or (device.index or 0) >= torch.accelerator.device_count()):
        found = "cpu" if here == CPU else ", ".join(["cpu", *(f"{each}" for each in all_devices(here))])
        raise BadInput("device", "must be a device of this machine", f"{name!r}", f"torch finds {found}")
    return device


def all_devices(first: torch.device) -> list[torch.device]:
    """Return a device, and the others of its kind that this process can use."""
    if first.type == "cpu":
        return [first]
    return [first, *(torch.device(first.type, number) for number in range(1, torch.accelerator.device_count()))]


def backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for a device: nccl, xccl or gloo."""
    return torch.distributed.get_default_backend_for_device(device)


def precision_fault(precision: str, device: torch.device) -> BadInput | None:
    """Return why the backbone cannot compute in fp32, bf16 or fp16 on a device, or None if it can.

    On a CPU torch computes fp16 and bf16 in software, unless the CPU is a recent one, and slower than fp32. GPUs before Ampere only
    emulate bf16, as do Intel's GPUs without its instructions and Apple's M1.
    """
    if precision == "fp32" or (precision == "fp16" and device.type != "cpu"):
        return None
    if device.type == "cpu":
        where, instead = "on a CPU", "fp32"
        remedy = "set backbone.precision=fp32, or use a GPU"
    elif not _has_bf16(device):
        where, instead = f"on this device ({device.type}), which only emulates bf16", "fp32 or fp16"
        remedy = "set backbone.precision=fp16"
    else:
        return None
    return BadInput("backbone.precision", f"must be {instead} {where}", precision, remedy)


def _has_bf16(device: torch.device) -> bool:
    if device.type in ("cuda", "xpu"):
        return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0) and "M1" not in torch.backends.mps.get_name()
    return True


def counting_device(device: torch.device) -> torch.device:
    """Return where an evaluation sums in float64: the device itself, or the CPU if it has none, as MPS and some Intel GPUs."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return CPU
    return device


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors had on a device at once; None for CPU and MPS, where torch does not count them."""
    return torch.get_device_module(device).max_memory_allocated(device) if device.type in WITH_STREAMS else None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's random numbers, of the host and of the device, by names for a checkpoint."""
    states = {"random/cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"random/{device.type}"] = torch.get_device_module(device).get_rng_state(*_number(device))
    return states


def set_random_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """Set what `random_state` returned. The state of another kind of device is left out."""
    torch.set_rng_state(states["random/cpu"])
    if (state := states.get(f"random/{device.type}")) is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state, *_number(device))


def _number(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # torch.mps has one device, and no argument for it
