"""A kind that is registered from outside the package is a kind like all others, in the driver and in workers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lift_ray.errors import RunFailed
from lift_ray.ray_runtime.session import connected

PLUGINS = Path(__file__).parent / "plugins"
ROOT = Path(__file__).parent.parent
SPACE = """
name: gains
dataset: {data}
base:
  backbone: {{model: "{clip}"}}
  optim: {{epochs: 1, lr: 0.01, global_batch_size: 32}}
space:
  tuner.kind: {{choices: [gain, linear_probe]}}
  tuner.start: {{float: [0.9, 1.1], when: {{tuner.kind: gain}}}}
baselines:
  - {{tuner.kind: gain, tuner.start: 1.0}}
  - {{tuner.kind: linear_probe}}
search: {{trials: 3, tte_best: 0, scheduler: {{kind: none}}}}
scale: {{max_concurrent: 1}}
"""


def python(*words: str, plugins: str = "gain_tuner", path: Path = PLUGINS) -> subprocess.CompletedProcess[str]:
    folders = os.pathsep.join([str(path), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"LIFT_RAY_PLUGINS": plugins, "PYTHONPATH": folders}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=250)


@pytest.fixture
def space(tmp_path: Path, small_data: str, small_clip: str) -> Path:
    file = tmp_path / "gains.yaml"
    file.write_text(SPACE.format(data=small_data, clip=small_clip))
    return file


def test_a_space_with_a_plugin_is_checked_without_torch(space: Path) -> None:
    code = (
        "import sys\n"
        "from lift_ray.settings.checks import read_space\n"
        f"space = read_space({str(space)!r})\n"
        "print(space.config(space.baseline_values()[0]).tuner, 'torch' in sys.modules)"
    )
    done = python("-c", code)
    assert done.stdout == "kind='gain' start=1.0 blocks=None False\n", done.stderr
    done = python("-c", code, plugins="")
    assert "unknown setting 'tuner.start'" in done.stderr, "without the plugin it is no kind"


def test_an_entry_point_registers_its_kinds(tmp_path: Path) -> None:
    about = tmp_path / "gain_tuner-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gain-tuner\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[lift_ray.plugins]\ngain = gain_tuner\n")
    code = "from lift_ray.settings.run import RunConfig; print(RunConfig(tuner={'kind': 'gain', 'start': 2.0}).tuner.start)"
    done = python("-c", code, plugins="", path=tmp_path)
    assert done.stdout == "2.0\n", done.stderr


def test_kinds_registered_late_are_accepted_too(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        """
from typing import Literal
from lift_ray.registry import register_head, register_loss, register_sampler
from lift_ray.settings.heads import HeadConfig
from lift_ray.settings.losses import LossConfig
from lift_ray.settings.checks import read_space
from lift_ray.settings.run_file import RunFile
from lift_ray.settings.search import SearchConfig
from lift_ray.settings.space import SpaceFile

class Half(HeadConfig):
    kind: Literal["half"] = "half"

class Zero(LossConfig):
    kind: Literal["zero"] = "zero"

register_head(Half, "late:half")
register_loss(Zero, lambda counts: lambda logits, labels: logits.sum() * 0)
register_sampler("mine", "late:mine")
run = RunFile(dataset="d", head={"kind": "half"}, loss={"kind": "zero"})
space = SpaceFile(name="s", dataset="d", space={"seed": {"int": [0, 9]}}, search={"sampler": "mine"})
print(run.head.kind, run.loss.kind, space.search.sampler)
"""
    )
    done = python("-m", "late", plugins="", path=tmp_path)
    assert done.stdout == "half zero mine\n", done.stderr


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("no_such", "must be importable, but got ModuleNotFoundError: No module named 'no_such'"),
        ("again", "tuner lora: must be registered once, but got two of that name; rename one"),
    ],
)
def test_a_plugin_that_fails_gives_a_one_line_error(plugins: str, message: str, space: Path, tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(
        "from typing import Literal\nfrom lift_ray.registry import TunerConfig, register_tuner\n"
        "class Mine(TunerConfig):\n    kind: Literal['lora'] = 'lora'\n"
        "register_tuner(Mine, 'again:build')\n"
    )
    done = python("-m", "lift_ray.tune", str(space), "--dry-run", plugins=plugins, path=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


def test_workers_of_a_cluster_are_told_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def init(**options: Any) -> None:
        asked.append(dict(options["job_config"].runtime_env.get("env_vars", {})))
        raise ConnectionError("no cluster in this test")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for plugins in ("gain_tuner", ""):
        monkeypatch.setenv("LIFT_RAY_PLUGINS", plugins)
        with pytest.raises(RunFailed, match="no cluster in this test"), connected("10.0.0.1:6379"):
            pass
    assert asked == [{"LIFT_RAY_PLUGINS": "gain_tuner"}, {}]


@pytest.mark.parametrize("name", ["tuner", "loss"])
def test_the_pages_about_extending_show_the_plugins_that_are_tested(name: str) -> None:
    (plugin,) = PLUGINS.glob(f"*_{name}.py")
    page = (ROOT / "docs" / "how-to" / f"own-{name}.md").read_text()
    assert plugin.read_text().rstrip() in page
    (command,) = re.findall(r"^    python (-m lift_ray\.\w+ .* --dry-run)$", page, re.MULTILINE)
    done = python(*shlex.split(command), plugins=plugin.stem)
    assert done.returncode == 0, done.stderr
    assert plugin.stem.partition("_")[0] in done.stdout
    assert python(*shlex.split(command), plugins="").returncode == 2, "without the plugin it is no kind"


def test_a_loss_from_outside_computes_what_it_says() -> None:
    code = """
import torch
from lift_ray.registry import LOSSES
from lift_ray.settings.run import RunConfig
options = RunConfig(loss={"kind": "smooth", "epsilon": 0.3}).loss.model_dump(exclude={"kind"})
logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
log_p = logits.log_softmax(1)
wanted = -(0.7 * log_p[0, 0] + 0.3 * log_p.mean())
print(torch.allclose(LOSSES.build("smooth", torch.ones(3), **options)(logits, labels), wanted))
"""
    done = python("-c", code, plugins="smooth_loss")
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_a_plugin_keeps_the_contract_of_tuners() -> None:
    words = ["-o", "addopts=", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_tuners.py"), "-k", "gain"]
    done = python("-m", "pytest", *words)
    assert done.returncode == 0, done.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 15, "tests of the plugin's tuner"


@pytest.mark.slow
def test_a_search_over_a_plugin_trains_it_in_workers(space: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python("-m", "lift_ray.tune", str(space), "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((out / "study.json").read_text())
    assert {"baseline 1", "baseline 2"} <= {one["label"] for one in about["compared"]}
    rows = (out / "trials.csv").read_text().splitlines()
    assert sum(",finished," in row or '"finished"' in row for row in rows[1:]) == 3, rows
    assert any("gain" in row for row in rows)
