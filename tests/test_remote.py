"""Data in S3 (moto's server on loopback) that fails now and then, or for good; what is kept of it on this machine."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import aiohttp
import botocore.exceptions
import fsspec
import numpy as np
import pytest
from embedded import jpegs
from flaky_store import Store, opened, write
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from processes import wait_for

from lift_ray.data.convert.shards import SplitRecord, publish, write_shard
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.storage.store import may_pass


def test_a_dataset_in_s3_reads_as_it_was_written(store: Store) -> None:
    split = opened()
    assert split.labels.tolist() == [row % 3 for row in range(60)]
    assert [shard.row_groups for shard in split.shards] == [(4,) * 5] * 3
    assert RowReader(split).read(np.arange(60)) == jpegs(60)


def test_the_manifest_names_the_checksums_of_the_shards(store: Store) -> None:
    for shard in opened().shards:
        data = fsspec.filesystem("s3").cat_file(shard.url)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
        assert sum(shard.row_group_bytes) == pytest.approx(len(data), rel=0.2)


def test_opening_again_reads_no_object(store: Store) -> None:
    first = opened()
    assert store.reads
    store.forget()
    second = opened()
    assert store.reads == []
    assert second.shards == first.shards
    assert (second.labels == first.labels).all()
    assert RowReader(second).read(np.arange(60)) == jpegs(60)


def test_the_kept_index_has_groups_and_what_the_manifest_says(store: Store) -> None:
    samples = [(image, f"{row}.jpg", row % 2, row // 3) for row, image in enumerate(jpegs(9))]
    record = write_shard("s3://pets/grouped", "train", 0, samples, ("cat", "dog"), row_group_rows=4, has_groups=True)
    about = {"validation": "drawn", "labelled_counts": [6, 9], "groups": True}
    publish("s3://pets/grouped", ("cat", "dog"), {"train": SplitRecord((record,))}, about)
    for reads in (True, False):
        store.forget()
        dataset = open_dataset("s3://pets/grouped")
        assert bool(store.reads) == reads
        groups = dataset.split("train").groups
        assert groups is not None
        assert groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert dataset.validation == "drawn"
        assert dataset.labelled_counts is not None
        assert dataset.labelled_counts.tolist() == [6, 9]
    assert open_dataset("s3://pets/set").split("train").groups is None


def test_a_dataset_that_changed_is_read_again(store: Store) -> None:
    write("s3://pets/other", 30)
    assert open_dataset("s3://pets/other").split("train").num_samples == 30
    write("s3://pets/elsewhere", 40)
    stranger = fsspec.filesystem("s3", use_listings_cache=False)  # as another process would, behind our back
    for path in stranger.ls("pets/elsewhere"):
        stranger.copy(path, path.replace("elsewhere", "other"))
    assert open_dataset("s3://pets/other").split("train").num_samples == 40


def test_a_broken_index_is_rebuilt_and_an_unwritable_one_left_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = opened().labels
    [index] = (tmp_path / "cache" / "index").iterdir()
    whole = index.read_bytes()
    for broken in (b"", whole[:100], whole[: len(whole) // 2] + b"\0" * 40 + whole[len(whole) // 2 + 40 :]):
        index.write_bytes(broken)
        assert (opened().labels == labels).all()
        assert index.stat().st_size == len(whole)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "file" / "cache"))
    assert (opened().labels == labels).all()


def test_a_row_group_is_one_request_of_exactly_its_images(store: Store) -> None:
    split = opened()
    reader = RowReader(split)
    reader.read(np.array([0]))
    store.forget()
    reader.read(np.array([5, 6]))
    [(name, span)] = store.reads
    start, end = map(int, span.removeprefix("bytes=").split("-"))
    assert name == "train-00000-of-00003.parquet"
    assert 0 <= end + 1 - start - sum(map(len, jpegs(60)[4:8])) < 200


def test_threads_load_the_same_row_group_once(store: Store) -> None:
    reader = RowReader(opened())
    store.forget()
    with ThreadPoolExecutor(8) as pool:
        for images in pool.map(lambda _: reader.read(np.arange(60)), range(8)):
            assert images == jpegs(60)
    footers, groups = [span for _, span in store.reads if span.startswith("bytes=-")], 15
    assert (len(footers), len(set(store.reads))) == (3, 3 + groups)
    assert len(store.reads) == 3 + groups


def loaded(reader: RowReader) -> None:
    wait_for("what is read ahead", lambda: all(entry.is_done for entry in reader._cache.values()), every_s=0.01)


def test_what_is_read_ahead_is_not_read_again(store: Store) -> None:
    reader = RowReader(opened())
    reader.prefetch(np.arange(60))
    loaded(reader)
    store.forget()
    assert reader.read(np.arange(60)) == jpegs(60)
    assert store.reads == []


def test_reading_ahead_stays_within_the_memory_it_may_take_and_drops_what_was_read(store: Store) -> None:
    split = opened()
    biggest = max(max(shard.row_group_bytes) for shard in split.shards)
    reader = RowReader(split, cache_bytes=4 * biggest)
    reader.prefetch(np.arange(60))
    waiting = list(reader._cache)
    assert waiting == list(range(len(waiting)))
    assert len(waiting) >= 4
    assert reader.cached_bytes <= 4 * biggest
    loaded(reader)
    reader.prefetch(np.array([59]))  # what waits to be read does not make room
    assert list(reader._cache) == waiting
    for row in range(0, 60, 4):
        assert reader.read(np.arange(row, row + 4)) == jpegs(60)[row : row + 4]
        reader.prefetch(np.arange(row + 4, min(row + 12, 60)))
        assert reader.cached_bytes <= 4 * biggest
        assert row + 12 > 60 or {row // 4 + 1, row // 4 + 2} <= set(reader._cache)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (aiohttp.ClientPayloadError("not enough data"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), True),
        (botocore.exceptions.FlexibleChecksumError(error_msg="differs"), True),
        (botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "GetObject"), True),
        (botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 400}}, "GetObject"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (ConnectionResetError(), True),
        (FileNotFoundError(), False),
        (ValueError("not Parquet"), False),
    ],
)
def test_only_temporary_errors_are_retried(error: Exception, expected: bool) -> None:
    assert may_pass(error) == expected


@pytest.mark.parametrize("kind", ["500", "503", "429", "cut", "short", "drop", "hang", "flip"])
def test_a_store_that_fails_now_and_then_gives_the_same_bytes(store: Store, kind: str) -> None:
    split = opened()
    reader = RowReader(split)
    reader.read(np.array([0]))
    store.faults = [kind] * (1 if kind == "hang" else 3)
    assert reader.read(np.arange(60)) == jpegs(60)
    assert store.faults == []


@pytest.mark.parametrize("kind", ["500", "cut", "drop"])
def test_opening_survives_failures_too(store: Store, kind: str) -> None:
    store.faults = [kind] * 4
    assert opened().num_samples == 60
    assert store.faults == []


@pytest.mark.parametrize(
    ("kind", "patience_s", "got"),
    [
        # s3fs repeats a request that got a 500 for a second by itself before it fails: that is one try of ours
        ("500", 4.0, r"'.*We encountered an internal error' \(\d+ tries in \d+ s\); check the store and the network"),
        ("drop", 1.0, r"'.*' \(\d+ tr(y|ies) in \d+ s\); check the store and the network"),
        ("hang", 1.0, r"'no answer in time' \(1 try in \d+ s\); check the store and the network"),
        ("short", 2.0, r"'\d+ of \d+ bytes' \(\d+ tries in \d+ s\); check the store and the network"),
    ],
)
def test_a_store_that_never_answers_well_is_bad_input_in_bounded_time(
    store: Store, kind: str, patience_s: float, got: str
) -> None:
    split = opened()
    reader = RowReader(split, patience_s=patience_s)
    reader.read(np.array([0]))
    store.always = kind
    with pytest.raises(BadInput) as caught:
        reader.read(np.array([10]))
    assert "\n" not in str(caught.value)
    store.always = ""
    assert reader.read(np.array([10])) == [jpegs(60)[10]]
    pattern = rf"s3://pets/set/train-00000-of-00003\.parquet: must be a readable file, but got {got}"
    assert re.fullmatch(pattern, str(caught.value))


def test_a_shard_that_stays_broken_is_reported_after_retries(store: Store) -> None:
    reader = RowReader(opened(), patience_s=2.0)
    reader.read(np.array([0]))
    store.always = "flip"
    with pytest.raises(
        BadInput, match=r"CRC checksum verification failed .* \(\d+ tries in \d+ s\); copy it again, or"
    ):
        reader.read(np.array([10]))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "s3://nowhere/set",
            "s3://nowhere/set: must be a folder of Parquet shards, but nothing is there; check the path",
        ),
        ("s3://pets/none", "s3://pets/none: must be a folder of Parquet shards, but nothing is there; check the path"),
    ],
)
def test_a_missing_bucket_or_folder_is_reported_at_once(
    store: Store, uri: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_ray.storage.store.time.sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(BadInput) as caught:
        open_dataset(uri)
    assert str(caught.value) == message


def test_a_missing_permission_is_reported_at_once(store: Store) -> None:
    store.listing = "403"
    with pytest.raises(
        BadInput, match=r"must be a folder of Parquet shards, but access is denied .*; check your permissions"
    ):
        opened()
    store.listing, store.always = "", "403"
    with pytest.raises(BadInput, match=r"manifest\.json: must be a readable file, but access is denied .*; check your"):
        opened()


def test_a_listing_that_keeps_failing_is_bad_input(store: Store) -> None:
    store.listing = "503"
    with pytest.raises(
        BadInput, match=r"^s3://pets/set: must be a folder .* \(\d+ tries in \d+ s\); check the path and"
    ):
        opened(patience_s=4.0)  # the first answer of a busy machine may take a second


class Hub(AbstractFileSystem):  # type: ignore[misc]
    """A store like the Hugging Face hub's: not asynchronous, and its files read megabytes ahead unless told not to."""

    protocol = "hub"
    reads: ClassVar[list[tuple[str, int, int]]] = []
    fails: ClassVar[list[Exception]] = []
    root: ClassVar[Path]

    def ls(self, path: str, detail: bool = True, **_: object) -> list[dict[str, object]]:
        return [
            {"name": f"{path}/{file.name}", "type": "file", "size": file.stat().st_size, "blob_id": file.name}
            for file in self.root.iterdir()
        ]

    def _open(self, path: str, mode: str = "rb", **options: object) -> AbstractBufferedFile:
        return HubFile(self, path, mode, size=(self.root / Path(path).name).stat().st_size, **options)


class HubFile(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        name = Path(self.path).name
        Hub.reads.append((name, start, end))
        if Hub.fails:
            raise Hub.fails.pop()
        return (Hub.root / name).read_bytes()[start:end]


def test_a_store_that_is_not_asynchronous_is_read_exactly_and_patiently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "cache"))
    write(str(tmp_path / "set"))
    Hub.root = tmp_path / "set"
    fsspec.register_implementation("hub", Hub, clobber=True)
    Hub.fails = [ConnectionResetError("reset by peer"), TimeoutError()]
    split = open_dataset("hub://any/set").split("train")
    assert Hub.fails == []
    sizes = {file.name: file.stat().st_size for file in Hub.root.iterdir()}
    labels = [end - start for name, start, end in Hub.reads if name != "manifest.json" and end < sizes[name]]
    assert 0 < max(labels) < 200, "beside the footers, which are at the end of a file"
    Hub.reads.clear()
    assert (open_dataset("hub://any/set").split("train").labels == split.labels).all()
    assert Hub.reads == []
    Hub.fails = [ConnectionResetError("reset by peer"), TimeoutError()]
    assert RowReader(split).read(np.arange(60)) == jpegs(60)
    assert Hub.fails == []
    Hub.fails = [PermissionError("private")]
    with pytest.raises(
        BadInput, match=r"must be a readable file, but access is denied \(private\); check your permissions"
    ):
        RowReader(split).read(np.array([0]))
