"""Field types and words that the settings of tuners share."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

Width = Annotated[int, Field(ge=1)]
Blocks = Annotated[
    list[Annotated[int, Field(ge=0)]] | None, Field(description="Block numbers from 0; all when not given.")
]

# TunerKind.owns: two tuners of one model must not own the same
PROMPT_TOKENS = "own the prompt tokens"
TOWER_WEIGHTS = "train the tower's own weights, and share some of them"


def derived_width(num_classes: int, divisor: int) -> int:
    """2^max(0, floor(log2(K / divisor))): LIFT's rule for bottlenecks (arXiv 2309.10019)."""
    return 1 << max(0, math.floor(math.log2(num_classes / divisor)))
