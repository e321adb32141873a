"""Every module loads where there is nothing of POSIX, and features of Windows' kind of file system are used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "lift_ray").rglob("*.py")
    if path.stem != "__main__"
)
ONLY_POSIX = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog")
NAMES = (
    "getuid",
    "geteuid",
    "getgid",
    "uname",
    "fork",
    "killpg",
    "pread",
    "pwrite",
    "sched_getaffinity",
    "mkfifo",
    "sysconf",
)
IMPORT_ALL = f"""
import importlib, os, sys, types
# What lift_ray imports may use POSIX, and has its own way on Windows. It is loaded before, so that the rest meets none.
for name in ("filelock", "optuna", "ray", "ray.tune", "ray.train", "ray.train.torch", "ray.serve", "torch", "torchvision",
             "torchcodec", "open_clip", "pandas", "pyarrow", "pyarrow.dataset", "fsspec", "requests", "rich.console",
             "rich.progress", "typer", "starlette.applications", "tensorboardX", "multiprocessing.pool", "psutil", "timm",
             "optuna.importance", "torch.distributed", "concurrent.futures.process"):
    importlib.import_module(name)
for name in {ONLY_POSIX}:
    sys.modules[name] = None
for name in {NAMES}:
    delattr(os, name)
for name in {MODULES}:
    importlib.import_module(name)
print(len([name for name in sys.modules if name.startswith("lift_ray")]))
"""


def test_every_module_loads_without_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[-2000:] if done.returncode else "") == (0, "")
    assert int(done.stdout.split()[-1]) >= len(MODULES)


def test_no_module_of_ours_names_a_library_of_posix() -> None:
    """The test above would miss an import inside a function."""
    found = re.compile(rf"^ *(?:import|from) (?:{'|'.join(ONLY_POSIX)})\b", re.MULTILINE)
    assert found.search("    import pwd\n")
    assert [path.name for path in (ROOT / "lift_ray").rglob("*.py") if found.search(path.read_text())] == []


def test_slots_share_features_where_users_have_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lift_ray.training.shared_features import SharedFeatures, chunks_of, root_folder

    monkeypatch.setenv("LIFT_CACHE", str(tmp_path))
    for name in NAMES:
        monkeypatch.delattr(os, name)
    assert root_folder() == tmp_path / "lift_ray-features"
    shared = SharedFeatures()
    chunks = chunks_of(600, 8)
    file = shared.file("train", chunks, 3 * 4, 1e9)
    assert file is not None
    images = torch.arange(1800.0).view(600, 3)
    assert file.fill(lambda chunk: [images[chunk.start : chunk.stop]], lambda number: None)
    assert torch.equal(file.tensor((3,), torch.float32), images)
    shared.close()


def test_a_lock_that_nobody_else_may_read_or_write_still_says_that_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lift_ray.errors import BadInput
    from lift_ray.searching.driver_lock import alone_in
    from lift_ray.storage.output import Output

    def denied(self: Path, *args: Any, **options: Any) -> str:
        raise PermissionError(
            13, "Permission denied", str(self)
        )  # of Windows, for the bytes that another handle has locked

    monkeypatch.setattr(Path, "read_text", denied)
    monkeypatch.setattr(Path, "write_text", denied)
    out = Output(str(tmp_path))
    with alone_in(out):
        with pytest.raises(BadInput) as caught, alone_in(out):
            pass
        assert "must have one driver, but another process is working on it" in str(caught.value)
    with alone_in(out):
        pass


def test_the_journal_needs_no_symbolic_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows lets only administrators make one."""
    import optuna

    from lift_ray.searching import study

    monkeypatch.delattr(os, "symlink")
    made = optuna.create_study(storage=study.open_storage(None, tmp_path), study_name="x")
    made.tell(made.ask(), 1.0)
    again = optuna.load_study(storage=study.open_storage(None, tmp_path), study_name="x")
    assert [trial.value for trial in again.trials] == [1.0]
