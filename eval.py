"""Evaluate checkpoints: pass@k on questions, general capability, loss on text; or draw the report.

    python eval.py ckpt/toy/step3418.pt ckpt/toy/step3418-rl.pt --results results/mine
    python eval.py --report results/mine

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1) at temperature 0.6. A
base model is measured with 8 shots (or as many as the set has and, with an answer, a row of its
text) and with none, everything else with none. Questions come from the validation split; --final
takes the test split.

A measurement is one JSON object, a row. The rows of a checkpoint come together to
RESULTS/CHECKPOINT.jsonl, and those that are there are kept. Until all of them are measured they
are in .jsonl.resume beside it: an evaluation that was stopped goes on.
"""

import functools
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

import common
from common import Count, NonNegative, Whole
from data import grader, problems, tasks, tokens
from data.files import fingerprint, read_rows, write_rows
from model import Model, Sampler, log_probs
from results.stats import pass_at_k, standard_error


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoints to evaluate
    results: str = "results/mine"  # folder for the rows
    report: str = ""  # instead of evaluating: print and draw what the rows in this folder say
    json: bool = False  # with --report: the findings as one JSON object on the last line
    questions: tuple[str, ...] = ()  # question folders (default: the one that the checkpoint names)
    tasks: str | None = None  # general-capability tasks (default: the checkpoint's; "" for none)
    text: str = ""  # folder of token shards: the loss on its held-out text, window by window
    final: bool = False  # the test split; without it, validation
    limit: Whole = 300  # questions taken from the split (0: all)
    n: Count = 32  # answers per question, at least the largest k
    k: tuple[Count, ...] = (1, 8, 32)  # for pass@k
    temperature: NonNegative = 0.6  # paper: 0.6
    shots: tuple[Whole, ...] = ()  # solved examples before the question (default: 0; a base also 8)
    # draw the shots and the noise anew; the rows of a base have this seed, and go to a file of it
    shot_seed: Whole | None = None  # CHECKPOINT-sSEED.jsonl
    max_new: Whole = 0  # tokens of the longest answer (0: as the checkpoint was trained)
    rows: Count = 1024  # answers sampled side by side; never changes the result
    seed: Whole = 1234  # noise of the sampling
    compile: bool = True  # torch.compile the sampler: seconds at the start, more the first time
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on CUDA
    overwrite: bool = False  # measure again what has a row


def solve(sampler, enc, rows, n, max_new, temperature, seed, world, shots=(), ks=(1, 2, 4, 8, 16, 32), form=problems.Form()) -> dict:
    """Answer each question n times; per-question counts of right answers and what follows from them.

    rows: questions; shots: solved questions shown before each. Answers end at the end of text, or where the next question
    would begin (a base model likes to go on). The ranks share the questions; all return the same. "flexible@1" also counts
    what is right in the last box, or else in the last number, whatever the format: it is reported and never a reward.
    "log_prob": what the model itself (temperature 1) gives a token of its answers, in nats, on average: sharpening raises it."""
    mine = rows[world.rank :: world.size]
    ends = [enc.eot_token, tokens.encode(enc, problems.stop_string(form))[0]]  # the sampler stops early, the text is cut below
    prompts = [tokens.encode(enc, problems.prompt(form, row["question"])) for row in mine]
    prefix = tokens.encode(enc, problems.few_shot(form, shots))
    seeds = problems.answer_seeds(seed, "eval", mine, n)
    samples = None
    if mine:
        how = dict(temperature=temperature, prefix=asked.prefix, progress=progress)
        samples = sampler(prompts, n, max_new, seeds, ends, **how)
    counts = torch.zeros(7, len(asked.rows), dtype=torch.float64)
    bar = tqdm(mine, desc="grading", delay=5, leave=False, disable=world.rank > 0)
    for place, row in enumerate(bar):
        block = slice(place * n, (place + 1) * n)
        texts, ended = [], []
        for ids, length, cut in zip(*(x[block].tolist() for x in (samples.tokens, samples.lengths, samples.cut)), strict=True):
            text, goes_on = problems.until_next_question(form, tokens.decode(enc, ids[: length - (not cut)]))
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
            each = pass_at_k(n, out["correct"], k)
            out[f"pass@{k}"] = float(each.mean())
            out[f"se@{k}"] = standard_error(each)
    return out


@torch.no_grad()
def continuation_log_probs(sampler, pairs, greedy, world, budget=16384, progress=iter) -> list[tuple[float, bool]]:
    """[(context ids, continuation ids)] -> for each its summed log-prob and, if `greedy`, whether each of its tokens is the
    most probable one (else False).

    Right; right in the flexible reading; in format; truncated; distinct; nats; tokens.
    """
    texts = []
    ended = []
    kept = (samples.tokens[block].tolist(), samples.lengths[block].tolist())
    for ids, length, truncated in zip(*kept, samples.truncated[block].tolist(), strict=True):
        text = tokens.decode(asked.encoding, ids[: length - (not truncated)])
        text, goes_on = problems.until_next_question(asked.form, text)
        texts.append(text)
        ended.append(goes_on or not truncated)
    flexible = [grader.flexible_answer(text) for text in texts]
    flexible = [grader.compare(answer, row["answer"])[0] for answer in flexible]
    marks = grader.grade_all(texts, [row["answer"]] * len(texts), ended)
    right = [correct for correct, _ in marks]
    counts = [
        sum(right),
        sum(map(max, right, flexible)),
        sum(formatted for _, formatted in marks),
        len(ended) - sum(ended),
        len(set(map(grader.final_answer, texts))),
        samples.logp_1[block].sum(),
        samples.lengths[block].sum(),
    ]
    return torch.tensor(counts, dtype=torch.float64)


def validate(run: common.Setup, sampler, log: common.Log, step: int):
    """Answer the validation questions of a trainer; a line in its log. `step` updates were done."""
    if not run.held_out:
        return
    cfg = run.cfg
    sampler.refresh()
    asked = Asked(run.encoding, run.form, run.held_out)
    ks = (1, 2, 4, 8, 16, 32)
    log.add(
        step,
        validation=solve(sampler, asked, cfg.eval_n, cfg.max_new, 0.6, cfg.seed, run.world, ks),
    )


@torch.no_grad()
def continuation_log_probs(sampler, pairs, greedy, world, progress=iter, budget=16384):
    """[(context ids, continuation ids)] -> [(log-prob, greedy)]: of each continuation its summed
    log-prob and, if `greedy` is asked for, whether each of its tokens is the most probable one.

    The choices of a context share its keys and values. Contexts of one length make a batch of at
    most `budget` tokens, each choice counted with its context; the ranks share the contexts. What
    is too long for the model loses its first tokens (as in lm-eval). Raises ValueError if a
    continuation alone is too long.
    """
    config = sampler.model.config
    choices = {}  # context -> its places in pairs
    for place, (context, continuation) in enumerate(pairs):
        room = config.context + 1 - len(continuation)  # the last token is a target and no input
        if room < 1:
            raise ValueError(
                f"a choice of {len(continuation)} tokens is longer than the model's context of "
                f"{config.context}"
            )
        choices.setdefault(tuple(context[-room:]), []).append(place)
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for contexts in progress(batches):
        places = [i for context in contexts for i in choices[context]]
        group = torch.tensor([g for g, context in enumerate(contexts) for _ in choices[context]], device=device)
        ids = torch.tensor(contexts, device=device)  # (G, S + 1): the last token belongs to the rows, its output is wanted
        past = sampler.prefill(ids[:, :-1])[1] if ids.shape[1] > 1 else []
        size = torch.tensor([len(pairs[i][1]) for i in places], device=device)
        wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(pairs[i][1]) for i in places], batch_first=True).to(device)  # (R, T)
        rows = torch.cat([ids[group, -1:], wanted[:, :-1]], dim=1)
        hidden, _ = sampler.prefill(rows, [(k[group], v[group]) for k, v in past])  # (R, T, D)
        real = torch.arange(wanted.shape[1], device=device) < size[:, None]
        states, target = hidden[real], wanted[real]  # (N, D), (N,)
        scores = torch.zeros(2, *wanted.shape, dtype=torch.float64, device=device)  # log-probs, misses
        scores[0, real] = log_probs(states, sampler.model.head.weight, target, c.vocab)[0].double()
        if greedy:  # a second product with the head
            best = torch.cat([sampler.logits(part).argmax(1) for part in states.split(256)])
            scores[1, real] = (best != target).double()
        found[places] = scores.sum(2).T.cpu()
    found = world.sum(*found.flatten().tolist())
    return [(logp, greedy and misses == 0) for logp, misses in zip(found[::2], found[1::2], strict=True)]


@torch.no_grad()
def held_out_losses(model, rows, micro: int, world, end: int | None = None) -> list[float]:
    """Mean negative log-likelihood (nats per token) of each of the `rows` of ids, (N, T + 1).

    micro: rows per pass. end: the id that ends a document, if attention is to stay inside one.
    """
    # as many on every rank: a sharded model needs all of them for each pass
    count = -(-len(rows) // world.size) * world.size
    losses = torch.zeros(count, dtype=torch.float64)
    for places in torch.arange(world.rank, count, world.size).split(micro):
        part = rows[places.numpy() % len(rows)]
        starts = None
        if end is not None:
            starts = torch.from_numpy(tokens.document_starts(part, end)).to(world.device)
        ids = torch.from_numpy(part).to(world.device)
        weight = torch.ones(len(ids), ids.shape[1] - 1, device=world.device)
        _, logp, _ = model(ids, weight=weight, starts=starts)
        losses[places] = -logp.double().mean(1).cpu()
    return world.sum(*losses.tolist())[: len(rows)]


# -------------------------------------------------------------------------- rows of a checkpoint


class Subject(NamedTuple):
    """A checkpoint that is measured."""

    path: Path
    meta: dict
    model: Model
    sampler: Sampler
    encoding: object
    progress: functools.partial  # a bar over batches


def open_subject(path, cfg: Config, world) -> Subject:
    saved = common.load(path)
    model = common.load_model(saved, world).eval()
    sampler = Sampler(model, cfg.rows, common.can_compile(cfg, world))
    name = f"{Path(path).name}: batches of answers"
    hidden = world.rank > 0
    bar = functools.partial(tqdm, desc=name, leave=False, mininterval=2, disable=hidden)
    encoding = common.encoding_of(saved["meta"], model)
    return Subject(Path(path), saved["meta"], model, sampler, encoding, bar)


class Rows:
    """The rows of one checkpoint: what is measured already, and the files that hold it."""

    def __init__(self, subject: Subject, cfg: Config, world):
        self.cfg = cfg
        self.active = world.rank == 0
        self.split = "test" if cfg.final else "val"
        self.noise = cfg.seed + (cfg.shot_seed or 0)
        self.base = facts(subject, cfg) | {"split": self.split}
        stem = subject.path.stem + ("" if cfg.shot_seed is None else f"-s{cfg.shot_seed}")
        self.file = Path(cfg.results) / f"{stem}.jsonl"
        self.state = Path(f"{self.file}.resume")  # not FILE: what FILE holds is complete
        before = self.state if self.state.exists() else self.file
        self.rows = read_rows(before) if before.exists() else []
        others = {row["checkpoint"] for row in self.rows} - {self.base["checkpoint"]}
        if others and not cfg.overwrite:
            raise ValueError(
                f"{before} has the rows of {others.pop()}: give another --results, or --overwrite"
            )
        self.rows = [row for row in self.rows if row["checkpoint"] == self.base["checkpoint"]]

    def missing(self, kind: str, settings: dict, split: str = "") -> bool:
        """Is there no such row? One of other weights, or measured with other settings, goes.

        settings: what shapes the measurement; "benchmark" and "shots" name the row.
        """
        key = {"kind": kind, "benchmark": settings.get("benchmark"), "shots": settings.get("shots")}
        key["split"] = split or self.split
        old = [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]
        settings = settings | {name: self.base[name] for name in ("config_hash", "weights")}
        same = old and all(old[-1].get(k) == v for k, v in settings.items())
        if same and not self.cfg.overwrite:
            return False
        self.rows = [row for row in self.rows if row not in old]
        return True

    model = checkpoint.load_model(saved, Model, ModelConfig, world).eval()
    sampler = Sampler(model, cfg.rows, cfg.compile and ranks.can_compile(world))
    show = functools.partial(tqdm, desc=f"{Path(path).name}: batches of answers", leave=False, mininterval=2)
    progress = show if world.rank == 0 else iter
    answer = functools.partial(sampler, progress=progress)

    def finish(self):
        if self.active:
            write_rows(self.file, self.rows)
            self.state.unlink(missing_ok=True)


def facts(subject: Subject, cfg: Config) -> dict:
    """What every row says of its checkpoint."""
    meta = subject.meta
    out = {
        "checkpoint": str(subject.path),
        "config_hash": common.config_hash(meta),
        "weights": common.weights_hash(subject.path),
        "model": meta["preset"],
    }
    names = ("seed", "world", "recipe", "tokens", "pretrain_seed", "step")
    out |= {name: meta[name] for name in names}
    if cfg.shot_seed is not None and meta["recipe"] == "base":
        out["seed"] = cfg.shot_seed
    for name in ("group", "share", "share_end", "lr", "sft_lr"):
        if meta["run"].get(name) is not None:
            out[name] = meta["run"][name]
    return out | common.history(subject.path)[1]


def evaluate(path, cfg: Config, world):
    """All rows of one checkpoint that are not in the results yet."""
    subject = open_subject(path, cfg, world)
    rows = Rows(subject, cfg, world)
    meta = subject.meta
    for folder in cfg.questions or (meta["questions"],):
        if Path(folder).name == "test.jsonl" and not cfg.final:
            raise ValueError(f"{folder} looks like a test split: only --final opens one")
        questions = problems.load(folder, split)[: cfg.limit or None]
        wanted = cfg.shots or ((8, 0) if meta["recipe"] == "base" else (0,))
        for shots in wanted:
            shown = problems.shots(folder, shots, questions, cfg.shot_seed, exactly=bool(cfg.shots))
            while shown and not cfg.shots and len(tokens.encode(enc, problems.few_shot(problems.form(folder), shown))) + max_new > meta["length"]:
                shown.pop()
            name, shots = Path(folder).stem, len(shown)
            how = dict(shots=shots, n=cfg.n, k=list(cfg.k), temperature=cfg.temperature, max_new=max_new, noise=noise,
                       ids=[row["id"] for row in questions], content=checkpoint.fingerprint(questions + shown))  # fmt: skip
            if not missing("pass", name, **how):
                continue
            result = solve(sampler, enc, questions, cfg.n, max_new, cfg.temperature, noise, world, shown, cfg.k, problems.form(folder))
            told = "  ".join(f"pass@{k} {100 * result[f'pass@{k}']:.1f} ± {100 * result[f'se@{k}']:.1f}" for k in cfg.k)
            told += f"  read flexibly {100 * result['flexible@1']:.1f}  in format {100 * result['formatted']:.0f}%"
            keep("pass", f"{name} {split} {shots}-shot  {told}", benchmark=name, **how | result)
    folder = meta["tasks"] if cfg.tasks is None else cfg.tasks
    for name, items in tasks.load(folder).items() if folder else ():
        if missing("general", name, content=checkpoint.fingerprint(items)):
            result = tasks.score(items, enc, functools.partial(continuation_log_probs, sampler, world=world, progress=progress))
            told = f"{name}  accuracy {100 * result['accuracy']:.1f}  probability {result['probability']:.3f}"
            keep("general", told, benchmark=name, content=checkpoint.fingerprint(items), **result)
    if cfg.text:
        text_row(subject, rows, world)
    points, _ = common.history(path)
    if points and rows.missing("curve", {}, split="val"):  # what a trainer watched
        rows.rows.append({"kind": "curve", **rows.base, "split": "val", "points": points})
    rows.finish()


def question_row(subject: Subject, rows: Rows, folder: str, shots: int, world):
    """Add the row of one set of questions, `shots` solved ones before each, if it is missing."""
    cfg, meta = rows.cfg, subject.meta
    if Path(folder).name == "test.jsonl" and not cfg.final:
        raise ValueError(f"{folder} looks like a test split: only --final opens one")
    questions = problems.load(folder, rows.split)[: cfg.limit or None]
    max_new = cfg.max_new or common.longest(meta)
    shown = problems.shots(folder, shots, questions, cfg.shot_seed, exactly=bool(cfg.shots))
    asked = Asked(subject.encoding, problems.form(folder), questions, shown)
    if not cfg.shots:  # as many as a row of its text has room for, together with an answer
        while asked.shots and len(asked.prefix) + max_new > meta["length"]:
            asked = asked._replace(shots=asked.shots[:-1])
    settings = dict(
        benchmark=Path(folder).stem,
        shots=len(asked.shots),
        n=cfg.n,
        k=list(cfg.k),
        temperature=cfg.temperature,
        max_new=max_new,
        noise=rows.noise,
        ids=[row["id"] for row in questions],
        content=fingerprint(questions + asked.shots),
    )
    if not rows.missing("pass", settings):
        return
    how = (cfg.n, max_new, cfg.temperature, rows.noise, world, cfg.k, subject.progress)
    found = solve(subject.sampler, asked, *how)
    told = [f"{settings['benchmark']} {rows.split} {settings['shots']}-shot"]
    for k in cfg.k:
        told.append(f"pass@{k} {100 * found[f'pass@{k}']:.1f} ± {100 * found[f'se@{k}']:.1f}")
    told.append(f"in any format {100 * found['flexible@1']:.1f}")
    told.append(f"well-formed {100 * found['formatted']:.0f}%")
    rows.add("pass", settings | found, "  ".join(told))


def task_row(subject: Subject, rows: Rows, name: str, items: list[dict], world):
    """Add the row of one task of general capability, if it is missing."""
    settings = dict(benchmark=name, content=fingerprint(items))
    if not rows.missing("general", settings):
        return
    score = functools.partial(
        continuation_log_probs, subject.sampler, world=world, progress=subject.progress
    )
    found = tasks.score(items, subject.encoding, score)
    told = f"{name}  accuracy {100 * found['accuracy']:.1f}  probability {found['probability']:.3f}"
    rows.add("general", settings | found, told)


def text_row(subject: Subject, rows: Rows, world):
    """Add the row of the loss on held-out text, in windows as long as in pre-training."""
    meta = subject.meta
    stream = tokens.Stream(rows.cfg.text, "val", meta["length"], 0, meta["encoding"])
    windows = stream.beginning(256)
    settings = dict(benchmark="text", content=fingerprint(windows.tolist()))
    if not rows.missing("text", settings):
        return
    losses = held_out_losses(subject.model, windows, max(1, 16384 // stream.length), world)
    mean = statistics.fmean(losses)
    found = dict(losses=[round(loss, 5) for loss in losses], loss=mean)
    told = f"text  {mean:.4f} nats per token in {len(losses)} windows"
    rows.add("text", settings | found, told)


def main(given: dict):
    cfg = Config(**given)
    if cfg.report:
        from results import report  # pandas and matplotlib take seconds to import

        return report.report(cfg.report, cfg.json)
    if not cfg.checkpoints:
        raise ValueError("name at least one checkpoint, or --report RESULTS")
    if cfg.n < max(cfg.k):
        raise ValueError(f"pass@{max(cfg.k)} needs --n of at least {max(cfg.k)}, not {cfg.n}")
    if cfg.json:
        raise ValueError("--json goes with --report")
    if len({Path(folder).stem for folder in cfg.questions}) < len(cfg.questions):
        raise ValueError("two of --questions have one name, and a row is known by it: rename one")
    world = common.start(cfg.device, cfg.dtype)
    for path in dict.fromkeys(cfg.checkpoints):
        evaluate(path, cfg, world)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
