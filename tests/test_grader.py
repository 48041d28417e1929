"""The grader: right on every GSM8K solution, exact, in bounded time, and blind to everything but the answer."""

import gzip
import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest

from data import problems, tokens

DATASETS = Path(os.environ.get("RL_EXCURSIONS_DATASETS", Path(__file__).parents[2] / "shared" / "datasets"))

NUMBERS = {
    "18": 18, " 18 ": 18, "-5": -5, "+5": 5, "007": 7, "1,234": 1234, "1,234,567.50": Fraction(2469135, 2), "3.0": 3,
    "3.": 3, ".5": Fraction(1, 2), "-.5": Fraction(-1, 2), "$18": 18, "$18.": 18, "$18.00": 18, "-$5": -5, "$-5": -5,
    "20%": 20, "1/2": Fraction(1, 2), "-6/4": Fraction(-3, 2), "9007199254740993": 9007199254740993,
}
NOT_NUMBERS = [
    "", " ", ".", "-", "$", "%", "/2", "18 dollars", "about 18", "1 8", "18 19", "12,34", "1,2345", ",234",
    "1,23,456", "1/0", "1/2/3", "1e5", "0x10", "3 + 4", "9**9", "--5", "-$-5", "1_000", "inf", "nan", "x = 3", "18 #",
    "\u0661\u0668", "\u00b2", "1.2.3",
]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_exactly(text):
    """Seen to fail with float() in place of Fraction()."""
    assert problems.number(text) == NUMBERS[text]
    assert type(problems.number(text)) is Fraction
    assert problems.grade(f"so it is #### {text}", text)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_text_that_is_no_number_is_none(text):
    """Seen to fail with match() in place of fullmatch(), and without re.ASCII."""
    assert problems.number(text) is None
    assert not problems.grade(f"#### {text}", "18") and not problems.well_formed(f"#### {text}")


def test_exact_where_floats_are_equal():
    """Seen to fail with float() in place of Fraction()."""
    assert not problems.grade("#### 9007199254740992", "9007199254740993")
    assert not problems.grade("#### 0.30000000000000000001", "0.3")
    assert problems.grade("#### 0.50", "1/2") and problems.grade("#### 1234", "1,234")


def test_last_ending_counts():
    """Seen to fail with partition() in place of rpartition()."""
    assert problems.final_answer("#### 5 no , #### 18") == "18"
    assert problems.final_answer("a #### 18 \nand more") == "18"
    assert problems.final_answer("18") is None and problems.final_answer("18 ####") == ""
    assert not problems.grade("#### 18 no , #### 5", "18")
    assert not problems.well_formed("#### 5 no , #### 18")  # two endings


def test_reward_of_right_wrong_and_cut_answers():
    """Seen to fail with `ended` ignored: a right number in an answer that was cut then earned the reward."""
    assert problems.reward("9 * 2 = 18 . #### 18", "18", True, 0.1) == 1
    assert problems.reward("9 * 2 = 17 . #### 17", "18", True, 0.1) == 0.1
    assert problems.reward("9 * 2 = 17 . #### 17", "18", True, 0.0) == 0
    assert problems.reward("9 * 2 = 18 . #### 18", "18", False, 0.1) == 0
    assert problems.reward("#### 17 #### 17", "18", True, 0.1) == 0
    assert problems.reward("it is 18", "18", True, 0.1) == 0
    assert problems.reward("", "18", True, 0.1) == 0


def test_reward_does_not_read_the_prompt():
    """What a batch marks as the answer is all that is graded, though the shots before it say `#### 18`.

    Seen to fail with a mask that starts at the first token."""
    enc = tokens.encoding("toy")
    shot = {"question": "sam has 9 apples . how many now ?", "solutions": ["9 + 9 = 18 . #### 18"]}
    start = problems.few_shot("toy", [shot]) + problems.prompt("toy", "ann has 6 apples . how many now ?")
    batch = problems.make_batch([tokens.encode(enc, start)], [tokens.encode(enc, " that is all .")], [1.0], 0)
    assert problems.grade(tokens.decode(enc, batch.ids[0]).replace(" A : that", " that"), "18") is False
    graded = tokens.decode(enc, batch.ids[:, 1:][batch.mask])
    assert graded == " that is all ." and problems.reward(graded, "18", True, 0.1) == 0


@pytest.mark.parametrize("text", [
    "9" * 10**6, "-" + "9" * 10**6, "1/" + "9" * 10**6, "9" * 10**6 + "/7", "1," * 10**6, "1" + ",000" * 10**6,
    "0." + "0" * 10**6, " " * 10**6, "$" * 10**6, "9**9**9**9", "9" + "**9" * 10**5, "{" * 10**6,
    "\\frac{" * 10**5, "(" * 10**6 + ")" * 10**6,
    "####" * 10**6, "####\n" * 10**5, "#" * (10**6 + 1), "\n" * 10**6, "1 " * 10**6,
], ids=lambda text: f"{text[:8]!r}x{len(text)}")
def test_verifier_does_not_hang(text):
    """Seen to fail without the limit on the length: int() of a million digits is an error."""
    start = time.perf_counter()
    for answer in (text, f"#### {text}"):
        assert problems.reward(answer, "18", True, 0.1) == 0
    assert time.perf_counter() - start < 0.5


def test_verifier_does_not_run_what_the_model_wrote(tmp_path):
    """Seen to fail with eval() in number()."""
    made = tmp_path / "made"
    assert not problems.grade(f"#### open({str(made)!r}, 'w').close() or 18", "18")
    assert not problems.grade(f"#### __import__('pathlib').Path({str(made)!r}).touch() or 18", "18")
    assert not problems.grade("#### 9 + 9", "18") and not problems.grade("#### int('18')", "18")
    assert not made.exists()


def test_all_gsm8k_reference_solutions_are_right():
    """7,473 + 1,319 solutions against their own answers, and against an answer that is off by one.

    Seen to fail with commas left in place, and with the number read up to its first comma."""
    if not (DATASETS / "gsm8k").is_dir():
        pytest.skip(f"no GSM8K in {DATASETS}; set RL_EXCURSIONS_DATASETS to a folder that has gsm8k/")
    solutions = [json.loads(line)["answer"] for split in ("train", "test")
                 for line in gzip.open(DATASETS / "gsm8k" / f"{split}.jsonl.gz", "rt", encoding="utf-8")]
    assert len(solutions) == 8792
    for solution in solutions:
        answer = solution.split("#### ")[1]
        value = int(answer.replace(",", ""))
        assert problems.grade(solution, answer) and problems.grade(solution, str(value)), solution
        assert problems.well_formed(solution)
        assert not problems.grade(solution, str(value + 1)), solution
