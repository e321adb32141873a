"""Rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lift_ray.storage.atomic import replacing


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a heading; None is an empty field."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV, atomically. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(as_csv(rows), encoding="utf-8")
