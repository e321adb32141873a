"""Clusters that are really provisioned: with an autoscaler, on machines of one's own, and (up to SSH) on AWS."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from fake_aws import REGION, Account, fake_aws
from fake_cloud import RAY, TOKEN, Head, fake_cloud
from machines import Lab, machines, what_is_missing
from processes import wait_for

ROOT = Path(__file__).parents[1]
CPU_NODE = {"resources": {"CPU": 1}, "max_workers": 2}
GPU_NODE = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 1}
IDLE_S = 4.0
TRIALS, EPOCHS = 4, 60
SPACE = """\
name: study
dataset: {data}
base:
  backbone: {{model: '{clip}'}}
  optim: {{epochs: {epochs}, global_batch_size: 16}}
space:
  loss.tau: {{float: [0.0, 2.0]}}
  optim.lr: {{float: [1.0e-3, 3.0e-1], log: true}}
search: {{trials: {trials}, sampler: random, scheduler: {{kind: none}}, tte_best: 0}}
scale: {{use_gpu: false, max_concurrent: 2}}
"""
WAIT_FOR_NODES = """\
import time
import ray
ray.init("auto")
ends = time.monotonic() + 90
while sum(node["Alive"] for node in ray.nodes()) < 2 and time.monotonic() < ends:
    time.sleep(0.5)
print([node["NodeManagerAddress"] for node in ray.nodes()])
"""
HOW_MANY = """\
from lift_ray.ray_runtime.capacity import num_slots
from lift_ray.ray_runtime.session import connected
from lift_ray.settings.search import ScaleConfig
with connected() as nodes:
    print(*num_slots(ScaleConfig(), nodes), sep=", ")
    num_slots(ScaleConfig(cpus_per_worker=5), nodes)
"""
START_HERE = "from lift_ray.ray_runtime.session import connected\nwith connected(dashboard=False): pass"
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with fake_cloud(tmp_path_factory.mktemp("c"), {"cpu": CPU_NODE, "gpu": GPU_NODE}, IDLE_S) as head:
        yield head


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    """A folder with space.yaml."""
    folder = tmp_path_factory.mktemp("spaces")
    text = SPACE.format(data=small_data, clip=small_clip, trials=TRIALS, epochs=EPOCHS)
    (folder / "space.yaml").write_text(text)
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait(20)


def is_at_epoch(out: Path, number: int, epoch: int) -> Callable[[], bool]:
    """Does a trial have the checkpoint of this epoch, or of a later one?"""
    return lambda: any(int(path.name[-4:]) >= epoch for path in out.glob(f"checkpoints/{number:04d}/epoch-[0-9]*[0-9]"))


def test_slots_are_counted_on_machines_that_are_not_there_yet(cloud: Head) -> None:
    done = subprocess.run([sys.executable, "-c", HOW_MANY], env=cloud.env, capture_output=True, text=True, timeout=90)
    assert not cloud.nodes()
    assert done.stdout == "1 x (1 CPU + 1 GPU), 1\n", done.stderr
    assert "but got 1 x (5 CPU + 1 GPU) for 4 nodes with 6 CPU, 1 GPU in all" in done.stderr


def test_a_study_brings_nodes_up_survives_the_loss_of_one_and_lets_them_go(
    cloud: Head, spaces: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lift_ray.tune", str(spaces / "space.yaml"), "--out", str(out), "--no-dashboard"]
    log = (tmp_path / "log").open("w+")
    started.append(subprocess.Popen(command, env=cloud.env, stdout=log, stderr=subprocess.STDOUT, text=True))
    wait_for("two nodes", lambda: len(cloud.nodes()) == 2, 60)
    wait_for("both slots at work", lambda: is_at_epoch(out, 0, 3)() and is_at_epoch(out, 1, 3)(), 60)
    before = cloud.nodes()
    cloud.kill(max(before))
    wait_for("another node", lambda: cloud.nodes() - before, 60)
    assert started[0].wait(150) == 0, (tmp_path / "log").read_text()
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert [(row["number"], row["state"], row["epochs"]) for row in table] == [
        (number, "finished", EPOCHS) for number in range(TRIALS)
    ]
    wait_for("no node", lambda: not cloud.nodes(), IDLE_S + 30)


def test_the_token_that_ray_makes_on_this_machine_is_for_its_user_alone(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", START_HERE], env=env, check=False, timeout=120)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def submit(head: Head, *words: str) -> list[str]:
    """`ray job submit` of a search, as from a laptop: all it knows of the cluster is the dashboard's port and the token.

    Without --working-dir: these nodes share one folder for such uploads, and each that comes replaces what is in it.
    """
    env = {name: value for name, value in head.env.items() if name != "RAY_ADDRESS"}
    command = [RAY, "job", "submit", "--address", head.dashboard, "--"]
    return ["env", "-i", *(f"{name}={value}" for name, value in env.items()), *command, *words]


def test_a_study_is_submitted_from_outside_stopped_and_submitted_again(
    cloud: Head, spaces: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = cloud.results / "study"
    search = f"{sys.executable} -m lift_ray.tune {spaces}/space.yaml --out $LIFT_RESULTS/study"
    log = tmp_path / "log"
    with log.open("w") as file:
        command = submit(cloud, "bash", "-c", search)
        started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True))
    wait_for("a trial under way", lambda: is_at_epoch(out, 0, 3)() or started[0].poll() is not None, 120)
    found = re.search(r"raysubmit_\w+", log.read_text())
    assert found, log.read_text()
    subprocess.run([RAY, "job", "stop", "--address", cloud.dashboard, found[0]], env=cloud.env, check=True, timeout=60)
    started[0].wait(60)
    assert "study: 4 trials, 2 at a time, each 1 x (1 CPU)" in log.read_text(), "the driver's lines are followed"
    again = subprocess.run(
        submit(cloud, "bash", "-c", f"{search} --resume"), capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{TRIALS} trials: {TRIALS} finished" in again.stdout
    assert TOKEN not in log.read_text() + again.stdout + again.stderr
    assert [row["epochs"] for row in pq.read_table(out / "trials.parquet").to_pylist()] == [EPOCHS] * TRIALS


@pytest.fixture
def mended_ray(tmp_path: Path) -> str:
    """A folder with the installed Ray as `setup_commands` of the files for clouds leave it: links, but for what they change."""
    (command,) = re.findall(
        r"- ~/lift/bin/(python -m lift_ray.ray_runtime.\w+)", (ROOT / "clusters" / "aws.yaml").read_text()
    )
    subprocess.run(["cp", "-rs", str(Path(ray.__file__).parent), str(tmp_path / "ray")], check=True)
    env = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for _ in "12":  # `ray up` again does it again
        subprocess.run(["/bin/sh", "-c", command], env=env, check=True, timeout=60)
    changed = [path.name for path in (tmp_path / "ray").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sorted(changed) == ["cloud_resource_monitor.py", "reconciler.py"]
    return str(tmp_path)


@pytest.mark.timeout(400)
def test_when_spot_cannot_be_had_the_same_machine_comes_on_demand(
    spaces: Path, mended_ray: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")  # short, as sockets are in it
    kinds = {"cpu-ondemand": CPU_NODE | {"priority": 1}, "cpu-spot": CPU_NODE | {"priority": 10}}
    command = [
        sys.executable,
        "-m",
        "lift_ray.tune",
        str(spaces / "space.yaml"),
        "search.trials=1",
        "base.optim.epochs=1",
        "--out",
        str(tmp_path / "out"),
        "--no-dashboard",
    ]
    with fake_cloud(folder, kinds, IDLE_S, "fake_spot.NoSpot", mended_ray) as head:
        done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = (folder / "asked").read_text().split()
    assert asked[0] == "cpu-spot"
    assert "cpu-ondemand" in asked
    (row,) = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert row["state"] == "finished"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A laptop and two machines."""
    if missing := what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with machines(tmp_path, 2) as lab:
        yield lab


def onprem(lab: Lab, data: str, results: Path) -> str:
    """clusters/onprem.yaml with what it says is to be changed, and nothing else."""
    text = (ROOT / "clusters" / "onprem.yaml").read_text()
    for before, after in {
        "cluster_name: lift": f"cluster_name: test-{time.time_ns()}",
        "worker_ips: [10.0.0.2, 10.0.0.3]": "worker_ips: [10.0.0.2]",
        "min_workers: 2": "min_workers: 1",
        "max_workers: 2": "max_workers: 1",
        "~/.ssh/id_ed25519": str(lab.key),
        "LIFT_DATA=/shared/inat2018": f"LIFT_DATA={data}",
        "LIFT_RESULTS=/shared/lift_ray": f"LIFT_RESULTS={results}",
    }.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path = lab.folder / "onprem.yaml"
    path.write_text(text)
    return str(path)


def documented_submit(file: str) -> str:
    """The command for `ray job submit` that stands at the top of a cluster file."""
    (command,) = re.findall(r"ray job submit .*\\\n#.*", (ROOT / "clusters" / file).read_text())
    return str(command).replace("\\\n#", "")


@pytest.mark.timeout(900)
def test_ray_up_on_machines_of_ones_own_studies_there_and_ray_down(
    lab: Lab, small_data: str, small_clip: str, tmp_path: Path
) -> None:
    file, results = onprem(lab, small_data, tmp_path / "results"), tmp_path / "results"
    (tmp_path / "wait.py").write_text(WAIT_FOR_NODES)
    (tmp_path / "search_spaces").mkdir()
    space = SPACE.format(data="${LIFT_DATA}", clip=small_clip, trials=2, epochs=2)
    (tmp_path / "search_spaces" / "inat.yaml").write_text(space.replace("use_gpu", "cpus_per_worker: 2, use_gpu"))
    up = lab.run("ray", "up", "-y", file)
    assert up.returncode == 0, up.stdout
    waited = lab.run("ray", "submit", file, str(tmp_path / "wait.py"))
    assert waited.returncode == 0, waited.stdout
    what = "lift_ray @ git+https://github.com/YOUR-ORG/lift_ray@v0.1.0"
    for machine in (1, 2):
        assert (lab.home(machine) / "pip.txt").read_text().splitlines() == [
            f"install -q {what} ray[default,train,tune]==2.60.0",
            f"install -q --force-reinstall --no-deps {what}",
        ]
        assert (lab.home(machine) / ".ray" / "auth_token").read_text() == TOKEN

    with lab.running("ray", "dashboard", file) as log:
        wait_for("the tunnel", lambda: lab.run("bash", "-c", ": < /dev/tcp/127.0.0.1/8265").returncode == 0, 60)
        submitted = lab.run("bash", "-c", f"cd {tmp_path}; {documented_submit('onprem.yaml')}")
    assert submitted.returncode == 0, submitted.stdout + log.read_text()
    assert "study: 2 trials, 2 at a time, each 1 x (2 CPU)" in submitted.stdout
    found = json.loads((results / "inat2018" / "study.json").read_text())
    assert len(found["machine"]["nodes"]) == 2

    changes = "search.trials=2 base.optim.epochs=1 base.backbone.resolution_px=42"
    words = f"{ROOT}/search_spaces/quickstart.yaml {changes} --out $LIFT_RESULTS/quickstart"
    study = lab.run("ray", "exec", file, f"RAY_ADDRESS=auto python -m lift_ray.tune {words}", seconds=400)
    assert study.returncode == 0, study.stdout
    assert "2 trials: 2 finished" in study.stdout
    assert (results / "quickstart" / "best.yaml").exists()
    down = lab.run("ray", "down", "-y", file)
    assert down.returncode == 0, down.stdout
    wait_for("no Ray on the machines", lambda: not lab.processes("raylet") + lab.processes("gcs_server"), 60)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """An account in which clusters/aws.yaml was brought up, and one worker of each kind asked for."""
    with fake_aws(tmp_path_factory.mktemp("aws"), ROOT / "clusters" / "aws.yaml") as account:
        said = account.ray_up()
        assert TOKEN not in said
        assert said.index("Launched a new head node") < said.index("Waiting for SSH to become available")
        assert said.index("SSH still not available") < said.index("Failed to setup head node")
        account.launch_workers()
        yield account


def test_on_aws_the_head_is_on_demand_and_there_are_spot_workers(aws: Account) -> None:
    assert {kind: (i["InstanceType"], i.get("InstanceLifecycle")) for kind, i in aws.instances().items()} == {
        "head": ("m7i.2xlarge", None),
        "gpu-spot": ("g6.12xlarge", "spot"),
        "gpu-ondemand": ("g6.12xlarge", None),
    }


def test_machines_on_aws_have_the_roles_of_the_file_and_ray_creates_none(aws: Account) -> None:
    profiles = {kind: i["IamInstanceProfile"]["Arn"].split("/")[-1] for kind, i in aws.instances().items()}
    assert profiles == {"head": "lift-ray-head", "gpu-spot": "lift-ray-worker", "gpu-ondemand": "lift-ray-worker"}
    assert aws.client("iam").list_roles()["Roles"] == []


def test_machines_on_aws_carry_the_tags_by_which_ray_finds_and_ends_them(aws: Account) -> None:
    name = json.loads(aws.file.read_text())["cluster_name"]
    for kind, instance in aws.instances().items():
        assert instance["Tags"]["ray-cluster-name"] == name
        assert instance["Tags"]["ray-node-type"] == ("head" if kind == "head" else "worker")


def test_on_aws_only_ssh_comes_in_from_outside(aws: Account) -> None:
    (group,) = {group["GroupId"] for instance in aws.instances().values() for group in instance["SecurityGroups"]}
    rules = aws.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    outside = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    inside = [pair["GroupId"] for rule in rules if rule not in outside for pair in rule["UserIdGroupPairs"]]
    assert inside == [group]


def test_machines_on_aws_are_in_the_zones_of_the_file_with_a_key_made_for_them(aws: Account) -> None:
    assert {i["Placement"]["AvailabilityZone"][:-1] for i in aws.instances().values()} == {REGION}
    assert {i["KeyName"] for i in aws.instances().values()} == {f"ray-autoscaler_{REGION}"}
    assert [path.name for path in (aws.home / ".ssh").iterdir()] == [f"ray-autoscaler_{REGION}.pem"]
