"""The faults of a cluster file, gathered by line, and the rules that every kind of file keeps to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import requires, version
from typing import Any

from lift_ray.clusters.schemas import Schema
from lift_ray.errors import BadInput, did_you_mean
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
    """What is wrong with one file.

    Attributes:
        file: the file, for lines.
    """

    def __init__(self, file: SettingsFile) -> None:
        self.file = file
        self._found: dict[tuple[int, str], None] = {}

    def add(self, place: Place, text: str) -> None:
        """Note that `text` (rule, but got value; what to do) is the matter at this place."""
        self._found[(self.file.line(place), f"{self.file.where(place)}: {text}")] = None

    def by_schema(self, schema: Schema, at: Place = ()) -> None:
        """Note every way in which the data at this place differs from a JSON schema."""
        from jsonschema import Draft7Validator  # type: ignore[import-untyped]

        data: Any = self.file.data
        for name in at:
            data = data[name]
        for error in Draft7Validator(schema).iter_errors(data):
            place = (*at, *error.absolute_path)
            if error.validator == "additionalProperties" and error.validator_value is False:
                known = error.schema.get("properties", {})
                for key in error.instance.keys() - known.keys():
                    self.add((*place, key), f"unknown key '{key}'; {did_you_mean(key, known)}")
            elif error.validator == "required":
                for key in set(error.validator_value) - error.instance.keys():
                    self.add(place, f"must have '{key}', but it is missing; add it")
            else:
                self.add(place, _broken(error.validator, error.validator_value, error.instance, error.message))

    def end(self) -> None:
        """Raise BadInput with one line for each fault, by line of the file; nothing where there is none."""
        if self._found:
            raise BadInput("\n".join(text for _, text in sorted(self._found)))


def _broken(rule: str, wanted: Any, value: Any, message: str) -> str:
    got = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if SECRET.search(repr(value)):
        got = "what looks like a secret"
    if rule == "type":
        return f"must be {' or '.join(KINDS[kind] for kind in _listed(wanted))}, but got {got}; change it"
    if rule == "enum":
        return f"unknown value {got}; {did_you_mean(value, wanted)}"
    if rule in BOUNDS:
        return f"must {BOUNDS[rule].format(wanted)}, but got {got}; change it"
    return f"must be as Ray's schema says, but got: {' '.join(message.split())}; change it"


BOUNDS = {
    "minimum": "be at least {}",
    "minItems": "have at least {} entry",
    "uniqueItems": "name each entry once",
    "pattern": "match {}",
}


def _listed(wanted: str | Iterable[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


RAY_REQUIREMENT = re.compile(r"\bray(?:\[[\w,]*\])?\s*(?:[=<>~!]=|[<>@])[^'\"\s]*|\bray-\d[^'\"\s]*\.whl")
ANY_RAY = re.compile(r"(?<=[\s'\"])ray(?:\[[\w,]*\])?(?=['\"]?(?:\s|$))(?!\s*[=<>~!@])")
RAY_IMAGE = re.compile(r"(?:^|/)ray(?:-\w+)?:([^-@]+)")


def _asked_of_pip(command: str) -> list[str]:
    """Every way in which a command asks for Ray, `pip install ray` among them."""
    installs = [part for part in re.split(r"[;&|]", command) if re.search(r"\bpip3? .*install\b", part)]
    return RAY_REQUIREMENT.findall(command) + [found for part in installs for found in ANY_RAY.findall(part)]


def one_exact_ray(faults: Diagnostics, commands: Mapping[Place, str], otherwise: Place) -> None:
    """Every node must get the Ray that is installed here, from where jobs come and which is inside the pin of this project."""
    from packaging.requirements import InvalidRequirement, Requirement

    pin = next(found for found in map(Requirement, requires("lift_ray") or []) if found.name == "ray").specifier
    here = version("ray")
    found = [(place, text) for place, command in commands.items() for text in _asked_of_pip(command)]
    if not found:
        faults.add(
            otherwise, f"must install one exact Ray, but no line names one; add 'ray[default,train,tune]=={here}'"
        )
    for place, text in found:
        try:
            exact = [clause for clause in Requirement(text).specifier if clause.operator == "=="]
        except InvalidRequirement:
            exact = []
        if not exact or exact[0].version != here:
            faults.add(
                place,
                f"must install the Ray that is here, {here} (lift_ray's pin is {pin}), but got '{text}'; write "
                f"'ray[default,train,tune]=={here}'",
            )


def one_ray_image(faults: Diagnostics, place: Place, image: str, wanted: str) -> None:
    """An image of the Ray project must hold this Ray; what is in another image cannot be seen from here."""
    if (found := RAY_IMAGE.search(image)) and found[1] != wanted:
        faults.add(place, f"must hold Ray {wanted} as all nodes do, but got '{image}'; change the tag")


def loopback_only(faults: Diagnostics, commands: Mapping[Place, str]) -> None:
    """The dashboard that these commands start must listen on the head's loopback."""
    for place, command in commands.items():
        for host in re.findall(r"--dashboard-host[= ]\s*([^\s'\"]+)", command):
            if host not in ("127.0.0.1", "localhost"):
                faults.add(
                    place,
                    f"--dashboard-host must be 127.0.0.1 (whoever reaches the dashboard can run code), but got "
                    f"{host}; write 127.0.0.1 and come through SSH, `ray dashboard` for one",
                )


AUTH_MODE = re.compile(r"\bRAY_AUTH_MODE=['\"]?(\w*)|\bunset\b[^;&|]*\bRAY_AUTH_MODE\b")


def token_stays_on(faults: Diagnostics, commands: Mapping[Place, str]) -> None:
    """No command may turn Ray's token authentication off, for itself or for those after it."""
    for place, command in commands.items():
        if wrong := next((found for found in AUTH_MODE.finditer(command) if found[1] != "token"), None):
            faults.add(place, f"must keep Ray's token authentication on, but got '{wrong[0]}'; remove it")


def walk(data: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text of a file with its place."""
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from walk(value, (*place, name))
    elif isinstance(data, str):
        yield place, data


def plain_values(faults: Diagnostics) -> None:
    """Neither Ray nor kubectl fills in variables; only a shell does."""
    for place, text in walk(faults.file.data):
        in_shell = any(str(name).endswith(("_commands", "command", "args", "entrypoint")) for name in place)
        if "${" in text and not in_shell:
            faults.add(
                place,
                f"must be a plain value, but got '{text}', which neither Ray nor kubectl fills in; write the value",
            )


SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN|AccountKey=|\b(?:hf_|ghp_|github_pat_|sk-)\w{16,}|://[^/\s:@]+:[^/\s@]+@"
    r"|\b\w*(?:SECRET|PASSWORD|ACCESS_KEY|API_KEY|AUTH_TOKEN)\w*=['\"]?[^\s'\"$]",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"secret|password|access_key|api_key|auth_token$|credentials", re.IGNORECASE)


def no_secrets(faults: Diagnostics) -> None:
    """Keys and tokens do not belong in a file; what stands there is not repeated."""
    for place, text in walk(faults.file.data):
        name = str(place[-1])
        if SECRET.search(text) or (SECRET_NAME.search(name) and not text.startswith("~") and name != "secretName"):
            faults.add(
                place,
                "must hold no secret, but got what looks like one; remove it, revoke it, and let machines in by role",
            )
