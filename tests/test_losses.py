"""The losses: the log-prob primitive against a plain one, GRPO's functions by hand, the update
against AdamW."""

import dataclasses
import math

import pytest
import torch

import common
import model as network
import rl
import sft
from data import grader, problems, tokens, toy
from helpers import ALONE, setup, small_model
from model import Samples, adam, log_probs, update, weighted_nll

WIDTH = 6
VOCAB = 11
PADDED = 16


def numbers(count, dtype=torch.float64, seed=0):
    """hidden, head, target, weight (both signs) of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (
        torch.randn(n, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for n in (count, PADDED)
    )
    weight = torch.randn(count, generator=generator, dtype=dtype)
    return hidden, head, torch.randint(VOCAB, (count,), generator=generator), weight


def plain(hidden, head, target, weight, temperature=1.0, z_loss=0.0):
    """What weighted_nll computes, with all logits at once and PyTorch's own derivatives."""
    logits = hidden @ head[:VOCAB].T / temperature
    logp = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return -(weight * logp).sum() + z_loss * logits.logsumexp(1).square().sum(), logp.detach()


# ---- the primitive


@pytest.mark.parametrize("chunk", [1, 1 << 21])
@pytest.mark.parametrize("temperature, z_loss", [(1.0, 0.0), (0.6, 0.0), (1.0, 0.1), (1.7, 0.1)])
def test_weighted_nll_equals_the_plain_one(monkeypatch, chunk, temperature, z_loss):
    """150 rows: three chunks where the chunk is small."""
    monkeypatch.setattr(network, "CHUNK", chunk)
    hidden, head, target, weight = numbers(150)
    results = []
    for function, settings in (
        (weighted_nll, (VOCAB, temperature, z_loss)),
        (plain, (temperature, z_loss)),
    ):
        loss, logp, *_ = function(hidden, head, target, weight, *settings)
        results.append((loss, logp, *torch.autograd.grad(3 * loss, (hidden, head))))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 1 << 21])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropy_equal_the_plain_ones(monkeypatch, chunk, temperature):
    monkeypatch.setattr(network, "CHUNK", chunk)
    hidden, head, target, weight = numbers(150)
    logp, entropy = log_probs(hidden, head, target, VOCAB, temperature)
    law = torch.distributions.Categorical(logits=hidden @ head[:VOCAB].T / temperature)
    expected = law.log_prob(target), law.entropy()
    torch.testing.assert_close((logp, entropy), expected)
    ours = torch.autograd.grad((weight * logp + weight.flip(0) * entropy).sum(), (hidden, head))
    total = (weight * expected[0] + weight.flip(0) * expected[1]).sum()
    theirs = torch.autograd.grad(total, (hidden, head))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_gradients_by_finite_differences():
    hidden, head, target, weight = numbers(5)
    for z_loss in (0.0, 0.3):

        def loss(hidden, head, z_loss=z_loss):
            return weighted_nll(hidden, head, target, weight, VOCAB, 0.7, z_loss)[0]

        assert torch.autograd.gradcheck(loss, (hidden, head))

    def measure(hidden, head):
        return log_probs(hidden, head, target, VOCAB, 0.7)

    assert torch.autograd.gradcheck(measure, (hidden, head))


def test_both_primitives_give_one_log_prob():
    hidden, head, target, weight = numbers(70, torch.float32)
    _, one, _ = weighted_nll(hidden, head, target, weight, VOCAB, 0.8)
    other, _ = log_probs(hidden, head, target, VOCAB, 0.8)
    torch.testing.assert_close(one, other)


def test_negative_weight_does_not_reverse_the_z_loss():
    """The z-loss' gradient is the same whatever the weights."""
    hidden, head, target, weight = numbers(20)

    def z_part(w):
        losses = [weighted_nll(hidden, head, target, w, VOCAB, 1.0, z)[0] for z in (0.1, 0.0)]
        return torch.autograd.grad(losses[0] - losses[1], (hidden, head))

    torch.testing.assert_close(z_part(weight), z_part(-weight))
    torch.testing.assert_close(z_part(weight), z_part(torch.zeros_like(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(dtype):
    """A rank whose rows have nothing to train on."""
    hidden, head, target, weight = numbers(0, torch.float32)
    loss, logp, _ = weighted_nll(hidden.to(dtype), head, target, weight, VOCAB)
    loss.backward()
    assert float(loss.detach()) == 0 and logp.shape == (0,) and not head.grad.any()
    (log_probs(hidden.to(dtype), head, target, VOCAB)[0].sum()).backward()
    assert not head.grad.any()


def test_extreme_logits_stay_finite():
    hidden, head, target, weight = numbers(8)
    loss, logp, _ = weighted_nll(hidden * 1e4, head, target, weight, VOCAB)
    for x in (loss, logp, *torch.autograd.grad(loss, (hidden, head))):
        assert torch.isfinite(x).all()


# ---- GRPO, by hand


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.1, 0.1, 0.0]], dtype=torch.float64)
    expected = [[0.75, -0.25, -0.25, -0.25], [0.7, -0.2, -0.2, -0.3]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rl.advantages(rewards, RL), expected)
    # the root of the mean of the squares above
    std = torch.tensor([[3**0.5 / 4], [(0.66 / 4) ** 0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        rl.advantages(rewards, dataclasses.replace(RL, std_norm=True)), expected / std
    )


@pytest.mark.parametrize("std_norm", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_flat_group_has_no_advantage(value, std_norm):
    """Exactly 0: the mean of seven 0.1 is not 0.1."""
    for dtype in (torch.float32, torch.float64):
        for size in (3, 5, 7):
            rewards = torch.full((2, size), value, dtype=dtype)
            assert not rl.advantages(rewards, dataclasses.replace(RL, std_norm=std_norm)).any()


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.1, -1.1, -1.1),  # inside the clip range
        (1.0, 1.5, -1.2, 0.0),
        (1.0, 0.5, -0.5, -0.5),  # a good answer: no gain beyond 1.2, but every loss counts
        (-1.0, 0.5, 0.8, 0.0),
        (-1.0, 1.5, 1.5, 1.5),  # a bad one: the other way round
    ],
)
def test_policy_loss_by_hand(advantage, ratio, loss, slope):
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.tensor([[ratio, 1.0]], dtype=torch.float64).log()
    weight = torch.tensor([[advantage, 0.0]], dtype=torch.float64)
    value = rl.policy_loss(logp, old, weight, clip_ratio=0.2)
    assert float(value.detach()) == pytest.approx(loss)
    expected = torch.tensor([[slope, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(value, logp)[0], expected)


def test_kl_by_hand():
    gap = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    found = rl.kl_to(gap - 2, torch.full((3,), -2.0, dtype=torch.float64))
    torch.testing.assert_close(found, gap.exp() - gap - 1)
    p = torch.tensor([0.2, 0.3, 0.5])
    q = torch.tensor([0.5, 0.25, 0.25])
    exact = float((p * (p / q).log()).sum())
    assert float((p * rl.kl_to(q.log(), p.log())).sum()) == pytest.approx(exact)  # unbiased


def answers_of(*rows):
    """A sampler that says these (ids, truncated, log-prob of each token), whatever it is asked."""

    def sampler(prompts, n, max_new, seeds, ends, temperature, prefix):
        assert len(rows) == len(prompts) * n == len(seeds)
        said = torch.full((len(rows), max_new), ends[0])
        logp = torch.zeros(len(rows), max_new)
        for row, (ids, _, value) in enumerate(rows):
            said[row, : len(ids)] = torch.tensor(ids)
            logp[row, : len(ids)] = value
        lengths = torch.tensor([len(ids) for ids, _, _ in rows])
        truncated = torch.tensor([truncated for _, truncated, _ in rows])
        return Samples(said, lengths, logp, truncated, 0.0, logp)

    return sampler


ENC = tokens.encoding("toy")
FORM = problems.Form(toy.PROMPT, "")
RL = rl.Config(init="", steps=4, questions_per_step=2, group=2, max_new=12, lr=1e-3, clip=0.0)


def rl_run(model=None, **changes):
    cfg = dataclasses.replace(RL, **changes)
    return setup(cfg, model, encoding=ENC, form=FORM, train=QUESTIONS, prefix=[])


def sft_run(model=None, world=ALONE, **changes):
    cfg = sft.Config(init="", clip=0.0, **changes)
    return setup(cfg, model, world, encoding=ENC, form=FORM)


def say(text):
    return tokens.encode(ENC, text) + [ENC.eot_token]


QUESTIONS = [
    {"id": "a", "question": "sam has 2 apples . how many now ?", "answer": "2", "solutions": []},
    {"id": "b", "question": "sam has 3 apples . how many now ?", "answer": "3", "solutions": []},
]


@pytest.mark.parametrize(
    "flags, per_row",
    [
        (dict(answers_per_row=1), 1),
        (dict(answers_per_row=2), 2),
        (dict(answers_per_row=2, micro=1), 1),
    ],
)
def test_rl_batch_by_hand(flags, per_row):
    """Two groups of two: right and truncated, wrong in format and without one."""
    first, second = (QUESTIONS[place] for place in problems.shuffled(2, 2, 0, 0))
    right = say(f" #### {first['answer']}")
    answers = [right, right[:-1], say(" #### 9"), say(" 9")]
    said = [(ids, number == 1, -1.0 - number) for number, ids in enumerate(answers)]
    run = rl_run(**flags)
    batch, stats = rl.rl_batch(run, answers_of(*said), 0)

    n = sum(map(len, answers))
    assert len(batch.ids) == 4 // per_row
    questions = (first, first, second, second)
    for number, advantage in enumerate((0.5, -0.5, 0.05, -0.05)):
        ids = answers[number]
        prompt = tokens.encode(ENC, problems.prompt(FORM, questions[number]["question"]))
        row, beside = divmod(number, per_row)
        begin = len(prompt) - 1 + (len(answers[number - 1]) if beside else 0)
        place = row, slice(begin, begin + len(ids))
        assert batch.ids[row, : len(prompt) - 1].tolist() == prompt[:-1]
        assert batch.ids[place].tolist() == [prompt[-1], *ids[:-1]]
        assert batch.target[place].tolist() == ids
        assert batch.mask[place].all()
        torch.testing.assert_close(batch.weight[place], torch.full((len(ids),), advantage / n))
        assert (batch.logp[place] == -1.0 - number).all()
    assert int(batch.mask.sum()) == n
    assert not batch.weight[~batch.mask].any()
    assert stats["reward"] == pytest.approx(1.1 / 4) and stats["length"] == n / 4
    shares = [stats[name] for name in ("correct", "formatted", "truncated", "flat")]
    assert shares == [0.25, 0.5, 0.25, 0.0]


def test_sampled_stop_token_is_trained():
    """The end token is an action: the policy must learn to stop."""
    sampler = answers_of(*[(say(f" #### {number}"), False, -1.0) for number in (2, 3, 2, 3)])
    batch, _ = rl.rl_batch(rl_run(), sampler, 0)
    trained = batch.target[batch.weight != 0]
    assert int((trained == ENC.eot_token).sum()) == 4
    row = {"id": "a", "question": "sam has 2 apples ?", "answer": "2", "solutions": ["#### 2"]}
    run = sft_run(batch=1)._replace(train=[row])
    taught = sft.sft_batch(run, sft.tokenise(run), 0)
    assert int(taught.target[taught.weight != 0][-1]) == ENC.eot_token


def test_reward_never_reads_the_prompt(monkeypatch):
    """The grader is handed what was sampled and nothing else."""
    seen = []

    def grade_all(texts, *_):
        seen.extend(texts)
        return [(False, False)] * len(texts)

    monkeypatch.setattr(grader, "grade_all", grade_all)
    said = [([ENC.eot_token], False, -1.0), (say(" #### 2"), False, -1.0)] * 2
    rl.rl_batch(rl_run(), answers_of(*said), 0)
    assert seen == ["", " #### 2"] * 2


def test_answer_after_the_stop_is_not_read():
    """What a finished row's slots still hold is not part of the answer."""
    sampler = answers_of(*[(say("") + say(" #### 2"), False, -1.0)] * 4)

    def stopped(*arguments, **how):
        return sampler(*arguments, **how)._replace(lengths=torch.ones(4, dtype=torch.long))

    batch, stats = rl.rl_batch(rl_run(), stopped, 0)
    assert stats["reward"] == 0 and int(batch.mask.sum()) == 4


# ---- from batch to gradient


@pytest.fixture()
def toy_model():
    return small_model(tokens.vocab_size(ENC), 512, heads=2)


def ragged_batch(per_row=1):
    """Seven answers of all lengths to three prompts, weights of both signs, and log-probs."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(300, (length,), generator=generator).tolist()

    prompts = [ids(3), ids(4), ids(5)]
    lengths = [1 + 3 * i % 11 for i in range(7)]
    answers = [ids(length) for length in lengths]
    weights = torch.randn(7, generator=generator).tolist()
    logps = [torch.full((length,), -5.0) for length in lengths]
    asked = [prompts[i % 3] for i in range(7)]
    return problems.make_batch(asked, answers, weights, 0, logps, per_row)


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "rl", "rl clipped"])
def test_micro_batches_share_one_denominator(toy_model, stage, per_row):
    """Rows of unlike length, so a mean of means would differ."""
    batch = ragged_batch(per_row)
    results = []
    for micro in (1, 3, 100):
        if stage == "sft":
            run = sft_run(toy_model, micro=micro)
            results.append(sft.sft_gradients(run, batch)[:3])
            continue
        run = rl_run(toy_model, micro=micro, updates=1 if stage == "rl" else 2)
        old = rl.log_probs_of(toy_model, batch, run.cfg, ALONE) if run.cfg.updates > 1 else None
        results.append(rl.rl_gradients(run, batch, old, None)[:3])
    assert results[0][2] > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-9, rtol=1e-9)


def test_sft_weights_are_one_over_all_answer_tokens():
    """Over the whole batch, whichever rank has the rows."""
    pairs = [([1, 2, 3], list(range(4, 5 + i))) for i in range(8)]
    n = sum(len(answer) for _, answer in pairs)
    trained = 0
    for rank in (0, 1):
        batch = sft.sft_batch(sft_run(world=ALONE._replace(rank=rank, size=2), batch=8), pairs, 0)
        torch.testing.assert_close(batch.weight, batch.mask / n)
        trained += int(batch.mask.sum())
    assert trained == n


def test_on_policy_gradient_is_the_policy_gradient_at_ratio_one(toy_model):
    """Weights in the primitive against PPO's loss through differentiable log-probs; also with the
    KL at its minimum."""
    batch = ragged_batch()
    run = rl_run(toy_model, micro=3, temperature=0.7)
    own = rl.log_probs_of(toy_model, batch, run.cfg, ALONE)

    def gradients(old=None, reference=None, **changes):
        cfg = dataclasses.replace(run.cfg, **changes)
        return rl.rl_gradients(run._replace(cfg=cfg), batch, old, reference)[:2]

    _, plain_gradients = gradients()
    loss, clipped = gradients(old=own, updates=2)
    _, pulled = gradients(reference=own, kl=0.5)
    assert loss == pytest.approx(-float(batch.weight.double().sum()))  # ratio 1
    torch.testing.assert_close(clipped, plain_gradients, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(pulled, plain_gradients, atol=1e-9, rtol=1e-9)


def test_ratio_one_does_not_hide_a_mismatch(toy_model):
    """The ratio is 1 whatever the sampler did, so sampler and trainer are compared apart from it.

    That a run stops is tested in test_nonfinite.py.
    """
    batch = ragged_batch()
    run = rl_run(toy_model, micro=3)
    logp = toy_model(batch.ids, batch.target, mask=batch.mask)[0].detach()
    for shift in (0.0, 0.3, -0.3):
        shifted = batch._replace(logp=(logp + shift) * batch.mask)
        *_, known = rl.rl_gradients(run, shifted, None, None)
        assert known["mismatch"] == pytest.approx(abs(shift), abs=1e-9)
        assert known["mismatch_max"] == pytest.approx(abs(shift), abs=1e-9)
        assert known["mismatch_kl"] == pytest.approx(math.exp(-shift) + shift - 1, abs=1e-9)


def test_a_loss_is_told_the_tokens_of_the_step(toy_model, monkeypatch):
    """Of all ranks and micro-batches, with groups that have no advantage, and without --kl."""
    counts = []

    def watched(model, micro, cfg, old, reference, count):
        counts.append(count)
        return rl_loss(model, micro, cfg, old, reference, count)

    rl_loss = rl.rl_loss
    monkeypatch.setattr(rl, "rl_loss", watched)
    batch = ragged_batch()
    weight = batch.weight.clone()
    weight[0] = 0
    rl.rl_gradients(rl_run(toy_model, micro=1), batch._replace(weight=weight), None, None)
    assert counts == [int(batch.mask.sum())] * (len(batch.ids) - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_and_training_see_one_temperature(toy_model, temperature):
    run = rl_run(toy_model, temperature=temperature)
    batch, _ = rl.rl_batch(run, network.Sampler(toy_model), 0)
    batch = batch._replace(weight=batch.mask * 0.1)  # random answers: all groups are flat
    *_, known = rl.rl_gradients(run, batch, None, None)
    assert known["mismatch_max"] < 1e-5
    run = rl_run(toy_model, temperature=temperature, updates=2)
    old = rl.log_probs_of(toy_model, batch, run.cfg, ALONE)
    *_, known = rl.rl_gradients(run, batch, old, None)
    assert known["mismatch_max"] < 1e-5
    for logp, micro in zip(old, problems.micro_batches(batch, 64, ALONE), strict=True):
        torch.testing.assert_close(logp.float(), micro.logp, atol=1e-5, rtol=0)


def test_nothing_writes_through_a_view(toy_model):
    """Every function leaves what it is given as it was: a slice is a view, and a write into one has
    corrupted a loss denominator before.
    """
    hidden, head, target, weight = numbers(9)
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    batch = ragged_batch(per_row=2)
    pulled = rl_run(toy_model, micro=3, temperature=0.7, updates=2, kl=0.1)
    own = rl.log_probs_of(toy_model, batch, pulled.cfg, ALONE)
    given = [hidden, head, target, weight, rewards, *batch[:-1], *batch.layout, *own]
    given += toy_model.parameters()
    before = [(x.detach().clone(), x._version) for x in given]

    rl.advantages(rewards, dataclasses.replace(RL, std_norm=True))
    rl.advantages(rewards.T[:2], RL)
    rl.policy_loss(own[0], own[0], own[0], 0.2)
    rl.kl_to(own[0], own[0])
    for z in (0.0, 0.1):
        weighted_nll(hidden, head, target, weight, VOCAB, 0.7, z)[0].backward()
    sum(x.sum() for x in log_probs(hidden, head, target, VOCAB, 0.7)).backward()
    sft.sft_gradients(sft_run(toy_model, micro=3), batch)
    rl.rl_gradients(rl_run(toy_model, micro=3), batch, None, None)
    rl.rl_gradients(pulled, batch, own, own)
    network.Sampler(toy_model)([[1, 2], [3]], 2, 6, range(4), [0], 0.7, [4, 5])
    for x, (copy, version) in zip(given, before, strict=True):
        assert torch.equal(x, copy) and x._version == version


# ---- the update


def adamw_deltas(model, steps, weight_decay):
    """Each optimizer's own update from the model's weights, by torch.optim.AdamW on copies."""
    deltas = []
    for optimizer, lr, gradients in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr
        copies = [p for group in optimizer.param_groups for p in group["params"]]
        for copy, p, g in zip(copies, model.parameters(), gradients, strict=True):
            copy.data.copy_(p.data)
            copy.grad = g.clone()
        optimizer.step()
        moved = zip(copies, model.parameters(), strict=True)
        deltas.append([copy.detach() - p.detach() for copy, p in moved])
    return deltas


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_update_is_the_definition(share, weight_decay):
    """theta + share * Delta_RL + (1 - share) * Delta_SFT, both AdamW's from the same theta with
    moments of their own; share None is one AdamW. Four steps, so that the moments count. Seen to
    fail with the decay done for each optimizer in turn, with one optimizer for both, and with the
    embedding decayed."""
    model = small_model()
    generator = torch.Generator().manual_seed(5)
    assert next(iter(model.parameters())) is model.embed.weight

    def reference():
        copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        # OLMo2: the embedding is not decayed
        groups = [{"params": copies[:1], "weight_decay": 0.0}, {"params": copies[1:]}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)

    shares = [1.0] if share is None else [share, 1 - share]
    ours = [adam(model) for _ in shares]
    theirs = [reference() for _ in shares]
    for _ in range(4):
        rates = [0.01, 0.03]
        gradients = [
            [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
            for _ in shares
        ]
        steps = list(zip(theirs, rates, gradients, strict=False))
        deltas = adamw_deltas(model, steps, weight_decay)
        expected = [
            p.detach() + sum(s * d[i] for s, d in zip(shares, deltas, strict=True))
            for i, p in enumerate(model.parameters())
        ]
        rates = [share * lr for share, lr in zip(shares, rates, strict=False)]
        update(model, list(zip(ours, rates, gradients, strict=True)), weight_decay)
        torch.testing.assert_close(list(model.parameters()), expected, atol=1e-12, rtol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_gradients_are_clipped_once_and_the_norm_is_from_before(clip):
    model = small_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in model.parameters())
    taken, norm = common.gradients(model, ALONE, clip)
    assert norm == pytest.approx(2 * count**0.5)
    squares = float(sum(g.square().sum() for g in taken))
    assert squares == pytest.approx(1.0 if clip else 4 * count, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
