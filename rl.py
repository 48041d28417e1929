"""GRPO with verifiable rewards: M_t -> M_t^RL, or from an SFT checkpoint M_t^SFT -> M_t^SFT->RL.

    python rl.py --init ckpt/toy/step3418.pt
    torchrun --nproc_per_node 8 rl.py --init ckpt/1b/step5000.pt

A step: draw questions, sample a group of answers to each, grade them, give each answer the advantage r - mean(r of its
group), and take one gradient of  sum over answer tokens of  -advantage/N * log pi(token),  N = sampled tokens of the step.
No solution is ever read.

What differs from a textbook GRPO (arXiv 2402.03300):
 1. --std_norm false   the advantage is not divided by the group's std (veRL divides): with a format reward a gap of 0.1
                       inside a group would be blown up to 1
 2. --updates 1        one update a batch of rollouts: the ratio to the old policy is 1 and nothing needs clipping
 3. --kl 0             no pull to the start
 4. the loss is summed over all tokens of the step and divided by their number: long answers are not discounted (DAPO)
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.profiler import record_function

from data import checkpoint, grader, problems, ranks, run, tokens
from eval import solve
from model import Model, ModelConfig, Sampler, adam, cosine, update

SIZES = {
    "toy": dict(lr=1.5e-4, questions_per_step=16, group=8, steps=60, max_new=56),
    "paper": dict(lr=1e-6, questions_per_step=128, group=64, steps=1000, max_new=512),  # paper: n = 5 or 64; rest not given
}


@dataclass(frozen=True)
class Config:
    init: str  # checkpoint to start from
    out: str | None = None  # checkpoint to write (default: INIT-RECIPE.pt, with a --seed INIT-RECIPE-s1.pt)
    recipe: str = "rl"  # its name in files, rows and reports: a variant that is to stand beside rl needs one of its own
    questions: str | None = None  # folder with train.jsonl and val.jsonl (default: what the checkpoint names)
    limit: int = 0  # use only the first so many training questions (0: all)
    steps: int | None = None  # rollout batches (toy 60; paper: 600 to 1,600)
    questions_per_step: int | None = None  # over all ranks (toy 16; paper: not given)
    group: int | None = None  # answers a question, the n of the paper (toy 8; paper: 5 and 64)
    max_new: int | None = None  # longest answer; a longer one is cut and gets reward 0 (toy 56; its hard questions need 84)
    temperature: float = 1.0  # of sampling and of the log-probs trained on: one distribution for both
    format_reward: float = 0.1  # for a wrong answer in the right form; 0 for the pure reward (paper: has one, size not given)
    std_norm: bool = False  # divide the advantage by the group's std (veRL's default)
    updates: int = 1  # updates a rollout batch; more than one turns on clipping
    clip_ratio: float = 0.2  # PPO's epsilon, when updates > 1
    kl: float = 0.0  # weight of the KL to the starting checkpoint (k3 estimate)
    micro: int = 64  # rows a forward pass; never changes the result
    lr: float | None = None  # learning rate, constant after the warm-up (toy 1.5e-4: 6e-4 collapses)
    warmup: int = 5  # updates of linear warm-up
    weight_decay: float = 0.0  # off, as in veRL
    clip: float = 1.0  # largest gradient norm (0: any)
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
    seed: int = 0  # order of the questions and noise of the sampling
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    profile: int = 0  # profile so many steps: OUT.trace.json for Perfetto or chrome://tracing, and the shares of a step's time (0: none)
    resume: bool = False  # go on from the last saved state; starts afresh if there is none
    overwrite: bool = False  # replace what is there


def advantages(rewards_QG: torch.Tensor, std_norm: bool) -> torch.Tensor:
    """(Q, G) rewards -> r - mean over the group, divided by its std (population) if std_norm; GRPO, eq. in section 4.1.2.
    A flat group gets exactly 0: the mean of equal floats need not equal them."""
    centred = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if std_norm:
        centred = centred / rewards_QG.std(1, keepdim=True, unbiased=False).clamp_min(1e-6)
    flat = rewards_QG.amax(1, keepdim=True) == rewards_QG.amin(1, keepdim=True)
    return torch.where(flat, 0.0, centred)


def policy_loss(logp, old_logp, weight, clip_ratio):
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), summed: weight (B, T) is advantage/N, 0 outside the mask."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * weight, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * weight).sum()


def kl_to(reference_logp, logp):
    """k3 estimate of KL(pi || reference) a token, >= 0, from samples of pi (Schulman, 'Approximating KL Divergence')."""
    gap = reference_logp - logp
    return gap.exp() - gap - 1


def rl_batch(sampler, rows, enc, cfg, step: int, world) -> tuple[problems.Batch, dict]:
    """From questions to a batch: sample, grade, advantage. This rank's rows of RL step `step`, and the step's numbers."""
    chosen = [rows[i] for i in problems.shuffled(len(rows), cfg.questions_per_step, cfg.seed, step)]
    form = problems.form(cfg.questions)
    mine = chosen[world.share(cfg.questions_per_step, "--questions_per_step")]
    prompts = [tokens.encode(enc, problems.prompt(form, row["question"])) for row in mine]
    seeds = problems.answer_seeds(cfg.seed, step, mine, cfg.group)
    began = time.time()
    with record_function("sampling"):
        samples = sampler(prompts, cfg.group, cfg.max_new, seeds, [enc.eot_token], cfg.temperature)
    sampled = time.time()
    run.check_finite(step, sampled_log_prob=float(samples.logp.sum()))  # broken weights: every group would be flat

    answers = [row[:length] for row, length in zip(samples.tokens.tolist(), samples.lengths.tolist(), strict=True)]
    texts = [tokens.decode(enc, answer[: len(answer) - (not cut)]) for answer, cut in zip(answers, samples.cut.tolist(), strict=True)]
    truth = [row["answer"] for row in mine for _ in range(cfg.group)]
    with record_function("reward"):
        graded = grader.grade_all(texts, truth, (~samples.cut).tolist())  # (correct, well-formed); neither for a cut answer
    rewards = torch.tensor([grader.reward(*marks, cfg.format_reward) for marks in graded], dtype=torch.float64)
    advantage = advantages(rewards.view(len(mine), cfg.group), cfg.std_norm)

    names = ("reward", "correct", "formatted", "cut", "flat", "answers", "groups", "tokens")
    correct, formatted = zip(*graded, strict=True)
    flat = (advantage == 0).all(1).sum()
    sums = (rewards.sum(), sum(correct), sum(formatted), samples.cut.sum(), flat, len(texts), len(mine), samples.lengths.sum())
    total = dict(zip(names, world.sum(*map(float, sums)), strict=True))
    N = total["tokens"]  # one denominator: every sampled token of the step, on all ranks
    weights = (advantage.flatten() / N).tolist()
    logps = [row[:length] for row, length in zip(samples.logp, samples.lengths.tolist(), strict=True)]
    prompts = [prompt for prompt in prompts for _ in range(cfg.group)]
    batch = problems.make_batch(prompts, answers, weights, tokens.pad_id(enc), logps)
    stats = {name: total[name] / total["answers"] for name in ("reward", "correct", "formatted", "cut")}
    stats |= {"flat": total["flat"] / total["groups"], "length": N / total["answers"], "sampled_tokens": int(N), "waste": samples.waste,
              "sample_seconds": sampled - began, "grade_seconds": time.time() - sampled}  # fmt: skip
    return batch, stats


def rl_costs(model, batch, stats, cfg, began) -> dict:
    """What the step cost, for the log: FLOPs of sampling (a forward pass) and of cfg.updates passes of training."""
    rows, size = cfg.questions_per_step * cfg.group, batch.mask.shape[1]
    prompts = rows * size - stats["sampled_tokens"]  # roughly: padding counts as work done
    passes = stats["sampled_tokens"] / 3 + prompts / 3 / cfg.group + rows * size * getattr(cfg, "updates", 1)
    return dict(flops=passes * model.flops_per_token(size), questions=cfg.questions_per_step,
                sampled_tokens=stats["sampled_tokens"], seconds=time.time() - began)  # fmt: skip


def rl_backward(model, batch, cfg, world, old=None, reference=None) -> tuple:
    """Add the gradient of the batch to the model's; -> this rank's share of the loss, a tensor, and over all ranks the sampler's
    mismatch (|log-prob| apart, a token: mean, largest, k3 estimate of the KL) and the entropy of the policy (nats a token).

    On-policy (old is None, no KL) the ratio is 1 and the gradient is that of  sum weight * -log pi.  Otherwise `old` and
    `reference` are log-probs of the same micro-batches from the same forward pass."""
    loss, gaps = 0.0, []
    count = world.sum(float(batch.mask.sum()))[0] if reference is not None else 1
    for i, micro in enumerate(problems.micro_batches(batch, cfg.micro, world, idle=reference is not None)):
        if old is None and reference is None:
            part, logp, entropy = model(micro.ids, weight=micro.weight, mask=micro.mask, temperature=cfg.temperature)
        else:
            logp, entropy = model(micro.ids, mask=micro.mask, temperature=cfg.temperature)
            part = policy_loss(logp, logp.detach() if old is None else old[i], micro.weight, cfg.clip_ratio)
            if reference is not None:
                part = part + cfg.kl * (kl_to(reference[i], logp) * micro.mask).sum() / count
        with record_function("backward"):
            part.backward()
        loss += part.detach().double()  # read once for all of them: to read is to wait for the GPU
        gap = torch.where(micro.mask, logp.detach() - micro.logp, 0).double()
        told = gap.abs().sum(), (gap.exp() - gap - 1).sum(), entropy.detach().double().sum(), micro.mask.sum(), gap.abs().amax()
        gaps.append(torch.stack([x.double() for x in told]))
    gaps = torch.stack(gaps) if gaps else torch.zeros(1, 5)  # all groups of this rank may be flat
    total, kl, entropy, count = world.sum(*gaps[:, :4].sum(0))
    sums = {"mismatch": total, "mismatch_kl": kl, "entropy": entropy}
    mean = {name: value / count if count else None for name, value in sums.items()}  # over groups that are not flat
    return loss, mean | {"mismatch_max": world.max(gaps[:, 4].max())[0]}


def check_mismatch(step: int, mismatch: dict, cfg):
    """Raises ValueError if the sampler's log-probs are not the trainer's: what is trained was not what was sampled."""
    if (mismatch["mismatch"] or 0) > cfg.max_mismatch:
        raise ValueError(f"sampler and trainer differ by {mismatch['mismatch']:.3g} in mean |log-prob| at step {step}, "
                         f"more than --max_mismatch {cfg.max_mismatch}: stopped before the update")  # fmt: skip


@torch.no_grad()
def micro_log_probs(model, batch, cfg, world) -> list:
    """Log-probs of each micro-batch under `model`, from the same forward pass that training uses."""
    parts = problems.micro_batches(batch, cfg.micro, world, idle=cfg.kl != 0)
    return [model(micro.ids, mask=micro.mask, temperature=cfg.temperature)[0] for micro in parts]


def main(cfg):
    cfg, world, model, parent, state = run.begin(cfg, cfg.recipe, SIZES, Model, ModelConfig)
    enc = tokens.encoding(parent["encoding"])
    if cfg.temperature <= 0:
        raise ValueError("--temperature must be above 0: the policy that is trained is the one that is sampled")
    if cfg.group < 2:
        raise ValueError("--group takes 2 or more: an answer alone has the advantage 0")
    rows = problems.load(cfg.questions, "train")[: cfg.limit or None]
    held_out = problems.load(cfg.questions, "val")[: cfg.eval_questions] if cfg.eval_questions else []
    start = checkpoint.load_model(checkpoint.load(cfg.init), Model, ModelConfig, world) if cfg.kl else None

    optimizer = adam(model)
    first = checkpoint.resume(state, optimizer)
    compiled = cfg.compile and ranks.can_compile(world)
    sampler = Sampler(model, cfg.rows, compiled)
    if compiled:
        ranks.compile_blocks(model)
    log = run.Log(cfg.out, world, cfg.steps, state, "loss reward cut flat")

    def validate(step):
        if held_out:
            log.add(step, validation=solve(sampler, enc, held_out, cfg.eval_n, cfg.max_new, 0.6, cfg.seed, world, form=problems.form(cfg.questions)))

    def save(done):
        checkpoint.save_state(cfg.out, model, checkpoint.child_meta(cfg, parent, "rl", cfg.recipe, done), done, [optimizer], log)

    for step in run.loop(first, cfg.steps, cfg, world, save):
        if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
            validate(step)
        began = time.time()
        batch, stats = rl_batch(sampler, rows, enc, cfg, step, world)
        old = micro_log_probs(model, batch, cfg, world) if cfg.updates > 1 else None
        reference = micro_log_probs(start, batch, cfg, world) if cfg.kl else None
        for again in range(cfg.updates):
            loss, mismatch = rl_backward(model, batch, cfg, world, old, reference)
            loss = world.sum(loss)[0]
            if again == 0:
                stats |= mismatch
                check_mismatch(step, mismatch, cfg)
            grads, norm = ranks.gradients(model, world, cfg.clip)
            lr = cosine(step * cfg.updates + again, cfg.steps * cfg.updates, cfg.lr, cfg.warmup, floor=1.0)
            batch_rows = functools.partial(problems.shuffled, len(rows), cfg.questions_per_step, cfg.seed, step)
            if log.healthy(step, cfg, batch_rows, dict(gradient_norm=norm), loss=loss):
                update(model, [(optimizer, lr, grads)], cfg.weight_decay)
        sampler.refresh()
        costs = rl_costs(model, batch, stats, cfg, began)
        log(step, costs, loss=loss, gradient_norm=norm, **stats, tokens_per_s=stats["sampled_tokens"] / costs["seconds"])
    validate(cfg.steps)
    checkpoint.save(cfg.out, model, checkpoint.child_meta(cfg, parent, "rl", cfg.recipe, cfg.steps))
    log.close()
    checkpoint.finish(cfg.out)


if __name__ == "__main__":
    run.main(main, Config, __doc__)
