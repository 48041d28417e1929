"""Parallel averaging of RL and SFT (the paper's section on combining them): M_t -> M_t^mix.

    python mix.py --init ckpt/toy/step3418.pt
    python mix.py --init ckpt/toy/step3418.pt --share 0 --share_end 1           # from SFT to RL
    python mix.py --init ckpt/toy/step3418.pt --text data/out/toy               # an RL excursion inside pre-training

Each step, from one theta: an RL batch gives the RL optimizer's update Delta_RL, an SFT batch the SFT optimizer's update
Delta_SFT, and  theta <- theta + share * Delta_RL + (1 - share) * Delta_SFT.  The optimizers keep their own moments. An
AdamW update is linear in its learning rate, so the shares go into the rates and theta is never copied (model.update).
All other settings the same, --share 1 is rl.py and --share 0 is sft.py, bit for bit. With --text the second
batch is text that goes on where pre-training stopped, with the loss of pre-training: every token weighs 1/n.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

from data import checkpoint, problems, ranks, run, tokens
from eval import solve
from model import Model, ModelConfig, Sampler, adam, cosine, update
from rl import check_mismatch, rl_backward, rl_batch, rl_costs
from sft import sft_backward, sft_batch, tokenise

SIZES = {
    "toy": dict(lr=3e-4, sft_lr=2e-3, questions_per_step=16, group=8, batch=32, steps=60, max_new=56),
    "paper": dict(lr=1e-6, sft_lr=2e-5, questions_per_step=128, group=64, batch=64, steps=1000, max_new=512),
}


@dataclass(frozen=True)
class Config:
    init: str  # checkpoint to start from
    out: str | None = None  # checkpoint to write (default: INIT-RECIPE.pt, with a --seed INIT-RECIPE-s1.pt)
    recipe: str = ""  # its name in files, rows and reports (default: mix, mix-gold for all solutions, mix-text)
    questions: str | None = None  # folder with train.jsonl and val.jsonl (default: what the checkpoint names)
    limit: int = 0  # use only the first so many training questions (0: all)
    share: float = 0.5  # of the RL update; the SFT update has the rest (paper: one half)
    share_end: float | None = None  # the share goes linearly from --share at the first step to this at the last (default: it stays)
    text: str | None = None  # folder of token shards: pre-training text in place of the solutions
    steps: int | None = None  # steps, as many RL as SFT batches (toy 60)
    questions_per_step: int | None = None  # RL: over all ranks (toy 16)
    group: int | None = None  # RL: answers a question (toy 8)
    max_new: int | None = None  # RL: longest answer (toy 56; its hard questions need 84)
    temperature: float = 1.0  # RL: of sampling and of the log-probs trained on
    format_reward: float = 0.1  # RL: for a wrong answer in the right form
    std_norm: bool = False  # RL: divide the advantage by the group's std
    lr: float | None = None  # RL: learning rate, constant after the warm-up (toy 3e-4)
    warmup: int = 5  # RL: updates of linear warm-up
    solutions: str = "1"  # SFT: solutions a question, 1 or all
    # toy 32: as many in 60 steps as sft.py sees in 5 epochs
    batch: int | None = None  # SFT: solutions a step, or rows of text as long as in pre-training, over all ranks (toy 32)
    sft_lr: float | None = None  # SFT, or text: peak learning rate, cosine to a tenth (toy 2e-3)
    sft_warmup: int = 10  # SFT: steps of linear warm-up
    micro: int = 64  # rows a forward pass; never changes the result
    weight_decay: float = 0.0  # of both
    clip: float = 1.0  # largest norm of each of the two gradients (0: any)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number, or a spike: stop, or skip the update
    spike: float = 0.0  # standard deviations above the last 128 steps that make a spike (0: none does; OLMo2: 6)
    max_mismatch: float = 0.1  # stop if sampler and trainer differ by more than this in mean |log-prob|
    eval_every: int = 10  # steps between validations (0: only before and after)
    eval_questions: int = 20  # validation questions; 0 to skip validation
    eval_n: int = 32  # answers to each
    save_every: int = 10  # steps between states for --resume
    save_minutes: float = 30.0  # minutes between them at most; a SIGTERM or SIGINT saves one too
    compile: bool = True  # torch.compile the blocks; costs seconds at the start, more the first time on a machine
    checkpoint_activations: bool = False  # keep only the blocks' inputs, run each block again when going backward: less memory, slower
    shard: bool = False  # split weights, gradients and moments over the ranks (FSDP2), for what one GPU cannot hold
    rows: int = 512  # answers sampled side by side; never changes the result
    seed: int = 0  # order of the questions, noise of the sampling, which solution
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    profile: int = 0  # profile so many steps: OUT.trace.json for Perfetto or chrome://tracing, and the shares of a step's time (0: none)
    resume: bool = False  # go on from the last saved state; starts afresh if there is none
    overwrite: bool = False  # replace what is there


def share_of(cfg, step: int) -> float:
    """RL's share of step `step`. At 0 or 1 the side without a share changes no weight, and its moments go on all the same."""
    end = cfg.share if cfg.share_end is None else cfg.share_end
    return cfg.share + (end - cfg.share) * step / max(1, cfg.steps - 1)


def main(cfg):
    for flag in ("share", "share_end"):
        if not 0 <= (getattr(cfg, flag) or 0) <= 1:
            raise ValueError(f"--{flag} lies between 0 (all SFT) and 1 (all RL), not {getattr(cfg, flag)}")
    if cfg.text and cfg.solutions != "1":
        raise ValueError("--text takes the place of the solutions: leave out --solutions")
    name = "mix-text" if cfg.text else {"1": "mix", "all": "mix-gold"}.get(cfg.solutions, f"mix-{cfg.solutions}")
    name = cfg.recipe or name
    cfg, world, model, parent, state = run.begin(cfg, name, SIZES, Model, ModelConfig)
    if cfg.group < 2:
        raise ValueError("--group takes 2 or more: an answer alone has the advantage 0")
    enc = tokens.encoding(parent["encoding"])
    rows = problems.load(cfg.questions, "train")[: cfg.limit or None]
    held_out = problems.load(cfg.questions, "val")[: cfg.eval_questions] if cfg.eval_questions else []
    where = parent["pretrain_seed"], parent["encoding"], parent["tokens"]
    text = tokens.Stream(cfg.text, "train", parent["length"], *where) if cfg.text else None
    pairs, pad = [] if text else tokenise(enc, rows, cfg.solutions, cfg.seed, problems.form(cfg.questions)), tokens.pad_id(enc)

    rl_optimizer, sft_optimizer = adam(model), adam(model)
    first = checkpoint.resume(state, rl_optimizer, sft_optimizer)
    compiled = cfg.compile and ranks.can_compile(world)
    sampler = Sampler(model, cfg.rows, compiled)
    if compiled:
        ranks.compile_blocks(model)
    log = run.Log(cfg.out, world, cfg.steps, state, "loss sft_loss reward cut flat")

    def validate(step):
        if held_out:
            log.add(step, validation=solve(sampler, enc, held_out, cfg.eval_n, cfg.max_new, 0.6, cfg.seed, world, form=problems.form(cfg.questions)))

    def batch_rows(step):
        return {"rl": problems.shuffled(len(rows), cfg.questions_per_step, cfg.seed, step),
                "sft": text.chosen(step, cfg.batch) if text else problems.shuffled(len(pairs), cfg.batch, cfg.seed, step)}  # fmt: skip

    def save(done):
        meta = checkpoint.child_meta(cfg, parent, "mix", name, done)
        checkpoint.save_state(cfg.out, model, meta, done, [rl_optimizer, sft_optimizer], log)

    for step in run.loop(first, cfg.steps, cfg, world, save):
        if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
            validate(step)
        began = time.time()
        batch, stats = rl_batch(sampler, rows, enc, cfg, step, world)
        loss, mismatch = rl_backward(model, batch, cfg, world)
        check_mismatch(step, mismatch, cfg)
        rl_gradients, norm = ranks.gradients(model, world, cfg.clip)
        if text:
            sft = problems.text_batch(text, cfg.batch, step, world)
        else:
            sft = sft_batch(pairs, pad, cfg.batch, cfg.seed, step, world)
        sft_loss = sft_backward(model, sft, cfg, world)
        sft_gradients, sft_norm = ranks.gradients(model, world, cfg.clip)
        loss, sft_loss = world.sum(loss, sft_loss)
        share = share_of(cfg, step)
        rl_lr = share * cosine(step, cfg.steps, cfg.lr, cfg.warmup, floor=1.0)
        sft_lr = (1 - share) * cosine(step, cfg.steps, cfg.sft_lr, cfg.sft_warmup)
        watched = dict(sft_loss=sft_loss, gradient_norm=norm, sft_gradient_norm=sft_norm)
        if log.healthy(step, cfg, functools.partial(batch_rows, step), watched, loss=loss):
            update(model, [(rl_optimizer, rl_lr, rl_gradients), (sft_optimizer, sft_lr, sft_gradients)], cfg.weight_decay)
        sampler.refresh()
        costs = rl_costs(model, batch, stats, cfg, began)
        costs["flops"] += cfg.batch * sft.mask.shape[1] * model.flops_per_token(sft.mask.shape[1])
        log(step, costs, loss=loss, sft_loss=sft_loss, gradient_norm=norm, sft_gradient_norm=sft_norm, share=share, **stats, **mismatch,
            tokens_per_s=stats["sampled_tokens"] / costs["seconds"])  # fmt: skip
    validate(cfg.steps)
    checkpoint.save(cfg.out, model, checkpoint.child_meta(cfg, parent, "mix", name, cfg.steps))
    log.close()
    checkpoint.finish(cfg.out)


if __name__ == "__main__":
    run.main(main, Config, __doc__)
