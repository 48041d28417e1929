"""GSM8K, MATH and OpenMathInstruct-1 as questions with solutions that end in `#### answer`.

Rows are {"id", "question", "answer", "solutions"}. Also: which of their training questions are in
a test set, and a split into easy and hard questions by how often a model solved them.
"""

import collections
import hashlib
import heapq
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common import Count, Fraction, Whole
from data import files, grader, problems, tokens
from data.corpus import local_files
from data.overlap import GRAM, draw, grams, words

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
HUB = {
    "gsm8k": [("openai/gsm8k", "main")],
    "math": [("EleutherAI/hendrycks_math", subject) for subject in SUBJECTS],
    "math500": [("HuggingFaceH4/MATH-500", "default")],
}
OPENMATH = "nvidia/OpenMathInstruct-1"
OPENMATH_ROWS = 1_830_000  # of its correct solutions, about: for the time left
TEXT_ONLY = "<not_executed>"  # its error_message where no Python was run
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BRACE = re.compile(r"\\.|[{}]", re.S)  # an escaped brace is no brace


def table(name, source, split, fields):
    """(where, row) of a set of HUB, or of {split}.jsonl(.gz) of the folder `source`; all of the
    fields are texts."""
    sets = [(*place, "test" if name == "math500" else split) for place in HUB[name]]
    return files.table(source, split, sets, dict.fromkeys(fields, str))


def gsm8k(source, split):
    """GSM8K's rows as questions with one solution, without its <<48/2=24>> calculator notes."""
    rows = table("gsm8k", source, split, ("question", "answer"))
    for index, (where, row) in enumerate(rows):
        solution = re.sub("<<[^<>]*>>", "", row["answer"]).strip()
        answer = grader.final_answer(solution)
        if grader.number(answer) is None:
            raise ValueError(f"{where}: does not end in '#### number' but in {solution[-60:]!r}")
        question = {
            "id": f"gsm8k-{split}-{index}",
            "question": row["question"].strip(),
            "answer": answer,
            "solutions": [solution],
        }
        problems.check(question, where)
        yield question


def math(source, split, left_out=None):
    """MATH's rows (or math500's) as questions with one solution and their level.

    The level is "1" to "5" ("?" in two rows). A row whose last box is empty or which has none has
    no answer: it is left out, and counted in `left_out` (a Counter). Two of train are such.
    """
    name = "math500" if split == "math500" else "math"
    rows = table(name, source, split, ("problem", "solution"))
    for index, (where, row) in enumerate(rows):
        solution, answer = unbox(row["solution"])
        if not answer:
            if left_out is not None:
                left_out[f"{split} without an answer in a box"] += 1
            continue
        question = {
            "id": f"math-{split}-{index}",
            "question": row["problem"].strip(),
            "answer": answer,
            "solutions": [finish(solution, answer)],
            "level": str(row.get("level", "?")).removeprefix("Level "),
        }
        problems.check(question, where)
        yield question


def unbox(text):
    r"""A text with x in place of each \boxed{x}, and the x of the last one in one line, or None."""
    kept = []
    last = None
    at = 0
    while box := BOX.search(text, at):
        depth = 0
        inner = text[box.end() : box.end() + 1]  # \boxed 5
        after = box.end() + 1
        for brace in BRACE.finditer(text, box.end()) if inner == "{" else ():
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                inner = text[box.end() + 1 : brace.start()]
                after = brace.end()
                break
        else:  # a brace without an end, or none
            inner = inner.replace("{", "")
        inner = unbox(inner)[0]
        kept += [text[at : box.start()], inner]
        last = " ".join(inner.split())
        at = after
    return "".join(kept) + text[at:], last


def finish(solution, answer):
    return f"{solution.replace(grader.ENDING, '').strip()}\n{grader.ENDING} {answer}"


def shots(path):
    """A .json list of solved questions as rows.

    They are {"question", "target"} that ends "The answer is N." (Wei et al.), or {"problem",
    "solution"} that ends "The final answer is $N$. I hope it is correct." (Minerva).
    """
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        rows = [shot(index, row) for index, row in enumerate(listed)]
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): --shots takes a .json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{path}: must be a JSON list of {{"question": text, "target": text}} or of '
            '{"problem": text, "solution": text}'
        ) from None
    for number, row in enumerate(rows, 1):
        problems.check(row, f"{path}: row {number}")
    return rows


def shot(index, row):
    if "problem" in row:
        question = row["problem"]
        target = row["solution"]
        mark = "Final Answer: The final answer is "
    else:
        question = row["question"]
        target = row["target"]
        mark = "The answer is "
    reasons, found, answer = target.rpartition(mark)
    if not found:
        raise ValueError
    answer = answer.removesuffix("I hope it is correct.").strip().removesuffix(".").strip("$")
    return {
        "id": f"shot-{index}",
        "question": question.strip(),
        "answer": answer,
        "solutions": [finish(unbox(reasons)[0], answer)],
    }


# ----------------------------------------------------------------------- OpenMathInstruct-1


def openmath_rows(source, bar):
    """The rows of every .jsonl of a folder, or those of the hub, streamed; the bar counts them."""
    names = ("question", "generated_solution", "expected_answer", "error_message", "dataset")
    if source:
        paths = [Path(file.name) for file in local_files(source) if not file.prose]
        if not paths:
            raise ValueError(f"no .jsonl file at {source}")
        bar.reset(sum(path.stat().st_size for path in paths))
        for path in paths:
            yield from files.read_jsonl(path, dict.fromkeys(names, str) | {"is_correct": bool}, bar)
        return
    from datasets import load_dataset

    # its own train and validation; 1.5 GB instead of 8.9 with the wrong ones
    correct = {"train": "correct_solutions/*.jsonl"}
    bar.reset(OPENMATH_ROWS)
    for row in load_dataset(OPENMATH, data_files=correct, split="train", streaming=True):
        yield row
        bar.update()


def gather(rows, dataset, code, most, seed):
    """OpenMathInstruct-1's rows to one row per question, and counts of what was left out.

    A question has at most `most` solutions. Of those that are equal without case, punctuation and
    spacing the first stays. Those that are kept are the `most` smallest of a draw fixed by (seed,
    question, words of the solution), so no more than that is ever in memory: 15,000 questions with
    23 solutions each are about 300 MB, and the draws of all solutions half as much.
    """
    found = {}
    seen = set()
    left_out = collections.Counter()
    for row in rows:
        question = row["question"].strip()
        answer = " ".join(row["expected_answer"].split())
        fresh = {"dataset": row["dataset"], "answer": answer, "heap": []}
        kept = found.setdefault(question, fresh)
        place = draw(seed, f"{question} {words(row['generated_solution'])}")
        correct = row["is_correct"] is True and answer == kept["answer"]
        reason = None
        if dataset not in ("all", row["dataset"]):
            reason = "of the other data set"
        elif not correct or not grader.askable(answer):
            reason = "not correct"
        elif not code and row["error_message"] != TEXT_ONLY:
            reason = "with code"
        elif place in seen:
            reason = "near-duplicates"
        if reason:
            left_out[reason] += 1
            continue
        seen.add(place)
        solution = finish(unbox(row["generated_solution"])[0], answer)
        heapq.heappush(kept["heap"], (-place, solution))
        if len(kept["heap"]) > most:
            heapq.heappop(kept["heap"])
            left_out[f"beyond {most} a question"] += 1
    rows = []
    for question, kept in found.items():
        if not kept["heap"]:
            if dataset in ("all", kept["dataset"]):
                left_out["questions without any solution"] += 1
            continue
        name = hashlib.sha256(question.encode()).hexdigest()[:12]
        row = {"id": f"openmath-{kept['dataset']}-{name}", "question": question}
        row["answer"] = kept["answer"]
        row["solutions"] = [solution for _, solution in sorted(kept["heap"], reverse=True)]
        rows.append(row)
    return rows, dict(left_out)


# -------------------------------------------------------------------- apart from the test set


def apart(train, tests, shown, shot_count, val, seed, keep_overlap):
    """Training questions to {"train", "val", "shots"}, and counts of what was left out.

    No question of `tests` is in them. Equal means without case, punctuation and spacing. A
    question with 13 words in a row of a test question is left out too, unless it is to be kept.
    Shots are the rows `shown`, or some training questions; neither is trained on.
    """
    equal = {words(row["question"]) for row in tests}
    runs = {gram for row in tests for gram in grams(row["question"])}
    left_out = {"equal": 0, "overlap": 0}
    rows = []
    for row in train:
        if words(row["question"]) in equal:
            left_out["equal"] += 1
        elif not runs.isdisjoint(grams(row["question"])):
            left_out["overlap"] += 1
            rows += [row] if keep_overlap else []
        else:
            rows.append(row)
    kept = "kept" if keep_overlap else "left out"
    same = f"{left_out['equal']} training questions are also in test"
    print(f"{same} (without case and punctuation): left out")
    print(f"{left_out['overlap']} more share {GRAM} words in a row with a test question: {kept}")
    if left_out["overlap"] and not rows:
        raise ValueError("no training question is left: --keep_overlap keeps these")
    if not shown:
        shown = sorted(rows, key=lambda row: draw("shots", row["id"]))[:shot_count]
    shown = [{**row, "solutions": row["solutions"][:1]} for row in shown]
    names = {words(row["question"]) for row in shown}
    # drawn from the distinct questions, so that copies of one stay on one side
    copies = collections.Counter(words(row["question"]) for row in rows)
    held_out, count = set(), 0
    for question in sorted(copies.keys() - names, key=lambda question: draw(seed, question)):
        if count < val:
            held_out.add(question)
            count += copies[question]
    splits = {"train": [], "val": [], "shots": shown}
    for row in rows:
        question = words(row["question"])
        if question not in names:
            splits["val" if question in held_out else "train"].append(row)
    left_out["shots"] = len(rows) - len(splits["train"]) - len(splits["val"])
    print(f"{left_out['shots']} training questions are the shots, or equal to one: not trained on")
    return splits, left_out


def check_apart(splits):
    """ValueError if a question is in two of the splits {name: rows}."""
    where = {}
    for split, rows in splits.items():
        for row in rows:
            other = where.setdefault(words(row["question"]), split)
            if other != split:
                asked = row["question"][:60]
                raise ValueError(f"question {row['id']!r} of {split} is also in {other}: {asked!r}")


# ------------------------------------------------------------------ the commands of prepare.py


@dataclass(frozen=True)
class Gsm8k:
    # a folder with train.jsonl and test.jsonl, .gz or not; empty: openai/gsm8k from the hub
    source: str = ""
    # .json list of {"question", "target"} ending "The answer is N."; empty: 8 training questions
    shots: str = ""
    out: str = "data/out/gsm8k"  # the folder to make
    val: Count = 500  # training questions held out for validation
    # keep training questions with 13 words in a row of a test question (4 of 7,473)
    keep_overlap: bool = False
    seed: Whole = 0  # of the choice of validation questions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Math:
    # a folder with train.jsonl and test.jsonl, .gz or not; empty: EleutherAI/hendrycks_math, hub
    source: str = ""
    # .json list of {"problem", "solution"} in Minerva's form; empty: 4 training questions
    shots: str = ""
    # or math500: the 500 of its test questions that many report (HuggingFaceH4/MATH-500)
    test: str = "test"
    out: str = "data/out/math"  # the folder to make
    val: Count = 500  # training questions held out for validation
    # keep training questions with 13 words in a row of a test question (a tenth of them)
    keep_overlap: bool = False
    seed: Whole = 0  # of the choice of validation questions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class OpenMath:
    # a folder of .jsonl files with its columns; empty: nvidia/OpenMathInstruct-1 from the hub
    source: str = ""
    # a folder with gsm8k/test.jsonl and math/test.jsonl, .gz or not; empty: from the hub
    tests: str = ""
    # gsm8k, math or all of it; the test questions are GSM8K's for gsm8k, else MATH's (paper)
    dataset: str = "all"
    test: str = "test"  # or math500, instead of all MATH test questions
    # at most (paper: about 23 on average; the source has about 120)
    solutions_per_question: Count = 23
    code: bool = False  # also solutions that ran Python
    # .json list of solved questions, as for gsm8k or math; empty: training questions
    shots: str = ""
    out: str = "data/out/openmath"  # the folder to make
    # questions held out for validation (paper: a held-out split, its size is not given)
    val: Count = 500
    # keep training questions with 13 words in a row of a test question
    keep_overlap: bool = False
    seed: Whole = 0  # of the choice of validation questions and of solutions
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Split:
    # rows of eval.py CHECKPOINT --questions FOLDER/train.jsonl --limit 0 --n 64 --temperature 1
    # --shots 4; the last row of these questions counts
    samples: str
    questions: str  # the FOLDER
    # easy: so many of the answers right, or more; hard: so many or fewer (paper, of 64)
    levels: tuple[Whole, ...] = (16, 8)
    most: Count = 10_000  # questions of each (paper: 10k; OpenMathInstruct-1 has fewer)
    held_out: Fraction = 0.1  # share of each for validation, and as much for test
    out: str = "data/out/split"  # the folder to make, with split-easy/ and split-hard/ in it
    seed: Whole = 0  # of the choice of questions
    overwrite: bool = False  # replace the folder if it exists


def write_questions(folder, name, rows, form, enc=None):
    """Write {name}.jsonl and print the numbers to expect: of questions, of tokens if enc is given.

    Raises ValueError with the id of a row that is no question.
    """
    if not rows:
        raise ValueError(f"no question is left for {name}: take more, or hold fewer out")
    for row in rows:
        problems.check(row, f"question {row['id']!r} of {name}")
    files.write_rows(folder / f"{name}.jsonl", rows)
    each = mean([len(row["solutions"]) for row in rows])
    line = f"{name:<11} {len(rows):>6,} questions, {each:4.1f} solutions each"
    if enc:
        asked = [problems.prompt(form, row["question"]) for row in rows]
        prompts = [len(tokens.encode(enc, text)) for text in asked]
        texts = [text for row in rows for text in row["solutions"]]
        answers = [len(problems.answer_ids(enc, text)) for text in texts]
        line += f"; tokens (longest): prompt {mean(prompts):5.1f} ({max(prompts)})"
        line += f", solution {mean(answers):5.1f} ({max(answers)})" if answers else ""
    print(line)


def mean(numbers):
    return sum(numbers) / len(numbers)


def write_splits(folder, cfg, train, test, others, shot_count, left_out):
    """Train, val, test and shots; no question of test or of the `others` is trained on."""
    shown = shots(cfg.shots) if cfg.shots else []
    for reason, count in left_out.items():
        print(f"{count:,} {reason}: left out")
    splits, overlap = apart(
        train, [*test, *others], shown, shot_count, cfg.val, cfg.seed, cfg.keep_overlap
    )
    form = problems.Form()
    problems.write_form(folder, form)
    parts = {"test": test} | splits
    write_parts(folder, parts, form, left_out | overlap, tokens.encoding("cl100k_base"))


def write_parts(folder, parts, form, left_out, enc=None):
    """The questions of each part, none of which is in two, and their numbers in world.json."""
    check_apart(parts)
    for name, rows in parts.items():
        write_questions(folder, name, rows, form, enc)
    counts = {name: len(rows) for name, rows in parts.items()}
    files.note(folder, questions=counts, left_out=left_out)


def sources_of(*places) -> str:
    """A fingerprint of the local files that questions are made of: their names and sizes, and what
    is in them, if that is less than 1 GB."""
    paths = []
    for place in filter(None, places):
        some = [Path(place)] if Path(place).is_file() else sorted(Path(place).rglob("*.json*"))
        paths += filter(Path.is_file, some)
    sizes = [path.stat().st_size for path in paths]
    contents = [files.checksum(path) for path in paths] if sum(sizes) < 1e9 else []
    return files.fingerprint([[path.name for path in paths], sizes, contents])


def make_gsm8k(cfg):
    """The GSM8K questions, each with its one solution."""
    facts = {"source_contents": sources_of(cfg.source, cfg.shots)}
    if files.finished(cfg, "gsm8k", **facts):
        return
    with files.new_folder(cfg, "gsm8k", **facts) as folder:
        train = list(gsm8k(cfg.source, "train"))
        test = list(gsm8k(cfg.source, "test"))
        write_splits(folder, cfg, train, test, [], 8, {})


def math_tests(source, name, left_out):
    """MATH's test questions that are asked, and all of them."""
    if name not in ("test", "math500"):
        raise ValueError(f"--test takes test or math500, not {name!r}")
    whole = list(math(source, "test", left_out))
    asked = whole if name == "test" else list(math(source, name, left_out))
    return asked, whole


def make_math(cfg):
    """The MATH questions, each with its one solution and its level."""
    facts = {"source_contents": sources_of(cfg.source, cfg.shots)}
    if files.finished(cfg, "math", **facts):
        return
    with files.new_folder(cfg, "math", **facts) as folder:
        left_out = collections.Counter()
        test, whole = math_tests(cfg.source, cfg.test, left_out)
        train = list(math(cfg.source, "train", left_out))
        write_splits(folder, cfg, train, test, whole, 4, dict(left_out))


def make_openmath(cfg):
    """OpenMathInstruct-1: the training questions of GSM8K and MATH, each with many solutions."""
    if cfg.dataset not in ("all", "gsm8k", "math"):
        raise ValueError(f"--dataset takes all, gsm8k or math, not {cfg.dataset!r}")
    name = "openmath" + f"-{cfg.dataset}" * (cfg.dataset != "all")
    facts = {"source_contents": sources_of(cfg.source, cfg.tests, cfg.shots)}
    if files.finished(cfg, name, **facts):
        return
    with files.new_folder(cfg, name, **facts) as folder:
        left_out = collections.Counter()
        grade_school = list(gsm8k(cfg.tests and f"{cfg.tests}/gsm8k", "test"))
        test, whole = math_tests(cfg.tests and f"{cfg.tests}/math", cfg.test, left_out)
        test = grade_school if cfg.dataset == "gsm8k" else test
        with tqdm(unit_scale=True, desc="reading", mininterval=1) as bar:
            rows = openmath_rows(cfg.source, bar)
            most = cfg.solutions_per_question
            train, gone = gather(rows, cfg.dataset, cfg.code, most, cfg.seed)
        print(
            f"{sum(len(row['solutions']) for row in train):,} solutions of {len(train):,} questions"
        )
        shot_count = 8 if cfg.dataset == "gsm8k" else 4
        others = [*grade_school, *whole]
        write_splits(folder, cfg, train, test, others, shot_count, dict(left_out) | gone)


def counts_of(cfg, rows) -> dict:
    """The last row of an evaluation, cfg.samples, that has all the questions `rows` {id: row}."""
    found = None
    for sample in files.read_jsonl(cfg.samples, {"kind": str}):
        if sorted(sample.get("ids", ())) == sorted(rows):
            found = sample
    if found is None:
        raise ValueError(
            f"{cfg.samples} has no row of all {len(rows)} questions of "
            f"{cfg.questions}/train.jsonl: eval.py --limit 0"
        )
    return found


def make_split(cfg):
    """Questions that a model often solves, and those that it seldom solves, by its evaluation."""
    rows = {row["id"]: row for row in problems.load(cfg.questions, "train")}
    sample = counts_of(cfg, rows)
    if len(cfg.levels) != 2 or not 0 < cfg.held_out < 0.5:
        raise ValueError("--levels takes two counts, and --held_out a share between 0 and 0.5")
    counts = dict(zip(sample["ids"], sample["correct"], strict=True))
    facts = {"n": sample["n"], "checkpoint": sample["checkpoint"], "shots": sample.get("shots", 0)}
    facts["sampled"] = files.fingerprint([rows, counts])
    if files.finished(cfg, "split", **facts):
        return
    easy, hard = cfg.levels
    levels = {
        "easy": [name for name in rows if counts[name] >= easy],
        "hard": [name for name in rows if counts[name] <= hard],
    }
    form = problems.form(cfg.questions)
    shots_there = problems.split_path(cfg.questions, "shots").is_file()
    shown = problems.load(cfg.questions, "shots") if shots_there else []
    with files.new_folder(cfg, "split", **facts) as folder:
        for level, names in levels.items():
            same = {}  # what is calculated, or asked -> the questions: none is in two parts
            for name in names:
                key = rows[name].get("calculation") or words(rows[name]["question"])
                same.setdefault(key, []).append(name)
            if len(same) < 3:
                raise ValueError(
                    f"{len(same)} of {len(rows)} questions are {level} for "
                    f"{sample['checkpoint']}: change --levels"
                )
            kept = sorted(same, key=lambda key: draw(cfg.seed, key))[: cfg.most]
            print(
                f"{len(names):,} of {len(rows):,} questions are {level}, with {len(same):,} "
                f"calculations, of which {len(kept):,} are kept"
            )
            held = max(1, round(cfg.held_out * len(kept)))
            parts = {"val": kept[:held], "test": kept[held : 2 * held], "train": kept[2 * held :]}
            problems.write_form(folder / f"split-{level}", form)
            for split, part in parts.items():
                many = None if split == "train" else 1
                chosen = [rows[name] for key in part for name in same[key][:many]]
                write_questions(folder, f"split-{level}/{split}", chosen, form)
            if shown:
                files.write_rows(folder / f"split-{level}" / "shots.jsonl", shown)
        between = len(rows) - len({*levels["easy"], *levels["hard"]})
        print(f"{between:,} of {len(rows):,} questions are neither: left out")
