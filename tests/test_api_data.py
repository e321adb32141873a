"""lift_ray.open_dataset: any source as a dataset, converted once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import lift_ray as lr
from lift_ray.data import open as opening
from lift_ray.data.reader import RowReader


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 12, 6 and 3 images."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name, number in (("ewer", 12), ("crab", 6), ("lamp", 3)):
        (folder / name).mkdir(parents=True)
        for n in range(number):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name / f"{n}.png")
    return folder


class Pairs(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """As torchvision has them."""

    classes = ("ewer", "crab")

    def __init__(self, number: int, start: int = 0) -> None:
        self.number, self.start = number, start

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, at: int) -> tuple[Image.Image, int]:
        if not 0 <= at < self.number:
            raise IndexError
        return Image.fromarray(np.full((9, 9, 3), self.start + at, np.uint8)), at % 2


def pixels(split: Any) -> list[int]:
    with RowReader(split) as reader:
        found = [np.asarray(Image.open(io.BytesIO(data))) for data in reader.read(np.arange(split.num_samples))]
    return sorted(int(image[0, 0, 0]) for image in found)


def test_a_folder_is_converted_once_and_again_when_a_file_changes(photos: Path) -> None:
    data = lr.open_dataset(photos)
    assert sorted(data.class_names) == ["crab", "ewer", "lamp"]
    assert {name: split.num_samples for name, split in data.splits.items()} == {"train": 14, "validation": 3, "test": 4}
    shard = Path(data.splits["train"].shards[0].url)
    written = shard.stat().st_mtime_ns
    assert lr.open_dataset(photos).uri == data.uri
    assert shard.stat().st_mtime_ns == written
    assert lr.open_dataset(photos, test_frac=0.5).uri != data.uri
    os.utime(photos / "lamp" / "0.png", ns=(1, 1))
    assert lr.open_dataset(photos).uri != data.uri


def test_a_table_is_opened_with_its_columns_and_a_dataset_is_opened_as_it_is(
    photos: Path, small_data: str, tmp_path: Path
) -> None:
    lines = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.glob("*/*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["photo,species", *lines]) + "\n")
    data = lr.open_dataset(table, image_column="photo", label_column="species", root=str(photos), to=tmp_path / "data")
    assert data.uri == str(tmp_path / "data")
    assert sum(split.num_samples for split in data.splits.values()) == 21
    converted = lr.open_dataset(small_data)
    assert converted.uri == opening.open_dataset(small_data).uri == small_data
    assert lr.open_dataset(converted) is converted


def test_a_torch_dataset_keeps_its_names_splits_and_pixels(tmp_path: Path) -> None:
    data = lr.open_dataset({"train": Pairs(40), "test": Pairs(10, start=100)}, to=tmp_path / "data")
    assert list(data.class_names) == ["ewer", "crab"]
    assert pixels(data.splits["test"]) == list(range(100, 110))
    assert sorted(pixels(data.splits["train"]) + pixels(data.splits["validation"])) == list(range(40))


def test_a_dataset_of_hugging_face_is_opened(tmp_path: Path) -> None:
    images = [Image.fromarray(np.full((9, 9, 3), n, np.uint8)) for n in range(30)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ewer", "crab"])})
    source = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(30)]}, features=features)
    data = lr.open_dataset(source, to=tmp_path / "data")
    assert list(data.class_names) == ["ewer", "crab"]
    assert sorted(n for split in data.splits.values() for n in pixels(split)) == list(range(30))


def test_labels_may_be_words(tmp_path: Path) -> None:
    source = [(Image.new("RGB", (9, 9), (n, 0, 0)), ["ewer", "crab"][n % 2]) for n in range(20)]
    data = lr.open_dataset(source, to=tmp_path / "data")
    assert list(data.class_names) == ["crab", "ewer"]
    with RowReader(data.splits["test"]) as reader:
        found = reader.read(np.arange(data.splits["test"].num_samples))
    reds = [np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0] for image in found]
    assert [data.class_names[label] for label in data.splits["test"].labels] == [["ewer", "crab"][n % 2] for n in reds]


def test_a_script_without_a_main_guard_converts_in_its_own_process(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("ewer", "crab"):
        (folder / name).mkdir(parents=True)
        for n in range(300):
            Image.new("RGB", (8, 8), (n % 256, 0, 0)).save(folder / name / f"{n}.bmp")
    script = tmp_path / "script.py"
    script.write_text("print('begun')\nimport lift_ray as lr\nprint(lr.open_dataset('photos').num_classes)\n")
    environment = {**os.environ, "LIFT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "begun\n2\n"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "nowhere: must be "),
        (Pairs(4), {}, "to: is required for images in memory, but is missing; give a folder for them"),
        (
            [1, 2],
            {"to": "x"},
            "source: must be a sequence of (Pillow image, label), or have the columns image and label, but got list",
        ),
        (
            {"fold": Pairs(4)},
            {"to": "x"},
            "source: must have the splits train, validation or test, but got fold; rename it",
        ),
        ("nowhere", {"column": "a"}, "open_dataset: unknown option 'column'; known: image_column, "),
    ],
)
def test_what_is_no_dataset_gives_one_line(
    source: Any, options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lr.BadInput) as caught:
        lr.open_dataset(source, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
