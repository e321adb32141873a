"""The options of all verbs: one name for one thing, and old names still work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib import import_module
from inspect import signature
from itertools import combinations
from types import NoneType
from typing import Any, get_args

import pytest
import typer

from lift_ray import cli
from lift_ray.errors import BadInput

ALIKE = 0.6  # of two help texts about one thing: the least fraction of equal words
# option -> why its help or type differs between verbs
EXCEPTIONS = {
    "--out": "the results of each verb are of another kind: a folder or URL, a new folder, or one file",
    "--resume": "a run continues from a checkpoint, a search with what is finished",
    "--dry-run": "what a verb checks and prints is its own",
    "--data": "reproduce needs several datasets, evaluate one",
    "--posthoc-tau": "evaluate takes several",
    "--test": "the file is a list, or iNaturalist's annotations",
    "--group": "a table has columns, and folders are directories in every source",
}


@dataclass(frozen=True)
class Option:
    command: str
    name: str
    kind: Any
    help: str

    @property
    def words(self) -> list[str]:
        """The help without its default in brackets and without punctuation."""
        return re.findall(r"\w+", self.help.partition("  [")[0].lower())


def options_of(command: Any, name: str) -> Iterator[Option]:
    """The options of a command and its subcommands that help shows."""
    kinds = signature(command.callback, eval_str=True).parameters if command.callback else {}
    for option in command.params:
        names = [each for each in (*option.opts, *option.secondary_opts) if each.startswith("-")]
        if option.name in kinds and not getattr(option, "hidden", False):
            kind = get_args(kinds[option.name].annotation)[0]
            if NoneType in get_args(kind):
                kind = get_args(kind)[0]
            yield from (Option(name, each, kind, option.help or "") for each in names)
    for below, each in getattr(command, "commands", {}).items():
        yield from options_of(each, f"{name} {below}".strip())


@pytest.fixture(scope="module")
def options() -> dict[str, list[Option]]:
    """The options of the app by name."""
    for verb in cli.VERBS:
        import_module(f"lift_ray.{verb}")
    found: dict[str, list[Option]] = {}
    for option in options_of(typer.main.get_group(cli.app), ""):
        found.setdefault(option.name, []).append(option)
    return found


def differs(one: Option, other: Option) -> bool:
    """Return True unless two options of one name are about the same thing."""
    return one.kind != other.kind or SequenceMatcher(None, one.words, other.words).ratio() < ALIKE


def test_the_walk_sees_the_options_of_every_verb(options: dict[str, list[Option]]) -> None:
    seen = {option.command.partition(" ")[0] for name in options for option in options[name]}
    assert seen - {""} == {*cli.VERBS}
    assert {"train", "tune", "predict"} <= {option.command for option in options["--out"]}
    assert "--no-dashboard" in options


def test_an_option_means_the_same_in_every_verb(options: dict[str, list[Option]]) -> None:
    different = {
        name: [one, other]
        for name, found in options.items()
        for one, other in combinations(found, 2)
        if name not in EXCEPTIONS and differs(one, other)
    }
    assert not different


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_is_needed(options: dict[str, list[Option]], name: str) -> None:
    assert any(differs(one, other) for one, other in combinations(options[name], 2))


def test_a_flag_that_can_be_turned_off_can_be_in_every_verb(options: dict[str, list[Option]]) -> None:
    for name in options:
        on = options.get(f"--{name.removeprefix('--no-')}", []) if name.startswith("--no-") else []
        if any(each.kind is bool for each in on):
            assert {each.command for each in options[name]} == {each.command for each in on}, name


OLD = [(command, old, new) for command, names in cli.OLD_OPTIONS.items() for old, new in names.items()]


@pytest.mark.parametrize(("command", "old", "new"), OLD)
def test_an_old_name_works_and_no_help_shows_it(
    options: dict[str, list[Option]], command: str, old: str, new: str
) -> None:
    verb, _, kind = command.partition(" ")
    assert cli.renamed(verb, [*kind.split(), old, "x", f"{old}=y"]) == [*kind.split(), new, "x", f"{new}=y"]
    words = kind or ("folder" if verb == "convert" else "")  # one of its sources
    with pytest.raises(BadInput, match=f"Option '{new}' requires an argument"):
        cli.run(f"lift_ray.{verb}", [*words.split(), old])
    assert not [each for each in options.get(old, []) if f"{each.command} ".startswith(f"{command} ")]
    assert [each for each in options[new] if f"{each.command} ".startswith(f"{command} ")]


def test_other_words_and_other_verbs_keep_their_names() -> None:
    assert cli.renamed("tune", ["a.yaml", "--to", "x"]) == ["a.yaml", "--to", "x"]
    assert cli.renamed("convert", ["csv", "--root", "x", "a=b"]) == ["csv", "--root", "x", "a=b"]
    assert cli.renamed("report", []) == []


def test_megapixels_are_an_old_option_of_serve(options: dict[str, list[Option]]) -> None:
    assert "--max-megapixels" not in options
    with pytest.raises(BadInput, match="Option '--max-megapixels' requires an argument"):
        cli.run("lift_ray.serve", ["--max-megapixels"])
