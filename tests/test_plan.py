"""plan.py: what commands cost, and its memory against every tensor that a real step holds."""

import dataclasses
import importlib
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import model as models
import plan
import rl
from helpers import ROOT
from model import PRESETS, Model, ModelConfig, Sampler, adam, update


class Held(TorchDispatchMode):
    """Bytes of all tensors made inside, views counted once, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.most = 0

    def add(self, *tensors):
        for tensor in tensors:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            key = id(storage)
            if key not in self.storages:
                gone = lambda _, key=key: self.storages.pop(key)  # noqa: E731
                self.storages[key] = weakref.ref(storage, gone)

    def bytes(self):  # anew each time: FSDP frees a storage by making it smaller
        held = [ref() for ref in list(self.storages.values())]
        return sum(storage.nbytes() for storage in held if storage is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(*(x for x in tree_leaves(out) if isinstance(x, torch.Tensor)))
        self.most = max(self.most, self.bytes())
        return out


def step(model, optimizers, ids, micros=2):
    """A trainer's step in miniature: gradients of each loss over its micro-batches; one update.

    One process: what sums gradients over ranks is not in it, but for FSDP, which does it in the
    backward pass.
    """
    weight = torch.ones(ids.shape[0], ids.shape[1] - 1)
    taken = []
    for _ in optimizers:
        for _ in range(micros):
            model(ids[:, :-1], ids[:, 1:], weight=weight)[0].backward()
        taken.append([p.grad for p in model.parameters()])  # as common.gradients does
        model.zero_grad(set_to_none=True)
    pairs = zip(optimizers, taken, strict=True)
    update(model, [(optimizer, 1e-3, gradients) for optimizer, gradients in pairs], 0.1)


# ---- sizes


@pytest.mark.parametrize("preset, count", [("1b", 1_484_916_736), ("4b", 4_014_320_640)])
def test_parameters_on_the_meta_device(preset, count):
    model = plan.shape(preset)
    assert plan.weights_of(model) == count and model.head.weight.is_meta
    held = plan.memory(model, ranks=8)
    assert held.holds["weights"] == held.holds["gradients"] == held.summed == 4 * count
    assert held.holds["moments"] == 8 * count
    held = plan.memory(model, optimizers=2, ranks=8, shard=True)
    assert (held.holds["weights"], held.holds["gradients"]) == (count / 2, count)
    assert (held.holds["moments"], held.summed) == (2 * count, 0)


# ---- a step


WAYS = [(size, way, n) for size in (1, 8) for way in ("plain", "checkpointed") for n in (1, 2)]
SLOW = [pytest.param(16, *how, marks=pytest.mark.slow) for how in WAYS]
QUICK = [(2, 1, "plain", 1), (2, 8, "plain", 1), (2, 1, "checkpointed", 2)]


@pytest.mark.parametrize("layers, size, way, optimizers", [*QUICK, *SLOW])
def test_a_step_holds_what_the_formula_says(monkeypatch, layers, size, way, optimizers):
    """The 1b or two layers of it, two rows of 512 tokens, as tensors without memory.

    Of eight ranks seven are made up by torch's fake backend. On the CPU a chunk's logits are there
    several times, in fp32 too, so that the chunks are small.
    """
    monkeypatch.setattr(models, "ROWS", 64)
    monkeypatch.setattr(plan, "ROWS_CUDA", 64)
    c = ModelConfig(**PRESETS["1b"] | {"layers": layers})
    world = common.World(0, size, torch.device("cpu"), torch.bfloat16, size > 1)
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        kind = dist.device_mesh.DeviceMesh
        mesh = kind.from_group(dist.group.WORLD, "cpu")  # not of fake tensors
        monkeypatch.setattr(kind, "from_group", staticmethod(lambda *_: mesh))
    try:
        with torch.device("meta"):
            model = Model(c, torch.bfloat16)
            whole = Model(c)
        with FakeTensorMode(allow_non_fake_inputs=True):
            common.materialize(model, world)
            model.checkpoint_activations = way == "checkpointed"
            adams = [adam(model) for _ in range(optimizers)]
            ids = torch.zeros(2, 513, dtype=torch.long)
            with Held() as held:
                held.add(*model.parameters())
                weights = held.bytes()
                step(model, adams, ids, micros=1)
                moments = held.bytes() - weights
                held.most = 0
                step(model, adams, ids)
    finally:
        if size > 1:
            dist.destroy_process_group()
    expected = plan.memory(whole, optimizers, size, size > 1, row=512)
    found = (expected.holds["weights"], expected.holds["moments"])
    assert (weights, moments) == pytest.approx(found, rel=1e-3)
    fixed, token = expected.ways[way]
    total = sum(expected.holds.values()) + fixed + 1024 * token
    assert 0.95 * total < held.most < 1.02 * total


def test_sums_over_ranks_take_a_copy_of_the_gradients():
    model = Model(ModelConfig(layers=1, vocab=500, padded_vocab=512))
    size = sum(p.nbytes for p in model.parameters())
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        with Held() as held:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            world = common.World(0, 8, torch.device("cpu"), torch.float32)
            common.gradients(model, world, 1.0)
    finally:
        dist.destroy_process_group()
    assert held.most == pytest.approx(size + plan.memory(model, ranks=8).summed, rel=0.01)


def kept_for_backward(layers, compiled, width=128, ffn=384, heads=2, rows=2, length=256):
    """Bytes that autograd keeps between forward and backward, without the weights themselves."""
    shape = dict(layers=layers, width=width, heads=heads, ffn=ffn, context=length)
    model = Model(ModelConfig(**shape, vocab=500, padded_vocab=512), torch.bfloat16)
    model.init_weights(0)
    kept = {}
    if compiled:
        torch._dynamo.reset()
        common.compile_blocks(model, dynamic=False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(rows, length, dtype=torch.long)
        model(ids, ids, weight=torch.ones(rows, length))
    return sum(storage.nbytes() for storage in kept.values()), model


SHAPES = [{}, dict(ffn=1024, width=256, heads=4), dict(rows=3, length=96)]


@pytest.mark.parametrize("way", ["plain", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_block_keeps(way, shape):
    """The difference that one more block makes."""
    one, small = kept_for_backward(1, way == "compiled", **shape)
    two, large = kept_for_backward(2, way == "compiled", **shape)
    first, a = plan.memory(small).ways[way]
    second, b = plan.memory(large).ways[way]
    count = shape.get("rows", 2) * shape.get("length", 256)
    assert two - one == pytest.approx((second - first) + (b - a) * count, rel=0.01)


# ---- the sampler


def test_the_sampler_holds_its_replica_and_cache(monkeypatch):
    monkeypatch.setattr(plan, "SPAN", Sampler.SPAN["cpu"])
    monkeypatch.setattr(plan, "PROMPT", 3)
    shape = dict(layers=3, width=128, heads=2, ffn=384, context=512)
    c = ModelConfig(**shape, vocab=500, padded_vocab=512)
    model = Model(c, torch.bfloat16).init_weights(0)
    sampler = Sampler(model, rows=48)
    sampler([[1, 2, 3]] * 6, 8, 100, list(range(48)), [500])
    holds = plan.memory(model, together=48, max_new=100).holds
    more = plan.memory(model, together=48, prompts=6, max_new=100).holds
    prompts = more["cache"] - holds["cache"]
    assert sampler.buffers.prompt.nbytes * 6 == prompts * 7  # one prompt more than is used
    copies = sum(copy.nbytes for copy, _ in sampler.copies)
    assert copies == pytest.approx(holds["replica"], rel=0.01)
    cache = holds["cache"] - 48 * 16 * c.padded_vocab
    assert sampler.buffers.own.nbytes * 48 == cache * 49  # one row more than is used


# ---- what is told


class Flags:
    """Of a run, as far as memory asks for them."""

    compile = True
    checkpoint_activations = False
    micro = 1
    rows = 512
    shard = False
    plan = "1b"


def test_the_largest_micro_is_the_last_that_fits():
    held = plan.memory(plan.shape("1b"), row=4096)
    cfg = Flags()
    room = 0.9 * 80e9
    cfg.micro = held.largest("compiled", room)
    assert cfg.micro == 7 and held.needed(cfg) < room
    cfg.micro += 1
    assert held.needed(cfg) > room
    assert held.largest("plain", 20e9) == 0


SCRIPTS = {
    "pretrain": ["--tasks", "x"],
    "sft": ["--init", "M.pt", "--questions", "data/out/gsm8k"],
    "rl": ["--init", "M.pt", "--group", "5"],
    "mix": ["--init", "M.pt"],
    "eval": ["step5.pt", "--final"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_tells_its_cost_without_its_checkpoint(capsys, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    common.main(module.main, module.Config, "", [*SCRIPTS[script], "--plan", "1b"])
    told = capsys.readouterr().out
    assert "FLOPs" in told and "GPU hours" in told and "per GPU" in told and "141 GB" in told
    assert ("GB more while it runs" in told) == (script != "eval")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_preset_is_one_line(capsys, script):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        common.main(module.main, module.Config, "", [*SCRIPTS[script], "--plan", "huge"])
    (line,) = filter(None, capsys.readouterr().err.splitlines())
    assert stop.value.code == 2 and "'huge'" in line and "4b" in line


def test_a_text_that_was_not_named_is_not_read(world, tmp_path, monkeypatch):
    """Where data/out/toy is, too, 1b is planned for the vocabulary of cl100k."""
    before = cost("pretrain.py")
    (tmp_path / "data/out").mkdir(parents=True)
    (tmp_path / "data/out/toy").symlink_to(world.data)
    monkeypatch.chdir(tmp_path)
    assert cost("pretrain.py").disk == before.disk
    assert cost("pretrain.py", "--data", "data/out/toy").disk < before.disk


def cost(*words) -> plan.Cost:
    return plan.cost_of_command([*words, "--plan", "1b"])


FORWARD = 2 * 1.279e9 + 4 * 16 * 2048 * 275  # FLOPs per token: two per weight, and attention


def test_the_prices_by_hand():
    """Pre-training is 23,842 steps of 2,097,152 tokens at 9.287 GFLOP."""
    found = cost("pretrain.py", "--save_steps", "1000,2000")
    assert found.flops == pytest.approx(23842 * 2097152 * 9.287e9, rel=1e-3)
    assert found.hours == pytest.approx(found.flops / 0.4 / 989e12 / 3600)
    assert found.disk == 3 * 4 * 1_484_916_736 and found.text[1] == 4 * 23842 * 2097152
    rl = cost("rl.py", "--init", "M.pt")
    assert rl.flops == pytest.approx(1000 * 128 * 64 * (3 * 275 + 200) * FORWARD, rel=0.02)
    few = cost("rl.py", "--init", "M.pt", "--group", "5")
    assert 11 < rl.flops / few.flops < 13
    sft = cost("sft.py", "--init", "M.pt", "--questions", "gsm8k", "--eval_questions", "0")
    assert sft.flops == pytest.approx(5 * 7000 * 275 * 3 * FORWARD, rel=0.02)
    gold = cost("sft.py", "--init", "M.pt", "--questions", "gsm8k", "--solutions", "all")
    assert gold.flops == pytest.approx(23 * sft.flops, rel=0.02)
    mix = cost("mix.py", "--init", "M.pt", "--text", "x", "--steps", "10", "--batch", "64")
    rl = cost("rl.py", "--init", "M.pt", "--steps", "10")
    assert mix.flops - rl.flops == pytest.approx(10 * 64 * 4096 * 9.287e9, rel=0.01)
    base = cost("eval.py", "step5.pt", "--limit", "100", "--tasks=")
    answers = 100 * 32 * 200 * FORWARD
    assert base.flops == pytest.approx(2 * answers, rel=0.1)  # with shots and without
    trained = cost("eval.py", "step5-rl.pt", "--limit", "100", "--tasks=")
    assert trained.flops == pytest.approx(answers, rel=0.1)
    tasks = cost("eval.py", "step5-rl.pt", "--limit", "100", "--tasks", "here")
    assert tasks.flops - trained.flops == pytest.approx(plan.TASKS * FORWARD, rel=0.01)


def test_questions_that_are_there_are_counted(tmp_path):
    row = {"question": "2 + 1 ?", "answer": "3", "solutions": ["2 + 1\n#### 3", "3\n#### 3"]}
    for split, count in (("train", 5), ("val", 2), ("test", 4)):
        rows = [json.dumps(row | {"id": f"{split}{i}"}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    found = plan.questions(str(tmp_path), "toy", "train")
    assert found == plan.Questions(train=5, val=2, test=4, solutions=10)
    assert plan.questions(str(tmp_path / "train.jsonl"), "toy", "train").train == 5


def test_shots_are_in_the_plan():
    """Eight answers share a row, and so what is shown."""
    bare, shown = (rl.job_of(rl.Config(init="x.pt", steps=5, shots=k)) for k in (0, 8))
    assert shown.row - bare.row == plan.SHOT
    (before,), (after,) = bare.parts, shown.parts
    answers = 5 * rl.Config(init="x.pt").questions_per_step * rl.Config(init="x.pt").group
    assert after.trained - before.trained == plan.SHOT * answers


def test_text_is_counted_once(capsys):
    text = ["pretrain.py", "--data", "d", "--tokens", "1e10", "--plan", "1b"]
    less = ["pretrain.py", "--data", "d", "--tokens", "5e9", "--plan", "1b"]
    plan.main([*text, "+", *text, "--seed", "1", "+", *less])
    lines = capsys.readouterr().out.splitlines()
    steps = round(1e10 / 2097152)
    assert float(lines[-2].split()[1]) == pytest.approx(4e-9 * steps * 2097152, rel=0.01)
    assert lines[-1].split()[:3] == ["all", "3", "commands"]


@pytest.mark.parametrize(
    "words, named",
    [
        (["pretrain.py"], "--plan"),
        (["pretrain.py", "--plan", "1b", "+"], "begins with one of"),
        (["pretrian.py", "--plan", "1b"], "pretrian"),
    ],
)
def test_a_command_that_cannot_be_planned_is_refused(words, named):
    command = [sys.executable, "plan.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_questions_that_a_plan_needs_and_are_not_there(tmp_path):
    for script, words in (("sft", ["--limit", "9"]), ("eval", ["step5.pt"])):
        with pytest.raises(ValueError, match="train" if script == "sft" else "val"):
            cost(f"{script}.py", *words, "--questions", str(tmp_path))


def test_answers_side_by_side_and_the_prompts_that_are_kept():
    """At most --rows answers; twice as many prompts as are being answered."""
    job = plan.Job("rl", [], 0, asked=((128, 64), (200, 4)))
    cfg = Flags()
    assert plan.side_by_side(cfg, job, 1) == (512, 256)
    assert plan.side_by_side(cfg, job, 8) == (512, 50)
    assert plan.side_by_side(cfg, job._replace(asked=((200, 1),)), 1) == (200, 200)
    assert plan.side_by_side(cfg, job._replace(asked=()), 1) == (0, 0)


def test_kl_holds_the_start_too():
    model = plan.shape("1b")
    for shard in (False, True):
        less, more = (plan.memory(model, ranks=8, shard=shard, kl=kl).holds for kl in (False, True))
        assert more == less | {"start": less["weights"]} and less["start"] == 0


# ---- what fits a GPU


def test_the_table_of_cards_in_the_documentation(capsys):
    """SCALE.md has what `python plan.py cards` prints, for each of six sizes."""
    plan.main(["cards"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].count("GB") == len(plan.CARDS) == 6
    assert f"\n\n{printed}\n" in (ROOT / "SCALE.md").read_text(encoding="utf-8")


def test_a_cell_of_the_table_is_what_a_trainer_chooses(monkeypatch):
    table = {line.split(" | ")[0]: line.split(" | ")[1:] for line in plan.cards_table()}
    chosen, _, _ = fitted("rl", "1b", 24, 1, monkeypatch)
    assert chosen == dict(offload=True, checkpoint_activations=True, rows=64, micro=2)
    assert table["| 1b rl"][plan.CARDS.index(24)] == "2 co"
    chosen, _, _ = fitted("pretrain", "4b", 80, 8, monkeypatch)
    assert table["| 4b pretrain, 8 GPUs"][plan.CARDS.index(80)] == f"{chosen['micro']} s"
    assert chosen["shard"] and table["| 1b mix"][plan.CARDS.index(24)] == "no"


def fitted(script, preset, card, ranks, monkeypatch, **given):
    """The Config that a trainer would run with on GPUs of `card` GB, and its planned bytes."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    module = importlib.import_module(script)
    given = {"plan": preset, **given}
    if script == "pretrain":
        cfg, _ = module.configure(given)
    else:
        cfg, _ = common.configure(module.Config, given, module.PAPER, module.check, module.job_of)
    job = module.job_of(cfg)
    room = plan.ROOM * card * 1e9
    chosen = plan.fitting(cfg, given, job, plan.shape(preset), room)
    cfg = dataclasses.replace(cfg, **(chosen or {}))
    return chosen, plan.memory_of(cfg, job, plan.shape(preset)).needed(cfg), room


@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "mix"])
@pytest.mark.parametrize("preset, card, ranks", [("1b", 80, 1), ("1b", 80, 8), ("4b", 80, 8)])
def test_what_is_chosen_for_a_gpu_fits_it(script, preset, card, ranks, monkeypatch):
    chosen, needed, room = fitted(script, preset, card, ranks, monkeypatch)
    assert chosen["micro"] >= 1
    assert needed <= room


def test_a_larger_gpu_has_no_smaller_batches(monkeypatch):
    small, _, _ = fitted("rl", "1b", 80, 1, monkeypatch)
    large, _, _ = fitted("rl", "1b", 141, 1, monkeypatch)
    assert large["rows"] >= small["rows"]
    assert large["micro"] >= small["micro"] or small.get("checkpoint_activations")


def test_sharding_is_chosen_where_one_gpu_cannot_hold_it(monkeypatch):
    alone, _, _ = fitted("rl", "4b", 80, 1, monkeypatch, offload=False)
    assert alone is None
    together, _, _ = fitted("rl", "4b", 80, 8, monkeypatch)
    assert together["shard"]
    small, _, _ = fitted("sft", "190m", 80, 8, monkeypatch)
    assert "shard" not in small


def test_flags_that_were_given_stay(monkeypatch):
    given = dict(micro=2, rows=64, checkpoint_activations=True)
    chosen, _, _ = fitted("rl", "1b", 80, 1, monkeypatch, **given)
    assert not chosen.keys() & given.keys()


def test_what_fits_as_it_is_is_not_what_fits_nowhere(monkeypatch, capsys):
    chosen, needed, room = fitted("pretrain", "1b", 80, 1, monkeypatch, micro=4)
    assert chosen == {} and needed <= room
    importlib.import_module("pretrain").main({"plan": "1b", "micro": 4})
    said = capsys.readouterr().out
    assert "  8 GB  nothing fits\n" in said and " 80 GB  as it is\n" in said


def test_moments_beside_the_gpu_are_kept_where_nothing_else_is_needed(monkeypatch):
    given = dict(micro=1, rows=64, checkpoint_activations=False)
    assert fitted("rl", "1b", 40, 1, monkeypatch, **given, offload=False)[0] is None
    chosen, needed, room = fitted("rl", "1b", 40, 1, monkeypatch, **given)
    assert chosen == {"offload": True} and needed <= room


def test_the_choice_for_a_gpu_is_said_in_one_line(monkeypatch, capsys):
    gpus = {"cuda:0": 8e9, "cuda:1": 80e9}
    ask = lambda device: SimpleNamespace(total_memory=gpus[device])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", ask)
    cfg = rl.Config(init="x")
    fit = plan.fit(cfg, {"init": "x"}, rl.job_of(cfg), "1b", "cuda:1")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"--micro {fit.micro}" in told
    changed = {
        f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(fit, f.name)
    }
    memory = {"micro", "rows", "checkpoint_activations", "shard", "offload"}
    assert changed <= memory <= common.OPERATIONAL


def test_nothing_is_chosen_on_a_cpu():
    cfg = rl.Config(init="x")
    assert plan.fit(cfg, {}, rl.job_of(cfg), "1b", "cpu") is cfg
