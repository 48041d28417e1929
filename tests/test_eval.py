"""eval.py: what a row says, what is measured again, what is refused."""

import collections
import itertools
import json
import math
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import eval as evaluation
import rl
from data import grader, problems, tasks, tokens
from data.files import read_rows, write_rows
from helpers import PRETRAIN, call, flags, lines_of, refused, small_model, start
from model import Sampler

HOW = dict(n=8, k="1,2,8", limit=8, max_new=24, device="cpu", compile="false")
FEW = HOW | dict(n=1, k="1", limit=2, max_new=8, tasks="")
COSTS = ("flops", "questions", "sampled_tokens", "seconds")
RL = dict(
    questions_per_step=4,
    group=4,
    max_new=24,
    steps=4,
    eval_every=2,
    eval_questions=4,
    eval_n=2,
    lr=1e-3,
    compile="false",
)
TASKS = ("facts", "lastword")


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    """The base, an RL checkpoint with its validations, and the rows of both."""
    folder = tmp_path_factory.mktemp("eval")
    trained = folder / "rl.pt"
    call("rl", init=world.taught, out=trained, **RL)
    call("eval", world.base, trained, results=folder / "results", **HOW)
    easy = world.data / "easy"
    return SimpleNamespace(base=world.base, trained=trained, results=folder / "results", easy=easy)


@pytest.fixture
def calls(monkeypatch):
    """What is measured from here on: "solve" or "score" for each benchmark."""
    calls = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **more: calls.append(name) or real(*args, **more)
        )

    counted(evaluation, "solve")
    counted(tasks, "score")
    return calls


@pytest.fixture
def kept(measured, tmp_path):
    """A copy of the rows, for a test to change."""
    return shutil.copytree(measured.results, tmp_path / "kept")


@pytest.fixture
def shown(monkeypatch):
    """The ids of the solved questions that are shown before others, at each time they are."""
    shown = []
    real = problems.few_shot

    def few_shot(form, shots):
        shown.append([shot["id"] for shot in shots])
        return real(form, shots)

    monkeypatch.setattr(problems, "few_shot", few_shot)
    return shown


def rows_in(folder, stem, kind=None) -> list[dict]:
    return [row for row in read_rows(folder / f"{stem}.jsonl") if kind in (None, row["kind"])]


def total_of(out) -> dict:
    return [line["totals"] for line in lines_of(out) if "totals" in line][-1]


# ---------------------------------------------------------------------------------- the rows


def test_a_base_has_rows_with_and_without_shots_and_others_without(measured):
    base = [(row["kind"], row.get("shots")) for row in rows_in(measured.results, "step10")]
    trained = [(row["kind"], row.get("shots")) for row in rows_in(measured.results, "rl")]
    general = [("general", None)] * len(TASKS)
    # of eight shots, one fits a row of its text together with an answer
    assert base == [("pass", 1), ("pass", 0), *general]
    assert trained == [("pass", 0), *general, ("curve", None)]


def test_a_row_says_what_it_is_of(measured):
    (row,) = rows_in(measured.results, "rl", "pass")
    assert (row["benchmark"], row["split"], row["n"], row["k"]) == ("easy", "val", 8, [1, 2, 8])
    assert (row["world"], row["tokens"], row["step"]) == ("toy-math30", 10 * 1024, 4)
    assert (row["recipe"], row["group"], row["lr"]) == ("sft-gold->rl", 4, 1e-3)
    assert row["ids"] == [f"easy-val-{i}" for i in range(8)] and "share" not in row
    assert row["weights"] == common.weights_hash(measured.trained)
    total = total_of(measured.trained)
    assert row["questions"] == 16 and all(row[name] == total[name] > 0 for name in COSTS)
    for name, row in zip(TASKS, rows_in(measured.results, "rl", "general"), strict=True):
        assert row["benchmark"] == name and len(row["right"]) == 10
        assert row["accuracy"] == statistics.mean(row["right"]) and 0 < row["probability"] < 1


def test_the_report_reads_the_rows(kept, capsys):
    pytest.importorskip("results.report")
    call("eval", "--json", report=kept)
    said = capsys.readouterr().out
    assert "sft-gold->rl" in said and json.loads(said.splitlines()[-1])
    assert (kept / "report.md").exists()


def test_the_curve_has_each_validation_and_the_mean_reward_since_the_last(measured):
    (curve,) = rows_in(measured.results, "rl", "curve")
    lines = lines_of(measured.trained)
    rewards = [line["reward"] for line in lines if "reward" in line]
    mean = {2: statistics.mean(rewards[:2]), 4: statistics.mean(rewards[2:])}
    validations = {line["step"]: line["validation"] for line in lines if "validation" in line}
    spent = {0: dict.fromkeys(COSTS, 0)}
    spent |= {line["step"] + 1: line["totals"] for line in lines if "totals" in line}
    assert curve["split"] == "val" and [*validations] == [0, 2, 4]
    for (step, validation), point in zip(validations.items(), curve["points"], strict=True):
        assert point["step"] == step
        assert all(point[name] == spent[step][name] for name in COSTS)
        assert point.get("reward") == pytest.approx(mean.get(step))
        for name in ("pass@1", "formatted", "truncated"):
            assert point[name] == validation[name]


@pytest.mark.parametrize("count", [0, 2])
def test_counts_and_pass_at_k_from_scratch(measured, tmp_path, count):
    """One question at a time with its shots in the prompt; pass@k by all subsets of k answers."""
    easy = shutil.copytree(measured.easy, tmp_path / "easy")
    # the questions that it gets right at times
    shutil.copy(easy / "train.jsonl", easy / "val.jsonl")
    words = dict(results=tmp_path, questions=easy, shots=count)
    call("eval", measured.trained, **words, **HOW | {"tasks": ""})
    (row,) = rows_in(tmp_path, "rl", "pass")

    encoding = tokens.encoding("toy")
    model = common.load_model(common.load(measured.trained), common.start("cpu"))
    sampler = Sampler(model)
    ends = [encoding.eot_token, tokens.encode(encoding, " Q")[0]]
    solved = problems.load(measured.easy, "shots")[:count]
    before = "".join(f" Q : {x['question']} A : {x['solutions'][0]}" for x in solved)
    right = []
    nats = 0.0
    length = 0
    for question in problems.load(easy, "val")[:8]:
        prompt = tokens.encode(encoding, f"{before} Q : {question['question']} A :")
        seeds = problems.answer_seeds(1234, "eval", [question], 8)
        samples = sampler([prompt], 8, 24, seeds, ends, 0.6)
        nats += float(samples.logp_1.sum())
        length += int(samples.lengths.sum())
        answers = zip(samples.tokens.tolist(), samples.lengths, samples.truncated, strict=True)
        texts = [tokens.decode(encoding, ids[: n - 1]) for ids, n, cut in answers if not cut]
        marks = grader.grade_all(texts, [question["answer"]] * len(texts), [True] * len(texts))
        right.append(sum(correct for correct, _ in marks))
    # one answer may differ: other batches round otherwise, and a draw may lie between two tokens
    assert sum(abs(a - b) for a, b in zip(row["correct"], right, strict=True)) <= 1
    assert row["log_prob"] == pytest.approx(nats / length, abs=0.02)
    assert count or 0 < sum(right) < 64
    for k in (1, 2, 8):
        each = []
        for correct in row["correct"]:
            chosen = itertools.combinations(range(8), k)
            each.append(statistics.mean(any(i < correct for i in subset) for subset in chosen))
        assert row[f"pass@{k}"] == pytest.approx(statistics.mean(each))
        assert row[f"se@{k}"] == pytest.approx(statistics.stdev(each) / 8**0.5)


def test_rows_of_a_pre_training_run_have_its_costs(world, measured, tmp_path):
    """The last checkpoint's; tokens are what the weights have seen, in whichever run."""
    (base, *_) = rows_in(measured.results, "step10")
    total = total_of(measured.base)
    assert (base["sampled_tokens"], base["questions"]) == (0, 0)
    assert (base["flops"], base["seconds"]) == (total["flops"], total["seconds"])
    more = dict(init=measured.trained, out=tmp_path / "more", tokens=2048, save_steps=1)
    call("pretrain", *PRETRAIN, data=world.data, **more)
    call("eval", *(tmp_path / f"more/step{step}.pt" for step in (1, 2)), results=tmp_path, **FEW)
    (first,) = rows_in(tmp_path, "step1")
    (last,) = rows_in(tmp_path, "step2")
    assert first["recipe"] == "sft-gold->rl->text" and last["shots"] == 0
    assert (first["tokens"], last["tokens"]) == (11 * 1024, 12 * 1024)
    assert "flops" not in first and last["flops"] == pytest.approx(total["flops"] / 5)


def test_loss_on_text(world, tmp_path):
    """Each held-out window by plain cross-entropy; the mean is what pre-training logs."""
    call("eval", world.base, world.taught, results=tmp_path, text=world.data, **FEW)
    shard = next(world.data.glob("val_*.bin"))
    ids = torch.from_numpy(np.fromfile(shard, "<u2", offset=64).astype(np.int64))
    windows = ids[: (len(ids) - 1) // 64 * 64 + 1].unfold(0, 65, 64)  # --length 64, and a target
    found = []
    for path in (world.base, world.taught):
        model = common.load_model(common.load(path), common.start("cpu", "float64"))
        with torch.no_grad():
            logits = model.hidden(windows[:, :-1]) @ model.head.weight[: model.config.vocab].T
        expected = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), windows[:, 1:], reduction="none"
        ).mean(1)
        (row,) = rows_in(tmp_path, path.stem, "text")
        assert row["losses"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["loss"] == pytest.approx(float(expected.mean()), abs=1e-5)
        found.append(row)
    logged = [line["held_out"] for line in lines_of(world.base) if "held_out" in line][-1]
    assert statistics.mean(found[0]["losses"][:4]) == pytest.approx(logged, abs=1e-5)
    assert found[0]["content"] == found[1]["content"] and found[0]["losses"] != found[1]["losses"]


def test_at_most_256_windows_of_text_are_measured_once(world, tmp_path, calls, monkeypatch):
    ids = np.random.default_rng(0).integers(300, size=300 * 64)
    tokens.write_shard(tmp_path / "val_000.bin", ids, "toy")

    def losses(model, rows, *_):
        calls.append("text")
        return [1.0] * len(rows)

    monkeypatch.setattr(evaluation, "held_out_losses", losses)
    for _ in range(2):
        call("eval", world.base, results=tmp_path, text=tmp_path, **FEW)
    (row,) = rows_in(tmp_path, "step10", "text")
    assert (len(row["losses"]), row["loss"]) == (256, 1.0) and calls == ["solve", "solve", "text"]


def test_weights_that_give_nan_make_no_row(world, measured, tmp_path, capsys):
    """Each weight is a number, and the log-probs are none: the head's products overflow."""
    saved = torch.load(world.base, weights_only=True)
    for name, x in saved["model"].items():
        if name in ("norm.weight", "head.weight"):
            x.mul_(1e30)
    torch.save(saved, tmp_path / "huge.pt")
    message = refused(capsys, "eval", tmp_path / "huge.pt", results=tmp_path / "rows", **FEW)
    assert "NaN" in message and str(tmp_path / "huge.pt") in message
    assert not list(tmp_path.rglob("*.jsonl*"))


# -------------------------------------------------------------------------------- the shots


def test_draws_of_the_shots(measured, tmp_path, shown):
    """Other shots and noise by another seed; each draw has a file, and is a seed of the base."""
    how = FEW | dict(shots="3,0", n=4, temperature=1.0, limit=8)
    for folder, draw in (("a", 0), ("a", 1), ("a", 2), ("b", 1), ("a", None)):
        more = {} if draw is None else {"shot_seed": draw}
        call("eval", measured.base, results=tmp_path / folder, **how | more)
    drawn = ["step10-s0.jsonl", "step10-s1.jsonl", "step10-s2.jsonl"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*drawn, "step10.jsonl"]
    assert (tmp_path / "a" / drawn[1]).read_bytes() == (tmp_path / "b" / drawn[1]).read_bytes()
    with_shots = shown[::2]
    assert len({tuple(ids) for ids in with_shots[:3]}) == 3 and with_shots[3] == with_shots[1]
    assert all(len(set(ids)) == 3 for ids in with_shots)
    assert with_shots[4] == [f"easy-shots-{i}" for i in range(3)] and shown[1::2] == [[]] * 5
    rows = [rows_in(tmp_path / "a", f"step10-s{draw}") for draw in range(3)]
    for draw, both in enumerate(rows):
        assert [(row["seed"], row["noise"]) for row in both] == [(draw, 1234 + draw)] * 2
    # without shots the noise alone is another
    assert rows[1][1]["log_prob"] != rows[2][1]["log_prob"]
    call("eval", measured.trained, results=tmp_path, shot_seed=5, **FEW)
    # the seed it was trained with, in its curve as well
    assert [row["seed"] for row in rows_in(tmp_path, "rl-s5")] == [0, 0]


def test_no_question_is_shown_its_own_solution(measured, tmp_path):
    """Where the shots are among the questions, as in a user's own files."""
    questions = problems.load(measured.easy, "val")[:4]
    write_rows(tmp_path / "shots.jsonl", problems.load(measured.easy, "shots")[:3] + questions)
    for seed in (None, *range(20)):
        found = problems.shots(tmp_path, 3, questions, seed)
        assert sorted(shot["id"] for shot in found) == [f"easy-shots-{i}" for i in range(3)]
    with pytest.raises(ValueError, match="--shots"):
        problems.shots(tmp_path, 4, questions, 0)
    assert len(problems.shots(tmp_path, 4, questions, exactly=False)) == 3
    assert problems.shots("no folder", 0, questions) == []


def test_a_file_of_questions_has_its_shots_beside_it(measured, shown, tmp_path):
    """Not its own questions, solutions and all."""
    easy = measured.easy / "val.jsonl"
    call("eval", measured.base, questions=easy, shots=2, results=tmp_path, **FEW)
    call("sample", measured.base, questions=easy, shots=2, first=1, n=1, max_new=4)
    assert shown == [["easy-shots-0", "easy-shots-1"]] * 2


# ------------------------------------------------------------------- what is measured again


def test_a_second_run_measures_nothing(measured, kept, calls):
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    call("eval", measured.base, measured.trained, results=kept, **HOW)
    assert calls == []
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_an_interrupted_run_goes_on(measured, kept, calls, monkeypatch):
    """Until the last row is measured, a reader of the folder sees what was there before."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    before = (kept / "rl.jsonl").read_bytes()
    words = [measured.trained, *flags(results=kept, **HOW | {"temperature": 1})]
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "score", stop)
        with pytest.raises(SystemExit) as stopped:
            call("eval", *words, "--overwrite")
    assert stopped.value.code == 130 and calls == ["solve"]
    names = {path.name for path in kept.iterdir()}
    assert names == {"rl.jsonl", "rl.jsonl.resume", "step10.jsonl"}
    assert (kept / "rl.jsonl").read_bytes() == before
    call("eval", *words)
    assert calls == ["solve"], "the first row is not measured again"
    assert {path.name for path in kept.iterdir()} == {"rl.jsonl", "step10.jsonl"}
    found = [(row["kind"], row.get("temperature")) for row in rows_in(kept, "rl")]
    assert {*found} == {("pass", 1), ("general", None), ("curve", None)}


def test_a_killed_run_goes_on(measured, calls, tmp_path):
    words = [measured.base, *flags(results=tmp_path, **HOW)]
    process = start("eval", *words)
    assert "easy val 1-shot" in process.stdout.readline()
    process.kill()
    process.communicate()
    call("eval", *words)
    assert calls.count("solve") <= 1, "the first row is not measured again"
    assert [path.name for path in tmp_path.iterdir()] == ["step10.jsonl"]
    whole = (measured.results / "step10.jsonl").read_bytes()
    assert (tmp_path / "step10.jsonl").read_bytes() == whole


def test_rows_that_cannot_be_written(measured, tmp_path, monkeypatch, capsys):
    """What was there stays, and no temporary file does."""

    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "rl.jsonl").write_text("")
    monkeypatch.setattr("os.replace", full)
    assert "rl.jsonl" in refused(capsys, "eval", measured.trained, results=tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["rl.jsonl"]


def test_a_row_is_told_again_with_any_k(measured, kept, calls, capsys):
    """All answers are in it: another pass@k needs no new ones."""
    before = (kept / "rl.jsonl").read_bytes()
    call("eval", measured.trained, results=kept, **HOW | {"k": "4"})
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "0-shot" in line]
    (row,) = rows_in(kept, "rl", "pass")
    by_hand = statistics.fmean(1 - math.comb(8 - c, 4) / math.comb(8, 4) for c in row["correct"])
    assert f"pass@4 {100 * by_hand:.1f} " in said and "pass@8" not in said and str(kept) in said
    assert calls == [] and (kept / "rl.jsonl").read_bytes() == before


def test_what_was_measured_otherwise_is_in_the_way(measured, kept, calls, tmp_path, capsys):
    """A short look does not replace the answers of hours, unless --overwrite says so."""
    before = (kept / "rl.jsonl").read_bytes()

    def asked(**values):
        message = refused(capsys, "eval", measured.trained, results=kept, **HOW | values)
        assert "--overwrite" in message and str(kept / "rl.jsonl") in message
        assert calls == [] and (kept / "rl.jsonl").read_bytes() == before
        return message

    assert "easy with n 8 and not 16, temperature 0.6 and not 1.0" in asked(n=16, temperature=1)
    assert "easy with other questions" in asked(limit=4)
    easy = shutil.copytree(measured.easy, tmp_path / "easy")
    rows = problems.load(easy, "val")
    texts = [row["question"] for row in rows]
    rows[0]["question"], rows[1]["question"] = texts[1], texts[0]  # the same ids
    write_rows(easy / "val.jsonl", rows)
    assert "easy with other questions" in asked(questions=easy)
    call("eval", measured.trained, "--overwrite", results=kept, **HOW | {"temperature": 1})
    assert collections.Counter(calls) == {"solve": 1, "score": len(TASKS)}
    assert len(rows_in(kept, "rl")) == 4, "in the place of the old ones"


def test_other_shots_are_in_the_way(measured, calls, tmp_path, capsys):
    easy = shutil.copytree(measured.easy, tmp_path / "easy")
    how = dict(results=tmp_path, questions=easy, shots="2,0", **FEW)
    call("eval", measured.base, **how)
    write_rows(easy / "shots.jsonl", problems.load(measured.easy, "shots")[2:])
    calls.clear()
    assert "other questions, shots" in refused(capsys, "eval", measured.base, **how)
    assert calls == []


def test_other_weights_under_the_same_flags_are_measured_again(
    measured, world, kept, calls, tmp_path, monkeypatch, capsys
):
    """What changed is the code: the flags, and so config_hash, are the same. Rows of the weights
    before do not stay, whatever is measured of the new ones."""
    real = rl.advantages
    monkeypatch.setattr(rl, "advantages", lambda *given: -real(*given))
    call("rl", init=world.taught, out=tmp_path / "other.pt", **RL)
    before = shutil.copy(measured.trained, tmp_path / "before.pt")
    try:
        shutil.copy(tmp_path / "other.pt", measured.trained)
        calls.clear()
        call("eval", measured.trained, "--tasks=", results=kept, **HOW)
        assert (
            calls == ["solve"] and "rows of other weights are left out" in capsys.readouterr().out
        )
        new = common.weights_hash(measured.trained)
        assert {row["weights"] for row in rows_in(kept, "rl")} == {new}
        call("eval", measured.trained, results=kept, **HOW)
    finally:
        shutil.copy(before, measured.trained)
    assert collections.Counter(calls) == {"solve": 1, "score": len(TASKS)}


def test_a_checkpoint_named_twice_is_measured_once(measured, calls, tmp_path):
    twice = (measured.trained, measured.trained)
    call("eval", *twice, "--overwrite", results=tmp_path, **FEW)
    assert calls == ["solve"]


def test_recipes_of_one_seed_have_names_of_their_own(world, tmp_path):
    """`--recipe` names files and rows; the default file has the seed in its name."""
    shutil.copy(world.taught, tmp_path / "m.pt")
    how = RL | dict(steps=1, eval_questions=0, seed=3)
    call("rl", init=tmp_path / "m.pt", **how)
    call("rl", "--std_norm", init=tmp_path / "m.pt", recipe="rl-std", **how)
    names = ["m-rl-s3", "m-rl-std-s3"]
    assert {path.stem for path in tmp_path.glob("*.pt")} == {"m", *names}
    call("eval", *(tmp_path / f"{name}.pt" for name in names), results=tmp_path, **FEW)
    recipes = [rows_in(tmp_path, name)[0]["recipe"] for name in names]
    assert recipes == ["sft-gold->rl", "sft-gold->rl-std"]


# ------------------------------------------------------------------------- what is refused


def test_another_checkpoint_of_that_name_is_refused(measured, kept, calls, tmp_path, capsys):
    before = (kept / "rl.jsonl").read_bytes()
    other = shutil.copy(measured.trained, tmp_path / "rl.pt")
    assert str(measured.trained) in refused(capsys, "eval", other, results=kept, **HOW)
    assert calls == [] and (kept / "rl.jsonl").read_bytes() == before


def test_what_is_missing_is_said_before_the_long_part(measured, calls, tmp_path, capsys):
    how = dict(results=tmp_path / "rows", **HOW)
    message = refused(capsys, "eval", measured.trained, tmp_path / "typo.pt", **how)
    assert "typo.pt" in message
    there = measured.easy
    message = refused(capsys, "eval", measured.trained, questions=f"{there},{tmp_path}/x", **how)
    assert f"{tmp_path}/x" in message and calls == []


def test_a_checkpoint_that_names_no_questions(world, tmp_path, capsys, monkeypatch):
    """It can be measured on tasks alone, and a val.jsonl that lies about is not taken for its."""
    saved = torch.load(world.base, weights_only=True)
    saved["meta"]["questions"] = ""
    bare = tmp_path / "bare.pt"
    torch.save(saved, bare)
    monkeypatch.chdir(tmp_path)
    shutil.copy(world.data / "easy/val.jsonl", "val.jsonl")
    call("eval", bare, results="rows", **HOW | {"tasks": world.data / "tasks"})
    assert {row["kind"] for row in rows_in(tmp_path / "rows", "bare")} == {"general"}
    assert "--questions FOLDER" in refused(capsys, "eval", bare, results="none", **FEW)


def test_a_dot_in_the_name_of_a_folder(measured, tmp_path):
    """sums-1.0 and sums-1.5 are two sets of questions, and . has the name of the folder."""
    folders = [shutil.copytree(measured.easy, tmp_path / f"sums-1.{i}") for i in (0, 5)]
    call("eval", measured.trained, questions=",".join(map(str, folders)), results=tmp_path, **FEW)
    names = {row["benchmark"] for row in rows_in(tmp_path, "rl", "pass")}
    assert names == {"sums-1.0", "sums-1.5"}
    assert evaluation.name_of(".") == Path.cwd().name
    assert evaluation.name_of("data/easy/train.jsonl") == "train"


def test_only_final_opens_the_test_split(measured, tmp_path, monkeypatch, capsys):
    opened = []
    real = problems.load
    monkeypatch.setattr(
        problems, "load", lambda path, split: opened.append(split) or real(path, split)
    )
    call("eval", measured.trained, results=tmp_path, shots="0,2", **FEW)
    call("sample", measured.trained, first=1, n=1, max_new=4, shots=1)
    assert set(opened) == {"val", "shots"}
    test = measured.easy / "test.jsonl"
    for script, how in (("eval", dict(results=tmp_path)), ("sample", {})):
        assert "--final" in refused(capsys, script, measured.trained, questions=test, **how)
    assert "--split" in refused(capsys, "sample", measured.trained, split="test")
    how = dict(questions=test, eval_questions=0, out=tmp_path / "new.pt")
    assert "--final" in refused(capsys, "rl", init=measured.trained, **how)
    opened.clear()
    call("eval", measured.trained, "--final", results=tmp_path, **FEW)
    assert opened == ["test"]
    splits = [row["split"] for row in rows_in(tmp_path, "rl", "pass")]
    assert splits == ["val", "val", "test"]
    assert rows_in(tmp_path, "rl", "curve")[0]["split"] == "val"


def test_flags_that_do_not_go_together(measured, tmp_path, capsys):
    for words, named in ((["--json"], "--report"), (["--n", "4", "--k", "8"], "--n")):
        assert named in refused(capsys, "eval", measured.trained, *words, results=tmp_path)
    other = tmp_path / "other" / "rl.pt"
    message = refused(capsys, "eval", measured.trained, other, results=tmp_path)
    assert "one file name" in message
    two = f"{measured.easy},{tmp_path}/easy"
    assert "name" in refused(capsys, "eval", measured.trained, questions=two, results=tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- continuations, ranks


@torch.no_grad()
def test_continuation_log_probs_equal_a_loop_with_all_logits():
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    alone = common.start("cpu", "float64")

    def ids(length):
        return torch.randint(37, (length,), generator=generator).tolist()

    contexts = [ids(1 + 7 * i % 23) for i in range(12)]
    pairs = [(contexts[i % 12], ids(1 + 5 * i % 11)) for i in range(30)]
    pairs += [(contexts[5], [token]) for token in range(37)]  # one of them is the most probable
    pairs.append((ids(95), ids(8)))  # longer than the model's context of 96: its first tokens go
    expected = []
    for context, continuation in pairs:
        row = torch.tensor([[*context, *continuation][-97:]])
        hidden = model.hidden(row[:, :-1])[0, -len(continuation) :]
        logp = (hidden @ model.head.weight[:37].T).log_softmax(1)
        total = float(logp.gather(1, torch.tensor(continuation)[:, None]).sum())
        expected.append((total, logp.argmax(1).tolist() == continuation))
    for budget in (1, 60, 16384):  # one context by one, several together, all at once
        found = evaluation.continuation_log_probs(model, pairs, True, alone, budget=budget)
        assert [logp for logp, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-9)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(greedy for _, greedy in found[30:67]) == 1
    with pytest.raises(ValueError, match="97 tokens"):
        evaluation.continuation_log_probs(model, [([1], ids(97))], False, alone)


class Part(SimpleNamespace):
    """One of two ranks; what its `sum` is given is its part of the sums."""

    size = 2
    device = torch.device("cpu")

    def sum(self, *values):
        return [*values]


def test_ranks_share_the_windows_of_text(world):
    """An odd number of windows: each rank passes as many, and what is added up has each once."""
    model = common.load_model(common.load(world.base), common.start("cpu", "float64"))
    rows = tokens.Stream(world.data, "val", 64, 0).beginning(33)
    whole = evaluation.held_out_losses(model, rows, 5, common.start("cpu", "float64"))
    parts = [evaluation.held_out_losses(model, rows, 5, Part(rank=rank)) for rank in range(2)]
    assert all(0 in part for part in parts)
    assert [a + b for a, b in zip(*parts, strict=True)] == pytest.approx(whole, abs=1e-9)
