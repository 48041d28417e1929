"""The network: parity with an independent implementation, sizes, causality, the cut-off
vocabulary."""

import pytest
import torch

from helpers import next_tokens, small_model
from model import PRESETS, Model, ModelConfig, cosine
from twin import renamed, transformers_twin

VOCAB = 37
PADDED = 64


@pytest.fixture(scope="module")
def reference():
    """small_model and transformers' Olmo2ForCausalLM with its weights."""
    ours = small_model(VOCAB, PADDED, torch.float32, layers=3)
    return ours, transformers_twin(ours, padding=False, attn_implementation="eager")


@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_logits_log_probs_and_gradients_equal_transformers(reference, length):
    ours, theirs = reference
    ids = torch.randint(VOCAB, (3, length + 1), generator=torch.Generator().manual_seed(length))
    weight = torch.randn(3, length, generator=torch.Generator().manual_seed(0))
    ours.zero_grad()
    theirs.zero_grad()

    logits = theirs(ids[:, :-1]).logits
    expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    (-(weight * expected).sum()).backward()
    loss, logp, _ = next_tokens(ours, ids, weight=weight)
    loss.backward()

    own_logits = ours.hidden(ids[:, :-1]) @ ours.head.weight[:VOCAB].T
    torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(logp, expected.detach(), atol=1e-4, rtol=0)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, gradient in renamed(gradients, VOCAB).items():
        size = float(gradient.abs().max()) + 1
        expected = theirs.get_parameter(name).grad
        assert torch.allclose(gradient, expected, atol=1e-4 * size, rtol=0), name
    assert not gradients["head.weight"][VOCAB:].any()
    assert not gradients["embed.weight"][VOCAB:].any()


@pytest.mark.parametrize(
    "preset, parameters",
    [("1b", 1_484_916_736), ("4b", 4_014_000_000), ("190m", 190_000_000 + 100352 * 768)],
)
def test_parameter_counts(preset, parameters):
    """1b to the last one; the others as their names round."""
    with torch.device("meta"):
        model = Model(ModelConfig(**PRESETS[preset]))
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters if preset == "1b" else abs(count / parameters - 1) < 0.01
    if preset == "1b":
        flops = 6 * (count - 100352 * 2048) + 12 * 16 * 2048 * 4096
        assert model.flops_per_token(4096) == flops == 9_286_987_776


def test_init_is_a_truncated_normal_of_the_seed():
    config = ModelConfig(**PRESETS["toy"], vocab=400, padded_vocab=512)
    one, same, other = (Model(config).init_weights(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    head = one.head.weight.detach()
    assert head.abs().max() <= 0.06
    assert float(head.std()) == pytest.approx(0.02 * 0.987, rel=0.02)
    assert bool((one.norm.weight == 1).all())


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    config = ModelConfig(**PRESETS["toy"], vocab=40, padded_vocab=64)
    made = Model(config)  # torch's own layers draw here
    torch.set_rng_state(before)
    made.init_weights(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_log_probs_are_not_shifted_by_one():
    """Each log-prob against its prefix run alone."""
    model = small_model()
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    _, logp, _ = next_tokens(model, ids, weight=torch.ones(2, 11))
    free, entropy = next_tokens(model, ids)
    for t in range(11):
        logits = model.hidden(ids[:, : t + 1])[:, -1] @ model.head.weight[:VOCAB].T
        expected = logits.log_softmax(1)[torch.arange(2), ids[:, t + 1]]
        torch.testing.assert_close(logp[:, t], expected.detach(), atol=1e-10, rtol=0)
        torch.testing.assert_close(free[:, t], expected, atol=1e-10, rtol=0)
        exact = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropy[:, t], exact, atol=1e-10, rtol=0)


def test_the_future_is_not_seen():
    model = small_model()
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    assert torch.equal(model.hidden(ids)[:, :7], model.hidden(changed)[:, :7])


def test_padding_does_not_change_a_neighbour():
    model = small_model()
    mask = torch.zeros(2, 15, dtype=torch.bool)
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    mask[0, 2:5] = True  # row 0 is short: what stands after its target 4 is padding
    mask[1] = True
    alone = next_tokens(model, ids[:1, :6], mask=mask[:1, :5])[0]
    for padding in (0, 5, VOCAB - 1):
        ids[0, 6:] = padding
        logp = next_tokens(model, ids, mask=mask)[0]
        torch.testing.assert_close(logp[:1, :5], alone, atol=1e-12, rtol=0)
        assert not logp[0, 5:].any()  # exactly 0 outside the mask
    torch.testing.assert_close(logp[1:], next_tokens(model, ids[1:])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("with_weight", [True, False])
def test_mask_selects_and_changes_nothing_else(with_weight):
    model = small_model()
    ids = torch.randint(VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if with_weight:
        masked, logp, _ = next_tokens(model, ids, weight=weight, mask=mask, z_loss=0.1)
        lse = (model.hidden(ids[:, :-1]) @ model.head.weight[:VOCAB].T).logsumexp(-1)
        whole, all_logp, _ = next_tokens(model, ids, weight=weight * mask)
        z_loss = 0.1 * (lse.square() * mask).sum()  # over the mask only
        torch.testing.assert_close(masked, whole + z_loss)
    else:
        logp, entropy = next_tokens(model, ids, mask=mask)
        all_logp, all_entropy = next_tokens(model, ids)
        torch.testing.assert_close(entropy, all_entropy * mask)
    torch.testing.assert_close(logp, all_logp * mask)


def test_padded_vocabulary_column_is_not_counted():
    """The dummy ids have rows in embedding and head; a softmax over them would take mass for logits
    that no text ever trains.
    """
    model = small_model()
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))

    def outputs():
        return next_tokens(model, ids, weight=torch.ones(2, 8))[0], *next_tokens(model, ids)

    before = outputs()
    model.head.weight.data[VOCAB:] = 1e3
    after = outputs()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    sum(x.sum() for x in after).backward()
    assert not model.head.weight.grad[VOCAB:].any()


def test_bfloat16_compute_keeps_fp32_weights_and_log_probs():
    model = small_model(dtype=torch.float32)
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    exact = next_tokens(model, ids)[0]
    model.compute = torch.bfloat16
    loss, logp, _ = next_tokens(model, ids, weight=torch.full((2, 19), 1 / 38))
    loss.backward()
    assert logp.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert float((logp - exact.detach()).abs().mean()) < 0.05
    # both ways into the head agree
    torch.testing.assert_close(next_tokens(model, ids)[0], logp, atol=1e-5, rtol=0)


def test_a_context_holds_whole_rows():
    """Rows are filled up to a multiple of 8: a row of 41 to 44 tokens would not fit one of 44."""
    with pytest.raises(ValueError, match="multiple of 8"):
        ModelConfig(context=44)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="100 tokens .* context is 96"):
        next_tokens(small_model(), torch.zeros(1, 101, dtype=torch.long))


@pytest.mark.parametrize(
    "shape", [dict(width=30, heads=4), dict(width=12, heads=4), dict(vocab=10, padded_vocab=8)]
)
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError):
        ModelConfig(**shape)


def test_cosine_by_hand():
    assert [cosine(s, 10, 1.0, warmup=2) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine(6, 10, 1.0, warmup=2) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine(10, 10, 1.0) == pytest.approx(0.1)
    assert [cosine(s, 10, 3.0, warmup=0, floor=1.0) for s in (0, 9)] == [3.0, 3.0]  # RL: constant
