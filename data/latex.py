r"""Answers that are not plain numbers: LaTeX, words, units, numbers in another base.

Here an answer is brought into one form, and what can be decided by the text is decided. What takes
algebra goes to data/algebra.py. The rules by example: tests/grader_table.tsv.
"""

import functools
import re
import unicodedata


def usual(text):
    """Characters of full width, raised, lowered or drawn as one, in the usual ones."""
    return unicodedata.normalize("NFKC", text)


TYPED = {  # what is typed without LaTeX
    "−": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "π": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
}
TYPED |= {chr(code): usual(chr(code)) for code in range(0xFF01, 0xFF5F)}  # full width
for half in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
    TYPED[half] = r"\frac{" + usual(half).replace("\N{FRACTION SLASH}", "}{") + "}"
TYPED = str.maketrans(TYPED)
RAISED = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
MIXED = re.compile(r"((?:^|[(\[{,;=<>$])\s*[-+]?\d+) (\d+)/(\d+)(?![\w.^/]| \d)", re.ASCII)
TIDY = [
    # what is typed, not set in LaTeX
    (r"^\s*(\*\*?)([^*]+)\1\.?\s*$", r"\2"),  # bold or italic in Markdown
    (r"(?<!\d)[€£¥₹] ?(?=[-\d.])|(?<=\d) ?[€£¥₹](?!\d)", ""),
    (r"(?<=\d)\\?\$(?=\d)", " "),  # two numbers
    (r" ?\bper ?cent\b", "%"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?:√|(?<![a-zA-Z\\])sqrt) ?\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
    (r"√ ?(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])|\\pi)", r"\\sqrt{\1}"),
    (r"(?<=[)\]}]) ?U ?(?=[(\[{])", r"\\cup "),
    # what LaTeX adds for the eye
    (r"(?<=\d)(?:,\\!|\{,\}) ?(?=\d{3})", ""),  # thousands
    (r"\\!|\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?=[()\[\]|])", ""),
    (r"(\\\\)|(?:\\[,;: ]|\\q?quad\b|~|\s)+", r"\1 "),  # spaces, but not the rows of a matrix
    (r"(?<!\w) | (?!\w)", ""),
    (r"\^(?:\\circ\b|\{\\circ\})|°|^\\approx\b", ""),  # degrees are understood
    (r"\\%", "%"),
    (r"\\(?:mbox|text(?:normal|rm|bf|it)|math(?:rm|bf|it))\b", r"\\text"),
    (r"\\text\{(-?[\d.,]+|[\dA-F]+(?=\}_))\}", r"\1"),  # a number in bold, with its base or without
    (r"\\text\{ ?, ?(and|or) ?\}", r"\\text{\1}"),
    (r"(\\[dtc]?frac) ?(\d) (\d)(?!\d)", r"\1{\2}{\3}"),
    (r"\\[dt]?frac\\pi ?(\d)", r"\\frac{\\pi}{\1}"),  # math-verify cannot read it as MATH writes it
    # what stands around all of it
    (r"^=(?!=)", ""),
    (r"^([-+]?\d*\.?\d+)e([-+]?\d{1,2})$", r"\1\\cdot 10^{\2}"),
    (r"^\(([^()\[\],; ]+)\)$|^([a-zA-Z])\)$", r"\1\2"),  # (5) and A)
]
TIDY = [(re.compile(pattern), new) for pattern, new in TIDY]
UNIT = re.compile(  # behind a number or a bracket, but "and", "or", a.m. and p.m. are no units
    r"(?<=[\w})%])\\text\{(?!(?:and|or)\b)(?![ap]\.? ?m)([^{}]*)\}(?:\^\{?\d\}?)?$", re.IGNORECASE
)
COUNTED = re.compile(  # 18 dollars, 1/2 cup, 60 miles per hour, 15 cm^2
    r"(.*\d(?= )|.*[}%]) ?([a-zA-Z]+(?: [a-zA-Z]+){0,2})(?:\^\{?\d\}?)?"
)
SHORT_UNITS = set(  # words of less than four letters that are no product of unknowns
    """mm cm dm km in ft yd mi sq mg kg lb lbs oz ml hr hrs min sec day men mph kph per the of all
    cup egg box bag car cat dog cow pig hen boy pen toy old new big""".split()
)
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety hundred thousand million billion trillion dozen""".split()
NO_UNITS = set(  # words behind a number that make it another one, or no answer
    """and or to not nor no none than minus plus times over under by divided multiplied squared
    cubed power powers factorial inverse choose mod modulo remainder base repeating recurring
    below above negative positive short less fewer except without approximately about roughly
    almost nearly maybe perhaps false wrong incorrect half halves third thirds quarter quarters
    fifth fifths eighth eighths ninth ninths twelfth twelfths percent double triple twice score
    scores pair pairs couple couples gross grand lakh lakhs crore crores root roots sqrt sine
    cosine tangent sinh cosh tanh sinx cosx tanx alpha beta gamma delta zeta theta lambda sigma
    omega epsilon infinity infinite""".split()
)
NO_UNITS |= {word + ending for word in NUMBER_WORDS for ending in ("", "s", "th", "ths")}
NO_UNITS |= {word[:-1] + ending for word in NUMBER_WORDS for ending in ("ieth", "ieths")}
POWER = re.compile(r"\^\{?\d\}?$")
NAME = re.compile(r"[a-zA-Z]=")
SUM = re.compile(r"(?:[\d .,+*/()-]|\\(?:times|cdot|div)\b)+")
LATEX = re.compile(r"[\\^_{}]")
BASED = re.compile(r"(-?[\dA-F.]*\d[\dA-F.]*)(?:_\{?(\d+)\}?)?")
WORDS = re.compile(  # a time of the day, or text and nothing else
    r"\d\d?:\d\d|[\d:]*\(?\\text\{[^{}]*\}\)?|(?i:yes|no)|[A-Za-z][a-z]{2,}(?: [A-Za-z]+)*"
)
MISREAD = re.compile(  # two numbers side by side, a base, 1.2.3, a prime
    r"(?<![_\d])\d+ (?=[\d.])|\d_|\.\d*\.|'"
)
COMMAND = re.compile(r"\\(?:[a-zA-Z]+(?:\{[A-Z]\})?|.)")


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


def mixed(text):
    r"""3\frac{1}{2} for each 3 1/2, where the fraction is less than 1."""

    def write(match):
        before, above, below = match.groups()
        if int(above) >= int(below):
            return match[0]
        return rf"{before}\frac{{{above}}}{{{below}}}"

    return MIXED.sub(write, text)


def typed(text):
    """An answer that was typed without LaTeX, in LaTeX: 3 1/2, ½, x², (-∞, 3)."""
    text = RAISED.sub(lambda match: f"^{{{usual(match[0])}}}", text)
    text = LOWERED.sub(lambda match: f"_{{{usual(match[0])}}}", text)
    return mixed(text.translate(TYPED))


@functools.lru_cache(2**14)
def tidy(text):
    r"""(an answer without what LaTeX adds for the eye, the unit that stood behind it in \text{})"""
    text = typed(boxed(text) or text)
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;")
    unit = UNIT.search(text)
    return (text[: unit.start()], unit[1]) if unit else (text, "")


def normal(said, meant):
    """Both answers tidied, without units, and without x = where one of them alone has it."""
    said, said_unit = tidy(said)
    meant, unit = tidy(meant)
    if NO_UNITS.intersection(words(said_unit)) and words(said_unit) != words(unit):
        said += rf"\text{{{said_unit}}}"  # 5\text{ million} is not 5
    bare = POWER.sub("", said)
    if unit and bare.endswith(unit.strip()):  # 5 cm^2 for 5\text{ cm}^2
        said = bare.removesuffix(unit.strip()).rstrip()
    if ("=" in said) != ("=" in meant):  # x = 5 for 5, 5 for x = 5
        said = NAME.sub("", said, count=1)
        meant = NAME.sub("", meant, count=1)
    return said, meant


def counted(said):
    """The number where an answer is a number and what is counted, as in 18 dollars, or None."""
    match = COUNTED.fullmatch(said)
    names = match[2].lower().split() if match else ()
    usual = all(len(name) > 3 or name in SHORT_UNITS for name in names)
    return match[1] if match and usual and not NO_UNITS.intersection(names) else None


def is_left_to_the_grader(said):
    """For a number, no sum is worked out (9 + 9 would be an answer to 18) and no prose is read."""
    return bool(SUM.fullmatch(said)) or not LATEX.search(said)


def words(text):
    """The words and numbers of a text in alphabetical order."""
    return sorted({*re.findall(r"[^\W_]+", text.lower().replace(".", ""))} - {"text", "and"})


def signs(text):
    """What stands in a text that is more than words: signs, a minus before it."""
    return set(re.findall(r"^-|[√+*/^_=<>']", text))


def compare_words(said, meant):
    """(equal, readable) where the words of the two texts decide, else None."""
    prose = WORDS.fullmatch(meant)
    if not prose and not WORDS.fullmatch(said):
        return None
    equal = words(said) == words(meant) and signs(said) == signs(meant)
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


def refuse(said, meant):
    """(False, readable) of what math-verify would read as something else, else None.

    It adds numbers that stand side by side (1 8 is 9), overlooks bases and primes, takes a word
    for an unknown, which may cancel out, and does not tell a capital from a small letter.
    """
    if MISREAD.search(said) or MISREAD.search(meant):
        return False, False
    texts = [words("".join(re.findall(r"\\text(\{[^{}]*\})", text))) for text in (said, meant)]
    if not {*texts[0]} <= {*texts[1], "or"}:
        return False, bool(WORDS.fullmatch(said))
    if len(said) > 3 and said.isalpha() and said.lower() == meant.lower():
        return None  # a name
    one = set(COMMAND.sub(" ", said))
    other = set(COMMAND.sub(" ", meant))
    if any(letter.swapcase() in other - one for letter in one - other if letter.isalpha()):
        return False, True
    return None
