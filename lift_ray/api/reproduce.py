"""Reproduction of published values: run the recipes whose dataset and weights are there, and compare them with the claims."""

from __future__ import annotations

import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

from lift_ray import __version__
from lift_ray.data.open import open_dataset
from lift_ray.errors import BadInput, Stopped, did_you_mean
from lift_ray.reporting.reproduction import Claim, Measured, claims, published_data, write_pages
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run
from lift_ray.settings.search import ScaleConfig
from lift_ray.settings.shipped import PACKAGE
from lift_ray.storage.output import Output
from lift_ray.storage.store import join
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.ray_runtime.capacity import Need
    from lift_ray.searching.fixed_runs import FixedRun, FixedRuns
    from lift_ray.searching.interrupts import Interrupts

STAND_IN_DATA = "embedded:caltech101-lt"
STAND_IN: dict[str, Any] = {
    "dataset": STAND_IN_DATA,
    "backbone.model": "embedded:lift-small",
    "backbone.pretrained": None,
    "backbone.precision": "fp32",
    "backbone.resolution_px": 42,
    "optim.epochs": 1,
    "optim.global_batch_size": 32,
    "optim.data_frac": 0.05,
}
SAY_EVERY_S = 30.0
PACKAGES = ("torch", "ray", "open_clip_torch", "timm", "pyarrow")
REDO = "run the same command again to continue"


@dataclass(frozen=True)
class Planned:
    """A claim with the run that would measure it.

    Attributes:
        claim: the claim.
        dataset: path or URI of its dataset; "" without a recipe.
        config: settings of its run; None without a recipe.
        data_problem, weights_problem: what is missing; "" for nothing.
        commands: commands that bring what is missing.
    """

    claim: Claim
    dataset: str = ""
    config: RunConfig | None = None
    data_problem: str = ""
    weights_problem: str = ""
    commands: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, str]:
        """Missing data and missing weights, in words; "" for nothing."""
        return self.data_problem, self.weights_problem

    @property
    def problem(self) -> str:
        """Why it cannot run; "" if it can."""
        if self.config is None:
            return self.claim.note or "no recipe"
        return "; ".join(filter(None, self.problems))

    def for_json(self) -> dict[str, Any]:
        """Return the claim and what is missing for it, for JSON."""
        missing = {"data": self.data_problem or None, "weights": self.weights_problem or None}
        return {"claim": asdict(self.claim), "dataset": self.dataset, "missing": missing, "commands": self.commands}


def tables() -> list[str]:
    """Return the names of the tables, which are those of their datasets."""
    return list(dict.fromkeys(claim.table for claim in claims()))


def planned(table: str | None, data: str, *, stand_in: bool) -> list[Planned]:
    """Return the claims of a table, or all, with what is there for them.

    Args:
        data: folder or URL with the datasets, each under its name.
        stand_in: use embedded data and model in place of each dataset and model.

    Raises BadInput for an unknown table.
    """
    if table is not None and table not in tables():
        raise BadInput("TABLE", f"unknown table '{table}'", remedy=did_you_mean(table, [*tables(), "all"]))
    chosen = [claim for claim in claims() if table in (None, claim.table)]
    problems = {} if stand_in else _data_problems({claim.dataset for claim in chosen if claim.recipe}, data)
    return [_planned(claim, data, problems, stand_in) for claim in chosen]


def _planned(claim: Claim, data: str, problems: dict[str, str], stand_in: bool) -> Planned:
    if claim.recipe is None:
        return Planned(claim)
    dataset = STAND_IN_DATA if stand_in else join(data, claim.dataset)
    config = read_run(claim.recipe, STAND_IN if stand_in else {"dataset": dataset}).config
    if stand_in:
        return Planned(claim, dataset, config)
    from lift_ray.model.backbone import weights_are_here

    backbone, commands, weights_problem = config.backbone, [], ""
    if problems[claim.dataset]:
        words = published_data()[claim.dataset].command.format(folder=shlex.quote(dataset))
        commands.append(f"python -m lift_ray.{words}")
    if not weights_are_here(backbone.model, backbone.pretrained):
        weights_problem = f"no weights of {backbone.model}"
        given = ", ".join(repr(name) for name in (backbone.model, backbone.pretrained) if name)
        commands.append(f'python -c "import lift_ray as lr; lr.load_backbone({given})"')
    return Planned(claim, dataset, config, problems[claim.dataset], weights_problem, tuple(commands))


def _data_problems(datasets: set[str], data: str) -> dict[str, str]:
    """Return what is wrong with each dataset: it is not there, or not the published one; "" for nothing."""
    return {name: _data_problem(join(data, name), published_data()[name].training_images) for name in datasets}


def _data_problem(uri: str, published: int) -> str:
    try:
        found = open_dataset(uri, patience_s=0.0)
    except BadInput:
        return f"no dataset in {uri}"
    train = found.split("train").num_samples
    if train != published:
        return f"{uri} has {train:,} training images, but the published dataset has {published:,}"
    return "" if "test" in found.splits else f"{uri} has no test split"


@dataclass
class Reproduction:
    """Runs of the recipes of a table, and their comparison with the claims.

    Args:
        plan: the claims, from `planned`.
        seeds: number of seeds of each recipe.
        out: receives everything.
        stand_in: embedded data and model stand in. Every output says so.
        command: the user's command.
    """

    plan: Sequence[Planned]
    seeds: int
    out: Output
    stand_in: bool
    command: str

    def run(self) -> str:
        """Train and test what is not done, and return the path of the page. Continues what an earlier call began.

        Raises:
            BadInput: another process works on OUT, or a run does not fit the machine.
            RunFailed: a run failed repeatedly.
            Stopped: a signal arrived; call it again to continue.
        """
        from lift_ray.ray_runtime.capacity import num_slots
        from lift_ray.ray_runtime.session import connected, machine
        from lift_ray.searching.driver_lock import alone_in
        from lift_ray.searching.interrupts import Interrupts
        from lift_ray.terminal.waiting import waiting

        self.out.folder.mkdir(parents=True, exist_ok=True)
        datasets = list(dict.fromkeys(one.dataset for one in self.plan if not one.problem))
        with Interrupts() as interrupts, alone_in(self.out):
            self.write()
            if datasets:
                with ExitStack() as cluster:
                    with waiting("starting Ray"):
                        nodes = cluster.enter_context(connected(dashboard=False))
                    interrupts.listen()
                    need, _ = num_slots(ScaleConfig(), nodes)
                    about = {"commit": commit(), "machine": machine(), "versions": versions()}
                    for dataset in datasets:
                        self._run_on(dataset, need, about, interrupts)
        return f"{self.out}/{self.write()}"

    def _run_on(self, dataset: str, need: Need, about: dict[str, Any], interrupts: Interrupts) -> None:
        """Run the recipes of one dataset in slots that keep what they have loaded."""
        import signal

        from lift_ray.ray_runtime.capacity import slots_now
        from lift_ray.searching.engine import Engine
        from lift_ray.searching.fixed_runs import FixedRuns
        from lift_ray.searching.jobs import SlotSettings
        from lift_ray.searching.tune_run import run_jobs

        runs = [run for one in self.plan if one.dataset == dataset and not one.problem for run in self._runs(one)]
        source = FixedRuns(runs, self.out, about, changed=self.write)
        say(f"{dataset}: {count(source.num_jobs, 'job')} of training and testing, {source.num_done} done before")
        size = partial(slots_now, ScaleConfig(), need)
        is_only = need.workers == 1 and size() == 1
        slot = SlotSettings(open_dataset(dataset).uri, need, self.out.url, "reproduce", is_only=is_only)
        stop, tick = (lambda: interrupts.came), Display(source).tick
        engine = Engine(source, slot, size, should_stop=stop, on_step=tick, keeps_slots=True)
        interrupts.ask(lambda: say("stopping at the next step; interrupt again to stop at once"))
        run_jobs(engine)
        if not source.is_over:
            line = f"stopped with {source.num_done} of {count(source.num_jobs, 'job')} done; {REDO}"
            raise Stopped(line, 128 + (interrupts.signum or signal.SIGTERM))

    def _runs(self, one: Planned) -> list[FixedRun]:
        """Return the run of each seed that measures a claim."""
        assert one.config is not None
        return [self._merged[self._run(one, one.config, seed).training.key] for seed in range(self.seeds)]

    def _run(self, one: Planned, config: RunConfig, seed: int) -> FixedRun:
        from lift_ray.searching.fixed_runs import FixedRun

        name = f"{(one.claim.recipe or '').removeprefix('recipes/').replace('/', '-')}-seed-{seed}"
        dataset = STAND_IN_DATA if self.stand_in else one.claim.dataset  # wherever --data is
        return FixedRun(name, dataset, config.model_copy(update={"seed": seed}), (one.claim.tte,))

    @cached_property
    def _merged(self) -> dict[str, FixedRun]:
        """The different runs by the keys of their trainings; claims that differ in test-time ensembling share one."""
        found: dict[str, FixedRun] = {}
        for one, seed in product(self.plan, range(self.seeds)):
            if one.config is None:
                continue
            new = self._run(one, one.config, seed)
            known = found.setdefault(new.training.key, new)
            both = tuple(sorted({*known.ensembling, one.claim.tte}, reverse=True))
            found[new.training.key] = replace(known, ensembling=both)
        return found

    def measured(self) -> list[Measured]:
        """Return each claim with the values that are there."""
        from lift_ray.searching.fixed_runs import stored_results

        results = stored_results(self.out)
        return [self._measured(one, results) for one in self.plan]

    def _measured(self, one: Planned, results: dict[str, dict[str, Any]]) -> Measured:
        runs = [] if one.config is None else self._runs(one)
        tests = [results[key] for run in runs if (key := run.test(one.claim.tte).key) in results]
        trained = [results[run.training.key] for run in runs if run.training.key in results]
        diverged = [value["diverged"] for value in trained if "diverged" in value]
        return Measured(
            one.claim,
            tuple(100 * found[f"test/{one.claim.metric}"] for found in tests if f"test/{one.claim.metric}" in found),
            self.seeds,
            sum(found["seconds"] for found in [*tests, *trained]),
            self.stand_in,
            f"{len(diverged)} of {count(self.seeds, 'seed')} diverged" if diverged else one.problem,
        )

    def about(self) -> dict[str, str]:
        """Return command, commit, versions, hardware and cost, by heading."""
        from lift_ray.searching.fixed_runs import stored_results

        results = stored_results(self.out).values()
        hours = sum(found["seconds"] for found in results) / 3600
        machines = dict.fromkeys(_hardware(found["machine"]) for found in results)
        return {
            "Command": self.command,
            "Commit": ", ".join(dict.fromkeys(found["commit"] for found in results)) or commit() or "unknown",
            "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
            "Hardware": "; ".join(machines) or platform.platform(),
            "Cost": f"{hours:.2f} hours of slots (one GPU each, or one core), over {count(len(results), 'job')}",
            "Seeds": f"0 to {self.seeds - 1}" if self.seeds > 1 else "0",
            "Written": time.strftime("%Y-%m-%d %H:%M"),
        }

    def write(self) -> str:
        """Write page, Markdown and JSON, and return the name of the page."""
        return write_pages(self.measured(), self.about(), self.out, stand_in=self.stand_in)


class Display:
    """Lines of progress: one for each finished job, and one if none has finished for a while."""

    def __init__(self, source: FixedRuns) -> None:
        self.source, self.began = source, time.monotonic()
        self._told, self._said_at = source.num_done, self.began

    def tick(self) -> None:
        """Print a line if it is time to. Called often."""
        done, now = self.source.num_done, time.monotonic()
        if done == self._told and now - self._said_at < SAY_EVERY_S:
            return
        self._told, self._said_at = done, now
        running = ", ".join(map(self.source.title, self.source.running.values()))
        say(f"{now - self.began:5.0f} s  {done} of {count(self.source.num_jobs, 'job')} done  {running}".rstrip())


def versions() -> dict[str, str]:
    """Return the versions of lift_ray and what it computes with."""
    return {"lift_ray": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def commit() -> str:
    """Return the commit of the checkout that runs; "" if it is installed from a wheel, or without git."""
    top = PACKAGE.parent
    if not (top / ".git").exists():
        return ""
    words = ["git", "-C", str(top), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _hardware(machine: dict[str, Any]) -> str:
    """Describe where a result was computed: CPU cores and GPUs of each node."""
    nodes = [
        ", ".join(
            f"{amount:g} {name.removeprefix('accelerator_type:')}"
            for name, amount in sorted(node.items())
            if name in ("CPU", "GPU") or name.startswith("accelerator_type:")
        )
        for node in machine["nodes"]
    ]
    return f"{machine['platform']}: {'; '.join(nodes) or str(machine['cpus']) + ' cores'}"
