"""`lift-ray` and `python -m lift_ray`: all verbs in one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lift_ray import __version__
from lift_ray.cli import VERBS

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=env)


def script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the console script as pip writes it."""
    module, _, function = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]["lift-ray"].partition(":")
    code = f"import sys; sys.argv[0] = 'lift-ray'; from {module} import {function}; sys.exit({function}())"
    return run("-c", code, *words, **variables)


def test_help_lists_every_verb_with_a_line() -> None:
    done = run("-m", "lift_ray", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: python -m lift_ray [OPTIONS] COMMAND [ARGS]...\n")
    listed = [line.split(maxsplit=1) for line in done.stdout.partition("Commands:\n")[2].splitlines()]
    assert [verb for verb, _ in listed] == list(VERBS)
    assert all(text.endswith(".") and not text.endswith("...") for _, text in listed)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_the_same_command_both_ways(verb: str) -> None:
    for words, code in (["--help"], 0), ([], 2), (["--nonsense"], 2):
        ways = [run("-m", "lift_ray", verb, *words), run("-m", f"lift_ray.{verb}", *words)]
        assert len({(done.returncode, done.stdout, done.stderr) for done in ways}) == 1
        assert ways[0].returncode == code
        if code:
            assert ways[0].stderr.startswith(f"{verb}: ")
            assert ways[0].stderr.endswith(f" See python -m lift_ray.{verb} --help\n")
        else:
            assert ways[0].stdout.startswith(f"Usage: python -m lift_ray.{verb} ")


def test_bad_input_of_a_verb_is_its_line_and_exit_code_2() -> None:
    done = run("-m", "lift_ray", "predict", "model", "photos", "--out", "names.txt")
    assert done.returncode == 2
    assert done.stderr == "--out: must be a local .parquet or .csv file, but got names.txt; choose such a name\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--nonsense"], "No such option: --nonsense"), (["tuen"], "No such command 'tuen'.")],
)
def test_a_wrong_verb_is_one_line_and_exit_code_2(words: list[str], problem: str) -> None:
    for done, name, usage in (
        (run("-m", "lift_ray", *words), "lift_ray", "python -m lift_ray"),
        (script(*words), "lift-ray", "lift-ray"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{name}: {problem} ")
        assert done.stderr.endswith(f" See {usage} --help\n")


def test_without_a_verb_the_verbs_are_listed() -> None:
    for done in (run("-m", "lift_ray"), script()):
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.partition("Commands:\n")[2].splitlines()] == list(VERBS)
    assert done.stdout.startswith("Usage: lift-ray [OPTIONS] COMMAND [ARGS]...\n")


def test_the_version() -> None:
    for done in (run("-m", "lift_ray", "--version"), script("--version")):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"lift_ray {__version__}\n", "")


@pytest.mark.parametrize("words", [["tune"], ["report"], ["convert", "folder"], ["cluster", "check"]])
def test_the_script_names_itself_in_usage_examples_and_errors(words: list[str]) -> None:
    command = " ".join(["lift-ray", *words])
    done = script(*words, "--help")
    assert done.stdout.startswith(f"Usage: {command} ")
    assert f"\n    {command} " in done.stdout.partition("Example")[2]
    assert "python -m" not in done.stdout
    wrong = script(*words, "--nonsense")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(f"{words[0]}: No such option: --nonsense ")
    assert wrong.stderr.endswith(f" See lift-ray {words[0]} --help\n")


def test_bad_input_of_the_script_is_its_line_and_exit_code_2() -> None:
    done = script("predict", "model", "photos", "--out", "names.txt")
    assert done.returncode == 2
    assert done.stderr == "--out: must be a local .parquet or .csv file, but got names.txt; choose such a name\n"


@pytest.mark.parametrize(
    ("typed", "completed"), [("lift-ray tr", ["train"]), ("lift-ray convert tor", ["torchvision"])]
)
def test_a_shell_completes_verbs(typed: str, completed: list[str]) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_LIFT_RAY_COMPLETE": "complete_bash"}
    done = script(**asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, completed, "")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion_is_shown_and_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    """Bash reads what `--install-completion` wrote, and completes a verb with it."""
    command = tmp_path / "lift-ray"
    root = Path(__file__).parent.parent
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH='{root}' exec '{sys.executable}' -c 'from lift_ray.cli import script; script()' \"$@\"\n"
    )
    command.chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    asked = 'lift-ray --show-completion; lift-ray --install-completion; echo "code $?"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=env, check=True)
    assert "complete -o default -F _lift_ray_completion lift-ray" in done.stdout
    assert done.stdout.endswith("code 0\n")
    typed = "COMP_WORDS=(lift-ray tr); COMP_CWORD=1; _lift_ray_completion lift-ray; echo ${COMPREPLY[*]}"
    done = subprocess.run(
        ["bash", "-c", f'. "$HOME/.bashrc"; {typed}'], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout == "train\n"


def test_only_the_script_offers_completion() -> None:
    assert "--install-completion" in script("--help").stdout
    assert "completion" not in run("-m", "lift_ray", "--help").stdout


def test_only_the_verb_asked_for_is_imported() -> None:
    code = "import sys; from lift_ray.cli import main; main(['cluster', '--help']); print(*sys.modules)"
    loaded = run("-c", code).stdout.splitlines()[-1].split()
    assert [verb for verb in VERBS if f"lift_ray.{verb}" in loaded] == ["cluster"]
