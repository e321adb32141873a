"""Makes lift_ray/assets/caltech101: Caltech-101 at 48 px as Parquet that fits into the package.

    python benchmarks/make_embedded_data.py ../shared/data/caltech101_96 lift_ray/assets/caltech101

The highest JPEG quality that keeps the whole folder within --max-bytes is chosen. Every JPEG repeats the standard
tables, so the column is compressed with zstd, which folds them: that buys about 8 steps of quality.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image

from lift_ray.data.convert.shards import SplitRecord, publish, write_split
from lift_ray.data.open import open_dataset
from lift_ray.storage.store import locate

SHORT_SIDE_PX = 48
TRAIN_SHARDS = 4
ROW_GROUP_ROWS = 200
SEED = 0

README = """# Caltech-101 at {px} px

Source: Caltech 101, Li, F.-F., Andreeto, M., Ranzato, M., Perona, P. (2022), CaltechDATA,
doi [10.22002/D1.20086](https://doi.org/10.22002/D1.20086).

Licence: [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Attribution: Li, Andreeto, Ranzato and Perona.

What was changed: 100 of the 102 folders are here (Faces_easy and the background class are left out); every image was
shrunk to a short side of 96 px (JPEG, quality 88), and from there to {px} px (Lanczos; JPEG, quality {quality}, 4:2:0);
the images were divided into train, validation and test and shuffled (seed {seed}); class names are the folder names
in lower case with spaces. Nothing else was changed. Paths in the files are those of the original archive.

| split | images | per class | shards |
|---|---|---|---|
{table}

Made by `python benchmarks/make_embedded_data.py`. `embedded:caltech101` opens it, `embedded:caltech101-lt` opens its
long-tailed cut: of class rank i by size, the first min(natural, round(200 * 50^(-i/99))) training images.
"""

Sample = tuple[Image.Image, str, int]


def shrunk(source: str) -> tuple[tuple[str, ...], dict[str, list[Sample]]]:
    """Class names, and every image at the short side, shuffled, by split."""
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
    return dataset.class_names, splits


def write(destination: str, class_names: tuple[str, ...], splits: dict[str, list[Sample]], quality: int) -> int:
    """Write everything at one quality. Returns the bytes of the folder."""
    records: dict[str, SplitRecord] = {}
    for name, rows in splits.items():
        shards = TRAIN_SHARDS if name == "train" else 1
        records[name] = write_split(
            destination,
            name,
            ((encoded(image, quality), path, label) for image, path, label in rows),
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
    text = README.format(px=SHORT_SIDE_PX, quality=quality, seed=SEED, table=table)
    with fsspec.open(f"{destination}/README.md", "w", encoding="utf-8") as file:
        file.write(text)
    return sum(path.stat().st_size for path in Path(destination).iterdir())


def encoded(image: Image.Image, quality: int) -> bytes:
    """A JPEG with the standard Huffman tables: all images share them, so that zstd stores them once."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality, subsampling="4:2:0", optimize=False)
    return data.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="Caltech-101 as Hugging Face style Parquet")
    parser.add_argument("destination", help="folder to write, for instance lift_ray/assets/caltech101")
    parser.add_argument("--max-bytes", type=int, default=12_000_000)
    args = parser.parse_args()
    class_names, splits = shrunk(args.source)
    low, high = 1, 95  # the best quality that fits lies in [low, high]
    while low < high:
        quality = (low + high + 1) // 2
        with tempfile.TemporaryDirectory() as scratch:
            num_bytes = write(scratch, class_names, splits, quality)
        print(f"quality {quality}: {num_bytes:,} bytes", flush=True)
        low, high = (quality, high) if num_bytes <= args.max_bytes else (low, quality - 1)
    num_bytes = write(args.destination, class_names, splits, low)
    print(f"{args.destination}: quality {low}, {num_bytes:,} bytes, {sum(map(len, splits.values())):,} images")


if __name__ == "__main__":
    main()
