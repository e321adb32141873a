"""Searches killed at any write to their storage and resumed, with slots that train nothing; test_tune has real ones."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from played import DATA, METRIC, Played, metrics_of, play, searched, space

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput, RunFailed
from lift_ray.reporting.trial_rows import best_row
from lift_ray.searching.driver_lock import study_in
from lift_ray.searching.jobs import EvaluationJob
from lift_ray.searching.journal import Journal, repaired
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study, differences, open_storage, reports_in
from lift_ray.settings.search import TAUS
from lift_ray.storage.layout import JOURNAL, LOCK
from lift_ray.storage.output import Output


class KilledError(BaseException):
    """Stands for SIGKILL."""


class Mortal(InMemoryStorage):
    """Storage whose driver is killed after a number of further writes; earlier writes are kept."""

    left = 10**9

    def _write(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


for _name in (
    "create_new_trial",
    "set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_study_user_attr",
    "set_trial_intermediate_value",
    "set_trial_state_values",
):

    def _dying(self: Mortal, *args: Any, _name: str = _name, **kwargs: Any) -> Any:
        self._write()
        return getattr(InMemoryStorage, _name)(self, *args, **kwargs)

    setattr(Mortal, _name, _dying)


class Clock:
    """Clock that stands still until the test sets it."""

    now = 1e9

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def outcome(study: Study) -> list[tuple[int, dict[str, Any], str, list[float]]]:
    return [
        (row.number, row.values, row.state, [metrics.epoch for metrics in row.history]) for row in study.rows.values()
    ]


@pytest.mark.parametrize(
    "search",
    [
        {"scheduler": {"kind": "none"}, "seeds_best": 2},
        {"sampler": "tpe"},
        {"scheduler": {"kind": "none"}, "folds": 4, "confirm": {"best": 2}},
    ],
    ids=["none", "tpe with asha", "confirmed and refitted"],
)
def test_a_search_killed_at_any_write_ends_like_an_undisturbed_one(search: dict[str, Any], tmp_path: Path) -> None:
    wanted = space(**search)
    data = replace(DATA, retrains="folds" in search)
    undisturbed, worker = searched(wanted, Mortal(), tmp_path, data=data)
    assert sum(key.startswith("train") for key in worker.began) >= 10
    chance = random.Random(0)
    for first in [*range(3, 60), *(chance.randrange(60, 200) for _ in range(15))]:
        storage, disk, resume = Mortal(), Played(), False
        for left in (first, chance.randrange(1, 80), 10**9):
            storage.left = left
            try:
                study, _ = searched(wanted, storage, tmp_path, disk, resume, data)
            except KilledError:
                resume = "played" in optuna.get_all_study_names(storage) and reports_in(storage, "played")
                continue
            break
        rows = outcome(study)
        assert [row[0] for row in rows] == list(range(10))
        assert all(row[3] == list(range(1, len(row[3]) + 1)) for row in rows), "an epoch was done twice, or left out"
        trials = optuna.load_study(study_name="played", storage=storage).trials
        assert not [t for t in trials if not t.state.is_finished()]
        counted = [t.user_attrs["trial"]["number"] for t in trials if "trial" in t.user_attrs]
        assert sorted(counted) == list(range(10))
        if search.get("sampler") != "tpe":
            assert rows == outcome(undisturbed), f"killed after {first} writes"
            assert study.results == undisturbed.results
        found = Search(study, Output(str(tmp_path)), data).result({})
        assert found
        assert found.compared


def test_finished_work_is_not_repeated(tmp_path: Path) -> None:
    storage, disk = Mortal(), Played()
    searched(space(scheduler={"kind": "none"}), storage, tmp_path, disk)
    first = list(disk.began)
    assert len(first) == len(set(first))
    disk.began.clear()
    searched(space(scheduler={"kind": "none"}), storage, tmp_path, disk, resume=True)
    assert disk.began == [], "neither a trial nor an evaluation is done twice"
    searched(space(scheduler={"kind": "none"}, trials=12), storage, tmp_path, disk, resume=True)
    assert [key for key in disk.began if key.startswith("train")] == ["train 10", "train 11"], "more may be asked for"
    assert not {key for key in disk.began if "zero-shot" in key}


def test_no_more_trials_are_resumed_than_are_asked_for(tmp_path: Path) -> None:
    storage, disk = Mortal(), Played()
    search = Search(Study(space(scheduler={"kind": "none"}), "d", storage), Output(str(tmp_path)), DATA)
    jobs = [search.next_job() for _ in range(4)]
    for job in jobs[:3]:  # three trials end, the fourth is interrupted after its first epoch
        assert job
        disk.begin(job)
        while search.take(job, next(disk.replies)):
            pass
    assert jobs[3]
    disk.begin(jobs[3])
    for _ in range(2):
        assert search.take(jobs[3], next(disk.replies))
    disk.began.clear()
    study, _ = searched(space(scheduler={"kind": "none"}, trials=3), storage, tmp_path, disk, resume=True)
    assert not [key for key in disk.began if key.startswith("train")]
    assert [row.state for row in study.rows.values()] == ["finished"] * 3 + ["waiting"]
    searched(space(scheduler={"kind": "none"}, trials=5), storage, tmp_path, disk, resume=True)
    assert [key for key in disk.began if key.startswith("train")] == ["train 3", "train 4"]


def test_a_model_is_evaluated_once_for_all_that_it_is_compared_as(tmp_path: Path) -> None:
    """The best trial is the baseline here."""
    wanted = space(scheduler={"kind": "none"}, trials=3, tte_best=1)
    wanted.baselines[0].update({"optim.lr": 0.3, "loss.tau": 1.0})
    for slots in (1, 2, 5):
        search = Search(Study(wanted, "d", InMemoryStorage()), Output(str(tmp_path)), DATA)
        worker = play(search, slots=slots)
        jobs = [job for job in search.done if isinstance(job, EvaluationJob)]
        evaluated = [(job.model, job.split, tau) for job in jobs for tau in job.taus]
        assert sorted(evaluated) == sorted(
            [
                *(("zero-shot", split, 0.0) for split in ("test", "validation")),
                ("trial-0000", "test", 0.0),
                *(("trial-0000", "validation", tau) for tau in TAUS),
                *(("trial-0000-tte", s, 0.0) for s in ("test", "validation")),
            ]
        )
        early = next(key for key in worker.began if key.startswith("evaluate"))
        assert (slots == 1) == ("zero-shot" not in early), "a slot without a trial starts with what needs no result"
        found = search.result({})
        assert found
        assert [label for label, _ in found.compared] == ["zero-shot", "baseline 1", "best found", "best found, TTE"]


def test_other_settings_and_a_second_study_of_the_name_are_refused(tmp_path: Path) -> None:
    storage = Mortal()
    searched(space(), storage, tmp_path)
    for other, dataset, shown in (
        (space(seed=1), "d", "search.seed: 0 -> 1"),
        (space(), "e", 'dataset: "d" -> "e"'),
        (space(epochs=3), "d", "base.optim.epochs: 9 -> 3"),
        (
            space(scheduler={"kind": "none"}),
            "d",
            'search.scheduler.kind: "asha" -> "none", search.scheduler.grace_epochs: 1 -> '
            "(not set), search.scheduler.reduction_factor: 3 -> (not set)",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            Study(other, dataset, storage, resume=True)
        assert str(caught.value) == (
            f"--resume: the settings must be those the search started with, but got {shown}; "
            "restore them, or give another --out"
        )
    assert "base.loss.tau: 1.0 -> (not set)" in str(differences({"base": {"loss": {"tau": 1.0}}}, {"base": {}}))
    with pytest.raises(BadInput) as caught:
        Study(space(), "d", storage)
    assert str(caught.value) == (
        "--storage: already contains a study named played; add --resume to continue it, or change `name`"
    )
    with pytest.raises(
        BadInput, match=r"^--resume: requires a search to resume, but there is no study named played; leave out"
    ):
        Study(space(), "d", InMemoryStorage(), resume=True)


def test_a_second_driver_on_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    out = Output(str(tmp_path / "out"))
    with study_in(out, space(), "d", url=None, resume=False):
        for resume in (True, False):
            with (
                pytest.raises(BadInput, match="one driver, but process"),
                study_in(out, space(), "d", url=None, resume=resume),
            ):
                pass
    with study_in(out, space(), "d", url=None, resume=True) as study:
        assert study.rows == {}


def test_a_lock_is_held_by_a_living_process_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).write_text("process 1 on elsewhere, which was killed\n")
    with study_in(Output(str(out)), space(), "d", url=None, resume=False):
        assert (out / LOCK).read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
        descriptor = os.open(out / LOCK, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


@pytest.mark.parametrize("resume", [False, True])
def test_a_driver_that_is_killed_gives_its_lock_back_at_once(resume: bool, tmp_path: Path) -> None:
    out = Output(str(tmp_path / "out"))
    with study_in(out, space(), "d", url=None, resume=False):
        pass
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lift_ray.searching.driver_lock import alone_in\n"
        f"from lift_ray.storage.output import Output\nwith alone_in(Output({out.url!r})):\n"
        "    print('locked', flush=True)\n    time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BadInput) as caught, study_in(out, space(), "d", url=None, resume=resume):
            pass
        assert str(caught.value) == (
            f"{out.url}: must have one driver, but process {holder.pid} on {os.uname().nodename} is working on it; "
            "wait for it or stop it"
        )
        holder.kill()
        holder.wait(60)
        with study_in(out, space(), "d", url=None, resume=resume) as study:
            assert study.rows == {}


def test_a_second_driver_on_a_database_is_refused_while_the_first_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, clock = f"sqlite:///{tmp_path / 'studies.db'}", Clock()
    monkeypatch.setattr("lift_ray.searching.study.time", clock)
    monkeypatch.setattr("lift_ray.searching.study._me", lambda: "process 1 on here")
    first = Study(space(), "d", open_storage(url, tmp_path), shared=True)
    monkeypatch.setattr("lift_ray.searching.study._me", lambda: "process 2 on there")
    for after_s, heard, wait in ((-0.01, 0, 90), (30.01, 30, 60)):  # clocks of two machines differ
        clock.now += after_s
        for resume in (True, False):  # also before the first driver has reported anything
            with pytest.raises(BadInput) as caught:
                Study(space(), "d", open_storage(url, tmp_path), resume=resume, shared=True)
            assert str(caught.value) == (
                "--storage: must have one driver, but process 1 on here is working on played "
                f"(last heard {heard} s ago); stop it, or if it is gone, try again in {wait} s"
            )
    assert first.next() is not None
    clock.now += 60
    second = Study(space(), "d", open_storage(url, tmp_path), resume=True, shared=True)
    monkeypatch.setattr("lift_ray.searching.study._me", lambda: "process 1 on here")
    with pytest.raises(BadInput, match=r"but process 2 on there took over played; stop one of them$"):
        first.beat()
    second.leave()


def test_a_driver_that_fails_lets_the_next_one_in_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, out = f"sqlite:///{tmp_path / 'studies.db'}", Output(str(tmp_path / "out"))
    with pytest.raises(RunFailed), study_in(out, space(), "d", url=url, resume=False):
        raise RunFailed("slots must start")
    monkeypatch.setattr("lift_ray.searching.study._me", lambda: "process 2 on there")
    with study_in(out, space(), "d", url=url, resume=True) as study:
        assert study.rows == {}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage: must be the URL of a reachable database, but got nonsense ("),
        (
            # pragma: allowlist nextline secret
            "postgresql+nodriver://me:secret@127.0.0.1/x",
            "--storage: must be the URL of a reachable database, but got postgresql",
        ),
        ("sqlite:////no/such/folder/x.db", "--storage: must be the URL of a reachable database, but got sqlite:"),
    ],
)
def test_a_storage_that_cannot_be_used_gives_a_one_line_error_without_the_password(
    url: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        open_storage(url, tmp_path)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_line_of_a_killed_driver_is_removed_and_its_lock_holds_nobody_up(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    study.ask()
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)  # of an earlier version
    assert repaired(journal).read_bytes() == whole
    optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").ask()
    assert len(optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").trials) == 2


def test_records_that_belong_together_are_written_together_also_after_an_error(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL
    study = Study(space(), "d", Journal(journal))
    before = journal.read_bytes()

    def begin() -> None:
        row = study.next()
        assert row
        with study.at_once():
            study.report(row, EpochMetrics(1, validation={"mean_class_accuracy": 0.5}))
        assert journal.read_bytes() == before, "the outer block is not over"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), study.at_once():
        begin()
    after = journal.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") > before.count(b"\n") + 3
    study.end(study.rows[0], "pruned")
    assert outcome(Study(space(), "d", Journal(journal), resume=True)) == outcome(study)
    assert study.rows[0].state == "pruned"


def test_a_write_that_fails_leaves_no_gap_and_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / JOURNAL
    study = Study(space(), "d", Journal(journal))
    before = journal.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"), study.at_once():
            assert study.next()
    assert journal.read_bytes() == before
    study.report(study.rows[0], EpochMetrics(1, validation={"mean_class_accuracy": 0.5}))
    assert outcome(Study(space(), "d", Journal(journal), resume=True)) == outcome(study)


def test_a_journal_with_a_broken_line_is_bad_input(tmp_path: Path) -> None:
    Study(space(), "d", Journal(tmp_path / JOURNAL))
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    (tmp_path / JOURNAL).write_text("\n".join([lines[0], "{" + lines[1], *lines[2:], ""]))
    with pytest.raises(
        BadInput, match=rf"{JOURNAL}, line 2: must be a record of a search, but got .*; choose another --out$"
    ):
        Journal(tmp_path / JOURNAL)


def test_optuna_reads_the_journal_and_finds_the_trials_that_wait(tmp_path: Path) -> None:
    ours = optuna.create_study(storage=Journal(tmp_path / JOURNAL), study_name="s")
    ours.enqueue_trial({"x": 0.25})
    assert [trial.state for trial in ours.get_trials(states=(TrialState.WAITING,))] == [TrialState.WAITING]
    again = optuna.load_study(storage=Journal(tmp_path / JOURNAL), study_name="s")
    drawn = [again.ask().suggest_float("x", 0, 1) for _ in range(3)]
    assert drawn[0] == 0.25
    assert 0.25 not in drawn[1:]
    assert again.get_trials(states=(TrialState.WAITING,)) == []
    again.enqueue_trial({"x": 0.75})
    again.ask().suggest_float("x", 0, 1)
    theirs = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL))), study_name="s")
    assert [trial.params["x"] for trial in theirs.trials] == [*drawn, 0.75]


def test_a_failed_trial_reaches_optuna_as_failed_and_a_diverged_one_with_the_worst_value(tmp_path: Path) -> None:
    for fault, told in (("diverge", "COMPLETE"), ("raise", "FAIL")):
        study, _ = searched(space(scheduler={"kind": "none"}), InMemoryStorage(), tmp_path, Played(faults={"4": fault}))
        trial = optuna.load_study(study_name="played", storage=study.storage).trials[4]
        error = "the loss must be finite" if fault == "diverge" else "a bug in the worker"
        assert (study.rows[4].state, study.rows[4].error, trial.state.name) == ("failed", error, told)
        assert trial.value == (-1e9 if told == "COMPLETE" else None)
        best = best_row(study.rows.values(), METRIC, "max")
        assert best is not None
        assert best.state == "finished"


def test_a_search_that_failed_before_its_first_epoch_does_not_block_its_folder(tmp_path: Path) -> None:
    out, checkpoint = Output(str(tmp_path / "out")), tmp_path / "out" / "checkpoints" / "0000" / "epoch-0001"
    checkpoint.mkdir(parents=True)
    with study_in(out, space(), "d", url=None, resume=False) as study:
        assert checkpoint.exists(), "a folder may hold other things"
        assert study.next() is not None
    with study_in(out, space(seed=1), "d", url=None, resume=False) as study:
        assert not checkpoint.exists(), "saved before the driver failed, with other settings"
        assert study.rows == {}
        row = study.next()
        assert row is not None
        study.report(row, metrics_of({"loss": {"tau": 1}, "optim": {"lr": 1, "epochs": 9}}, 1))
    with pytest.raises(BadInput) as caught, study_in(out, space(), "d", url=None, resume=False):
        pass
    assert str(caught.value) == (
        f"{out.url}: must be a new folder, but it already contains a search; add --resume to continue it, or give another --out"
    )
