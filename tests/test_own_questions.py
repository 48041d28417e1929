"""prepare.py questions: questions of one's own by the names of their fields."""

import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import helpers
from data import prepare, problems
from data.overlap import words
from helpers import call


def rows(count=50, **more):
    return [
        {
            "problem": f"Ann has {i} apples and buys {i % 7} more. How many are there?",
            "final": i + i % 7,
            "cot": f"She has {i} + {i % 7} = {i + i % 7} apples.",
            **more,
        }
        for i in range(count)
    ]


def write(path, content):
    text = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def prepared(tmp_path, source, **flags):
    """The splits of the folder that the command makes."""
    flags = dict(question="problem", answer="final", solution="cot") | flags
    out = tmp_path / "out"
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    prepare.main(["questions", "--source", str(source), "--out", str(out), *words])
    there = ("train", "val", "test", "shots")
    return {name: problems.load(out, name) for name in there if (out / f"{name}.jsonl").exists()}


def said(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare.main(["questions", *map(str, flags)])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "folder"])
def test_each_kind_of_source_gives_the_same_splits(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        write(path / "1.jsonl", rows()[:30])
        parquet.write_table(pyarrow.Table.from_pylist(rows()[30:]), path / "2.parquet")
    elif name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    else:
        write(path, rows())
    splits = prepared(tmp_path, path)
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 35,
        "val": 5,
        "test": 5,
        "shots": 5,
    }
    asked = {words(row["question"]) for part in splits.values() for row in part}
    assert asked == {words(row["problem"]) for row in rows()}
    other = prepared(tmp_path / "again", write(tmp_path / "b.jsonl", rows()))
    for split, part in splits.items():
        assert [row["question"] for row in part] == [row["question"] for row in other[split]]


def test_a_file_of_test_questions_is_not_trained_on(tmp_path, capsys):
    write(tmp_path / "train.jsonl", rows())
    test = write(tmp_path / "test.jsonl", rows()[:9])
    assert f"{test} looks like test questions" in said(capsys, "--source", tmp_path)


def test_copies_of_a_question_count_as_often_as_they_are_there(tmp_path):
    """2 + 3 and 2 - 3 stay together, as questions of one text without its signs."""
    signs = [
        {"problem": f"{i} {sign} {i + 3} ?", "final": 7, "cot": "7"}
        for i in range(50)
        for sign in "+-*"
    ]
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", signs), shots=0)
    assert len(splits["test"]) == 15 and 15 <= len(splits["val"]) < 18


def test_a_set_of_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *which, split: asked.append((*which, split)) or rows()
    )
    splits = prepared(tmp_path, "owner/name-1.5", split="part", subset="main")
    assert asked == [("owner/name-1.5", "main", "part")]
    assert len(splits["train"]) == 35


def test_answers_and_solutions_are_in_the_form_that_is_graded(tmp_path):
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", rows()))
    for row in splits["train"]:
        (solution,) = row["solutions"]
        assert solution == f"{solution.splitlines()[0]}\n#### {row['answer']}"
        assert helpers.grade(solution, row["answer"])


@pytest.mark.parametrize(
    "answer, meant",
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (12.5, "12.5"),
        (" 1,000 ", "1,000"),
    ],
)
def test_an_answer_is_found_in_its_text(tmp_path, answer, meant):
    content = rows()
    content[3] |= {"final": answer, "problem": "the third"}
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", content))
    found = {row["question"]: row["answer"] for part in splits.values() for row in part}
    assert found["the third"] == meant


def test_one_field_may_be_both_answer_and_solution(tmp_path):
    """As GSM8K has it."""
    content = [row | {"both": f"{row['cot']}\n#### {row['final']}"} for row in rows()]
    path = write(tmp_path / "a.jsonl", content)
    splits = prepared(tmp_path, path, answer="both", solution="both")
    for row in splits["train"]:
        (solution,) = row["solutions"]
        assert solution.count("####") == 1 and solution.endswith(f"#### {row['answer']}")


def test_names_with_dots_and_several_solutions(tmp_path):
    content = [{"in": {"q": row["problem"], "a": [row["cot"], "x"]}, **row} for row in rows()]
    path = write(tmp_path / "a.jsonl", content)
    splits = prepared(tmp_path, path, question="in.q", solution="in.a")
    assert {len(row["solutions"]) for row in splits["train"]} == {2}


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, capsys):
    content = [*rows(), {"problem": "why?", "final": None, "cot": "x"}]
    content.append(rows()[0] | {"cot": "Another way."})
    content.append(rows()[1] | {"final": 99})
    content.append(rows()[2] | {"cot": "wrong #### 98"})
    content.append(rows()[2] | {"cot": r"wrong, so \boxed{98}"})
    content.append({"problem": "why not?", "final": 3, "cot": None})
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", content))
    told = capsys.readouterr().out
    assert "1 without a question, or an answer that can be graded" in told
    assert "1 with another answer" in told
    assert "3 solutions that are empty or end in another answer" in told
    assert "1 questions without a solution" in told
    found = {row["question"]: row for part in splits.values() for row in part}
    assert len(found) == 50 and len(splits["shots"]) == 5
    made = json.loads((tmp_path / "out" / "world.json").read_text())
    assert sum(made["questions"].values()) == 50


def test_copies_of_a_question_stay_together(tmp_path):
    copies = [row | {"problem": row["problem"].upper() + "  "} for row in rows()]
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", [*rows(), *copies]))
    names = [words(row["question"]) for part in splits.values() for row in part]
    assert len(names) == len(set(names)) == 50


def test_signs_make_another_question(tmp_path):
    """Which words alone do not tell apart."""
    content = [
        {"problem": f"{i} {sign} 2 ?", "final": value, "cot": "x"}
        for i in range(20)
        for sign, value in (("+", i + 2), ("*", 2 * i), ("-", i - 2))
    ]
    again = [row | {"problem": row["problem"].replace(" ?", "?")} for row in content]
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", [*content, *again]))
    found = {row["question"]: row["answer"] for part in splits.values() for row in part}
    assert found.items() <= {row["problem"]: str(row["final"]) for row in content}.items()
    assert len({question.split()[1] for question in found}) == 3


def test_questions_of_other_tests_are_left_out(tmp_path, capsys):
    other = prepared(tmp_path / "other", write(tmp_path / "a.jsonl", rows()))
    content = rows(60)
    long = " ".join(f"word{i}" for i in range(20))
    content[50]["problem"] = f"{long} so far"
    test = tmp_path / "other" / "out"
    shared = [*other["test"], other["test"][0] | {"id": "x", "question": f"{long} and more"}]
    (tmp_path / "tests").mkdir()
    write(tmp_path / "tests" / "test.jsonl", shared)
    splits = prepared(tmp_path, write(tmp_path / "b.jsonl", content), check=tmp_path / "tests")
    for split in ("train", "val", "shots"):
        asked = {words(row["question"]) for row in splits[split]}
        assert asked.isdisjoint(words(row["question"]) for row in shared)
        assert not any("word5" in question for question in asked)
    assert test.exists() and "13 words in a row" in capsys.readouterr().out


def test_the_prompt_is_that_of_the_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", rows())
    prepared(tmp_path, path, prompt="Q: {}\\nA:")
    form = problems.form(tmp_path / "out")
    assert problems.prompt(form, "why?") == "Q: why?\nA:"


def test_without_solutions_there_are_no_shots(tmp_path):
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", rows()), solution="")
    assert set(splits) == {"train", "val", "test"}
    assert all(row["solutions"] == [] for row in splits["train"])


def test_the_same_command_finds_it_finished(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", rows())
    prepared(tmp_path, path)
    prepared(tmp_path, path)
    assert "is finished" in capsys.readouterr().out
    before = path.read_text()
    path.write_text(before.replace('"final": 12,', '"final": 13,', 1))  # as long as it was
    assert path.read_text() != before
    flags = dict(question="problem", answer="final", solution="cot", out=tmp_path / "out")
    words = [part for name, value in flags.items() for part in (f"--{name}", value)]
    assert "source contents" in said(capsys, "--source", path, *words)
    write(path, rows(51))
    assert "source contents" in said(capsys, "--source", path, *words)


def test_wrong_input_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", rows())
    out = ("--out", tmp_path / "out")
    assert "it has problem, final, cot: --question" in said(capsys, "--source", path, *out)
    assert "no file" in said(capsys, "--source", tmp_path / "b.jsonl", *out)
    flags = ("--question", "problem", "--answer", "final", *out)
    few = write(tmp_path / "few.jsonl", rows(5))
    assert "5 questions" in said(capsys, "--source", few, *flags)
    asked = said(capsys, "--source", path, *flags, "--prompt", "no place for it")
    assert "one {}" in asked
    (tmp_path / "a.csv").write_text("a,b")
    assert ".parquet" in said(capsys, "--source", tmp_path / "a.csv", *flags)
    assert not (tmp_path / "out").exists()


def test_the_stages_take_the_folder(world, tmp_path):
    """Questions of the toy's words, under other names, through sft.py, rl.py and sample.py."""
    content = [
        {"problem": row["question"], "final": row["answer"], "cot": row["solutions"][0]}
        for row in problems.load(world.data / "easy", "train")
    ]
    for row in content:
        row["cot"] = row["cot"].rpartition("####")[0].strip()
    splits = prepared(tmp_path, write(tmp_path / "a.jsonl", content), prompt=" Q : {} A :")
    assert len(splits["train"]) == 23
    how = dict(init=world.taught, questions=tmp_path / "out", steps=1, eval_questions=2, eval_n=2)
    how |= dict(compile="false", max_new=16)
    call("rl", out=tmp_path / "rl.pt", questions_per_step=4, group=2, **how)
    call("sample", tmp_path / "rl.pt", first=1, n=1)
