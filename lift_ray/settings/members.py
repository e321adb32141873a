"""The runs that `method: backdoor` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from lift_ray.settings.methods import Backdoor

if TYPE_CHECKING:
    from lift_ray.settings.run import RunConfig


def member(fields: Mapping[str, Any], method: Backdoor, name: str) -> RunConfig:
    """The run of one of several models.

    Args:
        fields: of the run as a whole, by name.

    Raises ValueError in one line for settings that make no run.
    """
    from lift_ray.settings.files import explain_first
    from lift_ray.settings.run import RunConfig, apply_overrides

    own = method.members[name]
    if strange := next((key for key in own if key.split(".")[0] == "method"), None):
        raise ValueError(f"members.{name} {strange}: must not be set, since a member is a single model; remove it")
    sections = ((key, fields[key]) for key in RunConfig.model_fields if key != "method")
    tree = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in sections}
    try:
        return RunConfig.model_validate(apply_overrides(tree, own))
    except ValidationError as error:
        raise ValueError(f"members.{name} {explain_first(RunConfig, error)}") from None
