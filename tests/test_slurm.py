"""clusters/slurm.sh on a real Slurm: two nodes with a daemon each, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Lab, machines, what_is_missing
from processes import wait_for

ROOT = Path(__file__).parents[1]
CONF = """\
ClusterName=test
SlurmctldHost={host}(10.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
NodeName=node1 NodeHostname={host} NodeAddr=10.0.0.1 CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=10.0.0.2 CPUs=2
PartitionName=main Nodes=node1,node2 Default=YES State=UP
"""
SPACE = """\
name: study
dataset: ${{LIFT_DATA}}
base:
  backbone: {{model: '{clip}'}}
  optim: {{epochs: 2, global_batch_size: 16}}
space:
  loss.tau: {{float: [0.0, 2.0]}}
search: {{trials: 2, sampler: random, scheduler: {{kind: none}}, tte_best: 0}}
scale: {{use_gpu: false, cpus_per_worker: 2}}
"""
pytestmark = pytest.mark.cluster


def on(lab: Lab, number: int, command: str, seconds: float = 240) -> str:
    """Return the output of a command on a machine, which must succeed."""
    known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    done = lab.run("ssh", "-i", str(lab.key), *known, f"ray@10.0.0.{number}", command, seconds=seconds)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Lab]:
    """Yield a laptop and two machines, node1 and node2 of a Slurm cluster."""
    missing = what_is_missing()
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None or shutil.which("sbatch") is None:
        missing = missing or "needs Slurm: apt-get install slurmctld slurmd slurm-client"
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=tmp_path))
    (tmp_path / "state").mkdir()
    with machines(tmp_path, 2) as lab:
        daemons = {1: ["slurmctld -D", "slurmd -D -N node1"], 2: ["slurmd -D -N node2"]}
        for number, commands in daemons.items():
            for command in commands:
                log = tmp_path / f"{command.split()[0]}{number}.log"
                on(lab, number, f"setsid {command} -f {conf} > {log} 2>&1 < /dev/null &")
        idle = f"SLURM_CONF={conf} sinfo --noheader --states=idle --format=%D"
        wait_for("two nodes", lambda: on(lab, 1, idle).strip() == "2", 60)
        yield lab


@pytest.mark.timeout(600)
def test_a_job_of_two_nodes_searches_on_both(slurm: Lab, small_data: str, small_clip: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE.format(clip=small_clip))
    script = (ROOT / "clusters" / "slurm.sh").read_text()
    for before, after in {"#SBATCH --gpus-per-node=4\n": "", "--cpus-per-task=48": "--cpus-per-task=2"}.items():
        assert script.count(before) == 1
        script = script.replace(before, after)
    (tmp_path / "slurm.sh").write_text(script)
    settings = {
        "SLURM_CONF": tmp_path / "slurm.conf",
        "LIFT_RAY": "x.whl",
        "LIFT_DATA": small_data,
        "LIFT_RESULTS": tmp_path / "out",
    }
    exported = " ".join(f"{name}={value}" for name, value in settings.items())
    words = f"{tmp_path}/space.yaml --out '$LIFT_RESULTS/study' --no-live"
    said = on(
        slurm, 1, f"export {exported}; cd {tmp_path}; sbatch --wait -o job.log slurm.sh {words}; cat job.log", 500
    )
    assert "study: 2 trials, 2 at a time, each 1 x (2 CPU)" in said
    assert "2 trials: 2 finished" in said
    assert len(json.loads((tmp_path / "out" / "study" / "study.json").read_text())["machine"]["nodes"]) == 2
    assert (slurm.home(1) / "pip.txt").read_text().startswith("install -q x.whl ray[default,train,tune]==")
