"""`make audit` fails on a known vulnerability, and says so where it could not look."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

verdict = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "audit.py"))["verdict"]
OURS = {"name": "lift-ray", "skip_reason": "distribution marked as editable"}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.14.1+cpu)"}
SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
BAD = {"name": "pillow", "version": "9.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["9.0.1", "9.1"]}]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([OURS, SOUND], 0, ["audit: 1 packages looked up, 0 with known vulnerabilities"]),
        (
            [OURS, UNKNOWN, SOUND],
            0,
            ["audit: NOT audited: torch", "audit: 1 packages looked up, 0 with known vulnerabilities"],
        ),
        (
            [UNKNOWN, SOUND, BAD],
            1,
            [
                "audit: pillow 9.0: PYSEC-1; mended in 9.0.1, 9.1",
                "audit: NOT audited: torch",
                "audit: 2 packages looked up, 1 with known vulnerabilities",
            ],
        ),
        (
            [OURS, UNKNOWN, UNKNOWN],
            0,
            ["audit: no database of vulnerabilities could be reached, 2 packages were NOT audited"],
        ),
    ],
)
def test_a_vulnerability_fails_the_audit_and_unaudited_packages_are_reported(
    packages: object, code: int, said: list[str]
) -> None:
    assert verdict(packages) == (code, said)
