"""Conversion of the published long-tailed splits: images by split, and classes by group.

The lists of Places-LT are the published ones. Of ImageNet-LT and iNaturalist 2018, the validation lists are the published ones;
the training lists, with the published number of images and classes, and ImageNet-LT's test list are made up. All images are made
up too: hard links to a few small JPEGs, since only their number matters here.

    python benchmarks/published_lists.py --lists LISTS --record

LISTS holds places_lt_{train,val,test,classnames}.txt, imagenet_lt_{val,classnames}.txt, inaturalist2018_val.txt and
inaturalist2018_categories.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import record, typed

PUBLISHED = {"imagenet-lt": 115_846, "inat2018": 437_513}  # training images
DIFFERENT = 64  # made-up images; a file system allows some ten thousand links to each
Rows = list[tuple[str, int]]


class MadeUp:
    """Folders of made-up images, linked from one place.

    Args:
        folder: where the images are.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        random = np.random.default_rng(0)
        for number in range(DIFFERENT):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.jpg", quality=60)
        self._files, self._made = sorted(folder.iterdir()), 0

    def make(self, folder: Path, paths: Iterable[str]) -> None:
        """Make an image at each path of a folder."""
        for path in paths:
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._files[self._made % DIFFERENT], place)
            self._made += 1


def long_tail(classes: int, largest: int, smallest: int, images: int) -> list[int]:
    """Return made-up counts with this sum that fall from the largest to the smallest class like a power."""
    low, high = 0.1, 60.0
    fall = 1 - np.arange(classes) / (classes - 1)
    for _ in range(80):
        power = (low + high) / 2
        counts = np.maximum(smallest, np.round(smallest + (largest - smallest) * fall**power)).astype(int)
        low, high = (power, high) if counts.sum() > images else (low, power)
    counts[0] += images - counts.sum()
    found: list[int] = counts.tolist()
    return found


def rows_of(file: Path) -> Rows:
    """Return the paths and labels of a list."""
    pairs = (line.rsplit(" ", 1) for line in file.read_text().splitlines())
    return [(path, int(label)) for path, label in pairs]


def made_up_rows(counts: list[int], form: str) -> Rows:
    """Return a made-up training list with these counts."""
    return [(form.format(label, number), label) for label, count in enumerate(counts) for number in range(count)]


def places(lists: Path, folder: Path, images: MadeUp) -> list[str]:
    """Make Places-LT; return the arguments of its conversion."""
    files = {split: lists / f"places_lt_{split}.txt" for split in ("train", "val", "test")}
    for file in files.values():
        images.make(folder, (path for path, _ in rows_of(file)))
    named = ["--train", files["train"], "--validation", files["val"], "--test", files["test"]]
    return ["list", *map(str, named), "--class-names", str(lists / "places_lt_classnames.txt")]


def imagenet(lists: Path, folder: Path, images: MadeUp) -> list[str]:
    """Make ImageNet-LT with made-up training and test lists; return the arguments of its conversion."""
    rows = {
        "train": made_up_rows(long_tail(1000, 1280, 5, PUBLISHED["imagenet-lt"]), "train/{0:04d}/{1}.JPEG"),
        "validation": rows_of(lists / "imagenet_lt_val.txt"),
        "test": made_up_rows([50] * 1000, "test/{0:04d}/{1}.JPEG"),
    }
    words = ["list", "--class-names", str(lists / "imagenet_lt_classnames.txt")]
    for split, pairs in rows.items():
        file = folder.with_name(f"{folder.name}-{split}.txt")
        file.write_text("".join(f"{path} {label}\n" for path, label in pairs))
        images.make(folder, (path for path, _ in pairs))
        words += [f"--{split}", str(file)]
    return words


def inat(lists: Path, folder: Path, images: MadeUp) -> list[str]:
    """Make iNaturalist 2018 with made-up annotations of the training images; return the arguments of its conversion."""
    categories = json.loads((lists / "inaturalist2018_categories.json").read_text())
    rows = made_up_rows(long_tail(len(categories), 1000, 2, PUBLISHED["inat2018"]), "train_val2018/made/{0}/{1}.jpg")
    for name, pairs in (("train2018.json", rows), ("val2018.json", rows_of(lists / "inaturalist2018_val.txt"))):
        images.make(folder, (path for path, _ in pairs))
        files = [{"id": number, "file_name": path} for number, (path, _) in enumerate(pairs)]
        labels = [{"id": n, "image_id": n, "category_id": label} for n, (_, label) in enumerate(pairs)]
        annotations = {"images": files, "annotations": labels, "categories": categories}
        (folder / name).write_text(json.dumps(annotations))
    return ["inat", "--validation-frac", "0"]  # as published, trained on all training images


MAKERS = {"places-lt": places, "imagenet-lt": imagenet, "inat2018": inat}


def convert(name: str, lists: Path, folder: Path, images: MadeUp) -> dict[str, Any]:
    """Make a data set, convert it, and return what the conversion says: images by split, classes by group, and seconds."""
    kind, *options = MAKERS[name](lists, folder / name, images)
    words = [kind, str(folder / name), str(folder / f"{name}-shards"), *options, "--json"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lift_ray.convert", *words], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    splits = {split: one["images"] for split, one in found["splits"].items()}
    return {"images": splits, "groups": found["groups"], "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        images = MadeUp(Path(temporary) / "images")
        for name in args.data:
            figures[name] = convert(name, args.lists.absolute(), Path(temporary), images)
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
    if args.record:
        print(record("published_lists", typed(), figures, seeds=[0]))


if __name__ == "__main__":
    main()
