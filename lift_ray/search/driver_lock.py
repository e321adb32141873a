"""One driver at a time on a search's folder, and what the next one finds there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lift_ray.errors import BadInput
from lift_ray.search.samplers import check_sampler
from lift_ray.search.study import Study, described, differences, open_storage, stored_search
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.layout import CHECKPOINTS, JOURNAL, LOCK, STUDY
from lift_ray.storage.output import Output


@contextmanager
def study_in(out: Output, space: SpaceFile, dataset: str, *, url: str | None, resume: bool) -> Iterator[Study]:
    """The study of a folder, new or resumed, for as long as this driver works on it.

    Args:
        url: of a database; a journal file in the folder when None.

    Raises BadInput: the folder holds a search already, or none to resume; another driver is at work.
    """
    check_sampler(space.search.sampler)
    if resume:
        _check_holds_search(out, url)
    else:
        check_is_new(out)
    database = open_storage(url, out.folder) if url is not None else None
    out.folder.mkdir(parents=True, exist_ok=True)
    is_local = "://" not in out.url
    with _alone(out):
        if database is None and not is_local and out.holds(JOURNAL):
            with out.fetched(JOURNAL) as journal:
                shutil.copyfile(journal, out.folder / JOURNAL)
        storage = database or open_storage(None, out.folder)
        study = Study(space, dataset, storage, resume=resume, shared=not is_local or database is not None)
        if study.replaced:  # what its slots saved is of other settings
            out.remove(CHECKPOINTS)
        try:
            yield study
        finally:
            study.leave()
            out.publish()


def check_is_new(out: Output) -> None:
    """Raises BadInput when a folder holds a search that has reported an epoch, or a driver works on it. Changes nothing."""
    if _is_held(out):
        raise _held(out)
    if (out.holds(JOURNAL) and _stored(out)[0]) or out.holds(STUDY):
        raise BadInput(
            f"{out.shown}: must be a new folder, but it holds a search already; "
            "add --resume to continue it, or give another --out"
        )


def check_can_resume(out: Output, space: SpaceFile, dataset: str, *, url: str | None) -> None:
    """Raises BadInput when a folder holds no search, or one with other settings. A database is not looked at."""
    _check_holds_search(out, url)
    now = described(space, dataset)
    if url is None and (text := differences(_stored(out)[1] or now, now)):
        raise BadInput(text)


def _check_holds_search(out: Output, url: str | None) -> None:
    if url is None and not out.holds(JOURNAL):
        raise BadInput(
            f"{out.url}: must hold a search to resume, but there is no {JOURNAL}; check --out, or leave out --resume"
        )


def _stored(out: Output) -> tuple[bool, dict[str, Any]]:
    """Whether a trial in a folder's journal has reported, and the settings the search started with. The journal is copied."""
    with out.fetched(JOURNAL) as journal, tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(journal, Path(folder) / JOURNAL)
        return stored_search(open_storage(None, Path(folder)))


def _held(out: Output) -> BadInput:
    holder = (out.folder / LOCK).read_text(errors="replace")[:200].strip() or "another process"
    return BadInput(f"{out.url}: must have one driver, but {holder} works on it; wait for it, or stop it")


def _is_held(out: Output) -> bool:
    """Whether a living driver works on a folder."""
    try:
        descriptor = os.open(out.folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _alone(out: Output) -> Iterator[None]:
    """Hold the folder's lock, which the kernel takes back from a driver that dies. Raises BadInput when another holds it."""
    descriptor = os.open(out.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _held(out) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
