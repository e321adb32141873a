"""A provider for Ray's autoscaler that has no spot machines; Ray loads it by name, in the head's autoscaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider  # type: ignore[import-untyped]
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE  # type: ignore[import-untyped]


class NoSpot(FakeMultiNodeProvider):  # type: ignore[misc]
    """Launches fail for node types named after spot; `provider.asked` is a file that gets the type of each launch asked for."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        with Path(self.provider_config["asked"]).open("a") as file:
            print(kind, file=file)
        if "spot" in kind:
            raise RuntimeError("InsufficientInstanceCapacity")
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
