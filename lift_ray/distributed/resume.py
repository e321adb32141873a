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

from lift_ray.distributed.study import (
    JOURNAL,
    Study,
    check_sampler,
    described,
    differences,
    open_storage,
    stored_search,
)
from lift_ray.errors import BadInput
from lift_ray.results.output import Output
from lift_ray.settings.space import SpaceFile

LOCK = "driver.lock"


@contextmanager
def study_in(out: Output, space: SpaceFile, dataset: str, *, url: str | None, resume: bool) -> Iterator[Study]:
    """The study of a folder, new or resumed, for as long as this driver works on it.

    Args:
        url: of a database; a journal file in the folder when None.

    Raises BadInput: the folder holds a search already, or none to resume; another driver is at work.
    """
    check_sampler(space)
    check_out(out, space, dataset, url=url, resume=resume)
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
            out.remove("checkpoints")
        try:
            yield study
        finally:
            study.leave()
            out.publish()


def check_out(out: Output, space: SpaceFile, dataset: str, *, url: str | None, resume: bool) -> None:
    """Whether a search can start, or be resumed, with this folder; changes nothing. Raises BadInput."""
    has_journal = out.holds(JOURNAL)
    if resume:
        if url is None and not has_journal:
            raise BadInput(f"{out.url}: must hold a search to resume, but there is no {JOURNAL}; "
                           "check --out, or leave out --resume")  # fmt: skip
        if url is None and (before := _stored(out)[1]) and (text := differences(before, described(space, dataset))):
            raise BadInput(text)
        return
    if _is_held(out):
        raise _held(out)
    if (has_journal and _stored(out)[0]) or out.holds("study.json"):
        raise BadInput(
            f"{out.shown}: must be a new folder, but it holds a search already; "
            "add --resume to continue it, or give another --out"
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
