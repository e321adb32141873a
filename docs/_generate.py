"""Hook of mkdocs: the pages that are generated when the site is built.

reference/settings.md comes from the classes of the settings, reference/cli.md from the commands, and a notebook becomes a page with its
outputs. Neither torch nor Ray is imported.
"""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lift_ray import cli
from lift_ray.settings.run_file import RunFile
from lift_ray.settings.space import SpaceFile

Schema = dict[str, Any]
SECTIONS = {  # of a run that have kinds, and the words about them
    "tuner": "What is trained in the blocks of the backbone, or behind it. `extra_tuner` takes the same settings, for a second "
    "tuner that changes other places.",
    "head": "The classifier, and the initialization of its weights. `head.tuner` takes the same settings as `tuner`, "
    "for the text tower.",
    "loss": "",
    "augment": "How training images are changed.",
    "method": "What is built of tuner, head and loss. `method: ulfine` is short for `method: {kind: ulfine}`.",
}
SPACE_SECTIONS = {"search": "How to search.", "scale": "", "plan": ""}
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colors of a terminal
NUMBERS = ("integer", "number")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and let notebooks be pages."""
    for uri, text in (("reference/settings.md", settings_page()), ("reference/cli.md", cli_page())):
        files.append(File.generated(config, uri, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = Notebook.generated(config, file.src_uri, content=notebook_page(Path(str(file.abs_src_path))))
        files.remove(file)
        files.append(page)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep a figure and its deviation on one line, also in a narrow column."""
    return markdown.replace(" ± ", "&nbsp;±&nbsp;")


class Notebook(File):
    """A notebook, which is a page of the site."""

    def is_documentation_page(self) -> bool:
        """Return True: mkdocs takes only Markdown for a page."""
        return True


# ---- settings


def settings_page() -> str:
    """Return the reference of all settings, of runs and of search spaces."""
    run, space = RunFile.model_json_schema(), SpaceFile.model_json_schema(by_alias=True)
    return "\n\n".join([*_run_sections(run), *_space_sections(space)]) + "\n"


def _run_sections(schema: Schema) -> Iterator[str]:
    yield "# Settings"
    yield "For people who write run files and search spaces, and look up a name, a range or a default."
    yield (
        "A setting is a dotted path: `tuner.kind`, `loss.tau`. Set it in a run file, in `base:` or `space:` of a search-space file, "
        "or on the command line (`optim.lr=0.05`). [Write a search space](../how-to/space-file.md) says what is worth setting. This "
        "page is generated from the code. K is the number of classes, L that of tuned blocks, D the width of the backbone."
    )
    yield "## Run"
    plain = {name: one for name, one in schema["properties"].items() if not _section(one, schema["$defs"])}
    yield _table("", plain, schema["$defs"], schema.get("required", ()))
    for name, one in schema["properties"].items():
        section = _section(one, schema["$defs"])
        if section and name != "extra_tuner":
            yield from _section_parts(name, section, one.get("default"), schema["$defs"])


def _space_sections(schema: Schema) -> Iterator[str]:
    yield "## Search space"
    yield (
        "The keys of a search-space file. Its `base:` holds the settings above; on the command line they start with `base.`, and the "
        "others are as they stand here: `search.trials=30`."
    )
    plain = {name: one for name, one in schema["properties"].items() if name not in SPACE_SECTIONS}
    yield _table("", plain, schema["$defs"], schema.get("required", ()))
    for name, key, about in (
        ("Param", "space.NAME", "The range of a searched setting: exactly one of choices, int and float."),
        ("Constraint", "constraints.METRIC", "Bounds of a metric that a trial must satisfy."),
    ):
        yield f"## `{key}`"
        yield about
        yield _table(f"{key}.", schema["$defs"][name]["properties"], schema["$defs"])
    for name in SPACE_SECTIONS:
        yield from _section_parts(name, _section(schema["properties"][name], schema["$defs"]), None, schema["$defs"])


def _section(one: Schema, known: Schema) -> list[Schema]:
    """Return the kinds of a section, or the section itself; none for a plain setting."""
    if "$ref" in one:
        return [known[one["$ref"].rpartition("/")[2]]]
    parts = [part for part in (*one.get("oneOf", ()), *one.get("anyOf", ())) if part.get("type") != "null"]
    found = [kind for part in parts for kind in _section(part, known)]
    return found if all("kind" in kind["properties"] for kind in found) or len(parts) < 2 else []


def _section_parts(name: str, kinds: list[Schema], default: Any, known: Schema) -> Iterator[str]:
    if "kind" not in kinds[0]["properties"]:
        (only,) = kinds
        yield f"## `{name}`"
        yield _doc(only)
        inside = {key: one for key, one in only["properties"].items() if not _section(one, known)}
        yield _table(f"{name}.", inside, known, only.get("required", ()))
        for key, one in only["properties"].items():
            if below := _section(one, known):
                yield from _section_parts(f"{name}.{key}", below, one.get("default"), known)
        return
    yield f"## `{name}`"
    usual = default["kind"] if isinstance(default, Mapping) else ""
    names = [kind["properties"]["kind"]["const"] for kind in kinds]
    choices = ", ".join(f"[`{each}`](#{_anchor(name, each)})" for each in names)
    about = [SECTIONS.get(name, ""), f"`{name}.kind` is one of {choices}.", usual and f"The default is `{usual}`."]
    yield " ".join(filter(None, about))
    for kind, each in zip(kinds, names, strict=True):
        yield f"### `{name}.kind: {each}` {{ #{_anchor(name, each)} }}"
        yield _doc(kind)
        own = {key: one for key, one in kind["properties"].items() if key != "kind"}
        if own:
            yield _table(f"{name}.", own, known, kind.get("required", ()))


def _anchor(name: str, kind: str) -> str:
    return f"{name.replace('.', '-')}-{kind}"


def _doc(kind: Schema) -> str:
    return _sentences(kind.get("description", ""))


def _sentences(text: str) -> str:
    """Return text of the code as Markdown, in which angle brackets are no HTML."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if number % 2 else escape(part, quote=False) for number, part in enumerate(parts))


def _table(before: str, properties: Schema, known: Schema, required: Any = ()) -> str:
    """Return a table of settings."""
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for name, one in properties.items():
        values = _values(one, known) + (", required" if name in required else "")
        rows.append(f"| `{before}{name}` | {_cell(values)} | {_default(one)} | {_cell(_doc(one))} |")
    return _stacked(rows)


def _stacked(rows: list[str]) -> str:
    """Return a table whose cells stand below each other on a phone (assets/site.css)."""
    return "\n".join(['<div class="stacked" markdown="1">', "", *rows, "", "</div>"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(one: Schema) -> str:
    value = one.get("default")
    return "" if value is None or value in ({}, []) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}" if value != round(value, 4) or value >= 1 else str(value)
    return value if isinstance(value, str) else json.dumps(value)


def _values(one: Schema, known: Schema) -> str:
    """Return in words which values a setting takes."""
    if "$ref" in one:
        return "a section" if "/" in one["$ref"] and "LastBlocks" not in one["$ref"] else "`{last: K}`"
    if "const" in one:
        return f"`{_plain(one['const'])}`"
    if "enum" in one:
        return ", ".join(f"`{_plain(value)}`" for value in one["enum"])
    if parts := [part for part in (*one.get("anyOf", ()), *one.get("oneOf", ())) if part.get("type") != "null"]:
        return " or ".join(dict.fromkeys(_values(part, known) for part in parts))
    kind = one.get("type")
    if kind in NUMBERS:
        return f"{kind}{_range(one)}"
    if kind == "array":
        inside = _values(one.get("items", {}), known)
        return f"list of {kind_of}s" if (kind_of := inside.partition(",")[0]) in NUMBERS else f"list of {inside}"
    return {"boolean": "true or false", "string": "text", "object": "mapping"}.get(str(kind), "any")


def _range(one: Schema) -> str:
    """Return the bounds of a number in words."""
    low, above = one.get("minimum"), one.get("exclusiveMinimum")
    high, below = one.get("maximum"), one.get("exclusiveMaximum")
    words = [
        *([f"at least {low}"] if low is not None else []),
        *([f"over {above}"] if above is not None else []),
        *([f"at most {high}"] if high is not None else []),
        *([f"under {below:,}"] if below is not None else []),
    ]
    return ", " + ", ".join(words) if words else ""


# ---- command line


def cli_page() -> str:
    """Return the help of every verb and of its subcommands."""
    for verb in cli.VERBS:
        importlib.import_module(f"lift_ray.{verb}")
    with warnings.catch_warnings():  # typer's copy of click and click itself
        warnings.simplefilter("ignore")
        group: Any = typer.main.get_group(cli.app)
        parts = [
            "# Command line",
            "For people who type `lift-ray` and look up a verb or an option.",
            "`lift-ray VERB`, `python -m lift_ray VERB` and `python -m lift_ray.VERB` are the same. Results are files; errors are one "
            "line on standard error. Exit codes: 0 success, 1 a failed run, 2 wrong input, 130 Ctrl-C, 143 SIGTERM. This page is "
            "generated from the code.",
            "\n".join(["| verb | what it does |", "|---|---|", *(_verb_row(group, verb) for verb in cli.VERBS)]),
        ]
        for verb in cli.VERBS:
            parts += _command(group.commands[verb], f"{cli.SCRIPT} {verb}", "##")
    return "\n\n".join(parts) + "\n"


def _verb_row(group: Any, verb: str) -> str:
    return f"| [`{verb}`](#{verb}) | {_cell(group.commands[verb].get_short_help_str(200))} |"


def _command(command: Any, usage: str, level: str, hidden: Collection[tuple[str, str]] = ()) -> Iterator[str]:
    """Yield the parts of the help of a command, and those of its subcommands.

    Args:
        hidden: arguments and options that the command above has already shown.
    """
    name = usage.removeprefix(f"{cli.SCRIPT} ")
    yield f"{level} `{name}` {{ #{name.replace(' ', '-')} }}"
    about, _, examples = (command.help or "").replace(f"{cli.PYTHON}.", f"{cli.SCRIPT} ").partition("\b\nExamples:\n")
    yield "\n\n".join(map(_sentences, about.strip().split("\n\n")))
    context = command.make_context(usage, [], resilient_parsing=True)
    yield f"    {' '.join([usage, *command.collect_usage_pieces(context)])}"
    if examples.strip():
        yield "Examples:"
        yield "\n".join("    " + line.strip() for line in examples.rstrip().splitlines())
    subcommands = getattr(command, "commands", {})
    records = _records(command)
    known = [set(_records(each)) for each in subcommands.values()]
    shared = set.intersection(*known) if len(known) > 2 else set()
    yield from _options([record for record in records if record not in hidden])
    if shared:
        first = next(iter(subcommands.values()))
        yield "Of all of them:"
        yield from _options([record for record in _records(first) if record in shared])
    for below, each in subcommands.items():
        yield from _command(each, f"{usage} {below}", level + "#", hidden=shared)


def _records(command: Any) -> list[tuple[str, str]]:
    """Return the arguments and options of a command as its help has them: names and meaning."""
    context = command.make_context("", [], resilient_parsing=True)
    found = [each.get_help_record(context) for each in command.get_params(context)]
    return [record for record in found if record and not record[0].startswith("--help")]


def _options(records: list[tuple[str, str]]) -> Iterator[str]:
    rows = [f"| `{_cell(names)}` | {_prose(text)} |" for names, text in records]
    if rows:
        yield _stacked(["| argument or option | meaning |", "|---|---|", *rows])


def _prose(text: str) -> str:
    """Return a help text in a table, in which nothing is markup by accident."""
    return _cell(re.sub(r"([*_\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False)))


# ---- notebooks


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code showed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell_parts(cell)) + "\n"


def _cell_parts(cell: Mapping[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        yield text
        return
    yield f"```python\n{text}\n```"
    for is_text, outputs in groupby(cell["outputs"], key=_is_text):
        if is_text:  # what is printed line by line is one text
            printed = "".join(map(_printed, outputs)).strip("\n").rstrip()
            yield f"```text\n{ANSI.sub('', printed)}\n```"
        else:
            yield from map(_figure, outputs)


def _is_text(output: Mapping[str, Any]) -> bool:
    """Return True for printed text, also if rich gave its colors as HTML."""
    data = output.get("data", {})
    html = "".join(data.get("text/html", ""))
    return not any(kind.startswith("image/") for kind in data) and not ("text/html" in data and "<pre" not in html)


def _printed(output: Mapping[str, Any]) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"])


def _figure(output: Mapping[str, Any]) -> str:
    """Return an image or a table of an output as HTML."""
    data = output["data"]
    for kind in ("image/jpeg", "image/png"):
        if kind in data:
            return f"![Image that the cell shows](data:{kind};base64,{''.join(''.join(data[kind]).split())})"
    table = re.sub(r"<style.*?</style>|<(?=p>\d+ rows).*?</p>", "", "".join(data["text/html"]), flags=re.DOTALL)
    return re.sub(r"<table[^>]*>", "<table>", re.sub(r"\n\s*", "", table))
