"""Questions, how they are put before a model, what fits its context, and batches."""

import json
from types import SimpleNamespace

import pytest
import torch

from data import files, problems, tokens
from data import toy as world
from model import Model, ModelConfig

# -------------------------------------------------------------------------------- questions

ROW = {"id": "a", "question": "how many ?", "answer": "18", "solutions": ["9 + 9 = 18 . #### 18"]}
OTHER = ROW | {"id": "b"}
ROOT_OF_TWO = {"answer": "\\sqrt{2}", "solutions": ["#### \\sqrt{3}"]}


@pytest.mark.parametrize(
    "row",
    [
        {"id": "b", "answer": "18"},
        OTHER | {"solutions": "18"},
        OTHER | {"solutions": [18]},
        ROW,  # its id is on line 1, too
        OTHER | {"question": " "},
        OTHER | {"answer": "1 8"},
        OTHER | {"answer": " "},
        OTHER | {"answer": "18\n19"},
        OTHER | {"answer": None},
        OTHER | ROOT_OF_TWO,
        OTHER | {"solutions": ["#### 17"]},
        OTHER | {"solutions": ["The answer is 18."]},
        OTHER | {"solutions": ["#### 18 #### 18"]},
        [1],
    ],
    ids=lambda row: json.dumps(row)[-40:],
)
def test_malformed_question_is_named_with_its_line(tmp_path, row):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n{json.dumps(ROW | {'id': 'c'})}\n")
    with pytest.raises(ValueError) as error:
        problems.load(path, "train")
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["", "{", "[" * 10**5], ids=["empty", "open", "deep"])
def test_line_that_is_no_json_is_named(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match="mine.jsonl:2: "):
        problems.load(path, "train")


def test_answer_that_is_an_int_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROW | {"id": 7, "answer": 18}) + "\n")
    assert problems.load(path, "train") == [ROW | {"id": "7"}]


def test_questions_file_that_is_empty_or_not_text(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "val.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n\xff\n")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"{split}.jsonl: "):
            problems.load(tmp_path, split)


def test_relative_path_from_another_folder_says_where_it_was_looked_for(tmp_path, monkeypatch):
    """A checkpoint names its questions as they were given."""
    files.write_rows(tmp_path / "mine" / "train.jsonl", [ROW])
    monkeypatch.chdir(tmp_path)
    assert problems.load("mine", "train") == [ROW]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="mine/train.jsonl") as error:
        problems.load("mine", "train")
    assert str(tmp_path / "elsewhere") in str(error.value) and "--questions" in str(error.value)


@pytest.mark.parametrize("name", ["train.jsonl", "shots.jsonl", "prompt.json"])
def test_questions_that_changed_since_they_were_made_are_refused(tmp_path, name):
    for split in ("train", "shots"):
        files.write_rows(tmp_path / f"{split}.jsonl", [ROW, OTHER])
    problems.write_form(tmp_path, problems.Form("Q {} A", ""))
    files.note(tmp_path, name="x", contents=files.listing(tmp_path))

    def use():
        problems.load(tmp_path, "train")
        problems.shots(tmp_path, 2, [{"question": "?"}], exactly=False)
        problems.form(tmp_path)

    use()
    path = tmp_path / name
    kept = path.read_text()
    for damaged in (kept[: len(kept) // 2], None):
        path.unlink() if damaged is None else path.write_text(damaged)
        with pytest.raises(ValueError, match=name):
            use()
    path.write_text(kept)
    use()


def test_one_solution_is_fixed_by_seed_and_question():
    """A choice then changed with the questions before."""
    rows = [
        {"id": f"q{i}", "question": f"{i} ?", "solutions": [f"{j} #### {i}" for j in range(20)]}
        for i in range(50)
    ]
    once = problems.solution_pairs(rows, "1", 0)
    assert len(once) == 50 and once[7:] == problems.solution_pairs(rows[7:], "1", 0)
    assert once != problems.solution_pairs(rows, "1", 1)
    assert len({text.split()[0] for _, text in once}) > 10
    assert len(problems.solution_pairs(rows, "3", 0)) == 150
    assert len(set(problems.solution_pairs(rows, "all", 0))) == 1000
    with pytest.raises(ValueError, match="'x'"):
        problems.solution_pairs([{"id": "x", "question": "?", "solutions": []}], "1", 0)


# ----------------------------------------------------------------------------------- prompts


def test_prompt_belongs_to_the_folder_of_questions(tmp_path):
    """Not to the tokenizer."""
    mine = tmp_path / "train.jsonl"
    default = problems.Form("Question: {}\nAnswer:", "\n\n")
    assert problems.form(tmp_path) == problems.form(mine) == problems.Form() == default
    form = problems.Form("<user> {} {} <model>".replace("{} {}", "{} {x}"), "\n")
    problems.write_form(tmp_path, form)
    assert problems.form(tmp_path) == problems.form(mine) == form
    shot = {"question": "a {b} ?", "solutions": ["c #### 1", "d #### 1"]}
    assert problems.prompt(form, "a {b} ?") == "<user> a {b} ? {x} <model>"
    assert problems.few_shot(form, [shot]) == "<user> a {b} ? {x} <model> c #### 1\n"
    assert problems.stop_string(form) == "<user>"
    assert problems.until_next_question(form, " 1<user> more") == (" 1", True)
    assert problems.until_next_question(form, " 1 <use") == (" 1 <use", False)


def test_between_shots_may_be_left_out(tmp_path):
    files.write_json(tmp_path / "prompt.json", {"prompt": " Q : {} A :"})
    assert problems.form(tmp_path) == problems.Form(" Q : {} A :", "\n\n")


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "no place"},
        {"prompt": "{} twice {}"},
        {"prompt": " {} nothing before it"},
        {"prompt": 3},
        {"prompt": "Q {}", "between_shots": None},
        {"promt": "Q {}"},
        ["Q {}"],
    ],
    ids=str,
)
def test_prompt_that_cannot_be_used_is_refused(tmp_path, content):
    (tmp_path / "prompt.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="prompt.json"):
        problems.form(tmp_path)


# ----------------------------------------------------------------------- what fits the context

FORM = problems.Form(world.PROMPT, "")


def question(name, words, solutions=("#### 1",)):
    return {"id": name, "question": " ".join(words), "answer": "1", "solutions": list(solutions)}


def lengths(toy, row):
    prompt = len(tokens.encode(toy, problems.prompt(FORM, row["question"])))
    return prompt, [prompt + len(problems.answer_ids(toy, text)) for text in row["solutions"]]


def test_prompt_that_leaves_no_room_is_found_before_the_first_step(toy):
    rows = [question("short", ["how", "many", "?"]), question("long", ["many"] * 60)]
    longest = lengths(toy, rows[1])[0]
    for context, fits in ((longest + 8, True), (longest + 7, False)):
        room = problems.Room(context, max_new=8)
        if fits:
            assert problems.check_lengths(rows, "mine", toy, FORM, room) == (rows, "")
            continue
        with pytest.raises(ValueError, match="mine: question 'long'") as error:
            problems.check_lengths(rows, "mine", toy, FORM, room)
        assert {str(longest + 8), str(context), "--max_new", "--skip_long"} <= {
            word.strip(",;") for word in str(error.value).split()
        }
        kept, told = problems.check_lengths(rows, "mine", toy, FORM, room, skip=True)
        assert kept == rows[:1] and "mine" in told and "1 of 2" in told and "'long'" in told


def test_shots_take_room(toy):
    rows = [question("a", ["many"] * 10)]
    size = lengths(toy, rows[0])[0]
    fits = problems.Room(size + 8 + 5, max_new=8, before=5)
    assert problems.check_lengths(rows, "mine", toy, FORM, fits) == (rows, "")
    with pytest.raises(ValueError):
        problems.check_lengths(rows, "mine", toy, FORM, fits._replace(before=6))


@pytest.mark.parametrize("context", [40, 48])
def test_longest_solution_that_passes_is_the_longest_that_the_model_takes(toy, context):
    """Rows are filled up to a multiple of 8, so a context is one."""
    vocab = tokens.vocab_size(toy)
    shape = {"layers": 1, "width": 8, "heads": 2, "ffn": 8, "context": context}
    model = Model(ModelConfig(**shape, vocab=vocab, padded_vocab=vocab), torch.float32)
    model.init_weights(0)
    alone = SimpleNamespace(shard=False, device="cpu")
    for size in range(30, 60):
        row = question("a", ["many"] * (size - 10), ["many #### 1"])
        length = lengths(toy, row)[1][0]
        room = problems.Room(context, solutions="all")
        passes = bool(problems.check_lengths([row, ROW], "x", toy, FORM, room, True)[0][1:])
        prompt = tokens.encode(toy, problems.prompt(FORM, row["question"]))
        answer = problems.answer_ids(toy, row["solutions"][0])
        batch = problems.make_batch([prompt], [answer], [1.0], tokens.pad_id(toy))
        try:
            for micro in problems.micro_batches(batch, 1, alone):
                model(micro.ids, micro.target, weight=micro.weight, mask=micro.mask)
            taken = True
        except ValueError:
            taken = False
        assert passes == taken, length


def test_only_solutions_that_are_trained_on_count(toy):
    """Of the others of a question those that fit are kept."""
    long = "many " * 40 + "#### 1"
    row = question("a", ["how", "many", "?"], ["#### 1", long, "so #### 1"])
    picks = {seed: problems.chosen_solutions(row, "1", seed)[0] for seed in range(20)}
    assert set(picks.values()) == set(row["solutions"])
    for seed, text in picks.items():
        room = problems.Room(30, solutions="1", seed=seed)
        kept, told = problems.check_lengths([row], "mine", toy, FORM, room, skip=True)
        if text != long:
            assert (kept, told) == ([row], "")
            continue
        assert kept == [row | {"solutions": ["#### 1", "so #### 1"]}] and "'a'" in told
        with pytest.raises(ValueError, match="mine: question 'a'"):
            problems.check_lengths([row], "mine", toy, FORM, room)
    only_rl = problems.Room(30, max_new=4)
    assert problems.check_lengths([row], "mine", toy, FORM, only_rl) == ([row], "")


def test_word_that_the_encoding_lacks_is_found_before_the_first_step(toy):
    """In a question, or in a solution."""
    good = question("good", ["how", "many", "?"])
    asked = question("asked", ["how", "many", "zebras", "?"])
    solved = question("solved", ["how", "many", "?"], ["zebras #### 1", "#### 1"])
    room = problems.Room(100, max_new=8, solutions="all")
    for row in (asked, solved):
        with pytest.raises(ValueError, match=f"mine: question '{row['id']}'.*zebras"):
            problems.check_lengths([good, row], "mine", toy, FORM, room)
    kept, _ = problems.check_lengths([good, asked, solved], "mine", toy, FORM, room, skip=True)
    assert kept == [good, solved | {"solutions": ["#### 1"]}]
    with pytest.raises(ValueError, match="mine: .*'asked'"):
        problems.check_lengths([asked], "mine", toy, FORM, room, skip=True)


def test_prompt_that_the_encoding_has_no_words_for_is_named(toy):
    """Not the first question, whose words are known."""
    rows = [question("a", ["how", "many", "?"])]
    for skip in (False, True):
        with pytest.raises(ValueError, match="mine: .*Question.*prompt.json"):
            room = problems.Room(100, max_new=8)
            problems.check_lengths(rows, "mine", toy, problems.Form(), room, skip)


def test_lengths_of_real_words_are_exact_at_the_limit(cl100k):
    """Short texts are not encoded, their bytes are counted; that must not change the answer."""
    form = problems.Form()
    row = question("a", ["internationalization"] * 30, ["internationalization " * 10 + "#### 1"])
    prompt = len(tokens.encode(cl100k, problems.prompt(form, row["question"])))
    whole = prompt + len(problems.answer_ids(cl100k, row["solutions"][0]))
    size = len(row["question"]) + len(row["solutions"][0])
    for context in sorted({prompt + 3, prompt + 4, whole - 8, whole + 8, size, 2 * size}):
        sampled = problems.Room(context, max_new=4)
        trained = problems.Room(context, solutions="all")
        for room, fits in (
            (sampled, prompt + 4 <= context),
            (trained, whole <= context + 1),
        ):
            kept, _ = problems.check_lengths([ROW, row], "x", cl100k, form, room, skip=True)
            assert (row in kept) == fits, (context, room)


# ---------------------------------------------------------------------------------- batches


def test_mask_comes_from_lengths():
    """The ids that mean padding and end of text occur in prompt and answer."""
    pad, end = 0, 1
    batch = problems.make_batch([[0, 5, 1, 0], [7]], [[0, 1, 0, end], [9, end]], [1.0, 1.0], pad)
    assert batch.ids.tolist() == [[0, 5, 1, 0, 0, 1, 0, 0], [7, 9, 0, 0, 0, 0, 0, 0]]
    assert batch.target[0, 3:7].tolist() == [0, 1, 0, 1]
    assert batch.target[1, :2].tolist() == [9, 1]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    dtypes = [x.dtype for x in batch[:4]]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.float32]


def test_stop_token_is_trained(toy):
    answer = problems.answer_ids(toy, "9 * 2 = 18 . #### 18")
    assert answer[-1] == toy.eot_token
    assert tokens.decode(toy, answer[:-1]) == " 9 * 2 = 18 . #### 18"
    batch = problems.make_batch([[4, 4]], [answer], [1.0], tokens.pad_id(toy))
    assert batch.target[batch.mask].tolist() == answer
    assert batch.weight[batch.mask].tolist() == [1.0] * len(answer)


def test_weights_and_log_probs_stand_at_their_targets():
    """One to the left of the token's own place."""
    batch = problems.make_batch(
        [[3, 3, 3], [3]], [[7, 8], [9]], [[0.5, -0.5], -2], 0, [[-1.0, -2.0], [-3.0]]
    )
    assert {x.shape for x in batch[:5]} == {(2, 8)}
    for values, expected in (
        (batch.weight, {7: 0.5, 8: -0.5, 9: -2.0}),
        (batch.logp, {7: -1.0, 8: -2.0, 9: -3.0}),
    ):
        targets = batch.target[batch.mask].tolist()
        assert dict(zip(targets, values[batch.mask].tolist(), strict=True)) == expected
        assert not values[~batch.mask].any()
    assert not problems.make_batch([[1]], [[2]], [1.0], 0).logp.any()
