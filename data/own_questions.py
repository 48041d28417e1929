"""Questions of one's own, by the names of their fields, in the form that the stages read."""

import collections
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from common import Fraction, Whole
from data import files, grader, problems
from data.overlap import draw, words
from data.questions import apart, finish, sources_of, unbox, write_parts

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Own:
    # a .jsonl (.gz, .zst) or .parquet file, a folder of them, or the name of a set of the hub
    source: str
    # the field that has the question; a name with dots, extra.question, looks inside
    question: str = "question"
    # the field that has the answer: a number or LaTeX, itself or after the last #### or in \boxed{}
    answer: str = "answer"
    solution: str = ""  # the field that has a worked solution, or several (default: there is none)
    split: str = "train"  # the part of a set of the hub
    subset: str = ""  # the configuration of a set of the hub, where it has several
    # how a question is asked, with {} for it (default: "Question: {}\nAnswer:"); \n is a new line
    prompt: str = ""
    # folders of questions whose test questions are left out: equal ones, and 13 words in a row
    check: tuple[str, ...] = ()
    # share of the questions for validation, and as much for test, so less than a half
    held_out: Fraction = 0.1
    shots: Whole = 8  # solved questions to show before others, not trained on; at most a tenth
    out: str = "data/out/questions"  # the folder to make
    keep_overlap: bool = False  # keep those with 13 words in a row of a test question
    seed: Whole = 0  # of the choice of questions
    overwrite: bool = False  # replace the folder if it exists


# ---------------------------------------------------------------------------------- the rows


def paths_of(source) -> list[Path]:
    """The files of a source; none if it is the name of a set of the hub."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS))
        if not found:
            raise ValueError(f"there is no {', '.join(ENDINGS)} in {source}")
        if tests := [file for file in found if file.name.startswith("test")]:
            raise ValueError(f"{tests[0]} looks like test questions: give the file to train on")
        return found
    if path.is_file() and not path.name.endswith(ENDINGS):
        raise ValueError(f"{source}: --source takes {', '.join(ENDINGS)}, or a name of the hub")
    if not path.exists() and (source.count("/") != 1 or path.suffix[1:].isalpha()):
        raise ValueError(f"there is no file {source}; a name of the hub is OWNER/NAME")
    return [path] if path.is_file() else []


def rows_of(cfg: Own, paths):
    """(where, row) of the files, or of the hub."""
    for path in paths:
        if path.name.endswith(".parquet"):
            from pyarrow import parquet  # comes with `datasets`

            for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
                yield f"{path}, row {number}", row
        else:
            yield from files.numbered_jsonl(path, {})
    if not paths:
        from datasets import load_dataset  # slow to import

        rows = load_dataset(cfg.source, cfg.subset or None, split=cfg.split)
        for number, row in enumerate(rows, 1):
            yield f"row {number} of {cfg.source}, {cfg.split}", row


def field(row: dict, name: str, flag: str, where: str):
    """The value of a field. Raises ValueError with the names that there are."""
    value = row
    for part in name.split("."):
        if type(value) is not dict or part not in value:
            there = ", ".join(value) if type(value) is dict else "no fields"
            raise ValueError(f"{where}: no {part!r}, it has {there}: --{flag} NAME")
        value = value[part]
    return value


def question_of(row: dict, cfg: Own, where: str) -> dict:
    """{"question", "answer", "solutions"} of a row, what is null as ""."""
    found = {"question": field(row, cfg.question, "question", where)}
    found["answer"] = field(row, cfg.answer, "answer", where)
    solutions = field(row, cfg.solution, "solution", where) if cfg.solution else []
    found["solutions"] = solutions if type(solutions) is list else [solutions or ""]
    found = {name: "" if value is None else value for name, value in found.items()}
    files.check_row(found, {"question": str, "answer": str, "solutions": list}, where)
    answer = grader.final_answer(found["answer"]) or unbox(found["answer"])[1] or found["answer"]
    return found | {"question": found["question"].strip(), "answer": " ".join(answer.split())}


def solution_of(text: str, answer: str) -> str | None:
    r"""A solution that ends in `#### answer`; None if it is empty, or ends in another answer: after
    its last ####, or else in its last \boxed{}."""
    said = grader.final_answer(text)
    box = unbox(text)[1] if said is None else said
    if box is not None:
        marks, _ = grader.judge(box, answer)
        if marks and not marks[0]:  # no marks: only algebra could tell
            return None
    if said is not None:
        text = text.rpartition(grader.ENDING)[0]
    return finish(unbox(text)[0], answer) if text.strip() else None


def asked_as(text: str) -> str:
    """A question without case, spacing and the marks of a sentence; 2 + 2 is not 2 * 2.

    Stricter than overlap.words: to leave out a question too many does less harm than to give one
    the solutions of another.
    """
    return " ".join(re.findall(r"[^\W_]+|[^\w\s.,;:?!\"'`]", text.lower()))


def gather(cfg: Own, rows) -> tuple[list[dict], collections.Counter]:
    """Rows to one row per question, and counts of what was left out.

    Questions that are equal but for case, spacing and the marks of a sentence are one, with the
    solutions of all. With --solution, one that has none in the end is left out.
    """
    found = {}
    left_out = collections.Counter()
    for where, row in rows:
        asked = question_of(row, cfg, where)
        answer = asked["answer"]
        if not words(asked["question"]) or not grader.askable(answer):
            left_out["without a question, or an answer that can be graded"] += 1
            continue
        digest = hashlib.sha256(asked["question"].encode()).hexdigest()[:12]
        fresh = {"id": f"own-{digest}", **asked, "solutions": []}
        kept = found.setdefault(asked_as(asked["question"]), fresh)
        if kept["answer"] != answer:
            left_out["with another answer than the same question before"] += 1
            continue
        left_out["of a question that was there before"] += kept is not fresh
        for text in asked["solutions"]:
            solution = solution_of(text, answer)
            if solution is None:
                left_out["solutions that are empty or end in another answer"] += 1
            elif solution not in kept["solutions"]:
                kept["solutions"].append(solution)
    kept = [row for row in found.values() if row["solutions"] or not cfg.solution]
    left_out["questions without a solution"] += len(found) - len(kept)
    return kept, +left_out


# ------------------------------------------------------------------------------- the command


def splits_of(cfg: Own, rows: list[dict]) -> tuple[dict, dict]:
    """{"train", "val", "test"}, "shots" if there are any, and counts of what was left out.

    No question of --check is in any of them but test.
    """
    if len(rows) < 10:
        raise ValueError(f"{cfg.source} has {len(rows)} questions that can be used: 10 are needed")
    held = max(1, round(cfg.held_out * len(rows)))
    order = sorted(rows, key=lambda row: draw(f"{cfg.seed} test", words(row["question"])))
    test, rest = order[:held], order[held:]
    others = [row for folder in cfg.check for row in problems.load(folder, "test")]
    shown = min(cfg.shots, len(rows) // 10) if cfg.solution else 0
    splits, overlap = apart(rest, [*test, *others], [], shown, held, cfg.seed, cfg.keep_overlap)
    if not splits["shots"]:
        splits.pop("shots")
    return {"test": test} | splits, overlap


def make_own(cfg: Own):
    """Your own questions, by the names of their fields, from a file or from the hub."""
    if not 0 < cfg.held_out < 0.5:
        raise ValueError("--held_out takes a share between 0 and 0.5")
    paths = paths_of(cfg.source)
    facts = {"source_contents": sources_of(*paths)}
    if files.finished(cfg, "questions", **facts):
        return
    form = problems.Form()
    if cfg.prompt:
        form = form._replace(prompt=cfg.prompt.replace("\\n", "\n"))
    with files.new_folder(cfg, "questions", **facts) as folder:
        problems.write_form(folder, form)
        problems.form(folder)  # one that cannot be used stops here
        rows, left_out = gather(cfg, rows_of(cfg, paths))
        for reason, count in left_out.items():
            print(f"{count:,} {reason}: left out")
        parts, overlap = splits_of(cfg, rows)
        write_parts(folder, parts, form, dict(left_out) | overlap)
