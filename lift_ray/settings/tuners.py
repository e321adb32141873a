"""The tuners of a run: any registered kind, and which two go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lift_ray.registry import TUNERS, TunerConfig

if TYPE_CHECKING:
    AnyTunerConfig = TunerConfig
else:
    AnyTunerConfig = TUNERS.union()


def check_pair(first: str, second: str) -> None:
    """Raises ValueError, with the reason, when two kinds of tuner do not go together."""
    one, other = TUNERS[first], TUNERS[second]
    if first == second:
        reason = "they are the same"
    elif not (one.changes_tower and other.changes_tower):
        reason = "one of them trains nothing in the tower"
    elif one.owns and one.owns == other.owns:
        reason = f"both {one.owns}"
    else:
        return
    raise ValueError(f"must change other places than tuner, but got {first} and {second}: {reason}; remove one")


def resolve_tuner(tuner: TunerConfig, where: str, num_classes: int, num_blocks: int, width: int) -> TunerConfig:
    """A tuner with blocks and sizes filled in.

    Args:
        where: name of the section, for errors.

    Raises ValueError when a block number is outside 0 ... num_blocks - 1.
    """
    filled: dict[str, Any] = {}
    num_tuned = num_blocks
    if problem := tuner.problem(num_blocks):
        raise ValueError(f"{where}.{problem}")
    if hasattr(tuner, "blocks"):
        blocks = sorted(set(tuner.blocks)) if tuner.blocks is not None else list(range(num_blocks))
        if not blocks or blocks[-1] >= num_blocks:
            raise ValueError(
                f"{where}.blocks: must lie in 0 ... {num_blocks - 1}, but got {tuner.blocks}; name at least one"
            )
        filled["blocks"], num_tuned = blocks, len(blocks)
    return tuner.model_copy(update=filled | tuner.derived(num_classes, num_tuned, width))
