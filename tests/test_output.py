"""Results on object storage, over the real S3 protocol (moto's server on loopback)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from lift_ray import tune
from lift_ray.errors import BadInput
from lift_ray.storage.output import Output

SPACE = """\
name: remote
dataset: {data}
base:
  backbone: {{model: '{clip}'}}
  optim: {{epochs: 2, global_batch_size: 16}}
space: {{optim.lr: {{float: [1.0e-3, 1.0e-1], log: true}}}}
baselines: [{{optim.lr: 0.02}}]
search: {{trials: 3}}
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket; credentials and endpoint are in it, as pyarrow allows."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    # pragma: allowlist nextline secret
    url = f"s3://key:secret@results/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(url.format(""))
    filesystem.create_dir("results")
    yield url
    server.stop()


def test_a_search_can_write_to_object_storage(
    bucket: str, small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    space, url = tmp_path / "space.yaml", bucket.format("study")
    space.write_text(SPACE.format(data=small_data, clip=small_clip))
    assert not tune.main([str(space), "--out", url])
    filesystem, path = fs.FileSystem.from_uri(url)
    there = {
        info.path.removeprefix(path + "/") for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    }
    assert {
        "study.json",
        "trials.parquet",
        "trials.csv",
        "best.yaml",
        "best/weights.safetensors",
        "optuna.journal",
    } <= there
    study = json.loads(filesystem.open_input_stream(f"{path}/study.json").read())
    assert "best found" in [row["label"] for row in study["compared"]]
    with pytest.raises(BadInput, match="must be a new folder, but it already contains a search"):
        tune.main([str(space), "--out", url])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nonsense://bucket/x", "--out: must be a folder or a URL of object storage, but got nonsense://bucket/x ("),
        (
            "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http",
            "--out: must be reachable storage, but s3://bucket/x",
        ),
    ],
)
def test_storage_that_is_not_there_is_bad_input(where: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        Output(where).holds("study.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_a_folder_is_removed_with_what_is_in_it_and_one_that_is_not_there_is_no_fault(
    where: str, bucket: str, tmp_path: Path
) -> None:
    out = Output(bucket.format("removing") if where == "bucket" else str(tmp_path))
    for name in ("one", "two"):
        with out.staged(f"checkpoints/{name}", last="end") as folder:
            folder.mkdir(parents=True)
            (folder / "end").write_text("")
    out.remove("checkpoints/one")
    out.remove("checkpoints/one")
    assert out.names("checkpoints") == ["two"]
