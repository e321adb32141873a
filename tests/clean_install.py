"""The wheel in a clean environment outside the repository, and a user's first verbs there. `make clean-install` runs this file.

It needs pip's packages, minutes and 6 GB of disk, so neither `make test` nor `make slow` has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from built_wheel import built_wheel
from embedded import jpegs
from quickstart import size_of

from lift_ray import __version__

pytestmark = pytest.mark.timeout(1800)
TOOLS_OF_TESTS = {"pytest", "hypothesis", "mypy", "ruff", "moto", "playwright"}

Verb = Callable[..., str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    wheel, began = built_wheel(folder), time.monotonic()
    pip = [str(folder / "env/bin/python"), "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(pip, cwd=folder, env=without_pythonpath(), check=True)
    seconds, size = time.monotonic() - began, size_of(folder / "env")
    print(f"\nwheel {wheel.stat().st_size / 1e6:.1f} MB; installation {seconds:.0f} s", end=", ")
    print(f"{size['packages']} packages, {size['gb']} GB")
    return folder / "env"


@pytest.fixture
def lift_ray(environment: Path, tmp_path: Path) -> Verb:
    """Call `lift-ray` in an empty folder, and return what it prints."""

    def call(*words: str, **variables: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / "lift-ray"), *words],
            cwd=tmp_path,
            env=without_pythonpath() | variables,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        return done.stdout.decode(variables.get("PYTHONIOENCODING", "utf-8"))

    return call


def without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_it_is_the_package_without_the_tools_of_the_tests(environment: Path, lift_ray: Verb) -> None:
    assert lift_ray("--version").split()[-1] == __version__
    words = [str(environment / "bin/python"), "-c", "import lift_ray; print(lift_ray.__file__)"]
    place = subprocess.run(words, env=without_pythonpath(), cwd="/", capture_output=True, text=True, check=True).stdout
    assert place.startswith(str(environment))
    listed = subprocess.run(
        [str(environment / "bin/python"), "-m", "pip", "list", "--format", "json"], capture_output=True, check=True
    )
    assert not TOOLS_OF_TESTS & {package["name"] for package in json.loads(listed.stdout)}


def test_the_quickstart_runs_to_its_report(lift_ray: Verb, tmp_path: Path) -> None:
    began = time.monotonic()
    said = lift_ray("tune", "quickstart", "--out", "found", COLUMNS="100")
    print(f"\nquickstart {time.monotonic() - began:.0f} s")
    print(said[-2500:])
    study = json.loads((tmp_path / "found/study.json").read_text())
    assert study["best"]["values"]
    assert (tmp_path / "found/report/index.html").stat().st_size > 100_000
    assert (tmp_path / "found/best.yaml").exists()
    image = tmp_path / "a.jpg"
    image.write_bytes(jpegs(1)[0])
    lift_ray("predict", "found", str(image), "--out", "found.csv")
    rows = (tmp_path / "found.csv").read_text().splitlines()
    assert len(rows) == 2
    assert "a.jpg" in rows[1]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_folder_of_images_gets_a_space_file_that_is_valid(lift_ray: Verb, tmp_path: Path, encoding: str) -> None:
    images = iter(jpegs(120, "train", step=7))
    for name, number in (("ewer", 60), ("crab", 30), ("café", 18), ("lotus", 12)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for place in range(number):
            (tmp_path / "photos" / name / f"{place}.jpg").write_bytes(next(images))
    said = lift_ray("init", "photos", PYTHONIOENCODING=encoding)
    print("\n" + said)
    convert, dry_run, search = (line.split()[1:] for line in said.splitlines() if line.startswith("  lift-ray "))
    assert search == ["tune", "photos.yaml"]
    lift_ray(*convert, PYTHONIOENCODING=encoding)
    assert lift_ray(*dry_run, PYTHONIOENCODING=encoding).endswith("checked: no errors found\n")
