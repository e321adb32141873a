"""Which trials train in one pass, and how many: a pack is decoded and goes through the frozen blocks once (training/together.py)."""

from __future__ import annotations

from lift_ray.registry import TUNERS, TunerConfig
from lift_ray.searching.jobs import TrainJob
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile

MOST = 8  # trials in a pack: what more would save is small, and the first result comes later
ROUNDS = 4  # how often, at least, a sampler that learns from results draws trials for all slots
BLIND = ("random", "grid")  # samplers that learn nothing


def shared_by(job: TrainJob) -> RunConfig | None:
    """Return what trials of a pack must agree in: the settings of their batches. None for a trial that is to train alone.

    It is alone if there is nothing to share: its images come again, so that features of frozen blocks are cached, or it tunes the
    first block. And micro-batches and compiled blocks compute frozen blocks in another way, with results that differ in the
    last bits.
    """
    config = RunConfig.model_validate(job.config)
    optim, augment = config.optim, config.augment
    is_alone = (
        job.then
        or config.method.kind != "lift"
        or config.tuner.kind == "zero_shot"
        or augment.is_fixed
        or config.backbone.compile
        or optim.accumulate > 1
        or not all(_leaves_frozen(tuner) for tuner in config.tuners())
    )
    if is_alone:
        return None
    of_batches = {"epochs", "global_batch_size", "sampling", "shuffle_mib", "decode_processes", "data_frac"}
    drawn = RunConfig().optim.model_copy(update=optim.model_dump(include=of_batches))
    return RunConfig(seed=config.seed, backbone=config.backbone, augment=augment, optim=drawn)


def _leaves_frozen(tuner: TunerConfig) -> bool:
    """Return True if a tuner leaves the first block as it is; one of the last blocks is taken to."""
    blocks = getattr(tuner, "blocks", None)
    if not TUNERS[tuner.kind].changes_tower or hasattr(tuner, "last") or hasattr(blocks, "last"):
        return True
    return blocks is not None and 0 not in blocks


def size_of(space: SpaceFile, left: int, num_slots: int) -> int:
    """Return how many trials a pack may have at most.

    Args:
        left: number of trials that are not over; each slot gets its part of them.
    """
    if space.scale.fused == "off":
        return 1
    most = -(-left // num_slots)
    if space.search.sampler not in BLIND:
        most = min(most, space.num_trials // (ROUNDS * num_slots))
    return max(1, min(MOST, most))
