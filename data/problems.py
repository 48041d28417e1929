"""Questions, prompts, and the batches that SFT and RL train on.

A questions file has one JSON object a line: {"id", "question", "answer", "solutions": [...]}, all
of it text. The answer is a number or LaTeX in one line. Each solution ends in `#### answer`, which
data/grader.py reads; only SFT and shots need solutions. A prompt.json beside the file says how a
question is put before a model; without one it is "Question: {}" and "Answer:" on the next line.
"""

import hashlib
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import files, grader, tokens

FIELDS = {"id": str, "question": str, "answer": str, "solutions": list}

# --------------------------------------------------------------------------------- questions


def split_path(path, split):
    """A folder's {split}.jsonl, or the .jsonl file itself whatever the split.

    Shots always lie in shots.jsonl: or a question's own solution would be shown before it.
    """
    path = Path(path) if str(path).endswith(".jsonl") else Path(path) / f"{split}.jsonl"
    return path.with_name("shots.jsonl") if split == "shots" else path


def load(path, split):
    """The questions of a folder's {split}.jsonl, or of one .jsonl file.

    Raises ValueError with the file and line at fault, and for a file that prepare.py listed in
    world.json and that has changed since.
    """
    path = split_path(path, split)
    files.check_listed(path)
    if not path.is_file():
        here = "" if path.is_absolute() else f" (looked for from {Path.cwd()})"
        raise ValueError(f"there are no questions at {path}{here}: --questions FOLDER names others")
    rows = []
    lines = {}
    for number, (where, row) in enumerate(files.numbered_jsonl(path, {}), 1):
        row.setdefault("solutions", [])  # RL and evaluation read none
        check(row, where)
        if lines.setdefault(row["id"], number) != number:
            raise ValueError(f"{where}: id {row['id']!r} is also on line {lines[row['id']]}")
        rows.append(row)
    return rows


def check(row, where: str):
    """Raises ValueError, which begins with `where`, if a row is no question that can be asked."""
    files.check_row(row, FIELDS, where)
    answer = row["answer"].strip()
    if not row["question"].strip():
        raise ValueError(f"{where}: the question is empty")
    if not grader.askable(answer):
        raise ValueError(
            f"{where}: the answer must be a number, or one line of LaTeX, not {answer[:60]!r}"
        )
    value = grader.number(answer)
    for text in row["solutions"]:  # by their text: algebra would take minutes
        final = grader.final_answer(text)
        same = final == answer or value is not None and grader.number(final) == value
        if text.count(grader.ENDING) != 1 or not same:
            raise ValueError(
                f"{where}: a solution must end in '{grader.ENDING} {answer[:60]}', not "
                f"{text[-60:]!r}"
            )


def shots(folder, count, questions, seed=None, exactly=True):
    """`count` solved questions of a folder to show before others.

    None of them is one of these `questions`. The first ones, or drawn by `seed`. Raises ValueError
    if there are fewer; not `exactly`: as many as there are (MATH has four).
    """
    asked = {row["question"] for row in questions}
    path = split_path(folder, "shots")
    known = []
    if count and not exactly:
        files.check_listed(path)
    if count and (exactly or path.exists()):
        known = [row for row in load(folder, "shots") if row["question"] not in asked]
    if bare := next((row["id"] for row in known if not row["solutions"]), None):
        raise ValueError(f"{folder}: shot {bare!r} has no solution to show")
    if exactly and len(known) < count:
        raise ValueError(f"{folder} has {len(known)} shots, not {count}: lower --shots")
    count = min(count, len(known))
    return known[:count] if seed is None else random.Random(f"{seed} shots").sample(known, count)


def chosen_solutions(row, solutions, seed) -> list[str]:
    """The solutions of a question to train on: as many as `solutions` ("3") says, chosen by (seed,
    id), or "all"."""
    texts = row["solutions"]
    if solutions == "all":
        return texts
    return random.Random(f"{seed} {row['id']}").sample(texts, min(int(solutions), len(texts)))


def solution_pairs(rows, solutions, seed):
    """[(question, solution)] to train on, see `chosen_solutions`."""
    pairs = []
    for row in rows:
        chosen = chosen_solutions(row, solutions, seed)
        if not chosen:
            raise ValueError(f"question {row['id']!r} has no solution to train on")
        pairs += [(row["question"], text) for text in chosen]
    return pairs


# ------------------------------------------------------------------------------------- text


class Form(NamedTuple):
    """How a question is put before a model."""

    prompt: str = "Question: {}\nAnswer:"  # {}: the question; an answer begins with a space
    between_shots: str = "\n\n"  # after each solved question that is shown before


def form(folder) -> Form:
    """The Form of a folder of questions, or of a .jsonl file: what prompt.json beside it says.

    Raises ValueError for a prompt.json that is no Form, and for a folder that is not there.
    """
    path = split_path(folder, "train").with_name("prompt.json")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} of questions: prepare it, or give --questions")
    files.check_listed(path)
    if not path.is_file():
        return Form()
    content = files.read_json(path, 'write {"prompt": "Question: {}\\nAnswer:"} for instance')
    if unknown := content.keys() - {*Form._fields}:
        raise ValueError(f"{path}: it has {', '.join(Form._fields)}, and no {unknown.pop()!r}")
    found = Form(**content)
    if not all(type(text) is str for text in found):
        raise ValueError(f"{path}: prompt and between_shots must be texts")
    if found.prompt.count("{}") != 1 or not stop_string(found):
        raise ValueError(
            f"{path}: the prompt must have one {{}} for the question, and something before it by "
            "which the next question is known"
        )
    return found


def write_form(folder, form: Form):
    """The prompt.json of a folder of questions."""
    files.write_json(Path(folder) / "prompt.json", form._asdict())


def check_form(form: Form, path, enc):
    """Raises ValueError if the encoding lacks a word of the prompt itself: `path` needs another."""
    start, end = form.prompt.split("{}")
    for part in (start.rstrip(), end):
        try:
            tokens.encode(enc, part)
        except ValueError as error:
            raise ValueError(
                f"{path}: the prompt {form.prompt!r} cannot be asked: {error}; write a prompt.json "
                'beside the questions, {"prompt": " Q : {} A :"} for instance'
            ) from None


def prompt(form: Form, question):
    return form.prompt.replace("{}", question)


def until_next_question(form: Form, text):
    """(text up to where the next question would begin, does one begin).

    A base model likes to go on after its answer.
    """
    before, begun, _ = text.partition(stop_string(form))
    return before, bool(begun)


def stop_string(form: Form):
    return form.prompt.split("{}")[0].rstrip()


def stop_tokens(form: Form, enc) -> list[int]:
    """The ids that end an answer in evaluation: the end of text, and what the next question begins
    with, if that is one word, "Question:" for instance. Of other prompts, "The problem: {}" or
    "[INST] {}", it is what answers have, too: `until_next_question` cuts these later."""
    stop = stop_string(form)
    first = tokens.encode(enc, stop)[0]
    word = stop.strip(" :")
    alone = word.isalpha() and len(word) > 2 and tokens.decode(enc, [first]).strip() == word
    return [enc.eot_token, first] if alone or enc.name == "toy" else [enc.eot_token]


def refuse_test(path):
    """Raises ValueError for the file of a test split."""
    if Path(path).name == "test.jsonl":
        raise ValueError(f"{path} looks like a test split: only eval.py --final opens one")


def few_shot(form: Form, shots):
    """The text before a prompt that shows it solved questions.

    shots: rows of shots.jsonl; the first solution of each is shown.
    """
    texts = [f"{prompt(form, shot['question'])} {shot['solutions'][0]}" for shot in shots]
    return "".join(text + form.between_shots for text in texts)


def answer_ids(enc, solution):
    """What a model is trained to write after a prompt: the solution, the end-of-text id."""
    return [*tokens.encode(enc, f" {solution}"), enc.eot_token]


# --------------------------------------------------------------------- what fits the context


class Room(NamedTuple):
    """What a question and its answer must fit into, for `check_lengths`."""

    context: int  # tokens a row of the model may have
    max_new: int = 0  # tokens of an answer that is sampled
    before: int = 0  # tokens of the shots that come before each prompt
    solutions: str | None = None  # "1", "all", ...: those that are trained on; None: none is
    seed: int = 0  # by which these are chosen


def check_lengths(rows, path, enc, form: Form, room: Room, skip=False) -> tuple[list[dict], str]:
    """The rows that fit the context and have no word that the encoding lacks; what was left out.

    To be called before the first step, so that no step of a long run meets another one. Without
    `skip` the first that does not fit is a ValueError, with `path`, id, length and limit. With it
    a question whose prompt does not fit is left out, of the others the solutions that do not, and
    the second value is a line that says so, for the console ("" if all fit). A prompt that the
    encoding lacks the words of is a ValueError in any case.
    """
    check_form(form, path, enc)
    fitting = []
    faults = []
    for row in rows:
        fault, solutions = misfit(row, enc, form, room)
        if fault is None:
            fitting.append(row)
            continue
        faults.append(fault)
        if solutions:
            fitting.append(row | {"solutions": solutions})
    if not faults:
        return fitting, ""
    more = f" ({len(faults) - 1} more such questions)" if len(faults) > 1 else ""
    if not skip:
        lower = "lower --max_new, or " if room.max_new else ""
        raise ValueError(f"{path}: {faults[0]}{more}; {lower}leave them out with --skip_long")
    if not fitting:
        raise ValueError(f"{path}: nothing is left that fits: {faults[0]}{more}")
    gone = len(rows) - len(fitting)
    return fitting, (
        f"{path}: left out what does not fit: {gone} of {len(rows)} questions, and some solutions "
        f"of {len(faults) - gone} others; the first: {faults[0]}"
    )


def misfit(row, enc, form: Form, room: Room) -> tuple[str | None, list[str]]:
    """What does not fit about a question, None if all does; and its solutions that do fit."""
    name = f"question {row['id']!r}"
    asked = prompt(form, row["question"])
    chosen = []
    if room.solutions is not None:
        chosen = chosen_solutions(row, room.solutions, room.seed)
    longest = max((len(text.encode()) for text in chosen), default=0)
    most = len(asked.encode()) + max(longest + 2, room.max_new) + room.before
    # no token is shorter than a byte: most texts need not be encoded where all ids are known
    if most <= room.context and enc.max_token_value < tokens.vocab_size(enc):
        return None, row["solutions"]
    try:
        length = len(tokens.encode(enc, asked))
    except ValueError as error:
        return f"{name}: {error}", []
    taken = room.before + length + room.max_new
    if taken > room.context:
        return (
            f"{name} needs {taken} tokens, its prompt {length} and the longest answer "
            f"{room.max_new}, and the model's context is {room.context}"
        ), []
    faults = [solution_misfit(text, length, enc, room) for text in chosen]
    if not any(faults):
        return None, row["solutions"]
    kept = [text for text in row["solutions"] if not solution_misfit(text, length, enc, room)]
    return f"{name}: {next(filter(None, faults))}", kept


def solution_misfit(text, prompt_length, enc, room: Room) -> str | None:
    limit = room.context + 1  # the last token of a row is only a target
    try:
        length = prompt_length + len(answer_ids(enc, text))
    except ValueError as error:
        return str(error)
    if length > limit:
        return (
            f"with a solution of it {length} tokens are needed, and the model's context of "
            f"{room.context} has room for {limit}"
        )
    return None


# ---------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """What SFT and RL train on, and mix.py's text; all (B, T), filled up on the right.

    A row is a prompt and the answers to it, as model.Layout draws them, or a window of text.
    """

    ids: torch.Tensor  # int64, what the model reads
    target: torch.Tensor  # int64, what comes next
    mask: torch.Tensor  # bool, whether the target is a token of an answer (or of the text)
    weight: torch.Tensor  # f32, of each target in the loss, 0 outside the mask
    logp: torch.Tensor  # f32, what the sampler gave each target, 0 outside the mask
    layout: tuple | None = None  # position, document, branch of model.Layout, if a row has several

    def each(self, function) -> "Batch":
        """The batch of what `function` makes of each tensor."""
        layout = self.layout and tuple(map(function, self.layout))
        return Batch(*map(function, self[:-1]), layout)

    def part(self, rows, targets: int) -> "Batch":
        """These rows, with their first `targets` columns."""
        return self.each(lambda x: x[rows, :targets])

    def to(self, device) -> "Batch":
        return self.each(lambda x: x.to(device))


def answer_seeds(seed, turn, rows, n):
    """One 63-bit seed for each of n answers to each question.

    A function of (seed, turn, question id, answer number), so that neither the batch nor the rank
    an answer is sampled in changes it. turn: what tells draws apart, the step or "eval".
    """
    keys = [f"{seed} {turn} {row['id']} {answer}" for row in rows for answer in range(n)]
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]


def shuffled(count, batch, seed, step, again=0):
    """The places of batch `step` in a list of `count`, shuffled anew each epoch.

    Arithmetic of (seed, step) and, for a batch in place of that one, the number `again`. What is
    left of an epoch after its last whole batch is not used, so no batch has a row twice.
    """
    epoch, index = divmod(step, count // batch)
    key = [seed, epoch, again] if again else [seed, epoch]
    order = np.random.default_rng(key).permutation(count)
    return order[index * batch : (index + 1) * batch].tolist()


@torch.profiler.record_function("data")
def text_batch(stream, batch, step, world):
    """This rank's rows of `batch` windows of a tokens.Stream.

    Every token of them, whichever rank has it, weighs 1/n.
    """
    rows = torch.from_numpy(stream.rows(step, batch, world.share(batch, "--batch")))
    ids = rows[:, :-1]
    mask = torch.ones(ids.shape, dtype=torch.bool)
    return Batch(ids, rows[:, 1:], mask, mask / (batch * stream.length), torch.zeros(ids.shape))


def tree_rows(prompts, answers, per_row: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """The rows of `make_batch`: (prompt, numbers of the answers that follow it) of each.

    Answers to one prompt share a row, `per_row` of them at most, like lengths together.
    """
    together = {}
    for number, prompt in enumerate(prompts):
        assert prompt, "the first answer token needs something before it"
        together.setdefault(tuple(prompt), []).append(number)
    rows = []
    for prompt, numbers in together.items():
        numbers.sort(key=lambda number: -len(answers[number]))
        rows += [(prompt, numbers[i : i + per_row]) for i in range(0, len(numbers), per_row)]
    return rows


def make_batch(prompts, answers, weights, pad, logps=None, per_row=1) -> Batch:
    """Lists of ids to a Batch, whose rows are those of `tree_rows`.

    The prompt's last token is repeated before each answer, whose first token it predicts (see the
    drawing in model.Layout).
    weights: for each answer one number, or one per token of it. logps: for each answer (length,).
    T is a multiple of 8, so that few shapes occur. The mask comes from lengths: ids may hold any
    value.
    """
    rows = tree_rows(prompts, answers, per_row)
    lengths = [len(prompt) - 1 + sum(len(answers[i]) for i in some) for prompt, some in rows]
    shape = (len(rows), -(-max(lengths) // 8) * 8)
    integers = dict(dtype=torch.long)
    ids = torch.full(shape, pad)
    target = torch.full(shape, pad)
    mask = torch.zeros(shape, dtype=torch.bool)
    weight = torch.zeros(shape)
    logp = torch.zeros(shape)
    position = torch.zeros(shape, **integers)
    branch = torch.zeros(shape, **integers)
    for row, (prompt, numbers) in enumerate(rows):
        trunk = len(prompt) - 1
        ids[row, :trunk] = torch.tensor(prompt[:-1], **integers)
        position[row, :trunk] = torch.arange(trunk)
        begin = trunk
        for which, number in enumerate(numbers, 1):
            answer = answers[number]
            place = slice(begin, begin + len(answer))
            ids[row, place] = torch.tensor([prompt[-1], *answer[:-1]])
            target[row, place] = torch.tensor(answer)
            mask[row, place] = True
            weight[row, place] = torch.as_tensor(weights[number], dtype=torch.float32)
            if logps is not None:
                logp[row, place] = torch.as_tensor(logps[number], dtype=torch.float32)
            position[row, place] = torch.arange(trunk, trunk + len(answer))
            branch[row, place] = which
            begin += len(answer)
    several = any(len(numbers) > 1 for _, numbers in rows)
    layout = (position, torch.zeros(shape, **integers), branch) if several else None
    return Batch(ids, target, mask, weight, logp, layout)


def micro_batches(batch: Batch, per_pass: int, world, keep_flat=False):
    """A batch in parts of about `per_pass` answers, rows of like length together.

    Each part is as wide as its longest row. Rows whose weights are all 0 (a flat group) have no
    gradient and are left out, but with `keep_flat`. A sharded model needs all ranks for
    each pass: where some have fewer parts, theirs are filled up with rows that count for nothing.
    """
    width = batch.ids.shape[1]
    last = torch.where(batch.mask, torch.arange(1, width + 1), 0).amax(1)  # columns that count
    order = last.argsort(descending=True, stable=True)
    order = order if keep_flat else order[batch.weight[order].any(1)]
    per_row = int(batch.layout[2].amax()) if batch.layout else 1
    size = max(1, per_pass // per_row)
    starts = range(0, len(order), size)
    # agreed upon before any of them is passed through the model
    most = int(world.max(len(starts))[0]) if world.shard else 0
    # once and not part by part: to send something to a GPU is to wait for what it is doing
    batch = batch.to(world.device)
    places = order.to(world.device)
    for i in starts:
        longest = int(last[order[i : i + size]].max())
        yield batch.part(places[i : i + size], -(-longest // 8) * 8)
    for _ in range(len(starts), most):
        nothing = batch.part(slice(1), 8)
        yield nothing._replace(mask=nothing.mask & False, weight=nothing.weight * 0)
