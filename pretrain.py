"""Pre-train OLMo2 from scratch on token shards; keep the checkpoints M_t that all else starts from.

    python pretrain.py --data data/out/toy --out ckpt/toy
    torchrun --nproc_per_node 8 pretrain.py --preset 1b --data data/out/dolmino --out ckpt/1b
    python pretrain.py --data data/out/toy --init ckpt/toy/step2344-rl.pt --tokens 1.4M

Next-token loss, every token weighs 1/n; AdamW, cosine to a tenth, z-loss. Writes OUT/step*.pt. With
--init the text goes on where the pre-training of that checkpoint stopped, whatever came after it;
the optimizer and its schedule begin anew.
"""

import functools
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import record_function

import common
import plan
from common import Count, NonNegative, Positive, Whole
from data import files, tokens
from eval import held_out_losses, layout_of
from model import PRESETS, Model, ModelConfig, adam, cosine, paper_size, round_up, update


@dataclass(frozen=True, kw_only=True)
class Config(common.Shared):
    data: str = "data/out/toy"  # folder of token shards, train_*.bin and val_*.bin
    out: str = ""  # folder for step*.pt (default: ckpt/toy, with --init INIT-text)
    init: str = ""  # checkpoint whose weights to go on with (default: new weights)
    recipe: str = "text"  # with --init: name in rows and reports
    questions: str = ""  # questions that later stages take (default: DATA/easy if it is there)
    tasks: str = ""  # general-capability tasks that eval.py takes (default: DATA/tasks)
    preset: str = "toy"  # toy, toy-large, 190m, 1b or 4b; with --init what that is
    tokens: Count = 12_000_000  # length of the run, without what --init has read
    # end after this step, with a checkpoint, as if the run went on: the schedule is of --tokens
    stop: Whole = 0  # 0: after --tokens
    save_tokens: tuple[Count, ...] = ()  # keep a checkpoint at these token counts, besides the last
    save_steps: tuple[Count, ...] = ()  # the same, in steps
    batch_tokens: Count = 2048  # tokens per step over all ranks
    length: Count = 128  # tokens per row; with --init as before: another one is another order
    # attention and positions stay inside a document (paper: not given); not taken over from --init
    doc_mask: bool = False
    micro: Count = 32
    lr: Positive = 4e-3  # peak learning rate, cosine to a tenth
    warmup: Whole = 100  # steps of linear warm-up
    weight_decay: NonNegative = 0.05  # on everything but the embedding
    # initial std of the embedding: blocks add outputs of RMS 1 (post-norm), and beside them an
    # embedding of RMS 0.02 takes the first half of a short run to be heard
    embed_std: Positive = 0.5  # compare held_out in the metrics at 0.02, OLMo2's
    z_loss: NonNegative = 1e-5  # OLMo2: keeps the log-normaliser near 0
    clip: NonNegative = 1.0  # largest norm of the gradient (0: any)
    eval_every: Whole = 200  # steps between losses on the held-out text
    eval_rows: Count = 64  # rows of held-out text
    save_every: Count = 200
    verify: bool = True  # read all the text once and compare its checksums (1 GB/s per rank)
    seed: Whole = 0  # initial weights and order of the text; with --init the name of the run
    # TFLOP/s of one device in bf16, for the mfu in the metrics
    peak_tflops: NonNegative = 0.0  # 0: known for the cards in PEAK, else no mfu


# What the paper's sizes get instead.
PAPER = dict(
    tokens=50_000_000_000,  # paper: 50B
    batch_tokens=2_097_152,  # paper: 512 x 4096
    length=4096,
    lr=4e-4,  # paper: peak 4e-4, cosine
    warmup=2000,  # OLMo2; the paper does not say
    weight_decay=0.1,  # OLMo2
    embed_std=0.02,  # OLMo2
)

# TFLOP/s of dense bf16 products, summed in fp32: half of what data sheets give "with sparsity".
# From NVIDIA's data sheets and white papers; B200, A10G and the RTX cards at second hand, where
# conventions differ: --peak_tflops overrides. The first name that is a word of the GPU's counts.
PEAK = {
    "Laptop": 0,  # not known: it shares the name of a faster card
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "A10G": 70,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80,
    "RTX 3090": 71,
    "V100": 15.7,  # this and the T4 have no bf16: fp32
    "T4": 8.1,
}


# -------------------------------------------------------------------------------- before the run


def configure(given: dict):
    """The Config, and the checkpoint of --init (None without).

    What was not given follows from the size of the model and, with --init, from that checkpoint.
    """
    before = common.load(given["init"]) if given.get("init") and not given.get("plan") else None
    parent = before["meta"] if before else {}
    preset = given.get("plan") or given.get("preset", parent.get("preset", Config.preset))
    if not parent and preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}: there are {', '.join(PRESETS)}")
    if parent and (preset != parent["preset"] or "embed_std" in given):
        raise ValueError(
            f"{given['init']} has weights, of preset {parent['preset']}: "
            "--preset and --embed_std are for new ones"
        )
    defaults = dict(PAPER) if paper_size(preset) else {}
    defaults |= {"preset": preset, "out": "ckpt/toy"}
    if given.get("plan"):
        defaults["data"] = ""  # a text that was not named is assumed, and not read
    if parent:
        out = f"{Path(given['init']).with_suffix('')}-text"
        defaults |= {"length": parent["length"], "seed": parent["seed"], "out": out}
    cfg = Config(**(defaults | given))
    if cfg.plan:
        return cfg, None
    if before and cfg.length > (most := before["config"]["context"]):
        raise ValueError(f"--length {cfg.length}: the context of {cfg.init} is {most} tokens")
    return plan.fit(cfg, given, job_of(cfg), preset, common.device_of(cfg.device)), before


def rows_per_step(cfg: Config, world: common.World) -> int:
    """Rows of a step, over all ranks. Raises ValueError with the nearest batches that divide."""
    unit = cfg.length * world.size
    if cfg.batch_tokens % unit:
        near = cfg.batch_tokens // unit * unit or unit
        raise ValueError(
            f"--batch_tokens {cfg.batch_tokens} is not a multiple of {world.size} ranks x "
            f"{cfg.length} tokens: {near} or {near + unit} would be"
        )
    return cfg.batch_tokens // cfg.length


def whole_run(cfg: Config) -> int:
    """Steps of --tokens, which warm-up and cosine are of. Raises ValueError if they do not fit."""
    steps = max(1, round(cfg.tokens / cfg.batch_tokens))
    if cfg.warmup > steps:
        raise ValueError(
            f"--warmup {cfg.warmup} is longer than the run of {steps} steps, whose rate would "
            f"never reach --lr: give --warmup {steps // 10}, or more --tokens"
        )
    if cfg.stop > steps:
        raise ValueError(
            f"--stop {cfg.stop} lies after the run of {steps} steps, where the cosine has ended: "
            f"give --tokens {cfg.stop * cfg.batch_tokens} or more"
        )
    return steps


def schedule_of(cfg: Config) -> tuple[int, dict[int, str]]:
    """Steps of the run, and {step: path} of the checkpoints it keeps, the last among them."""
    whole = whole_run(cfg)
    steps = cfg.stop or whole
    keep = {round(count / cfg.batch_tokens) for count in cfg.save_tokens}
    keep |= {*cfg.save_steps, steps}
    if not all(0 < step <= steps for step in keep):
        raise ValueError(
            f"--save_tokens or --save_steps lies outside the run of {steps} steps of "
            f"{cfg.batch_tokens} tokens"
        )
    return steps, {step: str(Path(cfg.out) / f"step{step}.pt") for step in sorted(keep)}


def job_of(cfg: Config) -> plan.Job:
    """What a run trains on, for --plan."""
    steps, paths = schedule_of(cfg)
    counts = plan.Tokens(trained=steps * cfg.batch_tokens, length=cfg.length)
    text = (cfg.data, counts.trained)
    return plan.Job("pretrain", [counts], cfg.length, checkpoints=len(paths), text=text)


def new_model(cfg: Config, encoding, world: common.World) -> Model:
    """A model of the preset with initial weights, the same on any number of ranks."""
    vocab = tokens.vocab_size(encoding)
    shape = dict(PRESETS[cfg.preset])
    shape["context"] = round_up(max(cfg.length, shape["context"]), 8)
    padded = round_up(vocab, 128)
    with torch.device("meta"):
        model = Model(ModelConfig(**shape, vocab=vocab, padded_vocab=padded), world.compute)
    return common.materialize(model, world).init_weights(cfg.seed, cfg.embed_std, common.put)


def meta_of(cfg: Config, contents: dict, parent: dict, encoding, step: int) -> dict:
    """What the checkpoint of step `step` says of itself."""
    read = step * cfg.batch_tokens
    if parent:
        meta = common.child_meta(cfg, contents, parent, "pretrain", step)
        tasks = cfg.tasks or parent["tasks"]
        return meta | {"tokens": parent["tokens"] + read, "length": cfg.length, "tasks": tasks}
    name = files.read_world(cfg.data).get("name", Path(cfg.data).name)
    return common.new_meta(
        cfg,
        contents,
        stage="pretrain",
        recipe="base",
        step=step,
        tokens=read,
        length=cfg.length,
        parent="",
        preset=cfg.preset,
        encoding=encoding.name,
        world=name,
        pretrain_seed=cfg.seed,
        questions=cfg.questions or beside(cfg, "easy"),
        tasks=cfg.tasks or beside(cfg, "tasks"),
    )


def beside(cfg: Config, name: str) -> str:
    """A folder that prepare.py toy puts next to the text, if it is there."""
    folder = Path(cfg.data) / name
    return str(folder) if folder.is_dir() else ""


# --------------------------------------------------------------------------------------- a step


def batches_of(stream, cfg: Config, batch: int, world: common.World, encoding, first, steps):
    """The micro-batches of each step, made by a thread while the step before is at work.

    Each is ids (B, length + 1) and, with --doc_mask, the layout of documents (model.Layout); on
    CUDA in memory that the GPU reads on its own.
    """

    def make(step):
        rows = stream.rows(step, batch, world.share(batch, "--batch_tokens"))
        return [pinned(rows[i : i + cfg.micro]) for i in range(0, len(rows), cfg.micro)]

    def pinned(rows):
        parts = [torch.from_numpy(rows)]
        if cfg.doc_mask:
            parts += layout_of(rows, encoding.eot_token)
        return [x.pin_memory() for x in parts] if world.device.type == "cuda" else parts

    return tokens.ahead(make, first, steps)


def loss_and_gradients(model, micro_batches, cfg: Config, world: common.World):
    """-> loss over all ranks, the gradients of the step, summed and clipped, and their norm.

    One denominator: every token of the step, on all ranks, weighs 1/batch_tokens.
    """
    loss = 0.0
    for parts in micro_batches:
        rows, *layout = (x.to(world.device, non_blocking=True) for x in parts)
        ids = rows[:, :-1]
        weight = torch.full(ids.shape, 1 / cfg.batch_tokens, device=world.device)
        z_loss = cfg.z_loss / cfg.batch_tokens
        part, *_ = model(ids, rows[:, 1:], weight=weight, z_loss=z_loss, layout=layout or None)
        with record_function("backward"):
            part.backward()
        loss += part.detach().double()  # read once for all: to read is to wait for the GPU
    gradients, norm = common.gradients(model, world, cfg.clip)
    return world.sum(loss)[0], gradients, norm


def peak_flops(cfg: Config, world: common.World) -> float:
    """FLOP/s that the devices of all ranks could do together; 0 if that is not known."""
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else ""
    known = next((peak for part, peak in PEAK.items() if re.search(rf"\b{part}\b", name)), 0)
    return world.size * 1e12 * (cfg.peak_tflops or known)


# -------------------------------------------------------------------------------------- the run


def main(given: dict):
    cfg, before = configure(given)
    if cfg.plan:
        return plan.show(cfg, job_of(cfg), given)
    parent = before["meta"] if before else {}
    world = common.start(cfg.device, cfg.dtype, cfg.shard)
    order = (parent.get("pretrain_seed", cfg.seed), parent.get("encoding"), parent.get("tokens", 0))
    stream = tokens.Stream(cfg.data, "train", cfg.length, *order)
    held_out = tokens.Stream(cfg.data, "val", cfg.length, cfg.seed).beginning(cfg.eval_rows)
    encoding = tokens.encoding(stream.encoding_name)
    batch = rows_per_step(cfg, world)
    whole = whole_run(cfg)
    steps, paths = schedule_of(cfg)

    contents = {"data": stream.fingerprint}
    if before:
        contents["init"] = common.weights_hash(cfg.init)
    last = replace(cfg, out=paths[steps])  # what is claimed, saved and resumed
    for other in Path(cfg.out).glob("step*.pt.resume"):  # named after the last step of its run
        if cfg.resume and other != Path(f"{last.out}.resume"):
            raise ValueError(
                f"{other} is of a run of another length: give its --tokens, --batch_tokens and "
                "--stop, or another --out"
            )
    state = common.claim(last, contents, others=paths.values())
    if cfg.verify:
        tokens.verify(cfg.data, world.rank, world.size)
    start = state or before
    model = common.load_model(start, world) if start else new_model(cfg, encoding, world)
    model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = adam(model, cfg.offload)
    first = common.resume(state, optimizer)
    if common.can_compile(cfg, world):
        common.compile_blocks(model, dynamic=False)
    log = common.Log(last, world, steps, state, "loss held_out tokens_per_s mfu")
    meta = functools.partial(meta_of, cfg, contents, parent, encoding)
    save = functools.partial(common.save_state, last, model, meta, [optimizer], log)
    flops = model.flops_per_token(cfg.length)
    peak = peak_flops(cfg, world)

    batches = batches_of(stream, cfg, batch, world, encoding, first, steps)
    for step in common.loop(first, steps, last, world, save):
        began = time.monotonic()
        with record_function("data"):
            micro_batches = next(batches)
        loss, gradients, norm = loss_and_gradients(model, micro_batches, cfg, world)
        lr = cosine(step, whole, cfg.lr, cfg.warmup)
        rows = functools.partial(stream.chosen, step, batch)
        if log.healthy(step, rows, dict(loss=loss, gradient_norm=norm)):
            update(model, [(optimizer, lr, gradients)], cfg.weight_decay)

        done = step + 1
        speed = cfg.batch_tokens / (time.monotonic() - began)
        values = dict(loss=loss, lr=lr, gradient_norm=norm, tokens_per_s=speed)
        if peak:
            values["mfu"] = flops * speed / peak
        if done in paths or (cfg.eval_every and done % cfg.eval_every == 0):
            end = encoding.eot_token if cfg.doc_mask else None
            losses = held_out_losses(model, held_out, cfg.micro, world, end)
            values["held_out"] = statistics.fmean(losses)
        seconds = time.monotonic() - began
        costs = dict(tokens=cfg.batch_tokens, flops=flops * cfg.batch_tokens, seconds=seconds)
        log(step, costs, **values)
        if done in paths and done < steps:
            common.save(paths[done], model, meta(done))
    common.finish(last, model, meta(steps), log)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
