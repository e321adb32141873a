"""Nodes compute features of frozen blocks for each other, each chunk once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from noting import chunks_in, file_of, numbers, processes_in, tell
from numpy.typing import NDArray

from lift_ray.ray_runtime.feature_exchange import LEASE_S, Chunks
from lift_ray.training import shared_features
from lift_ray.training.shared_features import SharedFeatures

Bytes = NDArray[np.uint8]


class Local:
    """An exchange in this process, with a log of what is computed and fetched.

    Args:
        chunks: what the nodes share.
        node: name of this one.
    """

    def __init__(self, chunks: Chunks, log: list[tuple[str, str, int]], node: str) -> None:
        self.chunks, self.log, self.node = chunks, log, node
        self.is_lost = False

    def choose(self, file: str, lacking: Sequence[int]) -> tuple[int, bool] | None:
        return self.chunks.choose(file, lacking)

    def fetch(self, file: str, number: int) -> Bytes | None:
        if self.is_lost:
            self.is_lost = False
            self.chunks.drop(file, number)
            return None
        self.log.append((self.node, "fetch", number))
        found: Bytes = self.chunks.reference(file, number)[0]
        return found

    def renew(self, file: str, number: int) -> None:
        self.chunks.renew(file, number)

    def give(self, file: str, number: int, data: Bytes) -> None:
        self.log.append((self.node, "give", number))
        self.chunks.give(file, number, [data])

    def drop(self, file: str, number: int) -> None:
        self.chunks.drop(file, number)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SharedFeatures]]:
    """Two nodes with folders of their own."""
    monkeypatch.setattr(shared_features, "WAIT_S", 0.01)
    chunks, log, found = Chunks(), [], []
    for name in ("one", "other"):
        monkeypatch.setenv("LIFT_CACHE", str(tmp_path / name))
        found.append(SharedFeatures(Local(chunks, log, name)))
    yield found
    for node in found:
        node.close()


def log_of(nodes: Sequence[SharedFeatures]) -> list[tuple[str, str, int]]:
    exchange = nodes[0].exchange
    assert isinstance(exchange, Local)
    return exchange.log


def assert_complete(node: SharedFeatures) -> None:
    file = file_of(node)
    assert file.is_done
    assert torch.equal(file.tensor([3], torch.float32)[:, 0], torch.arange(1000.0))


def test_chunks_are_computed_by_one_node_and_there_for_all() -> None:
    now = 0.0
    chunks = Chunks(lambda: now)
    assert [chunks.choose("a", [0, 1]) for _ in range(3)] == [(0, False), (1, False), None]
    assert chunks.choose("b", [0]) == (0, False)
    chunks.give("a", 1, ["bytes"])
    assert chunks.choose("a", [0, 1]) == (1, True)
    assert (chunks.reference("a", 1), chunks.reference("a", 0), chunks.reference("a", 7)) == (["bytes"], [], [])
    chunks.drop("a", 0)
    assert chunks.choose("a", [0]) == (0, False)
    now = LEASE_S - 1
    chunks.renew("a", 0)
    now = LEASE_S + 1
    assert chunks.choose("a", [0]) is None
    now = 3 * LEASE_S
    assert chunks.choose("a", [0]) == (0, False), "nothing was heard of it for long"


def test_two_nodes_share_the_work_and_both_have_everything(nodes: list[SharedFeatures]) -> None:
    files = [file_of(node) for node in nodes]
    barrier = threading.Barrier(2)

    def slow(chunk: range) -> Iterator[torch.Tensor]:
        barrier.wait(20)  # each computes a chunk at the same time as the other
        yield from numbers(chunk)

    threads = [threading.Thread(target=file.fill, args=(slow, tell)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    number = len(files[0].chunks)
    given = [chunk for _, what, chunk in log_of(nodes) if what == "give"]
    fetched = [chunk for _, what, chunk in log_of(nodes) if what == "fetch"]
    assert sorted(given) == sorted(fetched) == list(range(number))
    assert {node for node, what, _ in log_of(nodes) if what == "give"} == {"one", "other"}
    for node in nodes:
        assert_complete(node)


def test_a_node_that_comes_later_fetches_all(nodes: list[SharedFeatures]) -> None:
    assert file_of(nodes[0]).fill(numbers, tell)
    told: list[int] = []
    assert file_of(nodes[1]).fill(lambda chunk: pytest.fail("was there"), told.append)
    assert told[0] == 0
    assert told == sorted(told)
    assert_complete(nodes[1])


def test_a_chunk_that_is_not_finished_or_lost_is_computed_by_another_node(nodes: list[SharedFeatures]) -> None:
    def fails(chunk: range) -> Iterator[torch.Tensor]:
        raise RuntimeError("a broken image")
        yield

    with pytest.raises(RuntimeError, match="a broken image"):
        file_of(nodes[0]).fill(fails, tell)
    assert file_of(nodes[1]).fill(numbers, tell)
    exchange = nodes[0].exchange
    assert isinstance(exchange, Local)
    exchange.is_lost = True
    assert file_of(nodes[0]).fill(numbers, tell)
    assert [what for node, what, _ in log_of(nodes) if node == "one"].count("give") == 1
    for node in nodes:
        assert_complete(node)


@pytest.mark.slow
def test_two_nodes_of_a_cluster_compute_each_chunk_once(small_data: str, small_clip: str, tmp_path: Path) -> None:
    words = [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(tmp_path), small_data, small_clip]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    chunks = chunks_in(tmp_path / "chunks")
    assert chunks
    assert len(chunks) == len(set(chunks))
    assert len(processes_in(tmp_path / "chunks")) == 2
    kept = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.features")} for name in ("one", "other")
    ]
    assert kept[0] == kept[1]
    assert kept[0]
