"""Space, run and cluster files of lift_ray, found by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lift_ray import cluster, train, tune
from lift_ray.errors import BadInput
from lift_ray.settings import shipped
from lift_ray.settings.checks import read_space
from lift_ray.settings.run_file import read_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without any of these files."""
    monkeypatch.chdir(tmp_path)


def test_every_space_and_run_file_has_a_name() -> None:
    files = shipped.shipped_files("search_spaces")
    assert set(files.values()) == set((ROOT / "search_spaces").rglob("*.yaml"))
    assert {"quickstart", "lift_plus", "recipes/cifar100_lt/lift_plus"} < set(files)
    assert set(shipped.shipped_files("clusters")) == {
        *("aws", "azure", "gcp", "onprem", "slurm", "kuberay/raycluster", "kuberay/rayjob"),
        *("monitoring/grafana", "monitoring/prometheus"),
    }


def test_a_name_reads_the_same_as_the_path() -> None:
    assert read_space("quickstart") == read_space(ROOT / "search_spaces/quickstart.yaml")
    for name in ("lift_plus", "recipes/cifar100_lt/lift_plus"):
        assert read_run(name) == read_run(ROOT / f"search_spaces/{name}.yaml")


def test_the_verbs_take_names(capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["quickstart", "search.trials=7", "--dry-run"])
    assert "7 trials, 6 baselines first" in capsys.readouterr().out
    train.main(["lift_plus", "--dry-run"])
    assert capsys.readouterr().out.startswith("name: lift_plus\n")
    cluster.main(["check", "aws", "--for", "quickstart"])
    assert "quickstart: 18 trials" in capsys.readouterr().out
    cluster.main(["check", "slurm"])
    assert capsys.readouterr().out.endswith("checked: no errors found\n")


def test_a_shipped_cluster_file_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["show", "kuberay/rayjob"])
    assert capsys.readouterr().out == (ROOT / "clusters/kuberay/rayjob.yaml").read_text()
    with pytest.raises(
        BadInput, match=r"^awz: must be the name of a cluster file of lift_ray, but is not; did you mean"
    ):
        cluster.main(["show", "awz"])


def test_a_local_file_of_that_name_wins_but_not_a_folder() -> None:
    Path("quickstart").mkdir()
    assert read_space("quickstart").name == "quickstart"
    Path("tau").write_text("name: mine\ndataset: embedded:caltech101-lt\nspace: {loss.tau: {float: [0, 1]}}\n")
    assert read_space("tau").name == "mine"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("quickstrt", "did you mean 'quickstart'?"),
        ("recipes/cifar100_lt/liftplus", "did you mean 'recipes/cifar100_lt/lift_plus'?"),
        ("zzz", "known: backdoor, bottleneck, cifar100_lt, heavy, imagenet_lt, inat, lift_plus, places_lt, "),
    ],
)
def test_an_unknown_name_is_one_line_with_the_closest(name: str, remedy: str) -> None:
    for read in (read_space, read_run):
        with pytest.raises(BadInput) as error:
            read(name)
        start = f"{name}: must be a file, or the name of a space or run file of lift_ray, but is not; "
        assert str(error.value).startswith(start + remedy)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["quickstart.yaml", "/quickstart", "s3://bucket/quickstart"])
def test_a_path_is_not_taken_for_a_name(path: str) -> None:
    with pytest.raises(BadInput, match=r"must be a (readable )?YAML file"):
        read_space(path)


def test_a_name_that_no_file_can_have_is_bad_input() -> None:
    with pytest.raises(BadInput, match="must be a file, or the name of"):
        read_space("a" * 5000)


def test_the_wheel_has_its_own_copy_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an installed package, a folder beside it belongs to something else."""
    inside = tmp_path / "lift_ray" / "assets" / "search_spaces"
    for folder in (inside, tmp_path / "search_spaces"):
        folder.mkdir(parents=True)
        (folder / f"{folder.parent.name}.yaml").touch()
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "lift_ray")
    assert shipped.shipped_files("search_spaces") == {"assets": inside / "assets.yaml"}


def test_a_name_without_a_file_ends_a_verb_with_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lift_ray.tune", "quickstrt", "--dry-run"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
