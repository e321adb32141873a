"""Results as one JSON document on stdout, for programs (docs/reference/json.md)."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from lift_ray import __version__
from lift_ray.text import say


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what the block prints on stdout, and what the programs that it starts print there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def say_json(verb: str, results: Mapping[str, object]) -> None:
    """Print the results of a verb as its JSON document."""
    document = {"verb": verb, "version": __version__, **results}
    say(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return values as JSON has them; a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
