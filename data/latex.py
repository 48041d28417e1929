r"""Answers that are not plain numbers: LaTeX, words, units, numbers in another base.

What can be decided by the text is decided here. What takes algebra goes to the math-verify library
in a process of its own, which may be killed: this file, run as a script. So the file imports
neither torch nor anything of ours, that process is small, and nothing is forked.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing.connection import wait

SECONDS = 2  # of processor time for one comparison; the most on answers of MATH was 0.6
MEMORY = 2**30  # bytes for one comparison; the most on answers of MATH was 0.1 GB
TIDY = [
    (r"(?<=\d)(?:,\\!|\{,\}) ?(?=\d{3})", ""),  # thousands
    (r"\\!|\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?=[()\[\]|])", ""),
    (r"(\\\\)|(?:\\[,;: ]|\\q?quad\b|~|\s)+", r"\1 "),  # spaces, but not the rows of a matrix
    (r"(?<!\w) | (?!\w)", ""),
    (r"\^(?:\\circ\b|\{\\circ\})|°|^\\approx\b", ""),  # degrees are understood
    (r"\\%", "%"),
    ("−", "-"),
    (r"\\(?:mbox|text(?:normal|rm|bf|it)|math(?:rm|bf|it))\b", r"\\text"),
    (r"\\[dt]?frac\\pi ?(\d)", r"\\frac{\\pi}{\1}"),  # math-verify cannot read it as MATH writes it
]
TIDY = [(re.compile(pattern), new) for pattern, new in TIDY]
UNIT = re.compile(  # behind a number or a bracket, but "and", "or", a.m. and p.m. are no units
    r"(?<=[\w})%])\\text\{(?!(?:and|or)\b)(?![ap]\.? ?m)([^{}]*)\}(?:\^\{?\d\}?)?$", re.IGNORECASE
)
NAME = re.compile(r"[a-zA-Z]=")
SUM = re.compile(r"(?:[\d .,+*/()-]|\\(?:times|cdot|div)\b)+")
LATEX = re.compile(r"[\\^_{}]")
BASED = re.compile(r"(-?[\dA-F.]*\d[\dA-F.]*)(?:_\{?(\d+)\}?)?")
WORDS = re.compile(  # a time of the day, or text and nothing else
    r"\d\d?:\d\d|[\d:]*\(?\\text\{[^{}]*\}\)?"
)


# ---- by the text


def boxed(text):
    r"""What the last \boxed{...} or \fbox{...} holds, or None."""
    *_, start = [None, *re.finditer(r"\\(?:boxed|fbox)\b\s*", text)]
    rest = text[start.end() :] if start else ""
    if rest[:1] in ("", "$"):
        return None
    if rest[0] != "{":
        return rest[0]  # \boxed 2, as TeX reads it
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return None


@functools.lru_cache(2**14)
def tidy(text):
    r"""(an answer without what LaTeX adds for the eye, the unit that stood behind it in \text{})"""
    text = boxed(text) or text
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;")
    unit = UNIT.search(text)
    return (text[: unit.start()], unit[1]) if unit else (text, "")


def normal(said, meant):
    """Both answers tidied, without units, and without x = where one of them alone has it."""
    said, _ = tidy(said)
    meant, unit = tidy(meant)
    said = said.removesuffix(unit).rstrip()  # 5 cm for 5\text{ cm}
    if ("=" in said) != ("=" in meant):  # x = 5 for 5, 5 for x = 5
        said = NAME.sub("", said, count=1)
        meant = NAME.sub("", meant, count=1)
    return said, meant


def is_left_to_the_grader(said):
    """For a number, no sum is worked out (9 + 9 would be an answer to 18) and no prose is read."""
    return bool(SUM.fullmatch(said)) or not LATEX.search(said)


def words(text):
    return sorted({*re.findall(r"[^\W_]+", text.lower().replace(".", ""))} - {"text", "and"})


def compare_words(said, meant):
    """(equal, readable) where the words of the two texts decide, else None."""
    prose = WORDS.fullmatch(meant)
    if not prose and not WORDS.fullmatch(said):
        return None
    equal = words(said) == words(meant)
    return (equal, bool(words(said))) if prose or equal else None


def compare_bases(said, meant):
    """(equal, readable) of numbers with a base, else None. math-verify overlooks the base.

    Where one of the two leaves its base out, the question says it.
    """
    one = BASED.fullmatch(said)
    other = BASED.fullmatch(meant)
    if not (one and other and (one[2] or other[2])):
        return None
    return one[1] == other[1] and (one[2] or other[2]) == (other[2] or one[2]), True


# ---- by algebra, in another process


class Worker:
    """The process that runs `serve`: started when first needed, and again after it died."""

    process = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders by hash here and there
            start_new_session=True,
        )
        if self.process.stdout.readline() != "ready\n":
            raise ValueError(
                "the grader's process does not start; "
                "pip install -r requirements.txt brings what it needs"
            )

    def ask(self, said, meant):
        """(are they equivalent, can `said` be read). What takes too long or too much is neither."""
        for _ in range(2):  # again if it died of something else
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([said, meant]) + "\n")
                self.process.stdin.flush()
                if wait([self.process.stdout], 20 * SECONDS) and (
                    line := self.process.stdout.readline()
                ):
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
    return worker(os.getpid()).ask(said, meant)  # a fork must not write into its parent's pipe


def no_code(event, arguments):
    """Audit hook. sympy makes its numbers and symbols with eval; nothing else is evaluated."""
    if event == "exec" and sys._getframe(1).f_code.co_name == "eval_expr":
        if not {"Integer", "Float", "Symbol", "E"}.issuperset(arguments[0].co_names):
            raise PermissionError("the grader runs no code")


def serve(seconds, memory):
    """A JSON line [said, meant] in, a line of two digits out: are they equal, is `said` readable."""
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, FiniteSet, I, Interval, N, Symbol, Tuple
    from sympy.core.random import seed

    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr
    # without its list of units: it would read 3t as 3 tons, and 3 tons as 3
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    )
    sys.addaudithook(no_code)
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    @functools.lru_cache(2**10)
    def read(text):
        """The whole text as one sympy object. ValueError if it is not one."""
        (found,) = parse(f"${text}$", [config], "no_fallback", "first_match", parsing_timeout=None)
        found = found.xreplace({symbol: I for symbol in found.free_symbols if symbol.name == "i"})
        if isinstance(found, Eq):  # over the reals, x^2 = -1 and 1 = 2 have the same solutions
            free = {symbol: Symbol(symbol.name) for symbol in found.free_symbols}
            found = Eq(found.lhs.xreplace(free), found.rhs.xreplace(free), evaluate=False)
        return found

    def same(said, meant):
        for one, other in ((said, meant), (meant, said)):
            if isinstance(one, FiniteSet) and isinstance(other, Tuple | Interval):
                return (
                    False  # 0, 1 is not the point (0, 1), which math-verify takes for an interval
                )
        both = isinstance(said, Expr) and isinstance(meant, Expr)
        if both and said.is_number and meant.is_number and meant != 0:
            gap = N(said - meant, 30)  # verify() rounds to 15 places, and 2^{-98} would be 2^{-99}
            if gap.is_finite:
                return bool(abs(gap) <= 1e-12 * abs(N(meant)))
        return verify(
            meant, said, float_rounding=10, allow_set_relation_comp=True, timeout_seconds=None
        )

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # at the end of the time the kernel ends this process, whatever it is in the middle of
        signal.setitimer(signal.ITIMER_PROF, seconds)
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
