"""Visual prompt tuning: learned tokens (arXiv 2203.12119)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import PROMPT_TOKENS, Blocks, Width, derived_width
from lift_ray.registry import TunerConfig, register_tuner


class _PromptConfig(TunerConfig):
    length: Width | None = None

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The number of tokens."""
        return {"length": self.length or derived_width(num_classes, num_tuned)}


class VptShallowConfig(_PromptConfig):
    """Learned tokens before the first block (arXiv 2203.12119)."""

    kind: Literal["vpt_shallow"] = "vpt_shallow"
    length: Width | None = None
    """Number of tokens; derived as 2^max(0, floor(log2(K / L))), L = blocks of the tower."""


class VptDeepConfig(_PromptConfig):
    """Learned tokens, different ones in each block (arXiv 2203.12119)."""

    kind: Literal["vpt_deep"] = "vpt_deep"
    length: Width | None = None
    """Number of tokens in a block; derived as 2^max(0, floor(log2(K / L)))."""
    blocks: Blocks = None
    """Block numbers from 0, or {last: K} for the last K; all when not given. Tokens stay until the next tuned block replaces them."""


def build(tower: Any, block: int, length: int) -> Any:
    """The tuner of one block."""
    from lift_ray.model.tuners.prompt.module import Prompt

    return Prompt(tower.shape.width, tower.patch_px, length, tower.prompts_at)


for _config in (VptShallowConfig, VptDeepConfig):
    register_tuner(_config, build, owns=PROMPT_TOKENS, not_in_text="use head.context for learned tokens of texts")
