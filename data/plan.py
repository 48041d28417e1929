"""What the commands of matrix.sh will cost: reads them as `bash matrix.sh --dry_run` prints them, adds a line to each.

    training   FLOPs = tokens x flops_per_token (model.py)               GPU hours = FLOPs / (TRAINING x PEAK)
    reading    a third of that: prompts, tasks                           the same
    sampling   a third of that, a token of the answers                   FLOPs / (SAMPLING x PEAK)
    disk       4 bytes a weight of each checkpoint, 4 bytes a token of text (2 in the toy). While a trainer runs, its state
               for --resume takes 12 bytes a weight more.

Nothing of this is measured on a GPU, and what is not known before the data is there is assumed: the constants below. The
scripts are asked for their flags and sizes: this is the one file of data/ that imports them, and none of them imports it.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as evaluation  # noqa: E402
import mix  # noqa: E402
import pretrain  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from data import prepare, run, tokens  # noqa: E402

PEAK = 989e12  # FLOP/s of an H100 or H200 in bf16, dense
TRAINING, SAMPLING = 0.4, 0.05  # shares of it that are reached; the second is 19,000 tokens a second and GPU at 1B
PROMPT, ANSWER = 75, 200  # tokens, if an answer may be so long; MATH has 78 and 221, GSM8K 62 and 78
TASKS = 2_343_014  # tokens of the six benchmarks, each context once
GSM8K = dict(train=7000, val=500, test=1319, solutions=23)  # questions of openmath --dataset gsm8k, solutions to each
OPENMATH = dict(train=13_500, val=500, test=5000, solutions=23)  # of all of it
LEVEL = dict(train=8000, val=1000, test=1000, solutions=23)  # of easy or hard questions: nobody knows before

FREE = (0.0, 0.0, 0.0)  # FLOPs, GPU hours, bytes
sets, models = {}, {}  # what the commands so far will make, by folder


def work(model, trained=0.0, read=0.0, sampled=0.0, length=PROMPT + ANSWER):
    """Tokens of each kind -> FLOPs, GPU hours, no bytes."""
    dense, decoded = (model.flops_per_token(length) * count for count in (trained + read / 3, sampled / 3))
    return dense + decoded, (dense / TRAINING + decoded / SAMPLING) / PEAK / 3600, 0.0


def questions(folder):
    """How many there are: of the files if they are there, else as assumed."""
    found = dict(sets.get(folder, LEVEL))
    for split in ("train", "val", "test"):
        for path in (Path(folder), Path(folder) / f"{split}.jsonl"):  # a folder, or one file whatever the split
            if path.is_file():
                with open(path, "rb") as file:
                    found[split] = sum(1 for _ in file)
    return SimpleNamespace(**found)


def prepared(command, *flags):
    cfg, size = run.configure(prepare.COMMANDS[command][0], list(flags)), 0
    if command == "toy":
        size = 2 * cfg.tokens
        sets[f"{cfg.out}/easy"] = dict(train=cfg.train_questions, val=cfg.val_questions, test=cfg.test_questions, solutions=24)
    elif command == "dolmino":
        size = 4 * sum(prepare.budgets_of(cfg)[0].values())
    elif command in ("gsm8k", "openmath"):
        sets[cfg.out] = OPENMATH if getattr(cfg, "dataset", "") == "all" else GSM8K
    return 0.0, 0.0, float(size)


def pretrained(script, cfg):
    size = "toy" if cfg.preset.startswith("toy") else "paper"
    cfg = run.fill(cfg, script.SIZES[size])
    easy = f"{cfg.data}/easy"  # only the toy has it
    vocab = tokens.VOCABULARY["toy" if easy in sets or Path(easy).is_dir() else "cl100k_base"]
    with torch.device("meta"):  # shapes, no memory
        model = script.Model(script.ModelConfig(**script.PRESETS[cfg.preset], vocab=vocab, padded_vocab=-(-vocab // 128) * 128))
    disk = 4.0 * sum(p.numel() for p in model.parameters())
    models[cfg.out] = SimpleNamespace(model=model, size=size, disk=disk, questions=cfg.questions or easy,
                                      tasks=TASKS if cfg.tasks else 0)  # those of the toy are next to nothing
    steps = max(1, round(cfg.tokens / cfg.batch_tokens))
    kept = {steps, *cfg.save_steps, *(round(count / cfg.batch_tokens) for count in cfg.save_tokens)}
    if (Path(cfg.out) / f"step{steps}.pt").exists():  # finished
        return FREE
    return *work(model, steps * cfg.batch_tokens, length=cfg.length)[:2], len(kept) * disk


def post_trained(script, cfg):
    """sft.py, rl.py and mix.py, which is both."""
    base = models[str(Path(cfg.init).parent)]
    cfg = run.fill(cfg, script.SIZES[base.size])
    there, answer = questions(cfg.questions or base.questions), min(ANSWER, cfg.max_new)
    steps, rows = cfg.steps, 0
    if hasattr(cfg, "epochs") and not steps:
        pairs = min(there.train, cfg.limit or there.train) * (there.solutions if cfg.solutions == "all" else int(cfg.solutions))
        steps = max(1, round(cfg.epochs * pairs / cfg.batch))
    if hasattr(cfg, "group"):
        rows = steps * cfg.questions_per_step * cfg.group
    trained = rows * getattr(cfg, "updates", 1) + steps * getattr(cfg, "batch", 0)
    validations = 2 + ((steps - 1) // cfg.eval_every if cfg.eval_every else 0)
    sampled = rows + validations * cfg.eval_questions * cfg.eval_n
    read = sampled / getattr(cfg, "group", cfg.eval_n)  # each prompt once
    return *work(base.model, trained * (PROMPT + answer), read * PROMPT, sampled * answer)[:2], base.disk


def evaluated(script, cfg):
    read = sampled = 0
    for path in cfg.checkpoints:
        base = models[str(Path(path).parent)]
        answer = min(ANSWER, cfg.max_new or {"toy": 48, "paper": 512}[base.size])
        for folder in cfg.questions or (base.questions,):
            count = getattr(questions(folder.removesuffix("/train.jsonl")), "train" if folder.endswith(".jsonl") else
                            "test" if cfg.final else "val")  # fmt: skip
            ways = len(cfg.shots) if cfg.shots else 2 if re.search(r"step\d+\.pt$", path) else 1  # a base is measured twice
            count = min(count, cfg.limit or count) * ways
            read, sampled = read + count * PROMPT, sampled + count * cfg.n * answer
        read += base.tasks if cfg.tasks is None else 0
    return work(base.model, 0, read, sampled) if cfg.checkpoints else FREE


def cost(command):
    """A command line -> its script; FLOPs, GPU hours, bytes."""
    script, flags = re.search(r"(\w+)\.py(.*)", command).groups()
    if script == "prepare":
        return "data", prepared(*flags.split())
    module, price = {"pretrain": (pretrain, pretrained), "eval": (evaluation, evaluated), "sft": (sft, post_trained),
                     "rl": (rl, post_trained), "mix": (mix, post_trained)}[script]  # fmt: skip
    return script, price(module, run.configure(module.Config, flags.split()))


def told(flops, hours, disk):
    return f"{flops:9.3g} FLOPs {hours:9.3g} GPU hours {disk / 1e9:9.3g} GB"


def main(lines):
    totals = {}
    for line in lines:
        print(line.rstrip("\n"))
        if line.startswith("+ "):
            script, price = cost(line)
            print(f"    {told(*price)}")
            totals[script] = [a + b for a, b in zip(totals.get(script, (0, *FREE)), (1, *price), strict=True)]
    if not totals:
        return
    print(f"\nassumed: {TRAINING:.0%} of {PEAK / 1e12:.0f} TFLOP/s in training, {SAMPLING:.0%} in sampling, answers of {ANSWER} tokens")
    for script, (count, *price) in [*totals.items(), ("all", map(sum, zip(*totals.values(), strict=True)))]:
        print(f"{script:<9}{count:>5} commands {told(*price)}")


if __name__ == "__main__":
    try:
        main(sys.stdin)
    except ValueError as error:
        sys.exit(f"plan.py: error: {error}")
