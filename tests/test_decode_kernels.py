"""The sampler's kernels against fp64, in Triton's interpreter where there is no GPU, and what they
compile to. bf16 is wrong in the interpreter: fp16 stands in for it there."""

import math
import os
import subprocess
import sys

import pytest
import torch

import model as network
from helpers import ROOT, small_model
from model import Cache, Place, Sampler, attend_to_cache, choose

pytestmark = pytest.mark.skipif(network.triton is None, reason="needs triton")
CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """NaN in every buffer that starts uninitialised."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(network, "use_triton", lambda x: x.dtype != torch.float64)


# ---- attention


def exactly(q, k, v, cache, place):
    """Row by row in fp64: keys and values of all that the row sees, one after the other."""
    rows = []
    for r in range(len(q)):
        g = int(place.group[r])
        seen = [
            cache.prompt[:, g, :, : int(place.size[g])],
            cache.own[:, r, :, : int(place.length[r])],
        ]
        seen += [cache.prefix] if cache.prefix is not None else []
        seen += [torch.stack([k[r], v[r]])[:, :, None]]
        keys, values = torch.cat([part.double() for part in seen], 2)  # (H, columns, K)
        scores = (keys @ q[r].double()[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
        rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
    return torch.stack(rows)


def numbers(rows, H, K, T, P, S, lengths, sizes, dtype, scale=1.0, apart=False):
    """Arguments of attend_to_cache, `rows` of each question; what no row may read is NaN."""
    generator = torch.Generator().manual_seed(len(lengths) + K)

    def some(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    R, G = len(lengths), len(sizes)
    group = torch.arange(G).repeat_interleave(torch.tensor(rows))
    group = group[torch.randperm(R, generator=generator)] if apart else group
    own, prompt = some(2, R + 3, H, T + 8, K)[:, :R, :, :T], some(2, G, H, P + 8, K)[..., :P, :]
    for r, length in enumerate(lengths):
        own[:, r, :, length:] = torch.nan
    for g, size in enumerate(sizes):
        prompt[:, g, :, size:] = torch.nan
    prefix = some(2, H, S, K) if S else None
    v = some(R, 3, H, K)[:, 2]  # as it comes from one product of q, k and v
    counts = dict(length=torch.tensor(lengths), group=group, size=torch.tensor(sizes))
    others = dict.fromkeys(("t", "cos", "sin", "mask"))
    place = Place(**others, **{name: x.to(DEVICE) for name, x in counts.items()})
    return some(R, H, K), some(R, H, K), v, Cache(own, prompt, prefix), place


RAGGED = [3, 0, 40, 33, 1, 17, 5, 64, 2, 31, 32]
CASES = {
    "one row": dict(rows=[1], lengths=[5], sizes=[3]),
    "nothing of its own yet": dict(rows=[2, 1], lengths=[0, 0, 0], sizes=[3, 70]),
    "ragged": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 64]),
    "a prefix": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 1], S=70),
    "questions without rows": dict(
        rows=[0, 6, 0, 0, 5, 0], lengths=RAGGED, sizes=[3, 9, 0, 4, 1, 2]
    ),
    "rows of a question apart": dict(
        rows=[3, 0, 4, 4], lengths=RAGGED, sizes=[5, 80, 64, 9], apart=True
    ),
    "a question in two tiles": dict(rows=[2, 37, 1], lengths=[7] * 40, sizes=[5, 6, 7], S=3),
    "a head of 24": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 64], S=9, K=24),
    "a head of 8": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 64], S=9, K=8),
    "large scores": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 64], S=9, scale=6.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_against_fp64(case, dtype):
    """And beside plain PyTorch in the same dtype; the same bits twice."""
    sizes = dict(H=2, K=32, T=64, P=80, S=0, dtype=dtype) | CASES[case]
    inputs = numbers(**sizes)
    exact = exactly(*inputs)
    found = attend_to_cache(*inputs)
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert torch.equal(found, attend_to_cache(*inputs))
    allowed = 1e-5 if dtype == torch.float32 else 4e-3
    assert float((found.double() - exact).abs().max()) < allowed * exact.abs().max()


# ---- the draw


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, several steps, and steps that are only there to make a power of two."""
    monkeypatch.setattr(network, "BLOCK_DRAW", 16)
    monkeypatch.setattr(network, "BLOCKS_DRAW", 2)


def some_logits(R, V, dtype, padding=11):
    """(R, V) of longer rows, whose rest is NaN."""
    generator = torch.Generator().manual_seed(R)
    logits = torch.randn(R, V + padding, generator=generator).mul(3).to(DEVICE, dtype)
    logits[:, V:] = torch.nan
    return logits[:, :V]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_draw_is_that_of_fp64(dtype, temperature, small_blocks):
    logits = some_logits(32, 97, dtype)
    u = torch.rand(32, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u[:3] = torch.tensor([[0.0], [1 - 2**-53], [0.5]])
    u = u.to(DEVICE)
    token, (logp, logp_1) = choose(logits, u, temperature)
    expected, (exact, exact_1) = choose(logits.double(), u, temperature)
    assert torch.equal(token, expected)
    torch.testing.assert_close(logp, exact.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(logp_1, exact_1.float(), atol=1e-5, rtol=0)


def test_what_is_impossible_is_never_drawn(small_blocks):
    """Ids of probability 0, and whole blocks of them, at both ends and between; the numbers that
    lie on the edges."""
    logits = torch.full((9, 97), -math.inf, device=DEVICE)
    logits[:, [20, 21, 60, 77]] = 0.0
    u = [0.0, 0.25, 0.5, 0.75, 1 - 2**-53, 0.2499, 0.4999, 0.7499, 0.1]
    u = torch.tensor(u, dtype=torch.float64, device=DEVICE)[:, None]
    token, (logp, _) = choose(logits, u, 1.0)
    assert token[:, 0].tolist() == [20, 21, 60, 77, 77, 20, 21, 60, 20]
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(4)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_total_variation_is_within_its_bound(temperature, small_blocks):
    """The distribution that the kernel samples from, found by bisection of the numbers at which
    each id turns into the next, beside the softmax in fp64.

    The bound: 16 ids are summed in fp32, in any order; and an id's weight exp((x - m) / T) is one
    of fp32, of which the argument's rounding is the larger part."""
    V = 97
    logits = some_logits(1, V, torch.float32).expand(V - 1, V).contiguous()
    x = logits[0].double() / temperature
    law = x.softmax(0)
    weights = float((law * (x.max() - x + 2)).sum()) * 2**-23
    bound = 15 * 2**-24 + weights
    middle = law.cumsum(0)[:-1, None]  # where the id turns into the next
    low, high = middle - 20 * bound, middle + 20 * bound
    before = torch.arange(V - 1, device=DEVICE)[:, None]
    for _ in range(17):
        middle = (low + high) / 2
        below = choose(logits, middle.clamp(0, 1 - 2**-53), temperature)[0] <= before
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    edges = torch.cat([torch.zeros(1), middle[:, 0].cpu(), torch.ones(1)])
    distance = float((edges.diff() - law.cpu()).abs().sum()) / 2
    assert distance < bound


# ---- the sampler


@pytest.mark.parametrize(
    "prefix, rows", [pytest.param((), 512, marks=pytest.mark.slow), ((21, 22, 23), 16)]
)
def test_sampler_draws_the_same_with_kernels(monkeypatch, prefix, rows, small_blocks):
    """Rows are dropped, or the third question takes their places; the block is one piece for a
    compiler; a captured step serves all columns."""
    model = small_model(37, 64, torch.float32, layers=1, heads=2).to(DEVICE)
    model.head.weight.data *= 0.3
    request = [[5, 6, 7], [8], [9, 10, 11, 12, 13]], 8, 10, range(24), [0, 1, 2, 3, 4], 0.9, prefix
    monkeypatch.setattr(Sampler, "CHECK", 2)
    steps = set()
    real = Sampler._advance

    def watched(self, step):
        steps.add(step)
        group = self.buffers.group[: step.rows][self.buffers.alive[: step.rows]]
        pieces = group.unique_consecutive()
        assert len(pieces) == len(pieces.unique()), "rows of a question are apart"
        real(self, step)

    monkeypatch.setattr(Sampler, "_advance", watched)
    sampler = Sampler(model, rows)
    sampler.decode = torch.compile(
        sampler.decode, backend="aot_eager", dynamic=True, fullgraph=True
    )
    found = sampler(*request)
    assert {step.rows for step in steps} == ({24, 16} if rows == 512 else {16})
    assert len(steps) == (2 if rows == 512 else 1)
    monkeypatch.setattr(network, "use_triton", lambda x: False)
    expected = Sampler(model)(*request)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.logp, expected.logp, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logp_1, expected.logp_1, atol=1e-4, rtol=0)


def test_a_batch_with_kernels_needs_no_room_for_products(monkeypatch):
    """Nor for sums of the draw; with refill for more prompts, and for keys that move."""
    sampler = Sampler(small_model(37, 64, torch.float32))
    whole = sampler._bytes(1, 512, 7, 24, 0)
    sampler.refill = False
    assert sampler._bytes(1, 512, 7, 24, 0) < whole
    monkeypatch.setattr(network, "use_triton", lambda x: False)
    plain = Sampler(sampler.model)
    assert sampler._bytes(1, 512, 7, 24, 0) < plain._bytes(1, 512, 7, 24, 0)


@pytest.mark.slow
def test_compiles_for_an_h200_and_an_a100(tmp_path):
    """Nothing spills, shared memory suffices, tensor cores work, loads are of 16 bytes. No GPU is
    needed. python tests/ahead.py shows the numbers."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "tests/ahead.py", "check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
