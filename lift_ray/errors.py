"""Bad input: one clear line for the user and exit code 2, from whichever room finds it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NoReturn


class BadInput(Exception):
    """What the user gave cannot be used: `place: rule, but got value; remedy`.

    Args:
        place: file and line, option, or URL.
        rule: what is required there.
        got: what is there instead; None where the rule says it.
        remedy: what to do.
        but: in place of "got ...", where nothing was got: "there is none", "is missing".

    Attributes:
        faults: the errors that this one reports, itself when it is a single one.
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
        """One error, a line for each of several faults."""
        found = list(faults)
        whole = cls("\n".join(map(str, found)))
        whole.faults = found
        return whole


class RunFailed(Exception):
    """The input was good, but the run did not finish. The message says where to look."""


class Stopped(RunFailed):
    """The run was told to stop. A thread may still wait for Ray, whose shutdown would then crash: the process ends without it.

    Args:
        exit_code: 128 + the number of the signal that told it, as shells have it.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing could be stopped in order."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def one_line(error: object, most: int = 300) -> str:
    """An error's text on one line, cut to a length; the name of its class when it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error's text, where Ray's reports say what happened; the name of its class when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


MOST_NAMES = 60  # in one error line


def did_you_mean(value: object, options: Iterable[object]) -> str:
    """The tail of an error line: the nearest known name, or all of them when none is near; of very many the nearest few."""
    names = [str(option) for option in options]
    if near := difflib.get_close_matches(str(value), names, n=1):
        return f"did you mean '{near[0]}'?"
    if len(names) > MOST_NAMES:
        near = difflib.get_close_matches(str(value), names, n=8, cutoff=0)
        return f"known: {', '.join(near)} and {len(names) - len(near)} more"
    return "known: " + ", ".join(sorted(names))


def exit_codes(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], NoReturn]:
    """Wrap a verb: 0 done, 1 the run failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM. A traceback is for a bug."""

    @wraps(main)
    def run(argv: list[str]) -> NoReturn:
        try:
            sys.exit(main(argv) or 0)
        except BadInput as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except RunFailed as error:
            print(error, file=sys.stderr, flush=True)
            if isinstance(error, Stopped):
                sys.stdout.flush()
                os._exit(error.exit_code)
            sys.exit(1)
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + error.signum if isinstance(error, Interrupted) else 130)

    return run


def run_verb(app: Any, verb: str, argv: list[str]) -> int | None:
    """Parse the words after `python -m lift_ray.VERB` with a typer app and run it. Raises BadInput for wrong usage."""
    import typer

    prog = f"python -m lift_ray.{verb}"
    try:
        result = typer.main.get_command(app).main(args=argv, prog_name=prog, standalone_mode=False)
    except Exception as error:  # the class of usage errors moved between versions of typer; their method did not
        if not hasattr(error, "format_message"):
            raise
        raise BadInput(f"{verb}: {error.format_message()} See {prog} --help") from None
    return result if isinstance(result, int) else None
