"""Weights of a CLIP that comes with the package, as 8-bit integers: half the size of half precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FILE = "packed.safetensors"  # in the folder of the model, beside open_clip's config
SCALE = ".scale"
SMALLEST = 2**16  # number of values from which a tensor is stored as integers


def pack(state: Mapping[str, Tensor], exact: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Return the tensors to store: large weights as int8 with a scale for each row, all others in half precision.

    Row i of a weight W (N, ...) is stored as round(W_i / s_i) with s_i = max |W_i| / 127.

    Args:
        exact: names of large tensors to store in half precision too.
    """
    out = {}
    for name, tensor in state.items():
        if tensor.numel() < SMALLEST or name in exact:
            out[name] = tensor.half().contiguous()
            continue
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=2**-24).half()
        out[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
        out[name + SCALE] = scale
    return out


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in float32 from the result of `pack`."""
    out = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored[name + SCALE].float()
            out[name] = tensor.float().mul_(scale.view(-1, *[1] * (tensor.ndim - 1)))
        elif not name.endswith(SCALE):
            out[name] = tensor.float()
    return out


def read_packed(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a CLIP in float32 under open_clip's names."""
    return unpack(load_file(folder / FILE))
