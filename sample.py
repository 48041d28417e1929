"""Look at what a checkpoint says.

    python sample.py ckpt/toy/step5859-rl.pt
    python sample.py ckpt/toy/step5859-rl.pt --first 3 --n 4 --shots 1
    python sample.py ckpt/toy/step5859-rl.pt --prompt "Q : sam has 2 apples . how many now ? A :"
    python sample.py --log ckpt/toy/step5859-rl.pt

On a terminal the first command asks for questions, one after the other, and prints answers; with
--first or another flag of theirs, and where there is no terminal, it prints validation questions.
Beside each answer are the reward of rl.py without --reward, if the right answer is known, and the
mean log-prob of the answer's tokens (nats; nearer to 0 is surer). With --prompt, answers to that
text as it stands. With --log, how the answers to one question changed along the run that made a
checkpoint, or is making it; --split train shows what it was trained on, with the advantages and
what --reward gave.
"""

import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
from common import Count, NonNegative, Whole
from data import grader, problems, tokens
from data.files import read_rows
from model import Sampler


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoint to sample from
    log: str = ""  # instead: a run, by the checkpoint it writes, whose answers are shown
    id: str = ""  # with --log: the question's id (default: in val the first, in train all)
    prompt: str = ""  # text to go on from
    questions: str = ""  # folder or .jsonl of questions (default: what the checkpoint names)
    split: Literal["train", "val"] = "val"  # of the folder; only eval.py --final opens the test
    first: Count = 4  # how many questions
    shots: Whole = 0  # solved examples before each question
    n: Count = 4  # answers to each
    max_new: Whole = 0  # tokens of the longest answer (0: as the checkpoint was trained)
    temperature: NonNegative = 1.0  # 0 takes the most probable token
    format_reward: NonNegative = 0.1  # as in rl.py
    seed: Whole = 0  # noise of the sampling
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on CUDA


def show_log(cfg: Config):
    """Print what a run answered at each validation; in training, to its questions of the step."""
    path = Path(cfg.log.removesuffix(".answers.jsonl") + ".answers.jsonl")
    if not path.exists():
        raise ValueError(f"there is no {path}: sft.py, rl.py and mix.py write it while they run")
    rows = [row for row in read_rows(path) if row["split"] == cfg.split]
    wanted = cfg.id
    if rows and cfg.split == "val":
        wanted = wanted or rows[0]["id"]
    rows = [row for row in rows if wanted in ("", row["id"])]
    if not rows:
        there = sorted({row["id"] for row in read_rows(path) if row["split"] == cfg.split})
        has = ", ".join(there) or "none"
        raise ValueError(f"{path} has no such {cfg.split} question: it has {has}")
    asked = ""
    for row in rows:
        if row["id"] != asked:
            print(f"\n{row['question']}   [answer {row['answer']}]   ({row['id']})")
        asked = row["id"]
        print(f" step {row['step']}")
        for answer in row["answers"][: cfg.n]:
            worth = f"{answer['reward']:6.2f}"
            if "advantage" in answer:
                worth += f" {answer['advantage']:+6.2f}"
            print(f"  {worth} |{answer['text']}{' ...' if answer['truncated'] else ''}")


def main(given: dict):
    cfg = Config(**given)
    unread = given.keys() - {"log", "id", "split", "n"} if cfg.log else given.keys() & {"id"}
    if unread:
        goes = "does not go" if cfg.log else "goes only"
        raise ValueError(f"--{min(unread)} {goes} with --log")
    if cfg.log:
        return show_log(cfg)
    if len(cfg.checkpoints) != 1:
        raise ValueError("name one checkpoint: python sample.py ckpt/toy/step5859.pt")
    problems.refuse_test(cfg.questions)
    world = common.start(cfg.device, cfg.dtype)
    saved = common.load(cfg.checkpoints[0])
    meta = saved["meta"]
    encoding = common.encoding_of(saved)
    model = common.load_model(saved, world)
    max_new = cfg.max_new or common.longest(meta)
    show = functools.partial(show_answers, Sampler(model), encoding, cfg, max_new)
    folder = cfg.questions or meta["questions"]
    asks = {"questions", "split", "first", "shots"} & given.keys()
    if cfg.prompt and asks:
        raise ValueError(f"--prompt is given as it is: leave out --{min(asks)}")
    if cfg.prompt:
        # words of the toy world begin with their space, and there is no other white space in it
        text = f" {' '.join(cfg.prompt.split())}" if encoding.name == "toy" else cfg.prompt
        print(f"\n{text}")
        return show({"id": "prompt"}, text)
    form = problems.form(folder)
    if on_terminal() and not asks:
        return chat(show, form, folder)
    rows = problems.load(folder, cfg.split)[: cfg.first]
    shown = problems.shots(folder, cfg.shots, rows)
    prefix = tokens.encode(encoding, problems.few_shot(form, shown))
    for row in rows:
        text = problems.prompt(form, row["question"])
        print(f"\n{text}   [answer {row['answer']}]")
        show(row, text, prefix)


def on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def chat(show, form: problems.Form, folder: str):
    """Ask for questions, one after the other, and show the answers to each."""
    example = ""
    if problems.split_path(folder, "val").is_file():
        example = f", for instance: {problems.load(folder, 'val')[0]['question']}"
    print(f"Type a question{example}\nAn empty line, or Ctrl-D, ends.")
    for turn in itertools.count():
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        try:
            show({"id": question}, problems.prompt(form, question), turn=turn)
        except ValueError as error:  # a word that the encoding lacks, or too long
            print(f"  {error}")


def show_answers(
    sampler, encoding, cfg: Config, max_new: int, row: dict, text: str, prefix=(), turn: int = 0
):
    """Print answers to one text, one by one, each as soon as it is there."""
    prompt = tokens.encode(encoding, text)
    for seed in problems.answer_seeds(cfg.seed, turn, [row], cfg.n):
        ends = [encoding.eot_token]
        samples = sampler([prompt], 1, max_new, [seed], ends, cfg.temperature, prefix)
        print(line_of(samples, row, encoding, cfg), flush=True)


def line_of(samples, row: dict, encoding, cfg: Config) -> str:
    """Reward (if the right answer is known), nats per token, and the text of one answer."""
    truncated = bool(samples.truncated)
    length = int(samples.lengths)
    text = tokens.decode(encoding, samples.tokens[0, : length - (not truncated)].tolist())
    nats = float(samples.logp_1.sum() / length)
    reward = ""
    if "answer" in row:
        ((correct, formatted),) = grader.grade_all([text], [row["answer"]], [not truncated])
        reward = f"{grader.reward(correct, formatted, cfg.format_reward):4.1f} "
    return f"  {reward}{nats:6.2f} |{text}{' ...' if truncated else ''}"


if __name__ == "__main__":
    common.main(main, Config, __doc__)
