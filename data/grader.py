r"""One grader for reward, validation and test: what a text says after its last #### against the reference answer.

It sees nothing else, never the prompt. Numbers are compared exactly, here; so are words and numbers in another base.
What takes algebra goes to the math-verify library, in a process of its own that may be killed: this file run as a
script. It imports neither torch nor anything of ours, so that process is small and nothing is forked.
"""

import collections
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from fractions import Fraction
from multiprocessing.connection import wait

ENDING = "####"
LONGEST = 300  # characters of an answer that is looked at; the longest of MATH has 159
SECONDS, MEMORY = 2, 2**30  # processor time and bytes for one comparison; on MATH answers the most were 0.6 s and 0.1 GB
# an optional sign and $ in either order, digits that may be grouped by commas, decimals, a denominator, % and a stop
NUMBER = re.compile(r"(?:(-?|\+)\$?|\$(-))(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?(?:/(\d+))?%?\.?", re.ASCII)
FRACTION = re.compile(r"([-+]?)\\[dtc]?frac\{(-?\d+)\}\{(\d+)\}", re.ASCII)
LAST_NUMBER = re.compile(r"(?:(?<![\w)}])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?%?", re.ASCII)
TIDY = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=\d)(?:,\\!|\{,\}) ?(?=\d{3})", ""),  # thousands
    (r"\\!|\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?=[()\[\]|])", ""),
    (r"(\\\\)|(?:\\[,;: ]|\\q?quad\b|~|\s)+", r"\1 "),  # spaces, but not the rows of a matrix
    (r"(?<!\w) | (?!\w)", ""),
    (r"\^(?:\\circ\b|\{\\circ\})|°|^\\approx\b", ""),  # degrees are understood
    (r"\\%", "%"),
    ("−", "-"),
    (r"\\(?:mbox|text(?:normal|rm|bf|it)|math(?:rm|bf|it))\b", r"\\text"),
    (r"\\[dt]?frac\\pi ?(\d)", r"\\frac{\\pi}{\1}"),  # math-verify cannot read it as MATH writes it
)]  # fmt: skip
UNIT = re.compile(r"(?<=[\w})%])\\text\{(?!(?:and|or)\b)(?![ap]\.? ?m)([^{}]*)\}(?:\^\{?\d\}?)?$", re.IGNORECASE)
NAME = re.compile(r"[a-zA-Z]=")
SUM = re.compile(r"(?:[\d .,+*/()-]|\\(?:times|cdot|div)\b)+")
LATEX = re.compile(r"[\\^_{}]")
BASED = re.compile(r"(-?[\dA-F.]*\d[\dA-F.]*)(?:_\{?(\d+)\}?)?")
WORDS = re.compile(r"\d\d?:\d\d|[\d:]*\(?\\text\{[^{}]*\}\)?")  # a time of the day, or text and nothing else


# ---- what a text says


def final_answer(text):
    """What the line says after the last ####, or None."""
    before, ending, after = text.rpartition(ENDING)
    return after.split("\n", 1)[0].strip() if ending else None


def boxed(text):
    r"""What the last \boxed{...} or \fbox{...} holds, or None."""
    *_, start = [None, *re.finditer(r"\\(?:boxed|fbox)\b\s*", text)]
    rest, depth = text[start.end():] if start else "", 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL) if rest[:1] == "{" else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return rest[1:brace.start()].strip()
    return None if rest[:1] in ("", "{", "$") else rest[0]  # \boxed 2, as TeX reads it


def flexible_answer(text):
    """The last box, or else the last number, or None: for a model that never learned the ending."""
    numbers = collections.deque(LAST_NUMBER.finditer(text), maxlen=1)
    return boxed(text) or (numbers[0][0] if numbers else None)


def number(text):
    r"""The exact value of a text that is a number and nothing else, or None.

    Numbers: 18  -5  +5  1,234  3.0  .5  $18.  -$5  20% (= 20)  1/2  \frac{1}{2}. Not numbers: "18 dollars", "1 8", "3 + 4", "1e5",
    "12,34", and whatever is longer than 100 characters, so that a million digits cost nothing. Nothing is evaluated.
    """
    text = text.strip() if text and len(text) <= 100 else ""
    if match := FRACTION.fullmatch(text):
        sign, above, below = match.groups()
        value = Fraction(int(above), int(below)) if int(below) else None
        return -value if value and sign == "-" else value
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, dollar_sign, whole, decimals, denominator = match.groups()
    if not (whole or decimals) or (denominator and not int(denominator)):
        return None
    whole = whole.replace(",", "") or "0"
    value = Fraction(whole + decimals) if decimals else Fraction(int(whole))
    if denominator:
        value /= int(denominator)
    return -value if sign == "-" or dollar_sign else value


def askable(answer):
    """Can a text be graded against this answer? It is one line, not empty, and where it has digits alone, a number."""
    sound = 0 < len(answer.strip()) <= LONGEST and "\n" not in answer.strip() and ENDING not in answer
    return sound and (number(answer) is not None or not re.fullmatch(r"[\d\s.$%/+-]+", answer))


@functools.lru_cache(2**14)
def tidy(text):
    r"""(an answer without what LaTeX adds for the eye, the unit that stood behind it in \text{})"""
    text = boxed(text) or text
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;")
    unit = UNIT.search(text)
    return (text[:unit.start()], unit[1]) if unit else (text, "")


def words(text):
    return sorted({*re.findall(r"[^\W_]+", text.lower().replace(".", ""))} - {"text", "and"})


# ---- is it right


def compare(said, meant):
    """(is the answer `said` the reference `meant`, is it an answer at all). `said` may be None."""
    if not said or len(said) > LONGEST:
        return False, False
    if number(said) is None or number(meant) is None:
        (said, _), (meant, unit) = tidy(said), tidy(meant)
        said = said.removesuffix(unit).rstrip()  # 5 cm for 5\text{ cm}
        if ("=" in said) != ("=" in meant):  # x = 5 for 5, 5 for x = 5
            said, meant = NAME.sub("", said, 1), NAME.sub("", meant, 1)
    value, truth = number(said), number(meant)
    if value is not None and truth is not None:
        if ("%" in said) != ("%" in meant):  # 50% is 50 where per cent are asked for, and 0.5
            return value in (truth, truth * 100 if "%" in said else truth / 100), True
        return value == truth, True
    if said == meant:
        return True, True
    if truth is not None and (SUM.fullmatch(said) or not LATEX.search(said)):
        return False, False  # for a number, no sum is worked out (9 + 9 would be an answer) and no prose is read
    if (prose := WORDS.fullmatch(meant)) or WORDS.fullmatch(said):
        if prose or words(said) == words(meant):
            return words(said) == words(meant), bool(words(said))
    one, other = BASED.fullmatch(said), BASED.fullmatch(meant)
    if one and other and (one[2] or other[2]):  # math-verify overlooks the base; the question says it where one leaves it out
        return one[1] == other[1] and (one[2] or other[2]) == (other[2] or one[2]), True
    return equivalent(said, meant)


def grade(text, answer):
    """Is the final answer of this text the reference `answer`?"""
    return compare(final_answer(text), answer)[0]


def grade_all(texts, answers, ended):
    """[(correct, well-formed)] of a batch. Well-formed: one ending, and an answer that can be read, right or wrong. A text
    that did not end by itself is neither. One and the same pair of answer and reference is compared once."""
    graded = []
    for text, answer, done in zip(texts, answers, ended, strict=True):
        correct, readable = compare(final_answer(text), answer) if done else (False, False)
        graded.append((correct, readable and text.count(ENDING) == 1))
    return graded


def reward(correct, formatted, format_reward):
    """1 for a right answer, `format_reward` for a wrong but well-formed one."""
    return 1.0 if correct else float(format_reward) if formatted else 0.0


# ---- algebra, in another process


class Worker:
    """The process that runs `serve`: started when first needed, and again after it died."""

    process = None

    def start(self):
        environment = os.environ | {"PYTHONHASHSEED": "0"}  # sympy orders by hash here and there
        command = [sys.executable, "-P", __file__, str(SECONDS), str(MEMORY)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                                        start_new_session=True)  # fmt: skip
        if self.process.stdout.readline() != "ready\n":
            raise ValueError("the grader's process does not start; pip install -r requirements.txt brings what it needs")

    def ask(self, said, meant):
        """(are they equivalent, can `said` be read). What takes too much time or memory is neither."""
        for _ in range(2):  # again if it died of something else
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([said, meant]) + "\n")
                self.process.stdin.flush()
                if wait([self.process.stdout], 20 * SECONDS) and (line := self.process.stdout.readline()):
                    return line[0] == "1", line[1] == "1"
            except BrokenPipeError:
                pass
            self.process.kill()
            if self.process.wait() == -signal.SIGPROF:  # its time was up
                break
        return False, False


@functools.cache
def worker(process_id):
    return Worker()


@functools.lru_cache(2**16)
def equivalent(said, meant):
    return worker(os.getpid()).ask(said, meant)  # a fork must not write into the pipe of its parent


def no_code(event, arguments):
    """Audit hook. sympy makes its numbers and symbols from text with eval; whatever else it would evaluate is refused."""
    if event == "exec" and sys._getframe(1).f_code.co_name == "eval_expr":
        if not {"Integer", "Float", "Symbol", "E"}.issuperset(arguments[0].co_names):
            raise PermissionError("the grader runs no code")


def serve(seconds, memory):
    """A JSON line [said, meant] in, a line of two digits out: are they equivalent, can `said` be read."""
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, FiniteSet, I, Interval, N, Symbol, Tuple
    from sympy.core.random import seed

    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr
    # without its list of units: it would read 3t as 3 tons, and 3 tons as 3
    config = LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="none"))
    sys.addaudithook(no_code)
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    @functools.lru_cache(2**10)
    def read(text):
        """The whole text as one sympy object. ValueError if it is not one."""
        (found,) = parse(f"${text}$", [config], "no_fallback", "first_match", parsing_timeout=None)
        found = found.xreplace({symbol: I for symbol in found.free_symbols if symbol.name == "i"})
        if isinstance(found, Eq):  # over the reals, x^2 = -1 and 1 = 2 have the same solutions
            complex_ones = {symbol: Symbol(symbol.name) for symbol in found.free_symbols}
            found = Eq(found.lhs.xreplace(complex_ones), found.rhs.xreplace(complex_ones), evaluate=False)
        return found

    def same(said, meant):
        for one, other in ((said, meant), (meant, said)):
            if isinstance(one, FiniteSet) and isinstance(other, Tuple | Interval):
                return False  # 0, 1 is not the point (0, 1), which math-verify takes for an interval
        if isinstance(said, Expr) and isinstance(meant, Expr) and said.is_number and meant.is_number and meant != 0:
            gap = N(said - meant, 30)  # verify() rounds to 15 places, and 2^{-98} would be 2^{-99}
            if gap.is_finite:
                return bool(abs(gap) <= 1e-12 * abs(N(meant)))
        return verify(meant, said, float_rounding=10, allow_set_relation_comp=True, timeout_seconds=None)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then the kernel ends this process, whatever it is in the middle of
        right = readable = False
        try:
            seed(0)
            said, meant = json.loads(line)
            said, readable = read(said), True
            right = same(said, read(meant))
        except MemoryError:
            break  # a new process tries once more
        except Exception:  # of a parser that was given anything at all
            pass
        print(f"{right:d}{readable:d}", file=answers, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
