"""The tuners of a run: any registered kind, and which two go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    elif not (one.changes_features and other.changes_features):
        reason = "one of them trains nothing before the classifier"
    elif one.owns and one.owns == other.owns:
        reason = f"both {one.owns}"
    else:
        return
    raise ValueError(f"must change other places than tuner, but got {first} and {second}: {reason}; remove one")


def resolve_tuner(tuner: TunerConfig, where: str, num_classes: int, num_blocks: int, width: int) -> TunerConfig:
    """A tuner with blocks and sizes filled in.

    Args:
        where: name of the section, for errors.

    Raises ValueError when a block number is outside 0 ... num_blocks - 1, or more last blocks are asked for than there are.
    """
    num_tuned = num_blocks
    if hasattr(tuner, "blocks"):
        given = tuner.blocks
        last = num_blocks if given is None else getattr(given, "last", None)
        if last is not None and last > num_blocks:
            raise ValueError(f"{where}.blocks.last: must lie in 1 ... {num_blocks}, but got {last}; lower it")
        blocks = sorted(set(given)) if last is None else list(range(num_blocks - last, num_blocks))
        if not blocks or blocks[-1] >= num_blocks:
            raise ValueError(f"{where}.blocks: must lie in 0 ... {num_blocks - 1}, but got {given}; name at least one")
        tuner, num_tuned = tuner.model_copy(update={"blocks": blocks}), len(blocks)
    if problem := tuner.problem(num_blocks):
        raise ValueError(f"{where}.{problem}")
    return tuner.model_copy(update=tuner.derived(num_classes, num_tuned, width))
