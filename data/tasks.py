"""General capability: questions with choices, answered by the log-probability of each choice as a continuation.

A task is a file NAME.jsonl of {"context": text, "choices": [text, ...], "label": index of the right one}. A choice is
what follows the context letter for letter, so it begins with its own space.
"""

from pathlib import Path

import numpy as np

from data import problems, tokens


def load(folder):
    """{name: rows} of every .jsonl in the folder, in the order of their names."""
    tasks = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        tasks[path.stem] = list(problems.read_jsonl(path, {"context": str, "choices": list, "label": int}))
        for line_number, row in enumerate(tasks[path.stem], 1):
            texts = [row["context"], *row["choices"]]
            if len(texts) < 3 or not all(texts) or not 0 <= row["label"] < len(row["choices"]):
                raise ValueError(f"{path}:{line_number}: needs a context, two choices and a label that counts from 0")
    if not tasks:
        raise ValueError(f"no .jsonl tasks in {folder}, make some with python data/prepare.py toy")
    return tasks


def score(items, enc, logprob):
    """How often the right choice has the highest summed log-prob, and its mean probability among the choices.

    `logprob` takes [(context ids, continuation ids)], all choices of all items, and returns one sum for each; it is
    free to batch them as it likes. Returns accuracy, its standard error over items, probability, right (0/1 an item).
    """
    pairs = [(tokens.encode(enc, item["context"]), tokens.encode(enc, choice))
             for item in items for choice in item["choices"]]
    sums = np.asarray(logprob(pairs), dtype=np.float64)
    ends = np.cumsum([len(item["choices"]) for item in items])
    right, probability = [], []
    for item, logp in zip(items, np.split(sums, ends[:-1]), strict=True):
        share = np.exp(logp - logp.max())
        right.append(int(logp.argmax() == item["label"]))
        probability.append(share[item["label"]] / share.sum())
    accuracy = float(np.mean(right))
    se = (accuracy * (1 - accuracy) / max(len(items) - 1, 1)) ** 0.5
    return {"accuracy": accuracy, "se": se, "probability": float(np.mean(probability)), "right": right}
