"""Evaluate checkpoints: pass@k on questions, general capability, loss on text; or draw the report.

    python eval.py ckpt/toy/step5859.pt ckpt/toy/step5859-rl.pt --results results/mine
    python eval.py --report results/mine
    python eval.py --curves ckpt/toy/*.metrics.jsonl

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1) at temperature 0.6. A
base model is measured with 8 shots (fewer if the set has fewer, or if they and an answer would not
fit in a row of its text) and with none, everything else with none. Questions come from the
validation split; --final takes the test split.

A measurement is one JSON object, a row. The rows of a checkpoint are in RESULTS/CHECKPOINT.jsonl. A
row that is there is not measured again. If it was measured with other flags, another --n for
instance, eval.py stops and says so; --overwrite replaces it. Until all rows are measured they are
in .jsonl.resume beside it: an evaluation that was stopped goes on.
"""

import functools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

import common
import plan
from common import Count, NonNegative, Whole
from data import grader, problems, tasks, tokens
from data.files import fingerprint, read_rows, write_rows
from model import Model, Sampler, log_probs, paper_size
from results.stats import pass_at_k, standard_error


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoints: tuple[str, ...] = ()  # checkpoints to evaluate
    results: str = "results/mine"  # folder for the rows
    report: str = ""  # instead of evaluating: print and draw what the rows in this folder say
    # instead: draw the metrics of these runs, finished or not, to RESULTS/runs.png
    curves: str = ""
    json: bool = False  # with --report: the findings as one JSON object on the last line
    questions: tuple[str, ...] = ()  # question folders (default: the one that the checkpoint names)
    tasks: str | None = None  # general-capability tasks (default: the checkpoint's; "" for none)
    # folder of token shards: the loss on its held-out text, window by window, across documents
    text: str = ""  # whatever pretrain.py's --doc_mask was
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
    plan: str = ""  # a preset (toy, 190m, 1b, 4b): print what this would cost with it, and exit


# ----------------------------------------------------------------------------- three measurements


class Asked(NamedTuple):
    """Questions, and how they are put before a model."""

    encoding: object
    form: problems.Form
    rows: list[dict]
    shots: list[dict] = []  # solved questions shown before each

    @property
    def prefix(self) -> list[int]:
        return tokens.encode(self.encoding, problems.few_shot(self.form, self.shots))

    def prompts(self, rows: list[dict]) -> list[list[int]]:
        texts = [problems.prompt(self.form, row["question"]) for row in rows]
        return [tokens.encode(self.encoding, text) for text in texts]


def solve(
    sampler, asked: Asked, n, max_new, temperature, seed, world, ks, progress=iter, shown=None
) -> dict:
    """Answer each question n times -> counts of right answers per question, and their means.

    shown: a list to which this rank adds each answer of its questions.

    Answers end at the end of text, or where the next question would begin (a base model likes to
    go on). The ranks share the questions; all return the same. "flexible@1" also counts what is
    right in the last box, or else in the last number, whatever the format: it is reported and never
    a reward. "log_prob": what the model itself (temperature 1) gives a token of its answers, in
    nats, on average: sharpening raises it.
    """
    mine = asked.rows[world.rank :: world.size]
    # the text of a next question is taken off below
    ends = problems.stop_tokens(asked.form, asked.encoding)
    seeds = problems.answer_seeds(seed, "eval", mine, n)
    samples = None
    if mine:
        how = dict(temperature=temperature, prefix=asked.prefix, progress=progress)
        samples = sampler(asked.prompts(mine), n, max_new, seeds, ends, **how)
    counts = torch.zeros(len(COUNTED), len(asked.rows), dtype=torch.float64)
    bar = tqdm(mine, desc="grading", delay=5, leave=False, disable=world.rank > 0)
    for place, row in enumerate(bar):
        block = slice(place * n, (place + 1) * n)
        answers = read_answers(asked, samples, block, row)
        counts[:, world.rank + place * world.size] = count_answers(answers, samples, block, row)
        if shown is not None:
            shown += answers
    summed = torch.tensor(world.sum(*counts.flatten().tolist()), dtype=torch.float64)
    summed = summed.view(counts.shape)  # of all ranks, question by question
    total = dict(zip(COUNTED, summed, strict=True))
    out = {
        "n": n,
        "temperature": temperature,
        "correct": [int(count) for count in total["right"]],
        "flexible@1": float(total["right in any format"].mean() / n),
        "formatted": float(total["formatted"].mean() / n),
        "truncated": float(total["truncated"].mean() / n),
        "answers": float(total["distinct"].mean()),
        "log_prob": float(total["nats"].sum() / total["tokens"].sum()),
    }
    for k in ks:
        if k <= n:
            each = pass_at_k(n, out["correct"], k)
            out[f"pass@{k}"] = float(each.mean())
            out[f"se@{k}"] = standard_error(each)
    return out


def read_answers(asked: Asked, samples, block: slice, row: dict) -> list[dict]:
    """The text of each answer to one question, which are `block` of the samples, and its marks."""
    texts = []
    ended = []
    kept = (samples.tokens[block].tolist(), samples.lengths[block].tolist())
    for ids, length, truncated in zip(*kept, samples.truncated[block].tolist(), strict=True):
        text = tokens.decode(asked.encoding, ids[: length - (not truncated)])
        text, goes_on = problems.until_next_question(asked.form, text)
        texts.append(text)
        ended.append(goes_on or not truncated)
    marks = grader.grade_all(texts, [row["answer"]] * len(texts), ended)
    return [
        {"text": text, "correct": correct, "formatted": formatted, "truncated": not done}
        for text, (correct, formatted), done in zip(texts, marks, ended, strict=True)
    ]


# what is counted of the answers to a question
COUNTED = ("right", "right in any format", "formatted", "truncated", "distinct", "nats", "tokens")


def count_answers(answers: list[dict], samples, block: slice, row: dict) -> torch.Tensor:
    """Numbers as in COUNTED of the answers to one question, which are `block` of the samples."""
    texts = [answer["text"] for answer in answers]
    right = [answer["correct"] for answer in answers]
    loose = grader.compare_all([(grader.flexible_answer(text), row["answer"]) for text in texts])
    flexible = [correct for correct, _ in loose]
    counts = [
        sum(right),
        sum(map(max, right, flexible)),
        sum(answer["formatted"] for answer in answers),
        sum(answer["truncated"] for answer in answers),
        len(set(map(grader.final_answer, texts))),
        samples.logp_1[block].sum(),
        samples.lengths[block].sum(),
    ]
    return torch.tensor(counts, dtype=torch.float64)


def validate(run: common.Setup, sampler, log: common.Log, step: int):
    """Answer the validation questions of a trainer; a line in its log. `step` updates were done.

    A few of them go with their answers to OUT.answers.jsonl.
    """
    if not run.held_out:
        return
    sampler.refresh()
    cfg = run.cfg
    log.doing(f"answering {len(run.held_out)} validation questions {cfg.eval_n} times")
    asked = Asked(run.encoding, run.form, run.held_out)
    shown = []
    found = solve(
        sampler,
        asked,
        n=cfg.eval_n,
        max_new=cfg.max_new,
        temperature=Config.temperature,  # an evaluation's, not that of a trainer's own sampling
        seed=cfg.seed,
        world=run.world,
        ks=(1, 2, 4, 8, 16, 32),
        shown=shown,
    )
    log.add(step, validation=found)
    # a wrong answer in the right form has a reward in RL only
    worth = getattr(cfg, "format_reward", 0.0)
    for answer in shown:
        answer["reward"] = grader.reward(answer["correct"], answer["formatted"], worth)
    mine = asked.rows[run.world.rank :: run.world.size]
    log.add_answers(step, "val", common.examples(mine, shown))


@torch.no_grad()
def continuation_log_probs(model, pairs, greedy, world, progress=iter, budget=16384):
    """[(context ids, continuation ids)] -> [(log-prob, greedy)]: of each continuation its summed
    log-prob and, if `greedy` is asked for, whether each of its tokens is the most probable one.

    The continuations of a context share a row (model.Layout), rows of like length share a pass of
    at most `budget` tokens, and the ranks share the contexts. What is too long for the model loses
    its first tokens (as in lm-eval). Raises ValueError if a continuation alone is too long.
    """
    limit = model.config.context
    choices = {}  # context -> its places in pairs
    for place, (context, continuation) in enumerate(pairs):
        room = limit + 1 - len(continuation)  # the last token is a target and no input
        if room < 1:
            raise ValueError(
                f"a choice of {len(continuation)} tokens is longer than the model's context of "
                f"{limit}"
            )
        choices.setdefault(tuple(context[-room:]), []).append(place)
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    lengths = {x: len(x) + sum(len(pairs[i][1]) for i in choices[x]) for x in choices}
    mine = sorted(choices, key=lambda context: lengths[context])[world.rank :: world.size]
    passes = []
    for context in mine:
        if not passes or (len(passes[-1]) + 1) * (lengths[context] + 8) > budget:
            passes.append([])
        passes[-1].append(context)
    for contexts in progress(passes):
        places = [place for context in contexts for place in choices[context]]
        prompts = [context for context in contexts for _ in choices[context]]
        continuations = [pairs[place][1] for place in places]
        found[places] = score_continuations(model, prompts, continuations, greedy, world.device)
    flat = world.sum(*found.flatten().tolist())
    return [
        (logp, greedy and misses == 0) for logp, misses in zip(flat[::2], flat[1::2], strict=True)
    ]


def score_continuations(model, contexts, continuations, greedy: bool, device) -> torch.Tensor:
    """(len(contexts), 2) fp64: the summed log-prob of each continuation of a context, and how many
    of its tokens are not the most probable ones (0 if `greedy` is not asked for)."""
    every = len(continuations)
    rows = problems.tree_rows(contexts, continuations, every)
    batch = problems.make_batch(contexts, continuations, [1.0] * every, 0, per_row=every)
    batch = batch.to(device)
    states = model.hidden(batch.ids, batch.layout)[batch.mask]  # (N, D)
    target = batch.target[batch.mask]  # (N,)
    vocab = model.config.vocab
    scores = torch.zeros(2, len(target), dtype=torch.float64, device=device)
    scores[0] = log_probs(states, model.head.weight, target, vocab)[0]
    if greedy:  # a second product with the head
        parts = [model.head(part)[:, :vocab].argmax(1) for part in states.split(256)]
        scores[1] = torch.cat(parts) != target
    order = [number for _, numbers in rows for number in numbers]
    sizes = [len(continuations[number]) for number in order]
    out = torch.zeros(every, 2, dtype=torch.float64)
    out[order] = torch.stack([part.sum(1) for part in scores.cpu().split(sizes, dim=1)])
    return out


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
        layout = None
        if end is not None:
            layout = [x.to(world.device) for x in layout_of(part, end)]
        ids = torch.from_numpy(part).to(world.device)
        logp, _ = model(ids[:, :-1], ids[:, 1:], layout=layout)
        losses[places] = -logp.double().mean(1).cpu()
    return world.sum(*losses.tolist())[: len(rows)]


def layout_of(rows, end: int) -> tuple[torch.Tensor, ...]:
    """The model.Layout of rows of text (B, T + 1), in which the id `end` ends a document."""
    position, document = tokens.documents(rows[:, :-1], end)
    branch = torch.zeros(position.shape, dtype=torch.long)
    return torch.from_numpy(position), torch.from_numpy(document), branch


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
    encoding = common.encoding_of(saved)
    model = common.load_model(saved, world).eval()
    sampler = Sampler(model, cfg.rows, common.can_compile(cfg, world))
    name = f"{Path(path).name}: batches of answers"
    hidden = world.rank > 0
    bar = functools.partial(tqdm, desc=name, leave=False, mininterval=2, disable=hidden)
    return Subject(Path(path), saved["meta"], model, sampler, encoding, bar)


def place(row: dict) -> list:
    """By which a row is known among those of its checkpoint."""
    return [row.get(name) for name in ("kind", "benchmark", "shots", "split")]


class Sheet:
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
        self.before = self.state if self.state.exists() else self.file
        rows = read_rows(self.before) if self.before.exists() else []
        world.wait()  # no rank writes before all have read: they must agree on what is missing
        others = {row["checkpoint"] for row in rows} - {self.base["checkpoint"]}
        if others and not cfg.overwrite:
            raise ValueError(
                f"{self.before} has the rows of {others.pop()}: "
                "give another --results, or --overwrite"
            )
        same = ("checkpoint", "config_hash", "weights")  # else it was trained again since
        self.rows = [row for row in rows if all(row.get(x) == self.base[x] for x in same)]
        if old := len(rows) - len(self.rows):
            self.say(f"{old} rows of other weights are left out  (from {self.before})")

    def keep(self, kind: str, settings: dict, measure, tell, split: str = ""):
        """See to it that there is such a row, and print what tell(row) says of it.

        measure(): called only if there is none; what it finds goes into the row. settings: what
        shapes the measurement; "benchmark" and "shots" name the row. Raises ValueError if these
        weights have a row with other settings, or if a new one has a NaN.
        """
        row = {"kind": kind, **self.base, "split": split or self.split, **settings}
        there = [other for other in self.rows if place(other) == place(row)]
        if there and not self.cfg.overwrite:
            self.check_settings(there[-1], settings)
            if told := tell(there[-1]):
                self.say(f"{told}  (from {self.file.parent})")
            return
        row |= measure()
        values = (*row.values(), *row.get("losses", []))
        if any(math.isnan(value) for value in values if isinstance(value, float)):
            raise ValueError(
                f"{row['checkpoint']} gives log-probs that are NaN ({row['benchmark']}): "
                "no row is written"
            )
        self.rows = [other for other in self.rows if place(other) != place(row)] + [row]
        if self.active:
            write_rows(self.state, self.rows)
        if told := tell(row):
            self.say(told)

    def check_settings(self, row: dict, settings: dict):
        """Raises ValueError if a row was measured with other settings."""
        other = [name for name, value in settings.items() if row.get(name) != value]
        if not other:
            return
        flags = [name for name in other if name not in ("ids", "content")]
        why = ", ".join(f"{name} {row.get(name)} and not {settings[name]}" for name in flags)
        why = why or "other questions, shots or items"
        raise ValueError(
            f"{self.before} has {row['benchmark']} with {why}: "
            "give another --results, or --overwrite"
        )

    def say(self, told: str):
        if self.active:
            tqdm.write(f"{self.base['checkpoint']}  {told}")  # above the bars

    def finish(self):
        if self.active and self.state.exists():  # or nothing was added
            self.state.replace(self.file)


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
    sheet = Sheet(subject, cfg, world)
    meta = subject.meta
    # read first: what is wrong with them should be known before the long part
    folder = meta["tasks"] if cfg.tasks is None else cfg.tasks
    general = tasks.load(folder) if folder else {}
    windows = text_windows(cfg, meta) if cfg.text else None
    folders = cfg.questions or tuple(filter(None, [meta["questions"]]))
    sets = {folder: questions_of(folder, sheet) for folder in folders}
    if not (sets or general or cfg.text):
        raise ValueError(f"{path} names no questions: give --questions FOLDER")
    for folder, questions in sets.items():
        for shots in cfg.shots or ((8, 0) if meta["recipe"] == "base" else (0,)):
            question_row(subject, sheet, folder, questions, shots, world)
    for name, items in general.items():
        task_row(subject, sheet, name, items, world)
    if cfg.text:
        text_row(subject, sheet, windows, world)
    points, _ = common.history(path)
    if points:  # what a trainer watched
        sheet.keep("curve", {}, lambda: {"points": points}, tell=lambda row: "", split="val")
    sheet.finish()


def questions_of(folder: str, sheet: Sheet) -> list[dict]:
    """Those of a folder that are asked."""
    if not sheet.cfg.final:
        problems.refuse_test(folder)
    return problems.load(folder, sheet.split)[: sheet.cfg.limit or None]


def name_of(folder: str) -> str:
    """What the rows call a set of questions: the name of its folder, or of its file."""
    return Path(folder).resolve().name.removesuffix(".jsonl")


def question_row(subject: Subject, sheet: Sheet, folder, questions, shots: int, world):
    """The row of one set of questions, `shots` solved ones before each."""
    cfg, meta = sheet.cfg, subject.meta
    max_new = cfg.max_new or common.longest(meta)
    shown = problems.shots(folder, shots, questions, cfg.shot_seed, exactly=bool(cfg.shots))
    asked = Asked(subject.encoding, problems.form(folder), questions, shown)
    if not cfg.shots:  # as many as a row of its text has room for, together with an answer
        longest = max(map(len, asked.prompts(questions)))
        room = min(meta["length"], subject.model.config.context - longest) - max_new
        while asked.shots and len(asked.prefix) > room:
            asked = asked._replace(shots=asked.shots[:-1])
        if len(asked.shots) < shots and sheet.active:
            why = f"an answer leaves room for {max(0, room)} tokens of them"
            if len(asked.shots) == len(shown):
                why = f"{folder} has no more"
            common.say(f"{len(asked.shots)} shots, not {shots}: {why}")
    settings = dict(
        benchmark=name_of(folder),
        shots=len(asked.shots),
        n=cfg.n,
        temperature=cfg.temperature,
        max_new=max_new,
        noise=sheet.noise,
        ids=[row["id"] for row in questions],
        content=fingerprint(questions + asked.shots),
    )

    def measure() -> dict:
        found = solve(
            subject.sampler,
            asked,
            n=cfg.n,
            max_new=max_new,
            temperature=cfg.temperature,
            seed=sheet.noise,
            world=world,
            ks=cfg.k,
            progress=subject.progress,
        )
        return {"k": list(cfg.k)} | found

    sheet.keep("pass", settings, measure, functools.partial(pass_told, cfg))


def pass_told(cfg: Config, row: dict) -> str:
    told = [f"{row['benchmark']} {row['split']} {row['shots']}-shot"]
    for k in cfg.k:
        each = pass_at_k(row["n"], row["correct"], k)
        told.append(f"pass@{k} {100 * each.mean():.1f} ± {100 * standard_error(each):.1f}")
    told.append(f"in any format {100 * row['flexible@1']:.1f}")
    told.append(f"well-formed {100 * row['formatted']:.0f}%")
    return "  ".join(told)


def task_row(subject: Subject, sheet: Sheet, name: str, items: list[dict], world):
    """The row of one task of general capability."""
    bar = functools.partial(subject.progress, desc=f"{subject.path.name}: {name}")
    score = functools.partial(continuation_log_probs, subject.model, world=world, progress=bar)

    def tell(row):
        numbers = f"accuracy {100 * row['accuracy']:.1f}  probability {row['probability']:.3f}"
        return f"{name}  {numbers}"

    settings = dict(benchmark=name, content=fingerprint(items))
    sheet.keep("general", settings, lambda: tasks.score(items, subject.encoding, score), tell)


def text_windows(cfg: Config, meta: dict):
    """The held-out text of --text: int64 (windows, tokens + 1), as long as in pre-training."""
    return tokens.Stream(cfg.text, "val", meta["length"], 0, meta["encoding"]).beginning(256)


def text_row(subject: Subject, sheet: Sheet, windows, world):
    """The row of the loss on held-out text."""

    def measure() -> dict:
        micro = max(1, 16384 // (windows.shape[1] - 1))
        losses = held_out_losses(subject.model, windows, micro, world)
        return dict(losses=[round(loss, 5) for loss in losses], loss=statistics.fmean(losses))

    def tell(row):
        return f"text  {row['loss']:.4f} nats per token in {len(row['losses'])} windows"

    settings = dict(benchmark="text", content=fingerprint(windows.tolist()))
    sheet.keep("text", settings, measure, tell)


def job_of(cfg: Config) -> plan.Job:
    """What the checkpoints read and answer, for --plan.

    What is known of them is their names: STEP.pt is a base, which is asked with shots and without.
    """
    split = "test" if cfg.final else "val"
    there = plan.questions(cfg.questions[0] if cfg.questions else "", cfg.plan, split)
    max_new = cfg.max_new or common.longest({"run": {}, "preset": cfg.plan})
    count = there.test if cfg.final else there.val
    if cfg.questions and cfg.questions[0].endswith(".jsonl"):
        count = there.train
    count = min(count, cfg.limit or count) * max(1, len(cfg.questions))
    asked = 0
    for path in cfg.checkpoints:
        is_base = "-" not in Path(path).stem
        asked += count * (len(cfg.shots) or 1 + is_base)
    measured = 0
    if cfg.tasks != "" and paper_size(cfg.plan):
        measured = plan.TASKS
    if cfg.text:
        measured += 256 * plan.text_row(cfg.plan)
    counts = plan.Tokens(
        read=asked * plan.PROMPT + measured * len(cfg.checkpoints),
        sampled=asked * cfg.n * plan.longest_answer(max_new),
    )
    return plan.Job(
        "eval",
        [counts],
        row=plan.PROMPT + max_new,
        optimizers=0,
        asked=((count, cfg.n),),
        max_new=max_new,
        checkpoints=0,
        note=there.note,
    )


def main(given: dict):
    cfg = Config(**given)
    if cfg.json and not cfg.report:
        raise ValueError("--json goes with --report")
    if cfg.report:
        from results import report  # pandas and matplotlib take seconds to import

        return report.report(cfg.report, cfg.json)
    if cfg.curves:
        from results import curves

        # the shell makes several words of one *, the others are taken for checkpoints
        print(curves.draw([cfg.curves, *cfg.checkpoints], f"{cfg.results}/runs.png"))
        return None
    if not cfg.checkpoints:
        raise ValueError("name at least one checkpoint, or --report RESULTS")
    if cfg.n < max(cfg.k):
        most = max(cfg.k)
        raise ValueError(
            f"pass@{most} needs --n of at least {most}, not {cfg.n}: raise --n or lower --k"
        )
    if len({Path(path).stem for path in cfg.checkpoints}) < len(set(cfg.checkpoints)):
        raise ValueError(
            "two of the checkpoints have one file name, which would be that of their rows: measure "
            "them one by one, each with --results of its own"
        )
    if cfg.plan:
        return plan.show(cfg, job_of(cfg), given)
    if len(set(map(name_of, cfg.questions))) < len(cfg.questions):
        raise ValueError("two of --questions have one name, and a row is known by it: rename one")
    for path in cfg.checkpoints:
        common.check_there(path)  # before the others are measured
    world = common.start(cfg.device, cfg.dtype)
    for path in dict.fromkeys(cfg.checkpoints):
        evaluate(path, cfg, world)


if __name__ == "__main__":
    common.main(main, Config, __doc__)
