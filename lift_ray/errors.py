"""Exceptions of lift_ray and their exit codes. Bad input becomes one clear line for the user and exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from lift_ray.text import accept_every_character, say


class BadInput(Exception):
    """Invalid input of the user, with the message `place: rule, but got value; remedy`.

    Args:
        place: file and line, option, or URL.
        rule: the requirement that is not met.
        got: the actual value; None if the rule already states it.
        remedy: how to fix it.
        but: replaces "got ..." if there is no value: "there is none", "is missing".

    Attributes:
        faults: the errors that this one reports; itself if it is a single error.
    """

    def __init__(self, place: str, rule: str = "", got: object = None, remedy: str = "", *, but: str = "") -> None:
        but = but or ("" if got is None else f"got {got}")
        message = f"{rule}, but {but}" if but else rule
        super().__init__(
            ": ".join(part for part in (place, "; ".join(part for part in (message, remedy) if part)) if part)
        )
        self.place, self.rule, self.got, self.remedy = place, rule, got, remedy
        self.faults: list[BadInput] = [self]

    @classmethod
    def of(cls, faults: Iterable[BadInput]) -> BadInput:
        """Combine several errors into one, with one line each."""
        found = list(faults)
        whole = cls("\n".join(map(str, found)))
        whole.faults = found
        return whole


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Join at most `most` names with commas, and "..." if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class RunFailed(Exception):
    """The input was valid, but the run did not finish. The message says where to look."""


class Stopped(RunFailed):
    """The run was stopped. A thread may still wait for Ray, whose shutdown would then crash: the process exits without it.

    Args:
        exit_code: 128 + the number of the signal that stopped it, as in shells.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal arrived before there was anything to stop in order."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def one_line(error: object, most: int = 300) -> str:
    """Return an error's text on one line without its final period, at most `most` characters; the class name if it has no text."""
    nothing = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return " ".join(str(error).split())[:most].rstrip(".") or nothing


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, which has the cause in Ray's reports; the class name if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


MOST_NAMES = 60  # in one error message


def did_you_mean(value: object, options: Iterable[object]) -> str:
    """Return a remedy for an unknown name: the closest known name, or else all of them (the closest few if there are very many).

    Without known names, the remedy is to remove it.
    """
    names = [str(option) for option in options]
    if not names:
        return "remove it"
    if near := difflib.get_close_matches(str(value), names, n=1):
        return f"did you mean '{near[0]}'?"
    if len(names) > MOST_NAMES:
        near = difflib.get_close_matches(str(value), names, n=8, cutoff=0)
        return f"known: {', '.join(near)} and {len(names) - len(near)} more"
    return "known: " + ", ".join(sorted(names))


def run_and_exit(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a command and exit: 0 success, 1 failed run, 2 bad input, 130 Ctrl-C, 143 SIGTERM. Only bugs show a traceback."""
    accept_every_character()
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except BadInput as error:
        say(error, error=True)
        sys.exit(2)
    except RunFailed as error:
        say(error, error=True)
        if isinstance(error, Stopped):
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(1)
    except KeyboardInterrupt as error:
        say("interrupted", error=True)
        sys.exit(128 + error.signum if isinstance(error, Interrupted) else 130)
