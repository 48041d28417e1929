"""Rows that hold a prompt once and several answers give what a row for each answer gives."""

import dataclasses
import random

import pytest
import torch

import model as network
import rl
from data import problems, tokens
from helpers import ALONE, setup
from model import PRESETS, Layout, Model, ModelConfig, flex

VOCAB = 61
GROUP = 6


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(layers=2, width=32, heads=4, ffn=48, vocab=VOCAB, padded_vocab=64)
    return Model(config, torch.float64).to(torch.float64).init_weights(3, 0.5)


@pytest.fixture(scope="module")
def other(model):
    """A model of other weights, for the KL and for old log-probs."""
    config = dataclasses.replace(model.config)
    return Model(config, torch.float64).to(torch.float64).init_weights(4, 0.5)


@pytest.fixture(scope="module")
def rolled():
    """(prompts, answers, weights, log-probs): ragged, one flat group, one prompt of one token."""
    chance = random.Random(5)

    def ids(least, most):
        return [chance.randrange(VOCAB) for _ in range(chance.randint(least, most))]

    prompts = [prompt for prompt in (ids(2, 9), ids(1, 1), ids(12, 20)) for _ in range(GROUP)]
    answers = [ids(1, 11) for _ in prompts]
    weights = [chance.uniform(-1, 1) for _ in prompts]
    weights[GROUP : 2 * GROUP] = [0.0] * GROUP
    logps = [[chance.uniform(-4, -1) for _ in answer] for answer in answers]
    return prompts, answers, weights, logps


def make(rolled, per_row):
    prompts, answers, weights, logps = rolled
    batch = problems.make_batch(prompts, answers, weights, 7, logps, per_row)
    return batch._replace(weight=batch.weight.double(), logp=batch.logp.double())


def config(**given):
    return rl.Config(init="x", compile=False, **given)


def measure(model, other, rolled, per_row, cfg):
    """Loss, gradients and what is known of them, by rl.py's own functions."""
    cfg = dataclasses.replace(cfg, answers_per_row=per_row)
    run = setup(cfg, model)
    batch = make(rolled, per_row)
    old = rl.log_probs_of(other, batch, cfg, ALONE) if cfg.updates > 1 else None
    reference = rl.log_probs_of(other, batch, cfg, ALONE) if cfg.kl else None
    loss, gradients, norm, known = rl.rl_gradients(run, batch, old, reference)
    return loss, gradients, known


@pytest.mark.parametrize("per_row", [2, 4, 5, 6])
@pytest.mark.parametrize("settings", [{}, {"updates": 2}, {"kl": 0.3}, {"updates": 2, "kl": 0.3}])
def test_loss_gradients_and_entropy_do_not_depend_on_answers_per_row(
    model, other, rolled, per_row, settings
):
    cfg = config(clip=0.0, micro=12, **settings)
    loss, gradients, known = measure(model, other, rolled, 1, cfg)
    tree_loss, tree_gradients, tree_known = measure(model, other, rolled, per_row, cfg)
    assert abs(loss) > 1e-3
    assert tree_loss == pytest.approx(loss, abs=1e-12)
    for p, q in zip(gradients, tree_gradients, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    for name in known:
        assert tree_known[name] == pytest.approx(known[name], abs=1e-12)


def test_log_probs_are_those_of_the_plain_sequence(model, rolled):
    prompts, answers, _, _ = rolled
    batch = make(rolled, 4)
    logp, entropy = model(batch.ids, batch.target, mask=batch.mask, layout=batch.layout)
    for row, (prompt, numbers) in enumerate(problems.tree_rows(prompts, answers, 4)):
        begin = len(prompt) - 1
        for number in numbers:
            answer = answers[number]
            ids = torch.tensor([[*prompt, *answer]])
            plain, spread = model(ids[:, :-1], ids[:, 1:])
            place = slice(begin, begin + len(answer))
            expected = plain[0, len(prompt) - 1 :]
            torch.testing.assert_close(logp[row, place], expected, rtol=0, atol=1e-12)
            expected = spread[0, len(prompt) - 1 :]
            torch.testing.assert_close(entropy[row, place], expected, rtol=0, atol=1e-12)
            begin += len(answer)
        assert int(batch.mask[row].sum()) == begin - len(prompt) + 1


def test_an_answer_does_not_see_its_neighbour(model, rolled):
    batch = make(rolled, 3)
    position, document, branch = batch.layout
    changed = torch.where(branch == 1, (batch.ids + 1) % VOCAB, batch.ids)
    how = dict(mask=batch.mask, layout=batch.layout)
    before, _ = model(batch.ids, batch.target, **how)
    after, _ = model(changed, batch.target, **how)
    others = batch.mask & (branch > 1)
    assert others.any()
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[branch == 1], after[branch == 1])


def test_an_answer_sees_all_of_its_prompt(model, rolled):
    batch = make(rolled, 3)
    branch = batch.layout[2]
    first = torch.zeros_like(batch.mask)
    first[:, 0] = branch[:, 0] == 0
    changed = torch.where(first, (batch.ids + 1) % VOCAB, batch.ids)
    how = dict(mask=batch.mask, layout=batch.layout)
    before, _ = model(batch.ids, batch.target, **how)
    after, _ = model(changed, batch.target, **how)
    for row in first.any(1).nonzero().flatten().tolist():
        assert not torch.isclose(before[row], after[row])[batch.mask[row]].any()


def test_rows_of_a_flat_group_are_left_out(rolled):
    batch = make(rolled, 4)
    parts = list(problems.micro_batches(batch, 4, ALONE))
    assert sum(int(part.mask.sum()) for part in parts) == int(batch.mask[batch.weight.any(1)].sum())
    everything = list(problems.micro_batches(batch, 4, ALONE, keep_flat=True))
    assert sum(int(part.mask.sum()) for part in everything) == int(batch.mask.sum())


def test_every_answer_is_in_one_row_with_its_weight_and_log_probs(rolled):
    prompts, answers, weights, logps = rolled
    batch = make(rolled, 4)
    rows = problems.tree_rows(prompts, answers, 4)
    assert sorted(number for _, numbers in rows for number in numbers) == list(range(len(prompts)))
    for row, (prompt, numbers) in enumerate(rows):
        assert len(numbers) <= 4
        assert {tuple(prompts[number]) for number in numbers} == {prompt}
        target = [token for number in numbers for token in answers[number]]
        assert batch.target[row, batch.mask[row]].tolist() == target
        weight = [weights[number] for number in numbers for _ in answers[number]]
        assert batch.weight[row, batch.mask[row]].tolist() == pytest.approx(weight)
        logp = [x for number in numbers for x in logps[number]]
        assert batch.logp[row, batch.mask[row]].tolist() == pytest.approx(logp)


def test_the_mask_of_blocks_is_the_dense_mask(rolled):
    """FlexAttention, on a GPU, takes the one and leaves out blocks that nobody sees."""
    layout = Layout(*make(rolled, 6).layout)
    blocks = layout.blocks()
    sees = blocks.mask_mod
    B, T = layout.branch.shape
    query = torch.arange(T)[:, None]
    key = torch.arange(T)[None]
    for row in range(B):
        torch.testing.assert_close(sees(row, 0, query, key), layout.mask()[row, 0])


def test_attention_with_blocks_is_attention_with_the_dense_mask(rolled):
    layout = Layout(*make(rolled, 6).layout)
    generator = torch.Generator().manual_seed(1)
    shape = (*layout.branch.shape, 2, 16)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask())
    by_block = flex.flex_attention(q, k, v, block_mask=layout.blocks())
    torch.testing.assert_close(dense, by_block, rtol=1e-5, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other(model):
    """Pre-training's document mask is the same layout without branches."""
    end = 9
    ids = torch.tensor([[3, 4, end, 5, 6, 7, end, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
    position, document = map(torch.from_numpy, tokens.documents(ids.numpy(), end))
    assert position[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    layout = (position, document, torch.zeros_like(position))
    target = ids.roll(-1, 1)
    logp, _ = model(ids, target, layout=layout)
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (0, 7, 8), (1, 0, 8)):
        some = slice(start, stop)
        alone, _ = model(ids[row : row + 1, some], target[row : row + 1, some])
        torch.testing.assert_close(logp[row, some], alone[0], rtol=0, atol=1e-12)


def kept_for_backward(model, ids, layout=None) -> int:
    """Bytes of what the blocks keep for the backward pass, beside the weights."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        states = model.hidden(ids, layout)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    del states
    return sum(size for storage, size in kept.items() if storage not in weights)


class Fused(torch.autograd.Function):
    """Attention as far as memory goes, where it is one kernel: what CUDA has for either row."""

    @staticmethod
    def forward(ctx, q, k, v, seen):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def test_memory_of_64_answers_to_a_long_prompt(monkeypatch):
    """At 1B, answers of 200 tokens to a prompt of 1,000, without a number being computed."""
    monkeypatch.setattr(network, "attend", Fused.apply)
    monkeypatch.setattr(Layout, "mask", lambda layout: None)
    with torch.device("meta"):
        config = ModelConfig(**PRESETS["1b"], vocab=100278, padded_vocab=100352)
        model = Model(config, torch.bfloat16)
        plain = torch.zeros(64, 1200, dtype=torch.long)
        tree = torch.zeros(1, 999 + 64 * 200, dtype=torch.long)
        layout = (tree, tree, tree)
    ratio = kept_for_backward(model, tree, layout) / kept_for_backward(model, plain)
    print(f"a row of 64 answers keeps {ratio:.2f} of what 64 rows keep")
    assert 0.15 < ratio < 1 / 3
