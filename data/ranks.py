"""The ranks of a torchrun world: who has which rows, what is summed over them."""

import math
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
    shard: bool = False  # whether the ranks share one copy of the weights, gradients and moments

    def share(self, count: int, what: str) -> slice:
        """This rank's part of a batch. Raises ValueError with the nearest counts that divide."""
        if count % self.size:
            near = count // self.size * self.size or self.size
            raise ValueError(f"{what} {count} does not divide over {self.size} ranks: {near} or {near + self.size} would")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def max(self, *values) -> list[float]:
        """The largest over the ranks, of numbers and of tensors of one."""
        if self.size == 1:
            return [float(x) for x in values]  # without a GPU's taking part: numbers are no reason to wait for it
        most = self.stack(values)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def sum(self, *values) -> list[float]:
        """Sums over the ranks, in fp64, of numbers and of tensors of one, which are read here, all at once."""
        total = self.stack(values)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def stack(self, values) -> torch.Tensor:
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in values])


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start(device: str = "auto", dtype: str = "auto", shard: bool = False) -> World:
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
    return World(rank, size, torch.device(device), known[dtype], shard and size > 1)


@torch.profiler.record_function("reduce")
def gradients(model, world: World, clip: float) -> tuple[list, float]:
    """The one place where gradients are summed over ranks, clipped and checked. -> gradients (taken out of the model; of a
    sharded one, summed during the backward pass, this rank's part as DTensors), and the norm of the whole before clipping,
    which `Log.healthy` is to see before anything is updated."""
    for p in model.parameters():
        if p.grad is None:  # a rank whose rows had nothing to train on still takes part
            p.grad = torch.zeros_like(p)
    if world.size > 1 and not world.shard:  # one message for many small tensors: forty of them took longer than the step
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in model.parameters()])
    norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
    taken = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken, norm


# ---- weights: made on the meta device, checked, sharded, and only then given memory


def place(model, world: World):
    """A model of the meta device onto the world's, sharded if the world is; -> the model, its weights still to be set."""
    master = torch.float64 if world.compute == torch.float64 else torch.float32  # fp64 only when everything is
    model.to(master)
    if world.shard:  # imported here: it takes a second or two
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
        # a block's weights travel in the compute dtype; cos and sin stay as they are; embedding and head come in fp32
        policy = MixedPrecisionPolicy(param_dtype=world.compute, reduce_dtype=master, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        # embedding and head stay whole for the backward pass, which shards them again: where none follows, this does
        model.register_forward_hook(lambda model, *_: None if torch.is_grad_enabled() else model.reshard())
        for module in model.modules():
            if isinstance(module, FSDPModule):  # a sum, not a mean: the loss has one denominator over all ranks
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # or NCCL would multiply by 1, which gloo cannot
    return model.to_empty(device=world.device)


def put(tensor, source):
    """Copy the whole tensor `source` into `tensor`, or the part of it that this rank has; -> `tensor`."""
    if hasattr(tensor, "full_tensor"):  # a DTensor; src_data_rank: every rank has the source, nothing is sent
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(source, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.copy_(source)


def whole(tensor):
    """The tensor itself, or gathered from its shards: then all ranks must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def can_compile(world: World) -> bool:
    found = world.device.type != "cpu" or bool(shutil.which(os.environ.get("CXX", "g++")))
    return found or bool(print("no C++ compiler (g++ or $CXX): running without --compile", file=sys.stderr))


def compile_blocks(model, dynamic: bool = True):  # in place: parameter names stay; all blocks share one code
    for block in model.blocks:
        block.compile(dynamic=dynamic)
