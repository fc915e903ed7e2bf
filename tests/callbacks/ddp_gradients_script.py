"""Run by test_ddp.py: gradients cleared as they are accumulated, in a plain DDP loop on two processes."""

import os
import sys
import tempfile

import torch
from torch import distributed, nn

from lightning_cwrf import WeightMask


def main(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    mask = WeightMask({n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters()})
    mask.freeze(model)
    for view in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
        hooks = mask.clear_gradients_of(model)
        torch.manual_seed(rank)  # other examples on each process
        for _ in range(2):
            wrapped(torch.randn(5, 4)).square().sum().backward()
        chosen, gradient = mask.masks["weight"], model.weight.grad
        assert (gradient[chosen] == 0).all()
        assert (gradient[~chosen] != 0).all()
        both = [torch.zeros(3, 4) for _ in range(2)]
        distributed.all_gather(both, gradient.contiguous())
        assert torch.equal(*both)
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.spawn(main, (tempfile.mktemp(dir=sys.argv[1]),), nprocs=2)
