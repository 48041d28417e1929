"""Where the time of an RL step goes, and the same step beside TRL's GRPOTrainer.

    python tests/bench_rl.py ckpt/toy/step2344-sft.pt [--steps 10] [--json]
    python tests/bench_rl.py ckpt/toy/step2344-sft.pt --peer trl --threads 1 --no-compile

Real steps from a real checkpoint (answers end where they end), with the defaults of rl.py but for
the learning rate, which is so small that both sides go on sampling answers as long as at the
start; nothing is written. TRL (tests/requirements-slow.txt) has the exported checkpoint, the same
questions in the same order, group, largest length and rewards, and its best settings for a model of
this size: all answers of a step in one pass, no gradient checkpointing, fused Adam, no KL,
advantages that are not divided by the group's deviation, no logging and no saving. The sides take
turns step by step, and the ratio is the median over steps.

vs_trl: TRL's seconds per step over ours. train_vs_plain_rows: seconds of the forward and backward
passes of a batch over rows of a prompt and one answer each, over those with --answers_per_row.
"""

import contextlib
import dataclasses
import functools
import io
import os
import statistics
import tempfile

import torch

import bench
import common
import rl
from data import grader, hf, problems, tokens
from model import Sampler, adam, update

LR = 1e-9  # changes nothing, and costs what another one would
WARM_UP = 2  # steps that are not counted: compilation, the first allocations


class Ours:
    """Steps of rl.py; seconds of each part of those after the warm-up."""

    def __init__(self, checkpoint: str, steps: int, compile: bool, folder: str):
        given = dict(init=checkpoint, out=f"{folder}/rl.pt", steps=steps, lr=LR, eval_questions=0)
        cfg, before = common.configure(
            rl.Config, given | {"compile": compile}, rl.PAPER, rl.check, rl.job_of
        )
        self.run = common.begin(cfg, before, "rl", max_new=cfg.max_new)
        compiled = common.can_compile(cfg, self.run.world)
        self.sampler = Sampler(self.run.model, cfg.rows, compiled)
        if compiled:
            common.compile_blocks(self.run.model)
        self.optimizer = adam(self.run.model)
        self.spent = []
        self.numbers = []

    @property
    def cfg(self) -> rl.Config:
        return self.run.cfg

    def clock(self) -> float:
        return bench.clock(self.run.world.device)

    def step(self, step: int) -> float:
        """-> seconds."""
        cfg, world, model = self.run.cfg, self.run.world, self.run.model
        began = self.clock()
        batch, numbers = rl.rl_batch(self.run, self.sampler, step)
        forward, backward = self.passes(batch)
        start = self.clock()
        gradients, _ = common.gradients(model, world, cfg.clip)
        update(model, [(self.optimizer, cfg.lr, gradients)], cfg.weight_decay)
        self.sampler.refresh()
        parts = {
            "sampling": numbers["sample_seconds"],
            "reward": numbers["grade_seconds"],
            "forward, log-probs": forward,
            "backward": backward,
            "update": self.clock() - start,
        }
        whole = self.clock() - began
        parts["the rest"] = whole - sum(parts.values())
        self.spent.append(parts)
        self.numbers.append(numbers)
        return whole

    def passes(self, batch: problems.Batch) -> tuple[float, float]:
        """Seconds of the forward and the backward passes of a step."""
        cfg, world, model = self.run.cfg, self.run.world, self.run.model
        forward = 0.0
        backward = 0.0
        for micro in problems.micro_batches(batch, cfg.micro, world):
            start = self.clock()
            loss, *_ = rl.rl_loss(model, micro, cfg)
            half = self.clock()
            loss.backward()
            forward += half - start
            backward += self.clock() - half
        return forward, backward

    def vs_plain_rows(self, count: int) -> float:
        """Seconds of the passes with one answer per row over those of rl.py, same answers."""
        sides = []
        for per_row in (self.cfg.answers_per_row, 1):
            cfg = dataclasses.replace(self.cfg, answers_per_row=per_row)
            batch, _ = rl.rl_batch(self.run._replace(cfg=cfg), self.sampler, 0)
            sides.append(functools.partial(self.passes, batch))
        _, _, ratio = bench.turns(*sides, count, self.run.world.device)
        self.run.model.zero_grad(set_to_none=True)
        return ratio


# ------------------------------------------------------------------------------------------ TRL


def questions_of(ours: Ours, steps: int) -> list[dict]:
    """The prompts of each step in turn, as rl.py draws them."""
    cfg = ours.cfg
    rows = []
    for step in range(steps):
        for place in problems.shuffled(len(ours.run.train), cfg.questions_per_step, cfg.seed, step):
            row = ours.run.train[place]
            text = problems.prompt(ours.run.form, row["question"])
            rows.append({"prompt": text, "answer": row["answer"]})
    return rows


def reward_of(ours: Ours, sampled: list[int]):
    """rl.py's reward as TRL asks for it. sampled: takes the tokens of each step."""
    encoding = ours.run.encoding

    def reward(prompts, completions, completion_ids, answer, **_):
        sampled.append(sum(map(len, completion_ids)))
        ended = [ids[-1] == encoding.eot_token for ids in completion_ids]
        texts = [
            tokens.decode(encoding, ids[: len(ids) - end])
            for ids, end in zip(completion_ids, ended, strict=True)
        ]
        marks = grader.grade_all(texts, answer, ended)
        return [grader.reward(*mark, ours.cfg.format_reward) for mark in marks]

    return reward


def settings_of(ours: Ours, steps: int, folder: str):
    """TRL's best settings for a small model on one device."""
    from trl import GRPOConfig

    cfg = ours.cfg
    cpu = ours.run.world.device.type == "cpu"
    return GRPOConfig(
        output_dir=f"{folder}/trl",
        max_steps=steps,
        per_device_train_batch_size=cfg.questions_per_step * cfg.group,
        num_generations=cfg.group,
        max_completion_length=cfg.max_new,
        temperature=cfg.temperature,
        learning_rate=cfg.lr,
        lr_scheduler_type="constant",
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.clip,
        beta=cfg.kl,
        scale_rewards="none",
        loss_type="dapo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=cpu,
        bf16=not cpu,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def steps_in_turns(ours: Ours, checkpoint: str, steps: int, folder: str) -> tuple[list, list]:
    """Each step of TRL's, and one of ours after it: seconds of TRL's, and tokens it sampled."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    hf.export_folder(hf.Export(checkpoint=checkpoint, folder=f"{folder}/exported", padding=False))
    seconds = []
    sampled = []

    class Turns(TrainerCallback):
        """Our step comes after TRL's, outside of its time."""

        began = 0.0

        def on_step_begin(self, *_, **__):
            self.began = ours.clock()

        def on_step_end(self, *_, **__):
            seconds.append(ours.clock() - self.began)
            ours.step(len(seconds) - 1)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/exported", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/exported"),
        reward_funcs=reward_of(ours, sampled),
        args=settings_of(ours, steps, folder),
        train_dataset=Dataset.from_list(questions_of(ours, steps)),
        callbacks=[Turns()],
    )
    trainer.train()
    return seconds, sampled


# ------------------------------------------------------------------------------------ the table


def main():
    flags = bench.parser(__doc__, turns=7)
    flags.add_argument("checkpoint")
    flags.add_argument("--steps", type=int, default=10, help="steps that are timed")
    flags.add_argument("--no-compile", action="store_true", help="as rl.py --compile false")
    flags.add_argument("--peer", choices=["trl"], help="what to compare with")
    flags.add_argument(
        "--threads", type=int, default=0, help="of the CPU (0: as many as there are)"
    )
    args = flags.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    absent = (bench.missing("trl") or bench.missing("accelerate")) if args.peer else ""
    count = args.steps + WARM_UP
    theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(args.checkpoint, count, not args.no_compile, folder)
        if args.peer and not absent:
            theirs = quietly(steps_in_turns, ours, args.checkpoint, count, folder)
        else:
            for step in range(count):
                ours.step(step)
        plain = ours.vs_plain_rows(args.turns)
    report(args, ours, theirs, absent, plain)


def quietly(work, *given):
    """Without what TRL prints."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*given)


def report(args, ours: Ours, theirs: tuple[list, list], absent: str, plain: float):
    spent = ours.spent[WARM_UP:]
    wholes = [sum(parts.values()) for parts in spent]
    # medians: a step in which a new shape is compiled takes seconds
    typical = {name: statistics.median(parts[name] for parts in spent) for name in spent[0]}
    whole = sum(typical.values())
    lines = [
        [name, f"{1e3 * seconds:,.1f}", f"{seconds / whole:.0%}"]
        for name, seconds in typical.items()
    ]
    lines.append(["a step", f"{1e3 * whole:,.1f}", "100%"])
    sampled = statistics.fmean(x["sampled_tokens"] for x in ours.numbers[WARM_UP:])
    ratio = float("nan")
    told = ""
    seconds, tokens_of = (x[WARM_UP:] for x in theirs)
    if seconds:
        ratio = statistics.median(b / a for b, a in zip(seconds, wholes, strict=True))
        told = f" (TRL: {statistics.fmean(tokens_of):.0f})"
        median = f"{1e3 * statistics.median(seconds):,.1f}"
        lines.append(["a step of TRL's", median, f"{ratio:.2f} times"])
    lines += [["TRL", absent]] if absent else []
    lines.append(["passes, one answer per row", None, f"{plain:.2f} times"])
    cfg = ours.cfg
    bench.show(
        f"{bench.machine(ours.run.world.device)}; {cfg.questions_per_step} questions x "
        f"{cfg.group} answers, {sampled:.0f} tokens sampled per step{told}",
        ["", "ms", "share"],
        lines,
    )
    figures = {
        "vs_trl": round(ratio, 3),
        "train_vs_plain_rows": round(plain, 3),
        "ms_a_step": round(1e3 * whole, 1),
        "shares": {name: round(seconds / whole, 3) for name, seconds in typical.items()},
    }
    bench.finish(args, figures)


if __name__ == "__main__":
    main()
