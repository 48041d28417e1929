"""The KV-cache sampler against a loop that runs the whole sequence again for every token of every
answer."""

import functools
import math
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import model as network
from data import problems
from helpers import next_tokens, small_model
from model import Sampler, bucket, uniform_noise

VOCAB = 37
END = 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
PREFIX = [21, 22, 23, 24, 25]


@pytest.fixture(scope="module")
def model():
    """fp64, so that sampled ids cannot flip. The end token is made likely enough that answers end
    at all lengths."""
    made = small_model(VOCAB, 64)
    made.head.weight.data *= 0.3
    return made


def slowly(model, prompt, max_new, seed, ends=(END,), temperature=1.0):
    """One answer, uncached, one row: ids, log-probs, whether it was truncated."""
    ids, logps = list(prompt), []
    for u in uniform_noise([seed], max_new)[0].tolist():
        hidden = model.hidden(torch.tensor([ids]))[0, -1]
        logits = (hidden @ model.head.weight[: model.config.vocab].T).double().detach()
        p = (logits / temperature).softmax(0)
        sums = p.cumsum(0).tolist()
        token = next(i for i, total in enumerate(sums) if total > u * float(p.sum()))
        ids.append(token)
        logps.append(float(p[token].log()))
        if token in ends:
            return ids[len(prompt) :], logps, False
    return ids[len(prompt) :], logps, True


def same(one, other, atol=1e-5):
    """Equal ids, lengths and truncations; log-probs to 1e-5."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(one.truncated, other.truncated)
    torch.testing.assert_close(one.logp, other.logp, atol=atol, rtol=0)


def taken(samples, rows):
    """The samples of these rows."""
    names = ("tokens", "lengths", "logp", "truncated", "logp_1")
    return samples._replace(**{name: getattr(samples, name)[rows] for name in names})


def answers(samples):
    lengths = samples.lengths.tolist()
    return zip(samples.tokens, lengths, samples.logp, samples.truncated.tolist(), strict=True)


def draw(model, prompts=PROMPTS, n=4, max_new=24, ends=(END, 1, 2), rows=512, **more):
    """Answers of a new sampler; the seed of an answer is its number."""
    seeds = range(len(prompts) * n)
    return Sampler(model, rows)(prompts, n, max_new, seeds, list(ends), **more)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_cached_decode_equals_uncached(model, temperature, prefix):
    """Ragged prompts, several answers, compaction and a shared prefix against one row at a time
    without a cache.
    """
    samples = draw(model, temperature=temperature, prefix=prefix)
    for row, (tokens, length, logp, truncated) in enumerate(answers(samples)):
        ids, logps, at_the_limit = slowly(
            model, [*prefix, *PROMPTS[row // 4]], 24, row, (END, 1, 2), temperature
        )
        assert tokens[:length].tolist() == ids and truncated == at_the_limit
        torch.testing.assert_close(logp[:length], torch.tensor(logps), atol=1e-5, rtol=0)
    assert 0 < int(samples.truncated.sum()) < 20  # the test is not of one case
    assert len(set(samples.lengths.tolist())) > 5


def test_ragged_equals_one_by_one(model):
    whole = draw(model)
    for q, prompt in enumerate(PROMPTS):
        rows = slice(4 * q, 4 * q + 4)
        alone = Sampler(model)([prompt], 4, 24, range(rows.start, rows.stop), [END, 1, 2])
        same(taken(whole, rows), alone)


@pytest.mark.parametrize("rows", [1, 4, 9, 512])
def test_rows_side_by_side_change_nothing(model, rows):
    same(draw(model), draw(model, rows=rows))


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_compaction_changes_nothing(model, monkeypatch, prefix):
    results = []
    for check in (1, 3, 10**9):
        monkeypatch.setattr(Sampler, "CHECK", check)
        results.append(draw(model, n=20, prefix=prefix))
    same(results[0], results[1])
    same(results[0], results[2])
    assert results[0].waste < results[1].waste < results[2].waste


def test_waste_by_hand(model, monkeypatch):
    """Without compaction a batch takes max_new steps of every row."""
    assert draw(model, max_new=1).waste == 0
    monkeypatch.setattr(Sampler, "CHECK", 10**9)
    samples = draw(model)
    assert samples.waste == pytest.approx(1 - int(samples.lengths.sum()) / (20 * 24))


def test_shared_prefix_equals_concatenation(model):
    """Also when a sampler is used with one prefix, another, and none."""
    sampler, seeds = Sampler(model), range(20)
    for prefix in (PREFIX, PREFIX[:2], [], PREFIX):
        joined = sampler([prefix + prompt for prompt in PROMPTS], 4, 24, seeds, [END, 1, 2])
        same(sampler(PROMPTS, 4, 24, seeds, [END, 1, 2], prefix=prefix), joined)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("per_row", [1, 3])
def test_recorded_log_probs_equal_the_trainers(dtype, atol, temperature, per_row):
    """What RL relies on, through the batch that RL trains on.

    With several answers to a row its targets are those of `batch`, and not of the next column.
    """
    model = small_model(VOCAB, 64, dtype)
    samples = draw(model, temperature=temperature)
    prompts, lengths = [p for p in PROMPTS for _ in range(4)], samples.lengths.tolist()
    said = [row[:length] for row, length in zip(samples.tokens.tolist(), lengths, strict=True)]
    logps = [row[:length] for row, length in zip(samples.logp, lengths, strict=True)]
    batch = problems.make_batch(prompts, said, [1.0] * 20, END, logps, per_row)
    how = dict(mask=batch.mask, temperature=temperature, layout=batch.layout)
    for logp in (
        model(batch.ids, batch.target, weight=batch.weight, **how)[1],
        model(batch.ids, batch.target, **how)[0],
    ):
        torch.testing.assert_close(logp.float(), batch.logp, atol=atol, rtol=0)


def test_end_token_is_kept_and_the_rest_is_filled(model):
    samples = draw(model)
    for tokens, length, logp, truncated in answers(samples):
        answer = tokens[:length].tolist()
        assert not {END, 1, 2} & set(answer[:-1])
        assert (answer[-1] in (END, 1, 2)) != truncated
        assert (tokens[length:] == END).all()
        assert not logp[length:].any() and (logp[:length] < 0).all()
        assert length == 24 or not truncated


def test_answer_that_ends_on_the_last_token_is_not_truncated(model):
    """Ending exactly at max_new is ending."""
    long = draw(model)
    row = int(((long.lengths > 3) & ~long.truncated).nonzero()[0])
    exact = Sampler(model)([PROMPTS[row // 4]], 1, int(long.lengths[row]), [row], [END, 1, 2])
    assert exact.tokens[0].tolist() == long.tokens[row, : long.lengths[row]].tolist()
    assert not exact.truncated.any()


def test_noise_is_a_function_of_the_seed_alone(model):
    noise = uniform_noise([3, 2**62, 7], 40)
    assert noise.dtype == torch.float64 and 0 <= float(noise.min()) and float(noise.max()) < 1
    assert torch.equal(noise[[2, 0]], uniform_noise([7, 3], 40))
    assert torch.equal(noise[:, :9], uniform_noise([3, 2**62, 7], 9))
    state = torch.get_rng_state()
    one, again = draw(model), draw(model)
    same(one, again, atol=0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    one, again = (Sampler(model)([[5, 6, 7]], 3, 12, [4, 4, 4], [END]) for _ in range(2))
    same(one, again)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_softmax(temperature):
    """Chi-square of 20,000 answers of two tokens over all 25 pairs: no top-k, no top-p, the second
    token drawn independently of the first one's noise.
    """
    model, count = small_model(5, 8, torch.float32), 20_000
    model.head.weight.data *= 0.3
    samples = Sampler(model, rows=count)([[1, 2, 3]], count, 2, range(count), [99], temperature)
    found = torch.bincount(5 * samples.tokens[:, 0] + samples.tokens[:, 1], minlength=25)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    ids = torch.cat([torch.tensor([[1, 2, 3]]).expand(25, 3), pairs], 1)
    logp = next_tokens(model, ids, temperature=temperature)[0].detach()
    expected = count * logp[:, 2:].sum(1).exp()
    assert float(expected.min()) > 5  # the approximation is fair
    distance = float(((found - expected).square() / expected).sum())
    assert distance < 51.2  # 24 degrees of freedom, p = 0.001


def test_temperature_zero_takes_the_most_probable(model):
    samples = draw(model, n=2, max_new=10, temperature=0)
    assert torch.equal(samples.tokens[::2], samples.tokens[1::2])
    for row in range(0, 10, 2):
        ids = list(PROMPTS[row // 2])
        for t in range(int(samples.lengths[row])):
            hidden = model.hidden(torch.tensor([ids]))[0, -1]
            law = (hidden @ model.head.weight[:VOCAB].T).log_softmax(0)
            assert int(samples.tokens[row, t]) == int(law.argmax())
            assert float(samples.logp[row, t]) == pytest.approx(float(law.max().detach()), abs=1e-5)
            ids.append(int(law.argmax()))


def test_padded_vocabulary_column_is_never_sampled():
    model = small_model(VOCAB, 64)
    before = draw(model)
    model.head.weight.data[VOCAB:] = 1e3
    after = draw(model)
    same(before, after, atol=0)
    assert int(after.tokens.max()) < VOCAB


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_refresh_takes_over_new_weights(prefix):
    """Every weight, and a cached prefix of the old ones is dropped."""
    model = small_model(VOCAB, 64)
    sampler = Sampler(model)
    sampler(PROMPTS, 4, 24, range(20), [END], 1.0, list(prefix))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    sampler.refresh()
    samples = sampler(PROMPTS, 4, 24, range(20), [END, 1, 2], 1.0, list(prefix))
    same(samples, draw(model, prefix=prefix), atol=0)


def test_bfloat16_sampler_is_near_its_trainer():
    """The copy of the weights is in the compute dtype; what is recorded is near what the trainer
    sees in that dtype."""
    model = small_model(VOCAB, 64, torch.float32)
    model.compute = torch.bfloat16
    samples = draw(model, [[5, 6, 7]], n=20, max_new=8, ends=(99,))
    ids = torch.cat([torch.tensor([[5, 6, 7]]).expand(20, 3), samples.tokens], 1)
    assert samples.logp.dtype == torch.float32
    trained = next_tokens(model, ids)[0].detach()[:, 2:]
    assert float((trained - samples.logp).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "prompts, max_new, says",
    [
        ([[1], []], 4, "a prompt is empty"),
        ([], 4, "a prompt is empty"),
        ([[1] * 60], 40, "60 .prompt. . 40 .answer. tokens are more than"),
    ],
)
def test_impossible_requests_are_refused(model, prompts, max_new, says):
    with pytest.raises(ValueError, match=says):
        Sampler(model)(prompts, 1, max_new, range(len(prompts)), [END])


def test_context_may_be_filled_to_the_last_token(model):
    samples = Sampler(model)([[1] * 56], 2, 40, [0, 1], [99])
    assert samples.lengths.tolist() == [40, 40] and samples.truncated.all()


def test_order_of_the_questions_changes_nothing(model):
    """An answer is a function of its seed and prompt, whatever stands beside it."""
    whole, seeds = draw(model), list(range(20))
    turned_seeds = [s for q in range(5)[::-1] for s in seeds[4 * q : 4 * q + 4]]
    turned = Sampler(model, 8)(PROMPTS[::-1], 4, 24, turned_seeds, [END, 1, 2])
    place = torch.tensor([4 * q + a for q in range(5)[::-1] for a in range(4)])
    same(taken(whole, place), turned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_is_the_same_in_every_precision_and_bucket(dtype, monkeypatch):
    """What each row draws with, watched inside the sampler: row by row the numbers of
    `uniform_noise`.
    """
    used = {}
    model = small_model(VOCAB, 64, torch.float64 if dtype == torch.float64 else torch.float32)
    model.compute = dtype
    real = Sampler._draw

    def watched(self, x, rows, step):
        b = self.buffers
        t = int(b.t[0]) + 1
        numbers = b.noise[rows, t].tolist()
        used.update({(row, t): u for row, u in zip(b.slot[rows].tolist(), numbers, strict=True)})
        real(self, x, rows, step)

    monkeypatch.setattr(Sampler, "_draw", watched)
    samples = draw(model, [[5, 6, 7]], n=60)
    noise = uniform_noise(range(60), 24)
    assert min(samples.lengths.tolist()) < 12  # rows were dropped
    assert len(used) > int(samples.lengths.sum())
    assert all(u == float(noise[row, t]) for (row, t), u in used.items())


def test_buckets_and_waste():
    """Powers of two and the halves between; with answers of 150 tokens on average, at most 512,
    under a fifth of the slots is idle."""
    counts = (1, 16, 17, 24, 25, 33, 48, 49, 65, 97, 500, 512, 513)
    sizes = (16, 16, 24, 24, 32, 48, 48, 64, 96, 128, 512, 512, 768)
    assert tuple(map(bucket, counts)) == sizes
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(512).geometric_(1 / 150, generator=generator).clamp(1, 512)
    rows, slots = 512, 0
    for t in range(512):
        live = int((lengths > t).sum())
        if t % Sampler.CHECK == 0 and t:
            rows = min(rows, bucket(live)) if live else 0
        slots += rows
    assert float(1 - lengths.sum() / slots) < 0.2


def test_log_prob_at_temperature_one_comes_along(model):
    """Beside the log-prob under the distribution that was sampled, in the same pass."""
    for temperature in (0.6, 1.0, 0):
        samples = draw(model, [[5, 6, 7]], n=20, max_new=8, ends=(99,), temperature=temperature)
        ids = torch.cat([torch.tensor([[5, 6, 7]]).expand(20, 3), samples.tokens], 1)
        own = next_tokens(model, ids)[0].detach()[:, 2:].float()
        torch.testing.assert_close(own, samples.logp_1, atol=1e-5, rtol=0)
        assert torch.allclose(samples.logp, samples.logp_1, atol=1e-5) == (temperature != 0.6)


def test_batch_that_does_not_fit_is_made_smaller_or_refused(model, monkeypatch):
    """By what is free; the message says what would make it fit."""
    whole = draw(model)
    sizes = []
    real = Sampler._take_in

    def watched(self, questions, *rest):
        sizes.append(len(questions))
        return real(self, questions, *rest)

    monkeypatch.setattr(Sampler, "_take_in", watched)
    sampler = Sampler(model)
    # By hand: prompts of 8 columns and answers of 24, and room for 8 more of each. A column is 1024
    # bytes of keys and values, and beside them 4 of a prompt and 24 of an answer. The prefill
    # takes more than a decoded token: the keys and values again, and of a layer 4 * 48 and 8 * 32
    # numbers a token.
    # There is a prompt and an answer more than are used.
    prompt, answer = 16 * (1024 + 4), 32 * (1024 + 24)
    prefill = 8 * (1024 + 8 * (4 * 48 + 8 * 32))
    one = 2 * prompt + 5 * answer + prefill
    assert sampler._bytes(1, 4, 7, 24, 0) == one
    question = prompt + 4 * answer + prefill
    assert sampler._bytes(3, 4, 7, 24, 0) == one + 2 * question
    monkeypatch.setattr(network, "free_bytes", lambda device: (one + 1.25 * question) / 0.9)
    with pytest.warns(UserWarning, match="sampling 8 answers at a time, not 20; a lower --max_new"):
        same(sampler(PROMPTS, 4, 24, range(20), [END, 1, 2]), whole)
    assert sizes == [1, 2, 2]
    monkeypatch.setattr(network, "free_bytes", lambda device: 1000)
    says = "4 answers of 24 tokens to a prompt of 7 need .* GiB, more than is free: lower --max_new"
    with pytest.raises(ValueError, match=says):
        Sampler(model)(PROMPTS, 4, 24, range(20), [END])


@pytest.mark.parametrize("second", [([[1, 2, 3]] * 36, 1, 16), ([[1, 2, 3] * 16], 2, 40)])
def test_buffers_grow_in_each_size_only_while_that_is_little_and_fits(model, monkeypatch, second):
    """Many short questions, then somewhat fewer with longer answers, or a few answers to a long
    one. The rows of the first with the columns of the second are somewhat more than either, or
    many times that."""
    first = ([[1, 2, 3]] * 40, 1, 8)
    alone = [Sampler(model) for _ in range(2)]
    for sampler, (prompts, n, max_new) in zip(alone, (first, second), strict=True):
        sampler(prompts, n, max_new, range(len(prompts) * n), [END])
    own = alone[1].buffers.sizes
    larger = tuple(map(max, alone[0].buffers.sizes, own))
    more = network.Buffers(model, "meta", larger).nbytes - alone[1].buffers.nbytes
    prompts, n, max_new = second
    need = alone[1]._bytes(len(prompts), n, len(prompts[0]), max_new, 0)
    little = max_new == 16
    assert (more < alone[1].buffers.nbytes / 5) == little
    for room, sizes in ((math.inf, larger if little else own), ((need + more / 2) / 0.9, own)):
        sampler = Sampler(model)
        total = lambda _, s=sampler, room=room: room - (s.buffers.nbytes if s.buffers else 0)  # noqa
        monkeypatch.setattr(network, "free_bytes", total)
        sampler(*first, range(40), [END])
        found = sampler(*second, range(len(prompts) * n), [END])
        assert sampler.buffers.sizes == sizes
        same(found, alone[1](*second, range(len(prompts) * n), [END]))


def test_a_prefix_of_new_weights_is_written_where_graphs_read_it(model):
    sampler = Sampler(model)

    def draw_after(prefix):
        return sampler([[1, 2]], 2, 8, range(2), [END], prefix=prefix)

    draw_after([5, 6, 7])
    place = sampler.prefix[0].data_ptr()
    sampler.graphs = {"step": "graph"}
    sampler.refresh()
    for prefix in ([5, 6, 7], [8, 9, 1]):
        found = draw_after(prefix)
        assert sampler.prefix[0].data_ptr() == place and sampler.graphs
        same(found, Sampler(model)([[1, 2]], 2, 8, range(2), [END], prefix=prefix))
    same(draw_after([5, 6]), Sampler(model)([[1, 2]], 2, 8, range(2), [END], prefix=[5, 6]))
    assert not sampler.graphs


def test_no_limit_where_the_system_does_not_say_what_is_free(model, monkeypatch):
    monkeypatch.setattr(network, "free_bytes", lambda device: math.inf)
    same(draw(model, rows=8), draw(model))


MANY = [[1 + (7 * q + i) % 36 for i in range(1 + 5 * q % 11)] for q in range(23)]


class Refilled(Sampler):
    """With refill, and what was seen of it."""

    def __init__(self, *how):
        super().__init__(*how)
        self.refill = True
        self.among = []  # rows that were still decoded whenever questions were taken in
        self.apart = set()  # how far decoded rows were from each other, in tokens
        self.steps = 0

    def _take_in(self, questions, groups, rows, request, step):
        alive = self.buffers.alive[: rows.start]
        assert not set(groups) & set(self.buffers.group[: rows.start][alive].tolist())
        self.among.append(int(alive.sum()))
        super()._take_in(questions, groups, rows, request, step)

    def _advance(self, step):
        t = self.buffers.t[: step.rows][self.buffers.alive[: step.rows]]
        self.apart.add(int(t.max() - t.min()) if len(t) else 0)
        self.steps += 1
        super()._advance(step)


@pytest.mark.parametrize("n, rows", [(4, 16), (1, 4), (7, 33), (16, 16)])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_refill_changes_no_answer(model, n, rows, prefix):
    """The next questions take the places of answers that have ended; nobody's draws change."""
    request = MANY, n, 24, range(23 * n), [END, 1, 2], 0.8, prefix
    batches = Sampler(model, rows)(*request)
    sampler = Refilled(model, rows)
    refilled = sampler(*request)
    same(refilled, batches)
    if n == 16:  # one question at a time: there is nothing to refill
        assert not any(sampler.among) and sampler.apart == {0}
        assert refilled.waste == batches.waste
        return
    assert sum(count > 0 for count in sampler.among) > 4 and max(sampler.apart) > 8
    one = Sampler(model)(MANY[9:10], n, 24, range(9 * n, 10 * n), [END, 1, 2], 0.8, prefix)
    same(taken(batches, slice(9 * n, 10 * n)), one)


def test_refilled_sampler_is_used_again(model):
    """Another prefix, fewer columns, one question; what an earlier call left behind is not read.
    Rows that have ended go on among others, and never past the model's context."""
    sampler = Refilled(model, 16)
    for prefix, count, new in (((), 23, 24), (PREFIX, 23, 12), ((), 1, 1), (PREFIX[:2], 9, 24)):
        request = MANY[:count], 4, new, range(4 * count), [END, 1, 2], 1.0, prefix
        same(sampler(*request), Sampler(model)(*request))
    width = model.config.context - 9
    long = [(prompt * width)[:width] for prompt in MANY * 3]
    request = long, 5, 9, range(5 * len(long)), [END, 1, 2]
    same(sampler(*request), Sampler(model)(*request))


def test_refill_takes_fewer_steps(model):
    """Of 32 rows, with answers of 11 tokens on average and 40 at most."""
    request = MANY, 8, 40, range(23 * 8), [END, 1, 2]
    refilled = Refilled(model, 32)
    waste = refilled(*request).waste
    plain = Refilled(model, 32)
    plain.refill = False
    samples = plain(*request)
    lengths = samples.lengths.float()
    assert 10 < lengths.mean() < 12 and lengths.max() == 40
    assert refilled.steps < 0.5 * plain.steps and waste < 0.7 * samples.waste


def test_progress_wraps_the_batches(model):
    shown = []

    def progress(batches):
        shown.append(batches)
        return batches

    Sampler(model, 8)(PROMPTS, 4, 24, range(20), [END], progress=progress)
    assert sorted(q for questions in shown[0] for q in questions) == [0, 1, 2, 3, 4]
    assert max(map(len, shown[0])) == 2


def test_prefill_is_the_model(model):
    """Hidden states of whole rows, at once or in two parts, the second after the keys and values of
    the first; one row's past serves all."""
    ids = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :5] = ids[:1, :5]
    sampler = Sampler(model)
    with torch.no_grad():
        whole, cache = sampler.prefill(ids)
        first, past = sampler.prefill(ids[:1, :5])
        second, rest = sampler.prefill(ids[:, 5:], past)
        expected = model.hidden(ids)
    torch.testing.assert_close(whole, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([first.expand(3, 5, 32), second], 1), expected)
    for (k, v), (past_k, past_v), (rest_k, rest_v) in zip(cache, past, rest, strict=True):
        assert k.shape == v.shape == (3, 4, 12, 8)
        torch.testing.assert_close(torch.cat([past_k.expand(3, 4, 5, 8), rest_k], 2), k)
        torch.testing.assert_close(torch.cat([past_v.expand(3, 4, 5, 8), rest_v], 2), v)


def test_refresh_keeps_the_addresses():
    """A graph goes on reading the weights where they were: copies in the compute dtype are filled
    anew, in place."""
    model = small_model(VOCAB, 64, torch.float32)
    model.compute = torch.bfloat16
    sampler = Sampler(model)

    def addresses():
        return [w.data_ptr() for w in sampler.model.parameters()]

    before = addresses()
    for p in model.parameters():
        p.data.mul_(1.5)
    sampler.refresh()
    assert before == addresses()
    mine = sampler.model.blocks[1].qkv.weight
    assert torch.equal(mine, model.blocks[1].qkv.weight.bfloat16())
    assert torch.equal(sampler.head, model.head.weight[:VOCAB].bfloat16())


def test_buffers_are_kept(model):
    """No allocation a token, and none a batch once the largest has been seen."""
    sampler = Sampler(model)
    sampler(PROMPTS, 4, 24, range(20), [END])
    held = sampler.buffers
    sampler(PROMPTS[:2], 4, 8, range(8), [END])
    assert sampler.buffers is held
    sampler(PROMPTS, 8, 24, range(40), [END])
    assert sampler.buffers is not held and sampler.buffers.sizes[0] > 40


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_block_is_compiled_once(model, monkeypatch, prefix):
    """Whatever the rows, also while they finish and are dropped, the questions and the columns.

    Fails when the buffers have no more rows than are used: seen. What the compiler would take
    minutes to make is run as it is.
    """
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    sampler = Sampler(model, compile=True)
    for prompts, n, max_new in ((PROMPTS, 20, 24), (PROMPTS[:2], 20, 24), (PROMPTS, 30, 40)):
        seeds = range(len(prompts) * n)
        samples = sampler(prompts, n, max_new, seeds, [END, 1, 2], 1.0, list(prefix))
        slots = int(samples.lengths.sum()) / (1 - samples.waste)
        assert slots < 0.95 * max_new * len(seeds), "no rows were dropped: this test sees nothing"
        assert counter.frame_count == 1


def test_sizes_of_weights_are_constants_of_the_compiled_block(model, monkeypatch):
    """Where they were variables, as the sizes of arguments are, sampling took twice as long."""
    torch._dynamo.reset()
    shapes = []

    def backend(graph, _):
        inputs = [
            node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")
        ]
        shapes.extend(x.shape for x in inputs if isinstance(x, torch.Tensor))
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    Sampler(model, compile=True)(PROMPTS, 20, 24, range(100), [END])
    constant = [tuple(shape) for shape in shapes if all(type(size) is int for size in shape)]
    weights = [tuple(p.shape) for p in model.blocks[0].parameters()]
    assert all(constant.count(shape) >= weights.count(shape) for shape in weights)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_compiled_equals_plain(model, prefix):
    """torch.compile of the block, in fp64, with compaction; the second call compiles nothing
    new."""
    sampler = Sampler(model, compile=True)
    for _ in range(2):
        began = time.time()
        samples = sampler(PROMPTS, 20, 24, range(100), [END, 1, 2], 1.0, list(prefix))
        same(samples, draw(model, n=20, prefix=prefix))
    assert time.time() - began < 3
