"""The module of visual prompt tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lift_ray.model.tuners.base import BlockTuner


class Prompt(BlockTuner):
    """Learned tokens after the class token, in the place of those that are there (VPT, arXiv 2203.12119).

    Uniform in +-sqrt(6 / (3 patch^2 + D)) at the start, as there.

    Args:
        at: number of tokens before them: 1, or 0 in a tower without a class token.
    """

    def __init__(self, width: int, patch_px: int, length: int, at: int = 1) -> None:
        super().__init__()
        self.at = at
        bound = math.sqrt(6 / (3 * patch_px**2 + width))
        self.prompt = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))

    def tokens(self, x: Tensor, num_prompts: int) -> tuple[Tensor, int]:
        """(B, 1 + n + P, D) -> (B, 1 + L + P, D), without the 1 in a tower without a class token."""
        prompt = self.prompt.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.at], prompt, x[:, self.at + num_prompts :]], dim=1), len(self.prompt)
