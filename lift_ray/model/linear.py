"""The frozen linears of a tower, where nearly all of a step's time goes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear: (..., I), (O, I), (O,) -> (..., O).

    In fp32 on a CPU, with weights that are not trained, by oneDNN. F.linear goes to MKL there, which on AMD needs about 1.2
    times as long for the same product.
    """
    frozen = not (weight.requires_grad or bias.requires_grad)
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    # the compiler takes this product only with weights that it may keep
    if frozen and single and x.device.type == "cpu" and _ONEDNN and not torch.compiler.is_compiling():
        out: Tensor = _Frozen.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def prepack(module: nn.Module) -> None:
    """Keep the weights of a frozen module's linears in oneDNN's own layout, each from its first product on, forward and backward.

    Otherwise oneDNN brings a weight into that layout in every product. It takes memory for each weight a second time, and a third
    time where gradients pass it. Products of a few rows can differ in the last bits. Where `linear` uses F.linear,
    nothing changes.
    """
    if not _PACKS:
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32 and layer.weight.is_cpu:
            layer.weight.packed = {}  # type: ignore[attr-defined]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, _laid_out(weight, "forward"), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if _MKL_BACKWARD and getattr(weight, "packed", None) is None:
            return grad @ weight, None, None
        return _product(grad, _laid_out(weight, "backward"), None), None, None


def _laid_out(weight: Tensor, direction: Literal["forward", "backward"]) -> Tensor:
    """Return the second factor of a product, packed if `prepack` was called for it."""
    packed: dict[str, Tensor] | None = getattr(weight, "packed", None)
    if packed is None:
        return weight if direction == "forward" else weight.t()
    if direction not in packed:
        factor = weight.detach() if direction == "forward" else weight.detach().t().contiguous()
        packed[direction] = torch.ops.mkldnn._reorder_linear_weight(factor, ROWS)
    return packed[direction]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _works() -> bool:
    try:
        return bool(_product(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)) == 3)
    except (AttributeError, RuntimeError, TypeError):
        return False


ROWS = 1024  # of the products that the layout is for; those from 16 to 16,384 rows get the same one
_MKL_BACKWARD = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""True where oneDNN takes up to 2.7 times as long as MKL with a transposed weight that is not packed."""
_PACKS = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
_ONEDNN = _works()
"""True if this build of torch has the product that torch.compile uses for frozen weights; its name is not public."""
