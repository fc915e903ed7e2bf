"""Run by test_fsdp.py: trains a model whose weights are sharded (FSDP2), saves its checkpoint and its whole weights."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers import Classifier, loader, trainer


class Sharded(Classifier):
    def configure_model(self):
        if self.device_mesh is not None:  # not where it is loaded on one device
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def main(out: Path, distributed: bool) -> None:
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    run = trainer(strategy=strategy, max_epochs=3)
    model = Sharded()
    run.fit(model, loader(0, 64))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    run.save_checkpoint(out / "model.ckpt")
    torch.save({name: p.full_tensor().detach() for name, p in model.named_parameters()}, out / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "distributed")
