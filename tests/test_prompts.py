"""Prompts, shots and stop strings: what a base model is shown, and where its answer ends."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from data import files, grader, problems, questions, tokens
from data import toy as toy_world
from eval import Asked, solve
from helpers import DATASETS, call, changed, real, refused
from model import Samples

WORLD = SimpleNamespace(rank=0, size=1, sum=lambda *values: list(values))


FORM = problems.Form()
TOY = problems.Form(toy_world.PROMPT, "")
FEW = dict(n=1, k="1", limit=2, max_new=8, tasks="", device="cpu", compile="false")


class Says:
    """In place of the sampler: the given answers (ids), up to the first of `ends` or to max_new."""

    def __init__(self, *answers):
        self.answers = answers

    def __call__(self, prompts, n, max_new, seeds, ends, temperature, prefix, progress):
        self.prompts = prompts
        self.prefix = prefix
        rows = []
        for ids in self.answers:
            stop = next((place for place, token in enumerate(ids[:max_new]) if token in ends), None)
            rows.append((ids[: max_new if stop is None else stop + 1], stop is None))
        said = {
            "tokens": torch.tensor([row + [0] * (max_new - len(row)) for row, _ in rows]),
            "lengths": torch.tensor([len(row) for row, _ in rows]),
            "truncated": torch.tensor([truncated for _, truncated in rows]),
        }
        others = dict.fromkeys(Samples._fields, torch.zeros(len(rows), max_new))
        return Samples(**others | said)


def solved(enc, *answers, answer="5", max_new=60):
    asked = Asked(enc, FORM, [{"id": "a", "question": "How many?", "answer": answer}])
    return solve(Says(*answers), asked, len(answers), max_new, 0.6, 0, WORLD, ks=(1,))


def by_letters(enc, text):
    """The text in more tokens than needed, as a sampled text may be."""
    return [token for letter in text for token in tokens.encode(enc, letter)]


# ---- stop strings


@pytest.mark.parametrize("before", ["#### 5", "#### 5.", "#### $5$", "#### 5 "])
@pytest.mark.parametrize("between", ["\n\n", "\n", "\n\n\n", " \n\n", "\n\n**", " "])
@pytest.mark.parametrize("split", [tokens.encode, by_letters], ids=["usual", "letters"])
def test_an_answer_ends_where_the_next_question_begins(cl100k, before, between, split):
    """However "Question:" is made of tokens: what follows is not read, and nothing is truncated."""
    text = f" It is 5.\n{before}{between}Question: And now?\nAnswer: It is 6.\n#### 6"
    ids = split(cl100k, text) + [1] * 60
    found = solved(cl100k, ids, max_new=len(ids) - 50)
    assert (found["correct"], found["truncated"]) == ([1], 0)
    assert found["formatted"] == 1 or between == "\n\n**"


def test_the_usual_next_question_stops_the_sampler(cl100k):
    """Its first token is one that the sampler is told of, so nothing is generated in vain."""
    ids = tokens.encode(cl100k, problems.stop_string(FORM))
    for between in ("\n\n", "\n", ".\n\n", " \n\n"):
        assert tokens.encode(cl100k, f"#### 5{between}Question: how")[-3:-1] == ids
    assert [tokens.decode(cl100k, ids[:1]), problems.stop_string(TOY)] == ["Question", " Q :"]


@pytest.mark.parametrize(
    "prompt", ["Q: {}", "The problem: {}", "[INST] {} [/INST]", "<|user|>{}", "\nQ: {}\nA:"]
)
def test_what_answers_have_too_does_not_stop_the_sampler(cl100k, prompt):
    assert problems.stop_tokens(problems.Form(prompt), cl100k) == [cl100k.eot_token]


def test_words_stop_the_sampler(cl100k):
    for form, enc, word in ((FORM, cl100k, "Question"), (TOY, tokens.encoding("toy"), " Q")):
        end, *begin = problems.stop_tokens(form, enc)
        assert end == enc.eot_token and tokens.decode(enc, begin) == word


def test_ended_truncated_and_unfinished_answers(cl100k):
    """Right by itself; right but truncated; the end-of-text id inside; half of the stop string; a
    right answer after the stop.
    """

    def ids(text):
        return tokens.encode(cl100k, text)

    truncated = ids("It is 5.\n#### 5\n") + ids(" and") * 60
    answers = [
        ids("#### 5") + [cl100k.eot_token],
        truncated,
        ids("#### 6") + [cl100k.eot_token] + ids("#### 5"),
        ids("#### 5\n\n") + ids("Quest") + [cl100k.eot_token],
        ids("6\n\nQuestion: x\n#### 5") + [1] * 60,
    ]
    found = solved(cl100k, *answers)
    # the flexible reading finds the truncated one too
    shares = {"truncated": 1 / 5, "formatted": 3 / 5, "flexible@1": 3 / 5}
    assert found["correct"] == [2]
    assert {name: found[name] for name in shares} == pytest.approx(shares)


def test_no_real_solution_has_the_stop_string(cl100k):
    """Else SFT would teach what evaluation cuts off.

    The token "Question" alone, where the sampler stops, is in one of 21,292: "Question 1: no,
    because ...".
    """
    stop = tokens.encode(cl100k, problems.stop_string(FORM))[0]
    texts = {
        f"{name}-{i}": row.get("solution") or row["answer"]
        for name in ("gsm8k/train", "gsm8k/test", "math/train", "math/test")
        for i, row in enumerate(real(name))
    }
    assert len(texts) == 8792 + 12500
    assert not any(problems.until_next_question(FORM, text)[1] for text in texts.values())
    possible = [name for name, text in texts.items() if "Question" in text]
    found = [name for name in possible if stop in tokens.encode(cl100k, texts[name])]
    assert found == ["math/test-3883"]


# ---- the flexible reading


@pytest.mark.parametrize(
    "text, answer, strict, flexible",
    [
        ("It is 5.", "5", 0, 1),
        ("It is 5, not 6.", "5", 0, 0),
        ("#### 5", "5", 1, 1),
        ("#### 5\nThat is 6 less one.", "5", 1, 1),
        (r"So $\boxed{\frac{\sqrt{2}}{2}}$ is 3 times it.", r"\frac{1}{\sqrt{2}}", 0, 1),
        (r"\boxed{5} is right, #### 6", "6", 1, 1),
        (r"\boxed{5} is right, #### 6", "5", 0, 1),
        ("It has no number.", "5", 0, 0),
    ],
)
def test_flexible_is_beside_the_strict_reading(cl100k, text, answer, strict, flexible):
    """It finds an answer in any form, never less than the strict one, which alone is the reward."""
    found = solved(cl100k, tokens.encode(cl100k, text) + [cl100k.eot_token], answer=answer)
    assert (found["correct"], found["pass@1"], found["flexible@1"]) == ([strict], strict, flexible)
    assert grader.grade_all([text], [answer], [True])[0][0] == bool(strict)


# ---- shots


def test_shots_of_the_papers_end_in_the_one_ending(cl100k):
    """Of Wei et al. and of Minerva: each is right for the grader, without its old ending."""
    for file, count, answers in (
        ("gsm8k_cot_8shot", 8, ["6", "5", "39", "8", "9", "29", "33", "8"]),
        ("minerva_math_4shot", 4, ["[2,5)", "24", "16", r"-\frac{2}{3}"]),
    ):
        rows = questions.shots(DATASETS / f"few_shot/{file}.json")
        texts = [row["solutions"][0] for row in rows]
        assert [row["answer"] for row in rows] == answers and len(rows) == count
        assert grader.grade_all(texts, answers, [True] * count) == [(True, True)] * count
        for word in ("answer is", "I hope", "Final", "boxed"):
            assert not any(word in text for text in texts)
        shown = problems.few_shot(FORM, rows)
        for part in ("Question: ", "\nAnswer: ", f"\n{grader.ENDING} "):
            assert shown.count(part) == count
        assert shown.endswith(f"\n#### {answers[-1]}\n\n")
        assert not any(problems.until_next_question(FORM, text)[1] for text in texts)


def test_the_prompt_of_the_paper(cl100k):
    shot = {"question": "How many?", "solutions": ["It is 6.\n#### 6"]}
    text = problems.few_shot(FORM, [shot, shot]) + problems.prompt(FORM, "And now?")
    shown = "Question: How many?\nAnswer: It is 6.\n#### 6\n\n"
    assert text == shown + shown + "Question: And now?\nAnswer:"
    sampler = Says(tokens.encode(cl100k, " 7"))
    row = {"id": "a", "question": "And now?", "answer": "7"}
    asked = Asked(cl100k, FORM, [row], [shot, shot])
    solve(sampler, asked, 1, 4, 0.6, 0, WORLD, ks=(1,))
    assert tokens.decode(cl100k, [*sampler.prefix, *sampler.prompts[0]]) == text


def test_a_base_gets_as_many_shots_as_there_are(world, tmp_path, capsys):
    """MATH has four. What was asked for is not lowered."""
    easy = tmp_path / "easy"
    results = tmp_path / "results"
    shutil.copytree(world.data / "easy", easy)
    files.write_rows(easy / "shots.jsonl", problems.load(world.data / "easy", "shots")[:1])
    how = dict(questions=easy, results=results, **FEW)

    def measured(name):
        rows = [row for row in files.read_rows(results / f"{name}.jsonl") if row["kind"] == "pass"]
        assert all(0 <= row["pass@1"] <= row["flexible@1"] <= 1 for row in rows)
        return [row["shots"] for row in rows]

    base = changed(world.base, tmp_path / "base.pt", meta=lambda meta: meta | {"length": 512})
    call("eval", base, **how)
    assert measured("base") == [1, 0]
    assert "--shots" in refused(capsys, "eval", base, shots=8, **how)
    (easy / "shots.jsonl").unlink()  # needed by none
    call("eval", world.taught, **how)
    assert measured("taught") == [0]


def test_shots_leave_room_for_the_question(world, tmp_path):
    """Where rows of the text are as long as the context: eight shots and an answer fill it."""
    folder = world.data / "easy"
    base = changed(world.base, tmp_path / "base.pt", meta=lambda meta: meta | {"length": 512})
    asked = Asked(tokens.encoding("toy"), problems.form(folder), [], problems.load(folder, "shots"))
    eight = len(asked._replace(shots=asked.shots[:8]).prefix)
    few = FEW | dict(max_new=512 - eight)
    call("eval", base, questions=folder, results=tmp_path, **few)
    rows = [row for row in files.read_rows(tmp_path / "base.jsonl") if row["kind"] == "pass"]
    assert [row["shots"] for row in rows] == [6, 0]
