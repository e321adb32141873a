"""Result folders on object storage. A whole search there is in test_tune.py, a run in test_train.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lift_ray.errors import BadInput
from lift_ray.storage.output import Output


def test_a_url_of_no_known_kind_is_bad_input() -> None:
    with pytest.raises(BadInput) as caught:
        Output("nonsense://bucket/x").holds("study.json")
    message = "--out: must be a folder or a URL of object storage, but got nonsense://bucket/x ("
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_storage_that_does_not_answer_is_bad_input(silent_storage: str) -> None:
    with pytest.raises(BadInput) as caught:
        Output(silent_storage).holds("study.json")
    assert str(caught.value).startswith("--out: must be reachable storage, but s3://bucket/x")
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
