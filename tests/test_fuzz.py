"""Mutated files of every kind that users bring: no traceback, no abort, no memory or time beyond a bound.

`make test` tries 500 inputs, always the same; `make fuzz` 10,000 random ones (FUZZ_INPUTS sets another number).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from deep_images import png16, tiff
from embedded import jpegs
from fuzz_targets import HANGS_S, TARGETS, TOWER, Reply, add_tower, serve
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from lift_ray.data.open import schema_metadata
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RECORD, WEIGHTS
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

ROOT = Path(__file__).parent.parent
INPUTS = int(os.environ.get("FUZZ_INPUTS", "0"))  # 0: few, and always the same
MOST_BYTES = 2**29
MOST_S = 30.0
SHARES = {"image": 0.5, "parquet": 0.14, "csv": 0.1, "settings": 0.08, "record": 0.05, "weights": 0.03, "http": 0.1}
WORDS = [
    b"",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xd8\xff\xe1",
    b"null",
    b"-1",
    b"1e999",
    b".nan",
    b"{}",
    b"[]",
    b"[" * 3000,
    b"'",
    b'"',
    b"\n",
    b"\r\n",
    b",",
    b": ",
    b"\t",
    b"&a [*a]",
    b"!!python/object/apply:os.abort []",
    "\u202e\u0301".encode(),
    b"\xc3",
    b"\x1b[2J",
    b"9" * 5000,
    b"../../../etc/passwd",
    b"%s%n",
]
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 60},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "WEBP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
    "EPS": {},
    "ICO": {},
    "JPEG2000": {},
}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@cache
def images() -> list[bytes]:
    """Return small images of every format, with metadata, palettes, pages and unusual depths."""
    photo = Image.open(io.BytesIO(jpegs()[0])).convert("RGB").resize((40, 31))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a fox"
    gray = Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))
    return [
        *(encoded(photo, kind, **options) for kind, options in FORMATS.items()),
        encoded(photo, "JPEG", progressive=True, exif=exif),
        encoded(photo, "PNG", exif=exif),
        encoded(photo, "TIFF", compression="jpeg"),
        encoded(photo, "TIFF", save_all=True, append_images=[photo, photo]),
        encoded(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
        encoded(photo, "WEBP", lossless=True, exif=exif),
        encoded(photo.convert("CMYK"), "JPEG"),
        encoded(photo.convert("L"), "JPEG"),
        encoded(photo.convert("P"), "PNG", transparency=3),
        encoded(photo.convert("RGBA"), "PNG"),
        encoded(photo.convert("1"), "TIFF", compression="group4"),
        encoded(gray, "PNG"),
        encoded(gray, "TIFF"),
        encoded(Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)), "TIFF"),
        *(png16(np.stack([gray] * channels, -1)) for channels in (2, 3, 4)),
        *(tiff(np.stack([gray] * 4, -1), extra=extra, deflate=extra == 1) for extra in (1, 2)),
        b"P5 40 30 60000\n" + np.asarray(gray).astype(">u2").tobytes(),
        b"P3 20 20 60000 # plain\n" + b" ".join(b"%d" % value for value in np.asarray(gray).ravel()),
    ]


@cache
def shards() -> list[bytes]:
    """Return Parquet files in the format of Hugging Face datasets, of a few kinds."""
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images()[:4])]
    table = pa.table({"image": rows, "label": pa.array([0, 1, 0, 1])})
    table = table.replace_schema_metadata(schema_metadata(("cat", "dog")))
    plain = pa.table({"image": [row["bytes"] for row in rows], "label": ["a", "b", "a", "b"]})
    named = [{"bytes": None, "path": path} for path in ("train-00000-of-00001.parquet", "/dev/zero", "1.png")]
    files = table.set_column(0, "image", pa.array([rows[0], *named], table.schema.field("image").type))
    out = []
    for each, options in ((table, {}), (table, {"row_group_size": 2, "compression": "zstd"}), (plain, {}), (files, {})):
        file = io.BytesIO()
        pq.write_table(each, file, **options)
        out.append(file.getvalue())
    return out


@cache
def tensors() -> list[bytes]:
    """Return weights of the fuzzed tower, as safetensors and as a pickle of torch."""
    add_tower()
    state = {name: value.contiguous() for name, value in open_clip.create_model(TOWER).state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    return [safetensors.torch.save(state), file.getvalue()]


YAML_FILES = (
    "search_spaces/tau.yaml",
    "search_spaces/inat.yaml",
    "search_spaces/ulfine.yaml",
    "clusters/onprem.yaml",
    "clusters/aws.yaml",
    "clusters/kuberay/raycluster.yaml",
    "clusters/monitoring/prometheus.yml",
)
CSV = [
    b"path,label\na/1.jpg,cat\na/2.jpg,dog\nb/3.jpg,cat\nb/4.jpg,dog\n",
    "\ufeffimage;class;split\n1.jpg;K\u00e4fer;train\n2.jpg;Ameise;test\n3.jpg;K\u00e4fer;val\n".encode(),
    b'file\tcategory\n"a\nb.png"\t0\nc.png\t1\nd.png\t1\n',
]


@pytest.fixture(scope="module")
def checkpoint(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small CLIP before its first step."""
    config = {
        "backbone": {"model": small_clip},
        "tuner": {"kind": "linear_probe"},
        "head": {"init": "random"},
        "optim": {"epochs": 1, "global_batch_size": 16},
    }
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone()))
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    run.save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(checkpoint: Path) -> dict[str, list[bytes]]:
    """Valid inputs of every target."""
    return {
        "image": images(),
        "parquet": shards(),
        "csv": CSV,
        "settings": [(ROOT / file).read_bytes() for file in YAML_FILES],
        "record": [(checkpoint / RECORD).read_bytes()],
        "weights": [*tensors(), (checkpoint / WEIGHTS).read_bytes(), b"version https://git-lfs"],
        "http": [b"/predict?top=2 image/png\n" + data for data in images()[:8]] + [b"/health \n", b"/ text/html\nx"],
    }


class Victim:
    """A child process that runs targets, started again when it has ended."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint, self._process = checkpoint, None
        self.replies: list[tuple[str, Reply]] = []

    def __call__(self, name: str, data: bytes) -> Reply:
        if self._process is None:
            self._start()
        self._pipe.send((name, data))
        try:
            assert self._pipe.poll(2 * HANGS_S), "no answer"
            reply: Reply = self._pipe.recv()
        except EOFError:
            process, self._process = self._process, None
            process.join()
            pytest.fail(f"the process ended with {process.exitcode} (-14: too slow) on {name} {data[:200]!r}")
        self.replies.append((name, reply))
        return reply

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._checkpoint), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(240)
        assert self._pipe.recv() == "ready"

    def stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(30)
            self._process.kill()


@pytest.fixture(scope="module")
def victim(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Victim]:
    """The process that runs the targets; at the end a line for each says what was tried."""
    found = Victim(checkpoint)
    yield found
    found.stop()
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    for name in SHARES:
        replies = [reply for target, reply in found.replies if target == name]
        if replies and INPUTS and reporter is not None:
            slowest, most = max(reply.seconds for reply in replies), max(reply.num_bytes for reply in replies)
            errors = sum(bool(reply.error) for reply in replies)
            line = (
                f"{name}: {len(replies):,} inputs, {errors} tracebacks, slowest {slowest:.2f} s, {most / 2**20:.0f} MiB"
            )
            reporter.write_line(line)


@st.composite
def mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Draw a valid input and change it in one to four places; the checksums of a PNG may be made valid again."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        # half of the places are close to an end, where headers and footers are
        near = draw(st.integers(0, 80))
        places = [near, len(data) - near, draw(st.integers(0, max(0, len(data) - 1)))]
        at = min(max(0, draw(st.sampled_from(places))), len(data))
        kind = draw(st.sampled_from(["flip", "set", "cut", "end", "insert", "replace", "repeat", "splice"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "end":
            del data[at:]
        elif kind in ("insert", "replace"):
            word = draw(st.sampled_from(WORDS))
            data[at : at + (len(word) if kind == "replace" else 0)] = word
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 60))
        elif kind == "splice":
            other = draw(st.sampled_from(valid))
            data[at : at + length] = other[at : at + length]
    return with_checksums(bytes(data)) if draw(st.booleans()) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """Return a PNG with valid checksums, so that the decoder gets to the mutated content; other data unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        [length] = struct.unpack(">I", data[at : at + 4])
        chunk = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + length
    return bytes(out + data[at:])


@pytest.mark.parametrize("name", SHARES)
def test_mutated_inputs_are_read_or_refused_in_words(victim: Victim, corpus: dict[str, list[bytes]], name: str) -> None:
    for data in corpus[name]:
        assert victim(name, data).error == ""

    @settings(
        max_examples=max(1, round(SHARES[name] * (INPUTS or 500))),
        derandomize=not INPUTS,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(corpus[name]))
    def tried(data: bytes) -> None:
        reply = victim(name, data)
        assert reply.error == ""
        assert reply.seconds < MOST_S
        assert reply.num_bytes < MOST_BYTES

    tried()


def test_every_target_has_a_share_of_the_inputs() -> None:
    assert SHARES.keys() == TARGETS.keys()
    assert sum(SHARES.values()) == pytest.approx(1)
