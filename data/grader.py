"""One grader for reward, validation and test: is what a text says after its last #### the answer?

The grader sees the end of an answer and the reference, never the prompt. Numbers are compared
exactly, here; LaTeX and words are read in data/latex.py, and what takes algebra is compared by
data/algebra.py in processes of its own. Nothing that a model wrote is executed.
"""

import collections
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from data import algebra, latex, own_reward
from data.latex import boxed

ENDING = "####"
LONGEST = 300  # characters of an answer that are looked at; the longest answer of MATH has 159
NUMBER = re.compile(
    r"(?:(-?|\+)\$?|\$(-))"  # a sign and a dollar, in either order
    r"(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?"  # digits that may be grouped by commas, and decimals
    r"(?:e([-+]?\d{1,2}))?"  # a power of ten
    r"(?:/(\d+))?%?\.?",  # a denominator, per cent, a full stop
    re.ASCII,
)
FRACTION = re.compile(r"([-+]?)(\d*)\\[dtc]?frac\{(-?\d+)\}\{(\d+)\}", re.ASCII)
LAST_NUMBER = re.compile(
    r"(?:(?<![\w)}])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?%?", re.ASCII
)


# ---- what a text says


def final_answer(text):
    """What the line says after the last ####, or None."""
    _, ending, after = text.rpartition(ENDING)
    return after.split("\n", 1)[0].strip() if ending else None


def flexible_answer(text):
    """The last box, or else the last number, or None: for a model that never learned the ending."""
    numbers = collections.deque(LAST_NUMBER.finditer(text), maxlen=1)
    return boxed(text) or (numbers[0][0] if numbers else None)


def number(text):
    r"""The exact value (Fraction) of a text that is a number and nothing else, or None.

    Numbers: 18  -5  +5  1,234  3.0  .5  $18.  -$5  20% (= 20)  1e5  1/2  \frac{1}{2}  3 1/2
    Not numbers: "18 dollars", "1 8", "3 + 4", "12,34", and whatever is longer than 100
    characters, so that a million digits cost nothing. Nothing is evaluated.
    """
    text = latex.mixed(text.strip()) if text and len(text) <= 100 else ""
    if match := FRACTION.fullmatch(text):
        sign, whole, above, below = match.groups()
        if not int(below) or (whole and not 0 < int(above) < int(below)):
            return None
        value = int(whole or 0) + Fraction(int(above), int(below))
        return -value if sign == "-" else value
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, dollar_sign, whole, decimals, exponent, denominator = match.groups()
    if not (whole or decimals) or (denominator and not int(denominator)):
        return None
    value = Fraction(whole.replace(",", "") + (decimals or ""))
    value *= Fraction(10) ** int(exponent or 0)
    value /= int(denominator or 1)
    return -value if sign == "-" or dollar_sign else value


def askable(answer):
    """Can a text be graded against this answer?

    An answer is one line, not empty, without ####; one of digits and signs alone is a number.
    """
    line = answer.strip()
    if not 0 < len(line) <= LONGEST or "\n" in line or ENDING in line:
        return False
    return number(line) is not None or not re.fullmatch(r"[\d\s.$%/+-]+", line)


# ---- is it right


def judge(said, meant):
    """((correct, readable), None), or (None, the two texts) where only algebra can tell."""
    if not said or len(said) > LONGEST:
        return (False, False), None
    if number(said) is None or number(meant) is None:
        said, meant = latex.normal(said, meant)
    truth = number(meant)
    if truth is None:
        truth = number(latex.counted(meant))  # 18 dollars
    value = number(said)
    if value is None and truth is not None:
        value = number(latex.counted(said))
    if value is not None and truth is not None:
        if ("%" in said) == ("%" in meant):
            return (value == truth, True), None
        # 50% is 50 where per cent are asked for, and 0.5
        return (value in (truth, truth * 100 if "%" in said else truth / 100), True), None
    if said == meant:
        return (True, True), None
    if truth is not None and latex.is_left_to_the_grader(said):
        return (False, False), None
    marks = (
        latex.compare_words(said, meant)
        or latex.compare_bases(said, meant)
        or latex.refuse(said, meant)
    )
    return (marks, None) if marks else (None, (said, meant))


def compare_all(pairs):
    """[(is `said` the reference `meant`, can it be read as an answer)] of pairs (said, meant).

    `said` may be None. Equal pairs are judged once; those that take algebra, by several processes
    at a time, with the results that one process gives.
    """
    judged = {pair: judge(*pair) for pair in dict.fromkeys(pairs)}
    questions = list(dict.fromkeys(question for _, question in judged.values() if question))
    solved = dict(zip(questions, algebra.equivalent_all(questions), strict=True))
    return [judged[pair][0] or solved[judged[pair][1]] for pair in pairs]


def grade_all(texts, answers, ended):
    """[(correct, well_formed)] of a batch of texts and their reference answers.

    Well-formed: one ending, and an answer that can be read, right or wrong. A text that did not
    end by itself (`ended` is false) is neither.
    """
    said = [final_answer(text) if done else None for text, done in zip(texts, ended, strict=True)]
    marks = compare_all(list(zip(said, answers, strict=True)))
    return [
        (correct, readable and text.count(ENDING) == 1)
        for text, (correct, readable) in zip(texts, marks, strict=True)
    ]


def reward(correct, well_formed, format_reward):
    """1 for a right answer, `format_reward` for a wrong but well-formed one, else 0."""
    if correct:
        return 1.0
    return float(format_reward) if well_formed else 0.0


# ---- a reward of one's own


def own_worker(path):
    """A worker (algebra.one_of) for the function reward(question, answer, text) of a file."""
    if not Path(path).is_file():
        raise ValueError(f"--reward {path}: there is no such file")
    return algebra.one_of(own_reward.__file__, str(Path(path).resolve()))


def check_own_reward(path):
    """Raises ValueError, with the line at fault, for a file that has no reward function."""
    with own_worker(path) as worker:
        if worker.process is None:
            worker.start()


def own_reward_of(path, question, answer, text):
    """The reward of one text; None if it takes more than algebra.SECONDS of processor time, or
    five times as long on the clock. An error in the file is a ValueError with the line at fault."""
    with own_worker(path) as worker:
        line = worker.line([question, answer, text], tries=1, patience=5)
        ended = worker.process.returncode
    if not line and ended not in (-signal.SIGPROF, -signal.SIGKILL):
        raise ValueError(f"{path}: its process ended ({ended}) on the text {text[:60]!r}")
    said = json.loads(line) if line else {"reward": None}
    if "error" in said:
        raise ValueError(f"{said['error']} (in the reward of the text {text[:60]!r})")
    return said["reward"]


def own_rewards(path, asked):
    """[own_reward_of(path, ...)] of [(question, answer, text)]; equal ones are asked once."""
    different = list(dict.fromkeys(asked))
    with ThreadPoolExecutor(algebra.worker_count()) as threads:  # each waits for a worker's answer
        found = list(threads.map(lambda each: own_reward_of(path, *each), different))
    found = dict(zip(different, found, strict=True))
    return [found[each] for each in asked]
