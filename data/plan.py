"""What the commands of matrix.sh will cost: reads them as `bash matrix.sh --dry_run` prints them, adds a line to each.

    training   FLOPs = tokens x flops_per_token (model.py)               GPU hours = FLOPs / (TRAINING x PEAK)
    reading    a third of that: prompts, tasks                           the same
    sampling   a third of that, a token of the answers                   FLOPs / (SAMPLING x PEAK)
    disk       4 bytes a weight of each checkpoint, 4 bytes a token of text (2 in the toy). While a trainer runs, its state
               for --resume takes 12 bytes a weight more (mix 20).

    python data/plan.py memory [--ranks 8] [--length 4096] [--rows 256] [--max_new 512]

prints what each stage takes of a GPU's memory, and how many rows a forward pass (--micro) leave it fit.

Nothing of this is measured on a GPU, and what is not known before the data is there is assumed: the constants below. The
scripts are asked for their flags and sizes: this is the one file of data/ that imports them, and none of them imports it.
"""

import re
import sys
from dataclasses import dataclass
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


def shapes(preset, vocab=100278):
    """A model without memory."""
    with torch.device("meta"):
        return pretrain.Model(pretrain.ModelConfig(**pretrain.PRESETS[preset], vocab=vocab, padded_vocab=-(-vocab // 128) * 128))


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
    parent = vars(models[str(Path(cfg.init).parent)]) if cfg.init else {}
    cfg = run.fill(cfg, script.defaults(cfg, parent))
    easy = f"{cfg.data}/easy"  # only the toy has it
    vocab = tokens.VOCABULARY["toy" if easy in sets or Path(easy).is_dir() else "cl100k_base"]
    model = shapes(cfg.preset, vocab)
    new = dict(model=model, size="toy" if cfg.preset.startswith("toy") else "paper", disk=4.0 * sum(p.numel() for p in model.parameters()),
               preset=cfg.preset, seed=cfg.seed, questions=cfg.questions or easy, tasks=TASKS if cfg.tasks else 0)  # the toy's: little
    made = models[cfg.out] = SimpleNamespace(**new | parent | dict(length=cfg.length, base=not parent))
    steps = max(1, round(cfg.tokens / cfg.batch_tokens))
    kept = {steps, *cfg.save_steps, *(round(count / cfg.batch_tokens) for count in cfg.save_tokens)}
    if (Path(cfg.out) / f"step{steps}.pt").exists():  # finished
        return FREE
    return *work(made.model, steps * cfg.batch_tokens, length=cfg.length)[:2], len(kept) * made.disk


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
    text = getattr(cfg, "text", None)
    trained = rows * getattr(cfg, "updates", 1) + (0 if text else steps * getattr(cfg, "batch", 0))
    validations = 2 + ((steps - 1) // cfg.eval_every if cfg.eval_every else 0)
    sampled = rows + validations * cfg.eval_questions * cfg.eval_n
    read = sampled / getattr(cfg, "group", cfg.eval_n)  # each prompt once
    flops, hours, _ = work(base.model, trained * (PROMPT + answer), read * PROMPT, sampled * answer)
    more = work(base.model, steps * cfg.batch * base.length, length=base.length) if text else FREE
    return flops + more[0], hours + more[1], base.disk


def evaluated(script, cfg):
    read = sampled = 0
    for path in cfg.checkpoints:
        base = models[str(Path(path).parent)]
        answer = min(ANSWER, cfg.max_new or rl.SIZES[base.size]["max_new"])
        for folder in cfg.questions or (base.questions,):
            count = getattr(questions(folder.removesuffix("/train.jsonl")), "train" if folder.endswith(".jsonl") else
                            "test" if cfg.final else "val")  # fmt: skip
            ways = len(cfg.shots) if cfg.shots else 2 if base.base and re.search(r"step\d+\.pt$", path) else 1  # a base: twice
            count = min(count, cfg.limit or count) * ways
            read, sampled = read + count * PROMPT, sampled + count * cfg.n * answer
        read += (base.tasks if cfg.tasks is None else 0) + (256 * base.length if cfg.text else 0)
    return work(base.model, 0, read, sampled) if cfg.checkpoints else FREE


def cost(command):
    """A command line -> its script; FLOPs, GPU hours, bytes."""
    script, flags = re.search(r"(\w+)\.py(.*)", command).groups()
    if script == "prepare":
        return "data", prepared(*flags.split())
    module, price = {"pretrain": (pretrain, pretrained), "eval": (evaluation, evaluated), "sft": (sft, post_trained),
                     "rl": (rl, post_trained), "mix": (mix, post_trained)}[script]  # fmt: skip
    return script, price(module, run.configure(module.Config, flags.split()))


# ---- memory


@dataclass(frozen=True)
class Memory:
    presets: tuple[str, ...] = ("1b", "4b")  # models
    ranks: int = 8  # GPUs, beside one
    length: int = 4096  # tokens a row of pre-training; after it, a prompt and --max_new
    rows: int = 256  # answers sampled side by side on a GPU, as in matrix.sh
    max_new: int = 512  # longest answer


LOGITS = 2048  # rows whose logits are held at once: model.ROWS_CUDA
SPAN = 64  # columns that the sampler's cache is rounded to: model.Sampler.SPAN
STAGES = {"pretrain": (1, 0), "sft": (1, 20 * 32), "rl": (1, 128 * 64), "mix": (2, 128 * 64)}  # optimizers, answers over all GPUs
ROOM = 0.9  # of a GPU; the rest is for CUDA, NCCL and what the allocator cannot use
WAYS = "plain", "compiled", "checkpointed"  # a block as it is, with --compile, with --checkpoint_activations


def memory(model, optimizers=1, answers=0, ranks=1, shard=False, rows=256, max_new=512):
    """Bytes a GPU in bf16: {what: bytes} that are held; bytes more while gradients are summed over the ranks; and while a
    micro-batch goes through, {one of WAYS: (bytes whatever its size, bytes a token)}.

    answers: sampled by all ranks in a step or a validation, 0 in pre-training. --kl takes 4 bytes a weight more.
    What a block keeps of a token, in bytes: width x (2 for its input, 6 for q, k, v, 4 for q and k turned, 4 for the output
    of attention and its copy in another order, 2 for the MLP's input), ffn x (4 for gate and up, 2 for silu, 2 for the product),
    and for each of the four norms width x 8 (two fp32 tensors). Compiled, only two norms keep something, their input in bf16,
    and silu is made again."""
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    width, head, blocks = c.width, c.padded_vocab * c.width, sum(p.numel() for p in model.blocks.parameters())
    part, together = ranks if shard else 1, min(rows, -(-answers // ranks))
    columns = (-(-max_new // SPAN) + 1) * SPAN
    holds = {
        "weights": 4 * weights / part, "gradients": 4 * optimizers * weights / part, "moments": 8 * optimizers * weights / part,
        "replica": 2 * (weights if shard else weights - head) * bool(answers),  # else the embedding is read where it is
        "cache": together * (columns * 4 * c.layers * width + 16 * c.padded_vocab),  # with the logits of one token
    }  # fmt: skip
    summed = 4 * weights * (ranks > 1 and not shard)
    # logits; the head in bf16 and its gradient in fp32, or, sharded: embedding and head gathered in fp32, and their gradients
    fixed = 2 * LOGITS * c.padded_vocab + (16 if shard else 6) * head
    casts = 2 * blocks * (not shard)  # the blocks' weights in bf16, kept for the backward pass; FSDP gathers them again
    sums, ends = 16 + 4 * c.heads, 12 * width  # of the norms and of attention; the final norm and what the head reads
    plain, compiled = 50 * width + 8 * c.ffn + sums, 22 * width + 6 * c.ffn + sums
    return holds, summed, {
        "plain": (fixed + casts, c.layers * plain + ends),
        "compiled": (fixed + casts, c.layers * compiled + ends),
        "checkpointed": (fixed + casts / c.layers, c.layers * 2 * width + plain + ends),
    }  # fmt: skip


def memory_table(cfg):
    told = [f"GB a GPU, computed. A row has {cfg.length} tokens in pre-training, {PROMPT + cfg.max_new} after it; "
            f"--rows {cfg.rows} --max_new {cfg.max_new}.", f"A row, and the largest --micro that fits: {' / '.join(WAYS)} blocks; "
            f"{ROOM:.0%} of a GPU are planned with, - fits with none.", ""]  # fmt: skip
    heads = "weights gradients moments replica cache least".split()
    print("\n".join(told) + "\n" + " " * 24 + "".join(f"{name:>10}" for name in heads) + f"{'a row':>22}{'in 80 GB':>18}{'in 141 GB':>18}")
    for preset in cfg.presets:
        if preset not in pretrain.PRESETS:
            raise ValueError(f"no preset {preset!r}: there are {', '.join(pretrain.PRESETS)}")
        for stage, what in STAGES.items():
            for ranks, shard in ((1, False), (cfg.ranks, False), (cfg.ranks, True)):
                holds, summed, ways = memory(shapes(preset), *what, ranks, shard, cfg.rows, cfg.max_new)
                length, held = PROMPT + cfg.max_new if what[1] else cfg.length, sum(holds.values())
                least = held + max(summed, min(fixed + length * token for fixed, token in ways.values()))
                numbers = "".join(f"{x / 1e9:10.1f}" for x in (*holds.values(), least))
                cells = [[f"{length * token / 1e9:.2f}" for _, token in ways.values()]]
                for room in (ROOM * 80e9 - held, ROOM * 141e9 - held):
                    most = [int((room - fixed) / (length * token)) * (room > summed) for fixed, token in ways.values()]
                    cells.append([str(micro) if micro > 0 else "-" for micro in most])
                print(f"{preset} {stage:<8} x {ranks} {'--shard' if shard else '':<9}" + numbers
                      + "".join(f"{' / '.join(cell):>{wide}}" for cell, wide in zip(cells, (22, 18, 18), strict=True)))  # fmt: skip


# ---- all of it


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
        if sys.argv[1:2] == ["memory"]:
            memory_table(run.configure(Memory, sys.argv[2:], "What each stage takes of a GPU's memory."))
        else:
            main(sys.stdin)
    except ValueError as error:
        sys.exit(f"plan.py: error: {error}")
