"""Steps that rebuilding the towers of open_clip and of timm have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.model.blocks import Activation, MakeNorm
from lift_ray.model.tower import FrozenTower

OPEN_CLIP_BLOCKS = {  # names of open_clip's transformers, image and text, and ours
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.in_proj.",
    ".c_fc.": ".in_proj.",
    ".c_proj.": ".out_proj.",
    ".ls_1.": ".attn.",
    ".ls_2.": ".mlp.",
}


@dataclass(frozen=True)
class Rebuilt:
    """An empty tower, and the weights of its origin under our names.

    Attributes:
        names: our name of each tensor that the origin has too -> the origin's name.
    """

    tower: FrozenTower
    state: dict[str, Tensor]
    names: dict[str, str]

    def filled(self) -> FrozenTower | None:
        """Return the tower with its weights, frozen; None if they do not fit, which means that the origin has other parts."""
        try:
            self.tower.load_state_dict(self.state, strict=True, assign=True)
        except RuntimeError:
            return None
        self.tower.origin_names = self.names if len(self.names) == len(self.state) else None
        return self.tower.eval().requires_grad_(False)


def rebuilt(tower: Any, state: Mapping[str, Tensor], renamed: Mapping[str, str]) -> Rebuilt:
    """Return an empty tower with the tensors of its origin, every part of a name replaced that `renamed` holds.

    Parts that begin with a dot are replaced in blocks only.
    Layer scales become part of the projection before them, and linears without bias get one of zeros.
    """
    names = {}
    for theirs in state:
        ours = theirs
        for old, new in renamed.items():
            if not old.startswith(".") or ours.startswith("blocks."):
                ours = ours.replace(old, new)
        names[ours] = theirs
    ours_state = {ours: state[theirs] for ours, theirs in names.items()}
    _fold_scales(ours_state)
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and f"{name}.weight" in ours_state:
            ours_state.setdefault(f"{name}.bias", ours_state[f"{name}.weight"].new_zeros(module.out_features))
    kept = {ours: theirs for ours, theirs in names.items() if ours_state.get(ours) is state[theirs]}
    return Rebuilt(tower, ours_state, kept)


def adopted(module: nn.Module) -> nn.Module:
    """Return a copy of a module that holds the same tensors: what changes it later leaves its origin alone."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _fold_scales(state: dict[str, Tensor]) -> None:
    """Multiply each layer scale, `PLACE.gamma`, into the projection that its place names."""
    for key in [key for key in state if key.endswith(".gamma")]:
        projection, gamma = f"{key.removesuffix('.gamma')}.out_proj", state.pop(key)
        state[f"{projection}.weight"] = gamma[:, None] * state[f"{projection}.weight"]
        if f"{projection}.bias" in state:
            state[f"{projection}.bias"] = gamma * state[f"{projection}.bias"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def activation_of(module: nn.Module) -> Activation | None:
    """Return the function of an activation module of open_clip or timm; None for one that the towers do not know."""
    name = type(module).__name__
    if name == "QuickGELU":
        return quick_gelu
    if name in ("GELU", "GELUTanh"):
        tanh = name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
        return partial(F.gelu, approximate="tanh") if tanh else F.gelu
    known: dict[str, Callable[[Tensor], Tensor]] = {"SiLU": F.silu, "ReLU": F.relu}
    return known.get(name)


def norm_like(norm: nn.Module) -> MakeNorm | None:
    """Return the function from a width to a norm of the same kind; None for a kind that the towers do not know."""
    name = type(norm).__name__
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return partial(nn.LayerNorm, eps=norm.eps, bias=norm.bias is not None)
    if name in ("RMSNorm", "RmsNorm"):
        return partial(nn.RMSNorm, eps=float(norm.eps))  # type: ignore[arg-type]
    return None
