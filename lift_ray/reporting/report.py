"""Report of studies: read their files, compute what the page needs, write it, and keep it up to date while a search runs."""

from __future__ import annotations

import base64
import io
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lift_ray.data.bad_image import BadImage
from lift_ray.data.decode import upright
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, one_line
from lift_ray.reporting.confidence import FEW_IMAGES, wilson
from lift_ray.reporting.page import Example, StudySection, write_page
from lift_ray.reporting.png import write_png
from lift_ray.reporting.study_files import (
    FILES,
    OUT_OF_FOLD_PATH,
    PREDICTION_COLUMNS,
    StudyFiles,
    read_study,
)
from lift_ray.storage.layout import PAGE, PREDICTIONS, PREDICTIONS_FILE, REPORT, TRIALS
from lift_ray.storage.output import Output
from lift_ray.text import say

EVERY_S = 30.0
MOST_TIME_FRAC = 0.05  # of the time of a running search that its report may take
WORST_CLASSES = 8
EXAMPLES = 3  # misclassified images of each
EXAMPLE_PX = 112


def write_report(outs: Sequence[str], to: str | None = None, *, png: bool = False) -> str:
    """Write the report page of one or several studies. Return its path or URL.

    Args:
        outs: result folders or URLs of searches.
        to: folder or URL for the page; by default report/ inside a single study, or ./report for several.
        png: also write each figure as PNG.

    Raises:
        BadInput: a folder contains no study, a file cannot be read, or kaleido or Chrome is missing for `png`.
        RunFailed: the page cannot be written.
    """
    studies = [_read(Output(out, "OUT")) for out in outs]
    twice = {name for name, number in Counter(study.name for study in studies).items() if number > 1}
    studies = [replace(s, name=f"{s.name} {i + 1}") if s.name in twice else s for i, s in enumerate(studies)]
    inside = to is None and len(outs) == 1
    target = Output(outs[0], "OUT") if inside else Output(to or REPORT)
    name = REPORT if inside else ""
    sections = [_section(study) for study in studies]
    with target.staged(name, PAGE) as folder:
        named = write_page(sections, folder)
        if png:
            write_png(named, folder)
    return "/".join(part for part in (str(target), name, PAGE) if part)


def _read(out: Output) -> StudyFiles:
    """Read a study. Of a remote study, download only what the report needs: neither checkpoints nor out-of-fold logits."""
    if "://" in out.url:
        names = [name for name in FILES if out.holds(name)]
        names += [f"{PREDICTIONS}/{name}/{PREDICTIONS_FILE}" for name in out.names(PREDICTIONS)]
        for name in names:
            (out.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with out.fetched(name) as file:
                shutil.copyfile(file, out.folder / name)
        if out.holds(OUT_OF_FOLD_PATH):
            (out.folder / OUT_OF_FOLD_PATH).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(out.table(OUT_OF_FOLD_PATH, PREDICTION_COLUMNS), out.folder / OUT_OF_FOLD_PATH)
    return read_study(out.folder, str(out))


def _section(study: StudyFiles) -> StudySection:
    from lift_ray.reporting.importance import importances, importances_within

    examples, why = worst_classes(study)
    return StudySection(study, importances(study), importances_within(study), examples, why)


def worst_classes(study: StudyFiles) -> tuple[list[Example], str]:
    """Return the classes with the lowest test accuracy and misclassified images of them, or none and the reason.

    The order is by the upper end of Wilson's interval, so that a class with one or two test images does not come first just because
    they are misclassified. Among equal classes, the one with the most training images comes first, because there the failure is
    least expected.
    """
    found = study.winner
    if found is None or found[1] is None or not study.class_names:
        return [], "the study has no test predictions"
    predictions, counts, names = found[1], np.array(study.class_counts), study.class_names
    total = np.bincount(predictions.label, minlength=len(names))
    right = np.bincount(predictions.label[predictions.hits], minlength=len(names))
    _, highest = wilson(right, np.maximum(total, 1))
    order = sorted(np.flatnonzero(right < total), key=lambda k: (highest[k], -counts[k]))[:WORST_CLASSES]
    wrong = {int(k): np.flatnonzero((predictions.label == k) & ~predictions.hits)[:EXAMPLES] for k in order}
    if not wrong:
        return [], "every test image is classified correctly"
    try:
        split = open_dataset(study.dataset, patience_s=10.0).split("test")
        if split.labels.tolist() != predictions.label.tolist():
            return [], f"{study.dataset} has changed since the search"
        with RowReader(split, patience_s=10.0) as reader:
            images = reader.read(np.concatenate(list(wrong.values())))
        thumbnails = iter([thumbnail(image) for image in images])
    except (BadInput, BadImage) as error:
        return [], one_line(error)
    return [
        Example(
            names[k],
            str(study.groups[k]),
            int(counts[k]),
            f"{right[k]} of {total[k]}",
            bool(total[k] < FEW_IMAGES),
            [(next(thumbnails), names[predictions.predicted[i]]) for i in samples],
        )
        for k, samples in wrong.items()
    ], ""


def thumbnail(image: bytes) -> str:
    """Return an encoded image as the data URI of a small JPEG. Raises BadImage."""
    small = upright(image)
    small.thumbnail((EXAMPLE_PX, EXAMPLE_PX))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def try_report(out: Output) -> str | None:
    """Write the report of a search and return its path or URL. If that fails, print the reason: it must not end the search."""
    try:
        return write_report([out.url])
    except Exception as error:  # whatever failed, the results of the search matter more
        say(_failure(error, out))
        return None


def _failure(error: Exception, out: Output) -> str:
    return f"the report was not written: {one_line(error)}; try python -m lift_ray.report {out}"


@contextmanager
def kept_up_to_date(out: Output) -> Iterator[None]:
    """Rewrite the report in a thread while a search runs, whenever its trials have changed.

    The report is written at most every 30 s and takes at most a twentieth of the time. A search whose results go to a URL has
    no running report, because an upload after every trial would cost too much.
    """
    if "://" in out.url:
        yield
        return
    # No lock: the search renames its files into place, and a read that fails anyway is tried again. The thread is a daemon because
    # a hanging read, such as of remote data, must not keep the process alive.
    stop = threading.Event()
    thread = threading.Thread(target=_rewrite, args=(out, out.folder / TRIALS, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60.0)  # so that a report in progress does not replace the final one


def _rewrite(out: Output, trials: Path, stop: threading.Event) -> None:
    pause_s, written, printed = EVERY_S, 0.0, ""
    while not stop.wait(pause_s):
        if not trials.exists() or (changed := trials.stat().st_mtime) == written:
            continue
        began = time.monotonic()
        try:
            write_report([out.url])
            written, printed = changed, ""
        except Exception as error:  # a half-written file or a full disk: the next attempt may succeed
            if (text := _failure(error, out)) != printed:
                say(text)
            printed = text
        pause_s = max(EVERY_S, (time.monotonic() - began) / MOST_TIME_FRAC)
