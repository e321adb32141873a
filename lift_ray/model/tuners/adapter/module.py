"""The module of adapters."""

from __future__ import annotations

from torch import Tensor

from lift_ray.model.tuners.base import Bottleneck


class Adapter(Bottleneck):
    """m + Up(ReLU(Down(LN(m)))) for the MLP's output m (arXiv 1902.00751, as in arXiv 2309.10019)."""

    def mlp_out(self, inner: Tensor, out: Tensor) -> Tensor:
        """Adds the bottleneck's output."""
        changed: Tensor = out + self.up(self.inner(out))
        return changed
