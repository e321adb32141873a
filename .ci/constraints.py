"""Write docker/constraints.txt: the versions with which the tests ran, for pip's --constraint.

A package that is not installed here is not in the file, so pip chooses its version.
"""

from __future__ import annotations

from installed import ON_NODES, ROOT, closure

TARGET = ROOT / "docker" / "constraints.txt"


def text() -> str:
    """The content of the file."""
    found, missing = closure(ON_NODES)
    head = [
        "# Versions with which the tests ran: lift_ray's dependencies and the extras that nodes use, and what these depend on.",
        "# `make constraints` writes this file.",
    ]
    if missing:
        head.append(f"# Not installed there, so without a version here: {', '.join(missing)}.")
    # PyTorch's wheels for a CPU or a CUDA release have a local version (+cpu); a constraint without one allows them all.
    return "\n".join([*head, *(f"{name}=={package.version.split('+')[0]}" for name, package in found.items()), ""])


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"constraints: {TARGET.relative_to(ROOT)}")
