"""mix.py beyond the two ends of its share: a share that moves, and text as the second stream."""

from types import SimpleNamespace

import pytest
import torch

import common
import mix
from data import problems, tokens
from data.files import write_rows
from faults import not_finite_at
from hand import (
    DOUBLE,
    LENGTH,
    HandMadeAdam,
    cross_entropy,
    difference,
    load,
    windows,
)
from helpers import call, changed, flags, metrics, refused, same_weights
from model import Sampler, cosine
from rl import rl_batch, rl_gradients
from sft import sft_batch, sft_gradients, tokenise

MIX = dict(
    questions_per_step=4,
    group=4,
    max_new=40,
    steps=3,
    save_every=1,
    eval_questions=0,
    lr=1e-3,
    batch=8,
    sft_lr=2e-3,
    sft_warmup=2,
    compile=False,
    dtype="float64",
)


def setup(world, model, **changes):
    """What `common.begin` would give."""
    folder = world.data / "easy"
    return common.Setup(
        cfg=mix.Config(init="x", questions=str(folder), **MIX | changes),
        world=DOUBLE,
        model=model,
        parent={},
        state=None,
        contents={},
        encoding=tokens.encoding("toy"),
        form=problems.form(folder),
        train=problems.load(folder, "train"),
        held_out=[],
    )


def test_a_moving_share_equals_two_optimizers_by_hand(world, tmp_path):
    """Shares .2, .5, .8: each side's update from one theta, with moments of its own."""
    out = tmp_path / "mix.pt"
    call("mix", *flags(init=world.taught, out=out, share=0.2, share_end=0.8, **MIX))
    model = load(world.taught)
    run = setup(world, model)
    sampler = Sampler(model)
    pairs = tokenise(run)
    sides = (HandMadeAdam(), HandMadeAdam())
    for step, share in enumerate((0.2, 0.5, 0.8)):
        batch, _ = rl_batch(run, sampler, step)
        taken = [
            rl_gradients(run, batch, None, None)[1],
            sft_gradients(run, sft_batch(run, pairs, step))[1],
        ]
        rates = [
            share * cosine(step, 3, 1e-3, 5, floor=1.0),
            (1 - share) * cosine(step, 3, 2e-3, 2),
        ]
        with torch.no_grad():
            for side, gradient, rate in zip(sides, taken, rates, strict=True):
                for p, delta in zip(model.parameters(), side(gradient), strict=True):
                    p += rate * delta
        sampler.refresh()
    assert difference(out, model) < 1e-8
    assert [share for _, share in metrics(out, "share")] == [0.2, 0.5, 0.8]


def test_the_share_at_its_ends():
    def shares(share, end, steps):
        cfg = SimpleNamespace(share=share, share_end=end, steps=steps)
        return [mix.share_of(cfg, step) for step in range(steps)]

    # exactly, so that 0 and 1 are sft.py and rl.py bit for bit
    assert shares(0.1, None, 7) == shares(0.1, 0.1, 7) == [0.1] * 7
    assert shares(0.0, 1.0, 5) == [0, 0.25, 0.5, 0.75, 1]
    assert shares(0.3, 0.9, 1) == [0.3]


# ----------------------------------------------------------------------- text as the second stream


def test_gradient_of_the_text_is_that_of_pre_training(world):
    """And two ranks together have what one has."""
    stream = tokens.Stream(world.data, "train", LENGTH, 0, "toy", 10 * 1024)

    def gradients(rank, size):
        batch = problems.text_batch(stream, 6, 2, DOUBLE._replace(rank=rank, size=size))
        assert len(batch.ids) == 6 // size
        run = setup(world, load(world.taught), clip=0.0, micro=4)
        return sft_gradients(run, batch)[1]

    model = load(world.taught)
    cross_entropy(model, windows(world, 10 * 1024 // LENGTH + 2 * 6, 6)).backward()
    by_hand = [p.grad for p in model.parameters()]
    both = [gradients(0, 2), gradients(1, 2)]
    for one, first, second, plain in zip(gradients(0, 1), *both, by_hand, strict=True):
        torch.testing.assert_close(one, plain, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(first + second, one, atol=1e-12, rtol=1e-12)


def test_mix_with_text(world, tmp_path):
    """The text goes on where the pre-training of the checkpoint stopped, in its order."""
    start = changed(world.taught, tmp_path / "start.pt", meta=lambda m: m | {"pretrain_seed": 3})
    call("mix", *flags(init=start, text=world.data, **MIX))
    out = tmp_path / "start-mix-text.pt"
    meta = common.load(out)["meta"]
    assert meta["recipe"] == "sft-gold->mix-text"
    assert (meta["tokens"], meta["length"]) == (10 * 1024, LENGTH)
    first = metrics(out, "sft_loss")[0][1]
    with torch.no_grad():
        by_hand = cross_entropy(load(start), windows(world, 160, 8, seed=3))
    assert first == pytest.approx(float(by_hand), abs=1e-7)


def test_text_needs_no_solutions(world, tmp_path):
    folder = tmp_path / "easy"
    rows = problems.load(world.data / "easy", "train")
    write_rows(folder / "train.jsonl", [row | {"solutions": []} for row in rows])
    problems.write_form(folder, problems.form(world.data / "easy"))
    where = dict(init=world.taught, out=tmp_path / "a.pt", text=world.data, questions=folder)
    call("mix", *flags(**where, **MIX | {"steps": 1}))


def test_resume_with_text(world, tmp_path, monkeypatch, capsys):
    """Bit for bit, as for the other forms of the scripts."""
    outs = [tmp_path / name / "step3.pt" for name in ("whole", "stopped")]
    words = [flags(init=world.taught, text=world.data, out=out, **MIX) for out in outs]
    call("mix", *words[0])
    with monkeypatch.context() as patch:
        not_finite_at(2 * 2, patch)  # mix has two gradients a step
        refused(capsys, "mix", *words[1])
    call("mix", *words[1], "--resume")
    assert same_weights(*outs)
    names = ("loss", "sft_loss", "gradient_norm")
    one, two = [metrics(out, *names) for out in outs]
    assert one == [line for line in two if line[1] is not None]
