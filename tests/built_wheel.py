"""The wheel of this repository, for the tests that install or unpack it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def built_wheel(folder: Path) -> Path:
    """Build it as `pip wheel` does, without an environment of its own, which would need the network."""
    pytest.importorskip("hatchling", reason="needs hatchling, which .[dev] installs")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (built,) = folder.glob("lift_ray-*.whl")
    return built
