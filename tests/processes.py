"""Waiting for what other processes do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 150, every_s: float = 0.05) -> Any:
    """Return the first true value of `condition`. Raises AssertionError if there is none in time."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, f"{what}: not within {seconds:g} s"
        time.sleep(every_s)
    return value


def stopping_itself(verb: str, when: str) -> list[str]:
    """Return a command that runs a verb and stops when its progress comes and `when`, an expression, is true.

    It stops with all its threads, wherever they are. A test that kills it then is never too late on a busy machine.
    """
    code = f"""
import os, runpy, signal
from contextlib import nullcontext
from pathlib import Path
from lift_ray.terminal import image_progress

def advance(done, total):
    if {when}:
        os.kill(os.getpid(), signal.SIGSTOP)

image_progress.image_progress = lambda: nullcontext(advance)
runpy.run_module("lift_ray.{verb}", run_name="__main__", alter_sys=True)
"""
    return [sys.executable, "-c", code]


def wait_until_it_stops(process: subprocess.Popen[Any]) -> None:
    def is_stopped() -> bool:
        assert process.poll() is None, "it ended before it stopped"
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED

    wait_for("SIGSTOP", is_stopped)
