"""Processes that decode images for this one, into memory that all of them map.

Decoding in threads of a training process makes them and the training thread wait for each other's interpreter lock. These processes
read row groups, decode and augment; this one hands out work and waits, and does nothing per image. The memory is an anonymous file,
which the kernel frees when the last process that holds it ends, so nothing can leak. A process that dies is replaced, and its work is
given to the new one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import ALLOCATIONGRANULARITY
from multiprocessing.connection import Connection, wait
from typing import IO

import numpy as np
from torch import Tensor

from lift_ray.data.batch_stream import AHEAD, LENT, BatchStream, Drawn, Work
from lift_ray.data.decoder_process import Closed, Decoded, Message, Opened, Piece, mapped
from lift_ray.errors import RunFailed, one_line

MOST_DEATHS = 3  # of a process in a row, without a finished piece in between
CAN_START = os.name == "posix"  # Windows cannot pass an open file to a program that it starts


class _Decoder:
    """One process: its socket, and the work that it has not answered yet."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.opened: dict[int, Opened | None] = {}  # by stream; None: the stream is closed, and the answer is to come
        self.pieces: dict[tuple[int, int], Piece] = {}  # by stream and step
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # signals that reach the whole group are for the training process, which closes the socket when it ends
            code = (
                "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from lift_ray.data.decoder_process import main; main({theirs.fileno()}, {self._file})"
            )
            one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self._file),
                    env={**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""},
                )
            except OSError as error:
                ours.close()
                raise _cannot_start(error) from None
        self.connection = Connection(ours.detach())

    def send(self, message: Message) -> None:
        """Send a message. If the process has died, `receive` finds out and repeats what is open."""
        if isinstance(message, Opened):
            self.opened[message.stream] = message
        elif isinstance(message, Piece):
            self.pieces[message.stream, message.step] = message
        elif isinstance(message, Closed):
            self.opened[message.stream] = None
            self.pieces = {key: piece for key, piece in self.pieces.items() if key[0] != message.stream}
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Message | None:
        """Return an answer; None if the process has died and was replaced. Raises RunFailed if that happens again and again."""
        try:
            answer: Message = self.connection.recv()
        except (EOFError, OSError):
            self._replace()
            return None
        if isinstance(answer, Decoded):
            self.deaths = 0
            self.pieces.pop((answer.stream, answer.step), None)
        return answer

    def _replace(self) -> None:
        self.connection.close()
        code, self.deaths = self.process.wait(), self.deaths + 1
        self._start()
        with suppress(OSError):
            for stream, opened in self.opened.items():
                self.connection.send(opened or Closed(stream))
            for piece in self.pieces.values() if self.deaths < MOST_DEATHS else ():
                self.connection.send(piece)
        if self.deaths == MOST_DEATHS:
            self.deaths = 0  # another run may use this process
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise RunFailed(
                f"a process that decodes images ended {how} {MOST_DEATHS} times{self._where()}; give the worker more memory, "
                "or set optim.decode_processes=0 to decode in threads"
            )

    def _where(self) -> str:
        """Return where the oldest piece of work begins, if there is any."""
        for piece in self.pieces.values():
            if (opened := self.opened[piece.stream]) is not None:
                return f", last at row {piece.rows[0]} of {opened.split} or after it"
        return ""

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class DecoderPool:
    """Processes that decode for this one. They start with the first stream, or with `start`, and are used by one stream after another
    or by several at once.

    Args:
        number: number of processes.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._decoders: list[_Decoder] = []
        self._file: IO[bytes] | None = None
        self._regions: dict[int, tuple[int, int]] = {}  # number of a stream -> offset and bytes in the file
        self._streams: dict[int, BatchStream] = {}
        self._last = 0
        self._lock = threading.RLock()
        self._end: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Start the processes, if there are none yet, and return at once."""
        with self._lock:
            if not self._decoders:
                self._file = _anonymous_file()
                self._decoders = [_Decoder(self._file.fileno()) for _ in range(self.number)]
                self._end = weakref.finalize(self, _close, self._decoders, self._file)

    def close(self) -> None:
        """End the processes, as the garbage collector does too. Batches that were handed out stay valid."""
        with self._lock:
            self._end()
            self._decoders, self._file = [], None
            self._regions.clear()
            self._streams.clear()

    def decode(self, work: Work, cache_bytes: int) -> Iterator[tuple[Drawn, Tensor]]:
        """Yield what was drawn for each step and its images, in order: (b, *maker.shape) uint8.

        A batch is memory that the processes write again when the caller no longer refers to it. If the caller keeps more than LENT
        of them, it gets copies.

        Args:
            cache_bytes: limit of the encoded images in memory, in all processes together about twice that.

        Raises BadInput for an image or a shard that cannot be read, RunFailed if a process dies again and again.
        """
        with self._lock:
            try:
                self.start()
                stream = self._opened(work, cache_bytes)
            except OSError as error:
                raise _cannot_start(error) from None
        try:
            while stream.has_steps:
                with self._lock:
                    if stream.number not in self._streams:
                        raise RuntimeError("the pool was closed while a stream was read")
                    stream.send([decoder.send for decoder in self._decoders])
                    while not stream.is_ready:
                        self._receive()
                    got = stream.taken()
                yield got
        finally:
            with self._lock:
                for decoder in self._decoders:
                    decoder.send(Closed(stream.number))
                stream.is_closed = True

    def _opened(self, work: Work, cache_bytes: int) -> BatchStream:
        self._receive(0)  # the ends of earlier streams, whose memory is then free
        slots, self._last = AHEAD + 1 + LENT, self._last + 1
        shape = (slots, work.batch_size, *work.maker.shape)
        offset = self._place(self._last, int(np.prod(shape)))
        assert self._file is not None
        stream = BatchStream(self._last, work, self.number, mapped(self._file.fileno(), offset, shape))
        self._streams[stream.number] = stream
        split = work.split
        # a process reads the row groups of its own images, and some that others read too
        cache_bytes = min(cache_bytes, 2 * cache_bytes // self.number)
        opened = Opened(
            stream.number,
            split.shards,
            split.image_column,
            split.name,
            work.maker,
            offset,
            slots,
            work.batch_size,
            cache_bytes,
        )
        for decoder in self._decoders:
            decoder.send(opened)
        return stream

    def _place(self, number: int, num_bytes: int) -> int:
        """Return the offset of free memory in the file, which grows if there is not enough."""
        assert self._file is not None
        for old in [old for old, stream in self._streams.items() if stream.is_free]:
            del self._streams[old], self._regions[old]
        num_bytes = -(-num_bytes // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
        if not self._regions:  # what earlier streams wrote goes back to the system
            self._file.truncate(0)
        at = 0
        for offset, length in sorted(self._regions.values()):
            if offset - at >= num_bytes:
                break
            at = offset + length
        self._regions[number] = at, num_bytes
        self._file.truncate(max(offset + length for offset, length in self._regions.values()))
        return at

    def _receive(self, timeout_s: float | None = None) -> None:
        """Wait for answers, and take all that are there."""
        connections = {decoder.connection: decoder for decoder in self._decoders}
        for connection in wait(list(connections), timeout_s):
            decoder = connections[connection]  # type: ignore[index]
            answer = decoder.receive()
            stream = None if answer is None else self._streams.get(answer.stream)
            if stream is None:
                continue
            if isinstance(answer, Closed):
                decoder.opened.pop(answer.stream, None)
                stream.closed_by += 1
            elif isinstance(answer, Decoded):
                stream.note(answer)


def _cannot_start(error: OSError) -> RunFailed:
    return RunFailed(
        f"processes that decode images cannot start: {one_line(error)}; set optim.decode_processes=0 to decode in threads"
    )


def _close(decoders: list[_Decoder], file: IO[bytes]) -> None:
    for decoder in decoders:
        decoder.connection.close()  # all of them end at the same time
    for decoder in decoders:
        decoder.close()
    file.close()


def _anonymous_file() -> IO[bytes]:
    """Return a file in memory without a name; where there is none, a temporary file that is removed already."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("lift-decoded"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
