"""The report of studies: their files from wherever they are, what has to be computed for it, and when a running search writes it."""

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

from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.reporting.page import Example, StudySection, write_page
from lift_ray.reporting.png import write_png
from lift_ray.reporting.study_files import BEST_FOUND, FILES, StudyFiles, read_study
from lift_ray.storage.layout import PAGE, PREDICTIONS, PREDICTIONS_FILE, REPORT, TRIALS
from lift_ray.storage.output import Output

EVERY_S = 30.0
SHARE = 0.05  # of the time that a running search may spend on its report
WORST_CLASSES = 8
PICTURES = 3
PICTURE_PX = 112


def write_report(outs: Sequence[str], to: str | None = None, *, png: bool = False) -> str:
    """Write the page about one study or several; returns where it is.

    Args:
        outs: results of searches, folders or URLs.
        to: folder or URL; without it report/ inside the one study, or ./report for several.

    Raises:
        BadInput: a folder that holds no study, files that cannot be read, or `png` where what it needs is missing.
        RunFailed: it cannot be written.
    """
    studies = [_read(Output(out, "OUT")) for out in outs]
    twice = {name for name, number in Counter(study.name for study in studies).items() if number > 1}
    studies = [replace(s, name=f"{s.name} {i + 1}") if s.name in twice else s for i, s in enumerate(studies)]
    inside = to is None and len(outs) == 1
    target = Output(outs[0], "OUT") if inside else Output(to or REPORT, "--to")
    name = REPORT if inside else ""
    sections = [_section(study) for study in studies]
    with target.staged(name, PAGE) as folder:
        named = write_page(sections, folder)
        if png:
            write_png(named, folder)
    return "/".join(part for part in (str(target), name, PAGE) if part)


def _read(out: Output) -> StudyFiles:
    """Only the files that the report needs: a remote study's checkpoints stay where they are."""
    if "://" in out.url:
        names = [name for name in FILES if out.holds(name)]
        names += [f"{PREDICTIONS}/{name}/{PREDICTIONS_FILE}" for name in out.names(PREDICTIONS)]
        for name in names:
            (out.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with out.fetched(name) as file:
                shutil.copyfile(file, out.folder / name)
    return read_study(out.folder, str(out))


def _section(study: StudyFiles) -> StudySection:
    from lift_ray.reporting.importance import importances, importances_within

    examples, why = worst_classes(study)
    return StudySection(study, importances(study), importances_within(study), examples, why)


def worst_classes(study: StudyFiles) -> tuple[list[Example], str]:
    """Classes that the best recognises least on test, with images of them taken for others; or none, and why.

    Of classes that are equally bad, the one with the most training images comes first: it has the least excuse.
    """
    found = study.entry(BEST_FOUND)
    if found is None or found[1] is None or not study.class_names:
        return [], "the comparison on the test split is not there"
    predictions, counts, names = found[1], np.array(study.class_counts), study.class_names
    total = np.bincount(predictions.label, minlength=len(names))
    right = np.bincount(predictions.label[predictions.hits], minlength=len(names))
    order = sorted(np.flatnonzero(right < total), key=lambda k: (right[k] / total[k], -counts[k]))[:WORST_CLASSES]
    wrong = {int(k): np.flatnonzero((predictions.label == k) & ~predictions.hits)[:PICTURES] for k in order}
    if not wrong:
        return [], "every test image is recognised"
    try:
        split = open_dataset(study.dataset, patience_s=10.0).split("test")
        if split.labels.tolist() != predictions.label.tolist():
            return [], f"{study.dataset} has changed since"
        with RowReader(split, patience_s=10.0) as reader:
            images = reader.read(np.concatenate(list(wrong.values())))
        pictures = iter([thumbnail(image) for image in images])
    except (BadInput, OSError, ValueError, SyntaxError) as error:  # the last three: Pillow's, for a broken image
        return [], " ".join(str(error).split())
    return [
        Example(
            names[k],
            str(study.groups[k]),
            int(counts[k]),
            f"{right[k]} of {total[k]}",
            [(next(pictures), names[predictions.predicted[i]]) for i in samples],
        )
        for k, samples in wrong.items()
    ], ""


def thumbnail(image: bytes) -> str:
    """An encoded image as the data URI of a small JPEG. Raises OSError for a broken one."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def try_report(out: Output) -> str | None:
    """Write the report of a search, and say in a line why not: it must not end the search. Returns where it is."""
    try:
        return write_report([out.url])
    except Exception as error:  # whatever it is, the search is worth more
        print(_fault(error, out))
        return None


def _fault(error: Exception, out: Output) -> str:
    return f"the report was not written: {' '.join(str(error).split())[:300]}; try python -m lift_ray.report {out}"


@contextmanager
def kept_up_to_date(out: Output) -> Iterator[None]:
    """Write the report while a search runs, in a thread: whenever the trials changed, at most every 30 s and for at most a
    twentieth of the time. Only into a folder: an upload after every trial would be too much."""
    if "://" in out.url:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(out, out.folder / TRIALS, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=60.0)


def _keep(out: Output, trials: Path, over: threading.Event) -> None:
    pause_s, written, told = EVERY_S, 0.0, ""
    while not over.wait(pause_s):
        if not trials.exists() or (changed := trials.stat().st_mtime) == written:
            continue
        began = time.monotonic()
        try:
            write_report([out.url])
            written, told = changed, ""
        except Exception as error:  # a file that is half written, a full disk: the next time may be better
            if (text := _fault(error, out)) != told:
                print(text)
            told = text
        pause_s = max(EVERY_S, (time.monotonic() - began) / SHARE)
