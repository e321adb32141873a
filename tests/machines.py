"""Machines with sshd, a user `ray` and addresses of their own: namespaces of this one.

Each has its own processes and its own network, so that what Ray does on them (`ray stop` ends every Ray it sees) stays there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from fake_cloud import TOKEN
from processes import wait_for

SSHD = "/usr/sbin/sshd"
BIN = Path(sys.executable).parent
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
ROUTER = """\
set -e
cd {folder}
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
ip link set lo up
ip link add bridge type bridge
ip address add 10.0.0.254/24 dev bridge
ip link set bridge up
mine=$(readlink /proc/self/ns/net)
for number in $(seq {machines}); do
    {namespaces} bash machine.sh $number > machine$number.log 2>&1 &
    while [ "$(readlink /proc/$!/ns/net)" = "$mine" ]; do sleep 0.05; done
    ip link add link$number type veth peer name eth0 netns $!
    ip link set link$number master bridge up
done
wait
"""
MACHINE = """\
set -e
until ip address add 10.0.0.$1/24 dev eth0 2> /dev/null; do sleep 0.05; done
ip link set lo up
ip link set eth0 up
ip route add default via 10.0.0.254
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
mount -t tmpfs none /run
mkdir /run/sshd
(echo "ray:*:0:0::$PWD/machine$1:/bin/bash"; cat /etc/passwd) > passwd$1  # the first of its number is who ssh thinks we are
mount --bind passwd$1 /etc/passwd
exec {sshd} -D -e -f /dev/null -h $PWD/host_key -o StrictModes=no -o UsePAM=no -o PidFile=none -o PasswordAuthentication=no
"""


def what_is_missing() -> str:
    """Why there can be no machines here; "" when there can."""
    tools = [tool for tool in (SSHD, "ssh", "rsync", "ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}: apt-get install openssh-server rsync iproute2 util-linux"
    tried = subprocess.run(
        [*NAMESPACES, "ip", "link", "add", "bridge", "type", "bridge"], capture_output=True, text=True
    )
    return f"needs to make namespaces and a bridge, as root does: {tried.stderr.strip()}" if tried.returncode else ""


class Lab:
    """A network of machines 10.0.0.1, 10.0.0.2, ...; `key` logs in on all of them, `home(number)` is where."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.pid, self.key = folder, pid, folder / "key"

    def home(self, number: int) -> Path:
        """The home of the user `ray` on a machine."""
        return self.folder / f"machine{number}"

    def run(self, *command: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop, which is in the network too, with a home and a token of its own. No output holds the token."""
        done = subprocess.run(
            self._there(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
        )
        assert TOKEN not in done.stdout, command
        return done

    @contextmanager
    def running(self, *command: str) -> Iterator[Path]:
        """The same for a command that stays; where its output goes."""
        log = self.folder / "running.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                self._there(*command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            yield log
        finally:
            process.kill()
            process.wait(20)
        assert TOKEN not in log.read_text(), command

    def _there(self, *command: str) -> list[str]:
        env = {
            "HOME": str(self.folder / "laptop"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TERM": "dumb",
        }
        inside = [
            "nsenter",
            "-t",
            str(self.pid),
            "--net",
            "--mount",
            "env",
            "-i",
            *(f"{k}={v}" for k, v in env.items()),
        ]
        return [*inside, *command]

    def processes(self, name: str) -> list[int]:
        """Of this name, on all machines."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [process.pid] if process.name() == name else []
        return found


@contextmanager
def machines(folder: Path, number: int) -> Iterator[Lab]:
    """A laptop and so many machines, each with lift_ray in ~/lift, where `pip` only notes what it is asked for."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    token = folder / "laptop" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)
    for machine in range(1, number + 1):
        home = folder / f"machine{machine}"
        for name, script in {
            "python": f'exec {sys.executable} "$@"',
            "ray": f'exec {BIN}/ray "$@"',
            "pip": 'echo "$@" >> ~/pip.txt',
        }.items():
            path = home / "lift" / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        (home / ".ssh").mkdir()
        shutil.copy(folder / "key.pub", home / ".ssh" / "authorized_keys")
    (folder / "machine.sh").write_text(MACHINE.format(sshd=SSHD))
    router = ROUTER.format(folder=folder, machines=number, namespaces=" ".join(NAMESPACES))
    with (folder / "router.log").open("w") as log:
        process = subprocess.Popen([*NAMESPACES, "bash", "-c", router], stdout=log, stderr=subprocess.STDOUT)
    lab = Lab(folder, process.pid)
    try:
        wait_for("sshd on every machine", lambda: len(lab.processes("sshd")) == number, 20)
        yield lab
    finally:
        process.kill()  # and with it every process in the namespaces
        process.wait(20)
