"""What ``import lightning_cwrf`` adds to ``import lightning``, timed within the same fresh processes.

Whole processes differ by more than the import takes. The package loads what is used when it is used, so the second row
reads the names of a hardening too.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

from common import Row, best_of, overhead, run

ROUNDS = 5
LIGHTNING = "import lightning.pytorch"
NAMES = "PrivacyScoringCallback, CriticalRewindCallback, GradientMaskCallback, DefenseCallback, MIAAuditCallback"


def started(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def benchmark() -> list[Row]:
    ours, names, theirs = best_of(
        ROUNDS,
        lambda: started(f"{LIGHTNING}; import lightning_cwrf"),
        lambda: started(f"{LIGHTNING}; from lightning_cwrf import {NAMES}"),
        lambda: started(LIGHTNING),
    )
    return [
        overhead("import lightning, lightning_cwrf", ours, "import lightning", theirs, at_most=1.03),
        overhead("the same, with the callbacks of a hardening", names, "import lightning", theirs),
    ]


if __name__ == "__main__":
    run(benchmark, __doc__)
