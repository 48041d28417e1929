"""What a text is known by: which split it falls into, and whether it is also in a test set."""

import hashlib
import re

from data import problems

GRAM = 13  # words in a row that make two texts overlap (Brown et al. 2020, appendix C)


def draw(seed, text):
    """A number in [0, 1) that depends on nothing but the seed and the text."""
    digest = hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def words(text):
    """A text without case, punctuation and spacing, to find it again in another set."""
    return " ".join(re.findall(r"\w+", text.lower()))


def grams(text):
    """Its runs of 13 words, as tuples; a shorter text has none."""
    found = words(text).split()
    return zip(*(found[start:] for start in range(GRAM)), strict=False)


def test_grams(folders):
    """{13 words: [numbers of the test questions that have them]}, and how many questions there are.

    folders: of questions, with a test split.
    """
    index = {}
    questions = [row["question"] for folder in folders for row in problems.load(folder, "test")]
    for number, question in enumerate(questions):
        for gram in grams(question):
            index.setdefault(gram, []).append(number)
    return index, len(questions)
