"""Supervised fine-tuning on solutions: M_t -> M_t^SFT, or on all of them M_t^SFT-Gold.

    python sft.py --init ckpt/toy/step5859.pt
    torchrun --nproc_per_node 8 sft.py --init ckpt/1b/step5000.pt --solutions all

Next-token loss on the answer and its end token: each of the batch's n answer tokens weighs 1/n, the
prompt weighs 0.
"""

import functools
import time
from dataclasses import dataclass

from torch.profiler import record_function

import common
import plan
from common import Count, NonNegative, Positive, Whole
from data import problems, tokens
from eval import validate
from model import Sampler, adam, cosine, update


@dataclass(frozen=True, kw_only=True)
class Config(common.PostTraining):
    solutions: str = "1"  # per question: 1 (the realistic case), 2, ... or all (SFT-Gold)
    epochs: Positive = 5.0  # paper: 5, "10 add nothing"
    steps: Whole = 0  # train for so many steps instead (0: what --epochs makes)
    batch: Count = 16  # solutions per step, over all ranks
    lr: Positive = 1e-3  # peak learning rate, cosine to a tenth; decides how much is forgotten
    warmup: Whole = 10  # steps of linear warm-up
    weight_decay: NonNegative = 0.0  # off: a few hundred steps are not what decay is for
    clip: NonNegative = 1.0  # largest norm of the gradient (0: any)
    eval_every: Whole = 0  # steps between validations (0: only before and after)
    compile: bool = False  # torch.compile the blocks: pays for runs of several minutes


# What a checkpoint of the paper's sizes gets instead; the paper gives neither.
PAPER = dict(batch=64, lr=2e-5, max_new=512)


def check(cfg):
    if cfg.solutions != "all" and not (cfg.solutions.isdecimal() and int(cfg.solutions)):
        raise ValueError(f"--solutions takes a whole number from 1, or all, not {cfg.solutions!r}")


def tokenise(run: common.Setup) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of every solution that is trained on, the end token with it."""
    cfg = run.cfg
    pairs = []
    for question, solution in problems.solution_pairs(run.train, cfg.solutions, cfg.seed):
        prompt = tokens.encode(run.encoding, problems.prompt(run.form, question))
        pairs.append((prompt, problems.answer_ids(run.encoding, solution)))
    return pairs


@record_function("data")
def sft_batch(run: common.Setup, pairs: list, step: int) -> problems.Batch:
    """This rank's rows of SFT step `step`; the answer tokens of the whole batch weigh the same."""
    cfg = run.cfg
    chosen = [pairs[i] for i in problems.shuffled(len(pairs), cfg.batch, cfg.seed, step)]
    n = sum(len(answer) for _, answer in chosen)
    mine = chosen[run.world.share(cfg.batch, "--batch")]
    prompts = [prompt for prompt, _ in mine]
    answers = [answer for _, answer in mine]
    pad = tokens.pad_id(run.encoding)
    weights = [1 / n] * len(mine)
    return problems.make_batch(prompts, answers, weights, pad, per_row=cfg.per_row)


def sft_gradients(run: common.Setup, batch: problems.Batch):
    """-> loss over all ranks, the gradients of the batch, summed and clipped, and their norm."""
    loss = 0.0
    for micro in problems.micro_batches(batch, run.cfg.micro, run.world):
        part, *_ = run.model(
            micro.ids, micro.target, weight=micro.weight, mask=micro.mask, layout=micro.layout
        )
        with record_function("backward"):
            part.backward()
        loss += part.detach().double()  # read once for all: to read is to wait for the GPU
    gradients, norm = common.gradients(run.model, run.world, run.cfg.clip)
    return run.world.sum(loss)[0], gradients, norm


def recipe_of(cfg: Config) -> str:
    names = {"1": "sft", "all": "sft-gold"}
    return cfg.recipe or names.get(cfg.solutions, f"sft-{cfg.solutions}")


def job_of(cfg: Config) -> plan.Job:
    """What a run trains on, reads and samples, for --plan."""
    there = plan.questions(cfg.questions, cfg.plan, "train")
    share = min(1, cfg.limit / there.train) if cfg.limit else 1
    pairs = there.solutions if cfg.solutions == "all" else there.train * int(cfg.solutions)
    steps = cfg.steps or max(1, round(cfg.epochs * share * pairs / cfg.batch))
    validations = common.validations(cfg, steps) * cfg.eval_questions
    answer = plan.longest_answer(cfg.max_new)
    counts = plan.Tokens(
        trained=steps * cfg.batch * (plan.PROMPT + answer),
        read=validations * plan.PROMPT,
        sampled=validations * cfg.eval_n * answer,
    )
    answers = dict(asked=((cfg.eval_questions, cfg.eval_n),), max_new=cfg.max_new)
    return plan.Job("sft", [counts], plan.PROMPT + cfg.max_new, **answers, note=there.note)


def main(given: dict):
    cfg, before = common.configure(Config, given, PAPER, check, job_of)
    if cfg.plan:
        return plan.show(cfg, job_of(cfg), given)
    run = common.begin(cfg, before, recipe_of(cfg), solutions=cfg.solutions)
    cfg, world, model = run.cfg, run.world, run.model
    pairs = tokenise(run)
    common.check_batch(world, "--batch", cfg.batch, len(pairs))
    steps = cfg.steps or max(1, round(cfg.epochs * len(pairs) / cfg.batch))

    optimizer = adam(model, cfg.offload)
    first = common.resume(run.state, optimizer)
    compiled = common.can_compile(cfg, world)
    sampler = Sampler(model, cfg.rows, compiled) if run.held_out else None
    if compiled:
        common.compile_blocks(model)
    log = common.Log(cfg, world, steps, run.state, "loss")
    meta = functools.partial(common.child_meta, cfg, run.contents, run.parent, "sft")
    save = functools.partial(common.save_state, cfg, model, meta, [optimizer], log)

    for step in common.loop(first, steps, cfg, world, save):
        if common.validates(cfg, step):
            validate(run, sampler, log, step)
        began = time.monotonic()
        batch = sft_batch(run, pairs, step)
        loss, gradients, norm = sft_gradients(run, batch)
        lr = cosine(step, steps, cfg.lr, cfg.warmup)
        rows = functools.partial(problems.shuffled, len(pairs), cfg.batch, cfg.seed, step)
        if log.healthy(step, rows, dict(loss=loss, gradient_norm=norm)):
            update(model, [(optimizer, lr, gradients)], cfg.weight_decay)
        size = batch.mask.shape[1]  # padding counts as work done
        flops = len(batch.ids) * world.size * size * model.flops_per_token(size)
        costs = dict(flops=flops, questions=cfg.batch, seconds=time.monotonic() - began)
        trained = int(world.sum(float(batch.mask.sum()))[0])
        speed = trained / costs["seconds"]
        log(step, costs, loss=loss, gradient_norm=norm, tokens=trained, tokens_per_s=speed)
    validate(run, sampler, log, steps)
    common.finish(cfg, model, meta(steps), log)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
