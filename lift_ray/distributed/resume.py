"""One driver at a time on a search's folder, and what the next one finds there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from lift_ray.distributed.study import JOURNAL, Study, check_sampler, open_storage
from lift_ray.errors import BadInput
from lift_ray.results.output import Output
from lift_ray.settings.space import SpaceFile

LOCK = "driver.lock"


@contextmanager
def study_in(out: Output, space: SpaceFile, dataset: str, *, url: str | None, resume: bool) -> Iterator[Study]:
    """The study of a folder, new or to go on with, for as long as this driver works on it.

    Args:
        url: of a database; a journal file in the folder when None.

    Raises BadInput: the folder holds a search already, or none to go on with; another driver is at work.
    """
    check_sampler(space)
    database = open_storage(url, out.folder) if url is not None else None
    if not resume:
        out.must_be_new()
    elif database is None and not out.holds(JOURNAL):
        raise BadInput(
            f"{out.url}: must hold a search to go on with, but there is no {JOURNAL}; check --out, or leave out --resume"
        )
    out.folder.mkdir(parents=True, exist_ok=True)
    is_local = "://" not in out.url
    with _alone(out):
        if not is_local and resume and database is None:
            with out.fetched(JOURNAL) as journal:
                shutil.copyfile(journal, out.folder / JOURNAL)
        storage = database or open_storage(None, out.folder)
        study = Study(space, dataset, storage, resume=resume, shared=not is_local or database is not None)
        try:
            yield study
        finally:
            study.leave()
            out.publish()


@contextmanager
def _alone(out: Output) -> Iterator[None]:
    """Hold the folder's lock, which the kernel takes back from a driver that dies. Raises BadInput when another holds it."""
    descriptor = os.open(out.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise BadInput(
                f"{out.url}: must have one driver, but {holder} works on it; wait for it, or stop it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
