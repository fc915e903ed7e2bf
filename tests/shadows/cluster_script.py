"""Run by test_clusters.py: shadow models on a local cluster of two workers, one of which is killed in mid-run."""

import json
import sys
from pathlib import Path

import joblib

from lightning_cwrf.shadows import train_shadows
from tests.helpers import part
from tests.recipe_functions import Counted


def main(backend: str, folder: Path) -> None:
    begin(backend)
    (folder / "kill once").write_text("3")
    with joblib.parallel_config(backend, **({"n_jobs": 2} if backend == "ray" else {})):
        signals = train_shadows(Counted(folder / "log"), part(0, 20), 6, store=folder / "store", progress=False)
    runs = (folder / "log").read_text().split()
    print(json.dumps({"sum": signals.logits.double().sum().item(), "runs": runs}))


def begin(backend: str) -> None:
    if backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        register_ray()
        ray.init(num_cpus=2, include_dashboard=False)
    else:
        from dask.distributed import Client

        Client(n_workers=2, threads_per_worker=1, dashboard_address=None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
