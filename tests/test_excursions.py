"""Beyond the paper: a share that moves, text as the second stream of mix.py, pre-training that goes on from any weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PRETRAIN, call, flags, metrics, refused, same_weights, weights
from test_errors import changed, stopped_at

import mix
from data import checkpoint, plan, problems, ranks, run, tokens
from model import Model, ModelConfig, Sampler, cosine
from rl import rl_backward, rl_batch
from sft import sft_backward, sft_batch, tokenise

DOUBLE = ranks.World(0, 1, torch.device("cpu"), torch.float64)
MIX = dict(questions_per_step=4, group=4, max_new=40, steps=3, save_every=1, eval_questions=0, lr=1e-3, batch=8, sft_warmup=2,
           compile="false", dtype="float64")  # fmt: skip
TEXT = dict(tokens=3 * 1024, save_every=1, dtype="float64")
LENGTH = 64  # of PRETRAIN


def load(path):
    return checkpoint.load_model(checkpoint.load(path), Model, ModelConfig, DOUBLE)


def gradients(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    taken = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return taken


class HandMadeAdam:
    """Kingma & Ba, algorithm 1, on a list of gradients; -> the update of each parameter at learning rate 1."""

    def __init__(self):
        self.m, self.v, self.t = 0, 0, 0

    def __call__(self, taken):
        g = torch.cat([x.flatten() for x in taken])
        self.m, self.v, self.t = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g * g, self.t + 1
        flat = -(self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.95**self.t)).sqrt() + 1e-8)
        return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in taken]), taken, strict=True)]


def windows(world, first, count, seed=0, length=LENGTH):
    """Windows first, first + 1, ... of the first epoch's order, from the shard's raw bytes: (count, length + 1)."""
    ids = np.fromfile(next(world.data.glob("train_*.bin")), "<u2", offset=64).astype(np.int64)
    order = np.random.default_rng([seed, 0]).permutation((len(ids) - 1) // length)
    return torch.from_numpy(np.stack([ids[i * length : i * length + length + 1] for i in order[first : first + count]]))


def cross_entropy(model, ids, z_loss=0.0):
    """The mean over all tokens, with all logits at once."""
    logits = model.hidden(ids[:, :-1]).flatten(0, 1) @ model.head.weight[: model.config.vocab].T
    return F.cross_entropy(logits, ids[:, 1:].flatten()) + z_loss * logits.logsumexp(1).square().mean()


# ---- the share


def test_a_moving_share_equals_two_optimizers_by_hand(world, tmp_path):
    """Shares .2, .5, .8: each side's update from one theta with its own moments. Seen to fail with the share of the next step,
    with the shares exchanged and with the moments of a side kept still."""
    call("mix", *flags(init=world.taught, out=tmp_path / "mix.pt", share=0.2, share_end=0.8, **MIX))
    cfg = run.configure(mix.Config, flags(init="x", **MIX))
    model, enc, rows = load(world.taught), tokens.encoding("toy"), problems.load(world.data / "easy", "train")
    sampler, pairs, sides = Sampler(model), tokenise(enc, rows, "1", 0), (HandMadeAdam(), HandMadeAdam())
    for step, share in enumerate((0.2, 0.5, 0.8)):
        rl_backward(model, rl_batch(sampler, rows, enc, cfg, step, DOUBLE)[0], cfg, DOUBLE)
        taken = [gradients(model)]
        sft_backward(model, sft_batch(pairs, tokens.pad_id(enc), 8, 0, step, DOUBLE), cfg, DOUBLE)
        taken.append(gradients(model))
        rates = share * cosine(step, 3, 1e-3, 5, floor=1.0), (1 - share) * cosine(step, 3, 2e-3, 2)
        with torch.no_grad():
            for side, gradient, rate in zip(sides, taken, rates, strict=True):
                for p, delta in zip(model.parameters(), side(gradient), strict=True):
                    p += rate * delta
        sampler.refresh()
    found = weights(tmp_path / "mix.pt")
    assert max(float((found[name] - p.detach()).abs().max()) for name, p in model.named_parameters()) < 1e-8
    assert [share for _, share in metrics(tmp_path / "mix.pt", "share")] == [0.2, 0.5, 0.8]
    assert checkpoint.load(tmp_path / "mix.pt")["meta"]["run"]["share_end"] == 0.8


def test_the_share_at_its_ends():
    def shares(share, end, steps):
        return [mix.share_of(SimpleNamespace(share=share, share_end=end, steps=steps), step) for step in range(steps)]

    assert shares(0.1, None, 7) == shares(0.1, 0.1, 7) == [0.1] * 7  # exactly, so that 0 and 1 are sft.py and rl.py bit for bit
    assert shares(0.0, 1.0, 5) == [0, 0.25, 0.5, 0.75, 1] and shares(0.3, 0.9, 1) == [0.3]


# ---- text as the second stream


def test_gradient_of_the_text_is_that_of_pre_training(world):
    """And two ranks together have what one has. Seen to fail with 1/n of a rank's own tokens and with step 0 at the beginning."""
    stream = tokens.Stream(world.data, "train", LENGTH, 0, "toy", 10 * 1024)
    taken = []
    for size in (1, 2):
        model = load(world.taught)
        for rank in range(size):
            batch = problems.text_batch(stream, 6, 2, DOUBLE._replace(rank=rank, size=size))
            assert batch.ids.shape == (6 // size, LENGTH + 1)
            sft_backward(model, batch, SimpleNamespace(micro=4), DOUBLE)
        taken.append([p.grad for p in model.parameters()])
    model = load(world.taught)
    cross_entropy(model, windows(world, 10 * 1024 // LENGTH + 2 * 6, 6)).backward()
    for one, two, plain in zip(*taken, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(one, plain, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(two, one, atol=1e-12, rtol=1e-12)


def test_mix_with_text(world, tmp_path):
    start = changed(world.taught, tmp_path / "start.pt", meta=lambda m: m | {"pretrain_seed": 3})
    call("mix", *flags(init=start, text=world.data, **MIX))
    meta = checkpoint.load(tmp_path / "start-mix-text.pt")["meta"]
    assert (meta["recipe"], meta["tokens"], meta["length"]) == ("sft-gold->mix-text", 10 * 1024, LENGTH)
    (_, first), *_ = metrics(tmp_path / "start-mix-text.pt", "sft_loss")
    with torch.no_grad():
        assert first == pytest.approx(float(cross_entropy(load(start), windows(world, 160, 8, seed=3))), abs=1e-7)


def test_text_needs_no_solutions(world, tmp_path):
    rows = [row | {"solutions": []} for row in problems.load(world.data / "easy", "train")]
    run.write_lines(tmp_path / "easy/train.jsonl", rows)
    call("mix", *flags(init=world.taught, out=tmp_path / "a.pt", text=world.data, questions=tmp_path / "easy", **MIX | {"steps": 1}))


# ---- pre-training goes on


@pytest.mark.parametrize("name", ["base", "taught"])
def test_pretraining_goes_on(world, tmp_path, name):
    """From the base (the control) and from trained weights: the same text, that of steps 10 and 11 of the first run, and a fresh
    optimizer. Seen to fail with the text from its beginning, with the seed of the trained checkpoint as that of the text, and
    with the moments of another run."""
    start = changed(getattr(world, name), tmp_path / "start.pt", meta=lambda m: m | {"seed": 5, "pretrain_seed": 3})
    call("pretrain", *flags(*PRETRAIN, data=world.data, init=start, **TEXT | {"tokens": 2048}))
    out, parent = tmp_path / "start-text/step2.pt", checkpoint.load(start)["meta"]
    model, side = load(start), HandMadeAdam()
    for step, (_, loss, lr) in enumerate(metrics(out, "loss", "lr")):
        total = cross_entropy(model, windows(world, 160 + 16 * step, 16, seed=3), z_loss=1e-5)
        assert loss == pytest.approx(total.item(), abs=1e-7) and lr == cosine(step, 2, 4e-3, 2)
        total.backward()
        with torch.no_grad():
            for p, delta in zip(model.parameters(), side(gradients(model)), strict=True):
                p += lr * (delta - (0 if p is model.embed.weight else 0.05 * p))
    found = weights(out)
    assert max(float((found[name] - p.detach()).abs().max()) for name, p in model.named_parameters()) < 1e-7

    meta = checkpoint.load(out)["meta"]
    assert meta["recipe"] == {"base": "text", "taught": "sft-gold->text"}[name]
    assert (meta["tokens"], meta["step"], meta["seed"], meta["pretrain_seed"], meta["length"]) == (12 * 1024, 2, 5, 3, LENGTH)
    assert (meta["parent"], meta["parent_hash"]) == (str(start), checkpoint.config_hash(parent))
    assert all(meta[k] == parent[k] for k in ("preset", "world", "questions", "tasks", "encoding"))
    assert not list(tmp_path.glob("start-text/*.resume"))


def test_it_goes_on_once_more(world, tmp_path):
    """tokens count on, and so does the text."""
    words = flags(*PRETRAIN, data=world.data, **TEXT | {"tokens": 1024})
    call("pretrain", *words, init=world.taught, out=tmp_path / "one", seed=7)
    call("pretrain", *words, init=tmp_path / "one/step1.pt", out=tmp_path / "two")
    meta, ((_, loss),) = checkpoint.load(tmp_path / "two/step1.pt")["meta"], metrics(tmp_path / "two/step1.pt", "loss")
    assert (meta["recipe"], meta["tokens"], meta["seed"], meta["pretrain_seed"]) == ("sft-gold->text->text", 12 * 1024, 7, 0)
    with torch.no_grad():
        total = cross_entropy(load(tmp_path / "one/step1.pt"), windows(world, 176, 16), z_loss=1e-5)
    assert loss == pytest.approx(float(total), abs=1e-7)


@pytest.mark.parametrize("stage", ["mix", "pretrain"])
def test_resume(world, tmp_path, monkeypatch, capsys, stage):
    """Bit for bit, as for the other forms of the scripts."""
    def words(folder):
        if stage == "mix":
            return flags(init=world.taught, text=world.data, out=folder / "step3.pt", **MIX)
        return flags(*PRETRAIN, init=world.taught, data=world.data, out=folder, **TEXT)

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    call(stage, *words(tmp_path / "whole"))
    stopped_at(4 if stage == "mix" else 2, monkeypatch)
    assert "at step 2" in refused(capsys, stage, *words(tmp_path / "cut"))
    monkeypatch.undo()
    call(stage, *words(tmp_path / "cut"), "--resume")
    assert same_weights(tmp_path / "whole/step3.pt", tmp_path / "cut/step3.pt")
    one, two = (metrics(tmp_path / name / "step3.pt", "loss", "sft_loss", "gradient_norm") for name in ("whole", "cut"))
    assert one == [line for line in two if line[1] is not None]


def test_a_file_that_does_not_say_the_length(world, tmp_path):
    """Of older code, by its own flags, or from elsewhere: the model's context."""
    def without(meta):
        return {k: v for k, v in meta.items() if k != "length"}

    base, taught = (changed(path, tmp_path / path.name, meta=without) for path in (world.base, world.taught))
    assert [checkpoint.load(path)["meta"]["length"] for path in (base, taught)] == [LENGTH, 512]


def test_what_does_not_fit(world, tmp_path, capsys):
    text = flags(*PRETRAIN, init=world.taught, data=world.data, out=tmp_path / "ckpt", **TEXT)
    for words in (["--preset", "toy-large"], ["--embed_std", "0.1"]):
        assert "--preset and --embed_std are for new ones" in refused(capsys, "pretrain", *text, *words)
    shard = next(world.data.glob("train_*.bin")).read_bytes()
    (tmp_path / "train_000.bin").write_bytes(shard[:28] + b"cl100k_base".ljust(36, b"\0") + shard[64:])
    assert "its tokens are 'cl100k_base', but 'toy' is needed" in refused(capsys, "pretrain", *text, "--data", tmp_path)
    both = flags(init=world.taught, out=tmp_path / "a.pt", **MIX)
    assert "its tokens are 'cl100k_base', but 'toy' is needed" in refused(capsys, "mix", *both, text=tmp_path)
    assert "leave out --solutions" in refused(capsys, "mix", *both, text=world.data, solutions="all")
    assert "--share_end lies between 0" in refused(capsys, "mix", *both, share_end=-0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["train_000.bin"]


# ---- what it costs


def test_plan(monkeypatch):
    """A million tokens are a million more, wherever they start; the text of a mix is rows of the length of pre-training, in place of
    solutions; a control is measured as what is trained is, with 0 shots."""
    monkeypatch.setattr(plan, "models", {})
    one, = {plan.cost(f"+ python pretrain.py --data d --out ckpt/p {more} --preset 1b --tokens 1e9")[1][:2] for more in ("", "--seed 1")}
    again = plan.cost("+ python pretrain.py --data d --init ckpt/p/step9.pt --out ckpt/p/step9-text --tokens 1e9 --save_steps 7")[1]
    assert again[:2] == one and again[2] == 2 * 4 * 1_484_916_736
    plain, gold, text = (plan.cost(f"+ python mix.py --init ckpt/p/step9.pt --steps 10 --batch 64 {more}")[1]
                         for more in ("", "--batch 128", "--text d"))  # fmt: skip
    token = plan.models["ckpt/p"].model.flops_per_token
    rl_alone = 2 * plain[0] - gold[0]
    assert text[0] - rl_alone == pytest.approx(10 * 64 * 4096 * token(4096)) and text[2] == plain[2]
    seen = {name: plan.cost(f"+ python eval.py ckpt/{name} {more}")[1][0] for name, more in
            (("p/step9.pt", ""), ("p/step9-text/step7.pt", ""), ("p/step9-rl.pt", ""), ("p/step8-rl.pt", "--text d"))}  # fmt: skip
    assert seen["p/step9.pt"] > 1.9 * seen["p/step9-rl.pt"] and seen["p/step9-text/step7.pt"] == seen["p/step9-rl.pt"]
    assert seen["p/step8-rl.pt"] - seen["p/step9-rl.pt"] == pytest.approx(256 * 4096 * token(plan.PROMPT + plan.ANSWER) / 3)
