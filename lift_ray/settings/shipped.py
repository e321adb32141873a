"""Space, run and cluster files that come with lift_ray, found by name.

In a checkout they are in search_spaces/ and clusters/ at its top; the wheel has copies of these folders in lift_ray/assets/.
"""

from __future__ import annotations

import os.path
from pathlib import Path

from lift_ray.errors import BadInput, did_you_mean

PACKAGE = Path(__file__).parent.parent
SPACES, CLUSTERS = "search_spaces", "clusters"
KINDS = {SPACES: "space or run file", CLUSTERS: "cluster file"}
SUFFIXES = (".yaml", ".yml", ".json", ".sh")
SCHEMA = "schema.json"


def shipped_folder(name: str) -> Path:
    """Return the folder `search_spaces` or `clusters` of the wheel, or of the checkout if this is one."""
    inside = PACKAGE / "assets" / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def shipped_files(folder: str) -> dict[str, Path]:
    """Return the files of a shipped folder by name, which is the path in it without suffix: `inat`, `recipes/inat2018/lift`."""
    home = shipped_folder(folder)
    found = [path for path in sorted(home.rglob("*")) if path.suffix in SUFFIXES and path.name != SCHEMA]
    return {path.relative_to(home).with_suffix("").as_posix(): path for path in found}


def find_space(path: str | Path) -> str:
    """Return the path of a space or run file: a shipped one for a name like `quickstart`, otherwise the path itself.

    A local file of that name wins. Raises BadInput for a name that is neither.
    """
    return _find(str(path), SPACES)


def find_cluster(path: str) -> str:
    """Return the path of a cluster file: a shipped one for a name like `aws`, otherwise the path itself. See `find_space`."""
    return _find(path, CLUSTERS)


def find_shipped(name: str, folder: str, rule: str = "must be") -> Path:
    """Return the shipped file of this name in the folder SPACES or CLUSTERS. Raises BadInput if there is none.

    Args:
        name: the name.
        folder: SPACES or CLUSTERS.
        rule: start of the rule in the error, if other values are possible too.
    """
    files = shipped_files(folder)
    if name not in files:
        near = [known for known in files if ("/" in known) == ("/" in name)]
        raise BadInput(
            name, f"{rule} the name of a {KINDS[folder]} of lift_ray", but="is not", remedy=did_you_mean(name, near)
        )
    return files[name]


def _find(path: str, folder: str) -> str:
    if Path(path).suffix in SUFFIXES or os.path.isfile(path):
        return path
    if path not in shipped_files(folder) and (os.path.exists(path) or not _could_be_name(path)):
        return path
    return str(find_shipped(path, folder, "must be a file, or"))


def _could_be_name(path: str) -> bool:
    """Return False for an empty text, an absolute path, a URL, and a path with a suffix: its own error says more."""
    return bool(path) and not Path(path).is_absolute() and ":" not in path and not Path(path).suffix
