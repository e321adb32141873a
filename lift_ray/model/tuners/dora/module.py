"""The module of DoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lift_ray.model.tuners.base import BlockTuner
from lift_ray.model.tuners.lora.module import LowRank


class Decomposed(LowRank):
    """A projection with the weight m * (W + A) / |W + A| for LoRA's change A, equal to W at the start (arXiv 2402.09353).

    |.| is the norm of each output's weights (D',), as in the paper's code. As there, no gradient goes through it.

    Args:
        weight, bias: of the frozen projection, (D', D) and (D',).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, bottleneck: int) -> None:
        super().__init__(weight.shape[1], bottleneck, weight.shape[0])
        self.magnitude = nn.Parameter(weight.detach().norm(dim=1))
        # the tower's own, not copies
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", bias.detach(), persistent=False)

    def scale(self) -> Tensor:
        """m / |W + A|, (D',)."""
        norm: Tensor = (self.weight + self.change().detach()).norm(dim=1)
        return self.magnitude / norm

    def changed(self, x: Tensor, out: Tensor) -> Tensor:
        """Input (..., D) and output W x + b (..., D') of the frozen projection -> output of this one."""
        scale = self.scale()
        moved: Tensor = scale.to(out.dtype) * (out + self(x))
        rest: Tensor = (1 - scale) * self.bias  # so that b is added once and not scaled
        return moved + rest.to(out.dtype)

    def fold_into(self, weight: Tensor, bias: Tensor) -> None:
        """Change a linear's weight and bias in place, so that it gives what `changed` gives."""
        scale = self.scale()
        weight.add_(self.change()).mul_(scale[:, None])
        bias.mul_(scale).add_((1 - scale) * self.bias)


class Dora(BlockTuner):
    """Weight-decomposed low-rank changes of queries and values, on request of the MLP's projections too (arXiv 2402.09353).

    Args:
        block: the frozen block that is tuned.
    """

    def __init__(self, block: Any, bottleneck: int, mlp: bool = False) -> None:
        super().__init__()
        self.mlp = mlp
        for name, (weight, bias) in _projections(block, mlp).items():
            self.add_module(name, Decomposed(weight, bias, bottleneck))

    q: Decomposed
    v: Decomposed
    fc1: Decomposed
    fc2: Decomposed
    can_merge = True

    def merge_into(self, block: Any) -> None:
        """m * (W + A) / |W + A|, for each projection."""
        for name, (weight, bias) in _projections(block, self.mlp).items():
            self.get_submodule(name).fold_into(weight, bias)  # type: ignore[operator]

    def query(self, h: Tensor, q: Tensor) -> Tensor:
        """See Decomposed."""
        return self.q.changed(h, q)

    def value(self, h: Tensor, v: Tensor) -> Tensor:
        """See Decomposed."""
        return self.v.changed(h, v)

    def mlp_in(self, h: Tensor, inner: Tensor) -> Tensor:
        """The same at the MLP's first projection."""
        return self.fc1.changed(h, inner) if self.mlp else inner

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """The same at the MLP's second projection."""
        return self.fc2.changed(inner, out) if self.mlp else out


def _projections(block: Any, mlp: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each projection of a block that DoRA changes, as views."""
    attention, first, second = block.attn.in_proj, block.mlp.in_proj, block.mlp.out_proj
    width = attention.weight.shape[1]
    rows = {"q": slice(0, width), "v": slice(2 * width, 3 * width)}
    found = {name: (attention.weight[part], attention.bias[part]) for name, part in rows.items()}
    if mlp:
        found |= {"fc1": (first.weight, first.bias), "fc2": (second.weight, second.bias)}
    return found
