"""Run by test_ddp.py: a hardening run on two processes; each rank writes what it ended with."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    LossTraceCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    VanillaSnapshotCallback,
)
from lightning_cwrf.defenses import AdversarialRegularizationMixin
from tests.helpers import Classifier, loader, trainer


def main(out: Path) -> None:
    torch.manual_seed(0)
    first = Classifier()
    settings = {"strategy": "ddp", "devices": 2}
    snapshot = VanillaSnapshotCallback(out / "vanilla.safetensors")
    trainer(callbacks=[snapshot], max_epochs=10, **settings).fit(first, loader(0, 64))
    # Another random state on each rank: the mask must be the same all the same.
    torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", "0")))
    audit = MIAAuditCallback(loader(100, 140), every_n_epochs=0)
    rewind = CriticalRewindCallback(rate=0.1)
    reference = loader(140, 180, shuffle=True)
    scoring = PrivacyScoringCallback(reference, out / "vanilla.safetensors", steps=3, keep_scores=True)
    traces = LossTraceCallback(nonmembers=loader(180, 201))
    run = trainer(callbacks=[scoring, rewind, GradientMaskCallback(), audit, traces], **settings)
    run.fit(RelaxLossMixin.attach(first, alpha=0.5), loader(0, 64, shuffle=True))
    state = {f"weight/{n}": p.detach().clone() for n, p in first.named_parameters()}
    state |= {f"mask/{n}": m for n, m in rewind.mask.masks.items()}
    state |= {f"score/{n}": s for n, s in scoring.scores.items()}
    state |= {"trace/losses": traces.result.losses, "trace/nonmembers": traces.result.nonmember_losses}
    state["audited"] = torch.tensor(len(audit.result.is_member))
    found = audit.result.estimates["loss"]
    measured = {
        n: torch.tensor([e.value, *e.interval, e.p_value or 0.0], dtype=torch.float64) for n, e in found.items()
    }
    gap = audit.result.model_metrics["loss_gap"]
    measured["loss_gap"] = torch.tensor([gap.value, *gap.interval, gap.p_value], dtype=torch.float64)
    state |= {f"measured/{n}": values for n, values in measured.items()}
    state |= {"audit/scores": audit.result.scores["loss"], "audit/is_member": audit.result.is_member}
    state |= {"audit/losses": audit.result.losses}
    state["audit/accuracy"] = torch.tensor(audit.result.model_metrics["test_accuracy"].value, dtype=torch.float64)
    # The attack of adversarial regularisation trains along on every rank: it must stay one attack.
    against = AdversarialRegularizationMixin.attach(Classifier(), nonmembers=loader(140, 180))
    trainer(max_epochs=1, **settings).fit(against, loader(0, 64, shuffle=True))
    state |= {f"attack/{n}": t.clone() for n, t in against.defense_state.adversary.network.state_dict().items()}
    save_file({n: t.contiguous() for n, t in state.items()}, out / f"rank{run.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
