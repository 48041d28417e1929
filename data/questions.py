"""GSM8K, MATH and OpenMathInstruct-1 as rows {"id", "question", "answer", "solutions"}, each solution with the one ending
`#### answer`; and which of their training questions are in a test set."""

import collections
import hashlib
import heapq
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import grader, problems, tokens
from data.corpus import local_files
from data.folder import new_folder, note, write_rows
from data.overlap import GRAM, draw, grams, words

HUB = {
    "gsm8k": [("openai/gsm8k", "main")],
    "math": [("EleutherAI/hendrycks_math", subject) for subject in (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")],
    "math500": [("HuggingFaceH4/MATH-500", "default")],
}  # fmt: skip
OPENMATH = "nvidia/OpenMathInstruct-1"
OPENMATH_ROWS = 1_830_000  # of its correct solutions, about: for the time left
TEXT_ONLY = "<not_executed>"  # its error_message where no Python was run
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BRACE = re.compile(r"\\.|[{}]", re.S)  # an escaped brace is no brace


def table(name, source, split, fields):
    """The rows of {split}.jsonl(.gz) of the folder `source`, or of a set of the hub; of `fields` {name: type}, and more."""
    if source:
        path = next((p for p in Path(source).glob(f"{split}.jsonl*") if p.name.endswith((".jsonl", ".gz"))), None)
        if path is None:
            raise ValueError(f"no {split}.jsonl or {split}.jsonl.gz in {source}")
        yield from problems.read_jsonl(path, fields)
        return
    from datasets import load_dataset  # slow to import

    for repository, config in HUB[name]:
        yield from load_dataset(repository, config, split="test" if split == "math500" else split)


def gsm8k(source, split):
    """GSM8K's rows as questions with one solution, without its <<48/2=24>> calculator notes."""
    for index, row in enumerate(table("gsm8k", source, split, {"question": str, "answer": str})):
        solution = re.sub("<<[^<>]*>>", "", row["answer"]).strip()
        answer = grader.final_answer(solution)
        if grader.number(answer) is None:
            raise ValueError(f"row {index + 1} of {split} does not end in '#### number': {solution[-60:]!r}")
        yield {"id": f"gsm8k-{split}-{index}", "question": row["question"].strip(),
               "answer": answer, "solutions": [solution]}


def math(source, split):
    """MATH's rows (or math500's) as questions with one solution and their level, "1" to "5" ("?" in two rows). A row
    whose box is empty, which has no answer, is left out: there are two, both of train."""
    rows = table("math500" if split == "math500" else "math", source, split, {"problem": str, "solution": str})
    for index, row in enumerate(rows):
        solution, answer = unbox(row["solution"])
        if answer:
            yield {"id": f"math-{split}-{index}", "question": row["problem"].strip(), "answer": answer,
                   "solutions": [finish(solution, answer)], "level": str(row.get("level", "?")).removeprefix("Level ")}


def unbox(text):
    r"""A text with x in place of each \boxed{x}, and the x of the last one in one line; None where there is none."""
    kept, last, at = [], None, 0
    while box := BOX.search(text, at):
        depth, inner, after = 0, text[box.end():box.end() + 1], box.end() + 1  # \boxed 5
        for brace in BRACE.finditer(text, box.end()) if inner == "{" else ():
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                inner, after = text[box.end() + 1:brace.start()], brace.end()
                break
        inner = unbox(inner)[0]
        kept += [text[at:box.start()], inner]
        last, at = " ".join(inner.split()), after
    return "".join(kept) + text[at:], last


def finish(solution, answer):
    return f"{solution.replace(grader.ENDING, '').strip()}\n{grader.ENDING} {answer}"


def shots(path):
    """A .json list of solved questions as rows: {"question", "target"} that ends "The answer is N." (Wei et al.), or
    {"problem", "solution"} that ends "The final answer is $N$. I hope it is correct." (Minerva)."""
    rows = []
    try:
        for index, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
            minerva = "problem" in row
            question, target = (row["problem"], row["solution"]) if minerva else (row["question"], row["target"])
            reasons, mark, answer = target.rpartition("Final Answer: The final answer is " if minerva else "The answer is ")
            if not mark:
                raise ValueError
            answer = answer.removesuffix("I hope it is correct.").strip().removesuffix(".").strip("$")
            rows.append({"id": f"shot-{index}", "question": question.strip(), "answer": answer,
                         "solutions": [finish(unbox(reasons)[0], answer)]})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}: must be a JSON list of {{"question": text, "target": text}} or of '
                         f'{{"problem": text, "solution": text}}') from None
    return rows


# ---- OpenMathInstruct-1


def openmath_rows(source, bar):
    """The rows of every .jsonl of a folder, or those of the hub's correct solutions, streamed; the bar counts them."""
    fields = dict.fromkeys(("question", "generated_solution", "expected_answer", "error_message", "dataset"), str)
    if source:
        paths = [Path(file.name) for file in local_files(source) if not file.prose]
        if not paths:
            raise ValueError(f"no .jsonl file at {source}")
        bar.reset(sum(path.stat().st_size for path in paths))
        for path in paths:
            yield from problems.read_jsonl(path, fields, bar)
        return
    from datasets import load_dataset

    files = {"train": "correct_solutions/*.jsonl"}  # its own train and validation; 1.5 GB instead of 8.9 with the wrong ones
    bar.reset(OPENMATH_ROWS)
    for row in load_dataset(OPENMATH, data_files=files, split="train", streaming=True):
        yield row
        bar.update()


def gather(rows, dataset, code, most, seed):
    """OpenMathInstruct-1's rows to one row a question with at most `most` solutions, and counts of what was left out.

    Of the solutions of a question that are equal without case, punctuation and spacing the first stays. Those that are
    kept are the `most` smallest of a draw fixed by (seed, question, words of the solution), so no more than that is ever
    in memory: 15,000 questions x 23 solutions are about 300 MB, and 150 MB the draws of 1.8M solutions seen.
    """
    found, seen, left_out = {}, set(), collections.Counter()
    for row in rows:
        question, answer = row["question"].strip(), " ".join(row["expected_answer"].split())
        kept = found.setdefault(question, {"dataset": row["dataset"], "answer": answer, "heap": []})
        place = draw(seed, f"{question} {words(row['generated_solution'])}")
        if dataset not in ("all", row["dataset"]):
            left_out["of the other data set"] += 1
        elif row["is_correct"] is not True or answer != kept["answer"] or not grader.askable(answer):
            left_out["not correct"] += 1
        elif not code and row["error_message"] != TEXT_ONLY:
            left_out["with code"] += 1
        elif place in seen:
            left_out["near-duplicates"] += 1
        else:
            seen.add(place)
            heapq.heappush(kept["heap"], (-place, finish(unbox(row["generated_solution"])[0], answer)))
            if len(kept["heap"]) > most:
                heapq.heappop(kept["heap"])
                left_out[f"beyond {most} a question"] += 1
    rows = []
    for question, kept in found.items():
        if kept["heap"]:
            name = hashlib.sha256(question.encode()).hexdigest()[:12]
            rows.append({"id": f"openmath-{kept['dataset']}-{name}", "question": question, "answer": kept["answer"],
                         "solutions": [solution for _, solution in sorted(kept["heap"], reverse=True)]})
    return rows, dict(left_out)


# ---- apart from the test set


def apart(train, tests, shown, shot_count, val, seed, keep_overlap):
    """Training questions to {"train", "val", "shots"} with no question of `tests` in them, and counts of what was left out.

    Equal means without case, punctuation and spacing. A question with 13 words in a row of a test question is left out
    too, unless it is to be kept. Shots are the rows `shown`, or some training questions; neither is trained on."""
    equal = {words(row["question"]) for row in tests}
    runs = {gram for row in tests for gram in grams(row["question"])}
    left_out, rows = {"equal": 0, "overlap": 0}, []
    for row in train:
        if words(row["question"]) in equal:
            left_out["equal"] += 1
        elif not runs.isdisjoint(grams(row["question"])):
            left_out["overlap"] += 1
            rows += [row] if keep_overlap else []
        else:
            rows.append(row)
    print(f"{left_out['equal']} training questions are also in test (without case and punctuation): left out")
    print(f"{left_out['overlap']} more share {GRAM} words in a row with a test question: {'kept' if keep_overlap else 'left out'}")
    shown = shown or sorted(rows, key=lambda row: draw("shots", row["id"]))[:shot_count]
    shown = [{**row, "solutions": row["solutions"][:1]} for row in shown]
    names = {words(row["question"]) for row in shown}
    # drawn from the distinct questions, so that copies of one stay on one side
    rest = sorted({words(row["question"]) for row in rows} - names, key=lambda question: draw(seed, question))
    held_out = set(rest[:val])
    return {"train": [row for row in rows if words(row["question"]) not in held_out | names],
            "val": [row for row in rows if words(row["question"]) in held_out], "shots": shown}, left_out


def check_apart(splits):
    """ValueError if a question is in two of the splits {name: rows}."""
    where = {}
    for split, rows in splits.items():
        for row in rows:
            other = where.setdefault(words(row["question"]), split)
            if other != split:
                raise ValueError(f"question {row['id']!r} of {split} is also in {other}: {row['question'][:60]!r}")


# ---- the commands of prepare.py


@dataclass(frozen=True)
class Gsm8k:
    source: str = ""  # a folder with train.jsonl and test.jsonl, .gz or not; empty: openai/gsm8k from the hub
    shots: str = ""  # .json list of {"question", "target"} ending "The answer is N."; empty: 8 training questions
    out: str = "data/out/gsm8k"  # the folder to make
    val: int = 500  # training questions held out for validation
    keep_overlap: bool = False  # keep training questions with 13 words in a row of a test question (4 of 7,473)
    seed: int = 0  # of the choice of validation questions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Math:
    source: str = ""  # a folder with train.jsonl and test.jsonl, .gz or not; empty: EleutherAI/hendrycks_math from the hub
    shots: str = ""  # .json list of {"problem", "solution"} in Minerva's form; empty: 4 training questions
    test: str = "test"  # or math500: the 500 of its test questions that many report (HuggingFaceH4/MATH-500)
    out: str = "data/out/math"  # the folder to make
    val: int = 500  # training questions held out for validation
    keep_overlap: bool = False  # keep training questions with 13 words in a row of a test question (a tenth of them)
    seed: int = 0  # of the choice of validation questions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class OpenMath:
    source: str = ""  # a folder of .jsonl files with its columns; empty: nvidia/OpenMathInstruct-1 from the hub
    tests: str = ""  # a folder with gsm8k/test.jsonl and math/test.jsonl, .gz or not; empty: from the hub
    dataset: str = "all"  # gsm8k, math or all of it; the test questions are GSM8K's for gsm8k, else MATH's (paper)
    test: str = "test"  # or math500, instead of all MATH test questions
    solutions_per_question: int = 23  # at most (paper: about 23 on average; the source has about 120)
    code: bool = False  # also solutions that ran Python
    shots: str = ""  # .json list of solved questions, as for gsm8k or math; empty: training questions
    out: str = "data/out/openmath"  # the folder to make
    val: int = 500  # questions held out for validation (paper: a held-out split, its size is not given)
    keep_overlap: bool = False  # keep training questions with 13 words in a row of a test question
    seed: int = 0  # of the choice of validation questions and of solutions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Split:
    samples: str  # rows of eval.py CHECKPOINT --questions FOLDER/train.jsonl --limit 0 --n 64 --temperature 1
    questions: str  # the FOLDER
    levels: tuple[int, ...] = (16, 8)  # easy: so many of the answers right, or more; hard: so many or fewer (paper, of 64)
    most: int = 10_000  # questions of each (paper: 10k; OpenMathInstruct-1 has fewer)
    held_out: float = 0.1  # share of each for validation, and as much for test
    out: str = "data/out/split"  # the folder to make, with split-easy/ and split-hard/ in it
    seed: int = 0  # of the choice of questions
    overwrite: bool = False  # replace the folder if it exists


def write_questions(folder, name, rows, enc):
    """Write {name}.jsonl, read it back through the checks of problems.load, and print the numbers to expect."""
    rows = problems.load(write_rows(folder, name, rows), name)
    prompts = [len(tokens.encode(enc, problems.prompt(enc.name, row["question"]))) for row in rows]
    answers = [len(problems.answer_ids(enc, solution)) for row in rows for solution in row["solutions"]]
    print(f"{name:<11} {len(rows):>6,} questions, {len(answers) / len(rows):4.1f} solutions each; "
          f"tokens (longest): prompt {sum(prompts) / len(prompts):5.1f} ({max(prompts)}), "
          f"solution {sum(answers) / len(answers):5.1f} ({max(answers)})")


def write_splits(folder, cfg, train, test, others, shot_count, **left_out):
    """Train, val, test and shots; no question of test or of the `others` is trained on."""
    shown = shots(cfg.shots) if cfg.shots else []
    splits, overlap = apart(train, [*test, *others], shown, shot_count, cfg.val, cfg.seed, cfg.keep_overlap)
    splits = {"train": splits["train"], "val": splits["val"], "test": test, "shots": splits["shots"]}
    check_apart(splits)
    for split, rows in splits.items():
        write_questions(folder, split, rows, tokens.encoding("cl100k_base"))
    note(folder, questions={split: len(rows) for split, rows in splits.items()}, left_out=left_out | overlap)


def make_gsm8k(cfg):
    """The GSM8K questions, each with its one solution."""
    with new_folder(cfg, "gsm8k") as folder:
        train, test = (list(gsm8k(cfg.source, split)) for split in ("train", "test"))
        write_splits(folder, cfg, train, test, [], 8)


def math_tests(source, name):
    """MATH's test questions that are asked, and all of them."""
    if name not in ("test", "math500"):
        raise ValueError(f"--test takes test or math500, not {name!r}")
    whole = list(math(source, "test"))
    return (whole if name == "test" else list(math(source, name))), whole


def make_math(cfg):
    """The MATH questions, each with its one solution and its level."""
    with new_folder(cfg, "math") as folder:
        test, whole = math_tests(cfg.source, cfg.test)
        write_splits(folder, cfg, list(math(cfg.source, "train")), test, whole, 4)


def make_openmath(cfg):
    """OpenMathInstruct-1: the training questions of GSM8K and MATH, each with many solutions."""
    if cfg.dataset not in ("all", "gsm8k", "math") or cfg.solutions_per_question < 1:
        raise ValueError("--dataset takes all, gsm8k or math, and --solutions_per_question at least 1")
    with new_folder(cfg, "openmath" + f"-{cfg.dataset}" * (cfg.dataset != "all")) as folder:
        grade_school = list(gsm8k(cfg.tests and f"{cfg.tests}/gsm8k", "test"))
        test, whole = math_tests(cfg.tests and f"{cfg.tests}/math", cfg.test)
        test = grade_school if cfg.dataset == "gsm8k" else test
        with tqdm(unit_scale=True, desc="reading", mininterval=1) as bar:
            rows = openmath_rows(cfg.source, bar)
            train, left_out = gather(rows, cfg.dataset, cfg.code, cfg.solutions_per_question, cfg.seed)
        print(f"{sum(len(row['solutions']) for row in train):,} solutions of {len(train):,} questions; left out: " +
              ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
        write_splits(folder, cfg, train, test, [*grade_school, *whole], 8 if cfg.dataset == "gsm8k" else 4, **left_out)


def make_split(cfg):
    """Training questions that a model often solves, and those that it seldom solves, by the counts of its evaluation."""
    rows = {row["id"]: row for row in problems.load(cfg.questions, "train")}
    found = [row for row in problems.read_jsonl(cfg.samples, {"kind": str}) if sorted(row.get("ids", ())) == sorted(rows)]
    if not found:
        raise ValueError(f"{cfg.samples} has no row of all {len(rows)} questions of {cfg.questions}/train.jsonl: eval.py --limit 0")
    if len(cfg.levels) != 2 or not 0 < cfg.held_out < 0.5:
        raise ValueError("--levels takes two counts, and --held_out a share between 0 and 0.5")
    counts = dict(zip(found[-1]["ids"], found[-1]["correct"], strict=True))
    easy, hard = cfg.levels
    enc = tokens.encoding("toy" if str(found[-1].get("world")).startswith("toy") else "cl100k_base")
    levels = {"easy": [name for name in rows if counts[name] >= easy], "hard": [name for name in rows if counts[name] <= hard]}
    with new_folder(cfg, "split", n=found[-1]["n"], checkpoint=found[-1]["checkpoint"]) as folder:
        for level, names in levels.items():
            names = sorted(names, key=lambda name: draw(cfg.seed, name))[:cfg.most]
            held = max(1, round(cfg.held_out * len(names)))
            if len(names) < 3:
                raise ValueError(f"{len(names)} of {len(rows)} questions are {level} for {found[-1]['checkpoint']}: change --levels")
            for split, part in (("val", names[:held]), ("test", names[held:2 * held]), ("train", names[2 * held:])):
                write_questions(folder, f"split-{level}/{split}", [rows[name] for name in part], enc)
            write_rows(folder, f"split-{level}/shots", problems.load(cfg.questions, "shots"))
