"""A checkpoint is whole or absent, is what it says, and never code."""

import os
import pickle
import signal
import zipfile

import pytest
import torch

import common
from faults import kill_self, ran
from helpers import ROOT, calls_in, changed, files, flags, refused, same_weights

CPU = common.World(0, 1, torch.device("cpu"), torch.float32)
SFT = dict(batch=8, steps=4, eval_questions=0)


def scripts_on(path, tmp_path) -> dict[str, list[str]]:
    """A command of each script that reads the checkpoint `path`."""
    start = flags(init=path, out=tmp_path / "out.pt")
    return {
        "sft": start,
        "rl": start,
        "mix": start,
        "pretrain": flags(init=path, out=tmp_path / "out"),
        "eval": flags(path, results=tmp_path / "results"),
        "sample": flags(path, prompt=" Q :"),
    }


# -------------------------------------------------------------------------------------- damaged


def without_its_end(base, out):
    out.write_bytes(base.read_bytes()[:-1000])


def half(base, out):
    out.write_bytes(base.read_bytes()[: base.stat().st_size // 2])


def another_bit(base, out):
    content = bytearray(base.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)


def packed_zeros(base, out):
    zeros = bytes(2**26)
    with zipfile.ZipFile(base) as whole, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, zeros if name.endswith("data/0") else whole.read(name))


def one_number_repeated(base, out):
    """A consistent terabyte in a small file."""

    def grow(tensors):
        sizes = {name: [2**19 if n == 96 else n for n in w.shape] for name, w in tensors.items()}
        return {name: torch.zeros(1).expand(size) for name, size in sizes.items()}

    changed(base, out, config=lambda config: config | {"width": 2**19}, model=grow)
    assert out.stat().st_size < 10**5


class Bytes:
    def __reduce__(self):
        return bytearray, (2**40,)


def a_terabyte_of_bytes(base, out):
    torch.save(torch.load(base, weights_only=True) | {"more": Bytes()}, out)


def config(**new):
    return lambda base, out: changed(base, out, config=lambda config: config | new)


def encoding(name):
    return lambda base, out: changed(base, out, meta=lambda meta: meta | {"encoding": name})


def fewer_ids(base, out):
    changed(base, out, config=lambda config: config | {"vocab": config["vocab"] - 1})


def weights_with(value):
    def damage(base, out):
        def model(weights):
            weights["head.weight"][3, 5] = value
            return weights

        changed(base, out, model=model)

    return damage


BROKEN = {  # how it is made, and what is said
    "absent": (lambda base, out: None, "no checkpoint at"),
    "a folder": (lambda base, out: out.mkdir(), "no checkpoint at"),
    "empty": (lambda base, out: out.write_bytes(b""), "truncated"),
    "half": (half, "truncated"),
    "without its end": (without_its_end, "truncated"),
    "text": (lambda base, out: out.write_text("hello\n" * 100), "truncated"),
    "another bit": (another_bit, "truncated"),
    "packed zeros": (packed_zeros, "truncated"),
    "something of torch": (lambda base, out: torch.save({"model": {}}, out), "format"),
    "other width": (config(width=128, ffn=512), "another model"),
    "other depth": (config(layers=5), "another model"),
    "other fields": (config(experts=8), "another model"),
    "a million layers": (config(layers=10**6), "another model"),
    "a terabyte by its config": (config(width=2**20, ffn=2**20, heads=2**10), "another model"),
    "sizes beyond all bounds": (config(width=2**62, heads=2), "another model"),
    "a terabyte of one number": (one_number_repeated, "refused"),
    "a terabyte of bytes": (a_terabyte_of_bytes, "refused"),
    "fewer ids": (fewer_ids, "toy"),
    "other encoding": (encoding("cl100k_base"), "cl100k_base"),
    "unknown encoding": (encoding("o200k_base"), "o200k_base"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_checkpoint(world, tmp_path, monkeypatch, capsys, kind):
    """Each in one line, and before memory is taken for the weights: in `place` that happens."""
    damage, says = BROKEN[kind]
    path = tmp_path / "a.pt"
    damage(world.base, path)
    monkeypatch.setattr(common, "materialize", None)
    before = files(tmp_path)
    for script in ("sft", "sample", "eval"):
        assert says in refused(capsys, script, *scripts_on(path, tmp_path)[script])
    assert files(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "mix", "eval", "sample"])
def test_weights_that_are_nan_are_refused(world, tmp_path, capsys, script, value):
    """One such weight got scores: pass@1 0.0, and NaN in the rows."""
    path = tmp_path / "a.pt"
    weights_with(value)(world.base, path)
    before = files(tmp_path)
    words = scripts_on(path, tmp_path)[script]
    words += flags(data=world.data) if script == "pretrain" else []
    message = refused(capsys, script, *words)
    assert str(path) in message and "head.weight" in message
    assert files(tmp_path) == before


# ------------------------------------------------------------------------------------------ code


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("inside", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(world, tmp_path, capsys, inside):
    path = tmp_path / "a.pt"
    mark = tmp_path / "was run"
    if inside == "torch":
        torch.save(torch.load(world.base, weights_only=True) | {"more": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    for script, words in scripts_on(path, tmp_path).items():
        assert str(path) in refused(capsys, script, *words)
    assert not mark.exists()
    if inside == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert mark.exists()  # the bomb was live


def sources():
    found = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "tests"]
    assert len(found) > 15
    return found


def test_nothing_that_is_loaded_can_run():
    """No source line unpickles without weights_only, evaluates text or lets a library do so."""
    modules = ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml")
    functions = ("eval", "exec", "__import__", "os.system", "np.load")
    functions += ("torch.jit.load", "torch.hub.load", "pd.read_pickle", "pd.eval")
    loads = 0
    for where, name, given, _ in calls_in(sources()):
        if name == "torch.load":
            loads += 1
            assert given.get("weights_only") == "True", where
        assert name.split(".")[0] not in modules, where
        assert name not in functions, where
        for flag in ("allow_pickle", "trust_remote_code", "shell"):
            assert given.get(flag, "False") == "False", where
    assert loads >= 1


# ------------------------------------------------------------------------------- whole or absent


def test_kill_between_write_and_rename_keeps_the_old_checkpoint(world, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(world.base.read_bytes())
    saved = common.load(path)
    model = common.load_model(saved, CPU)

    def zeros_and_kill():
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        os.replace = os.rename = lambda *_: kill_self()
        common.save(path, model, saved["meta"])

    assert ran(zeros_and_kill) == -signal.SIGKILL
    assert same_weights(path, world.base)  # the old one is whole, the new one lies beside it
    assert len(list(tmp_path.iterdir())) == 2
    common.save(path, model, saved["meta"])  # what was left behind is in nobody's way
    assert same_weights(path, world.base)
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_keeps_the_old_checkpoint(world, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(world.base.read_bytes())
    saved = common.load(path)
    model = common.load_model(saved, CPU)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device") as error:
        common.save(path, model, saved["meta"])
    assert str(path) in str(error.value)
    assert same_weights(path, world.base) and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------- what it says of itself


def test_config_hash_ignores_where_and_how():
    def meta(**run):
        run = {"lr": 1.0, "out": "a", "init": "b", "rows": 4, "seed": 0} | run
        return {"recipe": "rl", "step": 6, "run": run}

    same = meta(out="c", init="d", rows=8)
    assert common.config_hash(meta()) == common.config_hash(same)
    assert common.config_hash(meta()) != common.config_hash(meta(lr=2.0))
    assert common.config_hash(meta()) != common.config_hash(meta() | {"recipe": "sft"})


def test_a_file_that_does_not_say_the_length_of_its_text(world, tmp_path):
    """One of older code, by its own flags, or from elsewhere: the model's context."""

    def without(meta):
        return {name: value for name, value in meta.items() if name != "length"}

    base = changed(world.base, tmp_path / "base.pt", meta=without)
    taught = changed(world.taught, tmp_path / "taught.pt", meta=without)
    assert [common.load(path)["meta"]["length"] for path in (base, taught)] == [64, 512]
