"""The wheel: what is in it, and the verbs in another folder with nothing but its package and the installed dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from built_wheel import built_wheel

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository."""
    return built_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip would unzip it to."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, where: Path, words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the console script of the wheel in another folder."""
    (info,) = unpacked.glob("*.dist-info")
    module, _, function = (info / "entry_points.txt").read_text().split("lift-ray = ")[1].strip().partition(":")
    code = f"import {module} as cli; assert cli.__file__.startswith({str(unpacked)!r}), cli.__file__; cli.{function}()"
    env = {**os.environ, **variables, "PYTHONPATH": str(unpacked)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=where, env=env, capture_output=True, text=True, check=False
    )


def test_it_has_the_files_that_the_repository_has_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    for folder in ("search_spaces", "clusters"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert len(files) > 8
        for path in files:
            assert held[f"lift_ray/assets/{path.relative_to(ROOT).as_posix()}"] == path.read_bytes()
    assert "lift_ray/assets/search_spaces/schema.json" in held
    assert held["lift_ray/py.typed"] == b""
    assert not [name for name in held if not name.startswith(("lift_ray/", "lift_ray-"))]
    assert not [name for name in held if "__pycache__" in name or name.startswith("lift_ray/tests")]
    assert wheel.stat().st_size < 55e6


def test_a_shipped_space_is_found_from_another_folder(unpacked: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lift_ray", "tune", "quickstart", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart: plan" in done.stdout
    assert done.stdout.endswith("checked: no errors found\n")


def test_the_script_runs_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    done = run(unpacked, tmp_path, ["train", "recipes/cifar100_lt/lift_plus", "--dry-run"], LIFT_DATA="nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{tmp_path}/nothing: must be a folder of Parquet shards")
    done = run(unpacked, tmp_path, ["cluster", "check", "aws"])
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "checked: no errors found")
    done = run(unpacked, tmp_path, ["init", "embedded:caltech101-lt"])
    assert (done.returncode, done.stderr) == (0, "")
    schema = (tmp_path / "caltech101-lt.yaml").read_text().splitlines()[0].rpartition("=")[2]
    assert (tmp_path / schema).resolve() == unpacked / "lift_ray/assets/search_spaces/schema.json"
    done = run(unpacked, tmp_path, ["tune", "caltech101-lt.yaml", "--dry-run"])
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "checked: no errors found")
