"""data/plan.py's memory: parameters on the meta device, and the formula against every tensor that a real step holds."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as models
from data import plan, ranks, run
from model import PRESETS, Model, ModelConfig, Sampler, adam, update


class Held(TorchDispatchMode):
    """The bytes of all tensors made inside, views counted once, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def add(self, *tensors):
        for tensor in tensors:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            key = id(storage)
            if key not in self.storages:
                self.storages[key] = weakref.ref(storage, lambda _, key=key: self.storages.pop(key))

    def bytes(self):  # anew each time: FSDP frees a storage by making it smaller
        return sum(storage.nbytes() for ref in list(self.storages.values()) if (storage := ref()) is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(*(x for x in tree_leaves(out) if isinstance(x, torch.Tensor)))
        self.most = max(self.most, self.bytes())
        return out


def step(model, optimizers, ids, micros=2):
    """A trainer's step in miniature: gradients of each loss over its micro-batches, kept; then one update. One process: what
    sums them over ranks is not in it, but for FSDP, which does it in the backward pass."""
    weight, taken = torch.ones(ids.shape[0], ids.shape[1] - 1), []
    for _ in optimizers:
        for _ in range(micros):
            model(ids, weight=weight)[0].backward()
        taken.append([p.grad for p in model.parameters()])  # as ranks.gradients does
        model.zero_grad(set_to_none=True)
    update(model, [(optimizer, 1e-3, gradients) for optimizer, gradients in zip(optimizers, taken, strict=True)], 0.1)


# ---- sizes


@pytest.mark.parametrize("preset, count", [("1b", 1_484_916_736), ("4b", 4_014_320_640)])
def test_parameters_on_the_meta_device(preset, count):
    model = plan.shapes(preset)
    assert sum(p.numel() for p in model.parameters()) == count and model.head.weight.is_meta
    holds, summed, _ = plan.memory(model, ranks=8)
    assert (holds["weights"], holds["gradients"], holds["moments"], summed) == (4 * count, 4 * count, 8 * count, 4 * count)
    holds, summed, _ = plan.memory(model, optimizers=2, ranks=8, shard=True)
    assert (holds["weights"], holds["gradients"], holds["moments"], summed) == (count / 2, count, 2 * count, 0)


def test_constants_are_those_of_the_model():
    assert (plan.LOGITS, plan.SPAN) == (models.ROWS_CUDA, Sampler.SPAN["cuda"])
    assert plan.STAGES["rl"][1] == plan.rl.SIZES["paper"]["questions_per_step"] * plan.rl.SIZES["paper"]["group"]
    assert plan.STAGES["sft"][1] == plan.sft.Config.eval_questions * plan.sft.Config.eval_n


# ---- a step


WAYS = [(size, way, optimizers) for size in (1, 8) for way in ("plain", "checkpointed") for optimizers in (1, 2)]
SLOW = [pytest.param(16, *how, marks=pytest.mark.slow) for how in WAYS]


@pytest.mark.parametrize("layers, size, way, optimizers", [(2, 1, "plain", 1), (2, 8, "plain", 1), (2, 1, "checkpointed", 2), *SLOW])
def test_a_step_holds_what_the_formula_says(monkeypatch, layers, size, way, optimizers):
    """The 1b or two layers of it, two rows of 512 tokens, as tensors without memory; of eight ranks seven are made up by torch's
    fake backend. On the CPU a chunk's logits are there several times, in fp32 too, so that the chunks are small."""
    monkeypatch.setattr(models, "ROWS", 64)
    monkeypatch.setattr(plan, "LOGITS", 64)
    c, world = ModelConfig(**PRESETS["1b"] | {"layers": layers}), ranks.World(0, size, torch.device("cpu"), torch.bfloat16, size > 1)
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        mesh = dist.device_mesh.init_device_mesh("cpu", (size,))  # not of fake tensors
        monkeypatch.setattr(dist.device_mesh, "init_device_mesh", lambda *_: mesh)
    try:
        with torch.device("meta"):
            model, whole = Model(c, torch.bfloat16), Model(c)
        with FakeTensorMode(allow_non_fake_inputs=True):
            ranks.place(model, world)
            model.checkpoint_activations = way == "checkpointed"
            adams, ids = [adam(model) for _ in range(optimizers)], torch.zeros(2, 513, dtype=torch.long)
            with Held() as held:
                held.add(*model.parameters())
                weights = held.bytes()
                step(model, adams, ids, micros=1)
                moments, held.most = held.bytes() - weights, 0
                step(model, adams, ids)
    finally:
        if size > 1:
            dist.destroy_process_group()
    holds, _, ways = plan.memory(whole, optimizers, 0, size, size > 1)
    assert (weights, moments) == pytest.approx((holds["weights"], holds["moments"]), rel=1e-3)
    fixed, token = ways[way]
    expected = sum(holds.values()) + fixed + 1024 * token
    assert 0.95 * expected < held.most < 1.02 * expected


def test_sums_over_ranks_take_a_copy_of_the_gradients():
    model = Model(ModelConfig(layers=1, vocab=500, padded_vocab=512))
    size = sum(p.nbytes for p in model.parameters())
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        with Held() as held:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            ranks.gradients(model, ranks.World(0, 8, torch.device("cpu"), torch.float32), 1.0)
    finally:
        dist.destroy_process_group()
    assert held.most == pytest.approx(size + plan.memory(model, ranks=8)[1], rel=0.01)


def kept_for_backward(layers, compiled, width=128, ffn=384, heads=2, rows=2, length=256):
    """Bytes that autograd keeps between forward and backward, without the weights themselves."""
    c = ModelConfig(layers=layers, width=width, heads=heads, ffn=ffn, vocab=500, padded_vocab=512, context=length)
    model, kept = Model(c, torch.bfloat16).init_weights(0), {}
    if compiled:
        torch._dynamo.reset()
        ranks.compile_blocks(model, dynamic=False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(rows, length + 1, dtype=torch.long), weight=torch.ones(rows, length))
    return sum(storage.nbytes() for storage in kept.values()), model


@pytest.mark.parametrize("way", ["plain", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [dict(), dict(ffn=1024, width=256, heads=4), dict(rows=3, length=96)], ids=str)
def test_what_a_block_keeps(way, shape):
    """The difference that one more block makes."""
    (one, small), (two, large) = (kept_for_backward(layers, way == "compiled", **shape) for layers in (1, 2))
    (first, a), (second, b) = (plan.memory(model)[2][way] for model in (small, large))
    count = shape.get("rows", 2) * shape.get("length", 256)
    assert two - one == pytest.approx((second - first) + (b - a) * count, rel=0.01)


# ---- the sampler


def test_the_sampler_holds_its_replica_and_cache(monkeypatch):
    monkeypatch.setattr(plan, "SPAN", Sampler.SPAN["cpu"])
    c = ModelConfig(layers=3, width=128, heads=2, ffn=384, vocab=500, padded_vocab=512, context=512)
    model = Model(c, torch.bfloat16).init_weights(0)
    sampler = Sampler(model, rows=48)
    sampler([[1, 2, 3]] * 6, 8, 100, list(range(48)), [500])
    holds = plan.memory(model, answers=64, rows=48, max_new=100)[0]
    assert sum(copy.nbytes for copy, _ in sampler.copies) == pytest.approx(holds["replica"], rel=0.01)
    assert sampler.buffers.own.nbytes == holds["cache"] - 48 * 16 * c.padded_vocab
    assert plan.memory(model, answers=64, ranks=8, rows=48, max_new=100)[0]["cache"] == pytest.approx(holds["cache"] / 6)


# ---- the table


def test_the_table(capsys):
    """The largest --micro is the last that fits, and what fits with none has no number."""
    plan.memory_table(run.configure(plan.Memory, ["--rows", "64"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    found = {" ".join(line[: line.index("x")]): line for line in lines if "--shard" not in line and line[line.index("x") + 1] == "1"}
    assert len(lines) == 24 and found["1b pretrain"][4:7] == ["5.9", "5.9", "11.9"] and found["4b mix"][-5:] == ["-", "/", "-", "/", "-"]
    holds, _, ways = plan.memory(plan.shapes("1b"))
    fixed, token = ways["compiled"]
    micro = int(found["1b pretrain"][-3])
    assert sum(holds.values()) + fixed + micro * 4096 * token < 0.9 * 141e9 < sum(holds.values()) + fixed + (micro + 1) * 4096 * token
