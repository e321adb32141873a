"""Each change to Ray has its effect on the Ray that is installed, and leaves another version alone."""

from __future__ import annotations

import importlib.util
import logging
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants, services
from ray._private.parameter import RayParams
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent
from ray.tune.execution import class_cache

from lift_ray.errors import BadInput
from lift_ray.ray_runtime import patches

INSTANCE_MANAGER = Path(ray.__file__).parent / "autoscaler" / "v2" / "instance_manager"


@pytest.fixture
def fresh_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray as it is before any patch of this process; what a test patches is undone."""
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1")
    original = RayParams.__dict__["__init__"]
    monkeypatch.setattr(RayParams, "__init__", getattr(original, "func", original))  # of a patch before this test
    patches._applies.cache_clear()
    patches.use_free_agent_port.cache_clear()
    yield
    patches._applies.cache_clear()
    patches.use_free_agent_port.cache_clear()


@pytest.fixture
def other_ray(fresh_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")


def runtime_env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Tune puts into the runtime environment of an actor."""
    given: dict[str, dict[str, str]] = {}

    def remote(*, runtime_env: dict[str, dict[str, str]]) -> object:
        given.update(runtime_env)
        return lambda made: made

    monkeypatch.setattr(class_cache.ray, "remote", remote)
    class_cache._ActorClassCache().get(object)
    return given["env_vars"]


def test_the_ray_started_here_has_the_address_of_loopback(fresh_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.7")
    assert services.get_node_ip_address() == "192.0.2.7"
    patches.listen_on_loopback()
    assert services.get_node_ip_address() == "127.0.0.1"
    code = "from ray._private import ray_constants; print(ray_constants.ENABLE_RAY_CLUSTER)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "False\n", "a driver that is started from here does the same"


def test_the_agent_takes_any_free_port(fresh_ray: None) -> None:
    assert RayParams().dashboard_agent_listen_port == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    patches.use_free_agent_port()
    patches.use_free_agent_port()
    assert RayParams(num_cpus=1).dashboard_agent_listen_port == 0


def test_tune_gives_no_aws_key_to_its_actors(fresh_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in patches.SECRETS:
        monkeypatch.setenv(name, "secret")
    assert runtime_env(monkeypatch).keys() >= patches.SECRETS, (
        "Ray has another list; see what it shows of the environment"
    )
    with patches.aws_keys_stay_here():
        assert "secret" not in runtime_env(monkeypatch).values()
    assert runtime_env(monkeypatch).keys() >= patches.SECRETS


def test_another_ray_is_left_alone_with_a_warning(
    other_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            patches.listen_on_loopback()
            patches.use_free_agent_port()
            with patches.aws_keys_stay_here():
                assert "secret" in runtime_env(monkeypatch).values()
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert RayParams().dashboard_agent_listen_port != 0
    assert [record.getMessage() for record in caplog.records] == [
        "Ray 2.61.0 is not 2.56 to 2.60: the Ray started here may listen on every network interface",
        "Ray 2.61.0 is not 2.56 to 2.60: jobs and job logs may be missing if another Ray runs on this machine",
        "Ray 2.61.0 is not 2.56 to 2.60: the dashboard may show the AWS keys of this process",
    ]


def test_a_kind_of_machine_that_the_cloud_refuses_counts_as_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "autoscaler" / "v2" / "instance_manager"
    shutil.copytree(INSTANCE_MANAGER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (before, after) in patches.AUTOSCALER_FIX.items():  # as released, even where this one is patched already
        path = folder / name
        path.write_text(path.read_text().replace(after, before))
    refused = InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_FAILED, instance_type="gpu-spot")
    assert unavailable(folder, refused) == set()
    monkeypatch.setattr(ray, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "argv", ["patches"])
    monkeypatch.delitem(sys.modules, patches.__name__)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(patches.__name__, run_name="__main__")  # as the cluster files do
    assert ended.value.code == 0
    assert unavailable(folder, refused) == {"gpu-spot"}
    reconciler = (folder / "reconciler.py").read_text()
    compile(reconciler, "reconciler.py", "exec")
    failed = reconciler[: reconciler.index('details=f"launch failed')].rpartition("IMInstanceUpdateEvent(")[2]
    assert "instance_type=im_instance.instance_type," in failed
    patches.fix_autoscaler(folder)
    assert (folder / "reconciler.py").read_text() == reconciler
    path = folder / "reconciler.py"
    path.write_text("another Ray\n")
    with pytest.raises(BadInput) as caught:
        patches.fix_autoscaler(folder)
    assert str(caught.value) == (
        f"{path}: must be of Ray 2.56 to 2.60, but is not; skip this step, and check that its autoscaler falls back"
    )
    assert path.read_text() == "another Ray\n"


def unavailable(folder: Path, event: InstanceUpdateEvent) -> set[str]:
    """The kinds that the monitor in this folder counts as unavailable after an event."""
    spec = importlib.util.spec_from_file_location(
        "monitor_of_the_test", folder / "subscribers/cloud_resource_monitor.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monitor = module.CloudResourceMonitor()
    monitor.notify([event])
    return set(monitor.get_recoverable_resource_availabilities())


def test_the_session_and_the_patches_load_no_ray() -> None:
    code = (
        "import sys, lift_ray.ray_runtime.session, lift_ray.ray_runtime.patches; "
        "print('ray' in sys.modules, 'torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "False False\n"
