"""Engine of a search on real Ray processes, with slots that train nothing (played.py)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.storages import InMemoryStorage
from played import DATA, METRIC, log_of, run_on_ray, searched, space
from processes import wait_for
from ray import tune

from lift_ray.errors import BadInput, RunFailed
from lift_ray.ray_runtime.capacity import Need
from lift_ray.ray_runtime.patches import SECRETS
from lift_ray.searching import tune_run
from lift_ray.searching.engine import Engine
from lift_ray.searching.jobs import SlotSettings, TrainJob
from lift_ray.searching.slot import Slot
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study, open_storage
from lift_ray.searching.tune_run import JobSearcher
from lift_ray.storage.output import Output
from lift_ray.training.events import JobDone

PLAYED = Path(__file__).with_name("played.py")


def epochs_of(folder: Path) -> Counter[str]:
    """Return how often each epoch of each trial was trained."""
    return Counter(line.split(" ", 1)[1] for line in log_of(folder) if " epoch " in line)


def working(folder: Path) -> dict[int, int]:
    """Return the epochs that each process trained."""
    return dict(Counter(int(line.split()[0]) for line in log_of(folder) if " epoch " in line))


@contextmanager
def driver(folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a search in its own process with its own Ray; kill it and all its processes afterwards."""
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "said").open("a") as said:
        process = subprocess.Popen(
            [sys.executable, str(PLAYED), str(folder), json.dumps(options)],
            stdout=said,
            stderr=said,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a background job
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(30)


def until(folder: Path, process: subprocess.Popen[str], lines: int) -> None:
    """Wait until a number of epochs are trained, or the driver has ended."""
    wait_for("epochs", lambda: sum(epochs_of(folder).values()) >= lines or process.poll() is not None, every_s=0.02)


def test_short_trials_do_not_rob_a_slot_that_starts(tmp_path: Path, ray_session: None) -> None:
    did = run_on_ray(tmp_path, {"trials": 60, "load_s": 0.2, "epoch_s": 0.01, "alone_epochs": 9})
    assert did["states"] == {"finished": 60}
    assert (did["processes"], did["loads"]) == (2, 2)
    shares = list(working(tmp_path).values())
    assert min(shares) > 20, "one process did nearly all"


@pytest.mark.slow
def test_eight_slots_all_work_and_stay_for_the_final_comparison_although_one_trial_takes_longer(tmp_path: Path) -> None:
    with driver(tmp_path, slots=8, trials=17, epochs=2, epoch_s=0.3, load_s=0.5, search={"seeds_best": 3}) as process:
        assert process.wait(150) == 0, (tmp_path / "said").read_text()
    did = json.loads((tmp_path / "said").read_text().splitlines()[-1])
    assert (did["processes"], did["loads"]) == (8, 8), "a slot was ended at the barrier and loaded again"
    assert did["states"] == {"finished": 17}
    assert set(did["compared"]) == {"zero-shot", "baseline 1", "best found"}


def test_a_search_with_fewer_trials_than_slots_ends(tmp_path: Path, ray_session: None) -> None:
    did = run_on_ray(tmp_path, {"trials": 1})
    assert did["states"] == {"finished": 1}
    done = [line.split(" done ")[1] for line in log_of(tmp_path) if " done " in line]
    assert len(done) == len(set(done)) == 4, "zero-shot on two splits, the baseline that is the best on two, each once"
    lines = log_of(tmp_path)
    assert run_on_ray(tmp_path, {"trials": 1})["compared"] == did["compared"]
    assert log_of(tmp_path) == lines, "a search that is over did something again"


@pytest.mark.slow
def test_each_fault_of_a_slot_is_retried_twice_and_the_other_trials_continue(tmp_path: Path, ray_session: None) -> None:
    faults = {"1": "die once", "2": "raise", "3": "diverge", "4": "die"}
    out = tmp_path / "out"
    did = run_on_ray(out, {"trials": 6, "faults": faults})
    study = Study(space(3, trials=6, tte_best=0, scheduler={"kind": "none"}), "d", open_storage(None, out), resume=True)
    assert {row.number: row.state for row in study.rows.values()} == {
        0: "finished",
        1: "finished",
        2: "failed",
        3: "failed",
        4: "failed",
        5: "finished",
    }
    assert did["states"] == {"finished": 3, "failed": 3}
    errors = [study.rows[number].error for number in (2, 3, 4)]
    assert errors == ["ValueError: a bug in the worker", "the loss must be finite", "its processes were lost"]
    tries = Counter(line.split(" ", 1)[1] for line in log_of(out) if " fault " in line)
    assert tries == {"fault 1": 1, "fault 2": 3, "fault 3": 1, "fault 4": 3}
    assert all(number == 1 for number in epochs_of(out).values()), "an epoch was trained twice"


def test_bad_input_that_a_slot_finds_ends_the_search_with_its_line(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(BadInput) as caught:
        run_on_ray(tmp_path, {"trials": 6, "faults": {"0": "bad"}})
    assert str(caught.value) == "backbone.model: unknown model 'x'"


def test_slots_that_never_start_end_the_search(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(
        RunFailed, match=r"^3 slots in a row failed to start; the last error: ValueError: no such option$"
    ):
        run_on_ray(tmp_path, {"trials": 4, "slots": 1, "broken": True})


def test_callbacks_of_tune_are_called_for_every_trial(tmp_path: Path, ray_session: None) -> None:
    class Heard(tune.Callback):
        def __init__(self) -> None:
            self.figures: dict[str, list[float]] = {}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if isinstance(trial.config["job"], TrainJob) and METRIC in result:
                self.figures.setdefault(str(trial), []).append(result[METRIC])

    heard = Heard()
    did = run_on_ray(tmp_path, {"trials": 4}, [heard])
    assert did["states"] == {"finished": 4}
    assert {name: len(values) for name, values in heard.figures.items()} == {f"train {n}": 3 for n in range(4)}


def test_a_fit_that_ends_with_an_error_of_rays_is_begun_again(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's memory monitor kills a slot like this, which Tune's loop does not expect."""
    broken, step = [], Engine.stop_all

    def breaks(self: Engine) -> bool:
        if len(broken) < 2 and len(log_of(tmp_path)) > 12 * (1 + len(broken)):
            broken.append(len(self.jobs))
            raise RuntimeError("Caught unexpected exception: OutOfMemoryError")
        return step(self)

    monkeypatch.setattr(Engine, "stop_all", breaks)
    did = run_on_ray(tmp_path, {"trials": 12})
    assert len(broken) == 2
    assert did["states"] == {"finished": 12}
    assert set(epochs_of(tmp_path).values()) == {1}


def test_a_slot_that_dies_between_two_jobs_costs_its_next_job_nothing(tmp_path: Path) -> None:
    """Tune reports it twice, for the actor and for the reset that failed, and then gives up the trial."""
    study = Study(space(scheduler={"kind": "none"}), "d", InMemoryStorage())
    search = Search(study, Output(str(tmp_path)), DATA)
    made = Engine(
        search,
        SlotSettings("d", Need(1, 1, 0), "o", "s"),
        lambda: 1,
        should_stop=lambda: False,
        on_step=lambda: None,
        keeps_slots=True,
    )

    class TuneTrial:
        trial_id, status, config, error_file = "b", "ERROR", {}, "/none"

        def set_config(self, config: dict[str, Any]) -> None:
            self.config = config

    assert isinstance(made.next_config("a"), dict)  # opens the slot
    assert not made._take("a", {"reply": JobDone({}), "slot": 0}), "there is work"
    made._forget("a")
    config = made.next_config("b")
    assert isinstance(config, dict)
    assert config["job"].number == 0
    trial = TuneTrial()
    made.on_trial_error(None, trial)
    trial.status = "PENDING"
    made.on_trial_error(None, trial)
    made.gave_up("b")
    assert (study.rows[0].state, made.lost, made.error) == ("waiting", 1, None)
    assert isinstance(made.next_config("c"), dict)
    made._take("c", {"reply": JobDone({}), "slot": 0})
    made._forget("c")
    again = made.next_config("d")
    assert isinstance(again, dict)
    assert again["job"].number == 0


def test_tune_pickles_almost_nothing_of_ours() -> None:
    import pickle

    made = Engine(
        None,
        SlotSettings("d", Need(1, 1, 0), "o", "s"),
        lambda: 1,  # type: ignore[arg-type]
        should_stop=lambda: False,
        on_step=lambda: None,
        keeps_slots=True,
    )
    for ours in (made, JobSearcher(made)):
        assert len(pickle.dumps(ours)) < 200


def test_tune_keeps_neither_settings_nor_secrets_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    before = set(ENV_VARS_TO_PROPAGATE)
    assert before >= SECRETS, "Ray has another list; see what it would show of the environment"
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "1")
    monkeypatch.delenv("TUNE_GLOBAL_CHECKPOINT_S", raising=False)
    with tune_run._environment():
        assert not ENV_VARS_TO_PROPAGATE & SECRETS
        assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
    assert before == ENV_VARS_TO_PROPAGATE
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "1"
    assert "TUNE_GLOBAL_CHECKPOINT_S" not in os.environ


def test_a_slot_of_several_workers_reserves_no_resources_for_itself() -> None:
    def of(need: Need) -> Any:
        return Slot.default_resource_request({"slot": SlotSettings("d", need, "o", "s")})

    assert of(Need(1, 2, 1)).required_resources == {"CPU": 2.0, "GPU": 1.0}
    several = of(Need(3, 2, 1))
    assert several.required_resources == {"CPU": 6.0, "GPU": 3.0}
    assert several.head_cpus == 0


@pytest.mark.slow
def test_drivers_and_slots_that_are_killed_lose_no_epoch_and_repeat_none(tmp_path: Path) -> None:
    chance, killed = random.Random(3), Counter[str]()
    out, options = tmp_path / "out", {"trials": 24, "epochs": 4, "epoch_s": 0.25, "load_s": 0.5}
    for victims in (("slot", "slot", "driver"),) * 3 + ((),):
        with driver(out, **options) as process:
            for victim in victims:
                until(out, process, sum(epochs_of(out).values()) + chance.randint(3, 7))
                time.sleep(chance.uniform(0, 0.25))
                pid = (
                    process.pid
                    if victim == "driver"
                    else int([li for li in log_of(out) if " epoch " in li][-1].split()[0])
                )
                family = psutil.Process(process.pid).children(recursive=True)
                os.kill(pid, signal.SIGKILL)
                killed[victim] += 1
                if victim == "driver":
                    process.wait(60)
                    _, left = psutil.wait_procs(family, timeout=20)  # the driver's Ray ends with it
                    for child in left:
                        child.kill()
            if not victims:
                assert process.wait(200) == 0, (out / "said").read_text()
    assert killed == {"slot": 6, "driver": 3}
    wanted = space(4, trials=24, tte_best=0, scheduler={"kind": "none"})
    study = Study(wanted, "d", open_storage(None, out), resume=True)
    undisturbed, _ = searched(wanted, InMemoryStorage(), tmp_path)
    for row, other in zip(study.rows.values(), undisturbed.rows.values(), strict=True):
        assert (row.number, row.values, row.state) == (other.number, other.values, "finished")
        assert [figures[METRIC] for figures in row.history] == [figures[METRIC] for figures in other.history]
    trained = epochs_of(out)
    assert len(trained) == 24 * 4
    assert max(trained.values()) == 1, [name for name, number in trained.items() if number > 1]


def test_two_signals_end_a_search_at_once(tmp_path: Path) -> None:
    with driver(tmp_path, trials=12, epochs=2, epoch_s=60) as process:
        wait_for("a job", lambda: log_of(tmp_path))
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # before the first one can have stopped everything in order
        # Had it stopped in order, at the first signal, the exit code would be that of SIGINT.
        assert process.wait(60) == 128 + signal.SIGTERM
        slots = [child for child in family if child.is_running() and "PlayedSlot" in child.name()]
        assert not psutil.wait_procs(slots, timeout=60)[1], "a slot outlived its driver"
