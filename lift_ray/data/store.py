"""Files at any fsspec URL, with one clear line for whatever goes wrong at the other end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from lift_ray.errors import BadInput

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def one_line(error: BaseException) -> str:
    """The first line of an error's message without its final period, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".") if lines else type(error).__name__)[:160]


@contextmanager
def reached(where: str, rule: str, remedy: str) -> Iterator[None]:
    """Turn any failure of a file or store into `where: rule, but got <error>; remedy`.

    Raises BadInput; a BadInput from inside passes unchanged.
    """
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{where}: {rule}, but nothing is there; check the path") from None
    except PermissionError as error:
        raise BadInput(f"{where}: {rule}, but access is denied ({one_line(error)}); check your rights") from None
    except ImportError as error:
        protocol = where.partition("://")[0]
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'lift_ray[{extra}]'" if extra else "install the package of this store"
        raise BadInput(f"{where}: {protocol} needs a package, but got {one_line(error)!r}; {fix}") from None
    except Exception as error:  # every store has its own exception types (botocore, aiohttp, gcsfs, Arrow)
        raise BadInput(f"{where}: {rule}, but got {one_line(error)!r}; {remedy}") from None


def locate(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it. Raises BadInput for an unknown or missing protocol."""
    with reached(url, "must be a path or an fsspec URL", "check the protocol"):
        file_system, path = fsspec.core.url_to_fs(url)
        return file_system, path
    raise AssertionError("unreachable")


def join(url: str, name: str) -> str:
    """`url/name` with one slash between."""
    return f"{url.rstrip('/')}/{name}"
