"""Pre-train OLMo2 from scratch on token shards and keep the checkpoints M_t that everything else starts from.

    python pretrain.py --data data/out/toy --out ckpt/toy
    torchrun --nproc_per_node 8 pretrain.py --preset 1b --data data/out/dolmino --out ckpt/1b

Next-token loss, every token weighs 1/n; AdamW, cosine to a tenth, z-loss. Writes OUT/step*.pt.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import checkpoint, ranks, run, tokens
from model import PRESETS, Model, ModelConfig, adam, cosine, update

# what depends on the size of the model; a flag overrides it
SIZES = {
    "toy": dict(tokens=5_600_000, batch_tokens=2048, length=256, lr=3e-3, weight_decay=0.05, warmup=100, embed_std=0.5),
    "paper": dict(tokens=50_000_000_000, batch_tokens=2_097_152, length=4096, lr=4e-4, weight_decay=0.1, warmup=2000, embed_std=0.02),
}


@dataclass(frozen=True)
class Config:
    data: str = "data/out/toy"  # folder of token shards, train_*.bin and val_*.bin
    out: str = "ckpt/toy"  # folder for step*.pt
    questions: str = ""  # questions that later stages take by default (default: DATA/easy if it is there)
    tasks: str = ""  # general-capability tasks that eval.py takes by default (default: DATA/tasks if it is there)
    preset: str = "toy"  # toy, toy-large, 190m, 1b or 4b
    tokens: int | None = None  # length of the run (toy 5.6M; paper: 50B)
    save_tokens: tuple[int, ...] = ()  # keep a checkpoint at these token counts, besides the last
    save_steps: tuple[int, ...] = ()  # the same, in steps
    batch_tokens: int | None = None  # tokens a step over all ranks (toy 2048; paper: 512 x 4096)
    length: int | None = None  # tokens a row (toy 256; paper: 4096)
    micro: int = 32  # rows a forward pass; never changes the result
    lr: float | None = None  # peak learning rate (toy 3e-3; paper: 4e-4, cosine)
    warmup: int | None = None  # steps of linear warm-up (toy 100; paper: not given, OLMo2: 2000)
    weight_decay: float | None = None  # on everything but the embedding (toy 0.05; OLMo2: 0.1)
    # OLMo2: 0.02. Blocks add outputs of RMS 1 (post-norm) to an embedding of RMS 0.02: a short run spends its first half
    # on making the embedding heard. Try --embed_std 0.02 beside the default and compare held_out in the metrics.
    embed_std: float | None = None  # initial std of the embedding (toy 0.5; OLMo2: 0.02)
    z_loss: float = 1e-5  # OLMo2: keeps the log-normaliser near 0
    clip: float = 1.0  # largest gradient norm
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number, or a spike: stop, or skip the update
    spike: float = 0.0  # standard deviations above the last 128 steps that make a spike (0: none does; OLMo2: 6)
    eval_every: int = 200  # steps between losses on the held-out text
    eval_rows: int = 64  # rows of held-out text
    save_every: int = 200  # steps between states for --resume
    save_minutes: float = 30.0  # minutes between them at most; a SIGTERM or SIGINT saves one too
    compile: bool = True  # torch.compile the blocks; costs seconds at the start, more the first time on a machine
    seed: int = 0  # initial weights and order of the text
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    resume: bool = False  # go on from the last saved state; starts afresh if there is none
    overwrite: bool = False  # replace what is there


@torch.no_grad()
def held_out_loss(model, stream, cfg, world) -> float:
    """Mean negative log-likelihood (nats a token) of the first eval_rows windows of the validation text."""
    count = min(cfg.eval_rows, stream.windows)
    rows = [stream.window(i) for i in range(world.rank, count, world.size)]
    total = 0.0
    for i in range(0, len(rows), cfg.micro):
        ids = torch.from_numpy(np.stack(rows[i : i + cfg.micro])).to(world.device)
        loss, *_ = model(ids, weight=torch.ones_like(ids[:, 1:], dtype=torch.float32))
        total += float(loss)
    return world.sum(total)[0] / (count * cfg.length)


def main(cfg):
    if cfg.preset not in PRESETS:
        raise ValueError(f"no preset {cfg.preset!r}: there are {', '.join(PRESETS)}")
    cfg = run.fill(cfg, SIZES["toy" if cfg.preset.startswith("toy") else "paper"])
    world = ranks.start(cfg.device, cfg.dtype)
    stream = tokens.Stream(cfg.data, "train", cfg.length, cfg.seed)
    held_out = tokens.Stream(cfg.data, "val", cfg.length, cfg.seed)
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
    first = state["step"] if state else 0
    vocab = tokens.vocab_size(enc)
    shape = {**PRESETS[cfg.preset], "context": max(cfg.length, PRESETS[cfg.preset]["context"])}
    model = Model(ModelConfig(**shape, vocab=vocab, padded_vocab=-(-vocab // 128) * 128), world.compute)
    ranks.place(model.init_weights(cfg.seed, cfg.embed_std), world)
    optimizer = adam(model)
    if state:
        checkpoint.fill_model(model, state)
        optimizer.load_state_dict(state["optimizers"][0])
    if cfg.compile and ranks.can_compile(world):
        ranks.compile_blocks(model, dynamic=False)

    def beside(name):  # what prepare.py toy puts next to the text
        return str(Path(cfg.data) / name) if (Path(cfg.data) / name).is_dir() else ""

    world_file = Path(cfg.data) / "world.json"
    world_name = json.loads(world_file.read_text())["name"] if world_file.exists() else Path(cfg.data).name

    def meta(step):
        return checkpoint.new_meta(
            cfg, stage="pretrain", recipe="base", step=step, tokens=step * cfg.batch_tokens, parent="", preset=cfg.preset,
            encoding=enc.name, world=world_name, pretrain_seed=cfg.seed,
            questions=cfg.questions or beside("easy"), tasks=cfg.tasks or beside("tasks"),
        )  # fmt: skip

    log = run.Log(path[steps], world, steps, state, "loss held_out tokens_per_s")
    flops = model.flops_per_token(cfg.length)

    def save(done):
        checkpoint.save_state(path[steps], model, meta(done), done, [optimizer], log)

    for step in run.loop(first, steps, cfg, world, save):
        began = time.time()
        lr = cosine(step, steps, cfg.lr, cfg.warmup)
        rows = torch.from_numpy(stream.rows(step, batch, world.rank, world.size))
        loss = 0.0
        for ids in rows.split(cfg.micro):
            ids = ids.to(world.device)
            # one denominator: every token of the step, on all ranks, weighs the same
            weight = torch.full(ids[:, 1:].shape, 1 / cfg.batch_tokens, device=world.device)
            part, *_ = model(ids, weight=weight, z_loss=cfg.z_loss / cfg.batch_tokens)
            part.backward()
            loss += float(part.detach())
        grads, norm = ranks.gradients(model, world, cfg.clip)
        loss = world.sum(loss)[0]
        if log.healthy(step, cfg, lambda step=step: stream.chosen(step, batch), loss=loss, gradient_norm=norm):
            update(model, [(optimizer, lr, grads)], cfg.weight_decay)

        done = step + 1
        extra = {}
        if (cfg.eval_every and done % cfg.eval_every == 0) or done in keep:
            extra["held_out"] = held_out_loss(model, held_out, cfg, world)
        seconds = time.time() - began
        log(step, dict(tokens=cfg.batch_tokens, flops=flops * cfg.batch_tokens, seconds=seconds), loss=loss, lr=lr,
            gradient_norm=norm, tokens_per_s=cfg.batch_tokens / seconds, **extra)  # fmt: skip
        if done in keep:
            checkpoint.save(path[done], model, meta(done))
    log.close()
    checkpoint.finish(path[steps])


if __name__ == "__main__":
    run.main(main, Config, __doc__)
