"""Run by test_training.py: DP-SGD on two processes, without noise and with it; each rank writes what it ended with."""

import os
import sys
from pathlib import Path

import torch

from lightning_cwrf.defenses import DPSGDMixin
from tests.defenses.dpsgd.cases import fresh
from tests.helpers import loader, trainer

WAYS = {"hooks": {}, "ghost": {"ghost": True}, "adaptive": {"clipping": "adaptive"}}


def main(out: Path, way: str) -> None:
    ends = {}
    for kind, noise in (("plain", 0), ("noisy", 1.0)):
        model = fresh(optimizer="sgd", lr=0.5)
        DPSGDMixin.attach(model, noise_multiplier=noise, max_grad_norm=0.3, **WAYS[way])
        # The draws must be rank 0's, whatever the others' random state.
        torch.manual_seed(1 + 100 * int(os.environ.get("LOCAL_RANK", "0")))
        run = trainer(strategy="ddp", devices=2)
        run.fit(model, loader(0, 96))
        ends[kind] = model.state_dict()
        ends["steps"] = model.privacy_spent.steps
        ends[f"{kind} clip norm"] = model.defense_state.ledger.clip_norm
    torch.save(ends, out / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
