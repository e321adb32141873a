"""Field types and words that the settings of tuners share."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from lift_ray.registry import Config, TunerConfig

Width = Annotated[int, Field(ge=1)]
Numbers = list[Annotated[int, Field(ge=0)]]


class LastBlocks(Config):
    """The last blocks of the backbone, whatever its depth."""

    last: Annotated[int, Field(ge=1)]
    """Number of blocks."""


_NUMBERS: TypeAdapter[Numbers] = TypeAdapter(Numbers, config=ConfigDict(strict=True))


def _by_form(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate each form by itself: an error of the union would list the faults of both."""
    if isinstance(value, dict):  # a misspelt key is one fault: `last` is not missing as well
        return LastBlocks.model_validate({"last": 1} | value if value.keys() - {"last"} else value)
    if isinstance(value, list):
        return _NUMBERS.validate_python(value)
    if value is not None and not isinstance(value, LastBlocks):
        raise ValueError(f"must be a list of block numbers or {{last: K}}, but got {value!r}; change it")
    return handler(value)


Blocks = Annotated[
    Numbers | LastBlocks | None,
    WrapValidator(_by_form),
    Field(description="Block numbers from 0, or {last: K} for the last K; all when not given."),
]

_WIDTH: TypeAdapter[Width | None] = TypeAdapter(Width | None, config=ConfigDict(strict=True))
_WIDTHS: TypeAdapter[list[Width]] = TypeAdapter(
    Annotated[list[Width], Field(min_length=1)], config=ConfigDict(strict=True)
)


def _one_or_many(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate each form by itself, as `_by_form`."""
    return (_WIDTHS if isinstance(value, list) else _WIDTH).validate_python(value)


Bottleneck = Annotated[Width | list[Width] | None, WrapValidator(_one_or_many)]


class BottleneckConfig(TunerConfig):
    """The settings of a tuner with a bottleneck in each tuned block, of one width or of one for each block in ascending order."""

    bottleneck: Bottleneck = None
    blocks: Blocks = None

    divisor: ClassVar[int] = 2
    """The derived width is 2^max(0, floor(log2(K / (divisor * L)))) for K classes and L tuned blocks."""

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """The bottleneck."""
        return {"bottleneck": self.bottleneck or derived_width(num_classes, self.divisor * num_tuned)}

    def problem(self, num_blocks: int) -> str:
        """Not one width for each tuned block."""
        tuned = len(self.blocks) if isinstance(self.blocks, list) else num_blocks
        if not isinstance(self.bottleneck, list) or len(self.bottleneck) == tuned:
            return ""
        return (
            f"bottleneck: must be one width, or a list of {tuned}, one for each tuned block, but got {self.bottleneck}; "
            "change it"
        )


# TunerKind.owns: two tuners of one model must not own the same
PROMPT_TOKENS = "own the prompt tokens"
TOWER_WEIGHTS = "train the tower's own weights, and share some of them"


def derived_width(num_classes: int, divisor: int) -> int:
    """2^max(0, floor(log2(K / divisor))): LIFT's rule for bottlenecks (arXiv 2309.10019)."""
    return 1 << max(0, math.floor(math.log2(num_classes / divisor)))
