"""Fixtures that several test files share: a small dataset of real images, a small CLIP, Ray, and storage that fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from ports import free_ports

if TYPE_CHECKING:
    from flaky_store import Store

    from lift_ray.training.workspace import Workspace

# A busy machine misses deadlines and is slow at drawing examples; examples may share a tmp_path.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("tests", deadline=None, suppress_health_check=UNCHECKED)
settings.load_profile("tests")

TRAIN_COUNTS = (24, 18, 14, 12, 10, 8, 6, 4)
EVALUATION_COUNT = 3
SMALL_SPACE = """\
name: e2e
dataset: {data}
base:
  backbone: {{model: '{clip}'}}
  optim: {{epochs: 3, global_batch_size: 16}}
space:
  tuner.kind:       {{choices: [adaptformer, lora, linear_probe]}}
  tuner.bottleneck: {{int: [2, 16], log: true, when: {{tuner.kind: [adaptformer, lora]}}}}
  loss.tau:         {{float: [0.0, 2.0]}}
  optim.lr:         {{float: [1.0e-3, 3.0e-1], log: true}}
baselines:
  - {{name: the recipe, tuner.kind: adaptformer, tuner.bottleneck: 4, loss.tau: 1.0, optim.lr: 0.02}}
search: {{trials: 8, scheduler: {{kind: asha, grace_epochs: 1, reduction_factor: 3}}}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist (`--dist loadgroup`) one file is one group, and all files that use Ray in their own process are another."""
    on_ray = {item.path for item in items if "ray_session" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in on_ray else item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def own_share_of_the_cores() -> None:
    """Tests that run at once do not compete: torch in each of pytest-xdist's processes takes its share of the cores."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept of remote data sets does not outlive the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with 8 classes of the embedded images: 96 training, 24 validation and 24 test images."""
    import numpy as np

    from lift_ray.data.convert.shards import publish, write_split
    from lift_ray.data.open import open_dataset
    from lift_ray.data.reader import RowReader

    source = open_dataset("embedded:caltech101-lt")
    classes = np.argsort(-source.split("train").class_counts(source.num_classes), kind="stable")[: len(TRAIN_COUNTS)]
    names = [source.class_names[c] for c in classes]
    folder = str(tmp_path_factory.mktemp("small-data") / "data")
    records = {}
    for split in ("train", "validation", "test"):
        here = source.split(split)
        counts = TRAIN_COUNTS if split == "train" else [EVALUATION_COUNT] * len(classes)
        rows = [
            (row, label)
            for label, (c, n) in enumerate(zip(classes, counts, strict=True))
            for row in np.flatnonzero(here.labels == c)[:n]
        ]
        rows.sort(key=lambda pair: pair[0] * 31 % 97)  # classes mixed, as in real shards
        with RowReader(here) as reader:
            images = reader.read(np.array([row for row, _ in rows]))
        samples = [(data, f"{row}.jpg", label) for data, (row, label) in zip(images, rows, strict=True)]
        records[split] = write_split(folder, split, samples, names, rows_per_shard=50, row_group_rows=8)
    publish(folder, names, records)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP of 2 blocks at 32 px, as open_clip loads it: `local-dir:...`."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "mean": [0.48, 0.46, 0.41],
            "std": [0.27, 0.26, 0.28],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(32, vision, text)
    folder: Path = tmp_path_factory.mktemp("small-clip")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def space_file(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    """A search of eight trials on the small data, as a file."""
    path = tmp_path_factory.mktemp("space") / "e2e.yaml"
    path.write_text(SMALL_SPACE.format(data=small_data, clip=small_clip))
    return path


@pytest.fixture(scope="module")
def workspace(small_data: str) -> Workspace:
    """The small data, open in this process, and the towers that the runs of a module have loaded."""
    from lift_ray.methods.world import Ranks
    from lift_ray.training.workspace import Workspace

    return Workspace(small_data, Ranks.alone())


@pytest.fixture
def same_threads() -> Iterator[None]:
    """A verb that a test runs in this process does not change torch's threads for the tests after it."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine, started once for every test that uses it in this process; its workers can import from tests/."""
    from lift_ray.ray_runtime.session import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with connected(dashboard=False):
            yield


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket of moto's server, to be formatted with a key; it holds credentials and endpoint, as pyarrow allows."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    # pragma: allowlist nextline secret
    url = f"s3://key:secret@results/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(url.format(""))
    filesystem.create_dir("results")
    yield url
    server.stop()


@pytest.fixture
def silent_storage(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of object storage at a port where nobody listens; pyarrow tries once instead of for 6 s."""
    from pyarrow import fs

    storage = fs.S3FileSystem(
        anonymous=True,
        region="us-east-1",
        scheme="http",
        endpoint_override="127.0.0.1:9",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    monkeypatch.setattr("lift_ray.storage.output._file_system", lambda _: (storage, "bucket/x"))
    return "s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"


@pytest.fixture(scope="session")
def as_two_ranks() -> Iterator[Callable[..., None]]:
    """Call `function(rank, port, *args)` as rank 0 in this process and as rank 1 in another, which is started once."""
    import torch

    def call(function: Callable[..., None], *args: object) -> None:
        (port,) = free_ports(1)
        other = pool.submit(function, 1, port, *args)
        threads = torch.get_num_threads()
        try:
            function(0, port, *args)
        finally:
            torch.set_num_threads(threads)
        other.result(120)

    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        yield call


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """A store that fails on demand, with one data set in it: 60 images in 3 shards of 5 row groups each."""
    from flaky_store import flaky_store

    with flaky_store() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """The store, counting from zero, and an empty cache."""
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIFT_CACHE_GB", raising=False)
    server.forget()
    return server
