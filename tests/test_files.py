"""Files: written whole or not at all, read with the line at fault; folders that know their rows."""

import gzip
import json
import os

import pytest

from data import files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FIELDS = {"question": str, "answer": str, "solutions": list}
ROW = {"question": "how many ?", "answer": "18", "solutions": ["#### 18"]}


# ---------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_file_is_whole_or_as_it_was(tmp_path, monkeypatch, at):
    path = tmp_path / "deep" / "a.jsonl"
    files.write_rows(path, [{"text": "\u00e9"}])
    before = path.read_bytes()
    assert before == '{"text": "\u00e9"}\n'.encode()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, at, full)
        with pytest.raises(ValueError, match="a.jsonl"):
            files.write_rows(path, [{"text": "other"}])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_error_while_rows_are_made_is_not_one_of_writing(tmp_path):

    def lost():
        yield {"a": 1}
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        files.write_rows(tmp_path / "a.jsonl", lost())
    assert not list(tmp_path.iterdir())


def test_torn_last_line_is_left_out_and_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="a.jsonl:2"):
        files.read_rows(path)


# ---------------------------------------------------------------------------------- reading


def test_number_where_text_is_asked_is_read_as_what_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    given = [18, -3, 0.5, 1e-7, 18.0, 12345678901234567890, "18"]
    path.write_text("".join(json.dumps(ROW | {"answer": x}) + "\n" for x in given))
    answers = [row["answer"] for row in files.read_jsonl(path, FIELDS)]
    assert answers == ["18", "-3", "0.5", "0.0000001", "18.0", "12345678901234567890", "18"]


@pytest.mark.parametrize("value", ["true", "NaN", "-Infinity", "1e999", "null", "[18]", '{"a": 1}'])
def test_what_is_neither_text_nor_number_is_refused(tmp_path, value):
    path = tmp_path / "a.jsonl"
    broken = json.dumps(ROW).replace('"18"', value, 1)
    path.write_text(json.dumps(ROW) + "\n" + broken + "\n")
    with pytest.raises(ValueError, match='a.jsonl:2: .*"answer"'):
        list(files.read_jsonl(path, FIELDS))


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "null", "true", '[{"question": "a"}]'])
def test_array_instead_of_object_is_called_so(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="a.jsonl:2: .*object") as error:
        list(files.read_jsonl(path, FIELDS))
    told = str(error.value).partition(":2:")[2]
    assert "None" not in told and ("array" in told) == (line[0] == "[")


@pytest.mark.parametrize("field", ["question", "solutions"])
def test_lone_surrogate_is_named_with_file_and_row(tmp_path, field):
    path = tmp_path / "a.jsonl"
    value = "a \ud83d b" if field == "question" else ["#### 18", "\ude00"]
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {field: value}) + "\n")
    with pytest.raises(ValueError, match=rf'a.jsonl:2: "{field}": \\ud') as error:
        list(files.read_jsonl(path, FIELDS))
    str(error.value).encode()  # the message itself can be printed
    with pytest.raises(ValueError, match="row 2 .*b.jsonl"):
        files.write_rows(tmp_path / "b.jsonl", [ROW, ROW | {field: value}])
    assert not (tmp_path / "b.jsonl").exists()
    path.write_text(json.dumps(ROW | {"question": "\U0001f600"}) + "\n")  # a whole pair
    assert next(files.read_jsonl(path, FIELDS))["question"] == "\U0001f600"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "A.TXT"])
def test_git_lfs_pointer_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer"):
        list(files.lines_of(path))


def test_bom_is_stripped(tmp_path):
    path = tmp_path / "a.jsonl"
    text = json.dumps(ROW) + "\n\ufeffx\n"
    path.write_text(text, encoding="utf-8-sig")
    assert [line for _, line in files.lines_of(path)] == [json.dumps(ROW) + "\n", "\ufeffx\n"]
    packed = tmp_path / "a.txt.GZ"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [line for _, line in files.lines_of(packed)][0] == json.dumps(ROW) + "\n"
    path.write_text(json.dumps({"name": "x"}), encoding="utf-8-sig")
    assert files.read_json(path) == {"name": "x"}


# ---------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("content", ["", "\n", "{", "[1]", "3"])
def test_empty_or_broken_world_is_named(tmp_path, content):
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(ValueError, match="world.json") as error:
        files.read_world(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def listed(tmp_path):
    """A folder as prepare.py makes it: rows of its own and in a folder below."""
    for name in ("train", "easy/train", "easy/val"):
        files.write_rows(tmp_path / f"{name}.jsonl", [{"a": 1}, {"a": 2}])
    files.write_json(tmp_path / "easy" / "prompt.json", {"prompt": "x {}"})
    files.note(tmp_path, name="x", contents=files.listing(tmp_path))
    return tmp_path


def test_folder_is_as_it_was_made(listed):
    for path in (listed, listed / "easy", listed / "easy" / "val.jsonl", listed / "train.jsonl"):
        files.check_listed(path)


def shorten(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def edit(path):
    path.write_text(path.read_text().replace("1", "3"))


@pytest.mark.parametrize("change", [lambda path: path.unlink(), shorten, edit])
def test_rows_that_are_missing_or_changed_are_refused(listed, change):
    """Questions and tasks as well as shards."""
    change(listed / "easy" / "val.jsonl")
    for path in (listed, listed / "easy", listed / "easy" / "val.jsonl"):
        with pytest.raises(ValueError, match="easy/val.jsonl"):
            files.check_listed(path)
    files.check_listed(listed / "easy" / "train.jsonl")


def test_file_that_was_added_is_refused_in_its_folder_only(listed):
    files.write_rows(listed / "easy" / "train copy.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="train copy.jsonl"):
        files.check_listed(listed / "easy")
    files.check_listed(listed / "easy" / "train copy.jsonl")  # who names it means it
    os.remove(listed / "world.json")
    files.check_listed(listed / "easy")  # nothing is known of such a folder
