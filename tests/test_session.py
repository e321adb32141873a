"""The connection to Ray, before Ray starts."""

from __future__ import annotations

import os
import sys

import pytest
import ray

from lift_ray.errors import BadInput
from lift_ray.ray_runtime.session import check_temporary_folder, connected

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other limits and variables")
ROOM = 107 - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not start, and no variable of this machine counts."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


@pytest.mark.parametrize("others", [[], ["TMPDIR"]])
@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_sockets_is_one_line_that_says_what_to_set(
    variable: str, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "/" + ROOM * "t"
    for name in (*others, variable):
        monkeypatch.setenv(name, folder)
    with pytest.raises(BadInput) as caught, connected():
        pass
    assert str(caught.value) == (
        f"{variable}: must be a shorter path, because paths of Ray's Unix sockets in it are limited to 107 bytes, but {folder} gives "
        "paths of 108 bytes; set RAY_TMPDIR=/tmp, or another short path"
    )


def test_the_limit_is_in_bytes_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + (ROOM - 1) * "t")
    check_temporary_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/" + (ROOM - 2) * "t" + "é")
    with pytest.raises(BadInput, match="gives paths of 108 bytes"):
        check_temporary_folder()


def test_a_short_ray_tmpdir_is_used_instead_of_a_long_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + 200 * "t")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_temporary_folder()


def test_the_folder_does_not_matter_when_a_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []

    class Joined(Exception):
        pass

    def init(*, address: str, **_: object) -> None:
        joined.append(address)
        raise Joined

    monkeypatch.setenv("TMPDIR", "/" + 200 * "t")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Joined), connected("auto"):
        pass
    assert joined == ["auto"]


def test_a_temporary_folder_that_ray_cannot_write_to_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/closed/ray")

    monkeypatch.setenv("RAY_TMPDIR", "/closed")
    monkeypatch.setattr(ray, "init", init)
    message = r"^RAY_TMPDIR: must be a folder that Ray can write to, but .*Permission denied"
    with pytest.raises(BadInput, match=message), connected():
        pass
