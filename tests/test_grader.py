"""The grader: right on every real solution, exact, in bounded time, and it runs nothing it reads.

The pairs of grader_table.tsv are its rules by example; bench_grader.py makes many more of them.
"""

import functools
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import bench_grader
import helpers
from data import algebra, grader, latex, problems, questions, tokens, toy
from helpers import DATASETS, ROOT

NUMBERS = {
    "18": 18,
    " 18 ": 18,
    "-5": -5,
    "+5": 5,
    "007": 7,
    "1,234": 1234,
    "1,234,567.50": Fraction(2469135, 2),
    "3.0": 3,
    "3.": 3,
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "$18": 18,
    "$18.": 18,
    "$18.00": 18,
    "-$5": -5,
    "$-5": -5,
    "20%": 20,
    "1/2": Fraction(1, 2),
    "-6/4": Fraction(-3, 2),
    "9007199254740993": 9007199254740993,
    "1e5": 100000,
    "-2.5e-3": Fraction(-1, 400),
    "3 1/2": Fraction(7, 2),
    "-3 1/2": Fraction(-7, 2),
    r"3\frac{1}{2}": Fraction(7, 2),
    r"-3\frac{1}{2}": Fraction(-7, 2),
    r"\frac{1}{2}": Fraction(1, 2),
    r"-\dfrac{6}{4}": Fraction(-3, 2),
    r"\frac{-1}{2}": Fraction(-1, 2),
    r"-\frac{0}{2}": 0,
}
NO_NUMBERS = """
. - $ % /2 about|18 1|8 18|19 12,34 1,2345 ,234 1,23,456 1/0 1/2/3 0x10 3|+|4 9**9 --5 -$-5 1_000
inf nan 18|# \u0661\u0668 \u00b2 1.2.3 1e 1e+ 1e999 e5 1E5 3|5/2 3|1/0 2|3|1/2
\\frac{1}{0} \\frac{1}{2 3\\frac{5}{2} 3\\frac{-1}{2} \\frac{1}{2}\\frac{1}{2}
"""
NO_NUMBERS = ["", " ", *(text.replace("|", " ") for text in NO_NUMBERS.split())]
EXPRESSION = r"\sqrt{2}"  # a reference that takes a worker
EQUAL = r"#### \frac{2}{\sqrt{2}}"  # a text that is right for it, by algebra
TABLE = [
    line.split("\t")
    for line in (Path(__file__).parent / "grader_table.tsv").read_text("utf-8").splitlines()
    if line and not line.startswith("# ")
]
KNOWN = TABLE[-2:]


def only_worker():
    """The one worker of a test that has `one_worker`."""
    (worker,) = algebra.idle(os.getpid()).queue
    return worker


def all_processes():
    return [worker.process for worker in algebra.idle(os.getpid()).queue if worker.process]


@pytest.fixture()
def uncached():
    algebra.equivalent.cache_clear()


@pytest.fixture()
def several_workers(uncached, monkeypatch):
    """Four new workers, each with one second for an answer."""
    monkeypatch.setattr(algebra, "SECONDS", 1)
    monkeypatch.setattr(algebra, "worker_count", lambda: 4)
    algebra.idle.cache_clear()
    yield
    algebra.idle.cache_clear()


@pytest.fixture()
def one_worker(several_workers, monkeypatch):
    monkeypatch.setattr(algebra, "worker_count", lambda: 1)


# ---- numbers and endings


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_exactly(text):
    assert grader.number(text) == NUMBERS[text]
    assert type(grader.number(text)) is Fraction
    assert helpers.grade(f"so it is #### {text}", text)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_text_that_is_no_number_is_none(text):
    assert grader.number(text) is None
    assert not helpers.grade(f"#### {text}", "18")
    if not re.search(r"[\\_²]", text):  # for a number, no prose is well-formed
        assert helpers.compare(text, "18") == (False, False)


def test_exact_where_floats_are_equal():
    assert not helpers.grade("#### 9007199254740992", "9007199254740993")
    assert not helpers.grade("#### 0.30000000000000000001", "0.3")
    assert helpers.grade("#### 0.50", "1/2")
    assert helpers.grade("#### 1234", "1,234")


def test_last_ending_counts():
    assert grader.final_answer("#### 5 no , #### 18") == "18"
    assert grader.final_answer("a #### 18 \nand more") == "18"
    assert grader.final_answer("18") is None
    assert grader.final_answer("18 ####") == ""
    assert not helpers.grade("#### 18 no , #### 5", "18")
    two_endings = grader.grade_all(["#### 5 no , #### 18"], ["17"], [True])
    assert two_endings == [(False, False)]


@pytest.mark.parametrize(
    "text, answer, ended, expected",
    [
        ("9 * 2 = 18 . #### 18", "18", True, 1),
        ("9 * 2 = 17 . #### 17", "18", True, 0.1),
        ("9 * 2 = 18 . #### 18", "18", False, 0),
        ("#### 17 #### 17", "18", True, 0),
        ("it is 18", "18", True, 0),
        ("", "18", True, 0),
        ("#### many", "18", True, 0),
        ("#### 17 apples", "18", True, 0.1),
        (r"#### \frac{\sqrt{8}}{2}", EXPRESSION, True, 1),
        (r"#### \sqrt{3}", EXPRESSION, True, 0.1),
        ("#### 1.4", EXPRESSION, True, 0.1),
        (r"#### \sqrt{", EXPRESSION, True, 0),
        (r"#### \sqrt{2}", EXPRESSION, False, 0),
        (r"#### \sqrt{3} #### \sqrt{3}", EXPRESSION, True, 0),
        ("#### odd", r"\text{even}", True, 0.1),
        ("####", r"\text{even}", True, 0),
        (r"#### \sqrt{9}", "3", True, 1),
        (r"#### \sqrt{8}", "3", True, 0.1),
    ],
)
def test_reward_of_right_wrong_and_truncated_answers(text, answer, ended, expected):
    """Well-formed is one ending and an answer that the grader can read."""
    ((correct, well_formed),) = grader.grade_all([text], [answer], [ended])
    assert grader.reward(correct, well_formed, 0.1) == expected
    assert grader.reward(correct, well_formed, 0.0) == (expected == 1)


def test_reward_does_not_read_the_prompt():
    """What a batch marks as the answer is graded alone, though the shots before it say #### 18."""
    enc = tokens.encoding("toy")
    shot = {"question": "sam has 9 apples . how many now ?", "solutions": ["9 + 9 = 18 . #### 18"]}
    form = problems.Form(toy.PROMPT, "")
    start = problems.few_shot(form, [shot])
    start += problems.prompt(form, "ann has 6 apples . how many now ?")
    said = tokens.encode(enc, " that is all .")
    batch = problems.make_batch([tokens.encode(enc, start)], [said], [1.0], 0)
    whole = tokens.decode(enc, batch.ids[0])
    assert helpers.grade(whole, "18") is False
    graded = tokens.decode(enc, batch.target[batch.mask])
    assert graded == " that is all ."
    assert grader.grade_all([graded], ["18"], [True]) == [(False, False)]


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{\{ x} or 7", r"\{ x"),
        (r"so \boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {\{1, \text{ a } \}} or 7", r"\{1, \text{ a } \}"),
        (r"\fbox{7} of 9", "7"),
        (r"it is $\boxed 5$, not 6", "5"),
        (r"\boxed{5, said 6", "6"),
        (r"\boxed{} 4", "4"),
        ("first 3 then 1,234.50 .", "1,234.50"),
        ("9 - 4 = 5", "5"),
        ("7-5", "5"),
        ("it is -5", "-5"),
        ("= -.5 m", "-.5"),
        ("$18", "$18"),
        ("3/4 of it", "3/4"),
        ("50% of it", "50%"),
        ("#### 5\nno, 6", "6"),
        ("none", None),
        ("", None),
    ],
)
def test_flexible_reading(text, expected):
    """The last box, or else the last number."""
    assert grader.flexible_answer(text) == expected


@pytest.mark.parametrize("answer", ["18", "3 1/2", "1e5", r"\frac{1}{2}", "even", "x = 18"])
def test_what_can_be_asked(answer):
    assert grader.askable(answer)


@pytest.mark.parametrize("answer", ["", " ", "1 8", "1/0", "1\n2", "#### 18", "x" * 301])
def test_what_cannot_be_asked(answer):
    assert not grader.askable(answer)


# ---- the table


def row_name(row):
    return f"{row[0]} for {row[1]}"[:80]


@pytest.mark.parametrize("row", [row for row in TABLE if row not in KNOWN], ids=row_name)
def test_graded_as_a_person_would(row):
    said, meant, right, why = row
    assert helpers.grade(f"so it is\n#### {said}", meant) is (right == "yes"), why


@pytest.mark.parametrize("row", KNOWN, ids=row_name)
@pytest.mark.xfail(strict=True, reason="known, see the row")
def test_known_to_be_wrong(row):
    said, meant, right, why = row
    assert helpers.grade(f"#### {said}", meant) is (right == "yes"), why


def test_the_table_says_each_thing_once():
    assert len({tuple(row[:2]) for row in TABLE}) == len(TABLE)
    assert {row[2] for row in TABLE} == {"yes", "no"}


def test_many_pairs_are_graded_as_each_alone(several_workers):
    """The whole table at once, by four workers, in another order, against one pair at a time."""
    pairs = [(said, meant) for said, meant, _, _ in TABLE]
    together = grader.compare_all(pairs[::-1])[::-1]
    algebra.equivalent.cache_clear()
    assert together == [helpers.compare(*pair) for pair in pairs]
    assert len(all_processes()) == 4


# ---- real text


@functools.cache
def real(name):
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    with gzip.open(DATASETS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def math_answers():
    """{id: answer in one line} of MATH's 12,500, the two with an empty box left out."""
    rows = {
        f"{split}-{i}": " ".join(row["answer"].split())
        for split in ("train", "test")
        for i, row in enumerate(real(f"math/{split}"))
    }
    assert len(rows) == 12_500
    assert [name for name, answer in rows.items() if not answer] == ["train-5341", "train-5343"]
    return {name: answer for name, answer in rows.items() if answer}


def test_all_gsm8k_reference_solutions_are_right():
    """7,473 + 1,319 solutions against their own answers, and against an answer one higher."""
    solutions = [row["answer"] for split in ("train", "test") for row in real(f"gsm8k/{split}")]
    answers = [solution.split("#### ")[1] for solution in solutions]
    values = [int(answer.replace(",", "")) for answer in answers]
    ended = [True] * 8792
    assert set(grader.grade_all(solutions, answers, ended)) == {(True, True)}
    assert set(grader.grade_all(solutions, [*map(str, values)], ended)) == {(True, True)}
    higher = [str(value + 1) for value in values]
    assert set(grader.grade_all(solutions, higher, ended)) == {(False, True)}


def test_all_math_solutions_are_right():
    """12,498 solutions as prepare.py writes them, each against its own answer.

    And what the grader takes for the box of the original is that answer.
    """
    answers = math_answers()
    rows = [row for split in ("train", "test") for row in questions.math(DATASETS / "math", split)]
    meant = [row["answer"] for row in rows]
    assert meant == [*answers.values()]
    assert all(map(grader.askable, meant))
    texts = [row["solutions"][0] for row in rows]
    assert set(grader.grade_all(texts, meant, [True] * len(rows))) == {(True, True)}
    for split in ("train", "test"):
        for i, row in enumerate(real(f"math/{split}")):
            if answer := answers.get(f"{split}-{i}"):
                assert " ".join(latex.boxed(row["solution"]).split()) == answer


def unreadable_by_algebra(answers):
    """Those that math-verify would be asked about and cannot read; equal texts are never asked."""
    asked = []
    for text in {latex.tidy(answer)[0] for answer in answers}:
        by_text = latex.WORDS.fullmatch(text) or latex.BASED.fullmatch(text)
        if grader.number(text) is None and not by_text and not latex.MISREAD.search(text):
            asked.append((text, text))
    marks = algebra.equivalent_all(asked)
    return [pair[0] for pair, mark in zip(asked, marks, strict=True) if mark != (True, True)]


def test_math_answers_are_read():
    assert unreadable_by_algebra([*math_answers().values()][::50]) == []


@pytest.mark.slow
def test_all_math_answers_are_read():
    (text,) = unreadable_by_algebra(math_answers().values())
    assert "phantom" in text


REFUSED = {  # right answers without LaTeX that the grader refuses
    ("1/29,322,216", r"\dfrac{1}{29,\!322,\!216}"),  # a list as well
    ("12/5,525", r"\frac{12}{5,\!525}"),
    ("2469/20,000", r"\dfrac{2469}{20,\!000}"),
    ("((-7)/(23))", r"\frac{-7}{23}"),  # a sum that is left to the grader
    ("((-100)/(9))", r"\frac{-100}{9}"),
    ("-((5)/(3)).", r"-\frac{5}{3}."),
    ("35/2 pi", r"\frac{35}{2} \pi"),  # what is above the stroke
    ("3 \\sec ((1)/(2)) θ", r"3 \sec \frac{1}{2} \theta"),
}


@functools.cache
def groups():
    real("math/test")  # or skip
    return bench_grader.groups(None)


def mistakes(name, every):
    right, pairs = groups()[name]
    marks = grader.compare_all(pairs[::every])
    return {
        pair for pair, (correct, _) in zip(pairs[::every], marks, strict=True) if correct != right
    }


NAMES = ["GSM8K marked up", "GSM8K marked up, one higher", "GSM8K and more"]
NAMES += ["MATH in other LaTeX", "MATH without LaTeX", "MATH next digit", "MATH other sign"]
NAMES += ["MATH next digit without LaTeX", "MATH other sign without LaTeX"]
NAMES += ["MATH neighbours in the alphabet", "MATH neighbours without LaTeX"]
NAMES += ["MATH and more behind it", "MATH and more before it"]


@pytest.mark.parametrize("name", NAMES)
def test_right_and_wrong_answers_made_of_the_real_ones(name):
    """Every sixtieth; tests/bench_grader.py counts all."""
    assert mistakes(name, every=60) <= REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_right_and_wrong_answers_made_of_the_real_ones(name):
    assert mistakes(name, every=1) <= REFUSED


# ---- whatever a model may write

HARMLESS = [
    "9" * 10**6,
    "-" + "9" * 10**6,
    "1/" + "9" * 10**6,
    "9" * 10**6 + "/7",
    "1," * 10**6,
    "1" + ",000" * 10**6,
    "0." + "0" * 10**6,
    " " * 10**6,
    "$" * 10**6,
    "9**9**9**9",
    "9" + "**9" * 10**5,
    "{" * 10**6,
    "\\frac{" * 10**5,
    "(" * 10**6 + ")" * 10**6,
    "####" * 10**6,
    "####\n" * 10**5,
    "#" * (10**6 + 1),
    "\n" * 10**6,
    "1 " * 10**6,
    "\\boxed{" * 10**5,
    "\\" * 10**6,
    "1e99",
    "5 " + "apples " * 10**5,
    "√(" * 140,
    "((" * 70 + "))" * 70,
    "*" * 290,
    "5 " + "a " * 140,
    "1 1/2" * 50,
    "²" * 290,
]
HARMLESS = {f"{text[:6]!r} x {len(text)}": text for text in HARMLESS}
HARD = {
    "power tower": "9^{9^{9^{9}}}",
    "stars": "9**9**9**9",
    "factorials": "((9!)!)!",
    "factorial": "(10^9)!",
    "nested braces": "{" * 140 + "2" + "}" * 140,
    "open braces": "{" * 290,
    "unfinished fraction": "\\frac{1}{",
    "unfinished matrix": "\\begin{pmatrix} 1 & 2",
    "unfinished fractions": "\\frac{" * 40,
    "300 digits": "9" * 290 + ".5",
    "exponent": "1e999999999",
    "backslashes": "\\" * 299,
    "null": "\\sqrt{\0}",
    "controls": "\\\x01\x02",
}
HARDER = {
    "power": "2^{1000000000}",
    "nested parentheses": "(" * 140 + "2" + ")" * 140,
    "symbol tower": "x^{" * 70 + "x" + "}" * 70,
    "sum": "\\sum_{n=1}^{10^{10}} n^n",
    "product": "\\prod_{n=1}^{10^9} n",
    "integral": "\\int_0^1 x^{x^{x}} dx",
    "expansion": "(x+y+z)^{10000}",
    "identity": "\\operatorname{eye}(100000)",
    "zeros": "\\operatorname{zeros}(100000,100000)",
    "small": "1E-999999999",
    "roots": "\\sqrt{" * 40 + "2" + "}" * 40,
    "typed roots": "√(" * 40 + "2" + ")" * 40,
    "bars": "|" * 299,
    "binomial": "\\binom{10^9}{10^8}",
    "matrix power": "\\begin{pmatrix} x & 2 \\\\ 3 & y \\end{pmatrix}^{300}",
    "sets": "\\{" * 100,
    "gamma": "\\Gamma(10^{10})",
    "remainder": "7^{7^{7^7}} \\mod 10",
    "sines": "\\sin" * 60 + "x",
    "list": "1," * 148 + "2",
}
BOUND = 20  # seconds: one of processor time, one to start a worker, ten times for a busy machine


@pytest.mark.parametrize("name", HARMLESS)
def test_verifier_does_not_hang(name):
    began = time.process_time()
    for answer in ("18", EXPRESSION):
        for text in (HARMLESS[name], f"#### {HARMLESS[name]}"):
            assert not grader.grade_all([text], [answer], [True])[0][0]
    last = grader.flexible_answer(HARMLESS[name][: 10**5])  # its model had a limit of tokens
    assert not helpers.compare(last, "17")[0]
    assert time.process_time() - began < 2


HARD_CASES = [*HARD, *(pytest.param(name, marks=pytest.mark.slow) for name in HARDER)]


@pytest.mark.parametrize("name", HARD_CASES)
def test_each_answer_takes_bounded_time(one_worker, name):
    """The next answer is graded as ever."""
    assert helpers.grade(EQUAL, EXPRESSION)
    algebra.equivalent.cache_clear()
    began = time.perf_counter()
    assert not helpers.grade(f"#### {(HARD | HARDER)[name]}", EXPRESSION)
    assert time.perf_counter() - began < BOUND
    assert helpers.grade(EQUAL, EXPRESSION)


@pytest.mark.slow
def test_many_hard_answers_in_a_row(uncached):
    """Against references of other kinds; a second time they cost nothing."""
    texts = [f"#### {text}" for text in (HARD | HARDER).values()]
    ended = [True] * len(texts)
    began = time.perf_counter()
    for answer in ("4", "x^2+1", "(1,2)"):
        graded = grader.grade_all(texts, [answer] * len(texts), ended)
        assert not any(correct for correct, _ in graded)
    assert time.perf_counter() - began < 30 * len(texts)
    began = time.perf_counter()
    assert grader.grade_all(texts, ["(1,2)"] * len(texts), ended) == graded
    assert time.perf_counter() - began < 1


def test_memory_is_bounded(one_worker, monkeypatch):
    """A number of 250 MB: the process gives up by itself, before its time."""
    monkeypatch.setattr(algebra, "SECONDS", 30)
    monkeypatch.setattr(algebra, "MEMORY", 2**27)
    assert helpers.grade(EQUAL, EXPRESSION)
    process = only_worker().process
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (2**27, 2**27)
    with open(f"/proc/{process.pid}/maps") as maps:
        assert "torch" not in maps.read()
    assert helpers.compare("2^{2000000000}", EXPRESSION) == (False, False)
    assert process.wait(20) != -signal.SIGPROF
    assert helpers.grade(r"#### \frac{4}{2\sqrt{2}}", EXPRESSION)


# ---- the workers


STOPPED = pytest.param("stopped", marks=pytest.mark.slow)


@pytest.mark.parametrize("when", ["idle", "working", STOPPED])
def test_a_killed_worker_is_replaced(one_worker, when):
    assert helpers.grade(EQUAL, EXPRESSION)
    algebra.equivalent.cache_clear()
    before = only_worker().process
    if when == "stopped":  # it hangs without using the processor
        os.kill(before.pid, signal.SIGSTOP)
    if when == "idle":
        before.kill()
        before.wait()
    if when == "working":
        threading.Timer(0.1, before.kill).start()
        assert not helpers.grade("#### 9^{9^{9^{9}}}", EXPRESSION)
    assert helpers.grade(EQUAL, EXPRESSION)
    assert only_worker().process.pid != before.pid
    assert before.poll() is not None


def test_a_worker_that_hangs_holds_nobody_up(several_workers):
    """One pair that never ends among eleven right ones: all are graded as by one worker."""
    texts = [rf"#### \frac{{{2 * i}}}{{{i}\sqrt{{2}}}}" for i in range(1, 12)]
    texts[3] = "#### 9^{9^{9^{9}}}"
    began = time.perf_counter()
    graded = grader.grade_all(texts, [EXPRESSION] * 11, [True] * 11)
    assert time.perf_counter() - began < 2 * BOUND
    assert [i for i, (correct, _) in enumerate(graded) if not correct] == [3]


def test_an_interrupted_question_is_not_answered_later(one_worker, monkeypatch):
    assert helpers.grade(EQUAL, EXPRESSION)
    algebra.equivalent.cache_clear()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(algebra, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            helpers.grade(EQUAL, EXPRESSION)
    assert not helpers.grade(r"#### \sqrt{3}", EXPRESSION)


def test_numbers_start_no_worker(monkeypatch):
    """10,000 answers in less than 2 s on one core."""
    monkeypatch.setattr(algebra.Worker, "start", None)
    algebra.idle.cache_clear()
    texts, answers = [], []
    for i in range(10_000):
        total = 2 * i + 10
        texts.append(f"First {i} + 5 = {i + 5}.\nThen {i + 5} * 2 = {total}.\n#### {total:,}")
        answers.append(str(total + i % 2))
    began = time.process_time()
    graded = grader.grade_all(texts, answers, [True] * 10_000)
    seconds = time.process_time() - began
    assert sum(correct for correct, _ in graded) == 5000
    assert all(well_formed for _, well_formed in graded)
    assert seconds < 2
    for said in ("18 apples", "about 18", "3 1/2", "**18**", "9 + 9", "18 , 19", "= 18", "1e5"):
        helpers.compare(said, "18")
    algebra.idle.cache_clear()


def test_one_pair_is_asked_once(uncached, monkeypatch):
    asked = []
    ask = algebra.Worker.ask
    monkeypatch.setattr(
        algebra.Worker, "ask", lambda self, *pair: asked.append(pair) or ask(self, *pair)
    )
    texts = [
        r"#### \sqrt{8}/2",
        r"so #### \sqrt{8}/2",
        r"#### \sqrt{3}",
        r"#### \sqrt{2}",
        "no answer",
        r"#### \sqrt{8}/2",
    ]
    for _ in range(2):
        graded = grader.grade_all(texts, [EXPRESSION] * 6, [True] * 5 + [False])
        assert [correct for correct, _ in graded] == [True, True, False, True, False, False]
    assert sorted(asked) == [(r"\sqrt{3}", EXPRESSION), (r"\sqrt{8}/2", EXPRESSION)]


def test_a_few_answers_start_few_workers(several_workers):
    """Workers start when they are needed: one answer after the other is asked of one worker."""
    for i in range(2, 6):
        assert helpers.grade(rf"#### \frac{{{2 * i}}}{{{i}\sqrt{{2}}}}", EXPRESSION)
    assert len(all_processes()) == 1


@pytest.mark.parametrize("ranks, expected", [("1", 8), ("4", 4), ("64", 1)])
def test_ranks_share_the_cores(monkeypatch, ranks, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert algebra.worker_count() == expected


def test_a_worker_that_cannot_start_says_so(several_workers, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        grader.compare_all([("x", "y"), ("x+1", "y"), ("x+2", "y")])


def test_workers_end_with_their_parent():
    code = """
import os
from data import algebra, grader
algebra.worker_count = lambda: 3
grader.compare_all([("x", "y"), ("x+1", "y"), ("x+2", "y")])
print(*[worker.process.pid for worker in algebra.idle(os.getpid()).queue])
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [f"/proc/{pid}" for pid in child.stdout.split()]
    assert len(paths) == 3
    deadline = time.time() + 10
    while any(map(os.path.exists, paths)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(os.path.exists, paths))


RUN = [
    "open({path!r}, 'w').close() or 18",
    "__import__('pathlib').Path({path!r}).touch() or 18",
    "int('18')",
    "eval('18')",
    r"\text{{__import__('pathlib').Path({path!r}).touch()}}",
    r"x_{{__import__('pathlib').Path({path!r}).touch()}}",
    r"\operatorname{{__import__('pathlib').Path({path!r}).touch}}(1)",
    r"\mathrm{{open({path!r}, 'w')}}",
    r"[open({path!r}, 'w')]",
    r"\frac{{d}}{{dx}} open({path!r}, 'w')",
    r"\sum_{{open({path!r}, 'w')=1}}^{{3}} 1",
    r"\begin{{pmatrix}} open({path!r}, 'w') \end{{pmatrix}}",
    r"\immediate\write18{{touch {path}}}",
    r"\input{{|touch {path}}}",
    r"√(open({path!r}, 'w'))",
    r"**open({path!r}, 'w')**",
]


@pytest.mark.parametrize("text", RUN)
def test_verifier_does_not_run_what_the_model_wrote(uncached, tmp_path, text):
    """Through the grader, and past what it refuses by the text."""
    made = tmp_path / "made"
    said = text.format(path=str(made))
    for answer in ("18", EXPRESSION, r"\text{even}", "x"):
        assert not helpers.grade(f"#### {said}", answer)
    assert not algebra.equivalent(said, EXPRESSION)[0]
    assert not made.exists()


def test_the_worker_runs_no_code(tmp_path):
    """sympy reads with eval; the worker's audit hook lets only numbers and symbols through."""
    made = tmp_path / "made"
    code = f"""
import sys
from data import algebra
from sympy import sympify
sys.addaudithook(algebra.no_code)
assert sympify("12") + sympify("0.5") == 12.5 and str(sympify("x")) == "x"
for text in ("open({str(made)!r}, 'w')", "(1).__class__", "x.__init__", "print(1)", "eval('1')"):
    try:
        sympify(text)
    except PermissionError:
        continue
    raise SystemExit(f"{{text}} was evaluated")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not made.exists()


@pytest.mark.slow
def test_each_rank_has_its_workers(tmp_path):
    """Under torchrun with gloo and its threads; the workers end with their rank."""
    script = tmp_path / "ranks.py"
    script.write_text(
        rf"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from data import algebra, grader
dist.init_process_group("gloo")
texts = ["#### \\frac{{2}}{{\\sqrt{{2}}}}", "#### 9^{{9^{{9^9}}}}"]
graded = grader.grade_all(texts, ["\\sqrt{{2}}"] * 2, [True] * 2)
assert graded[0] == (True, True) and not graded[1][0]
here = [worker.process.pid for worker in algebra.idle(os.getpid()).queue if worker.process]
pids = [None, None]
dist.all_gather_object(pids, here)
assert pids[0] and pids[1] and not {{*pids[0]}} & {{*pids[1]}}
if dist.get_rank() == 0:
    print("workers", *pids[0], *pids[1])
dist.destroy_process_group()
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    time.sleep(1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in re.findall(r"\d+", done.stdout))
