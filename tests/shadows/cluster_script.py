"""Run by test_clusters.py: shadow models on a local cluster of two workers, one of which is killed in mid-run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import joblib

from lightning_cwrf.shadows import train_shadows
from tests.helpers import part
from tests.recipe_functions import Counted


def main(backend: str, folder: Path) -> None:
    end = begin(backend)
    (folder / "kill once").write_text("3")
    with joblib.parallel_config(backend, **({"n_jobs": 2} if backend == "ray" else {})):
        signals = train_shadows(Counted(folder / "log"), part(0, 20), 6, store=folder / "store", progress=False)
    runs = (folder / "log").read_text().split()
    print(json.dumps({"sum": signals.logits.double().sum().item(), "runs": runs}), flush=True)
    end()


def begin(backend: str) -> Callable[[], object]:
    """Start the cluster; what is returned ends it."""
    if backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        register_ray()
        ray.init(num_cpus=2, include_dashboard=False)
        return ray.shutdown
    from dask.distributed import Client

    client = Client(n_workers=2, threads_per_worker=1, dashboard_address=None)

    def end() -> None:
        client.wait_for_workers(2, timeout=120)  # a worker that restarts during the shutdown would outlive it
        client.shutdown()

    return end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
