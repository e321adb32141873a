"""Look the installed packages up in a database of known vulnerabilities, with pip-audit.

Ends with 1 when a package has a known vulnerability or pip-audit itself fails. Where no database can be reached nothing is
found out; that is said, and ends with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

UNREACHED = "audit: no database of vulnerabilities could be reached, {} packages were NOT audited"


def verdict(packages: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code and what to say of pip-audit's list of packages; ours, which are installed from here, are left out."""
    packages = [package for package in packages if "editable" not in package.get("skip_reason", "")]
    skipped = [package for package in packages if "skip_reason" in package]
    bad = [package for package in packages if package.get("vulns")]
    if len(skipped) == len(packages):
        return 0, [UNREACHED.format(len(packages))]
    said = [
        f"audit: {package['name']} {package['version']}: {found['id']}; mended in {', '.join(found['fix_versions']) or 'no release'}"
        for package in bad
        for found in package["vulns"]
    ]
    if skipped:
        said.append(f"audit: NOT audited: {', '.join(package['name'] for package in skipped)}")
    said.append(f"audit: {len(packages) - len(skipped)} packages looked up, {len(bad)} with known vulnerabilities")
    return int(bool(bad)), said


def main() -> int:
    """Run pip-audit on the environment of this interpreter."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--skip-editable",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        print(UNREACHED.format(len(list(distributions()))))
        return 0
    if not done.stdout.strip():
        if "connect" in done.stderr.lower():
            print(UNREACHED.format(len(list(distributions()))))
            return 0
        print(f"audit: pip-audit failed: {done.stderr.strip()[-500:]}")
        return 1
    code, said = verdict(json.loads(done.stdout)["dependencies"])
    print("\n".join(said))
    return code


if __name__ == "__main__":
    sys.exit(main())
