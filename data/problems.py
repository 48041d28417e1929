"""Questions, prompts, and the batches that SFT and RL train on.

A questions file has one JSON object a line: {"id", "question", "answer", "solutions": [...]}, all of it text. The answer
is a number or LaTeX in one line, and each solution ends in `#### answer`, which data/grader.py reads.
"""

import gzip
import hashlib
import io
import json
import random
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import grader, tokens

PROMPTS = {"toy": " Q : {} A :", "cl100k_base": "Question: {}\nAnswer:"}
BETWEEN_SHOTS = {"toy": "", "cl100k_base": "\n\n"}
KINDS = {str: "text", int: "a whole number", list: "a list of texts"}


def unpacked(raw, path):
    """The open file `raw` as it was before it was packed as .gz or .zst, if it was."""
    if path.endswith(".zst"):
        import pyarrow  # `datasets` brings it; unlike zstandard's reader it notices a file that was cut off

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return gzip.open(raw) if path.endswith(".gz") else nullcontext(raw)


def lines_of(path, bar=None):
    """(line number, line) of a UTF-8 file, packed as .gz or .zst or not; a tqdm `bar` counts the bytes read from disk."""
    line_number = 0
    try:
        with open(path, "rb") as raw, unpacked(raw, str(path)) as file:
            start = bar.n if bar is not None else 0
            for line_number, line in enumerate(file, 1):
                yield line_number, line.decode("utf-8")
                if bar is not None:
                    bar.update(start + raw.tell() - bar.n)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {line_number} ({error})") from None


def read_jsonl(path, fields, bar=None):
    """The rows of a .jsonl(.gz) file; `fields` = {name: str, int or list (of str)}. ValueError names a faulty line."""
    line_number = 0
    for line_number, line in lines_of(path, bar):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second: brackets too deep
            raise ValueError(f"{path}:{line_number}: not one JSON object a line ({error})") from None
        for name, kind in fields.items():
            value = row.get(name) if type(row) is dict else None
            if type(value) is not kind or (kind is list and not all(type(item) is str for item in value)):
                raise ValueError(f'{path}:{line_number}: "{name}" must be {KINDS[kind]}, not {str(value)[:60]!r}')
        yield row
    if not line_number:
        raise ValueError(f"{path}: the file is empty")


def place(path, split):
    """A folder's {split}.jsonl, or the .jsonl file itself whatever the split; its shots lie beside it."""
    path = Path(path) if str(path).endswith(".jsonl") else Path(path) / f"{split}.jsonl"
    return path.with_name("shots.jsonl") if split == "shots" else path  # or a question's own solution would be shown to it


def load(path, split):
    """The questions of a folder's {split}.jsonl, or of one .jsonl file."""
    path = place(path, split)
    rows = list(read_jsonl(path, {"id": str, "question": str, "answer": str, "solutions": list}))
    first = {}
    for line_number, row in enumerate(rows, 1):
        where = f"{path}:{line_number}"
        if first.setdefault(row["id"], line_number) != line_number:
            raise ValueError(f"{where}: id {row['id'][:60]!r} is also on line {first[row['id']]}")
        if not row["question"].strip():
            raise ValueError(f"{where}: the question is empty")
        answer = row["answer"].strip()
        if not grader.askable(answer):
            raise ValueError(f"{where}: the answer must be a number, or one line of LaTeX, not {answer[:60]!r}")
        value = grader.number(answer)
        for text in row["solutions"]:  # by their text: algebra would take minutes
            final = grader.final_answer(text)
            if text.count(grader.ENDING) != 1 or (final != answer and (value is None or grader.number(final) != value)):
                raise ValueError(f"{where}: a solution must end in '{grader.ENDING} {answer[:60]}', not {text[-60:]!r}")
    return rows


def shots(folder, count, questions, seed=None, exactly=True):
    """`count` solved questions of a folder to show before others, none of which is one of these `questions`: the first ones,
    or drawn by `seed`. Raises ValueError if there are fewer; not `exactly`: as many as there are."""
    asked, known = {row["question"] for row in questions}, []
    if count and (exactly or place(folder, "shots").exists()):
        known = [row for row in load(folder, "shots") if row["question"] not in asked]
    if bare := next((row["id"] for row in known if not row["solutions"]), None):
        raise ValueError(f"{folder}: shot {bare!r} has no solution to show")
    if exactly and len(known) < count:
        raise ValueError(f"{folder} has {len(known)} shots, not {count}: lower --shots")
    count = min(count, len(known))  # MATH has four
    return known[:count] if seed is None else random.Random(f"{seed} shots").sample(known, count)


def solution_pairs(rows, solutions, seed):
    """[(question, solution)] to train on: `solutions` of each question, chosen once by (seed, id), or "all" of them."""
    pairs = []
    for row in rows:
        chosen = row["solutions"]
        if solutions != "all":
            chosen = random.Random(f"{seed} {row['id']}").sample(chosen, min(int(solutions), len(chosen)))
        if not chosen:
            raise ValueError(f"question {row['id']!r} has no solution to train on")
        pairs += [(row["question"], text) for text in chosen]
    return pairs


# ---- text

def prompt(encoding_name, question):
    return PROMPTS[encoding_name].format(question)


def until_next_question(encoding_name, text):
    """(text up to where the next question would begin, does one begin): a base model likes to go on."""
    before, begun, _ = text.partition(stop_string(encoding_name))
    return before, bool(begun)


def stop_string(encoding_name):
    return PROMPTS[encoding_name].split("{}")[0].rstrip()


def few_shot(encoding_name, shots):
    """The text before a prompt that shows it solved questions: rows of shots.jsonl, the first solution of each."""
    between = BETWEEN_SHOTS[encoding_name]
    return "".join(f"{prompt(encoding_name, shot['question'])} {shot['solutions'][0]}{between}" for shot in shots)


def answer_ids(enc, solution):
    """What a model is trained to write after a prompt: the solution after one space, and the end-of-text id."""
    return [*tokens.encode(enc, f" {solution}"), enc.eot_token]


# ---- batches

class Batch(NamedTuple):
    """What SFT and RL train on, and mix.py's text. mask, weight and logp belong to the targets ids[:, 1:]."""
    ids: torch.Tensor  # (B, T) int64, prompt and answer, filled up with padding on the right
    mask: torch.Tensor  # (B, T-1) bool, the answer tokens, its end token with them
    weight: torch.Tensor  # (B, T-1) f32, of each target in the loss, 0 outside the mask
    logp: torch.Tensor | None  # (B, T-1) f32, what the sampler gave each target, 0 outside the mask


def answer_seeds(seed, step, rows, n):
    """One 63-bit seed for each of n answers to each question: a function of (seed, step, question id, answer number),
    so that neither the batch nor the rank an answer is sampled in changes it."""
    keys = (f"{seed} {step} {row['id']} {answer}" for row in rows for answer in range(n))
    return [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1 for key in keys]


def shuffled(count, batch, seed, step):
    """The places of batch `step` in a list of `count`, shuffled anew each epoch: arithmetic of (seed, step). What is left
    of an epoch after its last whole batch is not used, so no batch has a row twice."""
    if batch > count:
        raise ValueError(f"a batch of {batch} needs at least as many questions or solutions to train on, there are {count}: "
                         "raise --limit, or lower --batch or --questions_per_step")
    epoch, index = divmod(step, count // batch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[index * batch:(index + 1) * batch].tolist()


@torch.profiler.record_function("data")
def text_batch(stream, batch, step, world):
    """This rank's rows of `batch` windows of a tokens.Stream: every token of them, whichever rank has it, weighs 1/n."""
    ids = torch.from_numpy(stream.rows(step, batch, world.rank, world.size))
    mask = torch.ones(len(ids), stream.length, dtype=torch.bool)
    return Batch(ids, mask, mask / (batch * stream.length), None)


def micro_batches(batch, micro, world, idle=False):
    """A batch in parts of `micro` rows, alike lengths together and each part only as wide as its longest row. Rows whose
    weights are all 0 (the answers of a flat group) have no gradient and are left out, unless `idle` ones are wanted. A sharded
    model needs all ranks for each pass: where some have fewer parts, theirs are filled up with rows that count for nothing."""
    width = batch.ids.shape[1] - 1
    last = torch.where(batch.mask, torch.arange(1, width + 1), 0).amax(1)  # targets up to the last that counts
    order = last.argsort(descending=True, stable=True)
    order = order if idle else order[batch.weight[order].any(1)]
    parts = order.split(micro) if len(order) else ()
    most = int(world.max(len(parts))[0]) if world.shard else 0  # agreed upon before any of them is passed through the model
    for rows in parts:
        targets = -(-int(last[rows].max()) // 8) * 8
        yield Batch(*(None if x is None else x[rows, :targets + extra].to(world.device)
                      for x, extra in zip(batch, (1, 0, 0, 0), strict=True)))
    for _ in range(len(parts), most):
        yield Batch(*(None if x is None else torch.zeros_like(x[:1, :8 + extra], device=world.device)
                      for x, extra in zip(batch, (1, 0, 0, 0), strict=True)))


def make_batch(prompts_ids, answers_ids, weights, pad, logps=None):
    """Lists of ids to a Batch. `weights`: for each answer one number, or one for each of its tokens.

    T is a multiple of 8, so that few shapes occur. The mask comes from the lengths: the ids may hold any value.
    """
    lengths = [len(start) + len(answer) for start, answer in zip(prompts_ids, answers_ids, strict=True)]
    rows, width = len(lengths), -(-max(lengths) // 8) * 8
    ids = torch.full((rows, width), pad)
    mask = torch.zeros(rows, width - 1, dtype=torch.bool)
    weight = torch.zeros(rows, width - 1)
    logp = None if logps is None else torch.zeros(rows, width - 1)
    for row, (start, answer) in enumerate(zip(prompts_ids, answers_ids, strict=True)):
        assert start, "the first answer token needs something before it"
        ids[row, :lengths[row]] = torch.tensor([*start, *answer])
        targets = slice(len(start) - 1, lengths[row] - 1)  # target t is token t + 1
        mask[row, targets] = True
        weight[row, targets] = torch.as_tensor(weights[row], dtype=torch.float32)
        if logp is not None:
            logp[row, targets] = torch.as_tensor(logps[row], dtype=torch.float32)
    return Batch(ids, mask, weight, logp)


class Form(NamedTuple):
    prompt: str = "Question: {}\nAnswer:"
    between_shots: str = "\n\n"


def form(folder):
    return Form(" Q : {} A :", "")


def prompt(form, question):
    return PROMPTS[form].format(question) if isinstance(form, str) else form.prompt.format(question)


def until_next_question(form, text):
    before, begun, _ = text.partition(stop_string(form))
    return before, bool(begun)


def stop_string(form):
    return form.prompt.split("{}")[0].rstrip()


def few_shot(form, shots):
    return "".join(f"{prompt(form, shot['question'])} {shot['solutions'][0]}{form.between_shots}" for shot in shots)
