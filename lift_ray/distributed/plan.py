"""What a run would do and need: digest, trained parameters, steps, memory. Nothing is trained, and Ray is not started."""

from __future__ import annotations

import torch

from lift_ray.data.catalog import Dataset, Split
from lift_ray.data.stream import AHEAD, memory_bytes, steps_per_epoch
from lift_ray.distributed.ranks import Ranks
from lift_ray.distributed.warm import DTYPES, Warm
from lift_ray.errors import BadInput
from lift_ray.methods.lift import Lift
from lift_ray.settings.run import RunConfig, RunFile

MIB = 2**20
PROBE_IMAGES = 2


def plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> tuple[RunConfig, dict[str, str]]:
    """The resolved settings, and a line for each thing that a user wants to know beforehand. Raises BadInput.

    Where the tower's weights cannot be had, what depends on them is said to be unknown.
    """
    config, split = run.config, data.split("train")
    model, unknown = None, ""
    try:
        model, config = _build(config, data)
    except BadInput as error:
        if "could not be loaded" not in str(error):
            raise
        unknown = str(error)
    batch, epochs = config.optim.global_batch_size, config.optim.epochs
    steps = steps_per_epoch(split, batch)
    lines = {
        "digest": config.digest(),
        "workers": f"{workers}, {batch // workers} of {batch} images a step each",
        "steps": f"{steps:,} an epoch, {steps * epochs:,} in all; a checkpoint after each epoch and every {checkpoint_s:g} s",
    }
    if model is None:
        return config, lines | {"trained parameters and memory": f"unknown; {unknown}"}
    parts = memory(model, config, batch // workers * (1 + 2 * getattr(config.method, "unlabelled_ratio", 0))) | {
        "encoded pictures": _encoded_bytes(split, config.optim.shuffle_bytes)
    }
    each = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items())
    return config, lines | {
        "trained parameters": f"{sum(p.numel() for p in model.trained().values()):,}",
        "memory of a worker": f"about {sum(parts.values()) / MIB:,.0f} MiB, without Python, torch and CUDA: {each}",
    }


def _encoded_bytes(split: Split, shuffle_bytes: int) -> int:
    return min(memory_bytes(split, shuffle_bytes), sum(sum(shard.row_group_bytes) for shard in split.shards))


def _build(config: RunConfig, data: Dataset) -> tuple[Lift, RunConfig]:
    """The model, with a classifier that starts anywhere, and the resolved settings."""
    warm = Warm(data.uri, Ranks.alone())
    # Here may be no GPU, and the classifier's start costs time and does not change a size.
    plain = config.model_copy(update={"backbone": config.backbone.model_copy(update={"precision": "fp32"})})
    resolved = warm.resolve(plain)
    return warm.build(resolved, trained_already=True), resolved.model_copy(update={"backbone": config.backbone})


def memory(model: Lift, config: RunConfig, images: int) -> dict[str, int]:
    """Bytes that a worker holds while it trains, by what they are.

    Activations are those that a step on PROBE_IMAGES images keeps for its backward pass, scaled up; a batch of pictures is
    held for each that is made ahead.

    Args:
        images: of a worker in one step.
    """
    value_bytes = DTYPES[config.backbone.precision].itemsize
    trained = sum(p.numel() for p in model.trained().values())
    tower = sum(p.numel() for p in model.tower.parameters())
    at_once = -(-images // config.optim.accumulate)
    picture = 3 * model.tower.resolution_px**2
    return {
        "tower": 4 * tower,
        "trained, gradients and momentum": 3 * 4 * trained,
        "activations": int(saved_bytes(model) / PROBE_IMAGES * at_once * value_bytes / 4) if trained else 0,
        "batches": (AHEAD + 2) * images * picture + 4 * images * picture,
    }


def saved_bytes(model: Lift) -> int:
    """Bytes of fp32 activations that autograd keeps after a forward pass of PROBE_IMAGES images, each tensor counted once."""
    px = model.tower.resolution_px
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model(torch.zeros(PROBE_IMAGES, 3, px, px))
    del kept
    return sum(found.values())
