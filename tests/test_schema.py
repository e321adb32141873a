"""The shipped search spaces and the JSON schema that editors check them with."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from lift_ray import tune
from lift_ray.settings.yaml_file import SettingsFile

FOLDER = Path(__file__).parent.parent / "search_spaces"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if "\nspace:" in path.read_text())


def test_the_shipped_spaces_are_these_and_name_their_schema() -> None:
    assert [path.stem for path in SHIPPED] == [
        "backdoor",
        "bottleneck",
        "cifar100_lt",
        "heavy",
        "imagenet_lt",
        "inat",
        "places_lt",
        "quickstart",
        "scaling",
        "tau",
        "ulfine",
    ]
    for path in SHIPPED:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_schema_file_matches_the_settings(tmp_path: Path) -> None:
    tune.main(["--schema", str(tmp_path / "schema.json")])
    assert (tmp_path / "schema.json").read_text() == (FOLDER / "schema.json").read_text(), (
        "run python -m lift_ray.tune --schema search_spaces/schema.json"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_space_passes_the_schema_and_a_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads((FOLDER / "schema.json").read_text())
    jsonschema.validate(SettingsFile.read(path).data, schema)
    with pytest.raises(jsonschema.ValidationError, match=r"'optim\.lrr' is not one of"):
        jsonschema.validate(SettingsFile.read(path).data | {"baselines": [{"optim.lrr": 1}]}, schema)
    assert tune.main([str(path), "--dry-run"]) is None
    assert "checked: no errors found" in capsys.readouterr().out
