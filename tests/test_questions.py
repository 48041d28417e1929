"""GSM8K, MATH and OpenMathInstruct-1 to questions, on real files and on small ones like them."""

import collections
import json
import random
import subprocess
import sys

import datasets as hub
import pytest
from tqdm import tqdm

from data import prepare, problems, questions
from data.overlap import grams, words
from helpers import DATASETS, ROOT, real

pytestmark = pytest.mark.skipif(
    not DATASETS.is_dir(), reason=f"no {DATASETS}; set RL_DATASETS to the folder of real data"
)


@pytest.fixture(autouse=True)
def cl100k(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def splits_of(folder):
    return {split: problems.load(folder, split) for split in ("train", "val", "test", "shots")}


def world_of(folder):
    return json.loads((folder / "world.json").read_text())


def assert_apart(splits):
    """No question of train, val or shots is one of test, nor has 13 words in a row of one."""
    equal = {words(row["question"]) for row in splits["test"]}
    runs = {gram for row in splits["test"] for gram in grams(row["question"])}
    for split in ("train", "val"):
        for row in splits[split]:
            assert words(row["question"]) not in equal and runs.isdisjoint(grams(row["question"]))
    assert len({words(row["question"]) for split in splits for row in splits[split]}) == sum(
        len({words(row["question"]) for row in rows}) for rows in splits.values()
    )


# ------------------------------------------------------------------------------------ GSM8K


def test_gsm8k_of_a_folder(tmp_path):
    """7,473 = 4 that overlap with test + 8 like the shots + val + train, all 1,319 of test, one
    form.
    """
    out = tmp_path / "out"
    questions.make_gsm8k(questions.Gsm8k(source=str(DATASETS / "gsm8k"), out=str(out)))
    rows = splits_of(out)
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 6961,
        "val": 500,
        "test": 1319,
        "shots": 8,
    }
    assert world_of(out)["left_out"] == {"equal": 0, "overlap": 4, "shots": 8}
    assert world_of(out)["questions"] == {"train": 6961, "val": 500, "test": 1319, "shots": 8}
    text = "".join(
        solution for part in rows.values() for row in part for solution in row["solutions"]
    )
    assert "<<" not in text and ">>" not in text
    assert rows["test"][0]["answer"] == "18" and rows["test"][0]["solutions"][0].endswith(
        "\n#### 18"
    )
    assert_apart(rows)


def test_shots_of_wei_et_al(tmp_path):
    """The fixed eight, with the one ending."""
    rows = questions.shots(DATASETS / "few_shot" / "gsm8k_cot_8shot.json")
    assert [row["answer"] for row in rows] == ["6", "5", "39", "8", "9", "29", "33", "8"]
    assert all(
        row["solutions"][0].endswith(f".\n#### {row['answer']}")
        and "answer is" not in row["solutions"][0]
        for row in rows
    )
    for text in (
        '[{"question": "a", "target": "b"}]',
        '[{"problem": "a", "solution": "b"}]',
        '{"question": "a"}',
        "[3]",
        "{",
    ):
        (tmp_path / "shots.json").write_text(text)
        with pytest.raises(ValueError, match="shots.json"):
            questions.shots(tmp_path / "shots.json")


# ------------------------------------------------------------------------------------- MATH


@pytest.mark.parametrize(
    "text, rest, answer",
    [
        (r"so $x = \boxed{4}$.", "so $x = 4$.", "4"),
        (r"\boxed{\frac{1}{2}} or \boxed{0.5}", r"\frac{1}{2} or 0.5", "0.5"),
        (
            r"\boxed{\left\{ x \mid \{1\} \right\}} end",
            r"\left\{ x \mid \{1\} \right\} end",
            r"\left\{ x \mid \{1\} \right\}",
        ),
        # escaped: no brace
        (
            r"\boxed{\left\{ 1, 2 \right.} and }",
            r"\left\{ 1, 2 \right. and }",
            r"\left\{ 1, 2 \right.",
        ),
        (r"\boxed{\\{2}} x", r"\\{2} x", r"\\{2}"),  # a line break, then a brace
        (r"is \boxed 9 or \fbox{3}", "is 9 or 3", "3"),
        (r"\boxed {7}", "7", "7"),
        (r"\boxed{\boxed{5}}", "5", "5"),
        ("\\boxed{a\n  b}", "a\n  b", "a b"),
        (r"\boxed{}", "", ""),
        ("none", "none", None),
        (r"\boxed{3", "3", ""),
        (r"\boxed", "", ""),
    ],
)
def test_boxes_are_taken_off(text, rest, answer):
    assert questions.unbox(text) == (rest, answer)


@pytest.fixture(scope="module")
def made_math(tmp_path_factory):
    out = tmp_path_factory.mktemp("math") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
        questions.make_math(
            questions.Math(
                source=str(DATASETS / "math"),
                out=str(out),
                shots=str(DATASETS / "few_shot" / "minerva_math_4shot.json"),
            )
        )
    return out


def test_math_of_a_folder(made_math):
    """7,500 = 2 without an answer + 9 equal to a test question + 734 that overlap + 4 shots + val +
    train; each solution keeps its text, ends in the answer that the file gives, and no box is left.
    """
    rows = splits_of(made_math)
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 6251,
        "val": 500,
        "test": 5000,
        "shots": 4,
    }
    assert world_of(made_math)["left_out"] == {
        "train without an answer in a box": 2,
        "equal": 9,
        "overlap": 734,
        "shots": 4,
    }
    given = {"train": real("math/train"), "test": real("math/test")}
    for row in [*rows["train"], *rows["val"], *rows["test"]]:
        _, split, number = row["id"].split("-")
        source = given[split][int(number)]
        assert row["question"] == source["problem"].strip() and row["answer"] == " ".join(
            source["answer"].split()
        )
        assert (
            row["level"] == source["level"].removeprefix("Level ")
            and r"\boxed" not in row["solutions"][0]
        )
        assert row["solutions"][0].endswith(f"\n#### {row['answer']}")
        assert len(row["solutions"][0]) > len(source["solution"].strip()) - 40
    assert collections.Counter(row["level"] for row in rows["test"]) == {
        "5": 1324,
        "4": 1214,
        "3": 1131,
        "2": 894,
        "1": 437,
    }
    assert_apart(rows)


def test_rows_without_a_box_are_counted(tmp_path, capsys):
    """In train and in test, on the console and in world.json."""
    rows = real("math/train")[:40]
    without = [row | {"solution": "No box here."} for row in real("math/train")[40:43]]
    write(tmp_path / "in" / "train.jsonl", [*rows, *without])
    bare = real("math/test")[5] | {"solution": r"so \boxed{}"}
    write(tmp_path / "in" / "test.jsonl", [*real("math/test")[:5], bare])
    out = tmp_path / "out"
    questions.make_math(questions.Math(source=str(tmp_path / "in"), out=str(out), val=5))
    left_out = world_of(out)["left_out"]
    counts = {reason: count for reason, count in left_out.items() if "box" in reason}
    assert sorted(counts.values()) == [1, 3]
    said = capsys.readouterr().out
    assert all(f"{count} {reason}" in said for reason, count in counts.items())
    made = splits_of(out)
    assert len(made["train"]) + len(made["val"]) == 43 - sum(left_out.values()) + 1
    assert len(made["test"]) == 5


@pytest.mark.parametrize(
    "change, names",
    [
        ({"problem": " "}, "train.jsonl:3"),
        ({"problem": "half \ud83d"}, "train.jsonl:3"),
        ({"problem": None}, "train.jsonl:3"),
        ({"solution": ["a"]}, "train.jsonl:3"),
    ],
    ids=str,
)
def test_faulty_row_of_the_source_is_named(tmp_path, change, names):
    """Not the temporary folder that it would be written to."""
    rows = real("math/train")[:20]
    rows[2] = rows[2] | change
    write(tmp_path / "in" / "train.jsonl", rows)
    write(tmp_path / "in" / "test.jsonl", real("math/test")[:5])
    with pytest.raises(ValueError, match=names) as error:
        settings = questions.Math(source=str(tmp_path / "in"), out=str(tmp_path / "out"), val=5)
        questions.make_math(settings)
    assert str(error.value).startswith(str(tmp_path / "in")) and "out" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_faulty_shot_is_named(tmp_path):
    shots = [{"question": "a", "target": "1. The answer is 1."}]
    shots.append({"question": "b \ud83d", "target": "2. The answer is 2."})
    (tmp_path / "shots.json").write_text(json.dumps(shots))
    with pytest.raises(ValueError, match="shots.json: row 2"):
        questions.shots(tmp_path / "shots.json")
    with pytest.raises(ValueError, match="none.json"):
        questions.shots(tmp_path / "none.json")


def test_the_same_command_again_is_finished_unless_its_source_changed(tmp_path, capsys):
    write(tmp_path / "in" / "train.jsonl", real("gsm8k/train")[:30])
    write(tmp_path / "in" / "test.jsonl", real("gsm8k/test")[:5])
    settings = questions.Gsm8k(source=str(tmp_path / "in"), out=str(tmp_path / "out"), val=5)
    questions.make_gsm8k(settings)
    before = splits_of(tmp_path / "out")
    capsys.readouterr()
    questions.make_gsm8k(settings)
    assert "is finished" in capsys.readouterr().out and splits_of(tmp_path / "out") == before
    write(tmp_path / "in" / "train.jsonl", real("gsm8k/train")[:31])
    with pytest.raises(ValueError, match="out .*--overwrite"):
        questions.make_gsm8k(settings)
    assert splits_of(tmp_path / "out") == before


def test_prompt_is_written_beside_the_questions(made_math):
    """The paper's, whatever the default will be one day."""
    written = json.loads((made_math / "prompt.json").read_text())
    assert written == {"prompt": "Question: {}\nAnswer:", "between_shots": "\n\n"}
    assert problems.form(made_math) == problems.Form(**written)


def test_split_keeps_the_prompt_of_its_questions(tmp_path):
    folder = tmp_path / "mine"
    form = problems.Form("Task: {}\nReply:", "\n")
    rows = [
        {"id": f"q{i}", "question": f"{i} ?", "answer": f"{i}", "solutions": [f"#### {i}"]}
        for i in range(20)
    ]
    write(folder / "train.jsonl", rows)
    write(folder / "shots.jsonl", rows[:2])
    problems.write_form(folder, form)
    sample = {"kind": "pass", "n": 4, "checkpoint": "a.pt", "world": "toy-math30"}
    sample |= {"ids": [row["id"] for row in rows], "correct": [0, 4] * 10}
    write(tmp_path / "samples.jsonl", [sample])
    words = ["--questions", folder, "--samples", tmp_path / "samples.jsonl", "--levels", "4,0"]
    prepare.main(["split", *map(str, words), "--out", str(tmp_path / "out")])
    for level in ("easy", "hard"):
        assert problems.form(tmp_path / "out" / f"split-{level}") == form
        assert len(problems.load(tmp_path / "out" / f"split-{level}", "train")) == 8


def test_split_by_what_the_base_model_solves(tmp_path, capsys):
    """The paper: easy questions are solved 16 to 64 times of 64, hard ones at most 8 times."""
    folder, samples = tmp_path / "questions", tmp_path / "step9.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"What is {i}?", "answer": f"{i}", "solutions": [f"#### {i}"]}
        for i in range(65)
    ]
    write(folder / "train.jsonl", rows)
    write(folder / "shots.jsonl", rows[:1])
    sample = {"kind": "pass", "checkpoint": "step9.pt", "n": 64}
    sample |= {"ids": [f"q{i}" for i in range(64, -1, -1)], "correct": [*range(64, -1, -1)]}
    write(samples, [{"kind": "general"}, sample])
    command = ["split", "--questions", str(folder), "--samples", str(samples)]

    def split(out, *words):
        prepare.main([*command, "--out", str(tmp_path / out), *words])
        return {
            level: {
                name: {int(row["id"][1:]) for row in problems.load(path, name)}
                for name in ("train", "val", "test")
            }
            for level in ("easy", "hard")
            for path in [tmp_path / out / f"split-{level}"]
        }

    found = split("split")
    for level, right in (("easy", range(16, 65)), ("hard", range(9))):
        parts = found[level]
        assert set.union(*parts.values()) == set(right)
        assert sum(map(len, parts.values())) == len(right)
        assert len(parts["val"]) == len(parts["test"]) == round(0.1 * len(right))
        assert len(problems.load(tmp_path / "split" / f"split-{level}", "shots")) == 1
    assert split("again") == found and split("other", "--seed", "1") != found
    copies = [
        row | {"id": f"q{65 + i}", "question": row["question"].upper()}
        for i, row in enumerate(rows)
    ]
    write(folder / "train.jsonl", [*rows, *copies])
    (folder / "shots.jsonl").unlink()
    both = {"ids": [row["id"] for row in [*rows, *copies]], "correct": [*range(65)] * 2}
    write(samples, [sample | both])
    for parts in split("copies").values():
        for name in ("train", "val", "test"):
            others = set.union(*(part for other, part in parts.items() if other != name))
            assert others.isdisjoint(
                {number % 65 for number in parts[name]} | {65 + n for n in parts[name]}
            )
    assert not (tmp_path / "copies" / "split-easy" / "shots.jsonl").exists()
    write(folder / "train.jsonl", rows)
    write(samples, [sample])
    assert {len(parts["train"]) for parts in split("few", "--most", "9").values()} == {7}
    for levels in ("65,8", "8"):
        with pytest.raises(SystemExit) as stop:
            split("none", "--levels", levels)
        assert stop.value.code == 2 and not (tmp_path / "none").exists()
    write(samples, [sample | {"ids": sample["ids"][1:], "correct": sample["correct"][1:]}])
    with pytest.raises(SystemExit):
        split("none")
    assert "65" in capsys.readouterr().err  # a row of all of them is wanted


def test_math_questions_that_really_are_in_its_test_set_are_found(made_math):
    """Two of train, letter for letter but for spacing."""
    test = {"".join(row["problem"].split()) for row in real("math/test")}
    both = {
        row["problem"].strip()
        for row in real("math/train")
        if "".join(row["problem"].split()) in test
    }
    assert len(both) == 2
    rows = splits_of(made_math)
    trained_on = {row["question"] for split in ("train", "val", "shots") for row in rows[split]}
    assert not both & trained_on and len(both & {row["question"] for row in rows["test"]}) >= 1


def test_shots_of_minerva(made_math):
    """With the one ending, and none of them trained on."""
    rows = splits_of(made_math)
    assert [row["answer"] for row in rows["shots"]] == ["[2,5)", "24", "16", r"-\frac{2}{3}"]
    assert rows["shots"][1]["solutions"] == [
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = "
        r"(2)(12) = 24.$" + "\n#### 24"
    ]
    shown = {words(row["question"]) for row in rows["shots"]}
    assert sum(words(row["problem"]) in shown for row in real("math/train")) >= 3
    assert not shown & {words(row["question"]) for split in ("train", "val") for row in rows[split]}


def test_math500_is_asked_but_all_of_test_is_kept_out(tmp_path):
    out = tmp_path / "out"
    both = {words(row["problem"]) for row in real("math/test")}
    train = real("math/train")
    write(
        tmp_path / "in" / "train.jsonl",
        [*train[:300], *(row for row in train if words(row["problem"]) in both)],
    )
    for name in ("test", "math500"):
        write(tmp_path / "in" / f"{name}.jsonl", real(f"math/{name}"))
    questions.make_math(
        questions.Math(source=str(tmp_path / "in"), test="math500", val=20, out=str(out))
    )
    assert world_of(out)["left_out"]["equal"] == 9
    rows, given = splits_of(out), real("math/math500")
    assert [row["question"] for row in rows["test"]] == [
        row["problem"].strip() for row in given
    ] and len(given) == 500
    assert [row["answer"] for row in rows["test"]] == [
        " ".join(row["answer"].split()) for row in given
    ]
    assert {row["level"] for row in rows["test"]} == set("12345") and len(rows["shots"]) == 4
    with pytest.raises(ValueError, match="--test .*math50"):
        questions.make_math(
            questions.Math(
                source=str(DATASETS / "math"), test="math50", out=str(tmp_path / "other")
            )
        )


def test_overlap_is_kept_when_asked(tmp_path):
    """Equal questions never."""
    for name, count in (("train", 300), ("test", 600)):
        write(tmp_path / "in" / f"{name}.jsonl", real(f"math/{name}")[:count])
    both = real("math/train")[0]
    write(tmp_path / "in" / "test.jsonl", [both, *real("math/test")[:600]])
    sizes = []
    for keep in (False, True):
        out = tmp_path / f"out{keep}"
        questions.make_math(
            questions.Math(source=str(tmp_path / "in"), out=str(out), val=20, keep_overlap=keep)
        )
        rows = splits_of(out)
        sizes.append(sum(len(rows[split]) for split in ("train", "val", "shots")))
        assert words(both["problem"]) not in {
            words(row["question"]) for split in ("train", "val", "shots") for row in rows[split]
        }
    left_out = world_of(out)["left_out"]
    assert left_out["equal"] >= 1 and left_out["overlap"] == sizes[1] - sizes[0] >= 3


# ----------------------------------------------------------------------- OpenMathInstruct-1


def openmath_row(question, solution, answer, dataset, **changes):
    return {
        "question": question,
        "generated_solution": solution,
        "expected_answer": answer,
        "predicted_answer": answer,
        "error_message": "<not_executed>",
        "is_correct": True,
        "dataset": dataset,
        "generation_type": "without_reference_solution",
        **changes,
    }


@pytest.fixture(scope="module")
def openmath(tmp_path_factory):
    """A small OpenMathInstruct-1 of real questions, laid out as on the hub; questions of GSM8K's
    and MATH's test beside it.

    40 questions of each set have 5 texts, one of them twice but for case and spacing, one with code
    and one that is wrong; the first has 30. Two of MATH's questions are really in its test set.
    """
    folder = tmp_path_factory.mktemp("openmath")
    test = {"".join(row["problem"].split()) for row in real("math/test")}
    both = [row for row in real("math/train") if "".join(row["problem"].split()) in test]
    asked = [
        ("gsm8k", row["question"], row["answer"].split("#### ")[1].replace(",", ""))
        for row in real("gsm8k/train")[:40]
    ]
    asked += [("math", row["problem"], row["answer"]) for row in [*real("math/train")[:40], *both]]
    correct, wrong = [], []
    for index, (dataset, question, answer) in enumerate(asked):
        count = 30 if index == 0 else 5
        texts = [
            f"Way {way}: we find {way} + 1, so the answer is $\\boxed{{{answer}}}$."
            for way in range(count)
        ]
        correct += [openmath_row(question, text, answer, dataset) for text in texts]
        correct.append(
            openmath_row(
                question,
                texts[0].upper().replace("BOXED", "boxed").replace(": ", " :  "),
                answer,
                dataset,
            )
        )
        code = f"<llm-code>\nprint({index})\n</llm-code>\nThus \\boxed{{{answer}}}."
        correct.append(openmath_row(question, code, answer, dataset, error_message=""))
        wrong.append(
            openmath_row(
                question, f"Way 9: \\boxed{{{index}.25}}", answer, dataset, is_correct=False
            )
        )
    write(folder / "source" / "correct_solutions" / "train.jsonl", correct[:300])
    write(folder / "source" / "correct_solutions" / "validation.jsonl", correct[300:])
    write(folder / "source" / "incorrect_solutions" / "train.jsonl", wrong)
    write(folder / "tests" / "gsm8k" / "test.jsonl", real("gsm8k/test")[:200])
    shown = {"".join(row["problem"].split()) for row in both}
    write(
        folder / "tests" / "math" / "test.jsonl",
        [
            row
            for index, row in enumerate(real("math/test"))
            if index < 200 or "".join(row["problem"].split()) in shown
        ],
    )
    return folder


def test_an_openmath_row_without_a_field_is_named(tmp_path):
    row = openmath_row("1 + 1 ?", "#### 2", "2", "gsm8k")
    write(tmp_path / "a.jsonl", [row, {k: v for k, v in row.items() if k != "is_correct"}])
    with pytest.raises(ValueError, match='a.jsonl:2: "is_correct" must be true or false'):
        with tqdm(disable=True) as bar:
            list(questions.openmath_rows(tmp_path, bar))


def settings(openmath, out, **changes):
    return questions.OpenMath(
        **{
            "source": str(openmath / "source"),
            "tests": str(openmath / "tests"),
            "out": str(out),
            "val": 10,
        }
        | changes
    )


def test_openmath_keeps_correct_texts_grouped_by_question(openmath, tmp_path, capsys):
    questions.make_openmath(settings(openmath, tmp_path / "out"))
    said = capsys.readouterr().out
    rows, world = splits_of(tmp_path / "out"), world_of(tmp_path / "out")
    assert world["name"] == "openmath" and world["solutions_per_question"] == 23
    assert world["left_out"]["with code"] == 82 and world["left_out"]["near-duplicates"] == 82
    assert world["left_out"]["not correct"] == 82 and world["left_out"]["beyond 23 a question"] == 7
    for count in ("82 near-duplicates", "82 with code"):
        assert count in said
    assert (
        world["left_out"]["equal"] >= 2
        and len(rows["val"]) == 10
        and len(rows["test"]) in (201, 202)
        and len(rows["shots"]) == 4
    )
    trained_on = [*rows["train"], *rows["val"], *rows["shots"]]
    assert len(trained_on) == 82 - world["left_out"]["equal"] - world["left_out"]["overlap"]
    for row in [*rows["train"], *rows["val"]]:
        first = row["question"] == real("gsm8k/train")[0]["question"]
        assert len(row["solutions"]) == (23 if first else 5)
        for solution in row["solutions"]:
            assert (
                solution.endswith(f"\n#### {row['answer']}")
                and "boxed" not in solution
                and "llm-code" not in solution
            )
            assert solution.startswith(
                ("Way", "WAY")
            ) and f"the answer is ${row['answer']}$." in solution.lower().replace(
                row["answer"].lower(), row["answer"]
            )
    assert_apart(rows)


def test_openmath_is_kept_apart_from_both_test_sets(openmath, tmp_path):
    """Whichever is asked."""
    for dataset, shot_count in (("gsm8k", 8), ("math", 4)):
        out = tmp_path / dataset
        questions.make_openmath(settings(openmath, out, dataset=dataset, code=True))
        rows, world = splits_of(out), world_of(out)
        assert world["name"] == f"openmath-{dataset}" and len(rows["shots"]) == shot_count
        assert all(row["id"].startswith(f"{dataset}-test-") for row in rows["test"])
        assert all(
            row["id"].startswith(f"openmath-{dataset}-")
            for row in [*rows["train"], *rows["val"], *rows["shots"]]
        )
        assert (
            world["left_out"]["equal"] >= 2 * (dataset == "math")
            and "with code" not in world["left_out"]
        )
        assert any("llm-code" in solution for row in rows["train"] for solution in row["solutions"])
    both = real("gsm8k/train")[
        7
    ]  # a question of GSM8K's test set, if it were, is not trained on for MATH either
    write(tmp_path / "tests" / "gsm8k" / "test.jsonl", [both])
    write(tmp_path / "tests" / "math" / "test.jsonl", real("math/test")[:10])
    questions.make_openmath(settings(openmath, tmp_path / "out", tests=str(tmp_path / "tests")))
    assert world_of(tmp_path / "out")["left_out"]["equal"] == 1
    with pytest.raises(ValueError, match="--dataset"):
        questions.make_openmath(settings(openmath, tmp_path / "bad", dataset="aqua"))


def test_openmath_solutions_do_not_depend_on_the_order_of_rows(openmath):
    """The same set and order of each question's solutions."""
    rows = [
        json.loads(line)
        for path in sorted(openmath.rglob("*solutions/*.jsonl"))
        for line in path.open()
    ]
    rows = [row for row in rows if not row["generated_solution"].startswith("WAY")]
    mixed = random.Random(0).sample(rows, len(rows))
    (one, left_out), (other, left_out_too) = (
        questions.gather(given, "all", False, 23, 0) for given in (rows, mixed)
    )
    assert left_out == left_out_too and {row["id"]: row["solutions"] for row in one} == {
        row["id"]: row["solutions"] for row in other
    }
    other = questions.gather(rows, "all", False, 23, 1)[0]
    assert one[0]["id"] == other[0]["id"] and one[0]["solutions"] != other[0]["solutions"]
    assert max(len(row["solutions"]) for row in questions.gather(rows, "all", False, 3, 0)[0]) == 3


@pytest.fixture
def served(openmath, monkeypatch):
    """datasets.load_dataset as it is, but what it would fetch from the hub it takes from small
    files of the same columns.
    """
    real_load, asked = hub.load_dataset, []
    subjects = {
        "algebra": "Algebra",
        "counting_and_probability": "Counting & Probability",
        "geometry": "Geometry",
        "intermediate_algebra": "Intermediate Algebra",
        "number_theory": "Number Theory",
        "prealgebra": "Prealgebra",
        "precalculus": "Precalculus",
    }

    def load_dataset(name, config=None, *, split, data_files=None, streaming=False):
        asked.append((name, config, split, streaming))
        if name == "openai/gsm8k" and config == "main":
            return hub.Dataset.from_list(real(f"gsm8k/{split}")[:200])
        if name == "EleutherAI/hendrycks_math":
            rows = [row for row in real(f"math/{split}")[:210] if row["type"] == subjects[config]]
            return hub.Dataset.from_list(
                [
                    {key: row[key] for key in ("problem", "level", "type", "solution")}
                    for row in rows
                ]
            )
        if name == "HuggingFaceH4/MATH-500" and split == "test":
            return hub.Dataset.from_list(real("math/math500"))
        assert name == "nvidia/OpenMathInstruct-1" and streaming
        return real_load(
            "json",
            data_files={"train": str(openmath / "source" / data_files["train"])},
            split=split,
            streaming=True,
        )

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    return asked


def test_questions_from_the_hub_are_those_of_the_files(openmath, served, tmp_path):
    """MATH comes in seven configs."""
    questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "gsm8k"), val=20))
    rows = splits_of(tmp_path / "gsm8k")
    assert [len(rows[split]) for split in ("train", "val", "test", "shots")] == [172, 20, 200, 8]
    questions.make_math(questions.Math(out=str(tmp_path / "math"), val=20, test="math500"))
    rows, left_out = splits_of(tmp_path / "math"), world_of(tmp_path / "math")["left_out"]
    given = {row["problem"].strip() for row in real("math/train")[:210]}
    assert {
        row["question"] for split in ("train", "val", "shots") for row in rows[split]
    } <= given and len(rows["test"]) == 500
    assert (
        sum(len(rows[split]) for split in ("train", "val", "shots"))
        == 210 - left_out["equal"] - left_out["overlap"]
    )
    assert [(name, split) for name, _, split, _ in served].count(
        ("EleutherAI/hendrycks_math", "train")
    ) == 7
    questions.make_openmath(settings(openmath, tmp_path / "hub", source=""))
    assert served[-1] == ("nvidia/OpenMathInstruct-1", None, "train", True)
    questions.make_openmath(
        settings(
            openmath, tmp_path / "files", source=str(openmath / "source" / "correct_solutions")
        )
    )
    assert splits_of(tmp_path / "hub") == splits_of(tmp_path / "files")
    before = world_of(tmp_path / "files")["left_out"]
    assert world_of(tmp_path / "hub")["left_out"] == before and "not correct" not in before


# ------------------------------------------------------------- apart from the test set


def small_gsm8k(folder, shots):
    """Questions 0..39 and 100..109, and 5 in test too, written otherwise."""
    folder.mkdir()
    for split, numbers, mark in (("train", range(40), "?"), ("test", [5, *range(100, 110)], "!")):
        rows = [
            {
                "question": f"What is  {i} plus 0{mark}",
                "answer": f"It is <<{i}+0={i}>>{i}.\n#### {i}",
            }
            for i in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"question": f"What is {i} plus 0 ?", "target": f"It is {i}. The answer is {i}."}
        for i in shots
    ]
    (folder / "shots.json").write_text(json.dumps(rows))


def test_no_test_question_is_in_train(tmp_path):
    """Case, punctuation and spacing aside."""
    small_gsm8k(tmp_path / "in", [])
    questions.make_gsm8k(
        questions.Gsm8k(source=str(tmp_path / "in"), out=str(tmp_path / "out"), val=10)
    )
    assert world_of(tmp_path / "out")["left_out"]["equal"] == 1
    rows = splits_of(tmp_path / "out")
    sizes = {split: len(part) for split, part in rows.items()}
    assert sizes == {"train": 21, "val": 10, "test": 11, "shots": 8}
    numbers = [row["answer"] for part in rows.values() for row in part]
    assert len(set(numbers)) == len(numbers) == 50
    assert "5" in {row["answer"] for row in rows["test"]}


def test_few_shot_prompts_are_not_drawn_from_the_test_set(tmp_path):
    """Nor from what is trained on."""
    small_gsm8k(tmp_path / "in", [7, 200])
    settings = dict(source=str(tmp_path / "in"), val=10, shots=str(tmp_path / "in" / "shots.json"))
    questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "out"), **settings))
    shots = problems.load(tmp_path / "out", "shots")
    assert [shot["solutions"] for shot in shots] == [["It is 7.\n#### 7"], ["It is 200.\n#### 200"]]
    others = [
        row["answer"]
        for split in ("train", "val", "test")
        for row in problems.load(tmp_path / "out", split)
    ]
    assert "7" not in others
    small_gsm8k(tmp_path / "other", [7, 105])
    settings = dict(
        source=str(tmp_path / "other"), val=10, shots=str(tmp_path / "other" / "shots.json")
    )
    with pytest.raises(ValueError, match="shot-1.*test"):
        questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "bad"), **settings))
    (tmp_path / "other" / "shots.json").write_text('[{"question": "What is 7 plus 0 ?"}]')
    with pytest.raises(ValueError, match="shots.json"):
        questions.make_gsm8k(questions.Gsm8k(out=str(tmp_path / "bad"), **settings))
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_openmath_of_full_size_fits_a_laptop(tmp_path):
    """1.83M rows of 15,000 questions: less than 2 GB. Prints seconds and memory."""
    program = f"""
import random, resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
from data import questions
def rows():
    words = [str(i) for i in range(10**4)]
    draw = random.Random(0)
    for i in range(1_830_000):
        text = " ".join(draw.choices(words, k=110))
        row = {{"question": f"{{i % 15000}} " + "what? " * 40}}
        row |= {{"generated_solution": text + r" \\boxed{{4}}", "expected_answer": "4"}}
        row |= {{"error_message": "<not_executed>", "is_correct": True, "dataset": "math"}}
        yield row
began = time.time()
found, left_out = questions.gather(rows(), "all", False, 23, 0)
assert len(found) == 15000 and all(len(row["solutions"]) == 23 for row in found)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{{time.time() - began:.0f}} s, {{memory:.2f}} GB")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    print(done.stdout)
    assert float(done.stdout.split()[2]) < 2
