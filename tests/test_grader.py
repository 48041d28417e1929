"""The grader: right on every real solution, exact, in bounded time, blind to everything but the answer, and never run by it."""

import functools
import gzip
import itertools
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

import pytest
from helpers import DATASETS, ROOT

from data import algebra, grader, latex, problems, questions, tokens

NUMBERS = {
    "18": 18, " 18 ": 18, "-5": -5, "+5": 5, "007": 7, "1,234": 1234, "1,234,567.50": Fraction(2469135, 2), "3.0": 3,
    "3.": 3, ".5": Fraction(1, 2), "-.5": Fraction(-1, 2), "$18": 18, "$18.": 18, "$18.00": 18, "-$5": -5, "$-5": -5,
    "20%": 20, "1/2": Fraction(1, 2), "-6/4": Fraction(-3, 2), "9007199254740993": 9007199254740993,
    r"\frac{1}{2}": Fraction(1, 2), r"-\dfrac{6}{4}": Fraction(-3, 2), r"\frac{-1}{2}": Fraction(-1, 2), r"-\frac{0}{2}": 0,
}
NOT_NUMBERS = [
    "", " ", ".", "-", "$", "%", "/2", "18 dollars", "about 18", "1 8", "18 19", "12,34", "1,2345", ",234",
    "1,23,456", "1/0", "1/2/3", "1e5", "0x10", "3 + 4", "9**9", "--5", "-$-5", "1_000", "inf", "nan", "18 #",
    "\u0661\u0668", "\u00b2", "1.2.3", r"\frac{1}{0}", r"\frac{1}{2", r"3\frac{1}{2}", r"\frac{1}{2}\frac{1}{2}",
]
EXPRESSION = r"\sqrt{2}"  # a reference that takes the worker


def worker():
    (worker,) = algebra.idle(os.getpid()).queue
    return worker


@pytest.fixture()
def uncached(monkeypatch):
    monkeypatch.setattr(algebra, "worker_count", lambda: 1)
    algebra.idle.cache_clear()
    algebra.equivalent.cache_clear()


@pytest.fixture()
def impatient(uncached, monkeypatch):
    """A worker with one second for each answer."""
    monkeypatch.setattr(algebra, "SECONDS", 1)
    algebra.idle.cache_clear()
    yield
    algebra.idle.cache_clear()


# ---- numbers


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_exactly(text):
    """Seen to fail with float() in place of Fraction()."""
    assert grader.number(text) == NUMBERS[text]
    assert type(grader.number(text)) is Fraction
    assert grader.grade(f"so it is #### {text}", text)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_text_that_is_no_number_is_none(text):
    """Seen to fail with match() in place of fullmatch(), and without re.ASCII."""
    assert grader.number(text) is None
    assert not grader.grade(f"#### {text}", "18")
    assert "\\" in text or "_" in text or grader.compare(text, "18") == (False, False)  # for a number, no prose is well-formed


def test_exact_where_floats_are_equal():
    """Seen to fail with float() in place of Fraction()."""
    assert not grader.grade("#### 9007199254740992", "9007199254740993")
    assert not grader.grade("#### 0.30000000000000000001", "0.3")
    assert grader.grade("#### 0.50", "1/2") and grader.grade("#### 1234", "1,234")


def test_last_ending_counts():
    """Seen to fail with partition() in place of rpartition()."""
    assert grader.final_answer("#### 5 no , #### 18") == "18"
    assert grader.final_answer("a #### 18 \nand more") == "18"
    assert grader.final_answer("18") is None and grader.final_answer("18 ####") == ""
    assert not grader.grade("#### 18 no , #### 5", "18")
    assert grader.grade_all(["#### 5 no , #### 18"], ["17"], [True]) == [(False, False)]  # two endings


@pytest.mark.parametrize("text, answer, ended, expected", [
    ("9 * 2 = 18 . #### 18", "18", True, 1), ("9 * 2 = 17 . #### 17", "18", True, 0.1), ("9 * 2 = 18 . #### 18", "18", False, 0),
    ("#### 17 #### 17", "18", True, 0), ("it is 18", "18", True, 0), ("", "18", True, 0), ("#### many", "18", True, 0),
    (r"#### \frac{\sqrt{8}}{2}", EXPRESSION, True, 1), (r"#### \sqrt{3}", EXPRESSION, True, 0.1), ("#### 1.4", EXPRESSION, True, 0.1),
    (r"#### \sqrt{", EXPRESSION, True, 0), (r"#### \sqrt{2}", EXPRESSION, False, 0), (r"#### \sqrt{3} #### \sqrt{3}", EXPRESSION, True, 0),
    ("#### odd", r"\text{even}", True, 0.1), ("####", r"\text{even}", True, 0), (r"#### \sqrt{9}", "3", True, 1),
    (r"#### \sqrt{8}", "3", True, 0.1),
])  # fmt: skip
def test_reward_of_right_wrong_and_cut_answers(text, answer, ended, expected):
    """Well-formed is one ending and an answer that the grader could read. Seen to fail with `ended` ignored (a right answer
    that was cut then earned the reward), and with every LaTeX taken for well-formed."""
    ((correct, formatted),) = grader.grade_all([text], [answer], [ended])
    assert grader.reward(correct, formatted, 0.1) == expected and grader.reward(correct, formatted, 0.0) == (expected == 1)


def test_reward_does_not_read_the_prompt():
    """What a batch marks as the answer is all that is graded, though the shots before it say `#### 18`.

    Seen to fail with a mask that starts at the first token."""
    enc = tokens.encoding("toy")
    shot = {"question": "sam has 9 apples . how many now ?", "solutions": ["9 + 9 = 18 . #### 18"]}
    start = problems.few_shot("toy", [shot]) + problems.prompt("toy", "ann has 6 apples . how many now ?")
    batch = problems.make_batch([tokens.encode(enc, start)], [tokens.encode(enc, " that is all .")], [1.0], 0)
    assert grader.grade(tokens.decode(enc, batch.ids[0]).replace(" A : that", " that"), "18") is False
    graded = tokens.decode(enc, batch.ids[:, 1:][batch.mask])
    assert graded == " that is all ." and grader.grade_all([graded], ["18"], [True]) == [(False, False)]


@pytest.mark.parametrize("text, expected", [
    (r"\boxed{\{ x} or 7", r"\{ x"),
    (r"so \boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed {\{1, \text{ a } \}} or 7", r"\{1, \text{ a } \}"),
    (r"\fbox{7} of 9", "7"), (r"it is $\boxed 5$, not 6", "5"), (r"\boxed{5, said 6", "6"), (r"\boxed{} 4", "4"),
    ("first 3 then 1,234.50 .", "1,234.50"), ("9 - 4 = 5", "5"), ("7-5", "5"), ("it is -5", "-5"), ("= -.5 m", "-.5"), ("$18", "$18"),
    ("3/4 of it", "3/4"), ("50% of it", "50%"), ("#### 5\nno, 6", "6"), ("none", None), ("", None),
])  # fmt: skip
def test_flexible_reading(text, expected):
    """The last box, or else the last number. Seen to fail with the first box, and with escaped braces counted."""
    assert grader.flexible_answer(text) == expected


def test_grading_gsm8k_is_fast():
    """10,000 answers in less than 2 s on one core, no process started. Seen to fail with each of them asked of a worker."""
    texts = [f"First {i} + 5 = {i + 5}.\nThen {i + 5} * 2 = {2 * i + 10}.\n#### {2 * i + 10:,}" for i in range(10_000)]
    answers, before = [str(2 * i + 10 + i % 2) for i in range(10_000)], algebra.idle
    began = time.process_time()
    graded = grader.grade_all(texts, answers, [True] * 10_000)
    seconds = time.process_time() - began
    print(f"10,000 answers in {seconds:.2f} s")
    assert sum(correct for correct, _ in graded) == 5000 and all(formatted for _, formatted in graded)
    assert seconds < 2 and algebra.idle is before


# ---- real text


@functools.cache
def real(name):
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}; set RL_DATASETS to the folder of real data")
    with gzip.open(DATASETS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def math_answers():
    """{id: answer in one line} of MATH's 12,500, the two with an empty box left out."""
    rows = {f"{split}-{i}": " ".join(row["answer"].split()) for split in ("train", "test") for i, row in enumerate(real(f"math/{split}"))}
    empty = [name for name, answer in rows.items() if not answer]
    assert len(rows) == 12_500 and empty == ["train-5341", "train-5343"]
    return {name: answer for name, answer in rows.items() if answer}


def otherwise(answer):
    """The same answer as another hand would write it."""
    answer = re.sub(r"(?<!\\)\\ ", " ", answer).replace(r"\frac", r"\dfrac").replace(r"\dfrac{1}", r"\dfrac1")
    answer = re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", answer)) if "text" not in answer else answer
    return f"${answer.replace(' ', chr(92) + ', ')}$."


def test_all_gsm8k_reference_solutions_are_right():
    """7,473 + 1,319 solutions against their own answers, and against an answer that is off by one.

    Seen to fail with commas left in place, and with the number read up to its first comma."""
    solutions = [row["answer"] for split in ("train", "test") for row in real(f"gsm8k/{split}")]
    assert len(solutions) == 8792
    answers = [solution.split("#### ")[1] for solution in solutions]
    values = [int(answer.replace(",", "")) for answer in answers]
    for meant, expected in ((answers, True), (map(str, values), True), ((str(value + 1) for value in values), False)):
        assert set(grader.grade_all(solutions, list(meant), [True] * 8792)) == {(expected, True)}


def test_all_math_solutions_are_right():
    """12,498 solutions as prepare.py writes them, each against its own answer; and what the grader takes for the box of
    the original is that answer."""
    answers = math_answers()
    rows = [row for split in ("train", "test") for row in questions.math(DATASETS / "math", split)]
    texts, meant = [row["solutions"][0] for row in rows], [row["answer"] for row in rows]
    assert meant == [*answers.values()] and all(map(grader.askable, meant))
    assert set(grader.grade_all(texts, meant, [True] * len(rows))) == {(True, True)}
    boxes = {f"{split}-{i}": grader.boxed(row["solution"]) for split in ("train", "test") for i, row in enumerate(real(f"math/{split}"))}
    assert {name: " ".join(boxes[name].split()) for name in answers} == answers


UNREADABLE = {"train-6786": r"\phantom in a matrix"}  # for math-verify; right where it is written the same


def check_math(names):
    """Of the answers that take algebra, those that math-verify cannot read; of all, those not recognised when written
    otherwise."""
    answers = math_answers()
    tidy = {name: latex.tidy(answers[name])[0] for name in names}
    asked = [name for name, text in tidy.items()
               if grader.number(text) is None and not (latex.WORDS.fullmatch(text) or latex.BASED.fullmatch(text))]  # fmt: skip
    unreadable = [name for name in asked if algebra.equivalent(tidy[name], tidy[name]) != (True, True)]
    return unreadable, [name for name in names if not grader.grade(f"#### {otherwise(answers[name])}", answers[name])]


def test_math_answers_are_read():
    """Every fiftieth answer. Seen to fail with the rows of a matrix taken for spaces, and with math-verify's own units."""
    assert check_math([*math_answers()][::50]) == ([], [])


@pytest.mark.slow
def test_all_math_answers_are_read():
    assert check_math(math_answers()) == ([*UNREADABLE], [])


def different_answers(step):
    """Pairs of different MATH answers that look alike: neighbours in the alphabet, of those that are not numbers."""
    every = sorted({answer for answer in math_answers().values() if grader.number(latex.tidy(answer)[0]) is None})
    pairs = [(a, b) for a, b in itertools.pairwise(every) if latex.tidy(a) != latex.tidy(b)]
    return pairs[::step]


def test_other_answers_are_wrong():
    """Seen to fail with math-verify's comparison of numbers, which takes 1/2^{98} and 1/2004! for 0."""
    assert [pair for pair in different_answers(40) if grader.compare(*pair)[0]] == []
    assert not grader.grade(r"#### \frac{1}{2004!}", r"\frac{1}{2^{98}}")


@pytest.mark.slow
def test_all_other_answers_are_wrong():
    assert [pair for pair in different_answers(1) if grader.compare(*pair)[0]] == SAME


SAME = [(r"8\sqrt{3}", r"8\sqrt{3} \text { square inches}")]


# ---- whatever a model may write

HARMLESS = {f"{text[:6]!r} x {len(text)}": text for text in (
    "9" * 10**6, "-" + "9" * 10**6, "1/" + "9" * 10**6, "9" * 10**6 + "/7", "1," * 10**6, "1" + ",000" * 10**6, "0." + "0" * 10**6,
    " " * 10**6, "$" * 10**6, "9**9**9**9", "9" + "**9" * 10**5, "{" * 10**6, "\\frac{" * 10**5, "(" * 10**6 + ")" * 10**6,
    "####" * 10**6, "####\n" * 10**5, "#" * (10**6 + 1), "\n" * 10**6, "1 " * 10**6, "\\boxed{" * 10**5, "\\" * 10**6,
)}  # fmt: skip
HARD = {
    "power tower": "9^{9^{9^{9}}}", "stars": "9**9**9**9", "factorials": "((9!)!)!", "factorial": "(10^9)!",
    "nested braces": "{" * 140 + "2" + "}" * 140, "open braces": "{" * 290,
    "unfinished fraction": "\\frac{1}{", "unfinished matrix": "\\begin{pmatrix} 1 & 2", "unfinished fractions": "\\frac{" * 40,
    "300 digits": "9" * 290 + ".5", "exponent": "1e999999999", "backslashes": "\\" * 299, "null": "\\sqrt{\0}", "controls": "\\\x01\x02",
}  # fmt: skip
HARDER = {
    "power": "2^{1000000000}", "nested parentheses": "(" * 140 + "2" + ")" * 140, "symbol tower": "x^{" * 70 + "x" + "}" * 70,
    "sum": "\\sum_{n=1}^{10^{10}} n^n", "product": "\\prod_{n=1}^{10^9} n", "integral": "\\int_0^1 x^{x^{x}} dx",
    "expansion": "(x+y+z)^{10000}", "identity": "\\operatorname{eye}(100000)", "zeros": "\\operatorname{zeros}(100000,100000)",
    "small": "1E-999999999", "roots": "\\sqrt{" * 40 + "2" + "}" * 40, "bars": "|" * 299, "binomial": "\\binom{10^9}{10^8}",
    "matrix power": "\\begin{pmatrix} x & 2 \\\\ 3 & y \\end{pmatrix}^{300}", "sets": "\\{" * 100, "gamma": "\\Gamma(10^{10})",
    "remainder": "7^{7^{7^7}} \\mod 10", "sines": "\\sin" * 60 + "x", "list": "1," * 148 + "2",
}  # fmt: skip
BOUND = 20  # s: one of processor time and one to start the next worker, ten times over for a busy machine


@pytest.mark.parametrize("name", HARMLESS)
def test_verifier_does_not_hang(name):
    """Seen to fail without the limit on the length: int() of a million digits is an error."""
    began = time.process_time()
    for answer in ("18", EXPRESSION):
        for text in (HARMLESS[name], f"#### {HARMLESS[name]}"):
            assert grader.number(text) is None and not grader.grade_all([text], [answer], [True])[0][0]
    assert not grader.compare(grader.flexible_answer(HARMLESS[name][:10**5]), "17")[0]  # its model had a limit of tokens
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", [*HARD, *(pytest.param(name, marks=pytest.mark.slow) for name in HARDER)])
def test_each_answer_takes_bounded_time(impatient, name):
    """Seen to fail (hang) without the limit on processor time, for the towers. The next answer is graded as ever."""
    assert grader.grade(r"#### \frac{2}{\sqrt{2}}", EXPRESSION)
    algebra.equivalent.cache_clear()
    began = time.perf_counter()
    assert not grader.grade(f"#### {(HARD | HARDER)[name]}", EXPRESSION)
    assert time.perf_counter() - began < BOUND
    assert grader.grade(r"#### \frac{2}{\sqrt{2}}", EXPRESSION)


@pytest.mark.slow
def test_many_hard_answers_in_a_row(uncached):
    """Against references of other kinds; a second time they cost nothing."""
    began, all_of_them = time.perf_counter(), [f"#### {text}" for text in (HARD | HARDER).values()]
    for answer in ("4", "x^2+1", "(1,2)"):
        graded = grader.grade_all(all_of_them, [answer] * len(all_of_them), [True] * len(all_of_them))
        assert not any(correct for correct, _ in graded)
    assert time.perf_counter() - began < 30 * len(all_of_them)
    began = time.perf_counter()
    assert grader.grade_all(all_of_them, ["(1,2)"] * len(all_of_them), [True] * len(all_of_them)) == graded
    assert time.perf_counter() - began < 1


def test_memory_is_bounded(impatient, monkeypatch):
    """A number of 250 MB: the process gives up by itself, before its time. Seen to fail without RLIMIT_AS."""
    monkeypatch.setattr(algebra, "SECONDS", 30)
    monkeypatch.setattr(algebra, "MEMORY", 2**27)
    assert grader.grade(r"#### \frac{2}{\sqrt{2}}", EXPRESSION)
    process = worker().process
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (2**27, 2**27)
    with open(f"/proc/{process.pid}/maps") as maps:
        assert "torch" not in maps.read()
    assert grader.compare("2^{2000000000}", EXPRESSION) == (False, False) and process.wait(20) != -signal.SIGPROF
    assert grader.grade(r"#### \frac{4}{2\sqrt{2}}", EXPRESSION)


@pytest.mark.parametrize("when", ["idle", "working", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced(impatient, when):
    """Seen to fail without the second try (a right answer was then wrong)."""
    assert grader.grade(r"#### \frac{2}{\sqrt{2}}", EXPRESSION)
    algebra.equivalent.cache_clear()
    before = worker().process
    if when == "stopped":  # it hangs without using the processor
        os.kill(before.pid, signal.SIGSTOP)
    if when == "idle":
        before.kill()
        before.wait()
    if when == "working":
        threading.Timer(0.1, before.kill).start()
        assert not grader.grade("#### 9^{9^{9^{9}}}", EXPRESSION)
    assert grader.grade(r"#### \frac{2}{\sqrt{2}}", EXPRESSION)
    assert worker().process.pid != before.pid and before.poll() is not None


def test_one_pair_is_asked_once(uncached, monkeypatch):
    asked, real = [], algebra.Worker.ask
    monkeypatch.setattr(algebra.Worker, "ask", lambda self, *pair: asked.append(pair) or real(self, *pair))
    texts = [r"#### \sqrt{8}/2", r"so #### \sqrt{8}/2", r"#### \sqrt{3}", "#### \\sqrt{2}", "no answer", r"#### \sqrt{8}/2"]
    graded = grader.grade_all(texts, [EXPRESSION] * 6, [True] * 5 + [False])
    assert [correct for correct, _ in graded] == [True, True, False, True, False, False]
    assert sorted(asked) == [(r"\sqrt{3}", EXPRESSION), (r"\sqrt{8}/2", EXPRESSION)]


def test_a_worker_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        algebra.Worker().ask("1", "1")


def test_the_worker_ends_with_its_parent():
    code = "from data import algebra, grader, latex; grader.compare('x', 'y'); print(algebra.idle(__import__('os').getpid()).queue[-1].process.pid)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    deadline = time.time() + 10
    while os.path.exists(f"/proc/{child.stdout.strip()}") and time.time() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child.stdout.strip()}")


RUN = [
    "open({path!r}, 'w').close() or 18", "__import__('pathlib').Path({path!r}).touch() or 18", "int('18')", "eval('18')",
    r"\text{{__import__('pathlib').Path({path!r}).touch()}}", r"x_{{__import__('pathlib').Path({path!r}).touch()}}",
    r"\operatorname{{__import__('pathlib').Path({path!r}).touch}}(1)", r"\mathrm{{open({path!r}, 'w')}}", r"[open({path!r}, 'w')]",
    r"\frac{{d}}{{dx}} open({path!r}, 'w')", r"\sum_{{open({path!r}, 'w')=1}}^{{3}} 1",
    r"\begin{{pmatrix}} open({path!r}, 'w') \end{{pmatrix}}", r"\immediate\write18{{touch {path}}}", r"\input{{|touch {path}}}",
]  # fmt: skip


@pytest.mark.parametrize("text", RUN)
def test_verifier_does_not_run_what_the_model_wrote(uncached, tmp_path, text):
    """Seen to fail with eval() in number()."""
    made = tmp_path / "made"
    for answer in ("18", EXPRESSION, r"\text{even}", "x"):
        assert not grader.grade(f"#### {text.format(path=str(made))}", answer)
    assert not made.exists()


def test_the_worker_runs_no_code(tmp_path):
    """sympy reads a text with eval; the audit hook of the worker lets only numbers and symbols through. Seen to fail without it."""
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
    assert done.returncode == 0 and not made.exists(), done.stderr


@pytest.mark.slow
def test_each_rank_has_its_worker(tmp_path):
    """Under torchrun with gloo and its threads; the worker ends with its rank."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from data import algebra, grader, latex
dist.init_process_group("gloo")
assert grader.grade("#### \\\\frac{{2}}{{\\\\sqrt{{2}}}}", "\\\\sqrt{{2}}") and not grader.grade("#### 9^{{9^{{9^9}}}}", "\\\\sqrt{{2}}")
pids = [None, None]
dist.all_gather_object(pids, algebra.idle(os.getpid()).queue[-1].process.pid)
assert len(set(pids)) == 2
if dist.get_rank() == 0:
    print("workers", *pids)
dist.destroy_process_group()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    time.sleep(1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in re.findall(r"\d+", done.stdout))
