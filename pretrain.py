"""Pre-train OLMo2 from scratch on token shards and keep the checkpoints M_t that everything else starts from.

    python pretrain.py --data data/out/toy --out ckpt/toy
    torchrun --nproc_per_node 8 pretrain.py --preset 1b --data data/out/dolmino --out ckpt/1b
    python pretrain.py --data data/out/toy --init ckpt/toy/step1367-rl.pt --tokens 1.4M       # -> ckpt/toy/step1367-rl-text/

Next-token loss, every token weighs 1/n; AdamW, cosine to a tenth, z-loss. Writes OUT/step*.pt. With --init the text goes on
where the pre-training of that checkpoint stopped, whatever came after it; the optimizer and its schedule begin anew.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import record_function

from data import checkpoint, ranks, run, tokens
from eval import held_out_losses
from model import PRESETS, Model, ModelConfig, adam, cosine, update

# what depends on the size of the model; a flag overrides it
SIZES = {
    "toy": dict(tokens=7_000_000, batch_tokens=2048, length=128, lr=4e-3, weight_decay=0.05, warmup=100, embed_std=0.5),
    "paper": dict(tokens=50_000_000_000, batch_tokens=2_097_152, length=4096, lr=4e-4, weight_decay=0.1, warmup=2000, embed_std=0.02),
}


# TFLOP/s of dense bf16 products, NVIDIA's data sheets; the first name that occurs in the GPU's
PEAK = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


@dataclass(frozen=True)
class Config:
    data: str = "data/out/toy"  # folder of token shards, train_*.bin and val_*.bin
    out: str | None = None  # folder for step*.pt (ckpt/toy, with --init INIT-text)
    init: str | None = None  # checkpoint whose weights to go on with (default: new weights)
    questions: str = ""  # questions that later stages take by default (default: DATA/easy if it is there)
    tasks: str = ""  # general-capability tasks that eval.py takes by default (default: DATA/tasks if it is there)
    preset: str | None = None  # toy, toy-large, 190m, 1b or 4b (toy; with --init what that is)
    tokens: int | None = None  # length of the run, without what --init has read (toy 7M; paper: 50B)
    save_tokens: tuple[int, ...] = ()  # keep a checkpoint at these token counts, besides the last
    save_steps: tuple[int, ...] = ()  # the same, in steps
    batch_tokens: int | None = None  # tokens a step over all ranks (toy 2048; paper: 512 x 4096)
    length: int | None = None  # tokens a row (toy 128; paper: 4096; with --init as before: another length is another order)
    doc_mask: bool = False  # attention and positions stay inside a document (the end-of-text id ends one); paper: not given
    micro: int = 32  # rows a forward pass; never changes the result
    lr: float | None = None  # peak learning rate (toy 4e-3; paper: 4e-4, cosine)
    warmup: int | None = None  # steps of linear warm-up (toy 100; paper: not given, OLMo2: 2000)
    weight_decay: float | None = None  # on everything but the embedding (toy 0.05; OLMo2: 0.1)
    # OLMo2: 0.02. Blocks add outputs of RMS 1 (post-norm) to an embedding of RMS 0.02: a short run spends its first half
    # on making the embedding heard. Try --embed_std 0.02 beside the default and compare held_out in the metrics.
    embed_std: float | None = None  # initial std of the embedding (toy 0.5; OLMo2: 0.02)
    z_loss: float = 1e-5  # OLMo2: keeps the log-normaliser near 0
    clip: float = 1.0  # largest gradient norm (0: any)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number, or a spike: stop, or skip the update
    spike: float = 0.0  # standard deviations above the last 128 steps that make a spike (0: none does; OLMo2: 6)
    eval_every: int = 200  # steps between losses on the held-out text
    eval_rows: int = 64  # rows of held-out text
    save_every: int = 200  # steps between states for --resume
    save_minutes: float = 30.0  # minutes between them at most; a SIGTERM or SIGINT saves one too
    verify: bool = True  # read all the text once and compare its checksums (1 GB/s a rank)
    compile: bool = True  # torch.compile the blocks; costs seconds at the start, more the first time on a machine
    checkpoint_activations: bool = False  # keep only the blocks' inputs, run each block again when going backward: less memory, slower
    shard: bool = False  # split weights, gradients and moments over the ranks (FSDP2), for what one GPU cannot hold
    seed: int | None = None  # initial weights and order of the text (0); with --init only the run's name (default: that of INIT)
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    peak_tflops: float = 0.0  # TFLOP/s of one device, for the mfu in the metrics (0: known for A100, H100 and H200, else no mfu)
    profile: int = 0  # profile so many steps: OUT.trace.json for Perfetto or chrome://tracing, and the shares of a step's time (0: none)
    resume: bool = False  # go on from the last saved state; starts afresh if there is none
    overwrite: bool = False  # replace what is there


def ready(rows, cfg, world, end):
    """Rows (B, length + 1) for the model: ids, and with --doc_mask where documents start; in memory that a GPU reads on its own."""
    both = torch.from_numpy(rows), torch.from_numpy(tokens.document_starts(rows, end)) if cfg.doc_mask else None
    return [x.pin_memory() if x is not None and world.device.type == "cuda" else x for x in both]


def here(part, world):
    return [x if x is None else x.to(world.device, non_blocking=True) for x in part]


def peak_flops(cfg, world) -> float:
    """FLOP/s that the devices of all ranks could do together; 0 if that is not known."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return world.size * 1e12 * (cfg.peak_tflops or next((peak for part, peak in PEAK.items() if part in name), 0))


def defaults(cfg, parent: dict) -> dict:
    """What the flags leave open, by the size of the model and, with --init, by the meta of that checkpoint."""
    preset = parent.get("preset", cfg.preset or "toy")
    sizes = SIZES["toy" if preset.startswith("toy") else "paper"] | {"preset": preset, "out": "ckpt/toy", "seed": 0}
    if parent:
        sizes |= {"length": parent["length"], "seed": parent["seed"], "out": f"{Path(cfg.init).with_suffix('')}-text", "embed_std": None}
    return sizes


def main(cfg):
    before = checkpoint.load(cfg.init) if cfg.init else {"meta": {}}
    parent = before["meta"]
    if cfg.preset not in (None, *PRESETS):
        raise ValueError(f"no preset {cfg.preset!r}: there are {', '.join(PRESETS)}")
    if parent and (cfg.preset or parent["preset"], cfg.embed_std) != (parent["preset"], None):
        raise ValueError(f"{cfg.init} has weights, of preset {parent['preset']}: --preset and --embed_std are for new ones")
    cfg = run.fill(cfg, defaults(cfg, parent))
    world = ranks.start(cfg.device, cfg.dtype, cfg.shard)
    where = parent.get("pretrain_seed", cfg.seed), parent.get("encoding"), parent.get("tokens", 0)
    stream = tokens.Stream(cfg.data, "train", cfg.length, *where)
    held_out = tokens.Stream(cfg.data, "val", cfg.length, cfg.seed).beginning(cfg.eval_rows)
    enc = tokens.encoding(stream.encoding_name)
    if cfg.batch_tokens % (cfg.length * world.size):
        unit = cfg.length * world.size
        near = cfg.batch_tokens // unit * unit or unit
        raise ValueError(f"--batch_tokens {cfg.batch_tokens} is not a multiple of {world.size} ranks x {cfg.length} tokens: "
                         f"{near} or {near + unit} would be")  # fmt: skip
    batch = cfg.batch_tokens // cfg.length  # rows a step, over all ranks
    steps = max(1, round(cfg.tokens / cfg.batch_tokens))
    keep = {round(t / cfg.batch_tokens) for t in cfg.save_tokens} | set(cfg.save_steps) | {steps}
    if not all(0 < k <= steps for k in keep):
        raise ValueError(f"--save_tokens or --save_steps lies outside the run of {steps} steps of {cfg.batch_tokens} tokens")
    path = {k: str(Path(cfg.out) / f"step{k}.pt") for k in keep}

    state = checkpoint.claim(path[steps], cfg, others=path.values())
    if cfg.verify:
        tokens.verify(cfg.data, world.rank, world.size)
    if state or parent:
        model = checkpoint.load_model(state or before, Model, ModelConfig, world)
    else:
        vocab = tokens.vocab_size(enc)
        shape = {**PRESETS[cfg.preset], "context": max(cfg.length, PRESETS[cfg.preset]["context"])}
        with torch.device("meta"):
            model = Model(ModelConfig(**shape, vocab=vocab, padded_vocab=-(-vocab // 128) * 128), world.compute)
        ranks.place(model, world).init_weights(cfg.seed, cfg.embed_std, ranks.put)
    model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = adam(model)
    first = checkpoint.resume(state, optimizer)
    if cfg.compile and ranks.can_compile(world):
        ranks.compile_blocks(model, dynamic=False)

    def beside(name):  # what prepare.py toy puts next to the text
        return str(Path(cfg.data) / name) if (Path(cfg.data) / name).is_dir() else ""

    world_file = Path(cfg.data) / "world.json"
    world_name = json.loads(world_file.read_text())["name"] if world_file.exists() else Path(cfg.data).name

    def meta(step):
        read = step * cfg.batch_tokens
        if parent:
            more = {"tokens": parent["tokens"] + read, "length": cfg.length, "tasks": cfg.tasks or parent["tasks"]}
            return checkpoint.child_meta(cfg, parent, "pretrain", "text", step) | more
        return checkpoint.new_meta(
            cfg, stage="pretrain", recipe="base", step=step, tokens=read, length=cfg.length, parent="", preset=cfg.preset,
            encoding=enc.name, world=world_name, pretrain_seed=cfg.seed,
            questions=cfg.questions or beside("easy"), tasks=cfg.tasks or beside("tasks"),
        )  # fmt: skip

    log = run.Log(path[steps], world, steps, state, "loss held_out tokens_per_s mfu")
    flops, peak = model.flops_per_token(cfg.length), peak_flops(cfg, world)

    def text(step):
        rows = stream.rows(step, batch, world.rank, world.size)
        return [ready(rows[i : i + cfg.micro], cfg, world, enc.eot_token) for i in range(0, len(rows), cfg.micro)]

    batches = tokens.ahead(text, first, steps)

    def save(done):
        checkpoint.save_state(path[steps], model, meta(done), done, [optimizer], log)

    for step in run.loop(first, steps, cfg, world, save):
        began = time.time()
        lr = cosine(step, steps, cfg.lr, cfg.warmup)
        with record_function("data"):
            parts = [here(part, world) for part in next(batches)]
        loss = 0.0
        for ids, starts in parts:
            # one denominator: every token of the step, on all ranks, weighs the same
            weight = torch.full(ids[:, 1:].shape, 1 / cfg.batch_tokens, device=world.device)
            part, *_ = model(ids, weight=weight, z_loss=cfg.z_loss / cfg.batch_tokens, starts=starts)
            with record_function("backward"):
                part.backward()
            loss += part.detach().double()  # read once for all parts: to read is to wait for the GPU
        grads, norm = ranks.gradients(model, world, cfg.clip)
        loss = world.sum(loss)[0]
        if log.healthy(step, cfg, lambda step=step: stream.chosen(step, batch), dict(loss=loss, gradient_norm=norm)):
            update(model, [(optimizer, lr, grads)], cfg.weight_decay)

        done = step + 1
        speed = cfg.batch_tokens / (time.time() - began)
        extra = {"mfu": flops * speed / peak} if peak else {}
        if (cfg.eval_every and done % cfg.eval_every == 0) or done in keep:
            losses = held_out_losses(model, held_out, cfg.micro, world, enc.eot_token if cfg.doc_mask else None)
            extra["held_out"] = statistics.fmean(losses)
        seconds = time.time() - began
        log(step, dict(tokens=cfg.batch_tokens, flops=flops * cfg.batch_tokens, seconds=seconds), loss=loss, lr=lr,
            gradient_norm=norm, tokens_per_s=speed, **extra)  # fmt: skip
        if done in keep and done < steps:
            checkpoint.save(path[done], model, meta(done))
    checkpoint.save(path[steps], model, meta(steps))
    log.close()
    checkpoint.finish(path[steps])


if __name__ == "__main__":
    run.main(main, Config, __doc__)
