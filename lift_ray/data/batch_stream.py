"""The batches of a stream that processes decode: which process gets which images, and which memory they are written to."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import Draws
from lift_ray.data.dataset import Split
from lift_ray.data.decoder_process import Coming, Decoded, ImageMaker, Images, Message, Piece
from lift_ray.data.longtail import Int64s, places_of
from lift_ray.data.order import READ_AHEAD_SAMPLES

AHEAD = 3  # batches that are decoded before they are asked for
LENT = 2  # batches that the caller may hold at a time without a copy


@dataclass(frozen=True)
class Drawn:
    """One rank's samples of a step, (b,), the random numbers of their augmentation, (b, ...), and the patches that the model sees."""

    samples: Int64s
    draws: Draws
    patches: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """A stream of batches to decode.

    Args:
        split: where the images are.
        maker: what becomes of an image.
        steps: numbers of the batches.
        samples_of: returns the samples of a step, (b,).
        draw: returns what is drawn for a step.
        batch_size: most samples of a step.
    """

    split: Split
    maker: ImageMaker
    steps: range
    samples_of: Callable[[int], Int64s]
    draw: Callable[[int], Drawn]
    batch_size: int

    @property
    def read_ahead(self) -> int:
        """Number of steps whose row groups are read ahead."""
        return -(-READ_AHEAD_SAMPLES // self.batch_size)


class Division:
    """Assignment of the images of a batch to decoding processes.

    A row group stays with the processes that have read it, so that few read it twice. No process may be ahead of the mean by more than
    twice its share of a batch: what is too much for the readers of a group goes to the process with the least work.

    Args:
        number: number of processes.
    """

    def __init__(self, number: int) -> None:
        self._given = np.zeros(number)
        self._readers: dict[int, list[int]] = {}

    def divide(self, groups: Int64s) -> Int64s:
        """Return the process for each image of a batch, given its row group: (b,)."""
        given, out = self._given, np.empty(len(groups), np.int64)
        # the most that a process may have after this batch: the mean, and twice its share of a batch
        most = (given.sum() + 3 * len(groups)) / len(given)
        for group, members in places_of(groups):
            readers = self._readers.setdefault(group, [])
            for reader in readers:
                taken = members[: max(0, int(most - given[reader]))]
                out[taken], members = reader, members[len(taken) :]
                given[reader] += len(taken)
            while len(members):
                reader = int(given.argmin())
                taken = members[: max(1, int(most - given[reader]))]
                out[taken], members = reader, members[len(taken) :]
                given[reader] += len(taken)
                if reader not in readers:
                    readers.append(reader)
        return out


class BatchStream:
    """The batches of a stream between the steps that are sent and those that are taken.

    Args:
        slots: (slots, batch_size, ...), the mapped memory.
    """

    def __init__(self, number: int, work: Work, num_decoders: int, slots: Images) -> None:
        self.number, self.work, self.slots = number, work, slots
        self.is_closed, self.closed_by = False, 0
        self._num_decoders = num_decoders
        self._to_send, self._to_read = iter(work.steps), iter(work.steps)
        self._left = len(work.steps)
        self._division = Division(num_decoders)
        self._divided: dict[int, Int64s] = {}
        self._free = deque(range(len(slots)))
        self._returned: deque[int] = deque()  # by the garbage collector, which must not wait for a lock
        self._num_lent = 0
        self._sent: deque[tuple[int, int, Drawn]] = deque()  # step, slot and what was drawn, in order
        self._missing: dict[int, int] = {}  # step -> pieces that are not decoded yet
        self._faults: dict[int, tuple[int, Exception]] = {}

    @property
    def has_steps(self) -> bool:
        """True if there are batches to take."""
        return self._left > 0

    @property
    def is_ready(self) -> bool:
        """True if the next batch is decoded."""
        return not self._missing[self._sent[0][0]]

    @property
    def is_free(self) -> bool:
        """True if nobody uses its memory any more."""
        self._take_back()
        return self.is_closed and self.closed_by == self._num_decoders and not self._num_lent

    def send(self, senders: Sequence[Callable[[Message], None]]) -> None:
        """Give the next steps to the processes, as far as there are slots, and tell them what to read ahead.

        Args:
            senders: a function for each process, which sends it a message.
        """
        self._take_back()
        if self._left == len(self.work.steps):
            self._read(senders, self.work.read_ahead)
        while self._free and len(self._sent) <= AHEAD and (step := next(self._to_send, None)) is not None:
            self._read(senders, 1)
            drawn, slot, owners = self.work.draw(step), self._free.popleft(), self._divided.pop(step)
            rows = self.work.split.rows[drawn.samples]
            self._sent.append((step, slot, drawn))
            self._missing[step] = 0
            for number, send in enumerate(senders):
                mine = np.flatnonzero(owners == number)
                if len(mine):
                    self._missing[step] += 1
                    send(Piece(self.number, step, slot, rows[mine], drawn.draws[mine], mine))

    def _read(self, senders: Sequence[Callable[[Message], None]], number: int) -> None:
        """Divide further steps between the processes, which begin to read their row groups."""
        for step in islice(self._to_read, number):
            rows = self.work.split.rows[self.work.samples_of(step)]
            self._divided[step] = owners = self._division.divide(self.work.split.row_groups_of(rows))
            for index, send in enumerate(senders):
                if len(mine := rows[owners == index]):
                    send(Coming(self.number, mine))

    def note(self, answer: Decoded) -> None:
        """Take an answer of a process."""
        if answer.step in self._missing:
            self._missing[answer.step] -= 1
            if answer.fault is not None:
                self._faults[answer.step] = min(
                    self._faults.get(answer.step, answer.fault), answer.fault, key=lambda f: f[0]
                )

    def taken(self) -> tuple[Drawn, Tensor]:
        """Return the next step and its images. Raises the error of its first image that could not be decoded."""
        step, slot, drawn = self._sent.popleft()
        del self._missing[step]
        self._left -= 1
        if fault := self._faults.pop(step, None):
            raise fault[1] from None
        images = self.slots[slot][: len(drawn.samples)]
        self._take_back()
        if self._num_lent >= LENT:
            self._free.append(slot)
            return drawn, torch.from_numpy(images.copy())
        self._num_lent += 1
        weakref.finalize(images, self._returned.append, slot).atexit = False
        return drawn, torch.from_numpy(images)

    def _take_back(self) -> None:
        """Take back the slots whose images nobody refers to any more."""
        while self._returned:
            self._free.append(self._returned.popleft())
            self._num_lent -= 1
