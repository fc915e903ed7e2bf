"""What ``import lightning_cwrf`` adds to ``import lightning``, timed within the same fresh processes.

Whole processes differ by more than the import takes. The package loads what is used when it is used, so the second row
reads the names of a hardening too.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import Row, overhead, run

ROUNDS = 5
NAMES = "PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback, DefenseCallback, MIAAuditCallback"
TIMED = f"""
import json, time
began = time.perf_counter()
import lightning.pytorch
theirs = time.perf_counter()
import lightning_cwrf
ours = time.perf_counter()
from lightning_cwrf import {NAMES}
print(json.dumps([theirs - began, ours - began, time.perf_counter() - began]))
"""


def times() -> list[float]:
    """Seconds until lightning, the package, and the names are imported."""
    done = subprocess.run([sys.executable, "-c", TIMED], check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout)
    return found


def benchmark() -> list[Row]:
    theirs, ours, names = min(times() for _ in range(ROUNDS))
    return [
        overhead("import lightning, lightning_cwrf", ours, "import lightning", theirs, at_most=1.03),
        overhead("the same, with the callbacks of a hardening", names, "import lightning", theirs),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
