"""Where the files of a search go: a folder, or object storage by way of a local copy."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pyarrow import ArrowException, fs

from lift_ray.errors import BadInput, RunFailed


class Output:
    """The result folder of a search.

    Everything is written to `folder`; for a URL (s3://, gs://) that is a local copy, which `publish` uploads.

    Args:
        where: a path, or a URL that pyarrow knows.

    Raises:
        BadInput: an unknown kind of URL, or storage that does not answer.
    """

    def __init__(self, where: str) -> None:
        self._remote: tuple[fs.FileSystem, str] | None = None
        if "://" not in where:
            self.folder = Path(where).absolute()
            self.url = str(self.folder)
            return
        self.url = where
        try:
            self._remote = fs.FileSystem.from_uri(where)
        except (ArrowException, ValueError, OSError) as error:
            raise BadInput(
                f"--out: must be a folder or a URL of object storage, but got {where} "
                f"({' '.join(str(error).split())}); try s3://bucket/folder"
            ) from None
        self.folder = Path(tempfile.mkdtemp(prefix="lift_ray-"))

    def must_be_new(self) -> None:
        """Make the folder. Raises BadInput when it already holds a search."""
        for name in ("study.json", "optuna.journal"):
            if self._holds(name):
                raise BadInput(
                    f"{self.url}: must be a new folder, but it holds a search already; give another --out, or delete it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Upload what is new or changed; nothing to do for a local folder. Raises RunFailed when the storage refuses."""
        if self._remote is None:
            return
        filesystem, path = self._remote
        try:
            fs.copy_files(
                str(self.folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem
            )
        except (ArrowException, OSError) as error:
            raise RunFailed(
                f"{self.url}: must take the results, but: {' '.join(str(error).split())}; they are in {self.folder}"
            ) from None

    def _holds(self, name: str) -> bool:
        if self._remote is None:
            return (self.folder / name).exists()
        filesystem, path = self._remote
        try:
            return bool(filesystem.get_file_info(f"{path}/{name}").type != fs.FileType.NotFound)
        except (ArrowException, OSError) as error:
            raise BadInput(
                f"--out: must be storage that answers, but {self.url} says: {' '.join(str(error).split())}; "
                "check bucket, region and credentials"
            ) from None

    def __str__(self) -> str:
        """As the user would type it."""
        if self._remote is None and self.folder.is_relative_to(Path.cwd()):
            return str(self.folder.relative_to(Path.cwd()))
        return self.url
