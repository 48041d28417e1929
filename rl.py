"""GRPO with verifiable rewards: M_t -> M_t^RL, or from an SFT checkpoint M_t^SFT -> M_t^SFT->RL.

    python rl.py --init ckpt/toy/step5859.pt
    torchrun --nproc_per_node 8 rl.py --init ckpt/1b/step5000.pt

A step: draw questions, sample a group of answers to each, grade them, give each answer the
advantage r - mean(r of its group), and take one gradient of

    sum over sampled tokens of  -advantage/N * log pi(token),    N = sampled tokens of the step.

No solution of a training question is ever read. The progress line shows reward, correct, flat
(groups of equal rewards, which teach nothing) and truncated, and no loss: it is small, of either
sign, and says nothing of what is learned. OUT.answers.jsonl has a few questions with their answers,
rewards and advantages at every --eval_every; `python sample.py --log OUT` shows them.

What differs from a textbook GRPO (arXiv 2402.03300):
 1. --std_norm false   the textbook divides the advantage by the group's std, which with a format
                       reward blows up a gap of 0.1 inside a group to 1
 2. --updates 1        one update per batch of rollouts: the ratio to the old policy is 1 and
                       nothing needs clipping
 3. --kl 0             no pull to the start
 4. the loss is summed over all tokens of the step and divided by their number: long answers are
    not discounted (DAPO, arXiv 2503.14476)

Its relatives (SCALE.md has a table of which flags make which): --leave_one_out, --batch_std,
--denominator, --resample and, with --updates above 1, --clip_high and --ratio sequence.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.profiler import record_function

import common
import plan
from common import Count, NonNegative, Positive, Whole
from data import grader, problems, tokens
from eval import validate
from model import Layout, Sampler, adam, cosine, update


# --help shows the comment above a field and the one beside it, joined.
@dataclass(frozen=True, kw_only=True)
class Config(common.PostTraining):
    """Flags of GRPO."""

    steps: Count = 300  # rollout batches; the paper trains until validation reward converges
    questions_per_step: Count = 16  # questions of a batch, over all ranks
    group: Count = 8  # answers per question, the n of the paper
    # solved questions (shots.jsonl) before each, in sampling and in the passes that train, where
    # they weigh nothing: for a base that never finds the form of an answer; validation has none
    shots: Whole = 0
    temperature: Positive = 1.0  # of sampling and of the log-probs trained on
    format_reward: NonNegative = 0.1  # of a wrong answer in the right form; the paper's is unknown
    # a file with your own reward(question, answer, text) -> float in place of 1 and
    # --format_reward: an answer that takes more than 2 s of processor time (10 on the clock) has
    # 0, as a truncated one has; an error or more than 1 GiB ends the run
    reward: str = ""  # validation ignores it, and counts right answers
    std_norm: bool = False  # divide the advantage by the group's std (GRPO)
    batch_std: bool = False  # REINFORCE++: divide it by the std of the whole step instead
    leave_one_out: bool = False  # RLOO: the baseline of an answer is the mean of the others
    # what the loss of a token is divided by: the tokens of the step (DAPO), or the answers of the
    # step times the answer's own length (GRPO) or --max_new (Dr. GRPO)
    denominator: Literal["tokens", "length", "max_new"] = "tokens"
    # DAPO's dynamic sampling: how often flat groups give way to newly drawn questions; reward,
    # correct and flat are then those of the groups that stay
    resample: Whole = 0  # 0: a flat group stays, and teaches nothing
    updates: Count = 1  # updates per batch of rollouts; more than one turns on clipping
    clip_ratio: Positive = 0.2  # PPO's epsilon, with --updates above 1
    clip_high: Positive | None = None  # DAPO's upper one, 0.28 there (none: the same)
    # GSPO: one ratio per answer, the geometric mean; its epsilons are 3e-4 and, above, 4e-4
    ratio: Literal["token", "sequence"] = "token"
    kl: NonNegative = 0.0  # weight of the KL divergence from the starting checkpoint
    lr: Positive = 1.5e-4  # learning rate, constant after the warm-up; 6e-4 collapses
    warmup: Whole = 5  # updates of linear warm-up
    weight_decay: NonNegative = 0.0  # off (veRL: 0.01)
    clip: NonNegative = 1.0  # largest norm of the gradient (0: any)
    max_mismatch: Positive = 0.1  # stop if sampler and trainer differ more, in mean |log-prob|
    save_every: Count = 10


# What a checkpoint of the paper's sizes gets instead. The paper: n of 5 or 64, 600 to 1,600 steps
# until convergence; batch, learning rate and length of answers are not given.
PAPER = dict(lr=1e-6, questions_per_step=128, group=64, steps=1000, max_new=512)


# ------------------------------------------------------- from questions to a batch: what GRPO is


class Rollout(NamedTuple):
    """Sampled answers, question by question: A = questions of this rank * group."""

    questions: list[dict]  # (A,) the question of each answer
    prompts: list[list[int]]  # (A,) ids
    answers: list[list[int]]  # (A,) ids, the sampled end token included
    logp: list[torch.Tensor]  # (A,) of (length,): log-probs under the sampler
    truncated: list[bool]  # (A,) stopped by --max_new, without an end token
    waste: float  # idle share of the sampler's work


def rollout(run: common.Setup, sampler: Sampler, step: int, draw: int = 0, groups=None) -> Rollout:
    """Draw this rank's questions of step `step` and sample a group of answers to each.

    draw: from 1 on the number of a new draw for the same step (--resample); questions of it may
    have been in an earlier one. groups: the places among this rank's questions that are asked
    (default: all). Raises ValueError if the log-probs are NaN: the run would go on in silence,
    with all groups flat.
    """
    cfg = run.cfg
    places = problems.shuffled(len(run.train), cfg.questions_per_step, cfg.seed, step, draw)
    mine = places[run.world.share(cfg.questions_per_step, "--questions_per_step")]
    mine = mine if groups is None else [mine[group] for group in groups]
    questions = [run.train[place] for place in mine]
    texts = [problems.prompt(run.form, row["question"]) for row in questions]
    asked = [tokens.encode(run.encoding, text) for text in texts]
    turn = f"{step} {draw}" if draw else step
    seeds = problems.answer_seeds(cfg.seed, turn, questions, cfg.group)
    ends = [run.encoding.eot_token]
    with record_function("sampling"):
        how = dict(temperature=cfg.temperature, prefix=run.prefix)
        samples = sampler(asked, cfg.group, cfg.max_new, seeds, ends, **how)
    if not samples.logp.isfinite().all():
        raise ValueError(f"sampled log-probs are NaN at step {step}: start with a lower --lr")
    lengths = samples.lengths.tolist()
    prompts = [run.prefix + ids for ids in asked]  # what the answers are trained after, too
    each = [question for question in range(len(questions)) for _ in range(cfg.group)]
    return Rollout(
        questions=[questions[question] for question in each],
        prompts=[prompts[question] for question in each],
        answers=[ids[:n] for ids, n in zip(samples.tokens.tolist(), lengths, strict=True)],
        logp=[logp[:n] for logp, n in zip(samples.logp, lengths, strict=True)],
        truncated=samples.truncated.tolist(),
        waste=samples.waste,
    )


class Graded(NamedTuple):
    """What the answers of a Rollout are worth."""

    texts: list[str]  # (A,)
    marks: list[tuple[bool, bool]]  # (A,) correct, well-formed; a truncated answer is neither
    rewards: torch.Tensor  # (A,) fp64
    late: list[bool]  # (A,) --reward took too long


@record_function("reward")
def grade(run: common.Setup, rolled: Rollout) -> Graded:
    """The grader sees the text of an answer and the right one; --reward the question, too."""
    ended = [not truncated for truncated in rolled.truncated]
    # the end token is no part of the text
    answers = [ids[:-1] if end else ids for ids, end in zip(rolled.answers, ended, strict=True)]
    texts = [tokens.decode(run.encoding, ids) for ids in answers]
    right = [row["answer"] for row in rolled.questions]
    marks = grader.grade_all(texts, right, ended)
    if run.cfg.reward:
        rewards = own_rewards(run, rolled, texts)
    else:
        rewards = [grader.reward(*mark, run.cfg.format_reward) for mark in marks]
    late = [reward is None for reward in rewards]
    rewards = [reward or 0.0 for reward in rewards]
    return Graded(texts, marks, torch.tensor(rewards, dtype=torch.float64), late)


def own_rewards(run: common.Setup, rolled: Rollout, texts: list[str]) -> list[float | None]:
    """What --reward says of each answer, 0 of a truncated one; None: it took too long."""
    asked = [
        (row["question"], row["answer"], text)
        for row, text, truncated in zip(rolled.questions, texts, rolled.truncated, strict=True)
        if not truncated
    ]
    found = iter(grader.own_rewards(run.cfg.reward, asked))
    return [0.0 if truncated else next(found) for truncated in rolled.truncated]


def flat_groups(rewards_QG: torch.Tensor) -> torch.Tensor:
    """(Q,) whether all answers of a group have the same reward."""
    return rewards_QG.amax(1) == rewards_QG.amin(1)


def replace_flat(run: common.Setup, sampler, step: int, rolled: Rollout, graded: Graded) -> dict:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), --resample times at most: flat
    groups give way, in place, to newly drawn ones. -> what was dropped: groups, sampled tokens."""
    size = run.cfg.group
    dropped = {"dropped groups": 0, "dropped tokens": 0}
    for draw in range(1, run.cfg.resample + 1):
        flat = flat_groups(graded.rewards.view(-1, size)).nonzero().flatten().tolist()
        if not flat:
            break
        drawn = rollout(run, sampler, step, draw, flat)
        regraded = grade(run, drawn)
        for place, group in enumerate(flat):
            old = slice(group * size, (group + 1) * size)
            new = slice(place * size, (place + 1) * size)
            dropped["dropped groups"] += 1
            dropped["dropped tokens"] += sum(map(len, rolled.answers[old]))
            for name in ("questions", "prompts", "answers", "logp", "truncated"):
                getattr(rolled, name)[old] = getattr(drawn, name)[new]
            for name in Graded._fields:
                getattr(graded, name)[old] = getattr(regraded, name)[new]
    return dropped


def advantages(rewards_QG: torch.Tensor, cfg) -> torch.Tensor:
    """(Q, G) rewards -> r - mean over the group; GRPO, section 4.1.2.

    --std_norm: divided by the group's (population) std. --leave_one_out: the mean is that of the
    other answers (RLOO, arXiv 2402.14740, section 3). A flat group gets exactly 0: the mean of
    equal floats need not equal them. For a baseline that is not the group's own drop that line.
    """
    centred = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if cfg.leave_one_out:
        count = rewards_QG.shape[1]
        centred = centred * (count / (count - 1))
    if cfg.std_norm:
        centred = centred / rewards_QG.std(1, keepdim=True, unbiased=False).clamp_min(1e-6)
    return centred.masked_fill(flat_groups(rewards_QG)[:, None], 0.0)


def over_batch_std(advantage_QG: torch.Tensor, world) -> torch.Tensor:
    """Advantages whose groups have mean 0, divided by the std of all answers of all ranks.

    REINFORCE++ with a group's mean as baseline (arXiv 2501.03262).
    """
    square, count = world.sum(advantage_QG.square().sum(), float(advantage_QG.numel()))
    return advantage_QG / max((square / count) ** 0.5, 1e-6)


def token_weights(advantage_A, lengths_A, total: dict, cfg) -> torch.Tensor:
    """(A,) what each token of an answer weighs in the loss. total: sums over the whole step.

    A list of one tensor (length,) per answer does as well: a weight for each token of it.
    """
    if cfg.denominator == "length":  # GRPO (arXiv 2402.03300, eq. 3): a mean of means
        return advantage_A / (lengths_A * total["answers"])
    if cfg.denominator == "max_new":  # Dr. GRPO (arXiv 2503.20783, section 3.2): a constant
        return advantage_A / (cfg.max_new * total["answers"])
    return advantage_A / total["tokens"]  # DAPO (arXiv 2503.14476, section 3.3)


def shown_answers(run: common.Setup, rolled: Rollout, graded: Graded, advantage) -> list[dict]:
    """A few questions of the step, with answers, rewards and advantages, for OUT.answers.jsonl."""
    answers = []
    columns = (graded.texts, graded.marks, rolled.truncated, graded.rewards.tolist(), advantage)
    for text, (correct, formatted), truncated, reward, gain in zip(*columns, strict=True):
        marks = dict(correct=correct, formatted=formatted, truncated=truncated)
        answers.append({"text": text, **marks, "reward": reward, "advantage": round(gain, 6)})
    return common.examples(rolled.questions[:: run.cfg.group], answers)


def sums_of(rolled: Rollout, graded: Graded, group: int) -> dict:
    """What is counted of this rank's answers, to be summed over the ranks."""
    flat = flat_groups(graded.rewards.view(-1, group))
    return {
        "reward": graded.rewards.sum(),
        "correct": sum(correct for correct, _ in graded.marks),
        "formatted": sum(formatted for _, formatted in graded.marks),
        "truncated": sum(rolled.truncated),
        "late": sum(graded.late),
        "flat": flat.sum(),
        "answers": len(graded.marks),
        "groups": len(flat),
        "tokens": sum(map(len, rolled.answers)),
        "prompt tokens": sum(map(len, rolled.prompts)),
    }


def numbers_of(total: dict, cfg: Config) -> dict:
    """Sums over the whole step -> what the log says of it: shares, lengths, tokens."""
    shares = ("reward", "correct", "formatted", "truncated")
    numbers = {name: total[name] / total["answers"] for name in shares}
    numbers["flat"] = total["flat"] / total["groups"]
    if cfg.reward:
        numbers["late"] = total["late"] / total["answers"]
    if cfg.resample:
        numbers["dropped_groups"] = int(total["dropped groups"])
        numbers["dropped_tokens"] = int(total["dropped tokens"])
    numbers["length"] = total["tokens"] / total["answers"]
    numbers["prompt_length"] = total["prompt tokens"] / total["answers"]
    numbers["sampled_tokens"] = int(total["tokens"] + total["dropped tokens"])
    return numbers


def rl_batch(run: common.Setup, sampler: Sampler, step: int, log=None):
    """-> this rank's rows of RL step `step` (Batch), and numbers of the whole step for the log.

    log: a common.Log for a few of the answers, at the steps that are validated. The seconds and
    the waste among the numbers are those of this rank; with --resample the waste is that of the
    first draw, and to grade the later ones counts as sampling.
    """
    cfg = run.cfg
    began = time.monotonic()
    rolled = rollout(run, sampler, step)
    sampled = time.monotonic()
    graded = grade(run, rolled)
    grade_seconds = time.monotonic() - sampled
    dropped = replace_flat(run, sampler, step, rolled, graded)
    sample_seconds = time.monotonic() - began - grade_seconds

    advantage = advantages(graded.rewards.view(-1, cfg.group), cfg)
    if cfg.batch_std:
        advantage = over_batch_std(advantage, run.world)
    if log and common.validates(cfg, step):
        shown = shown_answers(run, rolled, graded, advantage.flatten().tolist())
        log.add_answers(step, "train", shown)

    sums = sums_of(rolled, graded, cfg.group) | dropped
    total = dict(zip(sums, run.world.sum(*map(float, sums.values())), strict=True))
    lengths = torch.tensor([len(answer) for answer in rolled.answers])
    # one denominator for all ranks
    weights = token_weights(advantage.flatten(), lengths, total, cfg)
    pad = tokens.pad_id(run.encoding)
    batch = problems.make_batch(
        rolled.prompts, rolled.answers, weights, pad, rolled.logp, cfg.per_row
    )
    numbers = numbers_of(total, cfg)
    numbers["waste"] = rolled.waste
    numbers["sample_seconds"] = sample_seconds
    numbers["grade_seconds"] = grade_seconds
    return batch, numbers


# ----------------------------------------------------------------- from a batch to its gradient


def policy_loss(logp, old_logp, weight, clip_ratio, clip_high=None):
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), summed; all (B, T).

    weight: see token_weights; 0 outside the mask. clip_high: another bound above 1 (DAPO, arXiv
    2503.14476, section 3.1), so that rare tokens may become likely.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + (clip_high or clip_ratio))
    return -torch.minimum(ratio * weight, clipped * weight).sum()


def answer_means(values, micro: problems.Batch):
    """(B, T) values -> at each token of an answer their mean over the answer; elsewhere 0.

    Of log ratios: the log of GSPO's ratio (arXiv 2507.18071, section 4.1).
    """
    # number of the answer in its row, from 1; 0: prompt and padding
    branch = Layout(*micro.layout).branch if micro.layout else micro.mask.long()
    zeros = values.new_zeros(len(values), int(branch.max()) + 1)
    counts = zeros.scatter_add(1, branch, micro.mask.to(values))
    means = zeros.scatter_add(1, branch, values * micro.mask) / counts.clamp_min(1)
    return means.gather(1, branch) * micro.mask


def kl_to(reference_logp, logp):
    """KL(pi || reference) per token from samples of pi, never negative.

    The k3 estimate of Schulman, "Approximating KL Divergence" (2020).
    """
    gap = reference_logp - logp
    return gap.exp() - gap - 1


def rl_loss(model, micro: problems.Batch, cfg, old=None, reference=None, count=1.0):
    """The loss of one micro-batch -> loss (scalar), log-probs and entropy (B, T).

    On-policy, without a KL term, the ratio to the old policy is 1 and the gradient is that of
    sum weight * -log pi. Otherwise `old` and `reference` are log-probs (B, T) of the same
    micro-batch. count: tokens of all answers of the step, over all ranks.

    The first branch holds only for a loss that is linear in the log-probs. For any other delete it:
    the second takes any function of them, and computes the logits twice. Micro-batches are summed:
    a term that is not multiplied by micro.weight is divided by count, as the KL is, and needs
    keep_flat=True in parts_of, or it misses the groups that have no advantage.
    """
    how = dict(mask=micro.mask, temperature=cfg.temperature, layout=micro.layout)
    if cfg.updates == 1 and not cfg.kl:
        return model(micro.ids, micro.target, weight=micro.weight, **how)
    logp, entropy = model(micro.ids, micro.target, **how)
    old = logp.detach() if old is None else old
    new = logp
    if cfg.ratio == "sequence":
        new = old + answer_means(logp - old, micro)
    loss = policy_loss(new, old, micro.weight, cfg.clip_ratio, cfg.clip_high)
    if cfg.kl:
        loss = loss + cfg.kl * (kl_to(reference, logp) * micro.mask).sum() / count
    return loss, logp, entropy


def parts_of(batch: problems.Batch, cfg, world):
    """The micro-batches of a batch, in the same order for each pass over it. Without --kl flat
    groups are left out: their gradient is 0."""
    return problems.micro_batches(batch, cfg.micro, world, keep_flat=cfg.kl > 0)


@torch.no_grad()
def log_probs_of(model, batch: problems.Batch, cfg, world) -> list[torch.Tensor]:
    """Log-probs of each micro-batch under `model`, by the forward pass that training uses."""
    t = cfg.temperature
    return [
        model(part.ids, part.target, mask=part.mask, temperature=t, layout=part.layout)[0]
        for part in parts_of(batch, cfg, world)
    ]


def rl_gradients(run: common.Setup, batch: problems.Batch, old, reference):
    """The gradient of the batch, summed over ranks and clipped, and what is to be known of it.

    old, reference: None, or what `log_probs_of` gives for the policy that sampled and for the
    start. -> loss, gradients, their norm, and a dict: "mismatch" (|log-prob| per token between
    sampler and trainer), "mismatch_max", "mismatch_kl", and "entropy" (nats per token), over groups
    that are not flat (with --kl over all).
    """
    cfg, world = run.cfg, run.world
    loss = 0.0
    # a row per micro-batch, see `compare`; the first because all groups may be flat
    measured = [torch.zeros(5, dtype=torch.float64, device=world.device)]
    count = world.sum(float(batch.mask.sum()))[0]
    for i, micro in enumerate(parts_of(batch, cfg, world)):
        part, logp, entropy = rl_loss(
            run.model,
            micro,
            cfg,
            old[i] if old else None,
            reference[i] if reference else None,
            count,
        )
        with record_function("backward"):
            part.backward()
        loss += part.detach().double()  # read once for all: to read is to wait for the GPU
        measured.append(compare(micro, logp.detach(), entropy.detach()))
    measured = torch.stack(measured)
    loss, gap, kl, entropy, compared = world.sum(loss, *measured[:, :4].sum(0))
    known = {"mismatch": gap, "mismatch_kl": kl, "entropy": entropy}
    known = {name: total / compared if compared else None for name, total in known.items()}
    known["mismatch_max"] = world.max(measured[:, 4].max())[0]
    gradients, norm = common.gradients(run.model, world, cfg.clip)
    return loss, gradients, norm, known


def compare(micro: problems.Batch, logp, entropy) -> torch.Tensor:
    """fp64 (5,): sums over the mask of |gap|, KL, entropy and 1; and the largest |gap|.

    gap: log-prob (B, T) of the trainer less that of the sampler.
    """
    gap = torch.where(micro.mask, logp - micro.logp, 0).double()
    found = (
        gap.abs().sum(),
        (gap.exp() - gap - 1).sum(),  # as in kl_to: KL(sampler || trainer)
        entropy.double().sum(),
        micro.mask.sum(),
        gap.abs().amax(),
    )
    return torch.stack([x.double() for x in found])


def check_mismatch(step: int, mismatch: float | None, cfg):
    """Raises ValueError if the policy that was sampled is not the one that is trained."""
    if (mismatch or 0) > cfg.max_mismatch:
        raise ValueError(
            f"sampler and trainer differ by {mismatch:.3g} in mean |log-prob| at step {step}, more "
            f"than --max_mismatch {cfg.max_mismatch}: stopped before the update"
        )


def rl_costs(model, numbers: dict, cfg, began: float) -> dict:
    """What the step cost, for the log: FLOPs of sampling (a forward pass) and of training."""
    size = numbers["length"] + numbers["prompt_length"]  # of a sequence, on average
    sampled = numbers["sampled_tokens"]
    trained = sampled - numbers.get("dropped_tokens", 0)
    once = cfg.questions_per_step * numbers["prompt_length"]
    trained += once * -(-cfg.group // cfg.per_row)
    questions = cfg.questions_per_step + numbers.get("dropped_groups", 0)
    prompts = questions * numbers["prompt_length"]
    if not cfg.kl:
        trained *= 1 - numbers["flat"]  # flat groups are left out
    measured = (cfg.updates > 1) + (cfg.kl > 0)  # forward passes for old and reference log-probs
    # tokens of a training pass, of which a forward pass alone is a third
    passes = (sampled + prompts) / 3 + trained * (cfg.updates + measured / 3)
    return dict(
        flops=passes * model.flops_per_token(size),
        questions=questions,
        sampled_tokens=sampled,
        seconds=time.monotonic() - began,
    )


def job_of(cfg: Config) -> plan.Job:
    """What a run trains on, reads and samples, for --plan."""
    rows = cfg.steps * cfg.questions_per_step * cfg.group
    validations = common.validations(cfg, cfg.steps) * cfg.eval_questions
    answer = plan.longest_answer(cfg.max_new)
    shown = -(-cfg.shots * plan.SHOT // cfg.per_row)  # answers of a row share what is shown
    whole = shown + plan.PROMPT + answer
    again = (cfg.updates > 1) + (cfg.kl > 0)  # log-probs of the policy that sampled, of the start
    counts = plan.Tokens(
        trained=rows * cfg.updates * whole,
        read=(rows / cfg.group + validations) * plan.PROMPT + rows * again * whole,
        sampled=(rows + validations * cfg.eval_n) * answer,
    )
    asked = (cfg.questions_per_step, cfg.group), (cfg.eval_questions, cfg.eval_n)
    row = shown + plan.PROMPT + cfg.max_new
    note = f"--resample: up to {cfg.resample} times the sampling more" if cfg.resample else ""
    return plan.Job("rl", [counts], row, asked=asked, max_new=cfg.max_new, note=note)


def check(cfg: Config):
    if cfg.group < 2:
        raise ValueError("--group takes 2 or more: an answer alone has the advantage 0")
    clips = cfg.clip_ratio != Config.clip_ratio or cfg.clip_high
    if cfg.updates == 1 and (clips or cfg.ratio != "token"):
        raise ValueError(
            "--clip_ratio, --clip_high and --ratio sequence change nothing with one update per "
            "batch, where the ratio is 1: give --updates 2 or more"
        )
    if cfg.std_norm and cfg.batch_std:
        raise ValueError(
            "--std_norm divides by the group's std, --batch_std by the step's: take one"
        )
    if cfg.leave_one_out and cfg.batch_std:
        raise ValueError(
            "--leave_one_out multiplies all by G/(G-1), which --batch_std divides out: take one"
        )
    if cfg.reward:
        grader.check_own_reward(cfg.reward)


ALL_FLAT = 5  # steps with nothing but flat groups, after which a line says so


def flat_so_far(cfg: Config) -> str:
    answers = ALL_FLAT * cfg.questions_per_step * cfg.group
    return (
        f"\nall groups of the first {ALL_FLAT} steps are flat: none of {answers} answers differs "
        "in reward from the others of its group, and nothing is learned. --shots 4 shows solved "
        "questions, sft.py --steps 20 teaches the form first, a later checkpoint knows more; "
        f"sample.py --log {cfg.out} --split train shows the answers"
    )


# -------------------------------------------------------------------------------------- the run


def main(given: dict):
    cfg, before = common.configure(Config, given, PAPER, check, job_of)
    if cfg.plan:
        return plan.show(cfg, job_of(cfg), given)
    run = common.begin(cfg, before, cfg.recipe or "rl", max_new=cfg.max_new, shots=cfg.shots)
    cfg, world, model = run.cfg, run.world, run.model
    common.check_batch(world, "--questions_per_step", cfg.questions_per_step, len(run.train))
    start = common.load_model(before, world) if cfg.kl else None

    optimizer = adam(model, cfg.offload)
    first = common.resume(run.state, optimizer)
    compiled = common.can_compile(cfg, world)
    sampler = Sampler(model, cfg.rows, compiled)
    if compiled:
        common.compile_blocks(model)
        if start:
            common.compile_blocks(start)
    log = common.Log(cfg, world, cfg.steps, run.state, "reward correct flat truncated")
    meta = functools.partial(common.child_meta, cfg, run.contents, run.parent, "rl")
    save = functools.partial(common.save_state, cfg, model, meta, [optimizer], log)

    all_flat = first == 0
    for step in common.loop(first, cfg.steps, cfg, world, save):
        if common.validates(cfg, step):
            validate(run, sampler, log, step)
        began = time.monotonic()
        batch, numbers = rl_batch(run, sampler, step, log)
        old = log_probs_of(model, batch, cfg, world) if cfg.updates > 1 else None
        reference = log_probs_of(start, batch, cfg, world) if cfg.kl else None
        for i in range(cfg.updates):
            loss, gradients, norm, known = rl_gradients(run, batch, old, reference)
            if i == 0:
                check_mismatch(step, known["mismatch"], cfg)
                numbers |= known
            done = step * cfg.updates + i
            # floor 1: constant after the warm-up
            lr = cosine(done, cfg.steps * cfg.updates, cfg.lr, cfg.warmup, floor=1.0)
            rows = functools.partial(  # those drawn first, before --resample
                problems.shuffled, len(run.train), cfg.questions_per_step, cfg.seed, step
            )
            if log.healthy(step, rows, dict(gradient_norm=norm), loss=loss):
                update(model, [(optimizer, lr, gradients)], cfg.weight_decay)
        sampler.refresh()
        costs = rl_costs(model, numbers, cfg, began)
        all_flat = all_flat and numbers["flat"] == 1
        if all_flat and step == ALL_FLAT - 1 and world.rank == 0:
            common.say(flat_so_far(cfg))
        speed = numbers["sampled_tokens"] / costs["seconds"]
        log(step, costs, loss=loss, gradient_norm=norm, **numbers, tokens_per_s=speed)
    validate(run, sampler, log, cfg.steps)
    common.finish(cfg, model, meta(cfg.steps), log)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
