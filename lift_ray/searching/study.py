"""Durable state of a search: Optuna chooses the settings of the next trial, and stores every report as soon as it is made.

Optuna's storage is the only source of truth: a resumed search reads all its trials from there.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput, one_line
from lift_ray.registry import SAMPLERS
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.journal import Journal
from lift_ray.settings.base import changes, dotted
from lift_ray.settings.space import RENAMED, Draw, SpaceFile, grid_points
from lift_ray.storage.layout import JOURNAL

BEAT_S, LOST_S = 15.0, 90.0  # interval of heartbeats, and the silence after which a driver counts as dead
WORST = 1e9
FREE = ("scale", "out", "plan")  # sections that may change when a search is resumed
MORE = ("trials", "per_kind", "tte_best", "seeds_best")  # keys of `search` that may change too
RESULT = "result "  # prefix of the keys of the final comparison's results


class Study:
    """Trials of a search and their storage.

    Args:
        dataset: URI of the dataset.
        storage: Optuna's storage.
        resume: continue the search in the storage.
        shared: True if other machines can reach the storage; then a heartbeat keeps a second driver out.

    Attributes:
        rows: the trials, by number.
        results: metrics of the final comparison, by their keys.
        at_once: makes a context manager: what is stored within it is written at its end, where the storage can do that.
        replaced: True if this study replaces one whose driver failed before the first epoch.

    Raises:
        BadInput: the storage already contains such a search, or, to resume, none or one with other settings; or another driver
            is working on it.
    """

    def __init__(
        self, space: SpaceFile, dataset: str, storage: BaseStorage, *, resume: bool = False, shared: bool = False
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # TPE's `group`
        self.space, self.storage, self.shared = space, storage, shared
        self.rows: dict[int, TrialRow] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.replaced = False
        self.at_once = storage.at_once if isinstance(storage, Journal) else nullcontext
        self._trials: dict[int, optuna.Trial] = {}
        self._points = grid_points(space.space) if space.search.sampler == "grid" else space.baseline_values()
        self._beaten_at = -math.inf
        names = {kind: f"{space.name}/{kind}" if kind else space.name for kind in space.kinds()}
        known = set(optuna.get_all_study_names(storage))
        if not resume:
            for taken in sorted(known & set(names.values())):
                check_alone(storage, taken)
                if reports_in(storage, taken):
                    raise BadInput(
                        "--storage",
                        f"already contains a study named {taken}",
                        remedy="add --resume to continue it, or change `name`",
                    )
                optuna.delete_study(study_name=taken, storage=storage)  # its driver failed before the first epoch
                self.replaced = True
        if resume and not known & set(names.values()):
            raise BadInput(
                "--resume",
                "requires a search to resume",
                but=f"there is no study named {space.name}",
                remedy="leave out --resume",
            )
        directions = [DIRECTIONS[mode] for mode in space.objectives.values()]
        self._studies = {
            kind: optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
            for kind, name in names.items()
        }
        self._first = next(iter(self._studies.values()))
        about = described(space, dataset)
        if resume and (difference := differences(self._first.user_attrs.get("settings", about), about)):
            raise difference
        if shared:
            check_alone(storage, self._first.study_name)
        self.beat()
        self._first.set_user_attr("settings", about)
        for kind, study in self._studies.items():
            for frozen in study.get_trials(deepcopy=False):
                self._take_up(kind, study, frozen)
        self.rows = dict(sorted(self.rows.items()))
        self._sizes = Counter(dict.fromkeys(self._studies, 0))  # number of trials by kind
        self._sizes.update(row.group for row in self.rows.values())
        found = self._first.user_attrs.items()
        self.results = {key.removeprefix(RESULT): value for key, value in found if key.startswith(RESULT)}

    def beat(self) -> bool:
        """Write a heartbeat if the last one is old enough. Returns whether it was written.

        Raises:
            BadInput: another driver took over.
        """
        if not self.shared or time.monotonic() - self._beaten_at < BEAT_S:
            return False
        driver = self._first.user_attrs.get("driver")
        if driver and driver["id"] != _me() and self._beaten_at > -math.inf:
            raise BadInput(
                "--storage",
                "must have one driver",
                but=f"{driver['id']} took over {self.space.name}",
                remedy="stop one of them",
            )
        self._first.set_user_attr("driver", {"id": _me(), "at": time.time()})
        self._beaten_at = time.monotonic()
        return True

    def leave(self) -> None:
        """Clear the heartbeat, so that the next driver need not wait."""
        if self.shared and (self._first.user_attrs.get("driver") or {}).get("id") == _me():
            self._first.set_user_attr("driver", {"id": _me(), "at": 0.0})

    def _take_up(self, kind: str, study: optuna.Study, frozen: FrozenTrial) -> None:
        """Read a stored trial into a row. A trial whose driver was killed while it was drawn does not count."""
        about = frozen.user_attrs.get("trial")
        if about is None:
            if frozen.state == TrialState.RUNNING:
                study.tell(frozen.number, state=TrialState.FAIL)
            return
        epochs = {int(key.split()[1]): flat for key, flat in frozen.user_attrs.items() if key.startswith("epoch ")}
        row = TrialRow(
            about["number"],
            about["values"],
            self._num_epochs(about["values"]),
            "waiting",
            [EpochMetrics.of(epochs[number]) for number in sorted(epochs)],
            group=kind,
            baseline=about["baseline"] if "baseline" in about else about["start"],  # its name in version 0.1
        )
        row.num_epochs = int(row.last.get("num_epochs", row.num_epochs))
        self.rows[row.number] = row
        self._trials[row.number] = optuna.Trial(study, frozen._trial_id)
        began, ended = frozen.datetime_start, frozen.datetime_complete
        row.began_at = began.timestamp() if began else None
        row.ended_at = ended.timestamp() if ended else None
        if end := frozen.user_attrs.get(
            "end"
        ):  # if its driver was killed before it could tell the sampler, tell it now
            row.state, row.error = end["state"], end["error"]
            if frozen.state == TrialState.RUNNING:
                self._tell(row, end)

    def _num_epochs(self, values: Mapping[str, Any]) -> int:
        return self.space.config(dict(values)).optim.epochs

    def next(self) -> TrialRow | None:
        """Return a new trial; None if there are as many as requested.

        Its random numbers are seeded by (seed, number) alone, so that a resumed search does not repeat the draws made before.
        """
        number = len(self.rows)
        if number >= self.space.num_trials:
            return None
        point = self._points[number] if number < len(self._points) else None
        kind = min(self._studies, key=self._sizes.__getitem__)
        if point is not None and "" not in self._studies:
            kind = str(point["tuner.kind"])
        with self.at_once():
            trial = self._asked(kind, number, point)
            values = Draw(self.space.of_kind(kind))(trial)
            baseline = number if point is not None and self.space.search.sampler != "grid" else None
            trial.set_user_attr("trial", {"number": number, "values": values, "baseline": baseline})
        row = TrialRow(
            number,
            values,
            self._num_epochs(values),
            "waiting",
            group=kind,
            baseline=baseline,
            began_at=time.time(),
        )
        self.rows[number], self._trials[number] = row, trial
        self._sizes[kind] += 1
        return row

    def _asked(self, kind: str, number: int, point: dict[str, Any] | None) -> optuna.Trial:
        """Return Optuna's next trial, of settings that are given (`point`) or that its sampler draws."""
        study = self._studies[kind]
        if point is not None and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(point)
        study.sampler = SAMPLERS.build(self.space.search.sampler, (self.space.search.seed * 1_000_003 + number) % 2**32)
        return study.ask()

    def report(self, row: TrialRow, metrics: EpochMetrics) -> None:
        """Store the metrics of the trial's next epoch. The sampler is not told of an epoch that lacks the objective."""
        row.num_epochs = int(metrics.get("num_epochs", row.num_epochs))
        trial, epoch = self._trials[row.number], len(row.history) + 1
        value = metrics.get(self.space.objective[0])
        with self.at_once():
            trial.set_user_attr(f"epoch {epoch}", metrics.flat())
            if len(self.space.objectives) == 1 and value is not None:
                trial.report(value, epoch)
        row.history.append(metrics)

    def end(
        self,
        row: TrialRow,
        state: str,
        error: str = "",
        *,
        diverged: bool = False,
        known: EpochMetrics | None = None,
    ) -> None:
        """Store how a trial ended, and tell the sampler.

        Args:
            diverged: the loss was not finite; the sampler is told the worst value, so that it avoids such settings.
            known: metrics for the constraints of a trial that has no epoch.
        """
        metrics = known or row.last
        limits = self.space.constraints.items()
        excess = {name: limit.excess(metrics[name]) for name, limit in limits if name in metrics}
        tell = TELL[state].name
        if state == "finished" and (broken := [name for name, value in excess.items() if value > 0]):
            state, error = "infeasible", ", ".join(f"{name} is {metrics[name]:g}" for name in broken)
        row.state, row.error, row.ended_at = state, error, time.time()
        worst = [-WORST if mode == "max" else WORST for mode in self.space.objectives.values()]
        values = [row.last.get(metric, math.nan) for metric in self.space.objectives]
        end: dict[str, Any] = {"state": state, "error": error, "tell": tell, "values": values}
        if diverged or (tell == TrialState.COMPLETE.name and not all(map(math.isfinite, values))):
            end |= {"tell": TrialState.COMPLETE.name, "values": worst}
        with self.at_once():
            for name, value in excess.items():
                self._trials[row.number].set_constraint(name, value)
            self._trials[row.number].set_user_attr("end", end)
            self._tell(row, end)

    def _tell(self, row: TrialRow, end: Mapping[str, Any]) -> None:
        state = TrialState[end["tell"]]
        study = self._studies[row.group]
        study.tell(self._trials[row.number], end["values"] if state == TrialState.COMPLETE else None, state=state)

    def store_result(self, key: str, value: dict[str, Any]) -> None:
        """Store a result of the final comparison, so that a resumed search does not compute it again."""
        self._first.set_user_attr(RESULT + key, value)
        self.results[key] = value


def described(space: SpaceFile, dataset: str) -> dict[str, Any]:
    """Return the settings of a search in the form in which its storage keeps them."""
    return {**space.model_dump(mode="json", by_alias=True), "dataset": dataset}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> BadInput | None:
    """Return the error of a search that is resumed with other settings than it started with; None if they agree."""
    before = {RENAMED.get(name, name): value for name, value in before.items()}
    if not (changed := changes(_fixed(before), _fixed(now))):
        return None
    return BadInput(
        "--resume",
        "the settings must be those the search started with",
        changed,
        "restore them, or give another --out",
    )


def _fixed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a search that a resume may not change."""
    return {path: value for path, value in dotted(tree) if _is_fixed(path) and value != {}}


def _is_fixed(path: str) -> bool:
    section, _, name = path.partition(".")
    return section not in FREE and not (section == "search" and name in MORE)


def reports_in(storage: BaseStorage, name: str) -> bool:
    """Return True if a trial of a study has reported an epoch, or ended."""
    trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
    return any("end" in trial.user_attrs or "epoch 1" in trial.user_attrs for trial in trials)


def check_alone(storage: BaseStorage, name: str) -> None:
    """Raise BadInput if another driver has written a heartbeat lately. On a local folder, driver_lock.py does this."""
    driver = storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get("driver")
    if driver is None or driver["id"] == _me():
        return
    if (silent_s := time.time() - driver["at"]) < LOST_S:
        raise BadInput(
            "--storage",
            "must have one driver",
            but=f"{driver['id']} is working on {name} (last heard {max(0.0, silent_s):.0f} s ago)",
            remedy=f"stop it, or if it is gone, try again in {LOST_S - silent_s:.0f} s",
        )


def stored_search(storage: BaseStorage) -> tuple[bool, dict[str, Any]]:
    """Return whether a trial of any study has reported, and the settings that the search started with."""
    studies = storage.get_all_studies()
    found = [study.user_attrs["settings"] for study in studies if "settings" in study.user_attrs]
    settings: dict[str, Any] = found[0] if found else {}
    return any(reports_in(storage, study.study_name) for study in studies), settings


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open Optuna's storage: the database at a URL, or a journal file in `folder`. Raises BadInput if it cannot be opened."""
    if url is None:
        return Journal(folder / JOURNAL)
    shown = re.sub(r"//[^@/]*@", "//", url)  # messages must not show the password
    try:
        return RDBStorage(url)
    except ImportError as error:
        raise BadInput(
            "--storage",
            f"{shown} requires a database driver",
            one_line(error),
            "install it",
        ) from None
    except Exception as error:  # SQLAlchemy's drivers raise errors of many types
        text = one_line(error, 10_000).replace(url, shown)[:200]  # cut last: half a URL would still show its password
        raise BadInput(
            "--storage",
            "must be the URL of a reachable database",
            f"{shown} ({text})",
            "for example postgresql://user@host/name or sqlite:///file.db",
        ) from None


DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
TELL = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
