"""Kinds of files, by content and not by name."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lift_ray.errors import BadInput
from lift_ray.model.weights_file import check_kind
from lift_ray.storage.file_kinds import SAFETENSORS, file_kind

TENSORS = save({"x": torch.zeros(4)})


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "content")
    return file.getvalue()


def torch_saved(value: object, *, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


KINDS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605157884\n",
    "a git-annex pointer": b"/annex/objects/SHA256E-s605157884--00.pt\n",
    "an HTML page": b"\n<!DOCTYPE html>\n<html><body>Sign in",
    "an HTML page ": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">',
    "an HTML page  ": b"\xef\xbb\xbf<HTML>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a page of markup": b"<Error><Code>AccessDenied</Code></Error>",
    "a JSON document": b'{"error":"Repository not found"}',
    "a text file": b"Invalid username or password.",
    "an empty file": b"",
    "a safetensors file": TENSORS,
    "a safetensors file that is cut off": TENSORS[:-1],
    "a safetensors file that is cut off ": TENSORS[:20],
    **{
        f"a safetensors file that is cut off {' ' * number}": len(header).to_bytes(8, "little") + header
        for number, header in enumerate((b'{"a":' + b"[" * 100_000, b'{"a":{"data_offsets":[]}}', b'{"a":[]}'), 1)
    },
    "a TorchScript archive": scripted(),
    "a file of torch.save": torch_saved({"x": torch.zeros(1)}),
    "a file of torch.save ": torch_saved({"x": torch.zeros(1)}, is_zip=False),
    "a zip archive that is cut off": torch_saved({"x": torch.zeros(1)})[:200],
    "a zip archive": zipped("photos/1.jpg"),
    "a NumPy archive": zipped("params.npy"),
    "a program of torch.export": zipped("model/archive_format"),
    "a pickle": pickle.dumps({"x": 1}),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a gzip archive": b"\x1f\x8b\x08",
    "a file of an unknown kind": bytes(64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_what_its_first_bytes_say_and_not_what_it_is_called(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(KINDS[kind])
    assert file_kind(path) == kind.strip()


def test_a_folder_and_an_image_have_kinds_too(tmp_path: Path) -> None:
    assert file_kind(tmp_path) == "a folder"
    (tmp_path / "1").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert file_kind(tmp_path / "1") == "a PNG image"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("a safetensors file ", SAFETENSORS))])
def test_every_other_kind_is_refused_in_one_line_that_names_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(KINDS[kind])
    with pytest.raises(BadInput) as caught:
        check_kind(str(path), (SAFETENSORS,))
    start = f"backbone.pretrained: must be a safetensors file, but {path} is {kind.strip()}; "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
