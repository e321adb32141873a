"""Every cluster file works without an image of the user's own, and with one after the edit that its comments describe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lift_ray.cluster import main
from lift_ray.clusters.read import read_cluster
from lift_ray.errors import BadInput

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
FILES = (
    "aws.yaml",
    "azure.yaml",
    "gcp.yaml",
    "onprem.yaml",
    "slurm.sh",
    "kuberay/raycluster.yaml",
    "kuberay/rayjob.yaml",
)
COMMENTED = re.compile(
    r"^( *)# (docker:|    (?:image|container_name|run_options): .*|image: .*|command: &install \[\]|in_image=.*)$",
    re.MULTILINE,
)
INSTALLATION = re.compile(r"^ *# >>> installation\n.*?^ *# <<< installation\n", re.MULTILINE | re.DOTALL)
every_file = pytest.mark.parametrize("name", FILES)


def uncommented(text: str) -> str:
    changed, number = COMMENTED.subn(r"\1\2", text)
    assert number >= 1
    return changed


def without_installation(text: str) -> str:
    changed, number = INSTALLATION.subn("", text)
    assert number == 1
    return changed


def test_these_are_all_cluster_files() -> None:
    found = {path.relative_to(CLUSTERS).as_posix() for path in CLUSTERS.rglob("*") if path.is_file()}
    assert set(FILES) == {name for name in found if not name.startswith("monitoring/")}


@every_file
@pytest.mark.parametrize("with_image", [False, True])
def test_the_check_accepts_both_variants(
    name: str, with_image: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CLUSTERS / name).read_text()
    changed = uncommented(without_installation(text)) if with_image else text
    (tmp_path / Path(name).name).write_text(changed)
    main(["check", str(tmp_path / Path(name).name)])
    assert capsys.readouterr().out.endswith("checked: no errors found\n")
    code = re.sub(r"^ *#.*\n", "", changed, flags=re.MULTILINE)
    assert ("registry.example.org" in code) == with_image
    assert bool(re.search(r'pip"? install', code)) != with_image


@every_file
def test_an_image_and_an_installation_together_are_refused(name: str, tmp_path: Path) -> None:
    text = (CLUSTERS / name).read_text()
    if name.startswith("kuberay/"):  # their image line stands in the installation, so only the command is left there
        command = next(line for line in text.splitlines() if "command: &install [" in line and "pip" in line)
        text = uncommented(without_installation(text)).replace("command: &install []", command.strip())
    else:
        text = uncommented(text)
    (tmp_path / Path(name).name).write_text(text)
    with pytest.raises(BadInput) as caught:
        read_cluster(tmp_path / Path(name).name)
    for line in str(caught.value).splitlines():
        assert "must install nothing, because the image contains lift_ray" in line
        assert "registry.example.org/YOUR-ORG/lift_ray:0.1.0-cuda" in line
        assert line.endswith("delete the lines from '>>> installation' to '<<< installation', or remove the image")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kuberay/")])
@pytest.mark.filterwarnings("error")
def test_an_image_uncommented_beside_the_one_of_the_installation_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / Path(name).name).write_text(uncommented((CLUSTERS / name).read_text()))
    with pytest.raises(
        BadInput, match=r"must set one image, but line \d+ sets it too; delete the lines from '>>> installation'"
    ) as caught:
        read_cluster(tmp_path / Path(name).name)
    assert len(str(caught.value).splitlines()) == 1


@every_file
def test_neither_an_image_nor_an_installation_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / Path(name).name).write_text(without_installation((CLUSTERS / name).read_text()))
    with pytest.raises(BadInput) as caught:
        read_cluster(tmp_path / Path(name).name)
    (line,) = str(caught.value).splitlines()
    rule = (
        "must have an image"
        if name.startswith("kuberay/")
        else "must install one exact version of Ray, but no line does"
    )
    assert rule in line
