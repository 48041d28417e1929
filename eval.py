"""Evaluate checkpoints: pass@k on questions, general capability, loss on text, one JSON row each; or draw the report.

    python eval.py ckpt/toy/step3418.pt ckpt/toy/step3418-rl.pt --results results/toy
    python eval.py --report results/toy

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1) at temperature 0.6. A base model is
measured with 8 shots (or as many as the set has and, with an answer, a row of its text) and with none, everything else with
none. Questions come from the validation split; --final takes the test split. The rows of a checkpoint come together to
RESULTS/CHECKPOINT.jsonl, and those that are there are kept. Until it is complete, what is measured is kept beside it, in
.jsonl.resume: a run that was cut goes on.
"""

import functools
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import checkpoint, grader, problems, ranks, run, tasks, tokens
from model import Model, ModelConfig, Sampler, log_probs
from results import stats


@dataclass(frozen=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoints to evaluate
    results: str = "results/toy"  # folder for the rows
    report: str = ""  # instead of evaluating: write report.md and figures from the rows in this folder
    json: bool = False  # with --report: the verdicts as one JSON object on the last line
    questions: tuple[str, ...] = ()  # question folders (default: the one that the checkpoint names)
    tasks: str | None = None  # folder of general-capability tasks (default: what the checkpoint names; "" for none)
    text: str = ""  # folder of token shards: the loss on its held-out text, window by window, as long as in pre-training
    final: bool = False  # the test split; without it, validation
    limit: int = 300  # questions taken from the split (0: all)
    n: int = 32  # answers a question, at least the largest k
    k: tuple[int, ...] = (1, 8, 32)  # for pass@k
    temperature: float = 0.6  # paper: 0.6
    shots: tuple[int, ...] | None = None  # solved examples before the question (default: 0; of a base 8 too, or what its rows hold)
    shot_seed: int | None = None  # draw these shots and other noise; a base's rows have it as seed, all go to CHECKPOINT-sSEED.jsonl
    max_new: int | None = None  # longest answer (default: as the checkpoint was trained, 56 for a toy base, else 512)
    rows: int = 1024  # answers sampled side by side; never changes the result
    seed: int = 1234  # noise of the sampling
    compile: bool = True  # torch.compile the sampler; costs seconds at the start, more the first time on a machine
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    overwrite: bool = False  # measure again what has a row


def solve(sampler, enc, rows, n, max_new, temperature, seed, world, shots=(), ks=(1, 2, 4, 8, 16, 32)) -> dict:
    """Answer each question n times; per-question counts of right answers and what follows from them.

    rows: questions; shots: solved questions shown before each. Answers end at the end of text, or where the next question
    would begin (a base model likes to go on). The ranks share the questions; all return the same. "flexible@1" also counts
    what is right in the last box, or else in the last number, whatever the format: it is reported and never a reward.
    "log_prob": what the model itself (temperature 1) gives a token of its answers, in nats, on average: sharpening raises it."""
    mine = rows[world.rank :: world.size]
    ends = [enc.eot_token, tokens.encode(enc, problems.stop_string(enc.name))[0]]  # the sampler stops early, the text is cut below
    prompts = [tokens.encode(enc, problems.prompt(enc.name, row["question"])) for row in mine]
    prefix = tokens.encode(enc, problems.few_shot(enc.name, shots))
    seeds = problems.answer_seeds(seed, "eval", mine, n)
    samples = sampler(prompts, n, max_new, seeds, ends, temperature, prefix) if mine else None
    counts = torch.zeros(7, len(rows), dtype=torch.float64)  # right, ... in the flexible reading, in format, cut, distinct, nats, tokens
    for place, row in enumerate(tqdm(mine, desc="grading", delay=5, leave=False, disable=world.rank > 0)):
        block = slice(place * n, (place + 1) * n)
        texts, ended = [], []
        for ids, length, cut in zip(*(x[block].tolist() for x in (samples.tokens, samples.lengths, samples.cut)), strict=True):
            text, goes_on = problems.until_next_question(enc.name, tokens.decode(enc, ids[: length - (not cut)]))
            texts.append(text)
            ended.append(goes_on or not cut)
        flexible = [grader.compare(grader.flexible_answer(text), row["answer"])[0] for text in texts]
        right, formatted = zip(*grader.grade_all(texts, [row["answer"]] * n, ended), strict=True)
        counts[:, world.rank + place * world.size] = torch.tensor([
            sum(right), sum(map(max, right, flexible)), sum(formatted), n - sum(ended), len(set(map(grader.final_answer, texts))),
            samples.logp_1[block].sum(), samples.lengths[block].sum(),
        ])  # fmt: skip
    counts = torch.tensor(world.sum(*counts.flatten().tolist())).view(7, -1)
    correct = [int(c) for c in counts[0]]
    shares = {name: float(count.mean() / n) for name, count in zip(("flexible@1", "formatted", "cut"), counts[1:4], strict=True)}
    out = {"n": n, "temperature": temperature, "correct": correct, **shares, "answers": float(counts[4].mean()),
           "log_prob": float(counts[5].sum() / counts[6].sum())}  # fmt: skip
    for k in ks:
        if k <= n:
            each = stats.pass_at_k(n, correct, k)
            out[f"pass@{k}"], out[f"se@{k}"] = float(each.mean()), stats.standard_error(each)
    return out


@torch.no_grad()
def continuation_log_probs(sampler, pairs, greedy, world, budget=16384) -> list[tuple[float, bool]]:
    """[(context ids, continuation ids)] -> for each its summed log-prob and, if `greedy`, whether each of its tokens is the
    most probable one (else False).

    The choices of a context share its keys and values. Contexts of one length make a batch of at most `budget` tokens, each
    choice counted with its context; the ranks share the contexts. What is too long for the model loses its first tokens
    (as in lm-eval). Raises ValueError if a continuation alone is too long."""
    c, device = sampler.model.config, sampler.head.device
    choices, batches = {}, []  # context -> its places in pairs
    for place, (context, continuation) in enumerate(pairs):
        room = c.context + 1 - len(continuation)  # the last token is a target and no input
        if room < 1:
            raise ValueError(f"a choice of {len(continuation)} tokens is longer than the model's context of {c.context}")
        choices.setdefault(tuple(context[-room:]), []).append(place)
    for length, same in itertools.groupby(sorted(choices, key=len)[world.rank :: world.size], key=len):
        same = list(same)
        most = max(len(choices[x]) * (length + max(len(pairs[i][1]) for i in choices[x])) for x in same)
        step = max(1, budget // most)
        batches += [same[i : i + step] for i in range(0, len(same), step)]
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for contexts in sampler.progress(batches):
        places = [i for context in contexts for i in choices[context]]
        group = torch.tensor([g for g, context in enumerate(contexts) for _ in choices[context]], device=device)
        ids = torch.tensor(contexts, device=device)  # (G, S + 1): the last token belongs to the rows, its output is wanted
        past = sampler._prefill(ids[:, :-1])[1] if ids.shape[1] > 1 else []
        size = torch.tensor([len(pairs[i][1]) for i in places], device=device)
        wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(pairs[i][1]) for i in places], batch_first=True).to(device)  # (R, T)
        rows = torch.cat([ids[group, -1:], wanted[:, :-1]], dim=1)
        hidden, _ = sampler._prefill(rows, [(k[group], v[group]) for k, v in past])  # (R, T, D)
        real = torch.arange(wanted.shape[1], device=device) < size[:, None]
        states, target = hidden[real], wanted[real]  # (N, D), (N,)
        scores = torch.zeros(2, *wanted.shape, dtype=torch.float64, device=device)  # log-probs, misses
        scores[0, real] = log_probs(states, sampler.model.head.weight, target, c.vocab)[0].double()
        if greedy:  # a second product with the head
            best = torch.cat([(part @ sampler.head.T).argmax(1) for part in states.split(256)])
            scores[1, real] = (best != target).double()
        found[places] = scores.sum(2).T.cpu()
    found = world.sum(*found.flatten().tolist())
    return [(logp, greedy and misses == 0) for logp, misses in zip(found[::2], found[1::2], strict=True)]


@torch.no_grad()
def held_out_losses(model, rows, micro: int, world, end: int | None = None) -> list[float]:
    """Mean negative log-likelihood (nats a token) of each of the `rows` of ids, an array (N, T + 1), `micro` rows a pass.
    end: the id that ends a document, if attention is to stay inside one."""
    losses = torch.zeros(-(-len(rows) // world.size) * world.size, dtype=torch.float64)  # as many on every rank: a sharded
    for places in torch.arange(world.rank, len(losses), world.size).split(micro):  # model needs all of them for each pass
        part = rows[places.numpy() % len(rows)]
        starts = None if end is None else torch.from_numpy(tokens.document_starts(part, end)).to(world.device)
        ids = torch.from_numpy(part).to(world.device)
        _, logp, _ = model(ids, weight=torch.ones(len(ids), ids.shape[1] - 1, device=world.device), starts=starts)
        losses[places] = -logp.double().mean(1).cpu()
    return world.sum(*losses.tolist())[: len(rows)]


def evaluate(path, cfg, world) -> list[dict]:
    """All rows of one checkpoint that are not in the results yet."""
    saved = checkpoint.load(path)
    meta = saved["meta"]
    enc, split = tokens.encoding(meta["encoding"]), "test" if cfg.final else "val"
    max_new = cfg.max_new or run.longest(meta)
    base = {"checkpoint": str(path), "config_hash": checkpoint.config_hash(meta), "weights": checkpoint.weights_hash(path),
            "model": meta["preset"], "split": split}  # fmt: skip
    base |= {k: meta[k] for k in ("seed", "world", "recipe", "tokens", "pretrain_seed", "step")}
    base |= {k: v for k in ("group", "share", "share_end", "lr", "sft_lr") if (v := meta["run"].get(k)) is not None}
    points, costs = run.history(path)
    base |= costs
    noise, stem = cfg.seed, Path(path).stem
    if cfg.shot_seed is not None:
        noise, stem = cfg.seed + cfg.shot_seed, f"{stem}-s{cfg.shot_seed}"
        base |= {"seed": cfg.shot_seed} if meta["recipe"] == "base" else {}
    file = Path(cfg.results) / f"{stem}.jsonl"
    state = Path(f"{file}.resume")  # a file of its own: where FILE is, matrix.sh takes the checkpoint for measured
    before = state if state.exists() else file
    rows = run.read_lines(before) if before.exists() else []
    others = {row["checkpoint"] for row in rows} - {str(path)}
    if others and not cfg.overwrite:
        raise ValueError(f"{before} has the rows of {others.pop()}: give another --results, or --overwrite")
    rows = [row for row in rows if row["checkpoint"] == str(path)]

    def missing(kind, benchmark=None, **settings):
        """Is there no such row yet? What was measured on another version of the checkpoint, or otherwise, goes."""
        key = {"kind": kind, "benchmark": benchmark, "split": split, "shots": settings.get("shots")}
        old = [row for row in rows if all(row.get(k) == v for k, v in key.items())]
        settings |= {k: base[k] for k in ("config_hash", "weights")}
        if old and not cfg.overwrite and all(old[-1].get(k) == v for k, v in settings.items()):
            return False
        rows[:] = [row for row in rows if row not in old]
        return True

    model = checkpoint.load_model(saved, Model, ModelConfig, world).eval()
    sampler = Sampler(model, cfg.rows, cfg.compile and ranks.can_compile(world))
    if world.rank == 0:
        sampler.progress = functools.partial(tqdm, desc=f"{Path(path).name}: batches of answers", leave=False, mininterval=2)

    def keep(kind, told, **row):
        rows.append({"kind": kind, **base, **row})
        if world.rank == 0:
            run.write_lines(state, rows)
            print(f"{path}  {told}", flush=True)

    for folder in cfg.questions or (meta["questions"],):
        if Path(folder).name == "test.jsonl" and not cfg.final:
            raise ValueError(f"{folder} looks like a test split: only --final opens one")
        questions = problems.load(folder, split)[: cfg.limit or None]
        wanted = cfg.shots or ((8, 0) if meta["recipe"] == "base" else (0,))
        for shots in wanted:
            shown = problems.shots(folder, shots, questions, cfg.shot_seed, exactly=bool(cfg.shots))
            while shown and not cfg.shots and len(tokens.encode(enc, problems.few_shot(enc.name, shown))) + max_new > meta["length"]:
                shown.pop()
            name, shots = Path(folder).stem, len(shown)
            how = dict(shots=shots, n=cfg.n, k=list(cfg.k), temperature=cfg.temperature, max_new=max_new, noise=noise,
                       ids=[row["id"] for row in questions], content=checkpoint.fingerprint(questions + shown))  # fmt: skip
            if not missing("pass", name, **how):
                continue
            result = solve(sampler, enc, questions, cfg.n, max_new, cfg.temperature, noise, world, shown, cfg.k)
            told = "  ".join(f"pass@{k} {100 * result[f'pass@{k}']:.1f} ± {100 * result[f'se@{k}']:.1f}" for k in cfg.k)
            told += f"  read flexibly {100 * result['flexible@1']:.1f}  in format {100 * result['formatted']:.0f}%"
            keep("pass", f"{name} {split} {shots}-shot  {told}", benchmark=name, **how | result)
    folder = meta["tasks"] if cfg.tasks is None else cfg.tasks
    for name, items in tasks.load(folder).items() if folder else ():
        if missing("general", name, content=checkpoint.fingerprint(items)):
            result = tasks.score(items, enc, functools.partial(continuation_log_probs, sampler, world=world))
            told = f"{name}  accuracy {100 * result['accuracy']:.1f}  probability {result['probability']:.3f}"
            keep("general", told, benchmark=name, content=checkpoint.fingerprint(items), **result)
    if cfg.text:
        stream = tokens.Stream(cfg.text, "val", meta["length"], 0, meta["encoding"])
        windows = stream.beginning(256)
        content = checkpoint.fingerprint(windows.tolist())
        if missing("text", "text", content=content):
            losses = held_out_losses(model, windows, max(1, 16384 // stream.length), world)
            row = dict(losses=[round(loss, 5) for loss in losses], loss=statistics.fmean(losses), content=content)
            keep("text", f"text  {row['loss']:.4f} nats a token in {len(losses)} windows", benchmark="text", **row)
    split = "val"  # what a trainer watches, whatever is measured here
    if points and missing("curve"):
        rows.append({"kind": "curve", **base, "split": split, "points": points})
    if world.rank == 0:
        run.write_lines(file, rows)
        state.unlink(missing_ok=True)
    return rows


def main(cfg):
    if cfg.report:
        from results import report  # pandas, scipy and matplotlib, which no evaluation needs

        return report.report(cfg.report, cfg.json)
    if not cfg.checkpoints:
        raise ValueError("name at least one checkpoint, or --report RESULTS")
    if cfg.n < max(cfg.k):
        raise ValueError(f"pass@{max(cfg.k)} needs --n of at least {max(cfg.k)}, not {cfg.n}")
    if cfg.json:
        raise ValueError("--json goes with --report")
    if len({Path(folder).stem for folder in cfg.questions}) < len(cfg.questions):
        raise ValueError("two of --questions have the same name, and a row is known by it: rename one")
    world = ranks.start(cfg.device, cfg.dtype)
    for path in dict.fromkeys(cfg.checkpoints):
        evaluate(path, cfg, world)


if __name__ == "__main__":
    run.main(main, Config, __doc__)
