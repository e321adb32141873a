"""The contenders of benchmarks/data.py load the same images, and its ratios are formed within a round."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import data
import data_contenders
import numpy as np
import pytest
import torch
from data_contenders import CONTENDERS, MEAN, STD, Contender, Sample, Setup, growth

PX, BATCH, BATCHES = 24, 8, 5
THERE = [name for name, contender in CONTENDERS.items() if find_spec(contender.imports[0].split(".")[0])]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return data.samples_of("embedded:caltech101-lt", BATCH * BATCHES)[0]


@pytest.fixture(scope="module")
def folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as every contender that is installed writes them."""
    written = tmp_path_factory.mktemp("written")
    class_names = data.samples_of("embedded:caltech101-lt", BATCH * BATCHES)[1]
    for name in THERE:
        CONTENDERS[name].write(samples, class_names, written)
    return written


def opened(name: str, folder: Path) -> Contender:
    return CONTENDERS[name](Setup(str(folder), "classic", PX, BATCH))


@pytest.mark.parametrize("name", THERE)
def test_every_contender_gives_every_image_once_normalized(name: str, folder: Path, samples: list[Sample]) -> None:
    images, labels = zip(*opened(name, folder).batches(0), strict=True)
    assert [tuple(batch.shape) for batch in images] == [(BATCH, 3, PX, PX)] * BATCHES
    assert sorted(torch.cat(labels).tolist()) == sorted(label for _, _, label in samples)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    levels = 255 * (torch.cat(images) * std + mean)
    assert levels.dtype == torch.float32
    assert (levels - levels.round()).abs().max() < 1e-2
    assert (round(float(levels.min())), round(float(levels.max()))) == (0, 255)


@pytest.mark.parametrize("name", THERE)
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(name: str, folder: Path) -> None:
    whole = [labels.tolist() for _, labels in opened(name, folder).batches(0)]
    rest = [labels.tolist() for _, labels in opened(name, folder).batches(0, 3)]
    assert len(whole) == BATCHES
    assert rest == whole[3:]


def test_nothing_asks_a_server(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face `datasets` reports what it loads, unless it is told not to."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    asked: list[Any] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    CONTENDERS["datasets"].write(samples, [str(label) for label in range(100)], tmp_path)
    assert not asked


def test_the_comparison_finds_a_planted_difference(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.compare(samples, PX)
    assert found["pillow"]["largest"] <= 2
    assert found["tensors"]["largest"] == 0
    honest = data.training_image

    def planted(encoded: bytes, *rest: Any) -> Any:
        image = honest(encoded, *rest).astype(int)
        image[0, 0, 0] += 3 if encoded == samples[7][0] else 0
        return image

    monkeypatch.setattr(data, "training_image", planted)
    found = data.compare(samples, PX)
    assert found["tensors"]["largest"] == 3
    assert found["tensors"]["off_by_more_frac"] == pytest.approx(1 / (len(samples) * PX * PX * 3))


def test_differences_are_counted_by_levels() -> None:
    ours = [np.array([10, 20, 30, 40], np.uint8), np.array([0, 255, 7, 8], np.uint8)]
    theirs = [np.array([11, 18, 30, 40], np.uint8), np.array([255, 255, 7, 8], np.uint8)]
    found = data.differences(ours, theirs)
    assert found == {"largest": 255, "off_by_1_frac": 1 / 8, "off_by_2_frac": 1 / 8, "off_by_more_frac": 1 / 8}


def test_a_rounds_ratio_is_formed_within_the_round() -> None:
    def epoch(wall_s: float, processor_s: float) -> dict[str, Any]:
        return {"wall_s": wall_s, "processor_s": processor_s, "images": 100, "peak_bytes": 5}

    rounds = [
        {"imagefolder": epoch(2.0, 1.0), "lift_ray": epoch(1.0, 0.25), "bare": epoch(0.5, 0.2)},
        {"imagefolder": epoch(8.0, 3.0), "lift_ray": epoch(4.0, 0.75), "bare": epoch(2.0, 0.6)},
    ]
    found = data.evaluate(rounds)["lift_ray"]
    assert found["wall_times_imagefolder_range"] == [2.0, 2.0]
    assert found["processor_times_imagefolder"] == pytest.approx(4.0)
    assert found["wall_times_bare"] == pytest.approx(0.5)
    assert found["processor_times_bare"] == pytest.approx(0.8)
    assert found["images_per_wall_s"] == pytest.approx(40)
    assert found["processor_ms"] == pytest.approx(5.0)


def test_memory_is_noted_when_so_many_images_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [0]

    class Loads(Contender):
        def __init__(self) -> None:
            pass

        def batches(self, epoch: int, start: int = 0) -> Any:
            for _ in range(4):
                loaded[0] += 10
                yield torch.zeros(10, 3, 1, 1), torch.zeros(10)

    monkeypatch.setattr(data_contenders, "peak_bytes", lambda: 500 + 7 * loaded[0])
    found = growth(Loads(), [10, 25, 40, 60])
    assert found == {"start_bytes": 500, "images": [10, 25, 40], "peak_bytes": [570, 710, 780]}
