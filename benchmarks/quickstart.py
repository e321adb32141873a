"""The quickstart as a measurement: wall time, where it goes, peak memory of all its processes, and what it finds.

`--from-nothing` clones the repository into a temporary folder, installs it there as `make quickstart` does, and runs it there: the
row then also has the seconds of the installation, and the number and size of its packages.

    python benchmarks/quickstart.py --from-nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from record import record

ROOT = Path(__file__).parent.parent
SPACE = "search_spaces/quickstart.yaml"


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all below it; shared pages are counted once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def installed(folder: Path) -> dict[str, Any]:
    """Clone the repository into a folder and install it there: seconds, packages and bytes."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    began = time.monotonic()
    subprocess.run(["make", ".venv/.installed"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    return {"install_s": round(seconds, 1), **size_of(folder / ".venv")}


def size_of(environment: Path) -> dict[str, Any]:
    """Return the number of packages in a virtual environment, and its size in 10^9 bytes."""
    files = [path for path in environment.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "packages": len(list(environment.glob("lib/*/site-packages/*.dist-info"))),
        "gb": round(sum(path.stat().st_size for path in files) / 1e9, 2),
    }


def measured(python: str, folder: Path, out: Path, settings: list[str]) -> dict[str, float]:
    """Run the quickstart: seconds, and peak memory. Exits if it fails."""
    began, peak = time.monotonic(), 0
    words = [python, "-m", "lift_ray.tune", SPACE, *settings, "--out", str(out)]
    with tempfile.TemporaryDirectory() as cache:  # features of earlier searches are not found there
        running = subprocess.Popen(words, cwd=folder, env={**os.environ, "LIFT_CACHE": cache})
        while running.poll() is None:
            peak = max(peak, memory(psutil.Process(running.pid)))
            time.sleep(10)  # reading the shares of all pages costs seconds of processor time
    if running.returncode:
        sys.exit(running.returncode)
    return {"wall_s": round(time.monotonic() - began, 1), "peak_memory_gib": round(peak / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-nothing", action="store_true", help="clone and install first")
    parser.add_argument("--out", type=Path, help="folder for the results (default: a temporary one)")
    parser.add_argument("settings", nargs="*", help="changes of the space file, key=value")
    options = parser.parse_args()
    out, python, folder, figures = options.out or Path(tempfile.mkdtemp()) / "out", sys.executable, ROOT, {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.from_nothing:
            folder = Path(temporary) / "lift_ray"
            figures = installed(folder)
            python = str(folder / ".venv" / "bin" / "python")
        figures |= measured(python, folder, out, options.settings)
    study = json.loads((out / "study.json").read_text())
    figures |= {"time_s": study["time_s"], "best": study["best"]["values"], "compared": study["compared"]}
    print(f"wall {figures['wall_s']:.0f} s, peak memory {figures['peak_memory_gib']:.2f} GiB")
    if options.from_nothing:
        print(f"installation {figures['install_s']:.0f} s, {figures['packages']} packages, {figures['gb']} GB")
    seeds = [study["space"]["search"]["seed"], study["best"]["config"]["seed"]]
    words = ["--from-nothing"] * options.from_nothing + options.settings
    command = " ".join(["python benchmarks/quickstart.py", *words])
    print(record("quickstart", command, figures, seeds=seeds, digest=study["best"]["digest"]))


if __name__ == "__main__":
    main()
