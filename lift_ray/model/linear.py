"""The frozen linears of a tower, where nearly all of a step's time goes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _works() -> bool:
    try:
        return bool(_product(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)) == 3)
    except (AttributeError, RuntimeError, TypeError):
        return False


_ONEDNN = _works()
"""True if this build of torch has the product that torch.compile uses for frozen weights; its name is not public."""
