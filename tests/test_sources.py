"""Lists, iNaturalist, tables and torchvision as sources: what is found, what is read, and one line for what is wrong."""

from __future__ import annotations

import inspect
import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torchvision.datasets
from embedded import OnePixel, jpegs
from PIL import Image

from lift_ray.data.convert.conversion import convert
from lift_ray.data.convert.folder import scan_folder
from lift_ray.data.convert.inat import RANKS, scan_inat
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.convert.lists import scan_list
from lift_ray.data.convert.splitting import Division, divide
from lift_ray.data.convert.tables import scan_table
from lift_ray.data.convert.torchvision_sets import SETS, scan_torchvision
from lift_ray.data.longtail import summary
from lift_ray.data.open import open_dataset
from lift_ray.errors import BadInput
from lift_ray.evaluation.metrics import ClassGroups

LISTS = Path(__file__).parents[2] / "shared" / "data" / "lists"
PLACES = {"train": "train", "validation": "val", "test": "test", "class_names": "classnames"}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(index: ImageIndex) -> dict[str, list[tuple[bytes, int]]]:
    """Every image of an index, read as another process would."""
    reader = pickle.loads(pickle.dumps(index.read))
    assert len(pickle.dumps(reader)) < 500
    return {split: [(reader(reference), label) for reference, label in rows] for split, rows in index.splits.items()}


# ---- lists


def photo_lists() -> dict[str, str | bytes]:
    return {
        "photos/train/a b/1.jpg": jpegs()[0],
        "photos/train/c/2.jpg": jpegs()[1],
        "photos/val/3.jpg": jpegs()[2],
        "train.txt": "train/a b/1.jpg 1\ntrain/c/2.jpg 0\n",
        "val.txt": "./val//3.jpg\t1\r\n\r\n",
        "names.txt": "airplane_cabin\ncrane, bird\n",
    }


def listed(here: Path, **more: str) -> ImageIndex:
    names = {"train": f"{here}/train.txt", "class_names": f"{here}/names.txt", "test": None, "validation": None}
    return scan_list(f"{here}/photos", **{**names, **more})  # type: ignore[arg-type]


def test_lists_name_images_by_path_and_label(tmp_path: Path) -> None:
    index = listed(write(tmp_path, photo_lists()), test=f"{tmp_path}/val.txt")
    assert index.class_names == ("airplane cabin", "crane, bird")
    assert index.splits == {"train": [("train/a b/1.jpg", 1), ("train/c/2.jpg", 0)], "test": [("val/3.jpg", 1)]}
    assert read(index) == {"train": [(jpegs()[0], 1), (jpegs()[1], 0)], "test": [(jpegs()[2], 1)]}
    assert index.notes == ()


@pytest.fixture(scope="module")
def places() -> ImageIndex:
    if not LISTS.exists():
        pytest.skip("the published lists are not part of the repository")
    named = {split: f"{LISTS}/places_lt_{name}.txt" for split, name in PLACES.items()}
    return replace(scan_list("places", **named), read=OnePixel())  # type: ignore[arg-type]


def test_places_lt_keeps_its_published_training_images_and_validation_list(places: ImageIndex) -> None:
    divided = divide(places, Division())
    assert {name: sorted(rows) for name, rows in divided.splits.items()} == {
        name: sorted(rows) for name, rows in places.splits.items()
    }
    assert divided.from_training == ("train",)
    counts = np.bincount([label for _, label in places.splits["train"]])
    found = summary(counts)
    assert (found.images, found.largest, found.smallest) == (62500, 4980, 5)
    assert str(ClassGroups.of(counts)) == "131 many (over 100), 163 medium (20 to 100), 71 few (under 20)"


@pytest.mark.slow  # 106,300 images, and the test above has the same splits
def test_converted_places_lt_says_that_its_validation_is_separate(places: ImageIndex, tmp_path: Path) -> None:
    convert(places, str(tmp_path), rows_per_shard=100_000)
    dataset = open_dataset(str(tmp_path))
    assert {name: split.num_samples for name, split in dataset.splits.items()} == {
        "train": 62500,
        "validation": 7300,
        "test": 36500,
    }
    assert dataset.validation == "separate"
    assert dataset.labelled_counts is not None
    assert dataset.labelled_counts.tolist() == dataset.split("train").class_counts(365).tolist()


def test_lists_and_their_images_may_be_in_a_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{write(tmp_path, photo_lists())}/", "/listed/", recursive=True)
    index = scan_list(
        "memory://listed/photos", train="memory://listed/train.txt", class_names="memory://listed/names.txt"
    )
    assert read(index) == {"train": [(jpegs()[0], 1), (jpegs()[1], 0)]}


@pytest.mark.parametrize("scan", [lambda: scan_folder("photos/train"), lambda: listed(Path("."))])
def test_a_relative_source_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan: Callable[[], ImageIndex]
) -> None:
    monkeypatch.chdir(write(tmp_path, photo_lists()))
    index = scan()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert {image for image, _ in read(index)["train"]} == {jpegs()[0], jpegs()[1]}


def test_the_nth_directory_of_a_listed_path_is_a_group_whatever_stands_above_it(tmp_path: Path) -> None:
    rows = "a/site_1/1.jpg 0\na/site_2/1.jpg 0\nb/site_1/1.jpg 1\nloose.jpg 1\n"
    index = listed(write(tmp_path, {"train.txt": rows, "names.txt": "a\nb\n"}), group="folder:2")
    assert index.groups == {"a/site_1/1.jpg": "site_1", "b/site_1/1.jpg": "site_1", "a/site_2/1.jpg": "site_2"}
    assert index.notes == ("images without a group: 1; each is a group of its own",)
    with pytest.raises(BadInput) as caught:
        listed(tmp_path, group="folder:3")
    assert str(caught.value) == "group: folder:3 requires images 3 directories deep, but there are none; check N"


def test_a_directory_in_two_lists_is_bad_input_as_a_group(tmp_path: Path) -> None:
    lists: dict[str, str | bytes] = {"train.txt": "x/1.jpg 0\ny/2.jpg 1\n", "val.txt": "y/3.jpg 1\n"}
    with pytest.raises(BadInput) as caught:
        listed(write(tmp_path, {**photo_lists(), **lists}), test=f"{tmp_path}/val.txt", group="folder:1")
    assert str(caught.value) == (
        f"{tmp_path}/photos: each group must be in one split, but got 'y' in train and test; "
        "move its images to one split, or leave out --group"
    )


def test_a_repeated_class_name_gets_a_number_and_a_note(tmp_path: Path) -> None:
    names = "missile\ncrane\nmissile (2)\nmissile\n"
    rows = "".join(f"{label}.jpg {label}\n" for label in range(4))
    index = listed(write(tmp_path, {"train.txt": rows, "names.txt": names}))
    assert index.class_names == ("missile", "crane", "missile (2)", "missile (3)")
    assert index.notes == (f"{tmp_path}/names.txt: repeated class names (1): class 3 is called 'missile (3)'",)


LIST_FAULTS: list[tuple[dict[str, str | bytes], str]] = [
    ({"train.txt": "a.jpg 0\nb.jpg\n"}, "train.txt:2: must be a path and a label, but got only 'b.jpg'; "),
    ({"train.txt": "a.jpg 0\n\nb c.jpg\n"}, "train.txt:3: must end with a label (an integer), but got 'c.jpg'; "),
    ({"train.txt": "a.jpg -1\n"}, "train.txt:1: must end with a label (an integer), but got '-1'; "),
    ({"train.txt": "a.jpg " + "1" * 5000}, "train.txt:1: must end with a label (an integer), but got '11"),
    ({"train.txt": "a.jpg 2\n"}, "train.txt:1: the label must be 0 to 1 (2 class names), but got 2; "),
    ({"train.txt": "\n \n"}, "train.txt: must list images, but got none; "),
    ({"train.txt": b"\xff\xfe"}, "train.txt: must list images, but got none; "),
    (
        {"train.txt": "a.jpg 0\n./a.jpg 1\n"},
        "train.txt:2: each image must be listed once, but 'a.jpg' is in {0}/train.txt:1 too; ",
    ),
    (
        {"train.txt": "a.jpg 0\nval/3.jpg 1\n"},
        "val.txt:1: each image must be listed once, but 'val/3.jpg' is in {0}/train.txt:2 too; ",
    ),
    ({"train.txt": "a.jpg 0\n"}, "photos: every class must have an image, but 'crane, bird' has none; "),
    (
        {"train.txt": b"a.jpg 0\ncaf\xe9.jpg 1\n"},
        "train.txt:2: must be a text file in UTF-8, but got the byte 0xe9; save it as UTF-8",
    ),
    ({"names.txt": "\n"}, "names.txt: must contain one class name per line, but got none; "),
    ({"names.txt": "a\n\nb\n"}, "names.txt:2: must be a class name, but got an empty line; "),
]


@pytest.mark.parametrize(("changes", "message"), LIST_FAULTS)
def test_a_fault_in_a_list_gives_a_one_line_error(
    tmp_path: Path, changes: dict[str, str | bytes], message: str
) -> None:
    write(tmp_path, {**photo_lists(), **changes})
    with pytest.raises(BadInput, match="^" + re.escape(f"{tmp_path}/{message.format(tmp_path)}") + ".*$"):
        divide(listed(tmp_path, test=f"{tmp_path}/val.txt"), Division())


@pytest.mark.parametrize("path", ["/etc/hosts", "../a.jpg", "x/../../a.jpg", "..\\a.jpg", "s3://b/a.jpg", "."])
def test_a_path_outside_the_source_is_refused(tmp_path: Path, path: str) -> None:
    write(tmp_path, {**photo_lists(), "train.txt": f"a.jpg 0\n{path} 1\n", "t.csv": f"path,label\nb.jpg,x\n{path},y\n"})
    with pytest.raises(BadInput, match=r"train.txt:2: .*, a path outside the source; fix it$"):
        listed(tmp_path)
    with pytest.raises(BadInput, match=r"t.csv:3: .*, a path outside the source; fix it$"):
        scan_table(f"{tmp_path}/t.csv", kind="csv")


def test_a_missing_list_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no.txt: .*, but nothing is there; check the path$"):
        listed(write(tmp_path, photo_lists()), train=f"{tmp_path}/no.txt")


# ---- iNaturalist

TAXA = [  # two genera of one name, and a family that is in two orders of no name
    ("Animalia", "Arthropoda", "Insecta", "Mantodea", "Tarachodidae", "Iris", "Iris oratoria"),
    ("Plantae", "Magnoliophyta", "Liliopsida", "Asparagales", "Iridaceae", "Iris", "Iris setosa"),
    ("Plantae", "Magnoliophyta", "Liliopsida", "Asparagales", "Iridaceae", "Iris", "Iris versicolor"),
    ("Fungi", "Ascomycota", "Sordariomycetes", "NA", "NA", "Peroneutypa", "Peroneutypa scoparia"),
]
CATEGORIES = [{"id": 10 * n, "name": t[-1], **dict(zip(RANKS[:6], t[:6], strict=True))} for n, t in enumerate(TAXA)]


def annotations(labels: list[int], categories: list[dict[str, Any]], **changes: Any) -> str:
    images = [{"id": 7 * n, "file_name": f"images/{labels[n]}_{n}.jpg", "width": 1} for n in range(len(labels))]
    told = [{"id": n, "image_id": 7 * n, "category_id": label} for n, label in enumerate(labels)]
    content = {"info": {}, "images": images, "annotations": told[::-1], "categories": categories}
    return json.dumps({**content, **changes})


HIDDEN = [{"id": category["id"], "name": "1234", "supercategory": "x"} for category in CATEGORIES]


def inat_2018() -> dict[str, str | bytes]:
    return {
        "categories.json": json.dumps(CATEGORIES[::-1]),
        "train2018.json": annotations([20, 0, 10, 30], HIDDEN),
        "val2018.json": annotations([10] * 5, HIDDEN).replace("images/", "val/"),
        **{f"images/{category}_{n}.jpg": jpegs()[n] for n, category in enumerate((20, 0, 10, 30))},
        **{f"val/10_{n}.jpg": jpegs()[5 + n] for n in range(5)},
    }


def test_inaturalist_2018_takes_names_from_its_categories_and_tests_on_val(tmp_path: Path) -> None:
    index = scan_inat(str(write(tmp_path, inat_2018())))
    assert index.class_names == tuple(taxon[-1] for taxon in TAXA)
    assert read(index)["train"] == [(jpegs()[0], 2), (jpegs()[1], 0), (jpegs()[2], 1), (jpegs()[3], 3)]
    assert read(index)["test"] == [(jpegs()[5 + n], 1) for n in range(5)]


def test_nothing_is_held_out_of_inaturalist_without_a_fraction_for_validation(tmp_path: Path) -> None:
    """On made-up annotations: 40 images of each class, of which a tenth would be drawn."""
    write(tmp_path, {**inat_2018(), "train2018.json": annotations([20, 0, 10, 30] * 40, HIDDEN)})
    index = scan_inat(str(tmp_path))
    whole = divide(index, Division(validation_frac=0.0))
    assert {name: len(rows) for name, rows in whole.splits.items()} == {"train": 160, "test": 5}
    assert sorted(whole.splits["train"]) == sorted(index.splits["train"])
    assert len(divide(index, Division()).splits["validation"]) == 16


def test_later_years_carry_the_taxonomy_themselves(tmp_path: Path) -> None:
    write(tmp_path, {"train2021.json": annotations([20, 0, 10, 30], CATEGORIES)})
    index = scan_inat(str(tmp_path), train="train2021.json", test=None)
    assert index.class_names == tuple(taxon[-1] for taxon in TAXA)
    assert [label for _, label in index.splits["train"]] == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("rank", "names", "labels"),
    [
        ("genus", ("Iris (Tarachodidae)", "Iris (Iridaceae)", "Peroneutypa"), [1, 0, 1, 2]),
        ("order", ("Mantodea", "Asparagales", "NA"), [1, 0, 1, 2]),
        ("kingdom", ("Animalia", "Plantae", "Fungi"), [1, 0, 1, 2]),
    ],
)
def test_any_rank_is_a_label_and_equal_names_stay_apart(
    tmp_path: Path, rank: str, names: tuple[str, ...], labels: list[int]
) -> None:
    index = scan_inat(str(write(tmp_path, inat_2018())), rank=rank)
    assert index.class_names == names
    assert [label for _, label in index.splits["train"]] == labels


def test_equal_names_under_equal_parents_get_the_ancestor_that_differs(tmp_path: Path) -> None:
    taxa = [dict(CATEGORIES[0], order="NA", family="NA"), dict(CATEGORIES[1], order="NA", family="NA")]
    write(tmp_path, {"train2018.json": annotations([0, 10], taxa)})
    assert scan_inat(str(tmp_path), rank="family", test=None).class_names == ("NA (Insecta)", "NA (Liliopsida)")


def with_images(**changes: Any) -> dict[str, str | bytes]:
    return {"train2018.json": annotations([20, 0, 10, 30], HIDDEN, **changes)}


INAT_FAULTS: list[tuple[dict[str, str | bytes], str]] = [
    ({"train2018.json": "{"}, "train2018.json: must be iNaturalist JSON, but got "),
    (
        {"train2018.json": "[1]"},
        "train2018.json: must contain the lists images, annotations, categories, but got no images; ",
    ),
    (with_images(images=[]), "train2018.json: must list images, but got none; "),
    (with_images(images=[{"id": 1}]), "train2018.json: file_name must be text in every entry, but got {{'id': 1}}; "),
    (with_images(annotations=[]), "train2018.json: image 0 must have a category, but got none; "),
    (
        with_images(annotations=[{"image_id": 0, "category_id": 5}]),
        "train2018.json: image 0 must have a known category, but got 5; ",
    ),
    (
        with_images(annotations=[{"image_id": 0, "category_id": c} for c in (0, 10)]),
        "train2018.json: image 0 must have one category, but got 0 and 10; ",
    ),
    (
        {"train2018.json": annotations([20, 0, 10], HIDDEN)},
        "every class must have an image, but 'Peroneutypa scoparia' has none; ",
    ),
    (
        {"train2018.json": annotations([20, 0, 10, 30], HIDDEN).replace("images/", "../")},
        "train2018.json: image 0: must name a file in the source, but got '../20_0.jpg', a path outside the source; ",
    ),
    (
        {"val2018.json": annotations([20], HIDDEN)},
        "val2018.json: image 0: each image must be listed once, but 'images/20_0.jpg' is in {0}/train2018.json: image 0 too; ",
    ),
    ({"categories.json": "{}"}, "categories.json: must be a list of categories, but got '{{}}'; "),
    ({"categories.json": json.dumps(HIDDEN)}, "categories.json: kingdom must be text in every entry, but got "),
    (
        {"categories.json": json.dumps(CATEGORIES[:1] * 2)},
        "categories.json: category ids must be unique, but got 0 twice; ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), INAT_FAULTS)
def test_a_fault_in_inaturalist_files_gives_a_one_line_error(
    tmp_path: Path, changes: dict[str, str | bytes], message: str
) -> None:
    write(tmp_path, {**inat_2018(), **changes})
    with pytest.raises(BadInput, match=re.escape(message.format(tmp_path)) + ".*$") as caught:
        divide(scan_inat(str(tmp_path)), Division())
    assert str(caught.value).startswith(str(tmp_path))


def test_inaturalist_needs_names_and_a_known_rank(tmp_path: Path) -> None:
    write(tmp_path, inat_2018())
    with pytest.raises(BadInput, match=r"^rank: must be one of .*, but got 'spezies'; did you mean 'species'\?$"):
        scan_inat(str(tmp_path), rank="spezies")
    (tmp_path / "categories.json").unlink()
    with pytest.raises(BadInput, match=r"categories.json: must contain the taxonomy that .*train2018.json leaves out"):
        scan_inat(str(tmp_path))


# ---- torchvision


def idx(values: np.ndarray[Any, Any]) -> bytes:
    """The file format of MNIST."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape) + values.tobytes()


def test_a_torchvision_set_of_arrays_becomes_lossless_png(tmp_path: Path) -> None:
    grey = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("L").resize((28, 28))) for image in jpegs()])
    labels = np.arange(12, dtype=np.uint8) % 10
    for split, rows in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        write(
            tmp_path / "FashionMNIST" / "raw",
            {f"{split}-images-idx3-ubyte": idx(grey[rows]), f"{split}-labels-idx1-ubyte": idx(labels[rows])},
        )
    index = scan_torchvision("FashionMNIST", root=str(tmp_path))
    assert index.class_names[:2] == ("T-shirt/top", "Trouser")
    assert {split: len(rows) for split, rows in index.splits.items()} == {"train": 10, "test": 2}
    for number, (image, label) in enumerate([*read(index)["train"], *read(index)["test"]]):
        decoded = Image.open(io.BytesIO(image))
        assert decoded.format == "PNG"
        assert np.array_equal(np.asarray(decoded), grey[number])
        assert label == number % 10


def test_a_torchvision_set_of_files_keeps_their_bytes(tmp_path: Path) -> None:
    meta = {
        "train": {"apple_pie": ["apple_pie/1"], "waffles": ["waffles/2"]},
        "test": {"apple_pie": ["apple_pie/3"], "waffles": []},
    }
    write(tmp_path / "food-101", {f"meta/{split}.json": json.dumps(content) for split, content in meta.items()})
    for number, name in enumerate(("apple_pie/1", "waffles/2", "apple_pie/3")):
        write(tmp_path / "food-101" / "images", {f"{name}.jpg": jpegs()[number]})
    index = scan_torchvision("Food101", root=str(tmp_path))
    assert index.class_names == ("apple pie", "waffles")
    assert index.splits["test"] == [("food-101/images/apple_pie/3.jpg", 0)]
    assert read(index) == {"train": [(jpegs()[0], 0), (jpegs()[1], 1)], "test": [(jpegs()[2], 0)]}


def test_a_torchvision_set_without_class_names_says_so(tmp_path: Path) -> None:
    import bz2

    for name, labels in (("usps.bz2", (1, 2)), ("usps.t.bz2", (2,))):
        lines = "".join(f"{label} " + " ".join(f"{n}:{0.5:g}" for n in range(1, 257)) + "\n" for label in labels)
        (tmp_path / name).write_bytes(bz2.compress(lines.encode()))
    index = scan_torchvision("USPS", root=str(tmp_path))
    assert index.class_names == ("class 0", "class 1")
    assert index.notes == ("USPS: has no class names in torchvision, so they are 'class 0' to 'class 1'",)


@pytest.mark.parametrize("name", sorted(SETS))
def test_torchvision_knows_the_splits_that_a_set_is_asked_for(tmp_path: Path, name: str) -> None:
    kind = getattr(torchvision.datasets, name)
    for arguments in SETS[name].values():
        inspect.signature(kind).bind(tmp_path, **arguments)
        with pytest.raises((RuntimeError, ImportError, OSError)):  # nothing is there; an unknown split is a ValueError
            kind(tmp_path, **arguments, **({"download": False} if name == "SEMEION" else {}))


def test_a_torchvision_set_that_cannot_be_used_gives_a_one_line_error(tmp_path: Path) -> None:
    for name, root, message in (
        (
            "FashonMNIST",
            f"{tmp_path}",
            r"^FashonMNIST: must be a torchvision dataset .*; did you mean 'FashionMNIST'\?$",
        ),
        ("CocoDetection", f"{tmp_path}", r"^CocoDetection: must be a torchvision dataset with one label per image; "),
        ("MNIST", "s3://b/x", r"^s3://b/x: must be a folder on this machine"),
        (
            "MNIST",
            f"{tmp_path}",
            r"^/.*: must contain MNIST as torchvision stores it, but got 'Dataset not found.*--download$",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            scan_torchvision(name, root=root)
    with pytest.raises(BadInput, match=r"^download: must not be given, but torchvision cannot download ImageNet; "):
        scan_torchvision("ImageNet", root=str(tmp_path), download=True)
    assert list(tmp_path.iterdir()) == []
