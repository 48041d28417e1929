"""Look at what a checkpoint says.

    python sample.py ckpt/toy/step3418-rl.pt
    python sample.py ckpt/toy/step3418-rl.pt --first 3 --n 4 --shots 1
    python sample.py ckpt/toy/step3418-rl.pt --prompt "Q : sam has 2 apples . how many now ? A :"

Prints validation questions and, beside each answer, the reward of rl.py and the mean log-prob of
its tokens (nats; nearer to 0 is surer). With --prompt, answers to that text as it stands.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
from common import Count, NonNegative, Whole
from data import grader, problems, tokens
from model import Sampler


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoint to sample from
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


def main(given: dict):
    cfg = Config(**given)
    if len(cfg.checkpoints) != 1:
        raise ValueError("name one checkpoint: python sample.py ckpt/toy/step3418.pt")
    if Path(cfg.questions).name == "test.jsonl":
        raise ValueError(f"{cfg.questions} looks like a test split: only eval.py --final opens one")
    world = common.start(cfg.device, cfg.dtype)
    saved = common.load(cfg.checkpoints[0])
    meta = saved["meta"]
    model = common.load_model(saved, world)
    encoding = common.encoding_of(meta, model)
    prefix = []
    if cfg.prompt:
        rows = [{"id": "prompt"}]
        texts = [cfg.prompt]
    else:
        folder = cfg.questions or meta["questions"]
        form = problems.form(folder)
        rows = problems.load(folder, cfg.split)[: cfg.first]
        prompts = [tokens.encode(enc, problems.prompt(form, row["question"])) for row in rows]
        prefix = tokens.encode(enc, problems.few_shot(form, problems.shots(folder, cfg.shots, rows)))
    max_new = cfg.max_new or run.longest(meta)
    sampler = Sampler(checkpoint.load_model(saved, Model, ModelConfig, world))
    for row, prompt in zip(rows, prompts, strict=True):
        print(f"\n{tokens.decode(enc, prompt)}" + (f"   [answer {row['answer']}]" if "answer" in row else ""))
        for seed in problems.answer_seeds(cfg.seed, 0, [row], cfg.n):  # one by one, to show each when it is there
            samples = sampler([prompt], 1, max_new, [seed], [enc.eot_token], cfg.temperature, prefix)
            cut = bool(samples.truncated)
            text = tokens.decode(enc, samples.tokens[0, : int(samples.lengths) - (not cut)].tolist())
            graded = grader.grade_all([text], [row["answer"]], [not cut]) if "answer" in row else ()
            reward = "".join(f"{grader.reward(*marks, cfg.format_reward):4.1f} " for marks in graded)
            nats = float(samples.logp_1.sum() / samples.lengths)  # log-prob a token at temperature 1
            print(f"  {reward}{nats:6.2f} |{text}{' ...' if cut else ''}", flush=True)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
