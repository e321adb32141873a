"""Weights of a backbone from a file that the user names: read without running code of the file, in float32, compared with the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lift_ray.errors import BadInput, one_line
from lift_ray.model.quickgelu import published
from lift_ray.storage.file_kinds import SAFETENSORS, TORCH_SAVE, TORCH_SCRIPT, file_kind, remedy

PLACE = "backbone.pretrained"
WHOLE_DIGEST = 64  # hex digits
SIZES = ("input_resolution", "context_length", "vocab_size")
POSITIONS, TEXT_POSITIONS = "visual.positional_embedding", ("positional_embedding", "text.positional_embedding")


def check_kind(path: str, kinds: tuple[str, ...] = (SAFETENSORS, TORCH_SAVE), place: str = PLACE) -> str:
    """Return the kind of a file. Raises BadInput if it is none of `kinds`, or cannot be read.

    With torch.save, OpenAI's TorchScript archives are accepted too.
    """
    try:
        kind = file_kind(Path(path))
    except OSError as error:
        raise _unreadable(path, error) from None
    if kind not in kinds and not (kind == TORCH_SCRIPT and TORCH_SAVE in kinds and _is_openais(path)):
        raise BadInput(place, f"must be {' or '.join(kinds)}", but=f"{path} is {kind}", remedy=remedy(kind))
    return kind


def _is_openais(path: str) -> bool:
    """Return True for OpenAI's own TorchScript archive. Any other contains code of whoever made it.

    The whole SHA-256 digest must be known: the eight digits that open_clip lists of other files could be forged.
    """
    known = published(path)
    return known is not None and len(known.digest) == WHOLE_DIGEST


def read_weights(path: str, kinds: tuple[str, ...] = (SAFETENSORS, TORCH_SAVE)) -> dict[str, Tensor]:
    """Read the tensors of a file by name, floating point as float32: torch cannot resize half precision on a CPU.

    A training checkpoint of open_clip holds them as `state_dict`, and `module.` before each name.

    Raises BadInput if the file is of another kind, is damaged, or holds more than tensors.
    """
    read = READERS[check_kind(path, kinds)]
    try:
        state: Any = read(path)
    except (
        Exception
    ) as error:  # of safetensors, pickle, zip archives and torch; torch's text advises to unpickle everything
        if "weights_only" not in str(error):
            raise _unreadable(path, error) from None
        but, todo = f"{path} holds other objects, or is damaged", "save its tensors as safetensors"
        raise BadInput(PLACE, "must hold tensors and nothing else", but=but, remedy=todo) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(PLACE, "must hold tensors by name", but=f"{path} does not", remedy="save a state_dict")
    return {
        str(name).removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def _safetensors(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _torch_save(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _torch_script(path: str) -> dict[str, Tensor]:
    """Return the tensors of OpenAI's archive, without the sizes that it keeps beside them."""
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated; these archives exist in no other form
        state = torch.jit.load(path, map_location="cpu").state_dict()
    return {name: value for name, value in state.items() if name not in SIZES}


READERS: dict[str, Callable[[str], Any]] = {
    SAFETENSORS: _safetensors,
    TORCH_SAVE: _torch_save,
    TORCH_SCRIPT: _torch_script,
}


def _unreadable(path: str, error: Exception) -> BadInput:
    return BadInput(PLACE, "must be a readable file", but=f"{path} is not ({one_line(error)})", remedy="copy it again")


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], model: str, path: str) -> None:
    """Raise BadInput, with the first differences, unless the file has the names and shapes of the model."""
    faults = {
        "without": expected.keys() - state.keys(),
        "with": state.keys() - expected.keys(),
        "with another shape of": {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape},
    }
    found = [f"{how} {', '.join(sorted(keys)[:4])}" for how, keys in faults.items() if keys]
    if found:
        raise BadInput(
            PLACE, f"must contain the tensors of {model}", f"{path} {' and '.join(found)}", "use a file of this model"
        )


def fill_clip(clip: Any, model: str, path: str) -> None:
    """Load a file into open_clip's model, strictly; position embeddings may be for another size, as open_clip allows.

    The steps are those of `open_clip.load_checkpoint`, which would resize before it compares, and in half precision.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state, expected = convert_state_dict(clip, read_weights(path)), clip.state_dict()
    if not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == expected[name].numel():
            state[name] = state[name].reshape(expected[name].shape)
    resizable = {name for name in (POSITIONS, *TEXT_POSITIONS) if _can_resize(name, state, expected)}
    check_fit(expected, {**state, **{name: expected[name] for name in resizable}}, model, path)
    resize_pos_embed(state, clip)
    resize_text_pos_embed(state, clip)
    clip.load_state_dict(state, strict=True)


def _can_resize(name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Return True for position embeddings (N, D) of the model's width, those of an image for a square grid and a class token."""
    if name not in state or name not in expected or state[name].ndim != 2 or not len(state[name]):
        return False
    patches = len(state[name]) - 1
    is_square = name != POSITIONS or (patches > 0 and math.isqrt(patches) ** 2 == patches)
    return is_square and state[name].shape[1] == expected[name].shape[1]
