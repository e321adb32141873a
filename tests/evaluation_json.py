"""The document of `evaluate --json`, flat: the last figures, and what there is of an ensemble and of new images."""

from __future__ import annotations

import json
from typing import Any


def flat_evaluation(printed: str) -> dict[str, Any]:
    found = json.loads(printed)
    return {**found["figures"][-1], **(found["ensemble"] or {}), **(found["new_images"] or {})}
