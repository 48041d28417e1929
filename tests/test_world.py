"""Ranks and devices: sums over ranks, the GPU that is chosen, how long ranks wait for each other.

A GPU is played by stand-ins: what is asked of torch.cuda is recorded.
"""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

import common
from helpers import ALONE, small_model


class Calls(TorchFunctionMode):
    """Counts the functions of PyTorch that are called."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs; the list has the devices that were made the current one."""
    current = []
    stand_ins = dict(
        is_available=lambda: True,
        device_count=lambda: 4,
        set_device=current.append,
        is_bf16_supported=lambda including_emulation: current != ["cuda:3"],
        get_device_name=lambda device: "Tesla V100",
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return current


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------- sums


def test_sums_and_largest_of_numbers_and_tensors():
    values = (1, 2.5, torch.tensor(3.0), torch.tensor([4.0], dtype=torch.float64)[0])
    assert ALONE.sum(*values) == [1, 2.5, 3, 4]
    assert ALONE.max(*values) == [1, 2.5, 3, 4]
    assert ALONE.sum(2.0**60 + 256, 1 / 3) == [2.0**60 + 256, 1 / 3], "in fp64"


def test_thousands_of_numbers_travel_in_one_copy():
    """Not one by one: a copy to a GPU takes ten microseconds, and HellaSwag has 80,000 numbers."""
    on_gpu = ALONE._replace(device=torch.device("meta"))
    counts = []
    for size in (10, 10_000):
        with Calls() as done:
            on_gpu.stack([0.5] * size)
        counts.append(done.count)
    assert counts[0] == counts[1] < 5


def test_shares_of_a_batch():
    assert [ALONE._replace(rank=rank, size=4).share(8, "--batch") for rank in (0, 3)] == [
        slice(0, 2),
        slice(6, 8),
    ]
    with pytest.raises(ValueError, match="--batch 10 .* 8 or 12"):
        ALONE._replace(size=4).share(10, "--batch")


# ------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("device", ["cuda:1", "cuda", "auto"])
def test_the_chosen_gpu_is_the_current_one(gpus, monkeypatch, device):
    """Triton launches its kernels on the current device, whatever the tensors'."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    wanted = device if ":" in device else "cuda:2"
    world = common.start(device)
    assert gpus == [wanted] and world.device == torch.device(wanted)
    assert world.compute == torch.bfloat16


def test_a_cpu_sets_no_device(gpus):
    assert common.start("cpu").compute == torch.float32 and gpus == []


@pytest.mark.parametrize("device", ["cuda:4", "gpu", "cuda:x", "cpu:1"])
def test_a_device_that_is_not_there(gpus, device):
    with pytest.raises(ValueError, match=device):
        common.start(device)
    assert gpus == []


def test_a_gpu_without_bfloat16(gpus):
    with pytest.raises(ValueError, match="--dtype float32"):
        common.start("cuda:3")
    assert common.start("cuda:3", "float32").compute == torch.float32


# ------------------------------------------------------------------------------------ waiting


def test_ranks_wait_two_hours_for_each_other(monkeypatch):
    """Rank 0 may write a state of 80 GB, or one rank grade slowly, while the others wait."""
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **how: asked.append(how["timeout"]))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    common.start("cpu")
    assert asked == [timedelta(hours=2)]


def test_shards_wait_as_long(one_rank, monkeypatch):
    """The ranks of a sharded model make no group of their own, which would have its own timeout.

    With gloo on a machine that has a GPU, a mesh of its own would.
    """
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "torch.distributed.device_mesh.new_group", lambda *_, **how: made.append(how)
    )
    common.shard_model(small_model(), ALONE._replace(shard=True), torch.float32)
    assert made == []


def test_a_world_without_an_address_says_so(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        common.start("cpu")
    assert not dist.is_initialized() and "RANK" in os.environ
