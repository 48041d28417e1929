"""What a run costs, from its own flags. Every trainer and eval.py print it with --plan and exit.

    python rl.py --init ckpt/1b/step5000.pt --plan 1b
    python plan.py rl.py --init M.pt --plan 1b + eval.py M-rl.pt --plan 1b     # and their sum
    python plan.py cards                              # what fits which GPU, the table of SCALE.md
    PLAN=1 bash runs/paper.sh                                                  # a whole experiment

A script says what it will do, in tokens; here is what that takes:

    training   FLOPs = tokens x flops_per_token (model.py)     hours = FLOPs / (TRAINING x PEAK)
    reading    a third of that: prompts, tasks                 the same
    sampling   a third of that                                 hours = FLOPs / (SAMPLING x PEAK)
    disk       4 bytes per weight of a checkpoint, 2 or 4 bytes per token of text; a trainer that
               runs keeps its state for --resume beside it
    memory     see `memory`

No checkpoint is read. What is not known before the data is there is assumed, and said. Nothing of
this was measured on a GPU.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from data import problems, tokens
from model import PRESETS, ROWS_CUDA, Model, ModelConfig, Sampler, paper_size, round_up

PEAK = 989e12  # FLOP/s of an H100 or H200 in bf16, dense
TRAINING = 0.4  # share of it that training reaches
SAMPLING = 0.05  # that sampling reaches: 19,000 tokens per second and GPU at 1B
PROMPT = 75  # tokens; MATH has 78, GSM8K 62
SHOT = 155  # of a solved question that is shown, of GSM8K
ANSWER = 200  # tokens, where --max_new allows it; MATH has 221, GSM8K 78
TASKS = 2_343_014  # tokens of the six benchmarks, each context once


# ---------------------------------------------------------------------- what a script will do


class Tokens(NamedTuple):
    """Tokens that a run handles in rows of one length."""

    trained: float = 0  # a gradient is taken of them
    read: float = 0  # they go through the model once: prompts, text that is only measured
    sampled: float = 0
    length: int = PROMPT + ANSWER  # mean length of a row: attention costs more in longer ones


class Job(NamedTuple):
    """What a command will do."""

    script: str
    parts: list[Tokens]
    row: int  # tokens of the longest row of a micro-batch
    optimizers: int = 1  # 0: nothing is trained
    asked: tuple[tuple[int, int], ...] = ()  # (questions, answers to each) at a time, of all ranks
    max_new: int = 0  # tokens of the longest answer
    checkpoints: int = 1  # that it leaves on the disk
    text: tuple[str, float] = ("", 0.0)  # folder that is read, and its tokens
    note: str = ""  # what is assumed


class Questions(NamedTuple):
    """How many there are of each split, and solutions to all of the first."""

    train: int
    val: int
    test: int
    solutions: int
    note: str = ""


# of runs/paper.sh (prepare.py openmath), by the name of the folder; beside them the default world
# and, for easy and hard questions, a guess: nobody knows before
KNOWN = {
    "gsm8k": Questions(7000, 500, 1319, 23 * 7000),
    "math": Questions(13_500, 500, 5000, 23 * 13_500),
    "split-easy": Questions(8000, 1000, 1000, 23 * 8000),
    "split-hard": Questions(8000, 1000, 1000, 23 * 8000),
}
TOY = Questions(1600, 200, 300, 24 * 1600)


@functools.cache
def questions(folder: str, preset: str, needed: str) -> Questions:
    """What is in a folder of questions; if it is not there, or without --plan (preset ""), what is
    assumed: a run that trains does not open the test questions. Raises ValueError if the folder
    lacks the split that is `needed`."""
    if preset and folder and Path(folder).exists():
        counts = {}
        for split in ("train", "val", "test"):
            there = problems.split_path(folder, split).is_file() or split == needed
            counts[split] = problems.load(folder, split) if there else []
        solutions = sum(len(row.get("solutions", ())) for row in counts["train"])
        return Questions(*map(len, counts.values()), solutions)
    path = Path(folder).parent if folder.endswith(".jsonl") else Path(folder)
    guess = KNOWN.get(path.name, KNOWN["math"] if paper_size(preset) else TOY)
    asked = f"{guess.train:,} questions to train on, {guess.test:,} to test"
    return guess._replace(note=f"{asked}, {guess.solutions:,} solutions")


def longest_answer(max_new: int) -> int:
    return min(ANSWER, max_new)


def text_row(preset: str) -> int:
    """Tokens of a row of pre-training, as pretrain.py makes it unless told otherwise."""
    return 4096 if paper_size(preset) else 128


# ------------------------------------------------------------------------------- what that costs


class Cost(NamedTuple):
    script: str
    flops: float
    hours: float  # of one GPU
    disk: float  # bytes of checkpoints
    memory: float  # bytes per GPU, with what is chosen on a card of PLANNED GB, if it fits there
    text: tuple[str, float]  # folder and bytes
    chosen: list[dict | None]  # the flags that it would choose on each of CARDS, see `fitting`


@functools.cache
def shape(preset: str, encoding: str = "") -> Model:
    """A model of the preset without memory. encoding: of its text, where that is known."""
    if preset not in PRESETS:
        raise ValueError(f"--plan takes {', '.join(PRESETS)}, not {preset!r}")
    usual = "cl100k_base" if paper_size(preset) else "toy"
    vocab = tokens.VOCABULARY[encoding or usual]
    with torch.device("meta"):
        return Model(ModelConfig(**PRESETS[preset], vocab=vocab, padded_vocab=round_up(vocab, 128)))


def weights_of(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def work(model: Model, part: Tokens) -> tuple[float, float]:
    """-> FLOPs and hours of a GPU."""
    each = model.flops_per_token(part.length)
    dense = each * (part.trained + part.read / 3)
    sampled = each * part.sampled / 3
    return dense + sampled, (dense / TRAINING + sampled / SAMPLING) / PEAK / 3600


def encoding_of(folder: str) -> str:
    """The encoding of a folder of text, or nothing if it is not there."""
    if not folder or not Path(folder).is_dir():
        return ""
    return tokens.Stream(folder, "val", 1, 0).encoding_name


# --------------------------------------------------------------------------------------- memory

SPAN = Sampler.SPAN["cuda"]  # columns that the sampler's cache is rounded to
ROOM = 0.9  # of a GPU; the rest is for CUDA, NCCL and what the allocator cannot use
CARDS = (8, 16, 24, 40, 80, 141)  # GB
PLANNED = 80  # GB, where one card has to be meant
ROOMS = [ROOM * card * 1e9 for card in CARDS]
BUSY = 4096  # tokens of a micro-batch that keep the matrix units of a GPU busy
WAYS = {  # a block as it is, compiled, or run again in the backward pass
    "plain": "--compile false",
    "compiled": "--compile true",
    "checkpointed": "--checkpoint_activations",
}


class Memory(NamedTuple):
    """Bytes per GPU in bf16."""

    holds: dict[str, float]  # what is there all the time
    summed: float  # more, while gradients are summed over the ranks, or offloaded moments are here
    ways: dict[str, tuple[float, float]]  # a micro-batch: whatever its size, and per token
    row: int
    offloaded: float = 0  # in the CPU's memory, of each GPU

    def largest(self, way: str, room: float) -> int:
        """The most rows of a micro-batch that fit into `room` bytes; 0 if none does."""
        fixed, token = self.ways[way]
        left = room - sum(self.holds.values())
        return max(0, int((left - fixed) / (self.row * token))) if left > self.summed else 0

    def needed(self, cfg) -> float:
        """At the flags of a run."""
        held = sum(self.holds.values())
        if not self.ways:
            return held
        way = "compiled" if cfg.compile else "plain"
        fixed, token = self.ways["checkpointed" if cfg.checkpoint_activations else way]
        return held + max(self.summed, fixed + cfg.micro * self.row * token)


def memory(
    model: Model,
    optimizers=1,
    ranks=1,
    shard=False,
    together=0,
    prompts=0,
    max_new=0,
    row=0,
    offload=False,
    kl=False,
) -> Memory:
    """What a run holds. together: answers that a GPU samples side by side; prompts: those that its
    cache keeps for them; row: tokens of a row.

    What a block keeps of a token, in bytes: width x (2 for its
    input, 6 for q, k and v, 4 for q and k turned, 4 for the output of attention and its copy in
    another order, 2 for the MLP's input), ffn x (4 for gate and up, 2 for silu, 2 for the product),
    and for each of the four norms width x 8, two fp32 tensors. Compiled, only two norms keep
    something, their input in bf16, and silu is made again.
    """
    c = model.config
    weights = weights_of(model)
    width = c.width
    head = c.padded_vocab * width
    blocks = sum(p.numel() for p in model.blocks.parameters())
    part = ranks if shard else 1
    own, shared = (round_up(length, SPAN) + Sampler.SPARE for length in (max_new, PROMPT))
    column = 4 * c.layers * width  # a token's keys and values
    holds = {
        "weights": 4 * weights / part,
        "gradients": 4 * optimizers * weights / part,
        "moments": 0 if offload else 8 * optimizers * weights / part,
        "start": 4 * weights / part * kl,  # the checkpoint that --kl compares with
        # the sampler's copy; not sharded, the embedding is read where it is
        "replica": 2 * (weights if shard else weights - head) * bool(together),
        "cache": together * (own * column + 16 * c.padded_vocab) + prompts * shared * column,
    }
    if not optimizers:
        return Memory(holds, 0, {}, row)
    # logits; the head in bf16 and its gradient in fp32, or, sharded: embedding and head gathered
    # in fp32, and their gradients
    fixed = 2 * ROWS_CUDA * c.padded_vocab + (16 if shard else 6) * head
    # the blocks' weights in bf16, kept for the backward pass; FSDP gathers them again
    casts = 0 if shard else 2 * blocks
    sums = 16 + 4 * c.heads  # of the norms and of attention
    ends = 12 * width  # the final norm and what the head reads
    plain = 50 * width + 8 * c.ffn + sums
    compiled = 22 * width + 6 * c.ffn + sums
    ways = {
        "plain": (fixed + casts, c.layers * plain + ends),
        "compiled": (fixed + casts, c.layers * compiled + ends),
        "checkpointed": (fixed + casts / c.layers, c.layers * 2 * width + plain + ends),
    }
    summed = 4 * weights if ranks > 1 and not shard else 0
    if not offload:
        return Memory(holds, summed, ways, row)
    # of one parameter at a time, the largest of which is the head
    summed = max(summed, 8 * max(p.numel() for p in model.parameters()))
    # the two moments of each; PyTorch takes page-locked memory in powers of two
    pinned = sum(2 ** math.ceil(math.log2(4 * p.numel())) for p in model.parameters())
    return Memory(holds, summed, ways, row, 2 * optimizers * pinned)


def side_by_side(cfg, job: Job, ranks: int) -> tuple[int, int]:
    """-> answers that a GPU samples at a time, and prompts that its cache keeps: twice as many as
    are being answered, see Sampler."""
    sides = [(min(-(-q // ranks), max(1, cfg.rows // n)), n) for q, n in job.asked]
    prompts = [2 * q if n > 1 else q for q, n in sides]
    return max((q * n for q, n in sides), default=0), max(prompts, default=0)


def memory_of(cfg, job: Job, model: Model) -> Memory:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    shard = ranks > 1 and getattr(cfg, "shard", False)
    together, prompts = side_by_side(cfg, job, ranks)
    offload = getattr(cfg, "offload", False)
    kl = getattr(cfg, "kl", 0) > 0
    sizes = (together, prompts, job.max_new, job.row)
    return memory(model, job.optimizers, ranks, shard, *sizes, offload, kl)


def fit(cfg, given: dict, job: Job, preset: str, device: str):
    """The Config with --micro, --rows, --checkpoint_activations, --shard and --offload that fit
    the device, cpu or cuda:N.

    A flag in `given` stays; none of the others changes a result. On a CPU, and where nothing fits,
    the Config stays as it is. One line says what was chosen.
    """
    if device == "cpu" or preset not in PRESETS:
        return cfg
    room = ROOM * torch.cuda.get_device_properties(device).total_memory
    chosen = fitting(cfg, given, job, shape(preset), room)
    if os.environ.get("RANK", "0") == "0":
        line = f"for {room / 1e9:.0f} GB of GPU memory: {as_flags(chosen)}"
        print(f"{job.script}.py: {line} (computed, see --plan)", file=sys.stderr)
    return dataclasses.replace(cfg, **(chosen or {}))


def fitting(cfg, given: dict, job: Job, model: Model, room: float) -> dict | None:
    """Values for the flags that are not `given`, so that a run takes `room` bytes; None if none do.

    Tried in this order: as it is; with blocks run again in the backward pass; sharded; both. In
    each, fewer answers side by side. The first counts that has the --micro that was given, or one
    that keeps a GPU busy. Only where none of them fits, all again without sharding, and with
    moments in the CPU's memory.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rows = getattr(cfg, "rows", 0)
    choices = {
        "shard": (False, True) if several and not cfg.offload else (False,),
        "checkpoint_activations": (False, True),
        "rows": (rows, rows // 2, rows // 4, rows // 8, rows // 16) if rows else (),
    }
    choices = {name: values for name, values in choices.items() if values and name not in given}
    best = None
    for values in itertools.product(*choices.values()):
        found = dict(zip(choices, values, strict=True))
        tried = dataclasses.replace(cfg, **found)
        way = "compiled" if cfg.compile else "plain"
        way = "checkpointed" if tried.checkpoint_activations else way
        most = memory_of(tried, job, model).largest(way, room)
        if most < given.get("micro", 1):
            continue
        if "micro" not in given:
            found["micro"] = min(64, 1 << (most.bit_length() - 1))
        found = {name: value for name, value in found.items() if value is not False}
        if "micro" in given or most * job.row >= BUSY:
            return found
        best = best or found
    if best or "offload" in given or given.get("shard"):
        return best
    given = given | {"offload": True}
    best = fitting(dataclasses.replace(cfg, offload=True), given, job, model, room)
    return None if best is None else {"offload": True} | best


# ---------------------------------------------------------------------------------------- shown


def show(cfg, job: Job, given: dict) -> Cost:
    """Print what a command costs. Raises ValueError for a preset that there is not."""
    model = shape(cfg.plan, encoding_of(job.text[0]))
    chosen = []
    if job.optimizers:
        chosen = [fitting(cfg, given, job, model, room) for room in ROOMS]
    flags = chosen[CARDS.index(PLANNED)] if chosen else None
    planned = dataclasses.replace(cfg, **(flags or {}))
    done = [work(model, part) for part in job.parts]
    folder, count = job.text
    cost = Cost(
        script=job.script,
        flops=sum(flops for flops, _ in done),
        hours=sum(hours for _, hours in done),
        disk=4.0 * weights_of(model) * job.checkpoints,
        memory=memory_of(planned, job, model).needed(planned),
        text=(folder, count * (2 if model.config.vocab < 1 << 16 else 4)),
        chosen=chosen,
    )
    held = memory_of(cfg, job, model)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    counted = [sum(part[i] for part in job.parts) for i in range(3)]
    gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
    lines = [
        f"{job.script}.py, {cfg.plan} ({weights_of(model):,} weights), {gpus}",
        "  tokens   trained {:.3g}, read {:.3g}, sampled {:.3g}".format(*counted),
        f"  compute  {cost.flops:.3g} FLOPs, {cost.hours:.3g} GPU hours",
    ]
    if job.optimizers:
        state = (4 + 8 * job.optimizers) * weights_of(model)
        lines.append(f"  disk     {cost.disk / 1e9:.3g} GB of checkpoints")
        lines[-1] += f", {state / 1e9:.3g} GB more while it runs"
    if job.text[1]:
        lines[-1] += f"; {cost.text[1] / 1e9:.3g} GB of text"
    lines += memory_lines(cfg, job, held)
    if job.optimizers:
        lines += choice_lines(chosen)
    assumed = f"{TRAINING:.0%} of {PEAK / 1e12:.0f} TFLOP/s in training, {SAMPLING:.0%} in sampling"
    lines += [f"  assumed  {assumed}"]
    lines += [f"           {job.note}"] * bool(job.note)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return cost


def memory_lines(cfg, job: Job, held: Memory) -> list[str]:
    """Bytes per GPU by what they are for, and what fits cards of some sizes."""
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in held.holds.items() if size)
    total = sum(held.holds.values())
    what = "the largest --rows that fits"
    if job.optimizers:
        what = f"most --micro of {job.row} tokens"
        rooms = {flag: [held.largest(way, room) for room in ROOMS] for way, flag in WAYS.items()}
    else:
        cache = held.holds["cache"]
        each = cache / side_by_side(cfg, job, int(os.environ.get("WORLD_SIZE", 1)))[0]
        rooms = {"": [max(0, int((room - total + cache) / each)) for room in ROOMS]}
    lines = [
        f"  memory   {total / 1e9:.3g} GB per GPU{' and activations' * bool(held.ways)}: {parts}",
        f"           {what:<30}" + "".join(f"{card:>6} GB" for card in CARDS),
    ]
    if held.offloaded:
        lines[0] += f"; {held.offloaded / 1e9:.3g} in the CPU's memory per GPU"
    for flag, counts in rooms.items():
        lines.append(f"             {flag:<28}" + "".join(f"{count or '-':>9}" for count in counts))
    return lines


def choice_lines(chosen: list[dict | None]) -> list[str]:
    """The flags that a trainer would choose on each of CARDS."""
    lines = ["           what it would choose there"]
    for card, flags in zip(CARDS, chosen, strict=True):
        lines.append(f"             {card:>4} GB  {as_flags(flags)}")
    return lines


LETTERS = {"checkpoint_activations": "c", "shard": "s", "offload": "o"}


def cards_table() -> list[str]:
    """A table of --micro, and a letter for each other flag, by trainer and card: lines of Markdown.

    For one GPU, and for each of eight."""
    lines = ["| | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    lines.append("|---" * (len(CARDS) + 1) + "|")
    for ranks, presets in ((1, ("190m", "1b", "4b")), (8, ("1b", "4b"))):
        for preset, script in itertools.product(presets, ("pretrain", "sft", "rl", "mix")):
            with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
                cost = cost_of_command([f"{script}.py", "--plan", preset])
            name = f"{preset} {script}" + (f", {ranks} GPUs" if ranks > 1 else "")
            lines.append(f"| {name} | " + " | ".join(map(in_a_cell, cost.chosen)) + " |")
    return lines


def in_a_cell(chosen: dict | None) -> str:
    """What a trainer would choose: 16 c for --micro 16 --checkpoint_activations."""
    if chosen is None:
        return "no"
    letters = "".join(LETTERS[name] for name in LETTERS if chosen.get(name))
    return f"{chosen['micro']} {letters}".strip()


def as_flags(chosen: dict | None) -> str:
    if chosen is None:
        return "nothing fits"
    told = " ".join(f"--{name} {value}" for name, value in chosen.items()).replace(" True", "")
    return told or "as it is"


def main(words: list[str]):
    """Several commands with + between them: a line for each, and their sums; or `cards`."""
    if words == ["cards"]:
        print("\n".join(cards_table()))
        return
    commands = [[]]
    for word in words:
        if word == "+":
            commands.append([])
        else:
            commands[-1].append(word)
    costs = []
    for command in commands:
        costs.append(cost_of_command(command))
        print(" ".join(command))
        print(f"    {told(costs[-1:])}, {costs[-1].memory / 1e9:.3g} GB of memory per GPU")
    print(f"\n{TRAINING:.0%} of {PEAK / 1e12:.0f} TFLOP/s in training, {SAMPLING:.0%} in sampling")
    scripts = dict.fromkeys(cost.script for cost in costs)
    for script in scripts:
        mine = [cost for cost in costs if cost.script == script]
        print(f"{script:<10}{len(mine):>4} commands  {told(mine)}")
    folders = {}  # folder -> bytes, the most that a command reads of it
    for folder, size in (cost.text for cost in costs):
        folders[folder] = max(size, folders.get(folder, 0))
    text = sum(folders.values())
    print(f"{'text':<10}{'':>13}  {'':38}{text / 1e9:>9.3g} GB")
    print(f"{'all':<10}{len(costs):>4} commands  {told(costs, text)}")


SCRIPTS = ("pretrain", "sft", "rl", "mix", "eval")


def cost_of_command(command: list[str]) -> Cost:
    """["rl.py", "--init", ...] with --plan among its flags -> what it costs."""
    name = Path(command[0]).stem if command else ""
    if name not in SCRIPTS:
        raise ValueError(f"a command begins with one of {', '.join(SCRIPTS)}, not {name!r}")
    script = importlib.import_module(name)
    given = script.common.parse_flags(script.Config, command[1:])
    if not given.get("plan"):
        raise ValueError(f"{' '.join(command)}: give it --plan, or it would run")
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(given)


def told(costs: list[Cost], text: float = 0.0) -> str:
    flops, hours, disk = (sum(cost[i] for cost in costs) for i in (1, 2, 3))
    return f"{flops:9.3g} FLOPs {hours:9.3g} GPU hours {(disk + text) / 1e9:9.3g} GB"


if __name__ == "__main__":
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__.strip())
        sys.exit()
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
