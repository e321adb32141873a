"""Features of frozen blocks are computed once on a node, by all slots of a search together."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import LIFT_TINY
from made_run import run_config
from noting import ONE, cached_here, chunks_in, file_of, numbers, processes_in, tell
from noting_slot import NotingSlot

from lift_ray.data.open import open_dataset
from lift_ray.methods.world import Ranks
from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching import progress_table
from lift_ray.searching.driver import run_search
from lift_ray.searching.frozen_cuts import tunings
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.study import Study, open_storage
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import TAUS
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output
from lift_ray.training import shared_features
from lift_ray.training.events import FeaturesDone
from lift_ray.training.feature_cache import Features, Part
from lift_ray.training.loop import StopAsked
from lift_ray.training.run import Run
from lift_ray.training.shared_features import DONE, FREE, SharedFeatures, chunks_of, root_folder
from lift_ray.training.workspace import Workspace, first_tuned


def settings(model: str, **overrides: Any) -> RunConfig:
    tree = {
        "backbone": {"model": model},
        "augment": {"kind": "none"},
        "tuner": {"kind": "linear_probe"},
        "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.1},
    }
    return run_config(tree, overrides)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(
        "SEARCH_CACHE", os.environ["LIFT_CACHE"]
    )  # of the slots, which Ray starts with the environment of the session
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def shared() -> Iterator[SharedFeatures]:
    found = SharedFeatures()
    yield found
    found.close()


def in_a_process(code: str) -> subprocess.Popen[str]:
    """Start a process with a file of the search, and wait until it says something."""
    begin = "import time; from noting import *; shared = SharedFeatures(); file = file_of(shared)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", begin + code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


HANGS = "file.fill(hang, tell)"


def suffixes() -> list[str]:
    """Return the suffixes of the files that are there, but for the lock and the mark of the system's start."""
    there = (root_folder() / socket.gethostname()).iterdir()
    return sorted(file.suffix for file in there if file.suffix and file.name != ".lock")


def test_a_split_is_cut_into_whole_batches_whoever_computes_them() -> None:
    for number in (1, 255, 256, 5767, 115_846):
        for batch in (1, 25, 250):
            chunks = chunks_of(number, batch)
            assert [i for chunk in chunks for i in chunk] == list(range(number))
            assert all(len(chunk) % batch == 0 for chunk in chunks[:-1])
            assert len(chunks) <= max(shared_features.MOST_CHUNKS + 1, number // 256 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(shared: SharedFeatures, dtype: torch.dtype) -> None:
    file = shared.file("name", chunks_of(1000, 100), 3 * dtype.itemsize, 1e9)
    assert file is not None
    assert shared.find("name", file.chunks) is None
    seen: list[int] = []
    assert file.fill(lambda chunk: (part.to(dtype) for part in numbers(chunk)), seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 1000)
    again = shared.find("name", file.chunks)
    assert again is not None
    assert torch.equal(again.tensor([3], dtype), torch.arange(1000).to(dtype)[:, None].expand(-1, 3))
    again.tensor([3], dtype).zero_()
    assert again.tensor([3], dtype).any(), "a change in one process must not reach the others"


def test_two_processes_share_the_work_and_find_the_figures_of_one(
    folder: Path, small_data: str, small_clip: str
) -> None:
    """Each chunk is computed by one of them."""
    config, spawn = (
        settings(small_clip, tuner__kind="adaptformer", tuner__blocks=[1]),
        multiprocessing.get_context("spawn"),
    )
    barrier = spawn.Barrier(2)
    both = [spawn.Process(target=cached_here, args=(folder, small_data, config, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(150)
    assert [process.exitcode for process in both] == [0, 0]
    chunks = chunks_in(folder / "log")
    assert sorted(int(chunk[-1]) for chunk in chunks) == [0, 25, 50, 75], "no chunk twice, none left out"
    assert processes_in(folder / "log") == {str(process.pid) for process in both}
    workspace = Workspace(small_data, Ranks.alone())
    run = Run(config, workspace)
    alone = workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train))
    assert alone is not None
    for process in both:
        np.testing.assert_array_equal(np.load(folder / f"{process.pid}.npy"), alone[:].numpy())
    assert suffixes() == [".features", ".state"], "nothing is left but the features"
    alone_there = spawn.Barrier(1)
    third = spawn.Process(target=cached_here, args=(folder, small_data, config, alone_there))
    third.start()
    third.join(150)
    assert chunks_in(folder / "log") == chunks, "a later search finds them"
    np.testing.assert_array_equal(np.load(folder / f"{third.pid}.npy"), alone[:].numpy())


def test_the_chunk_of_a_process_that_died_is_taken_over(shared: SharedFeatures) -> None:
    other, file, asked = in_a_process(HANGS), file_of(shared), []

    def kill(done: int) -> None:
        asked.append(done)
        if len(asked) > 30:  # it has waited for the other one for a while
            other.kill()

    assert sum(file.state[:, 0] != FREE) == 1
    assert file.fill(numbers, kill)
    other.wait(30)
    assert asked.count(file.chunks[-1].stop - len(file.chunks[0])) > 10, "it has not waited"
    assert torch.equal(file.tensor([3], torch.float32)[:, 0], torch.arange(1000).float())


def test_waiting_for_another_process_ends_when_the_slot_is_stopped(shared: SharedFeatures) -> None:
    other, file = in_a_process(HANGS), file_of(shared)

    def stop(done: int) -> None:
        if done == 1000 - len(file.chunks[0]):
            raise StopAsked("stopped")

    with pytest.raises(StopAsked):
        file.fill(numbers, stop)
    other.kill()
    other.wait(30)


def test_an_error_frees_the_chunk(shared: SharedFeatures) -> None:
    file = file_of(shared)

    def broken(chunk: range) -> Iterator[torch.Tensor]:
        yield next(numbers(chunk))
        raise ValueError("a broken image")

    with pytest.raises(ValueError, match="a broken image"):
        file.fill(broken, tell)
    assert not file.state.any()
    assert file.fill(numbers, tell)
    assert (file.state[:, 0] == DONE).all()


def test_a_folder_that_somebody_removed_ends_nothing() -> None:
    shared = SharedFeatures()
    file = file_of(shared)
    file.path.unlink()
    assert not file.fill(numbers, tell), "another process found the disk full before this one opened the file"
    assert "features of the frozen blocks are not cached" in shared.problem
    shutil.rmtree(shared.folder)
    assert shared.find("more", file.chunks) is None
    again = shared.file("more", file.chunks, ONE, 1e9)
    assert again is not None
    assert again.fill(numbers, tell)
    shared.close()


def test_a_file_that_was_not_begun_to_its_end_does_not_count_twice() -> None:
    shared = SharedFeatures()
    (shared.folder / "some.features").write_bytes(bytes(32))
    assert shared.file("some", [range(4)], 8, 40) is not None
    shared.close()


def test_what_a_killed_process_computed_is_kept_and_what_it_held_is_not() -> None:
    other = in_a_process("file.fill(numbers, tell); print('there', flush=True); time.sleep(600)")
    assert suffixes() == [".features", ".member", ".state", ".uses"]
    other.kill()
    other.wait(30)
    shared = SharedFeatures()
    assert suffixes() == [".features", ".member", ".state"]
    assert file_of(shared).is_done
    shared.close()
    assert suffixes() == [".features", ".state"]


def test_files_of_an_earlier_start_of_the_system_are_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the system may have cut off data that were noted as done."""
    shared = SharedFeatures()
    assert file_of(shared).fill(numbers, tell)
    shared.close()
    (folder / "boot").write_text("another start")
    monkeypatch.setattr(shared_features, "BOOT_ID", folder / "boot")
    shared = SharedFeatures()
    assert not file_of(shared).state.any()
    shared.close()


def test_files_that_nobody_has_used_for_a_week_are_removed() -> None:
    shared = SharedFeatures()
    old, new = (shared.file(name, chunks_of(1000, 100), ONE, 1e9) for name in ("old", "new"))
    assert old is not None
    assert new is not None
    long_ago = time.time() - shared_features.KEEP_S - 60
    os.utime(old.path.with_suffix(".state"), (long_ago, long_ago))
    beside = SharedFeatures()
    assert old.path.exists(), "a living process uses it"
    beside.close()
    shared.close()
    SharedFeatures().close()
    assert (old.path.exists(), new.path.exists()) == (False, True)


def test_folders_of_containers_that_are_gone_are_removed_after_weeks() -> None:
    shared = SharedFeatures()
    old, new = (shared.folder.parent / name for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "some.features").write_bytes(bytes(32))
    long_ago = time.time() - shared_features.GONE_S - 60
    for path in (old / "some.features", old, new):
        os.utime(path, (long_ago, long_ago))
    shared.close()
    SharedFeatures().close()
    assert (old.exists(), new.exists()) == (False, True)


def test_the_files_used_least_recently_make_room_but_not_those_in_use() -> None:
    chunks, limit = chunks_of(1000, 100), 3000 * ONE
    before = SharedFeatures()
    for age, name in enumerate(("third", "first", "second")):
        file = before.file(name, chunks, ONE, limit)
        assert file is not None
        used = time.time() - 100 + {"first": 0, "second": 1, "third": 2}[name] + age / 10
        os.utime(file.path.with_suffix(".state"), (used, used))
    beside = SharedFeatures()
    assert beside.file("more", chunks, ONE, limit) is None
    before.close()
    assert beside.file("second", chunks, ONE, limit)
    assert beside.file("more", chunks, ONE, limit)
    assert sorted(file.stem for file in beside.folder.glob("*.features")) == ["more", "second", "third"]
    assert beside.file("large", chunks, 2 * ONE, limit) is None, "two are in use"
    assert (beside.folder / "third.features").exists(), "nothing is removed in vain"
    beside.close()


def test_a_file_that_failed_is_tried_again_by_the_next_search(shared: SharedFeatures) -> None:
    file = file_of(shared)
    shared.fail(file, OSError("No space left on device"))
    beside = SharedFeatures()
    assert beside.file("name", file.chunks, ONE, 1e9) is None
    beside.close()
    shared.close()
    later = SharedFeatures()
    assert file_of(later).fill(numbers, tell)
    later.close()


def test_all_files_together_stay_within_the_limit(shared: SharedFeatures) -> None:
    chunks = chunks_of(1000, 100)
    assert shared.file("one", chunks, ONE, 2000 * ONE)
    assert shared.file("two", chunks, ONE + 1, 2000 * ONE) is None
    assert shared.file("two", chunks, ONE, 2000 * ONE)
    assert shared.file("one", chunks, ONE, 0), "it is there already"
    assert not shared.problem
    other = SharedFeatures()
    assert other.file("three", chunks, ONE, 2000 * ONE) is None
    assert "those of other processes take" in other.problem
    assert other.problem.endswith("raise backbone.cache_gib")
    other.close()


def test_a_disk_without_room_is_not_filled(shared: SharedFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2000 * ONE + shared_features.SPARE_BYTES))
    chunks = chunks_of(1000, 100)
    assert shared.file("one", chunks, ONE, 1e9)
    assert shared.file("two", chunks, ONE + 1, 1e9) is None, "what the first file will hold counts"
    assert "features of the frozen blocks are not cached: 0.0 GiB are needed" in shared.problem


def test_a_disk_that_becomes_full_ends_the_cache_and_not_the_run(shared: SharedFeatures) -> None:
    file, limits = file_of(shared), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500 * ONE, limits[1]))
    try:
        assert not file.fill(numbers, tell)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not file.path.exists()
    assert "File too large" in shared.problem
    assert shared.file("name", file.chunks, ONE, 1e9) is None, "it is not tried again"


def test_features_of_folds_are_taken_from_the_parts_without_a_copy() -> None:
    one, two = torch.randn(20, 3), torch.randn(9, 3)
    some, others = np.array([1, 4, 5, 17]), np.array([0, 3, 8])
    whole = torch.cat([one[some], two[others], two])
    features = Features([Part(one, 2, some), Part(two, 2, others), Part(two, 2)])
    for wanted in (slice(None), slice(3, 9), np.array([15, 0, 6, 6, 3]), np.array([2])):
        assert torch.equal(features[wanted], whole[wanted])
    assert Features([Part(one, 2)])[2:5].data_ptr() == one[2:].data_ptr()


def stops(shared: SharedFeatures) -> list[int]:
    return sorted(int(file.stem.split("-")[1]) for file in shared.folder.glob("*.features"))


def features_of(workspace: Workspace, config: RunConfig) -> tuple[Features, Run]:
    run = Run(config, workspace)
    found = workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train))
    assert found is not None
    return found, run


def direct(data: str, config: RunConfig) -> torch.Tensor:
    workspace = Workspace(data, Ranks.alone())
    run = Run(config, workspace)
    return workspace.frozen(
        run.config, run.model, workspace.images(run.config, run.train), np.arange(run.train.num_samples)
    )


def test_deeper_features_come_from_the_shallowest_that_a_run_of_the_search_needs(
    small_data: str, shared: SharedFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are read once, although the first request is for the output of all blocks."""
    probe, all_blocks = settings(LIFT_TINY), settings(LIFT_TINY, tuner__kind="adaptformer")
    last = settings(LIFT_TINY, tuner__kind="adaptformer", tuner__blocks=[5])
    two = settings(LIFT_TINY, tuner__kind="adaptformer", tuner__blocks=[4, 5])
    workspace = Workspace(small_data, Ranks.alone(), shared, [all_blocks, probe, two, last])
    seen: list[FeaturesDone | None] = []
    workspace.watch = seen.append
    found = {6: features_of(workspace, probe)[0][:]}
    assert stops(shared) == [4, 6]
    assert [done.images for done in seen if done][-1] == 96
    assert seen[-1] is None
    monkeypatch.setattr(
        "lift_ray.training.workspace.evaluation_batches", lambda *_, **__: pytest.fail("an image was read")
    )
    found |= {5: features_of(workspace, last)[0][:], 4: features_of(workspace, two)[0][:]}
    assert stops(shared) == [4, 5, 6]
    monkeypatch.undo()
    for stop, config in ((6, probe), (5, last), (4, two)):
        torch.testing.assert_close(found[stop], direct(small_data, config), atol=1e-5, rtol=0)


def test_blocks_run_for_each_batch_if_only_fewer_of_them_fit(small_data: str, shared: SharedFeatures) -> None:
    two = settings(LIFT_TINY, tuner__kind="adaptformer", tuner__blocks=[4, 5])
    workspace = Workspace(small_data, Ranks.alone(), shared)
    features_of(workspace, two)
    limit_gib = sum(file.stat().st_size for file in shared.folder.glob("*.features")) / 2**30
    last = settings(
        LIFT_TINY, tuner__kind="adaptformer", tuner__blocks=[5], backbone__cache_gib=limit_gib, optim__epochs=2
    )
    found, run = features_of(workspace, last)
    assert stops(shared) == [4]
    batch = np.array([90, 3, 4])
    torch.testing.assert_close(found[batch], direct(small_data, last)[batch], atol=1e-5, rtol=0)
    plain = Run(last, Workspace(small_data, Ranks.alone()))
    for one, other in zip(run.epochs(), plain.epochs(), strict=True):
        assert one.validation == pytest.approx(other.validation, abs=1e-5)


def test_nothing_is_cached_that_does_not_fit(small_data: str, small_clip: str, shared: SharedFeatures) -> None:
    workspace = Workspace(small_data, Ranks.alone(), shared)
    run = Run(settings(small_clip, backbone__cache_gib=1e-6), workspace)
    assert workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train)) is None
    assert not stops(shared)


SPACE: dict[str, Any] = {
    "name": "shared",
    "dataset": "d",
    "base": {"augment": {"kind": "none"}, "optim": {"epochs": 2, "global_batch_size": 16}},
    "space": {
        "tuner.kind": {"choices": ["adaptformer", "linear_probe"]},
        "tuner.blocks.last": {"int": [1, 3], "when": {"tuner.kind": "adaptformer"}},
        "optim.lr": {"float": [0.01, 0.1]},
    },
}


def lowest(space: dict[str, Any], num_blocks: int = 12) -> list[int]:
    """Return the first tuned block of each way to tune, in ascending order."""
    runs = [RunConfig.model_validate(tree) for tree in tunings(SpaceFile.model_validate(space))]
    return sorted(first_tuned(run.resolve(8, num_blocks, 64), num_blocks) for run in runs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [9, 10, 11, 12]),
        ({"baselines": [{"tuner.kind": "lora", "tuner.blocks.last": 5, "optim.lr": 0.02}]}, [7, 9, 10, 11, 12]),
        ({"base": {**SPACE["base"], "augment": {"kind": "mda"}}}, []),
        ({"space": {**SPACE["space"], "augment.kind": {"choices": ["mda", "none"]}}}, [9, 10, 11, 12]),
        ({"space": {"optim.lr": {"float": [0.01, 0.1]}}}, [0]),
        ({"space": {"tuner.blocks": {"choices": [[11], {"last": 2}]}}}, [10, 11]),
        ({"space": {**SPACE["space"], "tuner.blocks.last": {"int": [1, 3], "when": {"optim.lr": 0.05}}}}, []),
    ],
)
def test_the_space_tells_which_blocks_its_runs_tune(changes: dict[str, Any], expected: list[int]) -> None:
    assert lowest(SPACE | changes) == expected


def test_progress_is_one_text_for_the_slots_that_compute_together() -> None:
    line = progress_table.features_line(FeaturesDone(2100, 5767, 96.2))
    assert line == "computing features of the frozen blocks: 2,100 of 5,767 images, 96 images/s, 38 s left"
    assert progress_table.features_line(FeaturesDone(0, 1, 0.0)).endswith("0 of 1 image")


@pytest.mark.slow
def test_a_search_of_two_slots_computes_each_chunk_once_and_finds_what_one_process_finds(
    folder: Path,
    small_data: str,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress_table, "FEATURES_EVERY_S", 0.5)
    cache = Path(os.environ["SEARCH_CACHE"])
    for features in cache.glob("lift_ray-features-*/*/*.state"):  # of other tests
        features.unlink()
    space = SpaceFile.model_validate(
        SPACE
        | {
            "base": {**SPACE["base"], "backbone": {"model": LIFT_TINY}},
            "space": {**SPACE["space"], "tuner.blocks.last": {"int": [1, 2], "when": {"tuner.kind": "adaptformer"}}},
            "search": {"trials": 5, "sampler": "random", "scheduler": {"kind": "none"}, "tte_best": 0},
            "baselines": [{"tuner.kind": "linear_probe", "optim.lr": 0.1}],
        }
    )
    study, out = Study(space, small_data, open_storage(None, folder), resume=False), Output(str(folder))
    data = SearchData.of(space, open_dataset(small_data))
    with Interrupts() as interrupts:
        run_search(study, small_data, Need(1, 1, 0), lambda: 2, out, interrupts, data=data, slot_class=NotingSlot)
    chunks = chunks_in(folder / "chunks")
    assert len(chunks) == len(set(chunks))
    assert {stop for _, stop, _ in chunks} == {"4", "5", "6"}
    assert len(processes_in(folder / "chunks")) == 2
    assert " and trial 1: computing features of the frozen blocks: " in capsys.readouterr().out
    assert not list(cache.glob("lift_ray-features-*/*/*.member")), "the slots have left"
    workspace = Workspace(small_data, Ranks.alone())
    for row in study.rows.values():
        alone = list(Run(space.config(row.values), workspace, TAUS).epochs())
        assert [metrics.validation for metrics in row.history] == [metrics.validation for metrics in alone]
