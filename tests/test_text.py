"""Text for people: counts, names that look like markup or commands, and terminals that are not UTF-8."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from lift_ray.data.longtail import plot
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.terminal.evaluation_tables import confused_table
from lift_ray.terminal.tables import accuracy_table, console, seeds_table, titled
from lift_ray.text import accept_every_character, count, printable, say

NAMES = (
    "[lora] r8",
    "accuracy [/class]",
    "[red]",
    ":smile:",
    "[bold]b[/bold]",
    "[link=x]",
    "\\[x]",
    "[/]",
    "[@click=a()]",
)
FIGURES = {"test/accuracy": 0.5, "test/mean_class_accuracy": 0.5}


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2000, "image", "2,000 images"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (1, "bad image", "1 bad image"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(number: int, noun: str, text: str) -> None:
    assert count(number, noun) == text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\x07 back\x08 return\r", "bell\\x07 back\\x08 return\\x0d"),
        ("\x9b31m", "\\x9b31m"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("\ud83d alone", "\\ud83d alone"),
        ("Käfer 中 😀", "Käfer 中 😀"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_control_characters_never_reach_a_terminal_and_others_stay(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("screen", [console, lambda: Console(width=160)], ids=["console", "a console with markup"])
def test_a_name_that_looks_like_markup_stands_in_tables_as_it_is(
    name: str, screen: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(screen)
    runs = [{"label": name, **FIGURES}] * 2
    pair = {"true": name, "predicted": "b", "count": 1, "fraction": 0.5}
    heading = titled(name)
    heading.add_column(name)
    heading.add_row(name)
    for table, times in (
        (accuracy_table(name, "test", [(name, FIGURES)]), 2),
        (seeds_table(runs), 1),
        (confused_table([pair]), 1),
        (heading, 3),
    ):
        screen().print(table)
        assert capsys.readouterr().out.count(name) == times


def test_escapes_and_newlines_in_a_name_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(accuracy_table("test", "test", [("\x1b[2Ja\nb", FIGURES)]))
    out = capsys.readouterr().out
    assert "\\x1b[2Ja\\nb" in out
    assert "\x1b" not in out


class Stream(io.TextIOWrapper):
    """stdout or stderr of a terminal with an encoding of its own."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf8_gets_ascii_bars_and_tables(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    accept_every_character()
    say(plot(np.array([100, 1])), "蟹")
    console().print(accuracy_table("test", "test", [("蟹", {**FIGURES, "test/few": 0.5})]))
    console().print(seeds_table([{"label": "x", **FIGURES}] * 2))
    text = out.text()
    assert "100 #" in text
    assert "\n\\u87f9\n" in text
    assert text.count("50.0") == 5
    assert not set("█─━│┃┏蟹") & set(text)


def test_an_error_about_a_name_that_the_terminal_lacks_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(argv: list[str]) -> None:
        raise BadInput("CHECKPOINT", "must be a folder", "蟹\x1b[2J\udce9")

    err = Stream("ascii")
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as ended:
        run_and_exit(main)
    assert ended.value.code == 2
    assert err.text() == "CHECKPOINT: must be a folder, but got \\u87f9\\x1b[2J\\xe9\n"
