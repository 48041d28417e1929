"""Right answers that the grader refuses and wrong ones that it accepts, on GSM8K and MATH.

    RL_DATASETS=FOLDER python tests/bench_grader.py [--solutions FILE] [--every 10] [--show 5]

Each group is a list of (what is said, the reference), and all of it is right or all of it is wrong.
--solutions is `example_model_solutions.jsonl` of github.com/openai/grade-school-math: four models'
solutions to GSM8K's test questions, each with a label.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import grader  # noqa: E402

DATASETS = Path(os.environ.get("RL_DATASETS", ROOT.parent / "shared" / "datasets"))
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
MORE_BEHIND = ["{} 7", "{} 7/9", "{}, 7", "{} or 7", "{}'", "{} x", "{}+7"]
MORE_BEHIND += ["{} dozen", r"{}\text{{ million}}", "{}.7", "{}7", "{} = 7", "{} \\ne 7", "{}.7.7"]
MORE_BEFORE = ["7 {}", "7 1/9 {}", "7, {}", "7 or {}", "7_{}", "x {}", "7+{}", "not {}", "7/{}"]
MORE_BEFORE += ["7{}", "7 \\ne {}", r"\text{{not }} {}", "-7{}", "7^{}", "√{}", "7. {}"]
SAME = {  # neighbours that are right, or a person would say so
    r"\$\dfrac23 \approx \$0.67",  # the exact value stands before
    r"75^\circ, 75^\circ",  # 75^\circ
    r"137.5\text{ degrees}",  # 137 \frac{1}{2}
    "0.20",
    "2.50",
    "37.50",
}
PLAIN = [
    (r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\^\{(\d+)\}", r"^\1"),
    (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\left|\\right|\\!|\\displaystyle", ""),
    (r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}", r"\1"),
    (r"\\sqrt\s*(?:\{(\d+)\}|(\d))", r"√\1\2"),
    (r"\\sqrt\s*\{([^{}\\]*)\}", r"sqrt(\1)"),
    (r"\\infty\b\s*", "∞"),
    (r"\\cup\b", "∪"),
    (r"\\leq?\b", "≤"),
    (r"\\geq?\b", "≥"),
    (r"\\cdot\b", "·"),
    (r"\\times\b", "×"),
    (r"\\pm\b", "±"),
    (r"\\in\b", "∈"),
    (r"\\theta\b", "θ"),
    (r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?", "°"),
    (r"\\pi\b\s*", "pi "),
    (r"(?<=\d)\s*\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2"),
    (r"\\frac\s*(\w)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"^(-?)\\frac\{([\w.,√ ]+?) ?\}\{([\w.,√]+)\}(?=$|°| [a-z])", r"\1\2/\3"),
    (r"\\frac\{([^{}]*?) ?\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\([%${}])", r"\1"),
    (r"\\[,;: ]|\\q?quad\b", " "),
]


def real(name):
    with gzip.open(DATASETS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gsm8k_answers():
    rows = [row for split in ("train", "test") for row in real(f"gsm8k/{split}")]
    return [row["answer"].split("#### ")[1].strip() for row in rows]


def math_answers():
    """The distinct answers of MATH in one line; two rows have none."""
    rows = [row for split in ("train", "test") for row in real(f"math/{split}")]
    return sorted({" ".join(row["answer"].split()) for row in rows} - {""})


def plain(answer):
    """The answer without LaTeX, as a model writes it that was not taught LaTeX; or as it is."""
    for pattern, new in PLAIN:
        answer = re.sub(pattern, new, answer)
    answer = re.sub(r"\^(\d+)", lambda match: match[1].translate(SUPERSCRIPTS), answer)
    return " ".join(answer.split())


def otherwise(answer):
    """The same answer in LaTeX as another hand would write it."""
    answer = re.sub(r"(?<!\\)\\ ", " ", answer).replace(r"\frac", r"\dfrac")
    answer = answer.replace(r"\dfrac{1}", r"\dfrac1")
    if "text" not in answer:
        answer = re.sub(r"(?<!\\right)\)", r"\\right)", answer)
        answer = re.sub(r"(?<!\\left)\(", r"\\left(", answer)
    return f"${answer.replace(' ', chr(92) + ', ')}$."


def next_digit(answer):
    """The answer with its last digit one higher (9 becomes 8), or None."""
    before, digit, after = re.fullmatch(r"(.*?)(\d?)(\D*)", answer, re.DOTALL).groups()
    return f"{before}{int(digit) + 1 if digit != '9' else 8}{after}" if digit else None


def other_sign(answer):
    """The answer with its first sign turned, or None where that may be right as well."""
    if re.search(r"pm|text|mbox|[=<>,;±]|\\[lg]eq?\b|[A-Z]", answer) or answer.strip() == "0":
        return None
    return answer[1:] if answer[0] == "-" and "+" not in answer[1:] else f"-({answer})"


def without_unit(answer):
    """What is left without units and bases: graders do not compare them, the question says them."""
    unit = r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?|\^\{?\\circ\}?|°|_\{?\d+\}?"
    return re.sub(unit + r"|[\s\\$%.,;!]", "", answer)


def different(pairs):
    """Without the pairs that say the same, and those of which this cannot be told in general."""
    return [
        pair
        for pair in pairs
        if without_unit(pair[0]) != without_unit(pair[1]) and pair[1] not in SAME
    ]


def groups(solutions):
    """{name: (all right or all wrong, [(said, reference)])}"""
    made = {}
    school = gsm8k_answers()
    other = [str(int(answer.replace(",", "")) + 1) for answer in school]
    made["GSM8K its own answers"] = True, list(zip(school, school, strict=True))
    made["GSM8K one higher"] = False, list(zip(other, school, strict=True))
    made["GSM8K other answers"] = (
        False,
        [pair for pair in itertools.pairwise(school) if pair[0] != pair[1]],
    )
    marked = ["**{}**", "€{}", "= {}", "{}€", "{}.00", "{} apples", "${}."]
    for name, right, said in (("", True, school), (", one higher", False, other)):
        written = [
            (mark.format(one), answer)
            for (one, answer), mark in zip(
                zip(said, school, strict=True), itertools.cycle(marked), strict=False
            )
        ]
        written += [
            (one.translate(FULL_WIDTH), answer) for one, answer in zip(said, school, strict=True)
        ]
        made[f"GSM8K marked up{name}"] = right, written
    wrong = ["{} dozen", "{} or 0.5", "{}, 0.5", "not {}", "-{}.5", "{} thousand", "{} pi", "{}!"]
    made["GSM8K and more"] = (
        False,
        [
            (mark.format(answer), answer)
            for answer, mark in zip(school, itertools.cycle(wrong), strict=False)
            if answer != "0"
        ],
    )
    for correct in (True, False):
        if solutions:
            name = f"GSM8K models' solutions labelled {'right' if correct else 'wrong'}"
            made[name] = correct, labelled(solutions, correct)
    math = math_answers()
    made["MATH its own answers"] = True, [(answer, answer) for answer in math]
    made["MATH in other LaTeX"] = True, [(otherwise(answer), answer) for answer in math]
    rewritten = [(plain(answer), answer) for answer in math if plain(answer) != answer]
    rewritten = [pair for pair in rewritten if not re.search("matrix|frac", pair[0])]
    made["MATH without LaTeX"] = True, rewritten
    for name, change in (("next digit", next_digit), ("other sign", other_sign)):
        pairs = [(change(answer), answer) for answer in math if change(answer)]
        pairs = different(pairs)
        made[f"MATH {name}"] = False, pairs
        made[f"MATH {name} without LaTeX"] = (
            False,
            [(plain(said), answer) for said, answer in pairs if plain(said) != said],
        )
    neighbours = different(itertools.pairwise(math))
    made["MATH neighbours in the alphabet"] = False, neighbours
    made["MATH neighbours without LaTeX"] = (
        False,
        [(plain(said), answer) for said, answer in neighbours if plain(said) != said],
    )
    for name, marks in (("behind", MORE_BEHIND), ("before", MORE_BEFORE)):
        made[f"MATH and more {name} it"] = (
            False,
            [
                (mark.format(answer), answer)
                for answer, mark in zip(math, itertools.cycle(marks), strict=False)
                if not re.search(r"^[01]|7|^-?\\infty$|text|mbox|= 0$| 0 & 0 .* 0 & 0 ", answer)
            ],
        )
    return made


def labelled(path, correct):
    """(what one of the four models says last, the reference) of the solutions with this label."""
    pairs = []
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            answer = row["ground_truth"].rpartition("A:")[2].strip()
            for solution in row.values():
                if isinstance(solution, dict) and solution["is_correct"] is correct:
                    pairs.append((solution["solution"].rpartition("A:")[2].strip(), answer))
    return pairs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--solutions", help="example_model_solutions.jsonl")
    parser.add_argument("--every", type=int, default=1, help="look at every so many pairs alone")
    parser.add_argument("--show", type=int, default=5, help="mistakes to print, per group")
    parser.add_argument("--out", help="a JSON file for every grade")
    args = parser.parse_args()
    grades = {}
    print(f"{'pairs':>7} {'mistakes':>8} {'seconds':>8}")
    for name, (right, pairs) in groups(args.solutions).items():
        pairs = pairs[:: args.every]
        began = time.perf_counter()
        texts = [f"{grader.ENDING} {said}" for said, _ in pairs]
        marks = grader.grade_all(texts, [meant for _, meant in pairs], [True] * len(pairs))
        seconds = time.perf_counter() - began
        grades[name] = [[*pair, *mark] for pair, mark in zip(pairs, marks, strict=True)]
        wrong = [pair for pair, (correct, _) in zip(pairs, marks, strict=True) if correct != right]
        kind = "refused" if right else "accepted"
        print(f"{len(pairs):7} {len(wrong):8} {seconds:8.1f}  {name}, {kind}", flush=True)
        for said, meant in wrong[: args.show]:
            print(f"{'':26}{said}  for  {meant}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(grades, file)


if __name__ == "__main__":
    main()
