"""Beyond the paper: a share that moves, text as the second stream of mix.py, pre-training that goes
on from any weights."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import ran, signalled
from helpers import ALONE, PRETRAIN, call, changed, flags, lines_of, metrics, setup, weights
from runs import goes_on

import common
import mix
from data import problems, tokens
from data.files import write_rows
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
    sft_warmup=2,
    compile="false",
    dtype="float64",
)
TEXT = dict(tokens=3 * 1024, save_every=1, dtype="float64")
LENGTH = 64  # of PRETRAIN
READ = 10 * 1024 // LENGTH  # windows that the base checkpoint has read


def load(path):
    return common.load_model(common.load(path), ALONE)


class HandMadeAdam:
    """Kingma & Ba, algorithm 1, on a list of gradients; -> the updates at learning rate 1."""

    def __init__(self):
        self.m = 0
        self.v = 0
        self.t = 0

    def __call__(self, gradients):
        g = torch.cat([x.flatten() for x in gradients])
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g * g
        self.t += 1
        mean = self.m / (1 - 0.9**self.t)
        deviation = (self.v / (1 - 0.95**self.t)).sqrt()
        parts = (-mean / (deviation + 1e-8)).split([x.numel() for x in gradients])
        return [part.view_as(x) for part, x in zip(parts, gradients, strict=True)]


def windows(world, first, count, seed=0):
    """Windows first, first + 1, ... of the first epoch's order, from the shard's raw bytes.

    (count, LENGTH + 1) ids.
    """
    ids = np.fromfile(world.data / "train_000.bin", "<u2", offset=64).astype(np.int64)
    order = np.random.default_rng([seed, 0]).permutation((len(ids) - 1) // LENGTH)
    begins = [LENGTH * window for window in order[first : first + count]]
    return torch.from_numpy(np.stack([ids[begin : begin + LENGTH + 1] for begin in begins]))


def cross_entropy(model, ids, z_loss=0.0):
    """The mean over all tokens, with all logits at once."""
    logits = model.hidden(ids[:, :-1]).flatten(0, 1) @ model.head.weight[: model.config.vocab].T
    z_term = z_loss * logits.logsumexp(1).square().mean()
    return F.cross_entropy(logits, ids[:, 1:].flatten()) + z_term


def gradients_of(model, loss):
    """Those of a loss, clipped to a norm of 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    taken = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return taken


def furthest(path, model) -> float:
    """The largest difference of a checkpoint's weights from a model's."""
    found = weights(path)
    gaps = [(found[name] - p.detach()).abs().max() for name, p in model.named_parameters()]
    return float(max(gaps))


# ---- the share


def test_a_moving_share_equals_two_optimizers_by_hand(world, tmp_path):
    """Shares .2, .5, .8: each side's update from one theta with its own moments.

    Seen to fail with the share of the next step, with the shares exchanged and with the moments of
    a side kept still.
    """
    out = tmp_path / "mix.pt"
    call("mix", init=world.taught, out=out, share=0.2, share_end=0.8, **MIX)
    cfg = mix.Config(**common.parse_flags(mix.Config, flags(init="x", **MIX)))
    model = load(world.taught)
    easy = world.data / "easy"
    train = problems.load(easy, "train")
    encoding = tokens.encoding("toy")
    run = setup(cfg, model, encoding=encoding, form=problems.form(easy), train=train)
    sampler = Sampler(model)
    pairs = tokenise(run)
    sides = (HandMadeAdam(), HandMadeAdam())
    for step, share in enumerate((0.2, 0.5, 0.8)):
        batch, _ = rl_batch(run, sampler, step)
        taken = (
            rl_gradients(run, batch, None, None)[1],
            sft_gradients(run, sft_batch(run, pairs, step))[1],
        )
        rates = (
            share * cosine(step, 3, 1e-3, 5, floor=1.0),
            (1 - share) * cosine(step, 3, 2e-3, 2),
        )
        with torch.no_grad():
            for side, gradients, rate in zip(sides, taken, rates, strict=True):
                for p, delta in zip(model.parameters(), side(gradients), strict=True):
                    p += rate * delta
        sampler.refresh()
    assert furthest(out, model) < 1e-8
    assert [share for _, share in metrics(out, "share")] == [0.2, 0.5, 0.8]
    assert common.load(out)["meta"]["run"]["share_end"] == 0.8


def test_the_share_at_its_ends():
    def shares(share, end, steps):
        cfg = SimpleNamespace(share=share, share_end=end, steps=steps)
        return [mix.share_of(cfg, step) for step in range(steps)]

    # exactly, so that 0 and 1 are sft.py and rl.py bit for bit
    assert shares(0.1, None, 7) == shares(0.1, 0.1, 7) == [0.1] * 7
    assert shares(0.0, 1.0, 5) == [0, 0.25, 0.5, 0.75, 1]
    assert shares(0.3, 0.9, 1) == [0.3]


# ---- text as the second stream


def test_gradient_of_the_text_is_that_of_pre_training(world):
    """And two ranks together have what one has.

    Seen to fail with 1/n of a rank's own tokens and with step 0 at the beginning.
    """
    model = load(world.taught)
    stream = tokens.Stream(world.data, "train", LENGTH, 0, "toy", 10 * 1024)
    run = setup(SimpleNamespace(micro=4, clip=0.0), model)
    parts = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        batch = problems.text_batch(stream, 6, 2, ALONE._replace(rank=rank, size=size))
        assert batch.ids.shape == batch.target.shape == (6 // size, LENGTH)
        parts.append(sft_gradients(run, batch)[1])
    cross_entropy(model, windows(world, READ + 2 * 6, 6)).backward()
    for whole, one, other, p in zip(*parts, model.parameters(), strict=True):
        torch.testing.assert_close(whole, p.grad, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(one + other, whole, atol=1e-12, rtol=1e-12)


def test_mix_with_text(world, tmp_path):
    start = changed(world.taught, tmp_path / "start.pt", meta=lambda m: m | {"pretrain_seed": 3})
    call("mix", init=start, text=world.data, **MIX)
    out = tmp_path / "start-mix-text.pt"
    meta = common.load(out)["meta"]
    assert meta["recipe"] == "sft-gold->mix-text"
    assert (meta["tokens"], meta["length"]) == (10 * 1024, LENGTH)
    first = lines_of(out)[0]["sft_loss"]
    with torch.no_grad():
        expected = float(cross_entropy(load(start), windows(world, READ, 8, seed=3)))
    assert first == pytest.approx(expected, abs=1e-7)


def test_text_needs_no_solutions(world, tmp_path):
    easy = world.data / "easy"
    rows = [row | {"solutions": []} for row in problems.load(easy, "train")]
    write_rows(tmp_path / "easy/train.jsonl", rows)
    problems.write_form(tmp_path / "easy", problems.form(easy))
    where = dict(init=world.taught, out=tmp_path / "a.pt", questions=tmp_path / "easy")
    call("mix", text=world.data, **where, **MIX | {"steps": 1})


# ---- pre-training goes on


@pytest.mark.parametrize("name", ["base", "taught"])
def test_pretraining_goes_on(world, tmp_path, name):
    """From the base (the control) and from trained weights: the same text, that of steps 10 and 11
    of the first run, and a fresh optimizer.

    Seen to fail with the text from its beginning, with the seed of the trained checkpoint as that
    of the text, and with the moments of another run.
    """
    seeds = {"seed": 5, "pretrain_seed": 3}
    start = changed(getattr(world, name), tmp_path / "start.pt", meta=lambda m: m | seeds)
    call("pretrain", *PRETRAIN, data=world.data, init=start, **TEXT | {"tokens": 2048})
    out = tmp_path / "start-text/step2.pt"
    parent = common.load(start)["meta"]
    model = load(start)
    side = HandMadeAdam()
    for step, (_, loss, lr) in enumerate(metrics(out, "loss", "lr")):
        total = cross_entropy(model, windows(world, READ + 16 * step, 16, seed=3), z_loss=1e-5)
        assert loss == pytest.approx(total.item(), abs=1e-7)
        assert lr == cosine(step, 2, 4e-3, 2)
        deltas = side(gradients_of(model, total))
        with torch.no_grad():
            for p, delta in zip(model.parameters(), deltas, strict=True):
                p += lr * (delta - (0 if p is model.embed.weight else 0.05 * p))
    assert furthest(out, model) < 1e-7

    meta = common.load(out)["meta"]
    assert meta["recipe"] == {"base": "text", "taught": "sft-gold->text"}[name]
    assert (meta["tokens"], meta["step"], meta["length"]) == (12 * 1024, 2, LENGTH)
    assert (meta["seed"], meta["pretrain_seed"]) == (5, 3)
    assert (meta["parent"], meta["parent_hash"]) == (str(start), common.config_hash(parent))
    for kept in ("preset", "world", "questions", "tasks", "encoding"):
        assert meta[kept] == parent[kept]
    assert not list(tmp_path.glob("start-text/*.resume"))


def test_it_goes_on_once_more(world, tmp_path):
    """tokens count on, and so does the text."""
    words = flags(*PRETRAIN, data=world.data, **TEXT | {"tokens": 1024})
    one = tmp_path / "one/step1.pt"
    two = tmp_path / "two/step1.pt"
    call("pretrain", *words, init=world.taught, out=one.parent, seed=7)
    call("pretrain", *words, init=one, out=two.parent)
    meta = common.load(two)["meta"]
    assert meta["recipe"] == "sft-gold->text->text" and meta["tokens"] == 12 * 1024
    assert (meta["seed"], meta["pretrain_seed"]) == (7, 0)
    with torch.no_grad():
        expected = float(cross_entropy(load(one), windows(world, READ + 16, 16), z_loss=1e-5))
    assert lines_of(two)[0]["loss"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("stage", ["mix", "pretrain"])
def test_resume(world, tmp_path, stage):
    """Bit for bit, as for the other forms of the scripts."""

    def words(out):
        if stage == "mix":
            return flags(init=world.taught, text=world.data, out=out, **MIX)
        return flags(*PRETRAIN, init=world.taught, data=world.data, out=out.parent, **TEXT)

    whole = tmp_path / "whole/step3.pt"
    stopped = tmp_path / "stopped/step3.pt"
    call(stage, *words(whole))
    assert ran(lambda: (signalled(signal.SIGTERM, 1), call(stage, *words(stopped)))) == 143
    assert common.load(f"{stopped}.resume")["step"] == 2
    goes_on(stage, lambda _: whole, world, stopped, words(stopped))
