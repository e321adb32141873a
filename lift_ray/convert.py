"""python -m lift_ray.convert: convert image datasets to sharded Parquet with a manifest."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, first_few, run_and_exit
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.data.bit_depth import Rendering
    from lift_ray.data.convert.conversion import Converted
    from lift_ray.data.convert.index import ImageIndex
    from lift_ray.data.convert.splitting import Division
    from lift_ray.data.convert.tasks import RunTasks

kinds = typer.Typer()
cli.app.add_typer(kinds, name="convert", short_help="Convert an image dataset to Parquet shards.")


@kinds.callback()
def convert() -> None:
    """Convert an image dataset to Parquet shards that lift_ray, Hugging Face datasets and DuckDB can read.

    If a conversion is interrupted, rerun the same command: finished shards are reused.

    \b
    Examples:
      python -m lift_ray.convert folder photos/ data/photos --short-side 256
      python -m lift_ray.convert torchvision Food101 data/food101 --folder downloads/ --download
    """


Destination = Annotated[str, typer.Argument(metavar="DEST", help="Folder for the shards; any fsspec URL.")]
FolderGroup = Annotated[
    str | None,
    typer.Option(metavar="folder:N", help="Never divide the images of a directory N levels down between splits."),
]
ClassNames = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Class names, one per line, for directories or labels that are numbers."),
]
SimilarNames = Annotated[
    Literal["merge", "keep"] | None,
    typer.Option(help="Names of directories or labels that differ only in case or spaces: one class, or several."),
]


@dataclass(frozen=True)
class Options:
    """Command-line options shared by all sources, one per field."""

    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this short side (px); all images become JPEG.")
    ] = None
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality with --short-side.  [90]")] = None
    max_pixels: Annotated[int, typer.Option(min=1, max=178_956_970, help="Images with more pixels count as bad.")] = (
        178_956_970
    )
    window: Annotated[
        str | None,
        typer.Option(
            metavar="auto|minmax|percentile|LO,HI",
            help="Map images with more than 8 bits per channel to 8 bits.  [they are refused]",
        ),
    ] = None
    page: Annotated[int, typer.Option(min=1, help="Page of TIFFs, or frame of animations, with several.")] = 1
    background: Annotated[
        str | None,
        typer.Option(metavar="white|black|#rrggbb", help="Color behind transparent pixels.  [transparency is dropped]"),
    ] = None
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip images that cannot be decoded.")] = False
    validation_frac: Annotated[
        float | None, typer.Option(help="Fraction of each class for validation; 0 for none.  [0.1, if SRC has none]")
    ] = None
    test_frac: Annotated[
        float | None,
        typer.Option(help="Fraction of each class for the test split; 0 for none.  [0.2, if SRC has none]"),
    ] = None
    imbalance: Annotated[
        float | None,
        typer.Option(
            min=1, help="Make training long-tailed (largest / smallest class); what is cut is for validation."
        ),
    ] = None
    largest: Annotated[
        int | None, typer.Option(min=1, help="Images of the largest class, with --imbalance.  [all]")
    ] = None
    labelled: Annotated[
        int | None, typer.Option(min=1, help="Make a semi-supervised dataset: labeled images of the first class.")
    ] = None
    unlabelled: Annotated[int | None, typer.Option(min=1, help="Additional unlabeled images of the first class.")] = (
        None
    )
    gamma_l: Annotated[float | None, typer.Option(min=1, help="Imbalance of the labeled images.")] = None
    gamma_u: Annotated[float | None, typer.Option(min=1, help="Imbalance of the unlabeled images.  [as --gamma-l]")] = (
        None
    )
    reversed: Annotated[
        bool, typer.Option("--reversed", help="Give the class with the fewest labeled images the most unlabeled ones.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits and of the order.")] = 0
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Images per file.")] = 4096
    row_group_rows: Annotated[int, typer.Option(min=1, help="Images per row group, the unit of reading.")] = 256
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset at DEST.")] = False
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Images (on a cluster: shards) processed at once.  [one per core]")
    ] = None
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster.  [$RAY_ADDRESS, else none]")
    ] = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.short_side is None:
            raise BadInput("--quality", "requires --short-side", "none (the bytes are kept)", "add --short-side")
        self.division()
        self.rendering()

    def rendering(self) -> Rendering:
        """Return the options for bit depth, pages and transparency. Raises BadInput."""
        from lift_ray.data.bit_depth import Rendering

        return Rendering.parse(self.window, self.page, self.background)

    def division(self) -> Division:
        """Return the options for splits. Raises BadInput for options that cannot be combined."""
        from lift_ray.data.convert.splitting import Division

        return Division(
            self.validation_frac,
            self.test_frac,
            self.seed,
            self.imbalance,
            self.largest,
            self.labelled,
            self.unlabelled,
            self.gamma_l,
            self.gamma_u,
            self.reversed,
        )


def kind(name: str) -> Callable[[Callable[..., dict[str, object]]], Callable[..., None]]:
    """Register a command; a dataclass parameter becomes one option per field."""

    def register(function: Callable[..., dict[str, object]]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters
        groups = {
            each.name: inspect.signature(each.annotation, eval_str=True).parameters
            for each in parameters.values()
            if isinstance(each.annotation, type) and is_dataclass(each.annotation)
        }

        @wraps(function)
        def command(**given: Any) -> dict[str, object]:
            made = {
                group: parameters[group].annotation(**{field: given.pop(field) for field in fields})
                for group, fields in groups.items()
            }
            return function(**given, **made)

        shown = [each for name, own in parameters.items() for each in groups.get(name, {name: own}).values()]
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        return kinds.command(name)(cli.with_json("convert")(command))

    return register


@kind("folder")
def folder(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of class directories, or of train/val/test.")],
    destination: Destination,
    options: Options,
    group: FolderGroup = None,
    class_names: ClassNames = None,
    similar_names: SimilarNames = None,
) -> dict[str, object]:
    """Convert class directories of images: SRC/<class>/... or SRC/<train|val|test>/<class>/...

    --group folder:1 keeps the images of SRC/<class>/<directory>/ together, for example one sequence or one individual.

    \b
    Examples:
      python -m lift_ray.convert folder photos/ s3://bucket/photos --short-side 256
      python -m lift_ray.convert folder birds/ data/birds --group folder:1
    """
    from lift_ray.data.convert.folder import scan_folder

    index = scan_folder(source, group=group, class_names=class_names, similar_names=similar_names)
    return _convert(index, destination, options)


@kind("list")
def image_list(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder that the paths in the lists are relative to.")],
    destination: Destination,
    options: Options,
    train: Annotated[str, typer.Option(metavar="FILE", help="List of training images.")],
    class_names: Annotated[
        str, typer.Option(metavar="FILE", help="Class names, one per line, for labels that are numbers.")
    ],
    validation: Annotated[str | None, typer.Option(metavar="FILE", help="List of validation images.")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="List of test images.")] = None,
    group: FolderGroup = None,
) -> dict[str, object]:
    """Convert images listed in text files, `path label` on each line, the format of ImageNet-LT and Places-LT.

    \b
    Example:
      python -m lift_ray.convert list imagenet/ data/imagenet-lt --train ImageNet_LT_train.txt \\
          --test ImageNet_LT_test.txt --class-names classnames.txt --short-side 256
    """
    from lift_ray.data.convert.lists import scan_list

    index = scan_list(source, train=train, validation=validation, test=test, class_names=class_names, group=group)
    return _convert(index, destination, options)


@kind("inat")
def inat(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder with train_val2018/ and the annotations.")],
    destination: Destination,
    options: Options,
    rank: Annotated[str, typer.Option(help="Taxonomic rank of the labels.")] = "species",
    train: Annotated[str, typer.Option(metavar="FILE", help="Annotations of the training images.")] = "train2018.json",
    test: Annotated[
        str, typer.Option(metavar="FILE", help="Annotations of the published validation images, used as test split.")
    ] = "val2018.json",
    categories: Annotated[str, typer.Option(metavar="FILE", help="The taxonomy.")] = "categories.json",
) -> dict[str, object]:
    """Convert iNaturalist 2018 (or 2019, 2021) with its taxonomy.

    \b
    Example:
      python -m lift_ray.convert inat inat2018/ s3://bucket/inat2018 --short-side 256
    """
    from lift_ray.data.convert.inat import scan_inat

    return _convert(scan_inat(source, rank=rank, train=train, test=test, categories=categories), destination, options)


@kind("cifar")
def cifar(
    source: Annotated[str, typer.Argument(metavar="SRC", help="cifar-100-python.tar.gz, or its extracted folder.")],
    destination: Destination,
    options: Options,
    coarse: Annotated[bool, typer.Option("--coarse", help="Use the 20 superclasses of CIFAR-100.")] = False,
) -> dict[str, object]:
    """Convert CIFAR-10 or CIFAR-100; --imbalance 10, 50 or 100 makes the long-tailed version of the literature.

    \b
    Examples:
      python -m lift_ray.convert cifar cifar-100-python.tar.gz data/cifar100-lt --imbalance 100
      python -m lift_ray.convert cifar cifar-10-python.tar.gz data/cifar10-semi --labelled 500 --unlabelled 4000 \\
          --gamma-l 100
    """
    if options.largest is not None:
        raise BadInput(
            "largest", "must not be given for cifar, whose cut keeps all images of the first class", remedy="remove it"
        )
    from lift_ray.data.convert.cifar import scan_cifar

    index = scan_cifar(source, imbalance=options.imbalance, coarse=coarse)
    return _convert(index, destination, replace(options, imbalance=None))


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Options for the columns of a table."""

    image_column: cli.ImageColumn = None
    label_column: cli.LabelColumn = None
    split_column: cli.SplitColumn = None
    root: cli.Root = None
    class_names: ClassNames = None
    similar_names: SimilarNames = None
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|folder:N",
            help="Never divide images with the same value (location, individual), or in the same directory, between splits.",
        ),
    ] = None


@kind("csv")
def csv_table(
    source: Annotated[str, typer.Argument(metavar="SRC", help="CSV file with a header.")],
    destination: Destination,
    columns: Columns,
    options: Options,
) -> dict[str, object]:
    """Convert images whose paths and labels are in a CSV file.

    \b
    Example:
      python -m lift_ray.convert csv labels.csv data/mine --image-column file --label-column species --root photos/
    """
    from lift_ray.data.convert.tables import scan_table

    return _convert(scan_table(source, kind="csv", **asdict(columns)), destination, options)


@kind("parquet")
def parquet_table(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Parquet file, folder of them, or pattern with *.")],
    destination: Destination,
    columns: Columns,
    options: Options,
) -> dict[str, object]:
    """Convert images from Parquet files that contain them or their paths.

    \b
    Example:
      python -m lift_ray.convert parquet 's3://bucket/raw/*.parquet' data/mine --label-column category
    """
    from lift_ray.data.convert.tables import scan_table

    return _convert(scan_table(source, kind="parquet", **asdict(columns)), destination, options)


@kind("arrow")
def arrow_table(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder that datasets wrote with save_to_disk.")],
    destination: Destination,
    columns: Columns,
    options: Options,
) -> dict[str, object]:
    """Convert a Dataset or DatasetDict that the library `datasets` saved with save_to_disk.

    \b
    Example:
      python -m lift_ray.convert arrow saved/ data/mine --label-column species
    """
    from lift_ray.data.convert.tables import scan_table

    return _convert(scan_table(source, kind="arrow", **asdict(columns)), destination, options)


@kind("torchvision")
def torchvision(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A class of torchvision.datasets, such as Food101.")],
    destination: Destination,
    options: Options,
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="Local folder of the dataset.")],
    download: Annotated[bool, typer.Option("--download", help="Let torchvision download it first.")] = False,
) -> dict[str, object]:
    """Convert a classification dataset of torchvision.

    \b
    Example:
      python -m lift_ray.convert torchvision Food101 data/food101 --folder downloads/ --download --short-side 256
    """
    from lift_ray.data.convert.torchvision_sets import scan_torchvision

    return _convert(scan_torchvision(name, root=folder, download=download), destination, options)


def _convert(index: ImageIndex, destination: str, options: Options) -> dict[str, object]:
    from lift_ray.data.convert import conversion
    from lift_ray.data.convert.images import Encoding
    from lift_ray.terminal.image_progress import image_progress

    for note in index.notes:
        say(note, error=True)
    with _engine(options) as run_tasks, image_progress() as progress:
        converted = conversion.convert(
            index,
            destination,
            division=options.division(),
            encoding=Encoding(options.short_side, options.quality or 90, options.max_pixels, options.rendering()),
            rows_per_shard=options.rows_per_shard,
            row_group_rows=options.row_group_rows,
            skip_bad=options.skip_bad,
            overwrite=options.overwrite,
            workers=options.at_once,
            progress=progress,
            run_tasks=run_tasks,
        )
    _report(destination, converted, index, options)
    return _results(destination, converted, index)


@contextmanager
def _engine(options: Options) -> Iterator[RunTasks | None]:
    """Yield a function that runs tasks on the given Ray cluster, or None to use the cores of this machine."""
    if not (options.ray or os.environ.get("RAY_ADDRESS")):
        yield None
        return
    from lift_ray.ray_runtime.session import connected

    with connected(options.ray, dashboard=False):
        from lift_ray.ray_runtime.conversion import on_cluster

        yield partial(on_cluster, at_once=options.at_once)


def _report(destination: str, converted: Converted, index: ImageIndex, options: Options) -> None:
    import numpy as np

    from lift_ray.data.convert.conversion import LEFT_OUT, SKIPPED
    from lift_ray.data.longtail import plot, summary
    from lift_ray.data.walk import counted, links_line
    from lift_ray.evaluation.metrics import ClassGroups
    from lift_ray.storage.store import join
    from lift_ray.terminal.tables import PlainTable, console

    table = PlainTable("split")
    for name in ("images", "classes", "shards", "MB"):
        table.add_column(name, justify="right")
    for split, record in converted.splits.items():
        classes = sum(count > 0 for count in record.class_counts)
        num_bytes = sum(shard.bytes for shard in record.shards)
        table.add_row(split, f"{record.rows:,}", f"{classes:,}", str(len(record.shards)), f"{num_bytes / 1e6:,.1f}")
    console().print(table)
    counts = np.array(converted.labelled_counts)
    say(f"labeled: {summary(counts)}\ngroups: {ClassGroups.of(counts)}\n{plot(counts)}")
    if converted.unseen and "validation" in converted.splits:
        say(_unseen(converted))
    for split, frac in (("validation", options.validation_frac), ("test", options.test_frac)):
        if split not in converted.splits and frac != 0 and (split != "test" or options.labelled is None):
            say(f"no {split} split: there are no images or groups to draw it from")
    if index.num_links:
        say(links_line(index.num_links))
    if index.left_out:
        say(f"left out {counted(index.left_out)}: {join(destination, LEFT_OUT)}")
    if converted.num_paged:
        say(f"{count(converted.num_paged, 'image')} with several pages: page {options.page} of each was used (--page)")
    if window := converted.rendering.window:
        say(f"window of images with more than 8 bits per channel: {window}")
    if converted.skipped:
        number = len(converted.skipped)
        say(f"{count(number, 'bad image')} {'was' if number == 1 else 'were'} skipped: {join(destination, SKIPPED)}")
    say(f"dataset: {destination}")


def _results(destination: str, converted: Converted, index: ImageIndex) -> dict[str, object]:
    """Return the figures of a conversion, and where its lists are."""
    import numpy as np

    from lift_ray.data.convert.conversion import LEFT_OUT, SKIPPED
    from lift_ray.data.longtail import summary
    from lift_ray.evaluation.metrics import ClassGroups
    from lift_ray.storage.store import join

    counts = np.array(converted.labelled_counts)
    return {
        "dataset": destination,
        "splits": {
            split: {
                "images": record.rows,
                "classes": sum(count > 0 for count in record.class_counts),
                "shards": len(record.shards),
                "bytes": sum(shard.bytes for shard in record.shards),
            }
            for split, record in converted.splits.items()
        },
        "labeled": asdict(summary(counts)),
        "groups": Counter(ClassGroups.of(counts).names.tolist()),
        "unseen": [converted.class_names[label] for label in converted.unseen],
        "links": index.num_links,
        "paged": converted.num_paged,
        "window": None if (window := converted.rendering.window) is None else str(window),
        "left_out": len(index.left_out),
        "left_out_list": join(destination, LEFT_OUT) if index.left_out else None,
        "skipped": len(converted.skipped),
        "skipped_list": join(destination, SKIPPED) if converted.skipped else None,
    }


def _unseen(converted: Converted) -> str:
    """Return the line that says which classes a search on the validation split does not see, and why."""
    unseen, num_classes = converted.unseen, len(converted.class_names)
    alone = all(converted.labelled_counts[label] == 1 for label in unseen)
    why = ""
    if converted.validation == "drawn" and (alone or converted.has_groups):
        why = " (a single image, or a single group)" if converted.has_groups else " (a single image)"
    names = first_few([repr(converted.class_names[label]) for label in unseen])
    have = (
        f"{len(unseen):,} of {num_classes:,} classes have" if len(unseen) > 1 else f"1 of {num_classes:,} classes has"
    )
    return f"{have} no validation image{why}: the search does not see {names}"


main = partial(cli.run, "lift_ray.convert")

if __name__ == "__main__":
    run_and_exit(main)
