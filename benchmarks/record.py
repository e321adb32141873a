"""Writes measured figures as rows under benchmarks/results/, with what it takes to measure them again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "optuna", "open_clip_torch", "pyarrow")


def typed() -> str:
    """Return the command of this process as it can be typed anywhere, without --resume."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *(word for word in sys.argv[1:] if word != "--resume")]
    return shlex.join(["python", *map(without_place, words)])


def without_place(word: str) -> str:
    """Return the last part of an absolute path in capitals, and anything else as it is."""
    return Path(word).name.upper() if Path(word).is_absolute() else word


def record(name: str, command: str, figures: dict[str, Any], *, seeds: list[int], digest: str = "") -> Path:
    """Append one row to benchmarks/results/NAME.jsonl.

    Args:
        command: what to type to measure it again, from the project's root.
        digest: of the settings, where one run is behind the figures.
    """
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    row = {
        "date": date.today().isoformat(),
        "command": command,
        "commit": commit,
        "digest": digest,
        "seeds": seeds,
        "figures": figures,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


def _cpu() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor()
