"""The plan of a run for `--dry-run`: digest, trained parameters, steps, memory. Nothing is trained, and Ray is not started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from lift_ray.data.batch_stream import AHEAD
from lift_ray.data.dataset import Dataset, Split
from lift_ray.data.order import memory_bytes, steps_per_epoch
from lift_ray.methods.lift import Lift
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import BackboneUnavailable
from lift_ray.model.text_head import TextHead
from lift_ray.settings.methods import HalfLabelledConfig
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import RunFile
from lift_ray.training.workspace import DTYPES, Workspace

MIB = 2**20
PROBE_IMAGES = 2
SINGLE = (torch.nn.LayerNorm, torch.nn.RMSNorm)  # modules whose inputs stay in fp32


def plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> tuple[RunConfig, dict[str, str]]:
    """Return the resolved settings, and a line for each part of the plan. Raises BadInput.

    If the backbone cannot be loaded, for example without network, the lines that depend on it say "unknown".
    """
    config, split = run.config, data.split("train").subset(run.config.optim.data_frac)
    model, unknown = None, ""
    try:
        model, config = _build(config, data)
    except BackboneUnavailable as error:
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
    views = 2 * config.method.unlabelled_ratio if isinstance(config.method, HalfLabelledConfig) else 0
    parts = memory(model, config, batch // workers * (1 + views)) | {
        "encoded images": _encoded_bytes(split, config.optim.shuffle_bytes)
    }
    each = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items())
    return config, lines | {
        "trained parameters": f"{sum(p.numel() for p in model.trained().values()):,}",
        "memory of a worker": f"about {sum(parts.values()) / MIB:,.0f} MiB, without Python, torch and CUDA: {each}",
    }


def _encoded_bytes(split: Split, shuffle_bytes: int) -> int:
    return min(memory_bytes(split, shuffle_bytes), sum(sum(shard.row_group_bytes) for shard in split.shards))


def _build(config: RunConfig, data: Dataset) -> tuple[Lift, RunConfig]:
    """Return the model, its classifier not initialized, and the resolved settings."""
    workspace = Workspace(data, Ranks.alone())
    # This machine may have no GPU, so the precision is fp32. Initializing the classifier takes time and changes no size.
    plain = config.model_copy(update={"backbone": config.backbone.model_copy(update={"precision": "fp32"})})
    resolved = workspace.resolve(plain)
    return workspace.build(resolved, trained_already=True), resolved.model_copy(update={"backbone": config.backbone})


def memory(model: Lift, config: RunConfig, images: int) -> dict[str, int]:
    """Estimate the bytes that a worker needs in training, by kind.

    Activations are measured in a forward pass of PROBE_IMAGES images and scaled up. Each batch that is prepared ahead counts.

    Args:
        images: number of images of a worker in one step.
    """
    trained = sum(p.numel() for p in model.trained().values())
    tower, head = sum(p.numel() for p in model.tower.parameters()), model.head
    px, at_once = model.tower.resolution_px, -(-images // config.optim.accumulate)
    image = 3 * px**2
    value_bytes = DTYPES[config.backbone.precision].itemsize
    of_texts = 0  # activations of the text side, which are the same for any number of images
    if isinstance(head, TextHead):
        tower += sum(p.numel() for p in head.tower.parameters())
        of_texts = saved_bytes(head, value_bytes, head.text)
        model.head = head.constant()
    try:
        probed = saved_bytes(model, value_bytes, lambda: model(torch.zeros(PROBE_IMAGES, 3, px, px)))
    finally:
        model.head = head
    return {
        "tower": 4 * tower + (value_bytes * tower if value_bytes < 4 else 0),  # autocast keeps a copy
        "trained, gradients and optimizer": (4 if config.optim.optimizer == "adamw" else 3) * 4 * trained,
        "activations": int(probed / PROBE_IMAGES * at_once) + of_texts if trained else 0,
        "batches": (AHEAD + 2) * images * image + 4 * images * image,
    }


def saved_bytes(model: Lift | TextHead, value_bytes: int, forward: Callable[[], torch.Tensor]) -> int:
    """Measure the bytes of activations that autograd saves in a forward pass, each tensor counted once.

    Inputs of layer norms stay in fp32 even if the products use a smaller type. With activation checkpointing the result is the input of
    every block, plus what the largest one saves while it is recomputed: blocks of stages differ.

    Args:
        forward: the forward pass of the model, or of a part of it.
    """
    tower = model.tower
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, int]] = {}  # by storage: the block that saved it first, counted from 1, and its bytes
    single: dict[int, int] = {}
    inputs: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found.setdefault(storage.data_ptr(), (len(inputs), storage.nbytes()))
        return tensor

    def note_single(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].requires_grad or any(p.requires_grad for p in module.parameters()):
            single[given[0].untyped_storage().data_ptr()] = 4

    def note_input(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(given[0].numel() * 4 if given[0].requires_grad else 0)

    hooks = [m.register_forward_pre_hook(note_single) for m in model.modules() if isinstance(m, SINGLE)]
    hooks += [block.register_forward_pre_hook(note_input) for block in getattr(tower, "blocks", ())]
    before, tower.checkpointing = tower.checkpointing, False
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = forward()
    finally:
        tower.checkpointing = before
        for hook in hooks:
            hook.remove()
    del kept
    by_block = Counter[int]()
    for pointer, (block, number) in found.items():
        by_block[block] += number * single.get(pointer, value_bytes) // 4
    if before and any(inputs):
        return sum(inputs) + max(by_block.values())
    return by_block.total()
