"""A search on a Ray of two nodes, each with features in a folder of its own: python tests/two_nodes.py FOLDER DATASET MODEL"""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from noting_slot import NotingSlot
from ray.cluster_utils import Cluster

from lift_ray.data.open import open_dataset
from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching.driver import run_search
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.study import Study, open_storage
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output


def main() -> None:
    folder, dataset, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tests = str(Path(__file__).parent)
    cluster = Cluster()
    for name in ("one", "other"):
        (folder / name).mkdir()
        variables = {"LIFT_CACHE": str(folder / name), "PYTHONPATH": tests}
        cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, env_vars=variables)
    ray.init(cluster.address, log_to_driver=False)
    space = SpaceFile.model_validate(
        {
            "name": "two-nodes",
            "dataset": dataset,
            "base": {
                "backbone": {"model": model},
                "augment": {"kind": "none"},
                "optim": {"epochs": 1, "global_batch_size": 16},
            },
            "space": {"optim.lr": {"float": [0.01, 0.1]}, "tuner.kind": {"choices": ["linear_probe"]}},
            "search": {"trials": 6, "sampler": "random", "scheduler": {"kind": "none"}, "tte_best": 0},
        }
    )
    study, out = Study(space, dataset, open_storage(None, folder)), Output(str(folder))
    data = SearchData.of(space, open_dataset(dataset))
    with Interrupts() as interrupts:
        run_search(study, dataset, Need(1, 1, 0), lambda: 2, out, interrupts, data=data, slot_class=NotingSlot)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
