"""`python -m lift_ray`: all verbs in one command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lift_ray.cli import VERBS


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


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
    [([], "Missing command."), (["--nonsense"], "No such option: --nonsense"), (["tuen"], "No such command 'tuen'.")],
)
def test_without_a_verb_it_is_one_line_and_exit_code_2(words: list[str], problem: str) -> None:
    done = run("-m", "lift_ray", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lift_ray: {problem} ")
    assert done.stderr.endswith(" See python -m lift_ray --help\n")


def test_only_the_verb_asked_for_is_imported() -> None:
    code = "import sys; from lift_ray.cli import main; main(['cluster', '--help']); print(*sys.modules)"
    loaded = run("-c", code).stdout.splitlines()[-1].split()
    assert [verb for verb in VERBS if f"lift_ray.{verb}" in loaded] == ["cluster"]
