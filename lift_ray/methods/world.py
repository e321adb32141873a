"""This process among those that train one model."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lift_ray.model.device import CPU, accelerator, backend

GROUP_TIMEOUT = timedelta(minutes=30)  # as torch's own


@dataclass(frozen=True)
class Ranks:
    """Rank, number of processes, device, and threads for decoding; `alone()` for one process without a group."""

    rank: int
    world_size: int
    device: torch.device
    num_threads: int = 1

    @classmethod
    def alone(cls, *, use_gpu: bool = False, num_cpus: int = 1) -> Ranks:
        """One process; its torch threads are set to `num_cpus`. Raises BadInput if it is to use a GPU and torch finds none."""
        return cls.on(accelerator() if use_gpu else CPU, num_cpus)

    @classmethod
    def on(cls, device: torch.device, num_cpus: int) -> Ranks:
        """One process on a device; its torch threads are set to `num_cpus`."""
        torch.set_num_threads(num_cpus)
        return cls(0, 1, device, max(1, num_cpus - 1))

    @property
    def is_first(self) -> bool:
        """True for the rank that writes files and reports."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, parameters: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
        """Mean over ranks of all gradients, in place, and of a few figures of the step, in one message.

        Only trained parameters travel, 0.1 to 5 million numbers.

        Args:
            figures: (n,) on this process's device.

        Returns:
            (n,) their means.
        """
        if self.world_size == 1:
            return figures
        gradients = [p.grad for p in parameters if p.grad is not None]
        bucket = torch.cat([*(g.flatten() for g in gradients), figures])
        dist.all_reduce(bucket)
        bucket /= self.world_size
        *parts, figures = bucket.split([*(g.numel() for g in gradients), len(figures)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return figures

    def from_first(self, text: str) -> str:
        """The first rank's text, on every rank."""
        if self.world_size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def join_group(rank: int, world_size: int, address: str, port: int, device: torch.device) -> None:
    """Form the process group of a slot with several workers (Ray Train forms its own).

    The first rank listens at `address` alone, where torch by itself would take all interfaces. On loopback all traffic stays there.
    """
    if ip_address(address).is_loopback:
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):  # Linux, macOS
                os.environ.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=name)
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    listening = socket.create_server((address, port), family=family).detach() if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, rank == 0, GROUP_TIMEOUT, master_listen_fd=listening
    )
    dist.init_process_group(backend(device), store=store, rank=rank, world_size=world_size)
