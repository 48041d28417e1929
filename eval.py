"""Evaluate checkpoints: pass@k on questions, general capability on tasks, one JSON row each; or draw the report.

    python eval.py ckpt/toy/step2734.pt ckpt/toy/step2734-rl.pt --results results/toy
    python eval.py --report results/toy

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1) at temperature 0.6. A base model is
measured with 8 shots and with none, everything else with none. Questions come from the validation split; --final takes
the test split. Rows of a checkpoint are written together to RESULTS/CHECKPOINT.jsonl, and those that are there are kept.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import problems, report, run, tasks, tokens
from model import Model, ModelConfig, Sampler


@dataclass(frozen=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoints to evaluate
    results: str = "results/toy"  # folder for the rows
    report: str = ""  # instead of evaluating: write report.md and figures from the rows in this folder
    json: bool = False  # with --report: the verdicts as one JSON object on the last line
    questions: tuple[str, ...] = ()  # question folders (default: the one that the checkpoint names)
    tasks: str | None = None  # folder of general-capability tasks (default: what the checkpoint names; "" for none)
    final: bool = False  # the test split; without it, validation
    limit: int = 300  # questions taken from the split (0: all)
    n: int = 32  # answers a question, at least the largest k
    k: tuple[int, ...] = (1, 8, 32)  # for pass@k
    temperature: float = 0.6  # paper: 0.6
    shots: tuple[int, ...] | None = None  # solved examples before the question (default: 8 and 0 for a base, else 0)
    max_new: int | None = None  # longest answer (default: as the checkpoint was trained, 48 for a toy base, else 512)
    rows: int = 1024  # answers sampled side by side; never changes the result
    seed: int = 1234  # noise of the sampling
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    overwrite: bool = False  # measure again what has a row


def solve(sampler, enc, rows, n, max_new, temperature, seed, world, shots=(), ks=(1, 2, 4, 8, 16, 32)) -> dict:
    """Answer each question n times; per-question counts of right answers and what follows from them.

    rows: questions; shots: solved questions shown before each. Answers end at the end of text, or where the next question
    would begin (a base model likes to go on). The ranks share the questions; all return the same."""
    mine = rows[world.rank :: world.size]
    head = problems.PROMPTS[enc.name].split("{}")[0]
    ends = [enc.eot_token, tokens.encode(enc, head.rstrip())[0]]
    prompts = [tokens.encode(enc, problems.prompt(enc.name, row["question"])) for row in mine]
    prefix = tokens.encode(enc, problems.few_shot(enc.name, shots))
    seeds = problems.answer_seeds(seed, "eval", mine, n)
    samples = sampler(prompts, n, max_new, seeds, ends, temperature, prefix) if mine else None
    counts = torch.zeros(4, len(rows), dtype=torch.float64)  # right, in format, cut, distinct answers
    for place, row in enumerate(mine):
        block = range(place * n, (place + 1) * n)
        cut, lengths = (x[block.start : block.stop].tolist() for x in (samples.cut, samples.lengths))
        answers = zip(samples.tokens[block.start : block.stop].tolist(), lengths, cut, strict=True)
        texts = [tokens.decode(enc, ids[: length - (not c)]) for ids, length, c in answers]
        counts[:, world.rank + place * world.size] = torch.tensor([
            sum(not c and problems.grade(text, row["answer"]) for text, c in zip(texts, cut, strict=True)),
            sum(not c and problems.well_formed(text) for text, c in zip(texts, cut, strict=True)),
            sum(cut), len({problems.final_answer(text) for text in texts}),
        ])  # fmt: skip
    counts = torch.tensor(world.sum(*counts.flatten().tolist())).view(4, -1)
    correct = [int(c) for c in counts[0]]
    out = {"n": n, "temperature": temperature, "correct": correct, "formatted": float(counts[1].mean() / n),
           "cut": float(counts[2].mean() / n), "answers": float(counts[3].mean())}  # fmt: skip
    for k in ks:
        if k <= n:
            each = report.pass_at_k(n, correct, k)
            out[f"pass@{k}"], out[f"se@{k}"] = float(each.mean()), report.standard_error(each)
    return out


@torch.no_grad()
def continuation_log_probs(model, pairs, pad, device, budget=16384) -> list[float]:
    """Summed log-prob of each continuation given its context, [(context ids, continuation ids)], batched by length."""
    order, out = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i]))), [0.0] * len(pairs)
    while order:
        count = max(1, budget // sum(map(len, pairs[order[0]])))  # tokens a batch, padding counted
        part, order = order[:count], order[count:]
        batch = problems.make_batch([pairs[i][0] for i in part], [pairs[i][1] for i in part], [1.0] * len(part), pad)
        logp, _ = model(batch.ids.to(device), mask=batch.mask.to(device))
        for i, total in zip(part, logp.sum(1).tolist(), strict=True):
            out[i] = total
    return out


def training(path) -> tuple[list[dict], dict]:
    """From a checkpoint's metrics file: the validations along the run, the training reward beside each, and its costs."""
    metrics = Path(f"{path}.metrics.jsonl")
    lines, points, reward = run.read_lines(metrics) if metrics.exists() else [], [], None
    for x in lines:
        reward = x.get("reward", reward)  # of the step before the validation
        if "validation" in x:
            kept = {k: v for k, v in x["validation"].items() if k not in ("correct", "n", "temperature")}
            points.append({"step": x["step"], **({} if reward is None else {"reward": reward}), **kept})
    totals = [x["totals"] for x in lines if "totals" in x]
    return points, totals[-1] if totals else {}


def evaluate(path, cfg, world) -> list[dict]:
    """All rows of one checkpoint that are not in the results yet."""
    saved = run.load(path)
    meta = saved["meta"]
    enc, split = tokens.encoding(meta["encoding"]), "test" if cfg.final else "val"
    max_new = cfg.max_new or meta["run"].get("max_new") or (48 if meta["preset"].startswith("toy") else 512)
    base = {"checkpoint": str(path), "config_hash": run.config_hash(meta), "model": meta["preset"], "split": split, "seed": meta["seed"]}
    base |= {k: meta[k] for k in ("world", "recipe", "tokens", "pretrain_seed", "step")}
    base |= {k: meta["run"][k] for k in ("group", "share") if k in meta["run"]}
    points, costs = training(path)
    if meta["recipe"] != "base":
        base |= costs
    file = Path(cfg.results) / f"{Path(path).stem}.jsonl"
    rows = run.read_lines(file) if file.exists() else []
    others = {row["checkpoint"] for row in rows} - {str(path)}
    if others and not cfg.overwrite:
        raise ValueError(f"{file} has the rows of {others.pop()}: give another --results, or --overwrite")
    rows = [row for row in rows if row["checkpoint"] == str(path)]

    def missing(kind, benchmark=None, **settings):
        """Is there no such row yet? What was measured on another version of the checkpoint, or otherwise, goes."""
        key = {"kind": kind, "benchmark": benchmark, "split": split, "shots": settings.get("shots")}
        old = [row for row in rows if all(row.get(k) == v for k, v in key.items())]
        settings["config_hash"] = base["config_hash"]
        if old and not cfg.overwrite and all(old[-1].get(k) == v for k, v in settings.items()):
            return False
        rows[:] = [row for row in rows if row not in old]
        return True

    model = run.load_model(saved, Model, ModelConfig, world).eval()
    sampler = Sampler(model, cfg.rows)
    if world.rank == 0:
        sampler.progress = functools.partial(tqdm, desc=f"{Path(path).name}: batches of answers", leave=False, mininterval=2)

    def say(text):
        if world.rank == 0:
            print(f"{path}  {text}", flush=True)

    for folder in cfg.questions or (meta["questions"],):
        if Path(folder).name == "test.jsonl" and not cfg.final:
            raise ValueError(f"{folder} looks like a test split: only --final opens one")
        questions = problems.load(folder, split)[: cfg.limit or None]
        for shots in cfg.shots or ((8, 0) if meta["recipe"] == "base" else (0,)):
            name, shown = Path(folder).stem, problems.load(folder, "shots")[:shots] if shots else []
            if len(shown) < shots:
                raise ValueError(f"{folder} has {len(shown)} shots, not {shots}: lower --shots")
            how = dict(shots=shots, n=cfg.n, k=list(cfg.k), temperature=cfg.temperature, max_new=max_new, noise=cfg.seed,
                       ids=[row["id"] for row in questions], content=run.fingerprint(questions + shown))  # fmt: skip
            if not missing("pass", name, **how):
                continue
            result = solve(sampler, enc, questions, cfg.n, max_new, cfg.temperature, cfg.seed, world, shown, cfg.k)
            rows.append({"kind": "pass", **base, "benchmark": name, **how, **result})
            told = "  ".join(f"pass@{k} {100 * result[f'pass@{k}']:.1f} ± {100 * result[f'se@{k}']:.1f}" for k in cfg.k)
            say(f"{name} {split} {shots}-shot  {told}  in format {100 * result['formatted']:.0f}%")
    folder = meta["tasks"] if cfg.tasks is None else cfg.tasks
    for name, items in tasks.load(folder).items() if folder else ():
        if missing("general", name, content=run.fingerprint(items)):
            result = tasks.score(items, enc, lambda pairs: continuation_log_probs(model, pairs, tokens.pad_id(enc), world.device))
            rows.append({"kind": "general", **base, "benchmark": name, "content": run.fingerprint(items), **result})
            say(f"{name}  accuracy {100 * result['accuracy']:.1f}  probability {result['probability']:.3f}")
    split = "val"  # what a trainer watches, whatever is measured here
    if points and missing("curve"):
        rows.append({"kind": "curve", **base, "split": split, "points": points})
    if world.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(file.name + ".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(beside, file)
    return rows


def main(cfg):
    if cfg.report:
        return report.report(cfg.report, cfg.json)
    if not cfg.checkpoints:
        raise ValueError("name at least one checkpoint, or --report RESULTS")
    if cfg.n < max(cfg.k):
        raise ValueError(f"pass@{max(cfg.k)} needs --n of at least {max(cfg.k)}, not {cfg.n}")
    if cfg.json:
        raise ValueError("--json goes with --report")
    if len({Path(folder).stem for folder in cfg.questions}) < len(cfg.questions):
        raise ValueError("two of --questions have the same name, and a row is known by it: rename one")
    world = run.start(cfg.device, cfg.dtype)
    for path in dict.fromkeys(cfg.checkpoints):
        evaluate(path, cfg, world)


if __name__ == "__main__":
    run.main(main, Config, __doc__)
