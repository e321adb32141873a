"""docs/tutorials/first_model.md, as a user copies it: every block in order, in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_ports

PROJECT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIMIT_S = 400


def steps(text: str) -> list[tuple[str, list[str]]]:
    """Each block of commands, and the lines that the tutorial says it prints."""
    found: list[tuple[str, list[str]]] = []
    for kind, body in BLOCK.findall(text):
        if kind == "sh":
            found.append((body, []))
        else:
            assert kind == "text", f"neither commands nor what they print: {kind}"
            found[-1][1].extend(body.splitlines())
    return found


def missing(promised: list[str], printed: str) -> str | None:
    """The first promised line that is not printed after the ones before it; `...` stands for anything."""
    lines = iter(printed.splitlines())
    for promise in promised:
        pattern = ".*".join(re.escape(part) for part in promise.split("..."))
        if promise != "..." and not any(re.fullmatch(pattern, line.rstrip()) for line in lines):
            return promise
    return None


def test_a_line_that_is_not_printed_is_missed() -> None:
    assert missing(["one ... s", "...", "three"], "one 1 s\ntwo\nthree") is None
    assert missing(["three", "one ... s"], "one 1 s\ntwo\nthree") == "one ... s"
    assert missing(["on"], "one") == "on"


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_block_runs_and_prints_what_stands_below_it(tmp_path: Path) -> None:
    (port,) = map(str, free_ports(1))
    found = steps((PROJECT / "docs" / "tutorials" / "first_model.md").read_text().replace("8000", port))
    assert {verb for commands, _ in found for verb in re.findall(r"lift_ray\.(\w+) ", commands)} >= {
        "convert",
        "tune",
        "report",
        "train",
        "evaluate",
        "predict",
        "export",
        "serve",
    }
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for commands, promised in found:
        process = subprocess.Popen(
            ["bash", "-e", "-c", commands],
            cwd=tmp_path,
            env=environment,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # the server too, where a command before its end failed
            raise
        assert process.returncode == 0, f"{commands}\n{printed}"
        assert (line := missing(promised, printed)) is None, (
            f"{line!r} is not in what this prints:\n{commands}\n{printed}"
        )
