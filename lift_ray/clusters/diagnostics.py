"""Faults of a cluster file, collected by line, and the rules that hold for every kind of cluster file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from lift_ray.clusters.schemas import Schema
from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.settings.yaml_file import SettingsFile

Place = tuple[str | int, ...]
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


class Diagnostics:
    """Collected faults of one file.

    Attributes:
        file: the file, which knows the line of each place.
    """

    def __init__(self, file: SettingsFile) -> None:
        self.file = file
        self._found: dict[tuple[int, str], BadInput] = {}

    def add(self, place: Place, rule: str, got: object = None, remedy: str = "", *, but: str = "") -> None:
        """Add a fault at a place of the file; the other arguments are those of BadInput. The same fault is kept once."""
        fault = BadInput(self.file.where(place), rule, got, remedy, but=but)
        self._found[(self.file.line(place), str(fault))] = fault

    def include(self, other: Diagnostics) -> None:
        """Add the faults of another document of the same file."""
        self._found |= other._found

    def by_schema(self, schema: Schema, at: Place = ()) -> None:
        """Add a fault for every violation of a JSON schema by the data at this place."""
        from jsonschema import Draft7Validator  # type: ignore[import-untyped]

        data: Any = self.file.data
        for name in at:
            data = data[name]
        for error in Draft7Validator(schema).iter_errors(data):
            place = (*at, *error.absolute_path)
            if error.validator == "additionalProperties" and error.validator_value is False:
                known = error.schema.get("properties", {})
                for key in error.instance.keys() - known.keys():
                    self.add((*place, key), f"unknown key '{key}'", remedy=did_you_mean(key, known))
            elif error.validator == "required":
                for key in set(error.validator_value) - error.instance.keys():
                    self.add(place, f"missing key '{key}'", remedy="add it")
            else:
                self._add_violation(place, error.validator, error.validator_value, error.instance, error.message)

    def _add_violation(self, place: Place, keyword: str, expected: Any, value: Any, message: str) -> None:
        """Add the fault of a value that violates one keyword of a JSON schema."""
        got = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        if SECRET.search(repr(value)):
            got = "what looks like a secret"
        if keyword == "type":
            self.add(place, f"must be {' or '.join(KINDS[kind] for kind in _listed(expected))}", got, "change it")
        elif keyword == "enum":
            self.add(place, f"unknown value {got}", remedy=did_you_mean(value, expected))
        elif keyword in BOUNDS:
            self.add(place, f"must {BOUNDS[keyword].format(expected)}", got, "change it")
        else:
            self.add(place, f"does not match Ray's schema: {one_line(message)}", remedy="change it")

    def end(self) -> None:
        """Raise BadInput with one line for each fault, in the order of the file's lines, if there are any."""
        if self._found:
            raise BadInput.of(self._found[key] for key in sorted(self._found))


BOUNDS = {
    "minimum": "be at least {}",
    "minItems": "have at least {} entry",
    "uniqueItems": "list each entry once",
    "pattern": "match {}",
}


def _listed(wanted: str | Iterable[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


RAY_REQUIREMENT = re.compile(r"\bray(?:\[[\w,]*\])?\s*(?:[=<>~!]=|[<>@])[^'\"\s]*|\bray-\d[^'\"\s]*\.whl")
ANY_RAY = re.compile(r"(?<=[\s'\"])ray(?:\[[\w,]*\])?(?=['\"]?(?:\s|$))(?!\s*[=<>~!@])")
RAY_IMAGE = re.compile(r"(?:^|/)ray(?:-\w+)?:([^-@]+)")


def _asked_of_pip(command: str) -> list[str]:
    """Return every requirement of Ray in a command, those without a version (`pip install ray`) included."""
    installs = [part for part in re.split(r"[;&|]", command) if re.search(r"\bpip3? .*install\b", part)]
    return RAY_REQUIREMENT.findall(command) + [found for part in installs for found in ANY_RAY.findall(part)]


def one_exact_ray(faults: Diagnostics, commands: Mapping[Place, str], otherwise: Place) -> None:
    """Require one exact version of Ray on every node: the one installed here, where jobs are submitted from."""
    from packaging.requirements import InvalidRequirement, Requirement

    here = version("ray")
    found = [(place, text) for place, command in commands.items() for text in _asked_of_pip(command)]
    if not found:
        faults.add(
            otherwise,
            "must install one exact version of Ray",
            but="no line does",
            remedy=f"add 'ray[default,train,tune]=={here}'",
        )
    for place, text in found:
        try:
            exact = [clause for clause in Requirement(text).specifier if clause.operator == "=="]
        except InvalidRequirement:
            exact = []
        if not exact or exact[0].version != here:
            faults.add(
                place,
                f"must install the Ray of this machine, {here}",
                f"'{text}'",
                f"write 'ray[default,train,tune]=={here}'",
            )


def one_ray_image(faults: Diagnostics, place: Place, image: str, wanted: str) -> None:
    """Require this version of Ray in an image of the Ray project. The contents of other images cannot be checked."""
    if (found := RAY_IMAGE.search(image)) and found[1] != wanted:
        faults.add(place, f"must contain Ray {wanted}, like all nodes", f"'{image}'", "change the tag")


def installs_nothing(faults: Diagnostics, commands: Mapping[Place, str], image: str) -> None:
    """Forbid installations at start if an image of the user's own is set: they would replace what the image contains."""
    for place, command in commands.items():
        if re.search(r"\bpip3?['\"]? .*install\b", command):
            faults.add(
                place,
                "must install nothing, because the image contains lift_ray",
                but=f"pip runs, and the image is '{image}'",
                remedy="delete the lines from '>>> installation' to '<<< installation', or remove the image",
            )


def is_own_image(image: str) -> bool:
    """Return True for an image that is not of the Ray project, so one that should contain lift_ray."""
    return RAY_IMAGE.search(image) is None


def loopback_only(faults: Diagnostics, commands: Mapping[Place, str]) -> None:
    """Require the dashboard that these commands start to listen on the head's loopback address."""
    for place, command in commands.items():
        for host in re.findall(r"--dashboard-host[= ]\s*([^\s'\"]+)", command):
            if host not in ("127.0.0.1", "localhost"):
                faults.add(
                    place,
                    "--dashboard-host must be 127.0.0.1 (anyone who reaches the dashboard can run code)",
                    host,
                    "write 127.0.0.1 and connect through SSH, for example with `ray dashboard`",
                )


def one_port(faults: Diagnostics, heads: Mapping[Place, str], joins: Mapping[Place, str]) -> None:
    """Require the commands that join a cluster to use the port that the head listens on (6379 unless its command says)."""
    listens = {
        port
        for command in heads.values()
        for port in re.findall(r"--port[= ]['\"]?([^\s;&|'\")]+)", command) or ["6379"]
    }
    if len(listens) != 1 or not min(listens).isdigit():
        return  # a variable of the shell, or no head
    for place, command in joins.items():
        for port in re.findall(r"--address[= ]['\"]?[^\s:'\"]+:(\d+)", command):
            if port not in listens:
                faults.add(place, f"must join the head at its port, {min(listens)}", port, "change one of the two")


AUTH_MODE = re.compile(r"\bRAY_AUTH_MODE=['\"]?(\w*)|\bunset\b[^;&|]*\bRAY_AUTH_MODE\b")


def token_stays_on(faults: Diagnostics, commands: Mapping[Place, str]) -> None:
    """Forbid commands that turn Ray's token authentication off, for themselves or for later ones."""
    for place, command in commands.items():
        if wrong := next((found for found in AUTH_MODE.finditer(command) if found[1] != "token"), None):
            faults.add(place, "must keep Ray's token authentication on", f"'{wrong[0]}'", "remove it")


def walk(data: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield every string of a file with its place."""
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from walk(value, (*place, name))
    elif isinstance(data, str):
        yield place, data


def plain_values(faults: Diagnostics) -> None:
    """Forbid variables outside shell commands, because neither Ray nor kubectl expands them."""
    for place, text in walk(faults.file.data):
        in_shell = any(str(name).endswith(("_commands", "command", "args", "entrypoint")) for name in place)
        if "${" in text and not in_shell:
            faults.add(
                place, "must be a plain value", f"'{text}', which neither Ray nor kubectl expands", "write the value"
            )


SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN|AccountKey=|\b(?:hf_|ghp_|github_pat_|sk-)\w{16,}|://[^/\s:@]+:[^/\s@]+@"
    r"|\b\w*(?:SECRET|PASSWORD|ACCESS_KEY|API_KEY|AUTH_TOKEN)\w*=['\"]?[^\s'\"$]",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"secret|password|access_key|api_key|auth_token$|credentials", re.IGNORECASE)


def no_secrets(faults: Diagnostics) -> None:
    """Forbid keys and tokens in a file. Messages do not repeat them."""
    for place, text in walk(faults.file.data):
        name = str(place[-1])
        if SECRET.search(text) or (SECRET_NAME.search(name) and not text.startswith("~") and name != "secretName"):
            faults.add(
                place, "must not contain a secret", "what looks like one", "remove it, revoke it and use a role instead"
            )
