"""The quickstart as a measurement: wall time, where it goes, peak memory of all its processes, and what it finds.

python benchmarks/quickstart.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from record import record


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all below it; shared pages are counted once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    out = Path(tempfile.mkdtemp()) / "out"
    command = ["-m", "lift_ray.tune", "search_spaces/quickstart.yaml", *sys.argv[1:]]
    began = time.monotonic()
    running = subprocess.Popen([sys.executable, *command, "--out", str(out)])
    peak = 0
    while running.poll() is None:
        peak = max(peak, memory(psutil.Process(running.pid)))
        time.sleep(10)  # reading the shares of all pages costs seconds of processor time
    if running.returncode:
        sys.exit(running.returncode)
    wall_s = time.monotonic() - began
    study = json.loads((out / "study.json").read_text())
    figures = {
        "wall_s": round(wall_s, 1),
        "time_s": study["time_s"],
        "peak_memory_gib": round(peak / 2**30, 2),
        "best": study["best"]["values"],
        "compared": study["compared"],
    }
    print(f"wall {wall_s:.0f} s, peak memory {peak / 2**30:.2f} GiB")
    seeds = [study["space"]["search"]["seed"], study["best"]["config"]["seed"]]
    print(record("quickstart", "python benchmarks/quickstart.py", figures, seeds=seeds, digest=study["best"]["digest"]))


if __name__ == "__main__":
    main()
