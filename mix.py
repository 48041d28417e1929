"""Parallel averaging of RL and SFT (the paper's section on combining them): M_t -> M_t^mix.

    python mix.py --init ckpt/toy/step5859.pt
    python mix.py --init ckpt/toy/step5859.pt --share 0 --share_end 1     # from SFT to RL
    python mix.py --init ckpt/toy/step5859.pt --text data/out/toy         # RL inside pre-training

Each step, from one theta: an RL batch gives the RL optimizer's update Delta_RL, an SFT batch the
SFT optimizer's update Delta_SFT, and

    theta <- theta + share * Delta_RL + (1 - share) * Delta_SFT.

The optimizers keep their own moments. An AdamW update is linear in its learning rate, so the shares
go into the rates and theta is never copied (model.update). All other settings the same, --share 1
is rl.py and --share 0 is sft.py, bit for bit. With --text the second batch is text that goes on
where pre-training stopped: every token weighs 1/n (pretrain.py's z-loss and --doc_mask are off).
"""

import functools
import time
from dataclasses import dataclass

import common
import plan
import rl
import sft
from common import Count, Fraction, Positive, Whole
from data import problems, tokens
from eval import validate
from model import Sampler, adam, cosine, update
from rl import rl_batch, rl_gradients
from sft import sft_batch, sft_gradients, tokenise


@dataclass(frozen=True, kw_only=True)
class Config(rl.Config):
    """All flags of rl.py, which are those of the RL half; --lr is its learning rate."""

    share: Fraction = 0.5  # of the RL update; the SFT update has the rest (paper: one half)
    # the share at the last step, to which it goes linearly from --share
    share_end: Fraction | None = None  # none: it stays
    text: str = ""  # folder of token shards: pre-training text in place of the solutions
    solutions: str = "1"  # SFT: solutions per question, a number or all
    # SFT: solutions per step over all ranks, or rows of text as long as in pre-training
    batch: Count = 7  # 2,100 in 300 steps: about 5 epochs of 400 questions, as sft.py
    sft_lr: Positive = 1e-3  # SFT, or text: peak learning rate, cosine to a tenth
    sft_warmup: Whole = 10  # SFT: steps of linear warm-up


# What a checkpoint of the paper's sizes gets instead.
PAPER = rl.PAPER | dict(sft_lr=2e-5, batch=64)


def share_of(cfg, step: int) -> float:
    """RL's share of step `step`.

    At 0 or 1 the side without a share changes no weight, and its moments go on all the same.
    """
    end = cfg.share if cfg.share_end is None else cfg.share_end
    return cfg.share + (end - cfg.share) * step / max(1, cfg.steps - 1)


def check(cfg: Config):
    rl.check(cfg)
    sft.check(cfg)


def recipe_of(cfg: Config) -> str:
    names = {"1": "mix", "all": "mix-gold"}
    usual = "mix-text" if cfg.text else names.get(cfg.solutions, f"mix-{cfg.solutions}")
    return cfg.recipe or usual


def job_of(cfg: Config) -> plan.Job:
    """What a run trains on, reads and samples, for --plan."""
    job = rl.job_of(cfg)
    length = plan.PROMPT + plan.longest_answer(cfg.max_new)
    if cfg.text:
        length = plan.text_row(cfg.plan)
    second = plan.Tokens(trained=cfg.steps * cfg.updates * cfg.batch * length, length=length)
    row = max(job.row, length)
    return job._replace(script="mix", parts=[*job.parts, second], optimizers=2, row=row)


def text_stream(cfg: Config, before: dict):
    """The text that goes on where the pre-training of the checkpoint stopped; None without --text.

    Raises ValueError if it comes together with --solutions.
    """
    if not cfg.text:
        return None
    if cfg.solutions != "1":
        raise ValueError("--text takes the place of the solutions: leave out --solutions")
    meta = before["meta"]
    seen = meta["tokens"]
    return tokens.Stream(
        cfg.text, "train", meta["length"], meta["pretrain_seed"], meta["encoding"], seen
    )


def main(given: dict):
    cfg, before = common.configure(Config, given, PAPER, check, job_of)
    if cfg.plan:
        return plan.show(cfg, job_of(cfg), given)
    text = text_stream(cfg, before)
    solutions = None if text else cfg.solutions
    how = dict(max_new=cfg.max_new, shots=cfg.shots, solutions=solutions, text=text)
    run = common.begin(cfg, before, recipe_of(cfg), **how)
    cfg, world, model = run.cfg, run.world, run.model
    pairs = [] if text else tokenise(run)
    common.check_batch(world, "--questions_per_step", cfg.questions_per_step, len(run.train))
    common.check_batch(world, "--batch", cfg.batch, cfg.batch if text else len(pairs))
    start = common.load_model(before, world) if cfg.kl else None

    rl_optimizer, sft_optimizer = (adam(model, cfg.offload) for _ in range(2))
    first = common.resume(run.state, rl_optimizer, sft_optimizer)
    compiled = common.can_compile(cfg, world)
    sampler = Sampler(model, cfg.rows, compiled)
    if compiled:
        common.compile_blocks(model)
        if start:
            common.compile_blocks(start)
    log = common.Log(cfg, world, cfg.steps, run.state, "reward correct flat truncated sft_loss")
    meta = functools.partial(common.child_meta, cfg, run.contents, run.parent, "mix")
    optimizers = [rl_optimizer, sft_optimizer]
    save = functools.partial(common.save_state, cfg, model, meta, optimizers, log)

    def rows(step, done):
        """Which rows both batches of an update have, for the log of one that went wrong."""
        count = cfg.questions_per_step
        second = problems.shuffled(len(pairs), cfg.batch, cfg.seed, done) if pairs else []
        return {
            "rl": problems.shuffled(len(run.train), count, cfg.seed, step),
            "sft": text.chosen(done, cfg.batch) if text else second,
        }

    for step in common.loop(first, cfg.steps, cfg, world, save):
        if common.validates(cfg, step):
            validate(run, sampler, log, step)
        began = time.monotonic()
        batch, numbers = rl_batch(run, sampler, step, log)
        old = rl.log_probs_of(model, batch, cfg, world) if cfg.updates > 1 else None
        reference = rl.log_probs_of(start, batch, cfg, world) if cfg.kl else None
        for i in range(cfg.updates):
            done = step * cfg.updates + i
            steps = cfg.steps * cfg.updates
            loss, rl_gradient, norm, known = rl_gradients(run, batch, old, reference)
            if i == 0:
                rl.check_mismatch(step, known["mismatch"], cfg)
                numbers |= known
            if text:
                second = problems.text_batch(text, cfg.batch, done, world)
            else:
                second = sft_batch(run, pairs, done)
            sft_loss, sft_gradient, sft_norm = sft_gradients(run, second)
            share = share_of(cfg, step)
            # floor 1: constant after the warm-up
            rl_lr = share * cosine(done, steps, cfg.lr, cfg.warmup, floor=1.0)
            sft_lr = (1 - share) * cosine(done, steps, cfg.sft_lr, cfg.sft_warmup)
            watched = dict(sft_loss=sft_loss, gradient_norm=norm, sft_gradient_norm=sft_norm)
            if log.healthy(step, functools.partial(rows, step, done), watched, loss=loss):
                halves = [
                    (rl_optimizer, rl_lr, rl_gradient),
                    (sft_optimizer, sft_lr, sft_gradient),
                ]
                update(model, halves, cfg.weight_decay)
        sampler.refresh()
        costs = rl.rl_costs(model, numbers, cfg, began)
        size = second.mask.shape[1]
        rows_read = len(second.ids) * world.size
        costs["flops"] += cfg.updates * rows_read * size * model.flops_per_token(size)
        speed = numbers["sampled_tokens"] / costs["seconds"]
        log(step, costs, loss=loss, share=share, **watched, **numbers, tokens_per_s=speed)
    validate(run, sampler, log, cfg.steps)
    common.finish(cfg, model, meta(cfg.steps), log)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
