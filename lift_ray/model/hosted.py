"""Towers that are hosted: the origin's own modules run as they are, in a row, instead of being rebuilt.

ConvNeXt, FastViT (MobileCLIP 2), ResNet and Swin are cut into a stem, the residual blocks of all stages, and a pool. Any other image
tower is one piece, and only what lies behind it can be trained. Hosted modules always stay in evaluation mode: batch norms use the
statistics that they were trained with, and neither dropout nor stochastic depth is active.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lift_ray.errors import BadInput, one_line
from lift_ray.model.rebuilt import adopted
from lift_ray.model.sequence import SequenceTower
from lift_ray.model.tuners.base import BlockTuner, Identity


class HostedBlock(nn.Module):
    """A block of the origin, and what its stage does before it; a tuner sees the input and the output of the block.

    Args:
        before: the downsampling of a stage, for its first block.
        block: the residual block.
        channels_last: its tensors are (B, H, W, C), and not (B, C, H, W).
    """

    def __init__(self, before: nn.Module, block: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.before, self.block, self.channels_last = before, block, channels_last

    def forward(self, x: Tensor, tuner: BlockTuner) -> Tensor:
        """a = before(x), out = block(a), which tuners may change by `mlp_out` and `beside_mlp`; places are their tokens."""
        a = self.before(x)
        out: Tensor = self.block(a)
        if isinstance(tuner, Identity):
            return out
        shortcut = getattr(self.block, "downsample", None)  # of a ResNet, where a block changes the shape
        if shortcut is not None:
            a = shortcut(a)
        if not self.channels_last:
            a, out = a.movedim(1, -1), out.movedim(1, -1)
        out = tuner.beside_mlp(a, tuner.mlp_out(a, out))
        return out if self.channels_last else out.movedim(-1, 1)


class StagedTower(SequenceTower):
    """A frozen tower whose blocks are those of all stages, in order.

    Args:
        stem: (B, 3, H, W) -> input of the first block.
        blocks: all blocks.
        pool: the rest, up to the feature before the classifier.
        widths: channels of each block's output.
        make: name of the architecture, for error messages.
        patch_px: total stride.
        resolution_px: side of the images that the weights were trained with.

    Raises BadInput when it cannot take such images.
    """

    family = "stages"

    def __init__(
        self,
        stem: nn.Module,
        blocks: Iterable[HostedBlock],
        pool: nn.Module,
        *,
        widths: Sequence[int],
        make: str,
        patch_px: int,
        resolution_px: int,
    ) -> None:
        super().__init__()
        self.stem, self.blocks, self.pool = stem, nn.ModuleList(blocks), pool
        self.widths, self.make, self.patch_px = list(widths), make, patch_px
        self.overflows_in_fp16 = make.startswith("SwinTransformer")  # microsoft/Swin-Transformer, pull request 345
        self.num_blocks, self.checkpointing = len(self.blocks), False
        found = [type(module) for module in self.blocks.modules()]
        sorts = {"batchnorm": nn.BatchNorm2d, "layernorm": nn.LayerNorm}
        self.norm = next((kind for kind, sort in sorts.items() if any(issubclass(t, sort) for t in found)), "")
        self.eval()
        self._measured: dict[int, tuple[int, int]] = {}
        self.resolution_px = resolution_px
        self.requires_grad_(False)

    @property
    def resolution_px(self) -> int:
        """Side of the images. Setting it raises BadInput for a size that the tower cannot take."""
        return self._resolution_px

    @resolution_px.setter
    def resolution_px(self, side: int) -> None:
        try:
            self._resize(side)
            if side not in self._measured:
                self._measured[side] = _measure(self, side)
        except Exception as error:  # any module of any origin
            self._refuse(side, error)
        self._resolution_px = side
        self.width = self._measured[side][0]

    def _refuse(self, side: int, error: Exception) -> None:
        trained = getattr(self, "_resolution_px", None)
        if trained is not None:
            raise BadInput(
                "backbone.resolution_px",
                f"must be {trained} for this backbone ({self.make})",
                side,
                "remove it",
            ) from None
        raise BadInput(
            "backbone.model",
            f"must turn images of {side} px into one feature",
            but=f"this backbone ({self.make}) does not ({one_line(error)})",
            remedy="use another model",
        ) from None

    def _resize(self, side: int) -> None:
        """Prepare for images of another size."""

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation of one image in fp32."""
        return self._measured[self._resolution_px][1]

    def block_width(self, index: int) -> int:
        """Channels of a block's output."""
        return self.widths[index]


class OpaqueTower(StagedTower):
    """A tower in one piece, without places for tuners: a single block from images to the feature, so that features can be cached.

    Args:
        trunk: (B, 3, H, W) -> (B, D), with `forward_features` and `forward_head` as in timm, or else by `forward`.
        tail: what follows, up to the feature.
        make, patch_px, resolution_px: as in StagedTower.
    """

    family = "opaque"

    def __init__(self, trunk: nn.Module, tail: nn.Module, *, make: str, patch_px: int, resolution_px: int) -> None:
        block = HostedBlock(nn.Identity(), Trunk(trunk))
        super().__init__(
            nn.Identity(), [block], tail, widths=[0], make=make, patch_px=patch_px, resolution_px=resolution_px
        )
        self.widths = [self.width]

    def _resize(self, side: int) -> None:
        """Position embeddings and windows for another size, where timm knows how."""
        trunk: Any = self.blocks[0].block.trunk  # type: ignore[union-attr]
        if side != _image_px(trunk) and hasattr(trunk, "set_input_size"):
            trunk.set_input_size(side)
            self.requires_grad_(False)


class Trunk(nn.Module):
    """The feature before the classifier: (B, 3, H, W) -> (B, D)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        trunk: Any = self.trunk
        if not hasattr(trunk, "forward_head"):
            feature: Tensor = trunk(x)
        else:
            feature = trunk.forward_head(trunk.forward_features(x), pre_logits=True)
        return feature


class HostedPool(nn.Module):
    """timm's norm or convolution after the last stage, and its head up to the classifier."""

    def __init__(self, before: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.before, self.head = before, head

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        feature: Tensor = self.head(self.before(x), pre_logits=True)
        return feature


def host(
    trunk: nn.Module, name: str, *, resolution_px: int | None = None, tail: nn.Module | None = None
) -> StagedTower:
    """Return an image tower of timm, or any module with its `forward_features` and `forward_head`, as a frozen tower.

    The tower shares the origin's tensors, and the origin stays as it is. The feature is the one before the classifier.

    Args:
        trunk: the image tower.
        name: as the settings name it, for error messages.
        resolution_px: side of the images that the weights were trained with; by default what the trunk says.
        tail: what follows, up to the feature (`timm_projection`).

    Raises BadInput when the tower does not turn images of this size into one feature.
    """
    make, side = type(trunk).__name__, resolution_px or _image_px(trunk)
    if side is None:
        raise BadInput("backbone.model", "must take square images", but=f"{name} does not", remedy="use another model")
    own: Any = adopted(trunk)
    after = adopted(tail) if tail is not None else nn.Identity()
    _drop_classifier(own)
    reductions = [info["reduction"] for info in _feature_info(own)]
    common: Any = {"make": make, "patch_px": max(reductions, default=1), "resolution_px": side}
    parts = _parts(own)
    if parts is None:
        return OpaqueTower(own, after, **common)
    channels = {info["module"]: info["num_chs"] for info in _feature_info(own)}
    blocks, widths = [], []
    for stage_name, stage in parts.stages:
        before: nn.Module = nn.Sequential(*(getattr(stage, part) for part in parts.before))
        for block in stage.blocks if parts.before else stage:
            blocks.append(HostedBlock(before, block, parts.channels_last))
            widths.append(channels[stage_name])
            before = nn.Identity()
    return StagedTower(parts.stem, blocks, nn.Sequential(parts.pool, after), widths=widths, **common)


class _Parts(NamedTuple):
    """Where an architecture keeps what.

    Attributes:
        stem, pool: up to the first stage, and from the last one on.
        stages: each with its name.
        before: attributes of a stage that run before its `blocks`; none if the stage is a sequence of blocks.
        channels_last: as in HostedBlock.
    """

    stem: nn.Module
    stages: list[tuple[str, Any]]
    pool: nn.Module
    before: tuple[str, ...] = ("downsample",)
    channels_last: bool = False


def _parts(trunk: Any) -> _Parts | None:
    """The parts of an architecture whose stages are known, else None. Subclasses may compute something else."""
    kind = type(trunk)
    if not kind.__module__.startswith("timm."):
        return None
    if kind.__name__ == "ConvNeXt":
        parts = _Parts(trunk.stem, _numbered(trunk, "stages"), HostedPool(trunk.norm_pre, trunk.head))
    elif kind.__name__ == "FastVit" and not trunk.fork_feat:
        pool = HostedPool(trunk.final_conv, trunk.head)
        parts = _Parts(trunk.stem, _numbered(trunk, "stages"), pool, ("downsample", "pos_emb"))
    elif kind.__name__ in ("SwinTransformer", "SwinTransformerV2"):
        pool = HostedPool(trunk.norm, trunk.head)
        parts = _Parts(trunk.patch_embed, _numbered(trunk, "layers"), pool, channels_last=True)
    elif kind.__name__ == "ResNet":
        stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.act1, trunk.maxpool)
        stages = [(f"layer{number}", getattr(trunk, f"layer{number}")) for number in range(1, 5)]
        parts = _Parts(stem, stages, trunk.global_pool, ())
    else:
        return None
    # the downsampling of a stage without blocks would have no place
    return parts if all(len(stage.blocks if parts.before else stage) for _, stage in parts.stages) else None


def _numbered(trunk: Any, name: str) -> list[tuple[str, Any]]:
    return [(f"{name}.{index}", stage) for index, stage in enumerate(getattr(trunk, name))]


class TimmHead(NamedTuple):
    """The parts behind the trunk of open_clip's TimmModel. Without a projection the feature lies in the shared space.

    Attributes:
        projection: (D, E), from the trunk's feature to the shared space.
        bias: (E,), added after it.
        tail: modules that are no matrix, from the trunk's feature (or its map, if it does not pool) to the shared space.
    """

    projection: Tensor | None = None
    bias: Tensor | None = None
    tail: nn.Module | None = None


def timm_projection(visual: Any) -> TimmHead:
    """Return what follows the trunk of open_clip's TimmModel: its head, or without one the trunk's classifier.

    Args:
        visual: an image tower of open_clip with a `trunk` and a `head`.

    Raises BadInput for a trunk with two classifiers.
    """
    layers = [layer for layer in visual.head if not isinstance(layer, nn.Dropout | nn.Identity)]
    if not layers:
        layers = [layer for layer in (visual.trunk.get_classifier(),) if not isinstance(layer, nn.Identity)]
    if not layers:
        return TimmHead()
    last = layers[0]
    if isinstance(last, tuple):
        make = type(visual.trunk).__name__
        raise BadInput(
            "backbone.model", "must have one projection", but=f"its {make} has {len(last)}", remedy="use another model"
        )
    if len(layers) == 1 and isinstance(last, nn.Linear):
        bias: Tensor | None = last.bias
        return TimmHead(last.weight.detach().T, None if bias is None else bias.detach())
    return TimmHead(tail=nn.Sequential(*layers))


def fill_buffers(trunk: nn.Module) -> None:
    """Compute the buffers that no weights file holds (tables of positions), for a trunk that timm made on the meta device.

    Args:
        trunk: its parameters are loaded already.

    Raises BadInput for a module that does not say how.
    """
    device = next(trunk.parameters()).device
    for module in trunk.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not empty:
            continue
        for name in empty:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is None:
            raise BadInput(
                "backbone.pretrained",
                "must not be a file for this backbone",
                but=f"a file does not hold the tables of its {type(module).__name__}",
                remedy="remove it, or update timm",
            )
        compute()


def _drop_classifier(trunk: Any) -> None:
    """Replace the classifier, which the feature does not need."""
    if not hasattr(trunk, "get_classifier"):
        return
    found = trunk.get_classifier()
    classifiers = {id(module) for module in (found if isinstance(found, tuple) else (found,))}
    for name, module in list(trunk.named_modules()):
        if id(module) in classifiers and name:
            parent, _, own = name.rpartition(".")
            setattr(trunk.get_submodule(parent), own, nn.Identity())


def _feature_info(trunk: Any) -> list[dict[str, Any]]:
    """timm's table of stages; empty if there is none."""
    return [dict(info) for info in getattr(trunk, "feature_info", ())]


def _image_px(trunk: Any) -> int | None:
    """Side of the images that a trunk is made for; 224 if it does not say, None if they are not square."""
    size = getattr(trunk, "image_size", None) or getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(trunk, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return int(size[0]) if size[0] == size[1] else None


def _measure(tower: nn.Module, side: int) -> tuple[int, int]:
    """Width of the feature and bytes of the largest activation of one image, from shapes alone: nothing is computed.

    Raises whatever the modules raise for images of this size, and ValueError for another output than (B, D).
    """
    empty: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in tower.parameters()}
    empty |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in tower.buffers()}
    twin, numels = copy.deepcopy(tower, empty), list[int]()

    def note(module: nn.Module, given: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not isinstance(module, nn.Identity):  # whose output is made elsewhere
            numels.append(out.numel())

    for module in twin.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        for number in (1, 2):  # tables of relative positions do not grow with the number of images
            feature = twin(torch.empty(number, 3, side, side, device="meta"))
    if not isinstance(feature, Tensor) or feature.ndim != 2:
        raise ValueError(f"its output has the shape {tuple(getattr(feature, 'shape', ()))}")
    half = len(numels) // 2
    return feature.shape[1], 4 * max(two - one for one, two in zip(numels[:half], numels[half:], strict=True))
