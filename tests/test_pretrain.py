"""Pre-training that goes on from the weights of any checkpoint."""

import pytest
import torch

import common
from faults import not_finite_at
from hand import LENGTH, HandMadeAdam, clipped_gradients, cross_entropy, difference, load, windows
from helpers import PRETRAIN, call, changed, flags, metrics, refused, same_weights
from model import cosine

TEXT = dict(tokens=3 * 1024, save_every=1, dtype="float64")


@pytest.mark.parametrize("name", ["base", "taught"])
def test_pretraining_goes_on(world, tmp_path, name):
    """From the base (the control) and from trained weights: the text of steps 10 and 11 of the
    first run, and a fresh optimizer.
    """
    seeds = {"seed": 5, "pretrain_seed": 3}
    start = changed(getattr(world, name), tmp_path / "start.pt", meta=lambda m: m | seeds)
    call("pretrain", *flags(*PRETRAIN, data=world.data, init=start, **TEXT | {"tokens": 2048}))
    out = tmp_path / "start-text/step2.pt"
    parent = common.load(start)["meta"]
    model = load(start)
    side = HandMadeAdam()
    for step, (_, loss, lr) in enumerate(metrics(out, "loss", "lr")):
        rows = windows(world, 160 + 16 * step, 16, seed=3)
        total = cross_entropy(model, rows, z_loss=1e-5)
        assert loss == pytest.approx(total.item(), abs=1e-7)
        assert lr == cosine(step, 2, 4e-3, 2)
        total.backward()
        with torch.no_grad():
            for p, delta in zip(model.parameters(), side(clipped_gradients(model)), strict=True):
                decay = 0 if p is model.embed.weight else 0.05
                p += lr * (delta - decay * p)
    assert difference(out, model) < 1e-7

    meta = common.load(out)["meta"]
    assert meta["recipe"] == {"base": "text", "taught": "sft-gold->text"}[name]
    assert (meta["tokens"], meta["step"], meta["length"]) == (12 * 1024, 2, LENGTH)
    assert (meta["seed"], meta["pretrain_seed"]) == (5, 3)
    assert (meta["parent"], meta["parent_hash"]) == (str(start), common.config_hash(parent))
    kept = ("preset", "world", "questions", "tasks", "encoding")
    assert all(meta[name] == parent[name] for name in kept)
    assert not list(tmp_path.glob("start-text/*.resume"))


def test_it_goes_on_once_more(world, tmp_path):
    """The tokens count on, and so does the text."""
    words = flags(*PRETRAIN, data=world.data, warmup=0, **TEXT | {"tokens": 1024})
    one = tmp_path / "one/step1.pt"
    two = tmp_path / "two/step1.pt"
    call("pretrain", *words, init=world.taught, out=one.parent, seed=7)
    call("pretrain", *words, init=one, out=two.parent)
    meta = common.load(two)["meta"]
    assert meta["recipe"] == "sft-gold->text->text"
    assert (meta["tokens"], meta["seed"], meta["pretrain_seed"]) == (12 * 1024, 7, 0)
    ((_, loss),) = metrics(two, "loss")
    with torch.no_grad():
        total = cross_entropy(load(one), windows(world, 176, 16), z_loss=1e-5)
    assert loss == pytest.approx(float(total), abs=1e-7)


def test_a_public_checkpoint_of_a_size_without_a_preset(world, tmp_path):
    """data/hf.py names it by its layers and width."""
    start = changed(world.base, tmp_path / "start.pt", meta=lambda m: m | {"preset": "2x32"})
    words = flags(*PRETRAIN, data=world.data, warmup=0, **TEXT | {"tokens": 1024})
    call("pretrain", *words, init=start)
    assert common.load(tmp_path / "start-text/step1.pt")["meta"]["preset"] == "2x32"


@pytest.mark.parametrize("doc_mask", ["true", "false"])
def test_rows_longer_than_the_context_are_refused(world, tmp_path, capsys, doc_mask):
    """Before anything is removed."""
    words = flags(*PRETRAIN, data=world.data, warmup=0, **TEXT | {"tokens": 1024})
    call("pretrain", *words, init=world.taught, out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    long = dict(init=world.taught, out=tmp_path, length=1024, doc_mask=doc_mask)
    message = refused(capsys, "pretrain", *words, "--overwrite", **long)
    assert "--length 1024" in message and before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_resume_from_a_checkpoint(world, tmp_path, monkeypatch, capsys):
    """Bit for bit, as for the other forms of the scripts."""
    outs = [tmp_path / name / "step3.pt" for name in ("whole", "stopped")]
    start = flags(*PRETRAIN, init=world.taught, data=world.data, **TEXT)
    call("pretrain", *start, out=outs[0].parent)
    with monkeypatch.context() as patch:
        not_finite_at(2, patch)
        refused(capsys, "pretrain", *start, out=outs[1].parent)
    call("pretrain", *start, "--resume", out=outs[1].parent)
    assert same_weights(*outs)
    one, two = [metrics(out, "loss", "gradient_norm") for out in outs]
    assert one == [line for line in two if line[1] is not None]
