"""The Dockerfiles, read and not built: no machine of the tests has a Docker daemon."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
every_file = pytest.mark.parametrize("name", ["cpu", "cuda"])


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and their arguments, in order."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    found = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word, rest) for word, rest in found]


@every_file
def test_every_base_has_a_pinned_tag(name: str) -> None:
    bases = [rest.split()[0] for word, rest in instructions(name) if word == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base)
    assert bases[1].startswith("nvidia/cuda:" if name == "cuda" else "python:")


@every_file
def test_everything_that_is_copied_exists(name: str) -> None:
    stages = {rest.split(" AS ")[1] for word, rest in instructions(name) if word == "FROM" and " AS " in rest}
    copied = [shlex.split(rest) for word, rest in instructions(name) if word == "COPY"]
    assert ["docker/constraints.txt", "/tmp/constraints.txt"] in copied
    for words in copied:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in words[:-1])


@every_file
def test_the_wheel_gets_every_folder_that_pyproject_puts_into_it(name: str) -> None:
    copied = {source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "lift_ray", "search_spaces", "clusters"} <= copied


@every_file
def test_the_image_runs_as_a_user_without_an_entrypoint_and_with_the_constraints(name: str) -> None:
    of_image = instructions(name)
    of_image = of_image[max(i for i, (word, _) in enumerate(of_image) if word == "FROM") :]
    assert [rest for word, rest in of_image if word == "USER"] == ["lift"]
    assert "ENTRYPOINT" not in [word for word, _ in of_image]
    last = [word for word, _ in of_image]
    pip = [i for i, (word, rest) in enumerate(of_image) if word == "RUN" and "pip install" in rest]
    assert pip
    assert all(i > last.index("USER") for i in pip)
    for i in pip:
        for command in of_image[i][1].split("&&"):
            assert "--constraint /tmp/constraints.txt" in command or "pip install" not in command
    assert "lift_ray.ray_runtime.patches" in of_image[pip[-1]][1]


@every_file
def test_a_login_shell_finds_ray_too(name: str) -> None:
    """/etc/profile sets PATH anew, so ENV alone is lost there."""
    of_image = instructions(name)
    assert ("ENV", "HOME=/home/lift PATH=/opt/lift/bin:$PATH") in of_image
    assert any("'export PATH=/opt/lift/bin:$PATH' > /etc/profile.d/lift.sh" in rest for _, rest in of_image)


@every_file
def test_the_user_can_read_the_token_that_ray_up_mounts(name: str) -> None:
    """Ray mounts it below HOME of the image's ENV, or else /root; it belongs to the host's user, mostly number 1000, alone."""
    of_image = instructions(name)
    assert any(word == "ENV" and "HOME=/home/lift" in rest.split() for word, rest in of_image)
    assert ("ARG", "UID=1000") in of_image
    (user,) = (rest for word, rest in of_image if word == "RUN" and "useradd" in rest)
    assert "--uid $UID lift" in user
    assert "install -d -o lift -g lift -m 700 /home/lift/.ray" in user  # Docker would make the folder for root
    assert ("userdel ubuntu" in user) == (name == "cuda")  # Ubuntu 24.04 gives number 1000 to its own user
