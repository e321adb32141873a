"""Reading images out of shards, and writing shards that others can read."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import embedded, jpegs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lift_ray.data import reader
from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.dataset import Split
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.storage.store import locate


def cut() -> Split:
    return embedded("train", "caltech101-lt")


def every_jpeg() -> list[bytes]:
    return jpegs(4267, "train")


def images(count: int) -> list[tuple[bytes, str, int]]:
    """Real images with labels 0, 1, 2, 0, ..."""
    return [(every_jpeg()[row], f"folder/{row}.jpg", row % 3) for row in range(count)]


def write(destination: str, count: int, rows_per_shard: int = 10, row_group_rows: int = 4) -> Split:
    names = ("cat", "dog", "wild cat")
    record = write_split(
        destination, "train", images(count), names, rows_per_shard=rows_per_shard, row_group_rows=row_group_rows
    )
    publish(destination, names, {"train": record})
    return open_dataset(destination).split("train")


SAMPLES = st.deferred(lambda: st.integers(0, cut().num_samples - 1))


@settings(max_examples=25)
@given(samples=st.lists(SAMPLES, max_size=40), cache_bytes=st.sampled_from([0, 10**6, 10**9]))
def test_a_sample_is_the_same_bytes_in_any_order_and_with_any_cache(samples: list[int], cache_bytes: int) -> None:
    with RowReader(cut(), cache_bytes) as reader:
        got = reader.read(np.array(samples, dtype=np.int64))
    assert got == [every_jpeg()[cut().rows[sample]] for sample in samples]


def test_every_embedded_image_decodes_at_84_px() -> None:
    for data in every_jpeg()[::40]:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert min(image.size) == 84
            assert image.mode == "RGB"


def test_the_cache_stays_below_its_bound_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    split = write(str(tmp_path), 24, row_group_rows=4)
    group_bytes = max(sum(len(image) for image in every_jpeg()[start : start + 4]) for start in range(0, 24, 2)) + 100
    reader = RowReader(split, cache_bytes=3 * group_bytes)
    for sample in (0, 4, 8, 0, 10, 14, 0):
        reader.read(np.array([sample]))
        assert 0 < reader.cached_bytes <= 3 * group_bytes
    assert 0 in reader._cache
    assert 1 not in reader._cache


def test_a_split_that_fits_the_cache_is_read_once(tmp_path: Path) -> None:
    split = write(str(tmp_path), 12)
    reader = RowReader(split)
    before = reader.read(np.arange(12))
    for path in tmp_path.glob("*.parquet"):
        path.write_bytes(b"")
    assert reader.read(np.arange(12)) == before


def test_threads_may_share_a_reader() -> None:
    reader = RowReader(cut(), cache_bytes=10**6)
    asked = [np.random.default_rng(seed).integers(0, cut().num_samples, 50) for seed in range(8)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for samples, got in zip(asked, pool.map(reader.read, asked), strict=True):
            assert got == [every_jpeg()[row] for row in cut().rows[samples]]


def test_a_closed_reader_opens_its_files_again(tmp_path: Path) -> None:
    reader = RowReader(write(str(tmp_path), 12))
    before = reader.read(np.array([3]))
    reader.close()
    assert reader.cached_bytes == 0
    assert reader.read(np.array([3])) == before


def test_a_shard_that_changed_or_went_bad_under_the_reader_is_bad_input(tmp_path: Path) -> None:
    split = write(str(tmp_path), 12)
    shard = tmp_path / "train-00000-of-00002.parquet"
    good = shard.read_bytes()
    shard.write_bytes((tmp_path / "train-00001-of-00002.parquet").read_bytes())
    with pytest.raises(BadInput) as caught:
        RowReader(split).read(np.array([0]))
    assert str(caught.value) == f"{shard}: must not change after opening (10 rows), but got 2 rows; start again"
    shard.write_bytes(good[:200] + b"\0" * 3000 + good[3200:])
    with pytest.raises(BadInput) as caught:
        RowReader(split).read(np.array([0]))
    assert str(caught.value) == (
        f"{shard}: must be readable Parquet, but got 'could not verify page integrity, CRC checksum verification "
        "failed for page_ordinal 0'; copy it again, or run convert again"
    )


@pytest.mark.parametrize("statistics", [True, False])
def test_a_row_without_image_bytes_is_bad_input(tmp_path: Path, statistics: bool) -> None:
    url = str(tmp_path)
    record = write_split(url, "train", [(b"x", "a", 0), (b"y", "b", 0)], ("cat",))
    publish(url, ("cat",), {"train": record})
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet")
    images = pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}], table.schema.field("image").type)
    file = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(table.set_column(0, "image", images), file, write_statistics=statistics)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BadInput) as caught:
        RowReader(open_dataset(url).split("train")).read(np.array([0, 1]))
    when_opened = (
        "every row must contain the bytes of its image, but got 1 without them, perhaps with a path only; "
        "make it with python -m lift_ray.convert parquet"
    )
    when_read = "every row must contain an image, but got none in row 1 of row group 0; run convert again"
    assert str(caught.value) == f"{file}: {when_opened if statistics else when_read}"


@pytest.mark.parametrize("url", ["memory://shards-round-trip", "{tmp}/deep/er"])
def test_what_is_written_is_read_back_from_any_store(tmp_path: Path, url: str) -> None:
    url = url.format(tmp=tmp_path)
    split = write(url, 25)
    assert [shard.row_groups for shard in split.shards] == [(4, 4, 2), (4, 4, 2), (4, 1)]
    assert split.labels.tolist() == [row % 3 for row in range(25)]
    assert RowReader(split).read(np.arange(25)) == every_jpeg()[:25]


def test_the_manifest_tells_rows_bytes_counts_and_checksums(tmp_path: Path) -> None:
    write(str(tmp_path), 25)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["class_names"] == ["cat", "dog", "wild cat"]
    record = manifest["splits"]["train"]
    assert (record["rows"], record["class_counts"]) == (25, [9, 8, 8])
    assert [shard["rows"] for shard in record["shards"]] == [10, 10, 5]
    for shard in record["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["manifest.json", *(shard["name"] for shard in record["shards"])]
    )


def test_the_schema_is_what_hugging_face_writes(tmp_path: Path) -> None:
    write(str(tmp_path), 3)
    schema = pq.read_schema(tmp_path / "train-00000-of-00001.parquet")
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("label").type) == "int64"
    assert schema.metadata[b"huggingface"] == (
        b'{"info": {"features": {"image": {"_type": "Image"}, '
        b'"label": {"names": ["cat", "dog", "wild cat"], "_type": "ClassLabel"}}}}'
    )


def test_duckdb_reads_the_shards(tmp_path: Path) -> None:
    import duckdb

    write(str(tmp_path), 25)
    query = f"SELECT label, count(*), sum(octet_length(image.bytes)) FROM '{tmp_path}/*.parquet' GROUP BY label ORDER BY label"
    assert duckdb.sql(query).fetchall() == [
        (k, len(every_jpeg()[k:25:3]), sum(map(len, every_jpeg()[k:25:3]))) for k in range(3)
    ]


def test_datasets_reads_the_shards_with_class_names_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write(str(tmp_path / "set"), 25)
    files = {"train": str(tmp_path / "set" / "*.parquet")}
    train = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert train.features["label"].names == ["cat", "dog", "wild cat"]
    assert train["label"] == [row % 3 for row in range(25)]
    with Image.open(io.BytesIO(every_jpeg()[7])) as expected:
        assert train[7]["image"].tobytes() == expected.convert(train[7]["image"].mode).tobytes()


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(str(tmp_path / name), 12)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_publishing_replaces_the_set_that_was_there(tmp_path: Path) -> None:
    write(str(tmp_path), 25)
    assert write(str(tmp_path), 5).num_samples == 5
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_writing_that_fails_leaves_no_dataset_behind() -> None:
    def broken() -> object:
        yield from images(15)
        raise BadInput("photos/x.jpg: must be an intact image")

    with pytest.raises(BadInput, match=r"photos/x\.jpg"):
        write_split("memory://shards-broken", "train", broken(), ("a", "b", "c"), rows_per_shard=10)  # type: ignore[arg-type]
    file_system, path = locate("memory://shards-broken")
    assert file_system.ls(path) == []


def test_a_destination_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput) as caught:
        write_split(f"{tmp_path}/file", "train", images(2), ("a", "b", "c"))
    assert str(caught.value).startswith(f"{tmp_path}/file: must be a writable folder, but got ")


def test_large_images_end_a_row_group_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lift_ray.data.convert.shards.ROW_GROUP_BYTES", 2 * max(map(len, every_jpeg()[:9])))
    split = write("memory://shards-large", 9, row_group_rows=9)
    assert len(split.shards[0].row_groups) > 1
    assert RowReader(split).read(np.arange(9)) == every_jpeg()[:9]
    fsspec.filesystem("memory").rm("/shards-large", recursive=True)


def test_row_groups_that_leave_the_cache_leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the help of the garbage collector, which may come minutes later."""
    split = open_dataset("embedded:caltech101-lt").split("train")
    loaded: list[weakref.ref[object]] = []
    load = reader._RowGroup

    def noted(*args: object) -> object:
        entry = load(*args)  # type: ignore[arg-type]
        loaded.append(weakref.ref(entry))
        return entry

    monkeypatch.setattr(reader, "_RowGroup", noted)
    gc.collect()
    gc.disable()
    try:
        with RowReader(split, cache_bytes=1) as rows:
            for start in range(0, 2000, 500):
                rows.read(np.arange(start, start + 10))
            assert len(loaded) >= 2
            assert sum(entry() is not None for entry in loaded) <= 1
    finally:
        gc.enable()
