"""`cluster check` passes the files in clusters/, and says of a broken one what is wrong, where, and what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lift_ray.cluster import main
from lift_ray.distributed.cluster_file import read_cluster
from lift_ray.distributed.cluster_schemas import PROVIDERS
from lift_ray.errors import BadInput

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
FILES = sorted(path.relative_to(CLUSTERS).as_posix() for path in CLUSTERS.rglob("*.yaml"))
SPACE = str(ROOT / "search_spaces" / "inat.yaml")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the check must not reach for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("no_network")
def test_the_files_that_come_with_the_project_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(CLUSTERS / name), "--for", SPACE])
    out = capsys.readouterr().out
    assert out.endswith("checked: the file is in order\n")
    assert "not checked" not in out
    assert "still to change before it can run: line " in out


def test_there_is_a_file_for_each_kind_of_cluster() -> None:
    assert {read_cluster(CLUSTERS / name).provider for name in FILES} == {*PROVIDERS, "kuberay"}


# file, what stands there, what stands there in its place, the line that the check says
BROKEN = [
    ("aws.yaml", "idle_timeout_minutes: 10", "idle_timeout_minuts: 10",
     "idle_timeout_minuts: unknown key 'idle_timeout_minuts'; did you mean 'idle_timeout_minutes'?"),
    ("aws.yaml", "region: us-west-2 ", "regin: us-west-2 ", "provider.regin: unknown key 'regin'; did you mean 'region'?"),
    ("aws.yaml", "InstanceType: m7i.2xlarge", "InstnceType: m7i.2xlarge",
     "available_node_types.head.node_config.InstnceType: unknown key 'InstnceType'; did you mean 'InstanceType'?"),
    ("aws.yaml", "VolumeSize: 200", "VolumeSize: 200GB",
     "available_node_types.head.node_config.BlockDeviceMappings.0.Ebs.VolumeSize: must be a whole number, but got '200GB'; "
     "change it"),
    ("aws.yaml", "MarketType: spot", "MarketType: sport",
     "available_node_types.gpu-spot.node_config.InstanceMarketOptions.MarketType: unknown value 'sport'; did you mean 'spot'?"),
    ("aws.yaml", "head_node_type: head", "head_node_type: haed",
     "head_node_type: must be one of available_node_types, but got 'haed'; did you mean 'head'?"),
    ("aws.yaml", "        min_workers: 0\n        max_workers: 8", "        min_workers: 9\n        max_workers: 8",
     "available_node_types.gpu-spot.min_workers: min_workers <= max_workers must hold, but got 9 and 8; lower it"),
    ("aws.yaml", "            IamInstanceProfile: *worker_profile\n", "",
     "available_node_types.gpu-ondemand.node_config: must reach storage by role, but IamInstanceProfile is missing; add it as "
     "clusters/ does (keys do not belong in this file)"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0",
     "head_start_ray_commands.1: --dashboard-host must be 127.0.0.1 (whoever reaches the dashboard can run code), but got "
     "0.0.0.0; write 127.0.0.1 and use `ray dashboard`"),
    ("aws.yaml", "export RAY_AUTH_MODE=token ", "export ",
     "setup_commands: must keep Ray's token authentication on, but no command exports RAY_AUTH_MODE=token; add it as clusters/ "
     "does"),
    ("aws.yaml", "    ~/.ray/auth_token: ~/.ray/auth_token ", "    ~/notes: ~/notes ",
     "file_mounts: must hand the token to every node, but ~/.ray/auth_token is missing; add "
     "`~/.ray/auth_token: ~/.ray/auth_token`"),
    ("aws.yaml", "tune]==2.60.0' boto3", "tune]==2.59.0' boto3",
     "setup_commands.7: must install one exact Ray within ==2.60.* (lift_ray's pin), but got 'ray[default,train,tune]==2.59.0'; "
     "write 'ray[default,train,tune]==HERE'"),
    ("aws.yaml", "region: us-west-2 ", "region: ${AWS_REGION:-us-west-2} ",
     "provider.region: must be a plain value, but got '${AWS_REGION:-us-west-2}', which neither Ray nor kubectl fills in; write "
     "the value"),
    ("aws.yaml", "export LIFT_DATA=", "export AWS_SECRET_ACCESS_KEY=abc LIFT_DATA=",
     "setup_commands.1: must hold no secret, but got what looks like one; remove it, revoke it, and let machines in by role"),
    ("aws.yaml", "type: aws", "type: aws2", "provider.type: unknown value 'aws2'; did you mean 'aws'?"),
    ("aws.yaml", "upscaling_speed: 2.0", "upscaling_speed: fast",
     "upscaling_speed: must be a number, but got 'fast'; change it"),
    ("gcp.yaml", "scheduling: {onHostMaintenance: TERMINATE}", "scheduling: [{preemptible: true}]",
     "available_node_types.gpu-ondemand.node_config.scheduling: must be a mapping, but got [{'preemptible': True}]; change it"),
    ("gcp.yaml", "machineType: n2-standard-8", "machine_type: n2-standard-8",
     "available_node_types.head.node_config.machine_type: unknown key 'machine_type'; did you mean 'machineType'?"),
    ("azure.yaml", "vmSize: Standard_D8s_v5", "vmSiz: Standard_D8s_v5",
     "available_node_types.head.node_config.azure_arm_parameters.vmSiz: unknown key 'vmSiz'; did you mean 'vmSize'?"),
    ("azure.yaml", "priority: Spot", "priority: Low",
     "available_node_types.gpu-spot.node_config.azure_arm_parameters.priority: unknown value 'Low'; known: Regular, Spot"),
    ("onprem.yaml", "worker_ips: [10.0.0.2, 10.0.0.3]", "worker_ips: [10.0.0.2, 10.0.0.3, 10.0.0.4]",
     "max_workers: must be the 3 of provider.worker_ips (Ray cannot know what a machine holds before it runs), but got 2; "
     "write 3"),
    ("onprem.yaml", "head_ip: 10.0.0.1 ", "head_ip: 10.0.0.2 ",
     "provider.worker_ips: must not hold head_ip, but got 10.0.0.2 in both; remove it here"),
    ("kuberay/raycluster.yaml", "authOptions: {mode: token}", "authOptions: {mode: disabled}",
     "spec.authOptions: Ray's token authentication must be on, but is not; write `authOptions: {mode: token}`"),
    ("kuberay/raycluster.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer",
     "spec.headGroupSpec.serviceType: must be ClusterIP (whoever reaches the dashboard can run code), but got LoadBalancer; "
     "write ClusterIP and use `kubectl port-forward`"),
    ("kuberay/raycluster.yaml", "ray:2.60.0-py311-gpu", "ray:2.58.0-py311-gpu",
     "spec.headGroupSpec.template.spec.containers.0.image: must hold the Ray of rayVersion, 2.60.0, but got "
     "'rayproject/ray:2.58.0-py311-gpu'; change one"),
    ("kuberay/rayjob.yaml", "maxReplicas: 8", "maxReplica: 8",
     "spec.rayClusterSpec.workerGroupSpecs.0.maxReplica: unknown key 'maxReplica'; did you mean 'maxReplicas'?"),
    ("kuberay/rayjob.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false",
     "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes: true, but it is not; add it, or the cluster outlives the job"),
    ("kuberay/rayjob.yaml", '{name: LIFT_DATA, value: "s3://my-bucket/inat2018"}', "{name: HF_API_KEY, value: abc}",
     "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.1: HF_API_KEY must not stand in a file; take it from a "
     "secret (valueFrom: {secretKeyRef: ...}), or let pods in by role"),
    ("kuberay/rayjob.yaml", "kind: RayJob", "kind: Rayjob", "kind: unknown value 'Rayjob'; did you mean 'RayJob'?"),
]  # fmt: skip


# where the fault is not said at the line that was changed, but so many lines from it
AWAY = {"available_node_types.gpu-ondemand.node_config": -3, "head_start_ray_commands.1": -2, "setup_commands": -6,
        "file_mounts": -1, "max_workers": -7, "provider.worker_ips": 1, "spec.ttlSecondsAfterFinished": 1}  # fmt: skip


@pytest.mark.parametrize(("name", "right", "wrong", "said"), BROKEN)
@pytest.mark.usefixtures("no_network")
def test_a_broken_file_is_refused_with_its_line(name: str, right: str, wrong: str, said: str, tmp_path: Path) -> None:
    text = (CLUSTERS / name).read_text()
    assert right in text
    path = tmp_path / "broken.yaml"
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(BadInput) as error:
        main(["check", str(path)])
    line = text[: text.index(right)].count("\n") + 1 + AWAY.get(said.split(": ")[0], 0)
    assert f"{path}:{line} {said.replace('HERE', version('ray'))}" in str(error.value).splitlines()


def test_all_faults_of_a_file_are_said_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    text = (CLUSTERS / "aws.yaml").read_text().replace("upscaling_speed: 2.0", "upscaling_sped: 2.0")
    path.write_text(text.replace("        resources: {CPU: 48, GPU: 4}", "        resources: {CPU: 48, GPU: four}"))
    with pytest.raises(BadInput) as error:
        main(["check", str(path)])
    assert [line.removeprefix(str(path)) for line in str(error.value).splitlines()] == [
        ":20 upscaling_sped: unknown key 'upscaling_sped'; did you mean 'upscaling_speed'?",
        ":53 available_node_types.gpu-spot.resources.GPU: must be a whole number, but got 'four'; change it",
        ":66 available_node_types.gpu-ondemand.resources.GPU: must be a whole number, but got 'four'; change it",
    ]


def test_a_broken_file_ends_the_command_with_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("cluster_name: x\nprovider: {type: aws}\n")
    command = [sys.executable, "-m", "lift_ray.cluster", "check", "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "x.yaml:2 provider: must have 'region', but it is missing; add it" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    key = "AKIA" + "B" * 16
    text = (CLUSTERS / "aws.yaml").read_text()
    for wrong in (
        text.replace("LIFT_DATA=", f"X={key} LIFT_DATA="),
        text.replace("upscaling_speed: 2.0", f"upscaling_speed: {key}"),
    ):
        path.write_text(wrong)
        with pytest.raises(BadInput, match="secret") as error:
            read_cluster(path)
        assert key not in str(error.value)


@pytest.mark.parametrize("provider", sorted(PROVIDERS))
def test_every_key_of_provider_that_ray_reads_is_known(provider: str) -> None:
    """But for those that Ray itself puts there."""
    import ray.autoscaler

    own = {"_config_cache_path", "_has_tpus", "list_of_node_ips", "coordinator_address", "msi", "nsg", "subnet"}
    folder = Path(ray.autoscaler.__file__).parent / "_private" / {"azure": "_azure"}.get(provider, provider)
    read = set()
    for path in folder.glob("*.py"):
        read |= set(re.findall(r"(?:provider_config|\[\"provider\"\])(?:\[|\.get\(\s*)\"(\w+)\"", path.read_text()))
    assert read - own <= PROVIDERS[provider]["properties"].keys()


def test_hours_and_price_follow_from_the_search_and_the_given_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures = ["plan.images_per_s=1000", "plan.training_images=360000", "base.optim.epochs=10"]
    main(["check", str(CLUSTERS / "aws.yaml"), "search.trials=8", "search.scheduler.kind=none", *figures,
          "--for", SPACE, "--price", "head=1", "--price", "gpu-spot=2"])  # fmt: skip
    out = capsys.readouterr().out
    assert "GPUs: 0 when nothing runs, at most 32, in at most 8 workers" in out
    # 8 trials of 10 epochs of 100 s x 3.6 at once on 2 machines of 4 GPUs: 1 h, for the head and the two machines
    assert re.search(r"^gpu-spot +2 +8 +1\.0 +5\.0 *$", out, re.MULTILINE)
    assert re.search(r"^gpu-ondemand +2 +8 +1\.0 +- *$", out, re.MULTILINE)
    assert "price: not known without --price gpu-ondemand=..." in out


def test_a_trial_of_four_workers_takes_a_machine_of_four_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(CLUSTERS / "aws.yaml"), "scale.workers_per_trial=4", "--for", SPACE])
    assert re.search(r"^gpu-spot +8 +8 ", capsys.readouterr().out, re.MULTILINE)


def test_trials_that_fit_no_node_are_refused() -> None:
    with pytest.raises(BadInput) as error:
        main(["check", str(CLUSTERS / "azure.yaml"), "scale.cpus_per_worker=25", "--for", SPACE])
    assert str(error.value) == (
        f"{SPACE} scale: a trial must fit {CLUSTERS / 'azure.yaml'}, but got 1 x (25 CPU + 1 GPU) for at most 8 x 24 CPU + 1 GPU, "
        "2 x 24 CPU + 1 GPU; lower scale.workers_per_trial or scale.cpus_per_worker, or take larger machines"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--price", "gpu-spt=2"], "--price: unknown node type 'gpu-spt'; did you mean 'gpu-spot'?"),
        (["--price", "head=cheap"],
         "--price: must be NODE_TYPE=PRICE, a number of at least 0, but got 'head=cheap'; write head=1.9"),
        (["plan.images_per_s=2"],
         "command line: settings need a search space, but got 'plan.images_per_s=2' without --for; add --for SPACE"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(BadInput) as error:
        main(["check", str(CLUSTERS / "aws.yaml"), *words])
    assert str(error.value) == said


@pytest.mark.parametrize("name", [*FILES, "slurm.sh"])
def test_every_file_installs_the_ray_of_the_projects_pin(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (found for found in map(Requirement, project["dependencies"]) if found.name == "ray")
    asked = re.findall(r"'ray\[default,train,tune\]==([\d.]+)'", (CLUSTERS / name).read_text())
    assert asked
    assert set(asked) == {version("ray")}
    assert all(pin.specifier.contains(found) for found in asked)


def _program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs slurm.sh on a pretended cluster; returns what was started there, in any order."""
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
        f"""{note}; echo "$RAY_ADDRESS $RAY_AUTH_MODE $LIFT_DATA" >> {calls}
        for _ in {{1..100}}; do [ $(grep -c "^ray start" {calls}) = $EXPECTED_STARTS ] && break || sleep 0.1; done; exit 3""",
    )
    _program(tmp_path / "env/bin", "pip", note)

    def run(*words: str, **env: str) -> list[str]:
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "48",
               "EXPECTED_STARTS": "2",
               "HOME": str(tmp_path), "LIFT_ENV": str(tmp_path / "env"), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}  # fmt: skip
        done = subprocess.run(["bash", str(CLUSTERS / "slurm.sh"), *words], env=job | env, capture_output=True, text=True,
                              timeout=30, check=False)  # fmt: skip
        assert done.returncode == 3, done.stderr  # of the search
        assert "the-token" not in done.stdout + done.stderr
        assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o077 == 0
        return calls.read_text().splitlines()

    return run


def test_slurm_starts_a_head_and_workers_and_searches(slurm: Callable[..., list[str]]) -> None:
    calls = slurm("x.yaml", "--out", "/shared/x")
    starts = [call for call in calls if call.startswith("ray start")]
    common = "ray start --block --num-cpus=48"
    assert sorted(starts) == [
        f"{common} --address=node7:22345",
        f"{common} --head --port=22345 --dashboard-host=127.0.0.1 --temp-dir=/tmp/lift-12345",
    ]
    (head, others) = (
        next(c for c in calls if c.startswith("srun") and word in c) for word in ("--nodelist=", "--exclude=")
    )
    assert head.startswith("srun --nodes=1 --ntasks=1 --overlap --nodelist=node7 ")
    assert others.startswith("srun --nodes=2 --ntasks=2 --overlap --exclude=node7 ")
    assert "python -m lift_ray.tune x.yaml --out /shared/x" in calls
    assert "node7:22345 token /shared/inat2018" in calls


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
    assert "node7:22345 token s3://b/d" in calls
