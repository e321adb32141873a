"""Scale in simulation: searches that train nothing, datasets whose images are made up, and a study with 8,142 classes.

    python benchmarks/simulation.py search --slots 2 8 32 --trials 10000 --minutes 10 --record
    python benchmarks/simulation.py methods --slots 64 512 --trials 10000 --record
    python benchmarks/simulation.py data --images 10000000 --record
    python benchmarks/simulation.py classes --classes 8142 --record
    python benchmarks/simulation.py hours --record

Each part runs in processes of its own, so that its memory is that of the part. docs/scaling.md has the tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import record, typed

Figures = dict[str, Any]
TESTS = Path(__file__).parents[1] / "tests"


def apart(module: str, function: str, **arguments: Any) -> Figures:
    """Return what a function of a module returns in a process of its own. Exits if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [sys.executable, __file__, "--run", module, function, json.dumps(arguments), str(result)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        # for played.py and others of the tests, also in the processes that Ray starts
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [environment.get("PYTHONPATH")])])
        done = subprocess.run(words, stdout=subprocess.DEVNULL, env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        found: Figures = json.loads(result.read_text())
        return found


def search(args: argparse.Namespace) -> Iterator[Figures]:
    """Searches with real slot processes, and what a driver that resumes them needs."""
    for slots in args.slots:
        with tempfile.TemporaryDirectory() as folder:
            given = {"out": folder, "trials": args.trials, "sampler": args.sampler}
            found = apart("simulated_search", "drive", **given, slots=slots, every=args.every, minutes=args.minutes)
            yield found | apart("simulated_search", "resume", **given)


def methods(args: argparse.Namespace) -> Iterator[Figures]:
    """The methods of the searcher and the scheduler alone."""
    for slots in args.slots:
        with tempfile.TemporaryDirectory() as folder:
            given = {"trials": args.trials, "sampler": args.sampler, "every": args.every, "minutes": args.minutes}
            yield apart("simulated_search", "call_methods", out=folder, slots=slots, **given)


def data(args: argparse.Namespace) -> Iterator[Figures]:
    """A dataset of made-up images: conversion, opening, order of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIFT_CACHE"] = f"{folder}/cache"
        found = apart("simulated_data", "convert", folder=folder, images=args.images, classes=args.classes)
        yield found | apart("simulated_data", "opened", folder=folder)


def classes(args: argparse.Namespace) -> Iterator[Figures]:
    """Many classes beside 100: memory, text start, report; and the report of many trials."""
    for number in (100, args.classes):
        given = {"images": max(60 * number, 2000), "classes": number}
        yield {"of": "model"} | apart("simulated_classes", "model", **given)
        yield {"of": "report"} | apart("simulated_classes", "report", **given, trials=24)
    yield {"of": "report"} | apart("simulated_classes", "report", images=6000, classes=100, trials=args.trials)


def hours(args: argparse.Namespace) -> Iterator[Figures]:
    """Searches beside the hours that the model predicts for them."""
    for slots in args.slots:
        with tempfile.TemporaryDirectory() as folder:
            yield {"of": "played"} | apart("simulated_hours", "played", out=folder, slots=slots, trials=8 * slots)
    for slots in (1, 2):
        yield {"of": "real"} | apart("simulated_hours", "real", slots=slots)


PARTS = {"search": search, "methods": methods, "data": data, "classes": classes, "hours": hours}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        module, function, arguments, result = sys.argv[2:]
        found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
        Path(result).write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--sampler", choices=["random", "tpe"], default="random")
    parser.add_argument("--every", type=int, default=1000, help="trials between two notes")
    parser.add_argument("--minutes", type=float, default=10, help="of a search, which then stops")
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=8142)
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/simulation.jsonl")
    args = parser.parse_args()
    for found in PARTS[args.part](args):
        print(json.dumps(found), flush=True)
        if args.record:
            record("simulation", typed(), {"part": args.part, **found}, seeds=[0])


if __name__ == "__main__":
    main()
