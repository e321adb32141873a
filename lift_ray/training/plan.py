"""What a run would do and need: digest, trained parameters, steps, memory. Nothing is trained, and Ray is not started."""

from __future__ import annotations

import torch

from lift_ray.data.batches import AHEAD
from lift_ray.data.dataset import Dataset, Split
from lift_ray.data.order import memory_bytes, steps_per_epoch
from lift_ray.errors import BadInput
from lift_ray.methods.lift import Lift
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import RunFile
from lift_ray.training.workspace import DTYPES, Workspace

MIB = 2**20
PROBE_IMAGES = 2


def plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> tuple[RunConfig, dict[str, str]]:
    """The resolved settings, and a line for each thing that a user wants to know beforehand. Raises BadInput.

    Where the tower's weights cannot be had, what depends on them is said to be unknown.
    """
    config, split = run.config, data.split("train").share(run.config.optim.data_frac)
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
    warm = Workspace(data.uri, Ranks.alone())
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
    trained = sum(p.numel() for p in model.trained().values())
    tower = sum(p.numel() for p in model.tower.parameters())
    at_once = -(-images // config.optim.accumulate)
    picture = 3 * model.tower.resolution_px**2
    value_bytes = DTYPES[config.backbone.precision].itemsize
    return {
        "tower": 4 * tower + (value_bytes * tower if value_bytes < 4 else 0),  # autocast keeps a copy
        "trained, gradients and momentum": 3 * 4 * trained,
        "activations": int(saved_bytes(model, value_bytes) / PROBE_IMAGES * at_once) if trained else 0,
        "batches": (AHEAD + 2) * images * picture + 4 * images * picture,
    }


def saved_bytes(model: Lift, value_bytes: int = 4) -> int:
    """Bytes of activations that autograd keeps of PROBE_IMAGES images, each tensor counted once.

    Tensors that a layer norm was given stay in fp32 also where the products are computed in less. With activation checkpointing it
    is the input of every block, and what one block keeps while it is computed again.
    """
    px, tower = model.tower.resolution_px, model.tower
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    single: dict[int, int] = {}
    inputs: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_single(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].requires_grad or any(p.requires_grad for p in module.parameters()):
            single[given[0].untyped_storage().data_ptr()] = 4

    def note_input(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(given[0].numel() * 4 if given[0].requires_grad else 0)

    hooks = [m.register_forward_pre_hook(note_single) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    hooks += [block.register_forward_pre_hook(note_input) for block in getattr(tower, "blocks", ())]
    before, tower.checkpointing = tower.checkpointing, False
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = model(torch.zeros(PROBE_IMAGES, 3, px, px))
    finally:
        tower.checkpointing = before
        for hook in hooks:
            hook.remove()
    del kept
    size = sum(number * single.get(pointer, value_bytes) // 4 for pointer, number in found.items())
    computed = sum(1 for number in inputs if number)
    return sum(inputs) + size // computed if before and computed else size
