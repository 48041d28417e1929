r"""Answers that are not plain numbers: LaTeX, words, units, numbers in another base.

Here an answer is brought into one form, and what can be decided by the text is decided. What takes
algebra goes to data/algebra.py.
"""

import functools
import re

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
