"""Text for people: counts of things, names with control characters, and terminals that cannot show every character."""

from __future__ import annotations

import codecs
import io
import re
import sys

# Control characters but for tab and newline, line separators, overrides of the writing direction, and lone surrogates: the bytes
# of a file name that is not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ASCII = dict(zip("▁▂▃▄▅▆▇█", "..::++##", strict=True)) | {"±": "+-", "…": "...", "→": "->"}
ENCODABLE = "lift_ray.encodable"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2,000 images`, `1 class`, `3 classes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def printable(text: object) -> str:
    """Return text that a terminal cannot take for commands: control characters become escapes such as \\x1b."""
    return UNPRINTABLE.sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}"


def say(*lines: object, error: bool = False) -> None:
    """Print lines on stdout or stderr at once, with control characters escaped. All plain output goes through it."""
    print(printable("\n".join(map(str, lines))), file=sys.stderr if error else sys.stdout, flush=True)


def accept_every_character() -> None:
    """Let stdout and stderr write what their encoding lacks as ASCII: bars as `#`, other characters as escapes.

    Without it, an image name would end a verb with UnicodeEncodeError on a terminal that is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODABLE)


def _encodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ASCII.get(char) or _as_escape(char) for char in missing), error.end


def _as_escape(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(ENCODABLE, _encodable)
