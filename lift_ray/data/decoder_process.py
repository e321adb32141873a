"""A process that decodes images for a training process, into memory that both have mapped (`decoder_pool.py` starts it).

It reads row groups itself, so the training process does nothing per image. It works on a few images at a time and looks at its
messages in between, so it stops soon when a stream is closed. It ends when the training process does, however that ends, because the
socket between them then closes.
"""

from __future__ import annotations

import mmap
import os
import traceback
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lift_ray.data.augment import Draws
from lift_ray.data.bad_image import BadImage, NeedsWindow, RequiresExtra
from lift_ray.data.bit_depth import WINDOWS
from lift_ray.data.dataset import Shard, Split
from lift_ray.data.decode import Pixels
from lift_ray.data.longtail import Int64s
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, one_line

PIECE = 8  # images that are decoded at a time
MOST_READERS = 3  # training, validation and test

Images = NDArray[np.uint8]


class ImageMaker(Protocol):
    """Turns an encoded image into the input of a model.

    Attributes:
        shape: of an input, channels first.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def image(self, encoded: bytes, draw: Draws) -> Pixels:
        """Return the input with channels last, uint8. Raises BadImage.

        Args:
            draw: random numbers in [0, 1) that decide the augmentation.
        """


@dataclass(frozen=True)
class Opened:
    """A stream of batches begins.

    Args:
        stream: its number.
        offset, slots: its memory in the shared file: `slots` batches of `batch_size` images.
        cache_bytes: limit of the encoded images that this process keeps.
    """

    stream: int
    shards: tuple[Shard, ...]
    image_column: str
    split: str
    maker: ImageMaker
    offset: int
    slots: int
    batch_size: int
    cache_bytes: int


@dataclass(frozen=True)
class Coming:
    """Rows that will be decoded later: their row groups are read ahead."""

    stream: int
    rows: Int64s


@dataclass(frozen=True)
class Piece:
    """Images to decode: rows (n,), their random numbers (n, ...), and their places (n,) in the batch of a slot."""

    stream: int
    step: int
    slot: int
    rows: Int64s
    draws: Draws
    places: Int64s


@dataclass(frozen=True)
class Closed:
    """A stream ends. The process drops its remaining work and answers with the same message."""

    stream: int


@dataclass(frozen=True)
class Decoded:
    """A piece is in its slot; or the first image, by its place in the batch, that could not be decoded, and why."""

    stream: int
    step: int
    fault: tuple[int, Exception] | None


Message = Opened | Coming | Piece | Closed | Decoded


def decode_piece(
    split: Split,
    maker: ImageMaker,
    encoded: Sequence[bytes],
    rows: Int64s,
    draws: Draws,
    out: Images,
    at: range,
    places: Int64s,
) -> tuple[int, BadInput] | None:
    """Decode the images number `at` of a batch into their places.

    Returns the place of the first image that cannot be decoded, and the error; None if there is none.
    """
    for index in at:
        place = int(places[index])
        try:
            out[place] = np.moveaxis(maker.image(encoded[index], draws[index]), -1, -3)
        except BadImage as error:
            return place, broken_image(split, int(rows[index]), error)
    return None


def broken_image(split: Split, row: int, error: BadImage) -> BadInput:
    """Return the error for an image that cannot be decoded. `convert` decodes with the same code and would refuse it too."""
    where, place = split.shards[0].url.rsplit("/", 1)[0], f"row {row} of {split.name}"
    if isinstance(error, NeedsWindow):
        return BadInput(where, f"{place} must be an 8-bit image", error.seen, f"convert it with --window {WINDOWS}")
    remedy = "install it" if isinstance(error, RequiresExtra) else "convert again with --skip-bad"
    return BadInput(where, f"{place} must be a readable image", one_line(error), remedy)


class _Readers:
    """Readers of the last few splits: footers and row groups that were read stay from one stream to the next."""

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[Any, ...], RowReader] = OrderedDict()

    def of(self, split: Split, cache_bytes: int) -> RowReader:
        """Return the reader of a split. The one that was least recently asked for may be closed, and then starts from scratch."""
        key = split.name, split.shards, split.image_column
        reader = self._readers.pop(key, None) or RowReader(split, cache_bytes)
        self._readers[key], reader.cache_bytes = reader, cache_bytes
        if len(self._readers) > MOST_READERS:
            self._readers.popitem(last=False)[1].close()
        return reader


class _OpenStream:
    """The reader and the mapped slots of a stream."""

    def __init__(self, opened: Opened, file: int, readers: _Readers) -> None:
        nothing = np.empty(0, np.int64)
        self.split = Split(opened.split, opened.shards, nothing, nothing, opened.image_column)
        self.maker, self.reader = opened.maker, readers.of(self.split, opened.cache_bytes)
        shape = (opened.slots, opened.batch_size, *opened.maker.shape)
        self.slots = mapped(file, opened.offset, shape)


class _PieceInWork:
    """Progress of a piece: how many of its images are decoded."""

    def __init__(self, piece: Piece) -> None:
        self.piece, self.at = piece, 0
        self.encoded: list[bytes] | None = None

    def advance(self, stream: _OpenStream) -> Decoded | None:
        """Decode a few images. Returns the answer when all are decoded or one could not be."""
        piece = self.piece
        try:
            if self.encoded is None:
                self.encoded = stream.reader.read_rows(piece.rows)
            some = range(self.at, min(self.at + PIECE, len(piece.rows)))
            slot = stream.slots[piece.slot]
            found: tuple[int, Exception] | None = decode_piece(
                stream.split, stream.maker, self.encoded, piece.rows, piece.draws, slot, some, piece.places
            )
        except BadInput as error:
            found = (-1, error)
        except Exception:
            found = (-1, RuntimeError(f"a process that decodes images failed:\n{traceback.format_exc()}"))
        else:
            self.at = some.stop
            if found is None and self.at < len(piece.rows):
                return None
        return Decoded(piece.stream, piece.step, found)


def mapped(file: int, offset: int, shape: tuple[int, ...]) -> Images:
    """Return a part of a file as an array that all processes see."""
    memory = mmap.mmap(file, int(np.prod(shape)), offset=offset)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def serve(connection: Connection, file: int) -> None:
    """Answer messages until the other end is closed."""
    streams: dict[int, _OpenStream] = {}
    waiting: deque[_PieceInWork] = deque()
    readers = _Readers()
    while True:
        if connection.poll(0 if waiting else None):
            message: Any = connection.recv()
            if isinstance(message, Opened):
                streams[message.stream] = _OpenStream(message, file, readers)
            elif isinstance(message, Coming):
                streams[message.stream].reader.prefetch_rows(message.rows)
            elif isinstance(message, Piece):
                waiting.append(_PieceInWork(message))
            elif isinstance(message, Closed):
                streams.pop(message.stream, None)
                waiting = deque(work for work in waiting if work.piece.stream != message.stream)
                connection.send(message)
        elif (answer := waiting[0].advance(streams[waiting[0].piece.stream])) is not None:
            waiting.popleft()
            connection.send(answer)


def main(connection: int, file: int) -> None:
    """Serve at the socket with this number, with the shared file of that number."""
    import torch

    torch.set_num_threads(1)
    try:
        serve(Connection(connection), file)
    except (EOFError, ConnectionError):  # the training process has ended
        os._exit(0)
