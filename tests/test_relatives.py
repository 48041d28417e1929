"""GRPO's relatives in rl.py: each by hand, and none of them in a default run."""

import math
from types import SimpleNamespace

import pytest
import torch

import common
import rl
from data import problems, tokens
from helpers import call, lines_of, refused, same_weights
from model import Samples
from runs import words_of

ALONE = common.World(0, 1, torch.device("cpu"), torch.float64)
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.1], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------- advantages


def test_leave_one_out_by_hand():
    """RLOO: 1 - mean(0, 0, 0.1), 0 - mean(1, 0, 0.1), ..."""
    found = rl.advantages(REWARDS, rl.Config(init="", leave_one_out=True))
    assert found[0].tolist() == pytest.approx([1 - 0.1 / 3, -1.1 / 3, -1.1 / 3, 0.1 - 1 / 3])
    assert found[1].tolist() == [0.0] * 4


def test_batch_std_by_hand():
    """REINFORCE++: two groups of mean 0, the std over all four."""
    found = rl.over_batch_std(torch.tensor([[1.0, -1.0], [0.0, 0.0]]).double(), ALONE)
    assert found.tolist() == [[pytest.approx(2**0.5), pytest.approx(-(2**0.5))], [0, 0]]
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(rl.over_batch_std(nothing, ALONE), nothing)


@pytest.mark.parametrize(
    "denominator, expected",
    [
        ("tokens", [2 / 10, -1 / 10, -1 / 10]),
        ("length", [2 / (5 * 3), -1 / (4 * 3), -1 / (1 * 3)]),
        ("max_new", [2 / (8 * 3), -1 / (8 * 3), -1 / (8 * 3)]),
    ],
)
def test_what_a_token_weighs_by_hand(denominator, expected):
    """Three answers of 5, 4 and 1 tokens, of at most 8."""
    cfg = SimpleNamespace(denominator=denominator, max_new=8)
    lengths = torch.tensor([5, 4, 1])
    total = {"tokens": 10.0, "answers": 3.0}
    found = rl.token_weights(fp64(2, -1, -1), lengths, total, cfg)
    assert found.tolist() == pytest.approx(expected)


def test_each_token_may_have_a_weight_of_its_own(monkeypatch):
    def later_counts_more(advantage, lengths, total, cfg):
        return [torch.arange(1.0, length + 1) for length in lengths.tolist()]

    monkeypatch.setattr(rl, "token_weights", later_counts_more)
    batch, _ = rl.rl_batch(setup(), FakeSampler(), 0)
    assert batch.weight[batch.mask].tolist() == [1.0, 2.0, 3.0] * 32
    assert not batch.weight[~batch.mask].any()


# ------------------------------------------------------------------------------------- loss


def test_clip_higher_by_hand():
    """Ratio 1.25: with 0.2 clipped to 1.2, with 0.28 above not; below 1 nothing changes."""
    old = fp64(0, 0, 0, 0)
    new = fp64(1.25, 1.5, 0.5, 0.9).log()
    weight = fp64(1, 1, -1, -1)
    usual = rl.policy_loss(new, old, weight, 0.2)
    higher = rl.policy_loss(new, old, weight, 0.2, 0.28)
    assert usual.item() == pytest.approx(-(1.2 + 1.2 - 0.8 - 0.9))
    assert higher.item() == pytest.approx(-(1.25 + 1.28 - 0.8 - 0.9))


@pytest.mark.parametrize("per_row", [1, 2])
def test_sequence_ratio_by_hand(per_row):
    """Two answers of 3 and 1 tokens to one prompt, in rows of their own or in one."""
    batch = problems.make_batch(
        [[1, 2]] * 2, [[5, 6, 7], [8]], [1.0, 1.0], 0, [torch.ones(3), torch.ones(1)], per_row
    )
    values = torch.where(batch.mask, batch.target.double(), 99.0)
    found = rl.answer_means(values, batch)
    assert sorted(found[batch.mask].tolist()) == [6.0, 6.0, 6.0, 8.0]
    assert found[~batch.mask].abs().sum() == 0


def test_the_loss_with_a_sequence_ratio_by_hand():
    """GSPO: each answer counts as its length times min(s A, clip(s) A), s the geometric mean."""
    batch = problems.make_batch([[1, 2]] * 2, [[5, 6], [8]], [0.5, -0.5], 0, per_row=2)
    old = torch.zeros(batch.ids.shape, dtype=torch.float64)
    ratios = {5: 1.2, 6: 1.0, 8: 0.5}
    logp = [[math.log(ratios.get(int(token), 1.0)) for token in row] for row in batch.target]
    logp = torch.tensor(logp, dtype=torch.float64).requires_grad_()
    cfg = SimpleNamespace(updates=2, kl=0, temperature=1.0, ratio="sequence", clip_ratio=0.2)
    cfg.clip_high = None
    loss, *_ = rl.rl_loss(lambda *_, **__: (logp, logp), batch, cfg, old)
    assert loss.item() == pytest.approx(-(2 * 0.5 * 1.2**0.5 - 0.5 * 0.8))
    (gradient,) = torch.autograd.grad(loss, logp)
    first = batch.mask & (batch.target != 8)
    assert gradient[first].tolist() == pytest.approx([-0.5 * 1.2**0.5] * 2)
    assert gradient[~first].abs().sum() == 0  # clipped, or no token of an answer


# ----------------------------------------------------------------------- resampling, by a fake

ENCODING = tokens.encoding("toy")
RIGHT = tokens.encode(ENCODING, " #### 7")
WRONG = tokens.encode(ENCODING, " 7 7")


def setup(world=ALONE, **changes):
    """A run over 40 questions; an answer to number i is right by its seed, or never if i is odd."""
    settings = dict(questions_per_step=8, group=4, max_new=8, seed=3, resample=0) | changes
    cfg = rl.Config(init="", **settings)
    rows = [
        {"id": f"q{i}", "question": " ".join(["sam"] * (i + 1)), "answer": "7", "solutions": []}
        for i in range(40)
    ]
    fields = dict(model=None, parent={}, state=None, contents={}, held_out=[])
    form = problems.Form(" Q : {} A :", "")
    return common.Setup(cfg, world, encoding=ENCODING, form=form, train=rows, **fields)


class FakeSampler:
    """Answers that are functions of prompt and seed; it remembers the seeds."""

    def __init__(self):
        self.seeds = []

    def __call__(self, prompts, n, max_new, seeds, ends, temperature, prefix=()):
        self.seeds += seeds
        place = 0
        rows = []
        for prompt in prompts:
            for _ in range(n):
                right = len(prompt) % 2 and seeds[place] % 2
                rows.append([*(RIGHT if right else WRONG), *ends[:1]])
                place += 1
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([row + [0] * (max_new - len(row)) for row in rows])
        logp = torch.zeros(ids.shape)
        return Samples(ids, lengths, logp, torch.zeros(len(rows), dtype=torch.bool), 0.0, logp)


def asked(run, step=0):
    """Questions, seeds and numbers of a step."""
    sampler = FakeSampler()
    rolled = rl.rollout(run, sampler, step)
    graded = rl.grade(run, rolled)
    rl.replace_flat(run, sampler, step, rolled, graded)
    names = [row["id"] for row in rolled.questions[:: run.cfg.group]]
    return names, graded.rewards.view(-1, run.cfg.group), sampler.seeds


def test_flat_groups_give_way_to_other_questions():
    names, rewards, seeds = asked(setup())
    again, kept, more = asked(setup(resample=20))
    flat = (rewards.amax(1) == rewards.amin(1)).tolist()
    assert any(flat) and not all(flat)
    for before, after, was_flat in zip(names, again, flat, strict=True):
        assert was_flat or before == after
    assert (kept.amax(1) > kept.amin(1)).all()
    assert more[: len(seeds)] == seeds
    assert len(set(more)) == len(more)


def test_tries_are_bounded():
    _, _, seeds = asked(setup(resample=0))
    flat = [len(asked(setup(resample=tries))[2]) for tries in (1, 2, 3)]
    assert len(seeds) < flat[0] < flat[1] < flat[2] <= 4 * len(seeds)


def test_a_try_is_the_same_on_any_number_of_ranks():
    names, rewards, seeds = asked(setup(resample=3))
    parts = [asked(setup(common.World(rank, 2, *ALONE[2:]), resample=3)) for rank in (0, 1)]
    assert names == parts[0][0] + parts[1][0]
    assert torch.equal(rewards, torch.cat([parts[0][1], parts[1][1]]))
    assert sorted(seeds) == sorted(parts[0][2] + parts[1][2])


def test_what_was_dropped_is_counted():
    run = setup(resample=3)
    sampler = FakeSampler()
    batch, numbers = rl.rl_batch(run, sampler, 0)
    assert len(RIGHT) == len(WRONG) == 2  # and the end token
    assert int(batch.mask.sum()) == 32 * 3
    assert numbers["sampled_tokens"] == len(sampler.seeds) * 3
    assert numbers["dropped_tokens"] == (len(sampler.seeds) - 32) * 3 > 0
    assert numbers["dropped_groups"] == (len(sampler.seeds) - 32) / run.cfg.group
    model = SimpleNamespace(flops_per_token=lambda length: 1.0)
    asked = rl.rl_costs(model, numbers, run.cfg, 0.0)["questions"]
    assert asked == run.cfg.questions_per_step + numbers["dropped_groups"]
    plain = rl.rl_batch(setup(), FakeSampler(), 0)[1]
    assert "dropped_tokens" not in plain and plain["flat"] > numbers["flat"]


def test_the_order_of_questions_is_what_it_was():
    first = problems.shuffled(40, 8, 3, 2)
    assert problems.shuffled(40, 8, 3, 2, 0) == first != problems.shuffled(40, 8, 3, 2, 1)


# ------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "changes",
    [
        dict(leave_one_out="true", denominator="length"),
        dict(denominator="max_new", batch_std="true", resample=2),
        dict(updates=2, clip_high=0.28, resample=1),
        dict(updates=2, ratio="sequence", clip_ratio=3e-4, denominator="length"),
    ],
)
def test_they_run_and_change_the_weights(world, whole, tmp_path, changes):
    out = tmp_path / "step6.pt"
    call("rl", *words_of("rl", world, out, **changes))
    assert not same_weights(out, whole("rl"))
    steps = [line for line in lines_of(out) if "loss" in line]
    assert len(steps) == 6
    assert max(line["mismatch_max"] for line in steps) < 1e-3


def test_flags_that_would_change_nothing_are_refused(world, capsys, tmp_path):
    for flags in (dict(clip_high=0.28), dict(ratio="sequence")):
        said = refused(capsys, "rl", *words_of("rl", world, tmp_path / "a.pt", **flags))
        assert "--updates" in said
    for other in ("std_norm", "leave_one_out"):
        both = {other: "true", "batch_std": "true"}
        said = refused(capsys, "rl", *words_of("rl", world, tmp_path / "a.pt", **both))
        assert f"--{other}" in said and "--batch_std" in said
