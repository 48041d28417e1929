"""The ranks of a torchrun world: who has which rows, what is summed over them."""

import os
import shutil
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    compute: torch.dtype  # of activations and products; weights are fp32, or fp64 when this is

    def share(self, count: int, what: str) -> slice:
        """This rank's part of a batch. Raises ValueError with the nearest counts that divide."""
        if count % self.size:
            near = count // self.size * self.size or self.size
            raise ValueError(f"{what} {count} does not divide over {self.size} ranks: {near} or {near + self.size} would")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def max(self, *values: float) -> list[float]:
        most = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start(device: str = "auto", dtype: str = "auto") -> World:
    """Join torchrun's world if there is one. device: auto, cpu or cuda; dtype: auto (bf16 on CUDA, else fp32),
    bfloat16, float32, float64."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    known = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}
    known |= {name: getattr(torch, name) for name in ("bfloat16", "float32", "float64")}
    if dtype not in known:
        raise ValueError(f"--dtype takes auto, bfloat16, float32 or float64, not {dtype!r}")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, torch.device(device), known[dtype])


def gradients(model, world: World, clip: float) -> tuple[list, float]:
    """The one place where gradients are summed over ranks, clipped and checked. -> gradients (taken out of the model),
    norm before clipping, which `Log.healthy` is to see before anything is updated."""
    for p in model.parameters():
        if p.grad is None:  # a rank whose rows had nothing to train on still takes part
            p.grad = torch.zeros_like(p)
    if world.size > 1:  # one message for many small tensors: forty of them took longer than the step
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in model.parameters()])
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    taken = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken, norm


def place(model, world: World):  # weights are fp32 masters, fp64 only when everything is
    return model.to(world.device, torch.float64 if world.compute == torch.float64 else torch.float32)


def can_compile(world: World) -> bool:
    found = world.device.type != "cpu" or bool(shutil.which(os.environ.get("CXX", "g++")))
    return found or bool(print("no C++ compiler (g++ or $CXX): running without --compile", file=sys.stderr))


def compile_blocks(model, dynamic: bool = True):  # in place: parameter names stay; all blocks share one code
    for block in model.blocks:
        block.compile(dynamic=dynamic)
