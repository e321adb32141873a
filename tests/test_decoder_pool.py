"""Decoding in processes: the same batches as with threads, whatever ends, breaks or is held."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from embedded import embedded
from hypothesis import given, settings
from hypothesis import strategies as st
from same_batches import assert_same

from lift_ray.data.augment import SMALLEST_AREA, Augmentation, Preprocessing, View, square_crop
from lift_ray.data.batch_stream import Division
from lift_ray.data.batches import ONE_THREAD, Batch, Decoders, evaluation_batches, training_batches, unlabelled_batches
from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.dataset import Split
from lift_ray.data.decoder_pool import MOST_DEATHS, DecoderPool
from lift_ray.data.open import open_dataset
from lift_ray.data.order import Sampling
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, RunFailed
from lift_ray.methods.world import Ranks
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small(small_data: str) -> Split:
    return open_dataset(small_data).split("train")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with_two = DecoderPool(2)
    yield with_two
    with_two.close()


def train(
    split: Split,
    decoders: Decoders = ONE_THREAD,
    *,
    batch: int = 16,
    epoch: int = 0,
    start_step: int = 0,
    rank: int = 0,
) -> Iterator[Batch]:
    sampling = Sampling(3, batch, rank=rank, world_size=1 + (rank > 0))
    crop = partial(square_crop, smallest=SMALLEST_AREA)
    augmentation = Augmentation(Preprocessing(24), crop, num_patches=9, patch_dropout=0.5)
    with RowReader(split) as reader:
        yield from training_batches(
            reader, split, sampling, augmentation, epoch=epoch, start_step=start_step, decoders=decoders
        )


def evaluate(split: Split, decoders: Decoders = ONE_THREAD, tte: str = "off") -> Iterator[Batch]:
    view = View(Preprocessing(24), tte)
    with RowReader(split) as reader:
        yield from evaluation_batches(reader, split, view, batch_size=20, decoders=decoders)


def pairs(split: Split, decoders: Decoders = ONE_THREAD) -> Iterator[Batch]:
    augmentation = Augmentation(Preprocessing(24), None)
    with RowReader(split) as reader:
        yield from unlabelled_batches(
            reader, split, Sampling(1, 40), augmentation, cutout_frac=0.5, start_step=1, num_steps=4, decoders=decoders
        )


@pytest.mark.parametrize("number", [1, 3])  # others here have two
def test_any_number_of_processes_gives_the_batches_of_threads(small: Split, number: int) -> None:
    here = Decoders(1, DecoderPool(number))
    for epoch, start_step, rank in ((0, 0, 0), (1, 2, 0), (0, 0, 1)):
        own = {"epoch": epoch, "start_step": start_step, "rank": rank}
        assert_same(train(small, here, **own), train(small, **own))
    assert_same(pairs(small, here), pairs(small))
    for tte in ("off", "five_crops"):
        assert_same(evaluate(small, here, tte), evaluate(small, ONE_THREAD, tte))
    here.pool.close()  # type: ignore[union-attr]


def test_streams_at_the_same_time_do_not_meet_and_one_may_end_early(small: Split, pool: DecoderPool) -> None:
    here = Decoders(1, pool)
    abandoned, training = train(small, here, batch=8), train(small, here)
    next(abandoned)
    plain = train(small)
    for number, ours in enumerate(training):
        assert torch.equal(ours.images, next(plain).images)
        if number == 1:
            abandoned.close()  # type: ignore[attr-defined]
            assert_same(evaluate(small, here), evaluate(small))


def test_batches_that_are_kept_are_not_written_again(small: Split, pool: DecoderPool) -> None:
    kept = list(train(small, Decoders(1, pool), batch=4))
    assert_same(iter(kept), train(small, batch=4))


def test_memory_is_used_again_and_given_back(small: Split, pool: DecoderPool) -> None:
    def bytes_of_file() -> int:
        assert pool._file is not None
        return os.fstat(pool._file.fileno()).st_size

    for _ in range(3):
        assert sum(len(batch.labels) for batch in train(small, Decoders(1, pool))) == 96
    first = bytes_of_file()
    for _ in range(5):
        assert sum(len(batch.labels) for batch in train(small, Decoders(1, pool))) == 96
    assert bytes_of_file() <= 2 * first  # the answer to the end of the stream before may be missing still
    list(evaluate(small, Decoders(1, pool)))
    for decoder in pool._decoders:
        assert "/dev/shm/" not in Path(f"/proc/{decoder.process.pid}/maps").read_text(), "named shared memory"
    assert "/dev/shm/psm_" not in Path("/proc/self/maps").read_text(), "named shared memory"


def test_a_stream_of_a_closed_pool_gives_no_images(small: Split) -> None:
    pool = DecoderPool(1)
    stream = train(small, Decoders(1, pool))
    next(stream)
    pool.close()
    with pytest.raises(RuntimeError, match="the pool was closed"):
        next(stream)


def test_processes_that_cannot_start_are_one_line(small: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(
        RunFailed, match=r"cannot start: .*unavailable; set optim.decode_processes=0 to decode in threads$"
    ):
        next(train(small, Decoders(1, DecoderPool(1))))


def with_broken(folder: str, good: list[bytes], broken: list[int]) -> Split:
    samples = [(b"no image" if i in broken else data, f"{i}.jpg", i % 2) for i, data in enumerate(good)]
    publish(folder, ["a", "b"], {"train": write_split(folder, "train", samples, ["a", "b"], rows_per_shard=10)})
    return open_dataset(folder).split("train")


@pytest.mark.parametrize("broken", [[0], [33], [7, 30]])
def test_a_broken_image_gives_the_error_of_threads(
    tmp_path: Path, small: Split, pool: DecoderPool, broken: list[int]
) -> None:
    with RowReader(small) as reader:
        split = with_broken(str(tmp_path), reader.read(np.arange(40)), broken)
    for batches in (partial(train, batch=40), evaluate):
        messages = []
        for decoders in (ONE_THREAD, Decoders(1, pool)):
            with pytest.raises(BadInput) as raised:
                list(batches(split, decoders))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
        assert "must be a readable image, but got bytes of no known format" in messages[0]
    assert_same(train(small, Decoders(1, pool)), train(small))


def test_a_shard_that_is_gone_gives_one_line(tmp_path: Path, small: Split, pool: DecoderPool) -> None:
    with RowReader(small) as reader:
        split = with_broken(str(tmp_path), reader.read(np.arange(40)), [])
    for shard in split.shards[2:]:
        Path(shard.url.removeprefix("file://")).unlink()
    with pytest.raises(BadInput, match=r"^.*train-.*parquet: "):
        list(evaluate(split, Decoders(1, pool)))


def test_processes_that_are_killed_are_replaced_and_nothing_changes() -> None:
    split, number = embedded("train", "caltech101-lt"), DecoderPool(2)
    plain = train(split, batch=64)
    for step, ours in enumerate(train(split, Decoders(1, number), batch=64)):
        assert torch.equal(ours.images, next(plain).images)
        if step in (1, 2, 6):
            victim = number._decoders[step % 2].process
            victim.kill()
            victim.wait(30)
        if step == 8:
            break
    number.close()


def test_a_process_that_dies_again_and_again_gives_one_line(monkeypatch: pytest.MonkeyPatch, small: Split) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunFailed, match=rf"ended with exit code 1 {MOST_DEATHS} times.* set optim.decode_processes=0 "):
        list(train(small, Decoders(1, DecoderPool(1))))


SCRIPT = """
from functools import partial
import os, sys, time
print("the script runs", flush=True)
from lift_ray.data.augment import Preprocessing, View
from lift_ray.data.batches import Decoders, evaluation_batches
from lift_ray.data.decoder_pool import DecoderPool
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
pool = DecoderPool(2)
split = open_dataset(sys.argv[1]).split("train")
for batch in evaluation_batches(RowReader(split), split, View(Preprocessing(24)), batch_size=20, decoders=Decoders(1, pool)):
    print(*(decoder.process.pid for decoder in pool._decoders), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(100)
"""


@pytest.mark.parametrize("end", ["by itself", "wait"])
def test_the_users_script_runs_once_and_its_decoders_end_with_it(tmp_path: Path, small_data: str, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), small_data, end], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "the script runs\n"
    decoders = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    if end == "wait":
        process.send_signal(signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert "the script runs" not in rest
    gone, alive = psutil.wait_procs(decoders, timeout=30)
    assert (len(gone), alive) == (2, [])


@settings(max_examples=60, deadline=None)
@given(number=st.integers(1, 9), window=st.integers(1, 60), batch=st.sampled_from([8, 64, 128]), seed=st.integers(0, 9))
def test_work_is_divided_evenly_over_a_few_batches(number: int, window: int, batch: int, seed: int) -> None:
    random, division = np.random.default_rng(seed), Division(number)
    given = np.zeros(number)
    for step in range(40):
        owners = division.divide(step + random.integers(0, window, batch))
        assert owners.min() >= 0
        given += np.bincount(owners, minlength=number)
        # a process may be ahead of the mean by twice its share of a batch, and one image
        assert given.max() <= given.mean() + 2 * batch / number + 1


def test_most_row_groups_are_read_by_one_process() -> None:
    random, division = np.random.default_rng(0), Division(8)
    readers: dict[int, set[int]] = {}
    for step in range(400):  # a window of 64 row groups that moves on by one each step
        groups = step + random.integers(0, 64, 128)
        for group, owner in zip(groups.tolist(), division.divide(groups).tolist(), strict=True):
            readers.setdefault(group, set()).add(owner)
    assert np.mean([len(owners) for owners in readers.values()]) < 1.5


def test_who_decodes_is_no_part_of_the_experiment(small_data: str, small_clip: str) -> None:
    def config(number: int | str) -> RunConfig:
        return RunConfig.model_validate(apply_overrides({}, {"optim.decode_processes": number}, RunConfig))

    assert config(3).digest() == config("auto").digest() == RunConfig().digest()
    workspace = Workspace(small_data, Ranks.alone(num_cpus=4))
    assert workspace.decoders(config("auto")) == Decoders(3)
    assert workspace.decoders(config(0)) == Decoders(3)
    three = workspace.decoders(config(3)).pool
    assert three is not None
    assert three.number == 3
    assert workspace.decoders(config(3)).pool is workspace.on(workspace.dataset).decoders(config(3)).pool is three
    on_gpu = Workspace(small_data, Ranks(0, 1, torch.device("meta"), 3))
    assert on_gpu.decoders(config("auto")).pool.number == 3  # type: ignore[union-attr]
    torch.set_num_threads(1)


def test_an_interrupted_run_continues_with_other_decoders(small_data: str, small_clip: str, tmp_path: Path) -> None:
    def run(number: int) -> Run:
        changed = {
            "backbone.model": small_clip,
            "optim.decode_processes": number,
            "optim.epochs": 2,
            "optim.global_batch_size": 16,
        }
        config = RunConfig.model_validate(apply_overrides({}, changed, RunConfig))
        return Run(config, Workspace(small_data, Ranks.alone()))

    undisturbed, first, second = run(0), run(0), run(2)
    expected = [undisturbed.train_epoch().train["loss"] for _ in range(2)]
    assert first.train_epoch().train["loss"] == expected[0]
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert second.train_epoch().train["loss"] == expected[1]
