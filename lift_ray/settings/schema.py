"""JSON schema of search-space files, for editors that complete and check YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lift_ray.errors import BadInput
from lift_ray.settings.checks import OBJECTIVES, known_paths
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import NAMED, SpaceFile
from lift_ray.storage.atomic import replacing


def space_schema() -> dict[str, Any]:
    """Return the JSON schema 2020-12 of SpaceFile, with run settings in `base` and only known names in `space` and `baselines`."""
    schema = SpaceFile.model_json_schema(by_alias=True)
    run = RunConfig.model_json_schema(ref_template="#/$defs/{model}")
    schema["$defs"] |= run.pop("$defs")
    names, parts = sorted({*known_paths(), *NAMED}), schema["properties"]
    parts["base"] = run | {"title": "Base", "description": "Settings shared by all trials.", "default": {}}
    parts["space"]["propertyNames"] = {"enum": names}
    parts["baselines"]["items"]["propertyNames"] = {"enum": ["name", *names]}
    parts["objectives"]["propertyNames"] = parts["constraints"]["propertyNames"] = {"enum": list(OBJECTIVES)}
    schema["$schema"], schema["title"] = "https://json-schema.org/draft/2020-12/schema", "lift_ray search space"
    return schema


def write_schema(path: str) -> None:
    """Write the schema to a file. Raises BadInput when it cannot be written."""
    target = Path(path)
    try:
        with replacing(target) as temporary:
            temporary.write_text(json.dumps(space_schema(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(
            "--schema", "must be a writable file", f"{path} ({error.strerror})", "choose another path"
        ) from None
