"""A search that is killed at every write to its storage and goes on, with slots that are played; test_tune has real ones."""

from __future__ import annotations

import fcntl
import os
import random
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage

from lift_ray.distributed.resume import LOCK, study_in
from lift_ray.distributed.search import Search
from lift_ray.distributed.slot import DIVERGED, Answer, Order
from lift_ray.distributed.study import JOURNAL, Study, mended, open_storage
from lift_ray.errors import BadInput, RunFailed
from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow, best_row
from lift_ray.settings.space import SpaceFile

METRIC = "validation/mean_class_accuracy"
EPOCHS = 9


def space(**search: Any) -> SpaceFile:
    return SpaceFile.model_validate({
        "name": "played", "dataset": "d", "base": {"optim": {"epochs": EPOCHS}},
        "space": {"optim.lr": {"float": [0.01, 1.0], "log": True}, "loss.tau": {"float": [0.0, 2.0]}},
        "start": [{"optim.lr": 0.02, "loss.tau": 1.0}], "search": {"trials": 10, "sampler": "random", **search},
    })  # fmt: skip


class PlayedSlot:
    """A slot whose checkpoints are in a dict and whose accuracies are a function of settings and epoch."""

    def __init__(self, disk: dict[int, list[dict[str, float]]], began: list[int]) -> None:
        self.disk, self.began, self.answer = disk, began, None
        self.waiting: Any = None

    def ask(self, asked: str, job: TrialRow, *args: Order) -> None:
        if asked == "begin":
            self.order = args[0]
            self.began.append(self.order.number)
            value: Any = {"num_epochs": EPOCHS, "trained_parameters": 8, "history": list(self.disk.get(job.number, []))}
        else:
            history = self.disk.setdefault(job.number, [])
            optim, loss = self.order.config["optim"], self.order.config["loss"]
            accuracy = 1 / (1 + abs(loss["tau"] - 1) + abs(optim["lr"] - 0.3)) * (1 - 0.5 ** (len(history) + 1))
            value = {"epoch": len(history) + 1, METRIC: accuracy, "num_epochs": EPOCHS, "trained_parameters": 8}
            history.append(value)  # saved before it is reported
        self.answer = Answer(self, asked, job, value)  # type: ignore[arg-type]


class PlayedSlots:
    """Two of them."""

    is_busy = property(lambda self: any(slot.answer for slot in self.slots))

    def __init__(self, disk: dict[int, list[dict[str, float]]]) -> None:
        self.began: list[int] = []
        self.slots = [PlayedSlot(disk, self.began) for _ in range(2)]

    def idle(self) -> list[Any]:
        return [slot for slot in self.slots if slot.answer is None]

    def wait(self, timeout_s: float = 1.0) -> list[Answer]:
        answers = [slot.answer for slot in self.slots if slot.answer]
        for slot in self.slots:
            slot.answer = None
        return answers


class Nobody:
    """Watches nothing."""

    def started(self, row: TrialRow) -> None: ...
    def reported(self, row: TrialRow) -> None: ...
    def ended(self, row: TrialRow) -> None: ...


class KilledError(BaseException):
    """As if by SIGKILL."""


class Mortal(InMemoryStorage):
    """A storage whose driver is killed after so many more writes; what was written stays."""

    left = 10**9

    def _write(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


for _name in ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_system_attr", "set_study_user_attr",
              "set_trial_intermediate_value", "set_trial_state_values"):  # fmt: skip

    def _dying(self: Mortal, *args: Any, _name: str = _name, **kwargs: Any) -> Any:
        self._write()
        return getattr(InMemoryStorage, _name)(self, *args, **kwargs)

    setattr(Mortal, _name, _dying)


def searched(
    wanted: SpaceFile, storage: Mortal, disk: dict[int, Any], out: Path, resume: bool = False
) -> tuple[Study, list[int]]:
    study = Study(wanted, "d", storage, resume=resume)
    slots = PlayedSlots(disk)
    Search(study, slots, Nobody(), Output(str(out))).run()
    return study, slots.began


def outcome(study: Study) -> list[tuple[int, dict[str, Any], str, list[float]]]:
    return [(row.number, row.values, row.state, [f["epoch"] for f in row.history]) for row in study.rows.values()]


@pytest.mark.parametrize("search", [
    {"scheduler": {"kind": "none"}}, {"scheduler": {"kind": "pbt", "interval_epochs": 3}}, {"sampler": "tpe"},
], ids=["none", "pbt", "tpe with asha"])  # fmt: skip
def test_a_search_killed_at_any_write_ends_as_if_nothing_had_been(
    search: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = space(**search)
    monkeypatch.setattr("lift_ray.distributed.search.take_over", lambda *args: None)  # there are no files
    undisturbed, began = searched(wanted, Mortal(), {}, tmp_path)
    assert len(began) >= 10
    chance = random.Random(0)
    for first in [*range(3, 60), *(chance.randrange(60, 200) for _ in range(15))]:
        storage, disk, resume = Mortal(), {}, False
        for left in (first, chance.randrange(1, 80), 10**9):
            storage.left = left
            try:
                study, _ = searched(wanted, storage, disk, tmp_path, resume)
            except KilledError:
                resume = "played" in optuna.get_all_study_names(storage)
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


def test_finished_trials_are_not_begun_again(tmp_path: Path) -> None:
    storage, disk = Mortal(), {}
    searched(space(scheduler={"kind": "none"}), storage, disk, tmp_path)
    _, began = searched(space(scheduler={"kind": "none"}, trials=12), storage, disk, tmp_path, resume=True)
    assert began == [10, 11], "more trials may be asked for, and only these are done"


def test_other_settings_and_a_second_study_of_the_name_are_refused(tmp_path: Path) -> None:
    storage = Mortal()
    searched(space(), storage, {}, tmp_path)
    with pytest.raises(BadInput) as caught:
        Study(space(seed=1), "d", storage, resume=True)
    assert str(caught.value).startswith("--resume: search must stay as the search began, {")
    with pytest.raises(
        BadInput, match=r"^--resume: dataset must stay as the search began, d, but got e; give another --out"
    ):
        Study(space(), "e", storage, resume=True)
    with pytest.raises(BadInput) as caught:
        Study(space(), "d", storage)
    assert str(caught.value) == ("--storage: must not hold a study named played yet, but it does; add --resume to go on with it, "
                                 "or change `name`")  # fmt: skip
    with pytest.raises(
        BadInput, match=r"^--resume: must name a search that began, but there is no study played; leave out"
    ):
        Study(space(), "d", InMemoryStorage(), resume=True)


def test_a_second_driver_on_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    out = Output(str(tmp_path / "out"))
    with study_in(out, space(), "d", url=None, resume=False):
        for resume, message in ((True, "one driver, but process"), (False, "a new folder")):
            with pytest.raises(BadInput, match=message), study_in(out, space(), "d", url=None, resume=resume):
                pass
    with study_in(out, space(), "d", url=None, resume=True) as study:
        assert study.rows == {}


def test_a_lock_is_held_by_a_living_process_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).write_text("process 1 on elsewhere\n")  # of a driver that was killed
    with study_in(Output(str(out)), space(), "d", url=None, resume=False):
        descriptor = os.open(out / LOCK, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_second_driver_on_a_database_is_refused_while_the_first_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    first = Study(space(), "d", open_storage(url, tmp_path), shared=True)
    monkeypatch.setattr("lift_ray.distributed.study._me", lambda: "process 2 on there")
    with pytest.raises(
        BadInput, match=r"^--storage: must have one driver, but process \d+ on .* works on played \(heard 0 s ago\)"
    ):
        Study(space(), "d", open_storage(url, tmp_path), resume=True, shared=True)
    monkeypatch.setattr("lift_ray.distributed.study.LOST_S", 0.0)
    second = Study(space(), "d", open_storage(url, tmp_path), resume=True, shared=True)
    monkeypatch.setattr("lift_ray.distributed.study._me", lambda: "process 1 on here")
    first._beaten_at = -1e6
    with pytest.raises(BadInput, match=r"but process 2 on there took over played; stop one$"):
        first.beat()
    second.leave()


def test_a_driver_that_fails_lets_the_next_one_in_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, out = f"sqlite:///{tmp_path / 'studies.db'}", Output(str(tmp_path / "out"))
    with pytest.raises(RunFailed), study_in(out, space(), "d", url=url, resume=False):
        raise RunFailed("slots must start")
    monkeypatch.setattr("lift_ray.distributed.study._me", lambda: "process 2 on there")
    with study_in(out, space(), "d", url=url, resume=True) as study:
        assert study.rows == {}


@pytest.mark.parametrize(("url", "message"), [
    ("nonsense", "--storage: must be the URL of a database that answers, but got nonsense ("),
    # pragma: allowlist nextline secret
    ("postgresql+nodriver://me:secret@127.0.0.1/x", "--storage: must be the URL of a database that answers, but got postgresql"),
    ("sqlite:////no/such/folder/x.db", "--storage: must be the URL of a database that answers, but got sqlite:"),
])  # fmt: skip
def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        open_storage(url, tmp_path)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_line_and_a_lock_of_a_killed_driver_are_cleared_away(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    study.ask()
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    assert mended(journal).read_bytes() == whole
    began = time.monotonic()
    optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").ask()
    assert time.monotonic() - began < 10, "the lock of the killed driver was waited for"
    assert len(optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").trials) == 2


class Breaking(PlayedSlots):
    """Slots that fail at the first epoch of some trials, with this error, so often."""

    def __init__(self, error: Exception, times: dict[int, int]) -> None:
        super().__init__({})
        self.error, self.times = error, times

    def wait(self, timeout_s: float = 1.0) -> list[Answer]:
        out = []
        for answer in super().wait():
            number = answer.job.number
            fails = answer.asked == "epoch" and self.times.get(number, 0) > 0
            self.times[number] = self.times.get(number, 0) - fails
            if fails and isinstance(self.error, RunFailed):
                answer = Answer(answer.slot, answer.asked, answer.job, {DIVERGED: str(self.error)})
            elif fails:
                answer = Answer(answer.slot, answer.asked, answer.job, error=self.error)
            out.append(answer)
        return out


def test_a_trial_is_tried_three_times_and_a_diverged_one_once(tmp_path: Path) -> None:
    wanted = space(scheduler={"kind": "none"})
    for error, times, state, told in (
        (ValueError("lost"), 2, "finished", "COMPLETE"), (ValueError("lost"), 3, "failed", "FAIL"),
        (RunFailed("the loss must be finite"), 1, "failed", "COMPLETE"),
    ):  # fmt: skip
        slots = Breaking(error, {4: times})
        study = Study(wanted, "d", InMemoryStorage())
        Search(study, slots, Nobody(), Output(str(tmp_path))).run()
        assert study.rows[4].state == state
        trial = optuna.load_study(study_name="played", storage=study.storage).trials[4]
        assert (trial.state.name, slots.began.count(4)) == (
            told,
            min(times, 2) + 1 if told != "COMPLETE" or state == "finished" else 1,
        )
        if state == "failed" and told == "COMPLETE":
            assert (trial.value, study.rows[4].error) == (-1e9, "the loss must be finite")
        best = best_row(study.rows.values(), METRIC, "max")
        assert best is not None
        assert best.state == "finished"
