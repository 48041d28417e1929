"""Bad input: one line on stderr that says what to do, exit status 2, and nothing lost or overwritten."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import pytest
import torch
from helpers import PRETRAIN, ROOT, call, flags, same_weights

import model as network
from data import checkpoint, ranks, run

SFT = dict(batch=8, steps=4, save_every=1, eval_questions=0, warmup=1)
RL = dict(questions_per_step=4, group=4, max_new=24, steps=4, save_every=1, eval_questions=0, compile="false")
TRAINERS = {"sft": SFT, "rl": RL, "mix": RL | {"batch": 8}}


@pytest.fixture()
def refused(capsys):
    return functools.partial(helpers.refused, capsys)


def changed(path, out, **changes):
    """A checkpoint with parts replaced by functions of them."""
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {name: change(saved[name]) for name, change in changes.items()}, out)
    return out


def files(folder) -> dict:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- flags


@pytest.mark.parametrize("words, says", [
    (["--lrr", "1"], "unknown flag --lrr, did you mean --lr?"),
    (["--query_per_step", "4"], "unknown flag --query_per_step, did you mean --questions_per_step?"),
    (["--zzz"], "unknown flag --zzz; --help lists them"),
    (["ckpt/a.pt"], "unknown flag ckpt/a.pt"),
    (["--steps", "many"], "--steps takes a whole number from 0, not 'many'"),
    (["--steps", "1.5"], "--steps takes a whole number from 0, not '1.5'"),
    (["--steps", "inf"], "--steps takes a whole number from 0, not 'inf'"),
    (["--lr", "fast"], "--lr takes a number, not 'fast'"),
    (["--lr=nan"], "--lr takes a number, not 'nan'"),
    (["--std_norm", "maybe"], "--std_norm takes true or false, not 'maybe'"),
    (["--steps"], "--steps needs a value"),
    ([], "--init is needed; --help says what it is"),
    (["--init", "x.pt", "--dtype", "int8"], "--dtype takes auto, bfloat16, float32 or float64, not 'int8'"),
])  # fmt: skip
def test_wrong_flag(refused, words, says):
    assert refused("rl", *words).startswith(says)


def test_flags_are_read():
    import eval as evaluation
    import pretrain

    cfg = run.configure(pretrain.Config, "--tokens 2.8M --save_tokens 1k,2000,3e3 --lr=1e-3 --resume --compile false".split())
    assert (cfg.tokens, cfg.save_tokens, cfg.lr) == (2_800_000, (1000, 2000, 3000), 1e-3)
    assert (cfg.resume, cfg.compile, cfg.spike) == (True, False, 0)
    cfg = run.configure(evaluation.Config, ["a.pt", "b.pt", "--final", "--k", "1,4"])
    assert (cfg.checkpoints, cfg.final, cfg.k) == (("a.pt", "b.pt"), True, (1, 4))


@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "mix", "eval", "sample"])
def test_help_shows_each_field_with_its_reason(capsys, script):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    lines = capsys.readouterr().out.partition("flags:\n")[2].splitlines()
    assert stop.value.code == 0 and len(lines) > 8
    for line in lines:
        assert re.match(r"  --\w+ +\w.{5}", line), f"no reason beside {line}"


def test_help_into_a_pipe_that_is_closed(monkeypatch, capsys):
    """`sample.py --help | head -3`: nothing is said about it, neither here nor when Python flushes at its end."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            call("sample", "--help")
        pipe.flush()
    assert stop.value.code == 0 and not capsys.readouterr().err


def test_a_real_process_says_one_line(tmp_path):
    """What the other tests see in this process, once as a user sees it."""
    done = subprocess.run([sys.executable, "sft.py", "--init", str(tmp_path / "none.pt")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sft.py: error: no checkpoint at {tmp_path}/none.pt; pretrain.py makes them, --init takes their path\n"


# ---- checkpoints


def truncated(base, out):
    out.write_bytes(base.read_bytes()[:-1000])


def half(base, out):
    out.write_bytes(base.read_bytes()[: base.stat().st_size // 2])


def other_shape(base, out):
    changed(base, out, config=lambda c: c | {"width": 128, "ffn": 512})


def other_layers(base, out):
    changed(base, out, config=lambda c: c | {"layers": 5})


def other_fields(base, out):
    changed(base, out, config=lambda c: c | {"experts": 8})


def other_vocabulary(base, out):
    changed(base, out, config=lambda c: c | {"vocab": c["vocab"] - 1})


def other_encoding(base, out):
    changed(base, out, meta=lambda m: m | {"encoding": "cl100k_base"})


def unknown_encoding(base, out):
    changed(base, out, meta=lambda m: m | {"encoding": "o200k_base"})


def another_bit(base, out):
    content = bytearray(base.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)


def a_million_layers(base, out):
    changed(base, out, config=lambda c: c | {"layers": 10**6})


def a_terabyte(base, out):
    changed(base, out, config=lambda c: c | {"width": 2**20, "ffn": 2**20, "heads": 2**10})


def beyond_all_bounds(base, out):
    changed(base, out, config=lambda c: c | {"width": 2**62, "heads": 2})


def one_number_repeated(base, out):  # a consistent terabyte in a small file
    def grow(tensors):
        return {name: torch.zeros(1).expand([2**19 if size == 96 else size for size in w.shape]) for name, w in tensors.items()}

    changed(base, out, config=lambda c: c | {"width": 2**19}, model=grow)
    assert out.stat().st_size < 10**5


def packed_zeros(base, out):
    with zipfile.ZipFile(base) as whole, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, bytes(2**26) if name.endswith("data/0") else whole.read(name))


class Bytes:
    def __reduce__(self):
        return bytearray, (2**40,)


def a_terabyte_of_bytes(base, out):
    torch.save(torch.load(base, weights_only=True) | {"more": Bytes()}, out)


BROKEN = {
    "absent": (lambda base, out: None, "no checkpoint at"),
    "a folder": (lambda base, out: out.mkdir(), "no checkpoint at"),
    "empty": (lambda base, out: out.write_bytes(b""), "is truncated or not a checkpoint"),
    "half": (half, "is truncated or not a checkpoint"),
    "without its end": (truncated, "is truncated or not a checkpoint"),
    "text": (lambda base, out: out.write_text("hello\n" * 100), "is truncated or not a checkpoint"),
    "something of torch": (lambda base, out: torch.save({"model": {}}, out), "is not a checkpoint of this project"),
    "other width": (other_shape, "another model"),
    "other depth": (other_layers, "another model"),
    "other fields": (other_fields, "another model"),
    "another bit": (another_bit, "is truncated or not a checkpoint"),
    "a million layers": (a_million_layers, "another model"),
    "a terabyte by its config": (a_terabyte, "another model"),
    "sizes beyond all bounds": (beyond_all_bounds, "another model"),
    "a terabyte of one number": (one_number_repeated, "of weights: refused"),
    "packed zeros": (packed_zeros, "is truncated or not a checkpoint"),
    "a terabyte of bytes": (a_terabyte_of_bytes, "refused, nothing in it was run"),
    "other vocabulary": (other_vocabulary, "ids, its encoding toy has"),
    "other encoding": (other_encoding, "cl100k_base"),
    "unknown encoding": (unknown_encoding, "unknown encoding 'o200k_base'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoint(refused, world, tmp_path, monkeypatch, kind):
    """Each in one line, and before memory is taken for the weights: `place` is where that happens."""
    damage, says = BROKEN[kind]
    path = tmp_path / "a.pt"
    damage(world.base, path)
    monkeypatch.setattr(ranks, "place", None)
    before = files(tmp_path)
    assert says in refused("sft", init=path, **SFT)
    assert says in refused("sample", path, prompt=" Q :")
    assert says in refused("eval", path, results=tmp_path / "results")
    assert files(tmp_path) == before


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("inside", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(refused, world, tmp_path, inside):
    """Seen to fail with weights_only=False."""
    path, mark = tmp_path / "a.pt", tmp_path / "was run"
    if inside == "torch":
        torch.save(torch.load(world.base, weights_only=True) | {"more": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "refused, nothing in it was run" in refused("rl", init=path, **RL)
    assert not mark.exists()
    torch.load(path, weights_only=False) if inside == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the bomb was live


# ---- prompts, questions, text


def test_prompt_with_an_unknown_word(refused, world):
    assert "the toy encoding has no ' zebra'" in refused("sample", world.base, prompt=" Q : sam has 2 zebra")
    assert "the toy encoding has no" in refused("sample", world.base, prompt=" Q : é €")


def test_prompt_that_is_too_long(refused, world):
    assert "more than the model's context of 512" in refused("sample", world.base, prompt=" Q" * 500)


@pytest.mark.parametrize("line, says", [
    ("", "not one JSON object a line"), ("[1]", '"id" must be text'), ('{"id": "b", "question": "x"}', '"answer" must be text'),
    ('{"id": "b", "question": " ", "answer": "1", "solutions": []}', "the question is empty"),
    ('{"id": "b", "question": "sam ?", "answer": "1 8", "solutions": []}', "the answer must be a number"),
])  # fmt: skip
def test_malformed_questions_name_the_line(refused, world, tmp_path, line, says):
    path = tmp_path / "train.jsonl"
    path.write_text((world.data / "easy/train.jsonl").read_text().splitlines()[0] + "\n" + line + "\n")
    message = refused("rl", init=world.base, questions=tmp_path, out=tmp_path / "a.pt", **RL)
    assert f"{path}:2: " in message and says in message and not (tmp_path / "a.pt").exists()


def test_empty_questions_and_none_at_all(refused, world, tmp_path):
    for script, settings in TRAINERS.items():
        assert "train.jsonl: cannot be read" in refused(script, init=world.base, questions=tmp_path, out=tmp_path / "a.pt", **settings)
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl: the file is empty" in refused("rl", init=world.base, questions=tmp_path, out=tmp_path / "a.pt", **RL)


def test_question_with_an_unknown_word(refused, world, tmp_path):
    rows = [{"id": str(i), "question": "sam has 2 zebra ?", "answer": "2", "solutions": ["#### 2"]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for script, settings in TRAINERS.items():
        assert "has no ' zebra'" in refused(script, init=world.base, questions=tmp_path, out=tmp_path / "a.pt", **settings)


def test_a_file_of_questions_is_not_validated_on_itself(refused, world, tmp_path):
    """Seen to fail with a validation of training questions, in silence."""
    questions = world.data / "easy/train.jsonl"
    for script, settings in TRAINERS.items():
        message = refused(script, init=world.base, questions=questions, out=tmp_path / "a.pt", **settings | {"eval_questions": 2})
        assert message == f"{questions} is all for training: --eval_questions 0, or a folder that has val.jsonl beside train.jsonl"


def test_one_answer_a_question_has_no_advantage(refused, world, tmp_path):
    for script in ("rl", "mix"):
        settings = TRAINERS[script] | {"group": 1}
        assert "--group takes 2 or more" in refused(script, init=world.base, out=tmp_path / "a.pt", **settings)


@pytest.mark.parametrize("solutions, says", [("0", "--solutions"), ("-1", "--solutions"), ("gold", "--solutions")])
def test_wrong_number_of_solutions(refused, world, tmp_path, solutions, says):
    assert says in refused("sft", init=world.base, out=tmp_path / "a.pt", **SFT | {"solutions": solutions})


def test_no_text(refused, tmp_path):
    message = refused("pretrain", *PRETRAIN, data=tmp_path, out=tmp_path / "ckpt")
    assert message.startswith(f"no train_*.bin in {tmp_path}: make it with")


# ---- sizes


def test_batch_that_does_not_divide(refused, world, tmp_path):
    message = refused("pretrain", "--compile", "false", data=world.data, out=tmp_path, batch_tokens=1000, length=64)
    assert message == "--batch_tokens 1000 is not a multiple of 1 ranks x 64 tokens: 960 or 1024 would be"
    with pytest.raises(ValueError, match="--batch 10 does not divide over 4 ranks: 8 or 12 would"):
        ranks.World(0, 4, torch.device("cpu"), torch.float32).share(10, "--batch")
    with pytest.raises(ValueError, match="--batch 3 does not divide over 4 ranks: 4 or 8 would"):
        ranks.World(0, 4, torch.device("cpu"), torch.float32).share(3, "--batch")


@pytest.mark.parametrize("script, flag", [
    ("sft", "batch"), ("sft", "micro"), ("rl", "questions_per_step"), ("rl", "group"), ("rl", "micro"), ("rl", "max_new"), ("rl", "rows"),
    ("mix", "batch"), ("mix", "group")])  # fmt: skip
@pytest.mark.parametrize("value", [0, -4])
def test_size_below_one(refused, world, tmp_path, script, flag, value):
    message = refused(script, init=world.base, out=tmp_path / "a.pt", **TRAINERS[script] | {flag: value})
    assert message == f"--{flag} takes a whole number from 1, not '{value}'" and not list(tmp_path.iterdir())


def test_checkpoint_outside_the_run(refused, world, tmp_path):
    for words in (["--save_steps", "5"], ["--save_steps", "0"], ["--save_tokens", "9k"]):
        assert "lies outside the run of 2 steps" in refused("pretrain", *PRETRAIN, *words, data=world.data, out=tmp_path, tokens=2048)


def test_share_outside_zero_and_one(refused, world, tmp_path):
    assert "--share lies between 0" in refused("mix", init=world.base, out=tmp_path / "a.pt", share=1.5)


def test_unknown_preset(refused, world, tmp_path):
    assert refused("pretrain", preset="2b", data=world.data, out=tmp_path) == "no preset '2b': there are toy, toy-large, 190m, 1b, 4b"


def test_too_few_answers_for_k(refused, world):
    assert refused("eval", world.base, n=4) == "pass@32 needs --n of at least 32, not 4"


# ---- what is there already


@pytest.mark.parametrize("script", ["pretrain", *TRAINERS])
@pytest.mark.parametrize("what", ["step4.pt", "step4.pt.resume"])
def test_output_that_exists_is_not_overwritten(refused, world, tmp_path, script, what):
    """A finished run, or the state of one that was killed. Seen to fail without the last loop of `claim`."""
    (tmp_path / what).write_bytes(b"precious")
    (tmp_path / "step4.pt.metrics.jsonl").write_bytes(b"{}\n")
    before = files(tmp_path)
    words = flags(*PRETRAIN, data=world.data, out=tmp_path, tokens=4096) if script == "pretrain" else flags(
        init=world.base, out=tmp_path / "step4.pt", **TRAINERS[script])  # fmt: skip
    message = refused(script, *words)
    assert message == f"{tmp_path / what} exists: --resume continues that run, --overwrite replaces it"
    assert files(tmp_path) == before


def test_checkpoint_on_the_way_is_not_overwritten(refused, world, tmp_path):
    """Not only the last one: M_t of another run, too. Seen to fail without `others`."""
    (tmp_path / "step2.pt").write_bytes(b"precious")
    message = refused("pretrain", *PRETRAIN, "--save_steps", "2", data=world.data, out=tmp_path, tokens=4096)
    assert message.startswith(f"{tmp_path}/step2.pt exists") and (tmp_path / "step2.pt").read_bytes() == b"precious"


def stopped_at(step, monkeypatch):
    """A run whose gradient is not a number at update `step`, counted over all calls."""
    real, calls = ranks.gradients, []

    def gradients(*arguments):
        taken, norm = real(*arguments)
        calls.append(norm)
        return taken, float("nan") if len(calls) == step + 1 else norm

    monkeypatch.setattr(ranks, "gradients", gradients)


@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "mix"])
def test_loss_that_is_not_finite_stops_before_the_update(refused, world, tmp_path, monkeypatch, script):
    """The last saved state is the good one of step 2, and the run goes on from there once the cause is gone. Seen to fail
    with check_finite after the update and the save."""
    def words(folder):
        if script == "pretrain":
            return flags(*PRETRAIN, data=world.data, out=tmp_path / folder, tokens=4096, save_every=1)
        return flags(init=world.taught, out=tmp_path / folder / "step4.pt", **TRAINERS[script])

    call(script, *words("whole"))
    stopped_at(4 if script == "mix" else 2, monkeypatch)
    message = refused(script, *words("cut"))
    assert "gradient_norm is nan at step 2: stopped before the update, the last saved state is intact" in message
    assert not (tmp_path / "cut/step4.pt").exists() and checkpoint.load(tmp_path / "cut/step4.pt.resume")["step"] == 2
    monkeypatch.undo()
    call(script, *words("cut"), "--resume")
    assert same_weights(tmp_path / "cut/step4.pt", tmp_path / "whole/step4.pt")


@pytest.mark.parametrize("script", TRAINERS)
def test_weights_that_are_not_finite_stop_the_first_step(refused, world, tmp_path, script):
    path = changed(world.base, tmp_path / "bad.pt", model=lambda m: m | {"head.weight": m["head.weight"] * float("nan")})
    message = refused(script, init=path, out=tmp_path / "a.pt", **TRAINERS[script])
    assert "is nan at step 0" in message and not (tmp_path / "a.pt").exists()


def test_learning_rate_that_explodes(refused, world, tmp_path):
    """No trick: the second step meets weights of 1e30 and stops."""
    assert "stopped before the update" in refused("sft", init=world.base, out=tmp_path / "a.pt", lr=1e30, **SFT)
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("script", ["rl", "mix"])
def test_ratio_one_does_not_hide_a_mismatch_in_a_run(refused, world, tmp_path, monkeypatch, script):
    """A sampler whose log-probs are off by 0.5 stops the run, though the ratio is 1 in any case. Seen to fail without the
    check in rl.py, and in mix.py."""
    real = network.Sampler.__call__

    def off(*arguments, **more):
        samples = real(*arguments, **more)
        return samples._replace(logp=samples.logp - 0.5)

    monkeypatch.setattr(network.Sampler, "__call__", off)
    message = refused(script, init=world.taught, out=tmp_path / "a.pt", **TRAINERS[script])
    assert message.startswith("sampler and trainer differ by 0.5 in mean |log-prob| at step 0")
    assert not (tmp_path / "a.pt").exists()


def test_resume_with_other_settings(refused, world, tmp_path, monkeypatch):
    words = flags(init=world.taught, out=tmp_path / "a.pt", **SFT)
    stopped_at(2, monkeypatch)
    refused("sft", *words)
    before = files(tmp_path)
    assert "was made with --lr 0.001, now 0.003: keep the setting or --overwrite" in refused("sft", *words, "--resume", lr=3e-3)
    assert "--steps 4, now 9" in refused("sft", *flags(init=world.taught, out=tmp_path / "a.pt", **SFT | {"steps": 9}), "--resume")
    assert files(tmp_path) == before


def test_overwritten_run_does_not_resume_what_it_replaced(world, tmp_path, monkeypatch, refused):
    """--resume after an --overwrite that was killed goes on with the new run: not `finished`, because the old result is
    still there, and not from the old run's state. Seen to fail without `not state.exists()` and without the unlink."""
    words, state = flags(init=world.taught, out=tmp_path / "a.pt", **SFT), tmp_path / "a.pt.resume"
    stopped_at(2, monkeypatch)
    refused("sft", *words, lr=1e-3)
    monkeypatch.undo()
    stopped_at(0, monkeypatch)
    refused("sft", *words, "--overwrite")
    assert not state.exists()
    monkeypatch.undo()
    call("sft", *words, lr=1e-3)
    stopped_at(2, monkeypatch)
    refused("sft", *words, "--overwrite")
    monkeypatch.undo()
    call("sft", *words, "--resume")
    call("sft", *flags(init=world.taught, out=tmp_path / "b.pt", **SFT))
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")
