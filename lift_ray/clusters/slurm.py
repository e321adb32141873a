"""Reader of batch scripts for Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from lift_ray.clusters.diagnostics import (
    Diagnostics,
    Place,
    installs_nothing,
    loopback_only,
    no_secrets,
    one_exact_ray,
    one_port,
    token_stays_on,
)
from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.errors import BadInput
from lift_ray.settings.yaml_file import SettingsFile

IMAGE = re.compile(r"\bapptainer exec\b.*?(\w+://[^\s)]+|\S+\.sif)")
OPTION = re.compile(r"#SBATCH\s+--([\w-]+)(?:[=\s]\s*(\S+))?")


class _Script(SettingsFile):
    """Lines of a script; a place is the number of a line."""

    def where(self, path: Place) -> str:
        return f"{self.source}:{self.line(path)}"


def read_slurm(path: str | Path) -> Cluster:
    """Check a script's `#SBATCH` options and its commands, and return its cluster.

    Raises BadInput with a line for each fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(path), "must be a readable script", error, "check the path") from None
    lines = {str(i): line for i, line in enumerate(text.splitlines(), 1)}
    faults = Diagnostics(_Script(str(path), dict(lines), {(name,): int(name) for name in lines}))
    commands: dict[Place, str] = {(name,): line for name, line in lines.items() if not line.lstrip().startswith("#")}
    unchecked = _bash_reads(faults, text)
    if image := next((found[1] for found in map(IMAGE.search, commands.values()) if found), None):
        installs_nothing(faults, commands, image)
    else:
        one_exact_ray(faults, commands, ())
    token_stays_on(faults, commands)
    if not any(re.search(r"\bexport\b.*\bRAY_AUTH_MODE=token\b", command) for command in commands.values()):
        faults.add(
            (),
            "must keep Ray's token authentication on",
            but="no line exports RAY_AUTH_MODE=token",
            remedy="add it as clusters/ does",
        )
    loopback_only(faults, commands)
    heads = {place: command for place, command in commands.items() if "--head" in command}
    one_port(faults, heads, {place: command for place, command in commands.items() if "ray start" in command})
    no_secrets(faults)
    node = _node(faults, lines)
    faults.end()
    return Cluster(str(path), "slurm", NodeType("head", "the first node", "", {}, 1, 1), (node,), node.most, unchecked)


def _bash_reads(faults: Diagnostics, text: str) -> tuple[str, ...]:
    if shutil.which("bash") is None:
        return ("the commands (needs bash)",)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    for number, said in re.findall(r"^bash: line (\d+): (.*)", done.stderr, re.MULTILINE)[:1]:
        faults.add((number,), f"invalid bash: {said}", remedy="fix the script")
    return ()


def _node(faults: Diagnostics, lines: dict[str, str]) -> NodeType:
    """Return the nodes that the `#SBATCH` options request: their number, CPUs and GPUs, with one task for Ray on each."""
    given: dict[str, tuple[Place, str]] = {}
    for name, line in lines.items():
        if line.strip() and not line.startswith("#"):
            break  # Slurm reads no option after the first command
        if found := OPTION.match(line):
            given[found[1]] = ((name,), found[2] or "")
    counts: dict[str, int] = {}
    for option, otherwise in (
        ("nodes", None),
        ("cpus-per-task", None),
        ("ntasks-per-node", "1"),
        ("gpus-per-node", "0"),
    ):
        place, value = given.get(option, ((), otherwise))
        number = re.fullmatch(r"(?:[a-zA-Z]\w*:)*(\d+)", value or "")  # a type may precede the number of GPUs: a100:4
        if number is None:
            got = f"got '{value}'" if value is not None else "there is none"
            faults.add(
                place, f"must have #SBATCH --{option}=NUMBER", but=got, remedy="write it as clusters/slurm.sh does"
            )
        counts[option] = int(number[1]) if number else 1
    if counts["ntasks-per-node"] != 1:
        faults.add(
            given["ntasks-per-node"][0],
            "must run one task per node, --ntasks-per-node=1",
            counts["ntasks-per-node"],
            "write 1 and increase --cpus-per-task",
        )
    held = {"CPU": float(counts["cpus-per-task"]), "GPU": float(counts["gpus-per-node"])}
    return NodeType("node", "", "", held, counts["nodes"], counts["nodes"])
