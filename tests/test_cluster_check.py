"""`cluster check` accepts the files in clusters/, and reports each fault of a broken one with its line and remedy."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lift_ray.cluster import main
from lift_ray.clusters.read import read_cluster
from lift_ray.clusters.schemas import PROVIDERS
from lift_ray.errors import BadInput

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
EVERY_FILE = sorted(path.relative_to(CLUSTERS).as_posix() for path in CLUSTERS.rglob("*") if path.is_file())
FILES = [name for name in EVERY_FILE if not name.startswith("monitoring/")]
SPACE = str(ROOT / "search_spaces" / "inat.yaml")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the check must not reach for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.usefixtures("no_network")
def test_every_file_in_clusters_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(CLUSTERS / name), *(["--for", SPACE] if name in FILES else [])])
    out = capsys.readouterr().out
    assert out.endswith("checked: no errors found\n")
    assert "not checked" not in out
    assert ("placeholders to fill in before it can run: line " in out) == (name in FILES)


def test_there_is_a_file_for_each_kind_of_cluster() -> None:
    assert {read_cluster(CLUSTERS / name).provider for name in FILES} == {*PROVIDERS, "kuberay", "slurm"}


def test_the_search_is_planned_for_the_machines_that_slurm_allocates(tmp_path: Path) -> None:
    text = (CLUSTERS / "slurm.sh").read_text().replace("--nodes=2", "--nodes 3").replace("node=4", "node=a100:8")
    (tmp_path / "x.sh").write_text(text)
    (node,) = read_cluster(tmp_path / "x.sh").workers
    assert (node.least, node.most, node.resources) == (3, 3, {"CPU": 48, "GPU": 8})


OTHER_RAY = "must install the Ray of this machine, HERE, but got '{}'; write 'ray[default,train,tune]==HERE'"
# file, what stands there, what stands there in its place, what the check says: of that line, or of so many lines from it
BROKEN = [
    (
        "aws.yaml",
        "idle_timeout_minutes: 10",
        "idle_timeout_minuts: 10",
        "idle_timeout_minuts: unknown key 'idle_timeout_minuts'; did you mean 'idle_timeout_minutes'?",
    ),
    (
        "aws.yaml",
        "region: us-west-2 ",
        "regin: us-west-2 ",
        "provider.regin: unknown key 'regin'; did you mean 'region'?",
    ),
    (
        "aws.yaml",
        "InstanceType: m7i.2xlarge",
        "InstnceType: m7i.2xlarge",
        "available_node_types.head.node_config.InstnceType: unknown key 'InstnceType'; did you mean 'InstanceType'?",
    ),
    (
        "aws.yaml",
        "VolumeSize: 200",
        "VolumeSize: 200GB",
        "available_node_types.head.node_config.BlockDeviceMappings.0.Ebs.VolumeSize: must be a whole number, but got '200GB'; "
        "change it",
    ),
    (
        "aws.yaml",
        "MarketType: spot",
        "MarketType: sport",
        "available_node_types.gpu-spot.node_config.InstanceMarketOptions.MarketType: unknown value 'sport'; did "
        "you mean 'spot'?",
    ),
    (
        "aws.yaml",
        "head_node_type: head",
        "head_node_type: haed",
        "head_node_type: must be one of available_node_types, but got 'haed'; did you mean 'head'?",
    ),
    (
        "aws.yaml",
        "        min_workers: 0\n        max_workers: 8",
        "        min_workers: 9\n        max_workers: 8",
        "available_node_types.gpu-spot.min_workers: min_workers <= max_workers must hold, but got 9 and 8; lower it",
    ),
    (
        "aws.yaml",
        "            IamInstanceProfile: {Name: lift-ray-head}\n",
        "",
        "-9 available_node_types.head.node_config: requires a role for access to storage, but IamInstanceProfile is missing; "
        "add it as clusters/ "
        "does (keys do not belong in this file)",
    ),
    (
        "aws.yaml",
        "            IamInstanceProfile: *worker_profile\n",
        "",
        "-3 available_node_types.gpu-ondemand.node_config: requires a role for access to storage, but IamInstanceProfile is "
        "missing; add it as "
        "clusters/ does (keys do not belong in this file)",
    ),
    (
        "aws.yaml",
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        "-2 head_start_ray_commands.1: --dashboard-host must be 127.0.0.1 (anyone who reaches the dashboard can run code), but got "
        "0.0.0.0; write 127.0.0.1 and connect through SSH, for example with `ray dashboard`",
    ),
    (
        "aws.yaml",
        "export RAY_AUTH_MODE=token ",
        "export ",
        "-6 setup_commands: must keep Ray's token authentication on, but no command exports RAY_AUTH_MODE=token; add it as clusters/ "
        "does",
    ),
    (
        "aws.yaml",
        "    ~/.ray/auth_token: ~/.ray/auth_token ",
        "    ~/notes: ~/notes ",
        "-1 file_mounts: must copy the token to every node, but ~/.ray/auth_token is missing; add "
        "`~/.ray/auth_token: ~/.ray/auth_token`",
    ),
    (
        "aws.yaml",
        "tune]==2.60.0' boto3",
        "tune]==2.59.0' boto3",
        "setup_commands.7: " + OTHER_RAY.format("ray[default,train,tune]==2.59.0"),
    ),
    (
        "aws.yaml",
        "tune]==2.60.0' boto3",
        "tune]==2.60.1' boto3",
        "setup_commands.7: " + OTHER_RAY.format("ray[default,train,tune]==2.60.1"),
    ),
    (
        "aws.yaml",
        "tune]==2.60.0' boto3",
        "tune]==2.60.*' boto3",
        "setup_commands.7: " + OTHER_RAY.format("ray[default,train,tune]==2.60.*"),
    ),
    (
        "aws.yaml",
        "head_setup_commands: []",
        "head_setup_commands: [~/lift/bin/pip install ray==2.59.0]",
        "head_setup_commands.0: " + OTHER_RAY.format("ray==2.59.0"),
    ),
    (
        "gcp.yaml",
        "worker_setup_commands: []",
        "worker_setup_commands: ['~/lift/bin/pip install -U ray boto3']",
        "worker_setup_commands.0: " + OTHER_RAY.format("ray"),
    ),
    (
        "gcp.yaml",
        "        priority: 1 ",
        "        worker_setup_commands: [pip install https://x.org/ray-3.0.0.dev0-cp311.whl]\n        priority: 1 ",
        "available_node_types.gpu-ondemand.worker_setup_commands.0: " + OTHER_RAY.format("ray-3.0.0.dev0-cp311.whl"),
    ),
    (
        "aws.yaml",
        "upscaling_speed: 2.0",
        "docker: {image: 'rayproject/ray:2.59.0-py312-gpu', container_name: ray}",
        "docker.image: must contain Ray HERE, like all nodes, but got 'rayproject/ray:2.59.0-py312-gpu'; change "
        "the tag",
    ),
    (
        "aws.yaml",
        "        priority: 1 ",
        "        docker: {worker_image: 'rayproject/ray-ml:2.58.0'}\n        priority: 1 ",
        "available_node_types.gpu-ondemand.docker.worker_image: must contain Ray HERE, like all nodes, but got "
        "'rayproject/ray-ml:2.58.0'; change the tag",
    ),
    (
        "gcp.yaml",
        "ulimit -n 65536; ray start --head",
        "ulimit -n 65536; RAY_AUTH_MODE=disabled ray start --head",
        "-1 head_start_ray_commands.1: must keep Ray's token authentication on, but got 'RAY_AUTH_MODE=disabled'; "
        "remove it",
    ),
    (
        "gcp.yaml",
        "ulimit -n 65536; ray start --address",
        "RAY_AUTH_MODE=disabled ray start --address",
        "worker_start_ray_commands.1: must keep Ray's token authentication on, but got 'RAY_AUTH_MODE=disabled'; "
        "remove it",
    ),
    (
        "onprem.yaml",
        "    - grep -q lift_env",
        "    - export RAY_AUTH_MODE='disabled'\n    - grep -q lift_env",
        "setup_commands.4: must keep Ray's token authentication on, but got 'RAY_AUTH_MODE='disabled'; remove it",
    ),
    (
        "onprem.yaml",
        "head_setup_commands: []",
        "head_setup_commands: [\"echo 'unset RAY_AUTH_MODE' >> ~/.bashrc\"]",
        "head_setup_commands.0: must keep Ray's token authentication on, but got 'unset RAY_AUTH_MODE'; remove it",
    ),
    (
        "aws.yaml",
        "    cache_stopped_nodes: false ",
        "    security_group: {IpPermissions: [{FromPort: 8265, ToPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n"
        "    cache_stopped_nodes: false ",
        "provider.security_group.IpPermissions.0: only port 22 may be open to everyone, but got 8265 to 8265 for 0.0.0.0/0; remove it "
        "and use `ray dashboard`",
    ),
    (
        "aws.yaml",
        "    - ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076\n",
        "",
        "-2 worker_start_ray_commands: must start Ray and join the head, but no command does; add `ray start "
        "--address=$RAY_HEAD_IP:6379` as clusters/ does",
    ),
    (
        "onprem.yaml",
        "worker_start_ray_commands:\n    - ray stop\n    - ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379 "
        "--object-manager-port=8076\n",
        "worker_start_ray_commands: []\n",
        "worker_start_ray_commands: must start Ray and join the head, but no command does; add `ray start "
        "--address=$RAY_HEAD_IP:6379` as clusters/ does",
    ),
    (
        "onprem.yaml",
        "RAY_enable_autoscaler_v2=0 ray start",
        "ray start",
        "-1 head_start_ray_commands.1: ray start requires RAY_enable_autoscaler_v2=0 (autoscaler v2 never starts the machines "
        "of worker_ips), "
        "but it is missing; add it before `ray start`",
    ),
    (
        "azure.yaml",
        "    subscription_id: 00000000-0000-0000-0000-000000000000 ",
        "    tags: {} ",
        "-2 provider: missing key 'subscription_id'; add it",
    ),
    (
        "aws.yaml",
        "region: us-west-2 ",
        "region: ${AWS_REGION:-us-west-2} ",
        "provider.region: must be a plain value, but got '${AWS_REGION:-us-west-2}', which neither Ray nor kubectl expands; write "
        "the value",
    ),
    (
        "aws.yaml",
        "export LIFT_DATA=",
        "export AWS_SECRET_ACCESS_KEY=abc LIFT_DATA=",
        "setup_commands.1: must not contain a secret, but got what looks like one; remove it, revoke it and use a "
        "role instead",
    ),
    ("aws.yaml", "type: aws", "type: aws2", "provider.type: unknown value 'aws2'; did you mean 'aws'?"),
    (
        "aws.yaml",
        "upscaling_speed: 2.0",
        "upscaling_speed: fast",
        "upscaling_speed: must be a number, but got 'fast'; change it",
    ),
    (
        "gcp.yaml",
        "scheduling: {onHostMaintenance: TERMINATE}",
        "scheduling: [{preemptible: true}]",
        "available_node_types.gpu-ondemand.node_config.scheduling: must be a mapping, but got [{'preemptible': "
        "True}]; change it",
    ),
    (
        "gcp.yaml",
        "machineType: n2-standard-8",
        "machine_type: n2-standard-8",
        "available_node_types.head.node_config.machine_type: unknown key 'machine_type'; did you mean 'machineType'?",
    ),
    (
        "azure.yaml",
        "vmSize: Standard_D8s_v5",
        "vmSiz: Standard_D8s_v5",
        "available_node_types.head.node_config.azure_arm_parameters.vmSiz: unknown key 'vmSiz'; did you mean 'vmSize'?",
    ),
    (
        "azure.yaml",
        "priority: Spot",
        "priority: Low",
        "available_node_types.gpu-spot.node_config.azure_arm_parameters.priority: unknown value 'Low'; known: "
        "Regular, Spot",
    ),
    (
        "onprem.yaml",
        "worker_ips: [10.0.0.2, 10.0.0.3]",
        "worker_ips: [10.0.0.2, 10.0.0.3, 10.0.0.4]",
        "-7 max_workers: must be 3, the number of provider.worker_ips (Ray cannot know a machine's resources before it runs), "
        "but got 2; "
        "write 3",
    ),
    (
        "onprem.yaml",
        "head_ip: 10.0.0.1 ",
        "head_ip: 10.0.0.2 ",
        "+1 provider.worker_ips: must not contain head_ip, but got 10.0.0.2 in both; remove it here",
    ),
    (
        "kuberay/raycluster.yaml",
        "authOptions: {mode: token}",
        "authOptions: {mode: disabled}",
        "spec.authOptions: Ray's token authentication must be on, but it is not; write `authOptions: {mode: token}`",
    ),
    (
        "kuberay/raycluster.yaml",
        "serviceType: ClusterIP",
        "serviceType: LoadBalancer",
        "spec.headGroupSpec.serviceType: must be ClusterIP (anyone who reaches the dashboard can run code), but got LoadBalancer; "
        "write ClusterIP and use `kubectl port-forward`",
    ),
    (
        "kuberay/raycluster.yaml",
        "ray:2.60.0-py311-gpu",
        "ray:2.58.0-py311-gpu",
        "spec.headGroupSpec.template.spec.containers.0.image: must contain Ray HERE, like all nodes, but got "
        "'rayproject/ray:2.58.0-py311-gpu'; change the tag",
    ),
    (
        "kuberay/raycluster.yaml",
        "    serviceType: ClusterIP ",
        "    headService: {spec: {type: LoadBalancer}} ",
        "spec.headGroupSpec.headService.spec.type: must be ClusterIP (anyone who reaches the dashboard can run code), but got "
        "LoadBalancer; write ClusterIP and use `kubectl port-forward`",
    ),
    (
        "kuberay/raycluster.yaml",
        "        serviceAccountName: lift-ray\n",
        "",
        "-1 spec.headGroupSpec.template.spec: requires a role for access to storage, but serviceAccountName is missing; add it "
        "(keys do not "
        "belong in this file)",
    ),
    (
        "kuberay/raycluster.yaml",
        '{name: RAY_TRAIN_ENABLE_STATE_TRACKING, value: "1"}',
        "{name: RAY_AUTH_MODE, value: disabled}",
        "spec.headGroupSpec.template.spec.containers.0.env.3: must keep Ray's token authentication on, but got "
        "'RAY_AUTH_MODE=disabled'; remove it",
    ),
    (
        "kuberay/rayjob.yaml",
        "bash -c 'python -m",
        "bash -c 'RAY_AUTH_MODE=disabled python -m",
        "spec.entrypoint: must keep Ray's token authentication on, but got 'RAY_AUTH_MODE=disabled'; remove it",
    ),
    (
        "kuberay/rayjob.yaml",
        "maxReplicas: 8",
        "maxReplica: 8",
        "spec.rayClusterSpec.workerGroupSpecs.0.maxReplica: unknown key 'maxReplica'; did you mean 'maxReplicas'?",
    ),
    (
        "kuberay/rayjob.yaml",
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        "+1 spec.ttlSecondsAfterFinished: requires shutdownAfterJobFinishes: true, but it is not set; add it, or the cluster "
        "outlives the job",
    ),
    (
        "kuberay/rayjob.yaml",
        '{name: LIFT_DATA, value: "s3://my-bucket/inat2018"}',
        "{name: HF_API_KEY, value: abc}",
        "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.1: HF_API_KEY does not belong in a file; take it from a "
        "secret (valueFrom: {secretKeyRef: ...}), or give the pods a role",
    ),
    ("kuberay/rayjob.yaml", "kind: RayJob", "kind: Rayjob", "kind: unknown value 'Rayjob'; did you mean 'RayJob'?"),
    (
        "slurm.sh",
        "ray[default,train,tune]==2.60.0",
        "ray[default,train,tune]==2.59.0",
        OTHER_RAY.format("ray[default,train,tune]==2.59.0"),
    ),
    (
        "slurm.sh",
        "#SBATCH --nodes=2",
        "#SBATCH --nodes=two",
        "must have #SBATCH --nodes=NUMBER, but got 'two'; write it as clusters/slurm.sh does",
    ),
    (
        "slurm.sh",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --ntasks-per-node=4",
        "must run one task per node, --ntasks-per-node=1, but got 4; write 1 and increase --cpus-per-task",
    ),
    (
        "slurm.sh",
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        "--dashboard-host must be 127.0.0.1 (anyone who reaches the dashboard can run code), but got 0.0.0.0; write 127.0.0.1 and "
        "connect through SSH, for example with `ray dashboard`",
    ),
    (
        "slurm.sh",
        "export RAY_AUTH_MODE=token",
        "export RAY_AUTH_MODE=disabled",
        "must keep Ray's token authentication on, but got 'RAY_AUTH_MODE=disabled'; remove it",
    ),
    (
        "slurm.sh",
        "for _ in {1..120}; do",
        "for _ in {1..120};",
        '+1 invalid bash: syntax error near unexpected token `RAY_ADDRESS="$address"\'; fix the script',
    ),
    (
        "aws.yaml",
        "    ssh_user: ubuntu",
        "    ssh_user: ubuntu\n    ssh_private_key: ~/.ssh/me.pem",
        "+7 available_node_types.head.node_config: auth.ssh_private_key requires the name of its key pair in AWS, "
        "but KeyName is missing; add it, or remove auth.ssh_private_key (Ray then makes a key)",
    ),
    (
        "azure.yaml",
        "    ssh_user: ubuntu",
        "    ssh_user: ubuntu\n    ssh_private_key: ~/.ssh/me.pem",
        "+1 auth.ssh_private_key: requires auth.ssh_public_key, but it is missing; add it, or remove both",
    ),
    (
        "azure.yaml",
        "    ssh_user: ubuntu",
        "    ssh_user: ubuntu\n    ssh_public_key: ~/.ssh/me.pub",
        "+1 auth.ssh_public_key: requires auth.ssh_private_key, but it is missing; add it, or remove both",
    ),
    (
        "aws.yaml",
        "ray start --address=$RAY_HEAD_IP:6379",
        "ray start --address=$RAY_HEAD_IP:6380",
        "worker_start_ray_commands.1: must join the head at its port, 6379, but got 6380; change one of the two",
    ),
    (
        "onprem.yaml",
        "ray start --address=$RAY_HEAD_IP:6379",
        'ray start --address "$RAY_HEAD_IP:6380"',
        "worker_start_ray_commands.1: must join the head at its port, 6379, but got 6380; change one of the two",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "12", memory: 48Gi}',
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.resources.requests.nvidia.com/gpu: nvidia.com/gpu "
        "must be in limits too (Kubernetes), but got requests 1 and no limit; add it to limits",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "2"}',
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.resources.requests.nvidia.com/gpu: requests and "
        "limits of nvidia.com/gpu must be equal, but got requests 1 and limits 2; change one",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "0.5"}',
        "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.nvidia.com/gpu: must be a whole "
        "number, but got 0.5; change it",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: 11500m, memory: 48Gi, nvidia.com/gpu: "1"}',
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.resources.requests.cpu: requests must not exceed "
        "limits, but got requests 12 and limits 11500m; change one",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "12", memory: 48G, nvidia.com/gpu: "1"}',
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.resources.requests.memory: requests must not "
        "exceed limits, but got requests 48Gi and limits 48G; change one",
    ),
    (
        "kuberay/raycluster.yaml",
        'limits: {cpu: "12", memory: 48Gi, nvidia.com/gpu: "1"}',
        'limits: {cpu: "12", memory: 48Gi, gpu: "1"}',
        "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.gpu: unknown resource 'gpu'; did you "
        "mean 'nvidia.com/gpu'?",
    ),
    (
        "kuberay/raycluster.yaml",
        "    version: v2\n",
        "    version: v2\n    resources: {requests: {cpu: 2}, limits: {cpu: 1}}\n",
        "+1 spec.autoscalerOptions.resources.requests.cpu: requests must not exceed limits, but got requests 2 "
        "and limits 1; change one",
    ),
    (
        "kuberay/raycluster.yaml",
        "volumes: &volumes [{name: shm, emptyDir: {medium: Memory, sizeLimit: 16Gi}}]",
        "volumes: &volumes []",
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.name: no volume 'shm' in this pod; "
        "add {name: shm, emptyDir: {}} to its volumes",
    ),
    (
        "kuberay/raycluster.yaml",
        "volumes: &volumes [{name: shm,",
        "volumes: &volumes [{name: smh,",
        "-1 spec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.name: no volume 'shm' in this pod; "
        "did you mean 'smh'?",
    ),
    (
        "kuberay/raycluster.yaml",
        "volumes: &volumes [{name: shm,",
        "volumes: &volumes [{name: shm}, {name: shm,",
        "spec.workerGroupSpecs.0.template.spec.volumes.1.name: must be unique, but got 'shm' twice; rename one",
    ),
    (
        "kuberay/raycluster.yaml",
        "    version: v2\n",
        "    version: v2\n    volumeMounts: [{name: logs, mountPath: /tmp/ray}]\n",
        "+1 spec.autoscalerOptions.volumeMounts.0: no volume 'logs' in this pod; add {name: logs, emptyDir: {}} "
        "to its volumes",
    ),
    (
        "kuberay/raycluster.yaml",
        "metadata: {name: lift}",
        "metadata: {name: Lift}",
        "metadata.name: must be at most 253 lower-case letters, digits, '-' and '.' (Kubernetes), but got 'Lift'; "
        "write 'lift'",
    ),
    (
        "kuberay/raycluster.yaml",
        "metadata: {name: lift}",
        "metadata: {name: 2lift}",
        "metadata.name: must be at most 53 lower-case letters, digits and '-', and start with a letter (KubeRay), "
        "but got '2lift'; rename it",
    ),
    (
        "kuberay/rayjob.yaml",
        "metadata: {name: lift-inat2018}",
        "metadata: {name: liiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii}",
        "metadata.name: must be at most 47 lower-case letters, digits and '-', and start with a letter (KubeRay), "
        "but got 'liiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii'; rename it",
    ),
    (
        "kuberay/raycluster.yaml",
        "groupName: gpu-spot",
        "groupName: GPU_spot",
        "spec.workerGroupSpecs.0.groupName: must be at most 63 lower-case letters, digits and '-' (Kubernetes), "
        "but got 'GPU_spot'; write 'gpu-spot'",
    ),
    (
        "kuberay/raycluster.yaml",
        "- name: ray-worker",
        "- name: ray_worker",
        "spec.workerGroupSpecs.0.template.spec.containers.0.name: must be at most 63 lower-case letters, digits "
        "and '-' (Kubernetes), but got 'ray_worker'; write 'ray-worker'",
    ),
    (
        "kuberay/raycluster.yaml",
        "nodeSelector: {karpenter.sh/capacity-type: spot}",
        "nodeSelector: {cloud.google.com/gke-spot: true}",
        "spec.workerGroupSpecs.0.template.spec.nodeSelector.cloud.google.com/gke-spot: must be text, but got "
        'True; write "true" in quotes',
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    working_dir: [https",
        "-1 spec.runtimeEnvYAML: invalid YAML 1.2: expected ',' or ']', but got '<stream end>' in line 2; fix the text",
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    - https",
        "-1 spec.runtimeEnvYAML: must be a mapping of settings in line 1, but got a list; fix the text",
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    workingdir: https",
        "-1 spec.runtimeEnvYAML: unknown key 'workingdir'; did you mean 'working_dir'?",
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    env_vars: {LIFT_EPOCHS: 5}\n    working_dir: https",
        "-1 spec.runtimeEnvYAML: rejected by Ray: runtime_env['env_vars'] must be of type Dict[str, str], but the "
        "value 5 is of type <class 'int'>; fix the text",
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    env_vars: {RAY_AUTH_MODE: disabled}\n    working_dir: https",
        "-1 spec.runtimeEnvYAML: must keep Ray's token authentication on, but got 'RAY_AUTH_MODE=disabled'; remove it",
    ),
    (
        "kuberay/rayjob.yaml",
        "    working_dir: https",
        "    env_vars: {HF_API_KEY: abc}\n    working_dir: https",
        "-1 spec.runtimeEnvYAML: HF_API_KEY does not belong in a file; take it from a secret (valueFrom: "
        "{secretKeyRef: ...}), or give the pods a role",
    ),
    (
        "kuberay/rayjob.yaml",
        "entrypoint: bash -c 'python",
        "entrypoint: bash -c python",
        "spec.entrypoint: must be a shell command, but there is no closing quotation; fix its quotes",
    ),
    (
        "monitoring/prometheus.yml",
        "scrape_interval: 10s",
        "scrape_intervall: 10s",
        "global.scrape_intervall: unknown key 'scrape_intervall'; did you mean 'scrape_interval'?",
    ),
    (
        "monitoring/prometheus.yml",
        "[/tmp/ray/prom_metrics",
        "[/tmp/ray/metrics",
        "scrape_configs.0.file_sd_configs.0.files: must contain Ray's list of nodes, but got "
        "['/tmp/ray/metrics_service_discovery.json']; "
        "write /tmp/ray/prom_metrics_service_discovery.json",
    ),
    (
        "monitoring/grafana.json",
        "ray_lift_ray_study_slots{",
        "ray_lift_ray_study_slot{",
        "panels.10.targets.0.expr: unknown metric 'ray_lift_ray_study_slot'; did you mean 'ray_lift_ray_study_slots'?",
    ),
]


@pytest.mark.parametrize(("name", "right", "wrong", "said"), BROKEN)
@pytest.mark.usefixtures("no_network")
def test_a_broken_file_is_refused_with_its_line(name: str, right: str, wrong: str, said: str, tmp_path: Path) -> None:
    text = (CLUSTERS / name).read_text()
    assert right in text
    path = tmp_path / f"broken{Path(name).suffix}"
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(BadInput) as error:
        main(["check", str(path)])
    away, fault = re.fullmatch(r"(?:([+-]\d+) )?(.*)", said.replace("HERE", version("ray"))).groups("0")  # type: ignore[union-attr]
    line = text[: text.index(right)].count("\n") + 1 + int(away)
    assert f"{path}:{line}{':' if name == 'slurm.sh' else ''} {fault}" in str(error.value).splitlines()


SCRIPT = """#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
pip install 'ray[default,train,tune]==HERE'
export RAY_AUTH_MODE=token
ray start --head --port=6400 --dashboard-host=127.0.0.1
srun ray start --address=$head:PORT
"""


@pytest.mark.parametrize(("port", "refused"), [("6400", False), ("6379", True)])
def test_a_script_whose_nodes_ask_another_port_is_refused(port: str, refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.sh"
    path.write_text(SCRIPT.replace("HERE", version("ray")).replace("PORT", port))
    if not refused:
        assert read_cluster(path).most_workers == 2
        return
    with pytest.raises(BadInput) as error:
        read_cluster(path)
    assert str(error.value) == f"{path}:6: must join the head at its port, 6400, but got 6379; change one of the two"


ACCOUNT = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: lift-ray}\n---\n"


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.yaml"


def refusal(path: Path, text: str) -> list[str]:
    """Return the errors of a cluster file with this text, without the path."""
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        main(["check", str(path)])
    return [line.removeprefix(str(path)) for line in str(error.value).splitlines()]


@pytest.mark.usefixtures("no_network")
def test_a_file_of_several_documents_is_checked_and_says_what_is_not(
    cluster_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CLUSTERS / "kuberay" / "raycluster.yaml").read_text()
    cluster_file.write_text(ACCOUNT + text + "---\n")
    main(["check", str(cluster_file)])
    out = capsys.readouterr().out
    assert "not checked: ServiceAccount, line 1 (kubectl apply --dry-run=server)" in out.splitlines()
    assert out.endswith("checked: no errors found\n")


def test_the_lines_of_errors_count_from_the_start_of_the_file_and_not_of_the_document(cluster_file: Path) -> None:
    text = (CLUSTERS / "kuberay" / "raycluster.yaml").read_text()
    (name,) = (i for i, line in enumerate(text.splitlines(), 1) if line == "metadata: {name: lift}")
    both = ACCOUNT.replace("lift-ray", "Lift_Ray") + text.replace("metadata: {name: lift}", "metadata: {name: Lift}")
    rule = "must be at most 253 lower-case letters, digits, '-' and '.' (Kubernetes), but got"
    assert refusal(cluster_file, both) == [
        f":3 metadata.name: {rule} 'Lift_Ray'; write 'lift-ray'",
        f":{name + 4} metadata.name: {rule} 'Lift'; write 'lift'",
    ]


def test_a_secret_in_another_document_is_found(cluster_file: Path) -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {password: abc}\n---\n"  # pragma: allowlist secret
    said = refusal(cluster_file, secret + (CLUSTERS / "kuberay" / "raycluster.yaml").read_text())
    assert said == [
        ":4 stringData.password: must not contain a secret, but got what looks like one; remove it, revoke it and use a role instead"
    ]


def test_two_clusters_in_a_file_are_refused(cluster_file: Path) -> None:
    text = (CLUSTERS / "kuberay" / "raycluster.yaml").read_text()
    kind = text.splitlines().index("kind: RayCluster") + 1
    line = len(text.splitlines()) + 1 + kind
    assert refusal(cluster_file, f"{text}---\n{text}") == [
        f":{line} kind: a file must describe one cluster, but got 2; write a file for each"
    ]


def test_a_second_document_of_a_file_for_ray_up_is_refused(cluster_file: Path) -> None:
    assert refusal(cluster_file, "cluster_name: x\n---\ncluster_name: y\n") == [
        ":3: must be one YAML document, but got 2; remove the others, and their ---"
    ]


@pytest.mark.parametrize(
    ("text", "got"),
    [("", "nothing"), ("# aws\n", "nothing"), ("---\n", "nothing"), ("- head\n", "a list"), ("up", "'up'")],
)
def test_the_advice_for_a_file_without_settings_is_about_cluster_files(text: str, got: str, cluster_file: Path) -> None:
    assert refusal(cluster_file, text) == [
        f":1: must be a mapping of settings, but got {got}; start with `cluster_name: ...` or `apiVersion: ray.io/v1`, "
        "as the files in clusters/ do"
    ]


def test_names_of_roles_and_descriptions_of_other_objects_are_left_alone(cluster_file: Path) -> None:
    role = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: 'lift:reader'}\n---\n"
    crd = "apiVersion: x/v1\nkind: X\nmetadata: {name: a.b}\nspec: {namespace: {type: string}, labels: {severity: 'a b'}}\n---\n"
    cluster_file.write_text(role + crd + (CLUSTERS / "kuberay" / "rayjob.yaml").read_text())
    assert [line.split(",")[0] for line in read_cluster(cluster_file).unchecked] == ["ClusterRole", "X"]


def test_all_errors_in_a_file_are_reported_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
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
    assert "x.yaml:2 provider: missing key 'region'; add it" in done.stderr.splitlines()
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
    """Keys that Ray itself adds are left out."""
    import ray.autoscaler

    own = {"_config_cache_path", "_has_tpus", "list_of_node_ips", "coordinator_address", "msi", "nsg", "subnet"}
    folder = Path(ray.autoscaler.__file__).parent / "_private" / {"azure": "_azure"}.get(provider, provider)
    read = set()
    for path in folder.glob("*.py"):
        read |= set(re.findall(r"(?:provider_config|\[\"provider\"\])(?:\[|\.get\(\s*)\"(\w+)\"", path.read_text()))
    assert read - own <= PROVIDERS[provider]["properties"].keys()


def test_hours_and_price_follow_from_the_search_and_the_given_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures = ["plan.images_per_s=1000", "plan.training_images=360000", "base.optim.epochs=10"]
    main(
        [
            "check",
            str(CLUSTERS / "aws.yaml"),
            "search.trials=8",
            "search.scheduler.kind=none",
            *figures,
            "--for",
            SPACE,
            "--price",
            "head=1",
            "--price",
            "gpu-spot=2",
        ]
    )
    out = capsys.readouterr().out
    assert "GPUs: 0 when nothing runs, at most 32, in at most 8 workers" in out
    # 8 trials of 10 epochs of 100 s x 3.6 at once on 2 machines of 4 GPUs: 1 h, for the head and the two machines
    assert re.search(r"^gpu-spot +2 +8 +1\.0 +5\.0 *$", out, re.MULTILINE)
    assert re.search(r"^gpu-ondemand +2 +8 +1\.0 +- *$", out, re.MULTILINE)
    assert "price: unknown without --price gpu-ondemand=..." in out


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
        (
            ["--price", "head=cheap"],
            "--price: must be NODE_TYPE=PRICE with a price of at least 0, but got 'head=cheap'; write head=1.9",
        ),
        (
            ["plan.images_per_s=2"],
            "command line: settings require a search space, but got 'plan.images_per_s=2' without --for; add --for "
            "SPACE",
        ),
    ],
)
def test_wrong_arguments_give_a_one_line_error(words: list[str], said: str) -> None:
    with pytest.raises(BadInput) as error:
        main(["check", str(CLUSTERS / "aws.yaml"), *words])
    assert str(error.value) == said


@pytest.mark.parametrize("name", FILES)
def test_every_file_installs_the_ray_of_the_projects_pin(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (found for found in map(Requirement, project["dependencies"]) if found.name == "ray")
    asked = re.findall(r"'ray\[default,train,tune\]==([\d.]+)'", (CLUSTERS / name).read_text())
    assert asked
    assert set(asked) == {version("ray")}
    assert all(pin.specifier.contains(found) for found in asked)
