"""Look at what a checkpoint says.

    python sample.py ckpt/toy/step3418-rl.pt --prompt " Q : sam has 2 apples . he finds 3 . how many now ? A :"
    python sample.py ckpt/toy/step3418-rl.pt --questions data/out/toy/easy --first 3 --n 4

With --prompt, n answers as they come. With --questions, questions of the validation split and the reward of rl.py beside
each answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import checkpoint, grader, problems, ranks, run, tokens
from model import Model, ModelConfig, Sampler


@dataclass(frozen=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoint to sample from
    prompt: str = ""  # text to go on from
    questions: str | None = None  # folder or .jsonl of questions (default, without --prompt: what the checkpoint names)
    split: Literal["train", "val"] = "val"  # split of the folder; only eval.py --final opens the test split
    first: int = 4  # how many questions
    shots: int = 0  # solved examples before each question
    n: int = 4  # answers to each
    max_new: int | None = None  # longest answer (default: as the checkpoint was trained, 56 for a toy base, else 512)
    temperature: float = 1.0  # 0 takes the most probable token
    format_reward: float = 0.1  # as in rl.py
    seed: int = 0  # noise of the sampling
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU


def main(cfg):
    if len(cfg.checkpoints) != 1:
        raise ValueError("name one checkpoint: python sample.py ckpt/toy/step3418.pt")
    if cfg.questions and Path(cfg.questions).name == "test.jsonl":
        raise ValueError(f"{cfg.questions} looks like a test split: only eval.py --final opens one")
    world = ranks.start(cfg.device, cfg.dtype)
    saved = checkpoint.load(cfg.checkpoints[0])
    meta = saved["meta"]
    enc = tokens.encoding(meta["encoding"])
    if cfg.prompt:
        text = cfg.prompt if enc.name != "toy" else f" {cfg.prompt.strip()}"  # toy words begin with their space
        rows, prompts, prefix = [{"id": "prompt"}], [tokens.encode(enc, text)], []
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
            cut = bool(samples.cut)
            text = tokens.decode(enc, samples.tokens[0, : int(samples.lengths) - (not cut)].tolist())
            graded = grader.grade_all([text], [row["answer"]], [not cut]) if "answer" in row else ()
            reward = "".join(f"{grader.reward(*marks, cfg.format_reward):4.1f} " for marks in graded)
            nats = float(samples.logp_1.sum() / samples.lengths)  # log-prob a token at temperature 1
            print(f"  {reward}{nats:6.2f} |{text}{' ...' if cut else ''}", flush=True)


if __name__ == "__main__":
    run.main(main, Config, __doc__)
