"""A hardening in processes that the strategy starts; the audit reaches the caller as a file."""

import sys

import torch

from lightning_cwrf import AuditResult, MIAAuditCallback
from tests.helpers import Classifier, loader, trainer

if __name__ == "__main__":
    folder = sys.argv[1]
    torch.manual_seed(0)
    audit = MIAAuditCallback(loader(100, 140), every_n_epochs=0, save=f"{folder}/audit.json")
    trainer(folder, strategy="ddp_spawn", devices=2, callbacks=[audit]).fit(Classifier(), loader(0, 64))
    assert audit.result is None
    print("members:", int(AuditResult.load(f"{folder}/audit.json").is_member.sum()))
