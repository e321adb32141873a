"""The journal of a search: Optuna's records, a line of JSON each, in a file that one driver writes."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from lift_ray.errors import BadInput

Record = dict[str, Any]


class Journal(JournalStorage):
    """Optuna's storage in a file for the only driver that works on the folder (driver_lock.py makes sure of that).

    Optuna's own file lets processes share it: each record is locked, written to disk and read back on its own. A trial has a dozen.
    Here records that belong together are one write.

    Args:
        path: the file; it is made with the first record. Half a line at its end, which a killed driver left, is removed.
    """

    def __init__(self, path: Path) -> None:
        self._file = _File(repaired(path))
        super().__init__(self._file)
        # studies that may have trials whose settings are given, and that are not yet drawn
        self._may_wait = {study._study_id for study in self.get_all_studies()}

    def at_once(self) -> AbstractContextManager[None]:
        """Return a context manager: the records of its block are written when the outermost one ends."""
        return self._file.held()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As in Optuna; notes that a given trial waits."""
        if template_trial is not None and template_trial.state == TrialState.WAITING:
            self._may_wait.add(study_id)
        return super().create_new_trial(study_id, template_trial)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As in Optuna, which asks for the waiting trials at each draw: it need not look at all trials to find that none waits."""
        only_waiting = states == (TrialState.WAITING,)
        if only_waiting and study_id not in self._may_wait:
            return []
        found = super().get_all_trials(study_id, deepcopy, states)
        if only_waiting and not found:
            self._may_wait.discard(study_id)
        return found


class _File(BaseJournalBackend):
    """Records in a file. What is appended is kept until it is read, and not read back from the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_read = path, False
        self._unread: deque[Record] = deque()
        self._late: list[str] = []  # lines that are in memory and not yet on disk
        self._is_held = False

    def read_logs(self, log_number_from: int) -> Iterator[Record]:
        """Yield the records that were not read yet; at first those of the file."""
        if not self._is_read:
            self._is_read = True
            if self._path.exists():
                with self._path.open(encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        yield self._record(number, line)
        while self._unread:
            yield self._unread.popleft()

    def append_logs(self, logs: list[Record]) -> None:
        """Append records, on disk when this returns or when the block of `held` ends."""
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        if self._is_held:
            self._late += lines
        else:
            self._write(lines)  # first, so that memory is never ahead of the disk if it fails
        self._unread.extend(map(json.loads, lines))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold records back until the outermost block ends, also by an error: the storage in memory has them already."""
        if self._is_held:
            yield
            return
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            if self._late:
                self._write([])

    def _write(self, lines: Sequence[str]) -> None:
        """Write what is late and then these lines; all of them or, where that fails, none, and what is late stays so."""
        left = memoryview("".join([*self._late, *lines]).encode())
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
        self._late = []

    def _record(self, number: int, line: str) -> Record:
        try:
            record: Record = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"{self._path}, line {number}"
            raise BadInput(place, "must be a record of a search", str(error), "choose another --out") from None
        return record


def repaired(journal: Path) -> Path:
    """Remove half a line at the end, which a killed driver may have left. Requires that no other driver is running."""
    if journal.exists() and (data := journal.read_bytes()) and not data.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)
    return journal
