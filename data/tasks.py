"""General capability: questions with choices, answered by the log-probability of each choice.

A task is a file NAME.jsonl of {"context": text, "choices": [text, ...], "label": index of the
right one}. A choice is what follows the context letter for letter, so it begins with its own
space. The right choice must have the highest log-probability, or, with "metric": "acc_norm", the
highest one per character. A single choice must be what the model would say: each of its tokens the
most probable one (LAMBADA).

The six benchmarks are those of lm-evaluation-harness 0.4.13, under its names and with its prompts
and tokens.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import files, tokens

FIELDS = {"context": str, "choices": list, "label": int}

# ------- the six benchmarks: a row of the source -> context, choices, index of the right one


def lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return context, [word], 0


def hellaswag(row):
    """A row with ctx_a and ctx_b, as published, or one whose prompt is made, "query"."""
    query = row.get("query")
    if not query:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [without_marks(ending) for ending in row["endings"]]
    return without_marks(query), endings, int(row["label"])


def without_marks(text):
    """Without WikiHow's [title] and [step].

    The space that a mark leaves behind stays, as in the harness.
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def arc(row):
    label = row["choices"]["label"].index(row["answerKey"])
    return f"Question: {row['question']}\nAnswer:", row["choices"]["text"], label


def piqa(row):
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]


def openbookqa(row):
    label = row["choices"]["label"].index(row["answerKey"].strip())
    return row["question_stem"], row["choices"]["text"], label


class Benchmark(NamedTuple):
    item: callable
    hub: tuple  # repository, config, split
    file: str  # in a local folder, with .jsonl or .jsonl.gz
    # paper: "accuracy"; here: the usual one of the harness's two (Mamba, arXiv 2312.00752, E.2.3)
    metric: str


BENCHMARKS = {
    "lambada_openai": Benchmark(
        lambada, ("EleutherAI/lambada_openai", "default", "test"), "lambada/test", "acc"
    ),
    "hellaswag": Benchmark(
        hellaswag, ("Rowan/hellaswag", None, "validation"), "hellaswag/validation", "acc_norm"
    ),
    "arc_easy": Benchmark(arc, ("allenai/ai2_arc", "ARC-Easy", "test"), "arc/easy_test", "acc"),
    "arc_challenge": Benchmark(
        arc, ("allenai/ai2_arc", "ARC-Challenge", "test"), "arc/challenge_test", "acc_norm"
    ),
    "piqa": Benchmark(piqa, ("baber/piqa", None, "validation"), "piqa/validation", "acc"),
    "openbookqa": Benchmark(
        openbookqa, ("allenai/openbookqa", "main", "test"), "openbookqa/test", "acc_norm"
    ),
}


def read(name, source=""):
    """The items of a benchmark, from its file in the folder `source` or from the hub.

    Raises ValueError with the file and line of a row that is none of the benchmark's.
    """
    benchmark = BENCHMARKS[name]
    for where, row in files.table(source, benchmark.file, [benchmark.hub], {}):
        try:
            context, choices, label = benchmark.item(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: not a row of {name} ({error!r})") from None
        choices = [f" {choice}" for choice in choices]
        found = {"context": context, "choices": choices, "label": label, "metric": benchmark.metric}
        check(found, where)
        yield found


def check(item, where: str):
    """Raises ValueError, which begins with `where`, if a row is no item of a task."""
    files.check_row(item, FIELDS, where)
    choices = item["choices"]
    empty = not all(text.strip() for text in choices)
    metric = item.get("metric", "acc")
    if empty or not 0 <= item["label"] < len(choices) or metric not in ("acc", "acc_norm"):
        raise ValueError(
            f"{where}: needs choices that are not empty, a label that counts them from 0, and acc "
            "or acc_norm if it names a metric"
        )


def load(folder):
    """{name: rows} of every .jsonl in the folder, in the order of their names.

    Raises ValueError with the file and line at fault, and for a folder of prepare.py that does
    not hold what its world.json lists.
    """
    files.check_listed(folder)
    tasks = {}
    for path in sorted(Path(folder).glob("[!.]*.jsonl")):  # hidden: ._facts.jsonl of a Mac
        tasks[path.stem] = []
        for where, item in files.numbered_jsonl(path, FIELDS):
            check(item, where)
            tasks[path.stem].append(item)
    if not tasks:
        here = "" if Path(folder).is_absolute() else f" (looked for from {Path.cwd()})"
        raise ValueError(
            f"no .jsonl tasks in {folder}{here}, make some with python data/prepare.py toy or tasks"
        )
    return tasks


def encode_pair(enc, context, choice):
    """Ids of a context and of the choice after it, as lm-eval's `_encode_pair` has them.

    Spaces that end the context go to the choice, and the choice is what both together have more
    than the context alone. Without a context it is the end-of-text id.
    """
    before = tokens.encode(enc, context.rstrip())
    after = tokens.encode(enc, context + choice)[len(before) :]
    if not after:
        raise ValueError(
            f"the choice {choice!r} melts into the last word of {context[-40:]!r}: begin it with "
            "a space"
        )
    return before or [enc.eot_token], after


def score(items, enc, loglikelihood):
    """How often the choice is right, and the mean probability of the right one.

    loglikelihood: takes [(context ids, continuation ids)], all choices of all items, and whether
    some item has a single choice. It returns for each its summed log-prob and, if so, whether each
    of its tokens is the most probable one.

    Returns accuracy by the items' metric, its standard error over items, probability (among the
    choices; of a single choice its own), right (0 or 1 per item), acc, acc_norm (by characters,
    without the first space), and the perplexity of single choices.
    """
    pairs = [
        encode_pair(enc, item["context"], choice) for item in items for choice in item["choices"]
    ]
    ends = np.cumsum([len(item["choices"]) for item in items])
    single = any(len(item["choices"]) == 1 for item in items)
    found = np.split(np.asarray(loglikelihood(pairs, single), dtype=np.float64), ends[:-1])
    hits = {"acc": [], "acc_norm": []}
    right = []
    probability = []
    for item, (logp, greedy) in zip(items, (part.T for part in found), strict=True):
        lengths = [len(choice.removeprefix(" ")) for choice in item["choices"]]
        for metric, values in (("acc", logp), ("acc_norm", logp / lengths)):
            hits[metric].append(
                int(greedy[0] if len(logp) == 1 else values.argmax() == item["label"])
            )
        right.append(hits[item.get("metric", "acc")][-1])
        share = np.exp(logp - logp.max())
        probability.append(
            np.exp(logp[0]) if len(logp) == 1 else share[item["label"]] / share.sum()
        )
    accuracy = float(np.mean(right))
    se = (accuracy * (1 - accuracy) / max(len(items) - 1, 1)) ** 0.5
    out = {
        "accuracy": accuracy,
        "se": se,
        "probability": float(np.mean(probability)),
        "right": right,
    }
    out |= {metric: float(np.mean(values)) for metric, values in hits.items()}
    if len(pairs) == len(items):
        out["perplexity"] = float(np.exp(-np.mean([part[0, 0] for part in found])))
    return out
