"""clusters/slurm.sh on a fake Slurm: the commands that it starts, and where."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

CLUSTERS = Path(__file__).parents[1] / "clusters"


def _program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs slurm.sh on a fake cluster and returns the commands started there, in any order."""
    for folder in ("bin", "env/bin"):
        (tmp_path / folder).mkdir(parents=True)
    calls = tmp_path / "calls"
    note = f'echo "$(basename "$0") $*" >> {calls}'
    _program(tmp_path / "bin", "scontrol", "printf 'node7\\nnode8\\nnode9\\n'")
    _program(tmp_path / "bin", "srun", f'{note}; while [ "$1" != bash ]; do shift; done; "$@"')
    _program(
        tmp_path / "env/bin",
        "ray",
        f"""case $1 in
        health-check) grep -qs -e --head {calls} ;;
        get-auth-token) mkdir -p ~/.ray; echo the-token | tee ~/.ray/auth_token ;;
        *) {note} ;; esac""",
    )
    _program(
        tmp_path / "env/bin",
        "python",
        f"""if [ "$1" = -c ]; then echo 10.1.2.7; exit; fi
        {note}; echo "$RAY_ADDRESS $RAY_AUTH_MODE $LIFT_DATA $SRUN_CPUS_PER_TASK" >> {calls}
        for _ in {{1..900}}; do [ $(grep -c "^ray start" {calls}) = $EXPECTED_STARTS ] && break || sleep 0.1; done; exit 3""",
    )
    _program(tmp_path / "env/bin", "pip", note)

    def run(*words: str, **env: str) -> list[str]:
        job = {
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node[7-9]",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_ON_NODE": "48",
            "SLURM_CPUS_PER_TASK": "40",
            "EXPECTED_STARTS": "2",
            "HOME": str(tmp_path),
            "LIFT_ENV": str(tmp_path / "env"),
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        }
        done = subprocess.run(
            ["bash", str(CLUSTERS / "slurm.sh"), *words],
            env=job | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 3, done.stderr  # of the search
        assert "the-token" not in done.stdout + done.stderr
        assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o077 == 0
        return calls.read_text().splitlines()

    return run


def test_slurm_starts_a_head_and_workers_and_searches(slurm: Callable[..., list[str]]) -> None:
    calls = slurm("x.yaml", "--out", "$LIFT_RESULTS/a & b", LIFT_RESULTS="/shared")
    starts = [call for call in calls if call.startswith("ray start")]
    common = "ray start --block --num-cpus=48"
    assert sorted(starts) == [
        f"{common} --address=10.1.2.7:22345",
        f"{common} --head --port=22345 --dashboard-host=127.0.0.1 --temp-dir=/tmp/lift-12345",
    ]
    (head, others) = (
        next(c for c in calls if c.startswith("srun") and word in c) for word in ("--nodelist=", "--exclude=")
    )
    assert head.startswith("srun --nodes=1 --ntasks=1 --overlap --nodelist=node7 ")
    assert others.startswith("srun --nodes=2 --ntasks=2 --overlap --exclude=node7 ")
    assert "python -m lift_ray.tune x.yaml --out /shared/a & b" in calls
    assert "10.1.2.7:22345 token /shared/inat2018 40" in calls


def test_slurm_reinstalls_lift_ray_when_its_version_changed(slurm: Callable[..., list[str]], tmp_path: Path) -> None:
    for what in ("a.whl", "a.whl", "b.whl"):
        calls = slurm("x.yaml", LIFT_RAY=what)
        (tmp_path / "calls").rename(tmp_path / f"calls of {what}")
        installs = [call for call in calls if call.startswith("pip")]
        if what == "b.whl":
            assert installs == [
                f"pip install -q b.whl ray[default,train,tune]=={version('ray')}",
                "pip install -q --force-reinstall --no-deps b.whl",
            ]
    assert not [c for c in (tmp_path / "calls of a.whl").read_text().splitlines() if c.startswith("pip")]


def test_slurm_on_one_node_starts_no_workers_and_a_requeued_job_resumes(slurm: Callable[..., list[str]]) -> None:
    calls = slurm(
        "x.yaml",
        "--out",
        "/shared/x",
        SLURM_JOB_NUM_NODES="1",
        SLURM_RESTART_COUNT="1",
        LIFT_DATA="s3://b/d",
        EXPECTED_STARTS="1",
    )
    assert sum(call.startswith("srun") for call in calls) == 1
    assert "python -m lift_ray.tune x.yaml --out /shared/x --resume" in calls
    assert "10.1.2.7:22345 token s3://b/d 40" in calls
