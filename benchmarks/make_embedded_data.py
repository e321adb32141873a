"""Make lift_ray/assets/caltech101: the long-tailed cut of Caltech-101 at 84 px, as Parquet that fits into the package.

    python benchmarks/make_embedded_data.py ../shared/data/caltech101_96 lift_ray/assets/caltech101

Every JPEG repeats the standard tables, so the column is compressed with zstd, which stores them once: that saves as much as about
8 steps of JPEG quality.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image

from lift_ray.data.convert.shards import SplitRecord, publish, write_split
from lift_ray.data.longtail import keep_first, longtail_counts
from lift_ray.data.open import open_dataset
from lift_ray.storage.store import locate

SHORT_SIDE_PX, QUALITY = 84, 88
LARGEST, IMBALANCE = 200, 50  # images of the largest class, and its ratio to the smallest
TRAIN_SHARDS = 4
ROW_GROUP_ROWS = 200
SEED = 0

README = """# Caltech-101 at {px} px, cut to a long tail

Source: Caltech 101, Li, F.-F., Andreeto, M., Ranzato, M., Perona, P. (2022), CaltechDATA,
doi [10.22002/D1.20086](https://doi.org/10.22002/D1.20086).

License: [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Attribution: Li, Andreeto, Ranzato and Perona.

Changes: 100 of the 102 folders are included (Faces_easy and the background class are not). Every image was
resized to a short side of 96 px (JPEG, quality 88), and from there to {px} px (Lanczos; JPEG, quality {quality}, 4:2:0).
The images were split into train, validation and test and shuffled (seed {seed}). Of the training images only a long tail is
included: for the class of rank i by size, the first min(natural, round({largest} * {imbalance}^(-i/99))) images. Class names are
the folder names in lower case with spaces. Nothing else was changed. Paths in the files are those of the original archive.

| split | images | per class | shards |
|---|---|---|---|
{table}

The dataset is included so that quickstart, tutorial and tests run on real images without a download; {px} px is the input size of
lift-small. `python benchmarks/make_embedded_data.py` makes the files, and `embedded:caltech101-lt` opens them.
"""

Sample = tuple[Image.Image, str, int]


def shrunk(source: str) -> tuple[tuple[str, ...], dict[str, list[Sample]]]:
    """Return the class names, and the images at the short side, shuffled, by split; those of training are cut to a long tail."""
    import pyarrow.parquet as pq

    dataset = open_dataset(source)
    splits = {}
    for number, (name, split) in enumerate(dataset.splits.items()):
        rows: list[Sample] = []
        for shard in split.shards:
            file_system, path = locate(shard.url)
            for row in pq.read_table(path, filesystem=file_system).to_pylist():
                image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
                scale = SHORT_SIDE_PX / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                rows.append((image.resize(size, Image.Resampling.LANCZOS), row["image"]["path"], row["label"]))
        order = np.random.default_rng([SEED, number]).permutation(len(rows))
        splits[name] = [rows[place] for place in order]
    labels = np.array([label for _, _, label in splits["train"]])
    counts = longtail_counts(np.bincount(labels, minlength=dataset.num_classes), LARGEST, IMBALANCE)
    splits["train"] = [splits["train"][place] for place in keep_first(labels, counts)]
    return dataset.class_names, splits


def write(destination: str, class_names: tuple[str, ...], splits: dict[str, list[Sample]]) -> int:
    """Write everything, and return the bytes of the folder."""
    records: dict[str, SplitRecord] = {}
    for name, rows in splits.items():
        shards = TRAIN_SHARDS if name == "train" else 1
        records[name] = write_split(
            destination,
            name,
            ((encoded(image), path, label) for image, path, label in rows),
            class_names,
            rows_per_shard=-(-len(rows) // shards),
            row_group_rows=ROW_GROUP_ROWS,
            compression="zstd",
        )
    publish(destination, class_names, records)
    lines = []
    for name, record in records.items():
        counts = record.class_counts
        lines.append(f"| {name} | {record.rows:,} | {max(counts)} ... {min(counts)} | {len(record.shards)} |")
    table = "\n".join(lines)
    text = README.format(
        px=SHORT_SIDE_PX, quality=QUALITY, seed=SEED, table=table, largest=LARGEST, imbalance=IMBALANCE
    )
    with fsspec.open(f"{destination}/README.md", "w", encoding="utf-8") as file:
        file.write(text)
    return sum(path.stat().st_size for path in Path(destination).iterdir())


def encoded(image: Image.Image) -> bytes:
    """Return a JPEG with the standard Huffman tables: all images share them, so that zstd stores them once."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY, subsampling="4:2:0", optimize=False)
    return data.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="Caltech-101 as Hugging Face style Parquet")
    parser.add_argument("destination", help="folder to write, for instance lift_ray/assets/caltech101")
    args = parser.parse_args()
    class_names, splits = shrunk(args.source)
    num_bytes = write(args.destination, class_names, splits)
    print(f"{args.destination}: {num_bytes:,} bytes, {sum(map(len, splits.values())):,} images")


if __name__ == "__main__":
    main()
