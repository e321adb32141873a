"""Whole shards of a remote store kept on this machine's disk: limit, checksums, failures, several processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from embedded import jpegs
from flaky_store import Store, opened, write

from lift_ray.data import cache
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput


def kept_shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*.parquet"))


def test_whole_shards_are_kept_and_then_read_from_this_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE_GB", "1")
    split = opened()
    store.forget()
    assert RowReader(split).read(np.arange(60)) == jpegs(60)
    sizes = Counter(shard.num_bytes for shard in split.shards)
    assert Counter(path.stat().st_size for path in kept_shards(tmp_path)) == sizes
    store.forget()
    assert RowReader(split).read(np.arange(60)) == jpegs(60)
    assert store.reads == []


def test_a_copy_that_is_gone_or_broken_is_read_from_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE_GB", "1")
    reader = RowReader(opened(), cache_bytes=0)
    reader.read(np.arange(60))
    gone, broken, _ = kept_shards(tmp_path)
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:100] + b"\0" * 9000 + broken.read_bytes()[9100:])
    assert reader.read(np.arange(60)) == jpegs(60)


def test_a_download_that_differs_from_the_manifest_is_made_again_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE_GB", "1")
    monkeypatch.setattr(cache, "DOWNLOAD_BYTES", 5000)  # of a whole object boto would notice by itself
    split = opened()
    store.faults = ["flip"]
    assert RowReader(split).read(np.arange(20)) == jpegs(20)
    store.always = "flip"
    with pytest.raises(
        BadInput, match=r"must match the sha256 in the manifest, .*, but got a checksum mismatch \(.*; run conv"
    ):
        RowReader(split).read(np.array([20]))
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 2  # the good one, and the lock


def test_the_kept_shards_stay_within_the_limit_and_the_least_recently_used_go(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = opened()
    size = max(shard.num_bytes for shard in split.shards)
    monkeypatch.setenv("LIFT_CACHE_GB", str(2.5 * size / 1e9))
    reader = RowReader(split, cache_bytes=0)
    for row in (0, 20, 40):
        assert reader.read(np.array([row])) == [jpegs(60)[row]]
    first, second = sorted(kept_shards(tmp_path), key=lambda path: path.stat().st_mtime)
    store.forget()
    reader.read(np.array([40]))
    assert len(store.reads) == 1  # of the same data set: no shard makes room for another
    os.utime(first, (2, 2))
    os.utime(second, (1, 1))
    assert reader.read(np.array([40])) == [jpegs(60)[40]]
    assert first in kept_shards(tmp_path)
    assert second not in kept_shards(tmp_path)
    assert sum(path.stat().st_size for path in kept_shards(tmp_path)) <= 2.5 * size


def test_shards_of_another_dataset_make_room(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("s3://pets/later", 12)
    later = open_dataset("s3://pets/later").split("train")
    split = opened()
    monkeypatch.setenv("LIFT_CACHE_GB", str(1.5 * split.shards[0].num_bytes / 1e9))
    for part in (split, later):
        assert RowReader(part).read(np.arange(12)) == jpegs(12)
        [copy] = kept_shards(tmp_path)
        assert copy.stat().st_size == part.shards[0].num_bytes


def test_a_shard_that_another_process_downloads_is_read_from_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE_GB", "1")
    reader = RowReader(opened(), cache_bytes=0)
    reader.read(np.array([0]))
    [copy] = kept_shards(tmp_path)
    partial = copy.rename(copy.with_name(f"{copy.stem}.1.partial"))
    os.utime(partial)
    assert reader.read(np.array([0])) == jpegs(1)
    assert kept_shards(tmp_path) == []
    os.utime(partial, (1, 1))  # that process has died
    assert reader.read(np.array([0])) == jpegs(1)
    assert (kept_shards(tmp_path), partial.exists()) == ([copy], False)


def test_an_unwritable_disk_gives_one_warning_and_data_is_read_from_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = opened()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("LIFT_CACHE_GB", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert RowReader(split).read(np.arange(60)) == jpegs(60)
    [warning] = [str(entry.message) for entry in caught if "no longer cached" in str(entry.message)]
    assert warning.endswith("reading from the store")


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_bad_cache_size_is_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("LIFT_CACHE_GB", value)
    with pytest.raises(BadInput) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value) == f"LIFT_CACHE_GB: must be a number of at least 0, but got {value!r}; for example, 100"


READ_ALL = """\
import hashlib
import numpy as np
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
split = open_dataset("s3://pets/set").split("train")
with RowReader(split, cache_bytes=0) as reader:
    for _ in range(3):
        data = b"".join(reader.read(np.arange(60)))
print(hashlib.sha256(data).hexdigest())
"""


def test_processes_share_the_index_and_the_shards(store: Store, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LIFT_CACHE_GB": "1",
        "FSSPEC_S3_KEY": "key",
        "FSSPEC_S3_SECRET": "secret",  # pragma: allowlist secret
        "FSSPEC_S3_ENDPOINT_URL": store.endpoint,
    }
    running = [
        subprocess.Popen([sys.executable, "-c", READ_ALL], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = [process.communicate(timeout=100)[0].strip() for process in running]
    assert digests == [hashlib.sha256(b"".join(jpegs(60))).hexdigest()] * 2
    whole = {f"bytes=0-{shard.num_bytes - 1}" for shard in opened().shards}
    assert sorted(name for name, span in store.reads if span in whole) == [
        f"train-0000{n}-of-00003.parquet" for n in range(3)
    ]
    names = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(names) == 1 + 3 + 1  # index, shards, lock: nothing half-written stays
