"""The constraints and the bill of materials agree with pyproject.toml and with what is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lift_ray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
installed = pytest.importorskip("installed")
DIRECT: list[Requirement] = installed.direct(installed.ON_NODES)


def pins() -> dict[str, str]:
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def not_pinned() -> set[str]:
    text = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("# Not installed there"))
    return set(line.split(": ")[1].rstrip(".").split(", "))


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: str(requirement.name))
def test_the_constraints_cover_and_satisfy_every_direct_dependency(requirement: Requirement) -> None:
    if requirement.name in not_pinned():
        assert requirement.name in ("gcsfs", "adlfs"), "only the clients of two clouds may lack a version"
        return
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, str(ROOT / ".ci" / "sbom.py"), str(folder)], check=True)
    made: dict[str, Any] = json.loads((folder / f"lift_ray-{lift_ray.__version__}.cdx.json").read_text())
    return made


def test_the_bill_lists_every_installed_dependency_with_version_license_and_purl(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", lift_ray.__version__)
    listed = {part["name"]: part for part in bill["components"]}
    for requirement in DIRECT:
        name = canonicalize_name(requirement.name)
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        assert listed[name]["version"] == here
        assert listed[name]["purl"].startswith(f"pkg:pypi/{name}@")
    assert all(part["licenses"] for part in bill["components"])


def test_the_bill_lists_the_embedded_data_and_model_with_their_licenses(bill: dict[str, Any]) -> None:
    parts = {part["name"]: part for part in bill["components"] if part["type"] != "library"}
    assert parts.keys() == {path.name for path in (ROOT / "lift_ray" / "assets").iterdir() if path.is_dir()}
    assert parts["caltech101"]["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert parts["lift-small"]["licenses"] == [{"expression": "MIT AND Apache-2.0"}]
    assert all(part["externalReferences"] for part in parts.values())
