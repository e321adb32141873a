"""Open a search's folder for one driver at a time, and check whether a search there can start or resume."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lift_ray.errors import BadInput
from lift_ray.searching.samplers import check_sampler
from lift_ray.searching.study import Study, described, differences, open_storage, stored_search
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.layout import CHECKPOINTS, JOURNAL, LOCK, STUDY
from lift_ray.storage.output import Output


@contextmanager
def study_in(out: Output, space: SpaceFile, dataset: str, *, url: str | None, resume: bool) -> Iterator[Study]:
    """Yield the study of a folder, new or resumed, and hold the folder's lock meanwhile.

    Args:
        url: the database; None for a journal file in the folder.

    Raises:
        BadInput: the folder already contains a search, or none to resume, or another driver is working on it.
    """
    check_sampler(space.search.sampler)
    if resume:
        _check_holds_search(out, url)
    else:
        check_is_new(out)
    database = open_storage(url, out.folder) if url is not None else None
    out.folder.mkdir(parents=True, exist_ok=True)
    is_local = "://" not in out.url
    with alone_in(out):
        if database is None and not is_local and out.holds(JOURNAL):
            with out.fetched(JOURNAL) as journal:
                shutil.copyfile(journal, out.folder / JOURNAL)
        storage = database or open_storage(None, out.folder)
        study = Study(space, dataset, storage, resume=resume, shared=not is_local or database is not None)
        if study.replaced:  # its checkpoints may be of other settings
            out.remove(CHECKPOINTS)
        try:
            yield study
        finally:
            study.leave()
            out.publish()


def check_is_new(out: Output) -> None:
    """Raise BadInput if a folder contains a search that has reported an epoch, or a driver works on it. Changes nothing."""
    if _is_held(out):
        raise _held(out)
    if (out.holds(JOURNAL) and _stored(out)[0]) or out.holds(STUDY):
        raise BadInput(
            out.shown,
            "must be a new folder",
            but="it already contains a search",
            remedy="add --resume to continue it, or give another --out",
        )


def check_can_resume(out: Output, space: SpaceFile, dataset: str, *, url: str | None) -> None:
    """Raise BadInput if a folder contains no search, or one with other settings. A database is not opened."""
    _check_holds_search(out, url)
    now = described(space, dataset)
    if url is None and (fault := differences(_stored(out)[1] or now, now)):
        raise fault


def _check_holds_search(out: Output, url: str | None) -> None:
    if url is None and not out.holds(JOURNAL):
        raise BadInput(
            out.url,
            "must contain a search to resume",
            but=f"there is no {JOURNAL}",
            remedy="check --out, or leave out --resume",
        )


def _stored(out: Output) -> tuple[bool, dict[str, Any]]:
    """Return whether a trial in a folder's journal has reported, and the settings the search started with.

    Reads a copy, because opening a journal repairs it.
    """
    with out.fetched(JOURNAL) as journal, tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(journal, Path(folder) / JOURNAL)
        return stored_search(open_storage(None, Path(folder)))


def _held(out: Output) -> BadInput:
    holder = ""
    with suppress(PermissionError):  # Windows lets nobody read what another process has locked
        holder = (out.folder / LOCK).read_text(errors="replace")[:200].strip()
    return BadInput(
        out.url,
        "must have one driver",
        but=f"{holder or 'another process'} is working on it",
        remedy="wait for it or stop it",
    )


def _lock(out: Output) -> FileLock:
    # flock only: the kernel releases it when its process dies. A soft lock is a file that a killed driver would leave behind.
    return FileLock(out.folder / LOCK, timeout=0, fallback_to_soft=False)


def _is_held(out: Output) -> bool:
    """Return True if a living driver works on a folder."""
    if not (out.folder / LOCK).exists():  # acquiring the lock would create the file
        return False
    try:
        with _lock(out):
            return False
    except Timeout:
        return True


@contextmanager
def alone_in(out: Output) -> Iterator[None]:
    """Hold the folder's lock. Raises BadInput if another driver holds it."""
    try:
        lock = _lock(out).acquire()
    except Timeout:
        raise _held(out) from None
    with lock:
        # The file stays after the driver; its text only says who holds the lock, or held it last.
        with suppress(PermissionError):
            (out.folder / LOCK).write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield
