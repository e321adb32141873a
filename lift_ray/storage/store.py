"""Files at any fsspec URL: requests are retried while a failure may pass, and every error is one clear line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.spec import AbstractFileSystem

from lift_ray.errors import BadInput, one_line
from lift_ray.storage.retry import retry

PATIENCE_S = 60.0
LEAST_BYTES_PER_S = 2**20  # a slower store counts as unreachable
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
CERTAIN = (BadInput, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# parts of the names of exceptions that botocore, aiohttp, httpx and others raise for requests that may succeed later
PASSING = ("Timeout", "Connect", "Payload", "IncompleteRead", "Streaming", "Checksum")
# the stores' names for a value that changes with a file's content, best first
MARKS = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "updated")

DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # of a path of Windows

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A file or folder inside a folder.

    Attributes:
        name: without the folder.
        is_folder: True for a folder.
        num_bytes: size of the file; None when the store does not report it.
        identity: changes with the file's content (size and etag, or size and time); "" when the store reports neither.
    """

    name: str
    is_folder: bool
    num_bytes: int | None
    identity: str


@contextmanager
def reached(where: str, rule: str, remedy: str) -> Iterator[None]:
    """Turn any failure of a file or store into BadInput: `where: rule, but got <error>; remedy`.

    Raises BadInput; a BadInput from inside passes unchanged.
    """
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(where, rule, but="nothing is there", remedy="check the path") from None
    except ImportError as error:
        protocol = where.partition("://")[0]
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'lift_ray[{extra}]'" if extra else "install the package of this store"
        raise BadInput(where, f"{protocol} requires a package", f"{one_line(error)!r}", fix) from None
    except Exception as error:  # every store has its own exception types (botocore, aiohttp, gcsfs, Arrow)
        if (
            isinstance(error, PermissionError)
            or _http_status(error) in (401, 403)
            or "Credentials" in type(error).__name__
        ):
            raise BadInput(
                where, rule, but=f"access is denied ({one_line(error)})", remedy="check your permissions"
            ) from None
        raise BadInput(where, rule, f"{one_line(error)!r}", remedy) from None


def retried(work: Callable[[float], Result], where: str, rule: str, remedy: str, patience_s: float) -> Result:
    """Return the result of `work`, retried while its failure may pass.

    Args:
        work: as in `retry`.
        where, rule, remedy: parts of the error message, as in `reached`.
        patience_s: no attempt begins later than this; 0 means a single attempt.

    Raises BadInput: at once for permanent failures (file not found, access denied), otherwise when the patience is over; the message
    then says how long and how often it was tried.
    """
    started, tries, got = time.monotonic(), 0, ""

    def attempt(left_s: float) -> Result:
        nonlocal tries, got
        tries += 1
        try:
            return work(left_s)
        except Exception as error:
            if str(error) or not got:  # an interrupted last attempt says less than those before it
                got = one_line(error)
            raise

    try:
        return retry(attempt, may_pass, patience_s)
    except Exception as error:
        if not patience_s or not may_pass(error):
            with reached(where, rule, remedy):
                raise
        often = f"{tries} tries" if tries > 1 else "1 try"
        spent_s = time.monotonic() - started
        raise BadInput(where, rule, f"{got!r} ({often} in {spent_s:.0f} s)", remedy) from None


def may_pass(error: BaseException) -> bool:
    """Return True if the same request may succeed later: timeout, lost connection, short or broken body, HTTP 408, 429, 5xx."""
    if isinstance(error, CERTAIN):
        return False
    if isinstance(error, TimeoutError):
        return True
    if (status := _http_status(error)) is not None and status >= 400:
        return status >= 500 or status in (408, 429)
    return isinstance(error, OSError) or any(word in kind.__name__ for kind in type(error).__mro__ for word in PASSING)


def is_remote(file_system: Any) -> bool:
    """Return True if reads go over a network, so that caching and retrying pay off."""
    protocol = file_system.protocol
    return (protocol if isinstance(protocol, str) else protocol[0]) not in ("file", "local", "memory")


def fetch(url: str, start: int | None, end: int | None, patience_s: float) -> bytes:
    """Return the bytes [start, end) of a file in one request; None means the beginning or end, a negative `start` counts from the end.

    Requests to a remote store are retried for `patience_s` while the failure may pass.
    Raises BadInput when the file cannot be read, or is too short.
    """
    file_system, path = locate(url)
    wanted = 0 if end is None else end - (start or 0)

    def work(left_s: float) -> bytes:
        data = _read(file_system, path, start, end, left_s + wanted / LEAST_BYTES_PER_S)
        if len(data) < wanted:
            raise OSError(f"{len(data)} of {wanted} bytes")
        return data

    if not is_remote(file_system):
        return retried(work, url, "must be a readable file", "copy it again", 0.0)
    return retried(work, url, "must be a readable file", "check the store and the network", patience_s)


def entries(url: str, where: str, rule: str, patience_s: float) -> list[Entry]:
    """List a folder, sorted by name. `where` and `rule` are parts of the error message, as in `reached`.

    Raises BadInput when there is no such folder or it is a file.
    """
    file_system, path = locate(url)

    def work(left_s: float) -> Any:
        file_system.invalidate_cache(path)  # the instance is shared and may have cached an older listing
        if _can_be_interrupted(file_system):
            return sync(file_system.loop, file_system._ls, path, detail=True, timeout=left_s)
        return file_system.ls(path, detail=True)

    found = retried(work, where, rule, "check the path and the store", patience_s if is_remote(file_system) else 0.0)
    if [info["name"].rstrip("/") for info in found if info["type"] == "file"] == [path.rstrip("/")]:
        raise BadInput(where, rule, "a file", "give the folder it is in")
    here = [
        Entry(
            info["name"].rstrip("/").rsplit("/", 1)[-1], info["type"] == "directory", info.get("size"), _identity(info)
        )
        for info in found
    ]
    return sorted(here, key=lambda entry: entry.name)


def locate(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path inside it. Raises BadInput for an unknown or missing protocol."""
    check_drive(url)
    with reached(url, "must be a path or an fsspec URL", "check the protocol"):
        file_system, path = fsspec.core.url_to_fs(url)
        return file_system, path
    raise AssertionError("unreachable")


def check_drive(path: str) -> None:
    """Raise BadInput for a path of Windows with a drive letter, unless this is Windows or there is a file of that name."""
    if os.name != "nt" and DRIVE.match(path) and not os.path.exists(path):
        rule, but = "must be a path of this machine", "it has a drive letter, which only Windows knows"
        raise BadInput(path, rule, but=but, remedy="give its path here")


def same_place(one: str, other: str) -> bool:
    """Return True if two URLs or absolute paths name the same place: with or without file:// and a final slash."""
    return one.removeprefix("file://").rstrip("/") == other.removeprefix("file://").rstrip("/")


def join(url: str, name: str) -> str:
    """Return `url/name` with one slash between."""
    return f"{url.rstrip('/')}/{name}"


def _read(file_system: Any, path: str, start: int | None, end: int | None, limit_s: float) -> bytes:
    data: bytes
    if _can_be_interrupted(file_system):
        work = file_system._cat_file
        data = sync(file_system.loop, work, path, start=start, end=end, timeout=limit_s)
    elif type(file_system).cat_file is not AbstractFileSystem.cat_file:
        data = file_system.cat_file(path, start=start, end=end)
    else:
        # without a cache: reading a label could fetch megabytes ahead
        options = {"cache_type": "none"} if is_remote(file_system) else {}
        with file_system.open(path, "rb", **options) as file:
            size = file.seek(0, 2)
            start = start or 0
            start = file.seek(start if start >= 0 else max(0, size + start))
            data = file.read(max(0, (size if end is None else min(end, size)) - start))
    return data


def _can_be_interrupted(file_system: Any) -> bool:
    """Return True for file systems that are asynchronous inside: a hanging request can be ended (their own limits may be minutes)."""
    return bool(file_system.async_impl and not file_system.asynchronous)


def _http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of botocore, aiohttp, gcsfs or httpx, if there is one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = (
                getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
            )
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _identity(info: dict[str, Any]) -> str:
    mark = next((f"{key} {info[key]}" for key in MARKS if info.get(key)), "")
    return f"{info.get('size')} bytes, {mark}" if mark and info.get("size") is not None else ""
