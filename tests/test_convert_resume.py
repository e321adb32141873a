"""A conversion may be killed at any moment, or run on many processes or a cluster: the bytes are the same."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from embedded import embedded
from fsspec.implementations.local import LocalFileSystem
from processes import stopping_itself, wait_until_it_stops

from lift_ray import convert as verb
from lift_ray.data.convert.conversion import convert
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.index import FilesIn, ImageIndex
from lift_ray.data.convert.splitting import Division
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, RunFailed

SMALL = 40
OPTIONS = ["--rows-per-shard", "64", "--row-group-rows", "32", "--short-side", "40"]


def photos(folder: Path, count: int) -> str:
    """Class directories with real images."""
    train = embedded("train")
    rows = np.sort(np.random.default_rng(0).choice(train.num_samples, count, replace=False))
    for row, label, image in zip(rows, train.labels[rows], RowReader(train).read(rows), strict=True):
        (folder / f"class_{label % 5}").mkdir(parents=True, exist_ok=True)
        (folder / f"class_{label % 5}" / f"{row}.jpg").write_bytes(image)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    return scan_folder(photos(tmp_path_factory.mktemp("small") / "photos", SMALL))


def files(folder: Path) -> dict[str, bytes]:
    """Every file there, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder: Path) -> int:
    return len(list(folder.glob(".*.json.partial"))) if folder.exists() else 0


@pytest.mark.slow  # the next test kills at every change of a file, within this process
def test_a_conversion_killed_halfway_and_rerun_writes_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    source, killed = photos(tmp_path / "photos", 2000), tmp_path / "killed"
    verb.main(["folder", source, f"{tmp_path}/serial", *OPTIONS, "--at-once", "1"])
    command = [sys.executable, "-m", "lift_ray.convert", "folder", source, str(killed), *OPTIONS, "--at-once", "2"]
    stopping = stopping_itself("convert", f"len(list(Path({str(killed)!r}).glob('.*.json.partial'))) >= 16")
    running = subprocess.Popen([*stopping, *command[3:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until_it_stops(running)  # its pool gives the workers a few shards more
    processes = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert len(processes) >= 2, "it ran in processes"
    assert not psutil.wait_procs(processes, timeout=60)[1], "they end with their parent"
    assert 16 <= finished(killed) < 33
    assert not (killed / "manifest.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    there = int(again.stderr.removeprefix("continuing: ").partition(" of 2,000 images")[0].replace(",", ""))
    assert there >= 8 * 100
    assert files(killed) == files(tmp_path / "serial")


class Killed(BaseException):
    """What follows is not executed, as after SIGKILL."""


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """From the so-manieth change of a file on, none happens."""
    left = operation

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(self: Any, path: str, *args: Any, **more: Any) -> Any:
            nonlocal left
            if real.__name__ != "open" or args == ("wb",):
                left -= 1
                if left < 0:
                    raise Killed
            return real(self, path, *args, **more)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mv", "rm_file"):
            patch.setattr(LocalFileSystem, name, counted(getattr(LocalFileSystem, name)))
        yield


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_killed_at_any_change_of_a_file_continues_to_the_same_bytes(
    small: ImageIndex, tmp_path: Path, overwrite: bool
) -> None:
    def run(folder: Path) -> None:
        convert(small, str(folder), rows_per_shard=16, row_group_rows=8, overwrite=overwrite)

    run(tmp_path / "whole")
    for operation in range(100):
        out = tmp_path / str(operation)
        if overwrite:
            convert(small, str(out), rows_per_shard=9, division=Division(0.3, 0.1))
        with suppress(Killed), killed_at(operation):
            run(out)
            break
        is_whole = not overwrite and (out / "manifest.json").exists() and not (out / ".plan.json").exists()
        with pytest.raises(BadInput, match="must not contain a dataset") if is_whole else nullcontext():
            run(out)  # only temporary files were left to remove
        assert files(out) == files(tmp_path / "whole"), operation
    assert 15 < operation < 99


def test_only_the_same_plan_continues_and_another_one_starts_over(small: ImageIndex, tmp_path: Path) -> None:
    seen: list[int] = []

    def cut_short(seed: int, *, after: int = 10**6, **more: Any) -> None:
        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done >= after:
                raise KeyboardInterrupt

        seen.clear()
        convert(
            small,
            f"{tmp_path}/out",
            rows_per_shard=10,
            division=Division(0.0, 0.0, seed=seed),
            progress=progress,
            **more,
        )

    for after, there in ((25, 0), (15, 20), (35, 20)):
        with pytest.raises(KeyboardInterrupt):
            cut_short(0, after=after)
        assert seen[0] == there
    with pytest.raises(KeyboardInterrupt):
        cut_short(1, after=12)
    assert seen[0] == 0
    assert finished(tmp_path / "out") == 1
    cut_short(1)
    assert seen[0] == 10
    cut_short(0, overwrite=True)
    convert(small, f"{tmp_path}/whole", rows_per_shard=10, division=Division(0.0, 0.0))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_after_a_bad_image_the_finished_shards_are_kept_for_skip_bad_and_not_the_other_way(
    small: ImageIndex, tmp_path: Path
) -> None:
    rows = [*small.splits["train"]]
    seen: list[int] = []
    index = replace(small, splits={"train": rows, "test": [("class_0/missing.jpg", 0), *rows[:3]]})

    def run(**more: Any) -> None:
        seen.clear()
        convert(
            index,
            f"{tmp_path}/out",
            rows_per_shard=10,
            division=Division(0.0),
            workers=1,
            progress=lambda done, total: seen.append(done),
            **more,
        )

    with pytest.raises(BadInput, match=r"missing\.jpg: must be an intact image, but got no file; remove it or pass"):
        run()
    with pytest.raises(Killed), killed_at(11):  # the plan, one shard and its record, and nothing more
        run(skip_bad=True)
    assert seen[0] == SMALL
    with pytest.raises(BadInput, match="got no file"):
        run()
    assert seen[0] == SMALL, "the shard without the bad image is done again"
    run(skip_bad=True)
    assert open_dataset(f"{tmp_path}/out").split("test").num_samples == 3


def test_a_second_conversion_to_the_same_folder_is_refused_while_one_runs(small: ImageIndex, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(BadInput) as caught:
        convert(small, str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: must not be in use, but another conversion is writing there; wait, or choose another folder"
    )
    assert not files(tmp_path)
    os.close(handle)
    convert(small, str(tmp_path))


@dataclass(frozen=True)
class KillsOnce:
    """Reads files, and kills its process the first time."""

    source: str
    mark: str

    def __call__(self, reference: str) -> bytes:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return FilesIn(self.source)(reference)


def test_a_killed_process_ends_the_conversion_with_one_line_and_a_rerun_continues(
    small: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_ray.data.convert.tasks.FEW_IMAGES", 0)
    index = replace(small, read=KillsOnce(small.source, f"{tmp_path}/mark"))
    with pytest.raises(RunFailed, match=r"^.*/out: a conversion process was killed, perhaps because memory ran out; "):
        convert(index, f"{tmp_path}/out", rows_per_shard=10, workers=2)
    convert(index, f"{tmp_path}/out", rows_per_shard=10, workers=1)
    convert(small, f"{tmp_path}/whole", rows_per_shard=10)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_bad_image_in_another_process_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift_ray.data.convert.tasks.FEW_IMAGES", 0)
    source = photos(tmp_path / "photos", SMALL)
    Path(source, "class_0", "bad.jpg").write_bytes(b"no")
    with pytest.raises(BadInput) as caught:
        convert(scan_folder(source), f"{tmp_path}/out", rows_per_shard=10, workers=2)
    assert str(caught.value) == (
        f"{source}/class_0/bad.jpg: must be an intact image, but got bytes of no known format; remove it or pass --skip-bad"
    )


def test_a_cluster_makes_the_same_bytes_and_replaces_a_lost_worker(
    small: ImageIndex, tmp_path: Path, ray_session: None
) -> None:
    import ray.cloudpickle

    from lift_ray.ray_runtime.conversion import on_cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    index = replace(small, read=KillsOnce(small.source, f"{tmp_path}/mark"))
    convert(index, f"{tmp_path}/ray", rows_per_shard=10, run_tasks=on_cluster)
    convert(small, f"{tmp_path}/whole", rows_per_shard=10)
    assert files(tmp_path / "ray") == files(tmp_path / "whole")


def test_on_a_cluster_paths_are_relative_to_the_working_directory_and_bad_images_give_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", SMALL)
    monkeypatch.chdir(tmp_path)
    assert not verb.main(["folder", "photos", "out", "--ray", "auto", "--rows-per-shard", "10"])
    assert sum(split.num_samples for split in open_dataset("out").splits.values()) == SMALL
    assert "dataset: out" in capsys.readouterr().out
    Path("photos/class_0/bad.jpg").write_bytes(b"no")
    with pytest.raises(BadInput, match=r"^photos/class_0/bad\.jpg: must be an intact image, but got bytes of no known"):
        verb.main(["folder", "photos", "new", "--ray", "auto", "--rows-per-shard", "10"])
