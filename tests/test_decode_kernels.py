"""The sampler's kernels against fp64, in Triton's interpreter where there is no GPU, and what they
compile to. bf16 is wrong in the interpreter: fp16 stands in for it there."""

import math

import pytest
import torch

import model as network
from helpers import small_model
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
        seen = [cache.prompt[:, g, :, : int(place.size[g])], cache.own[:, r, :, : int(place.length[r])]]
        seen += [cache.prefix] if cache.prefix is not None else []
        seen += [torch.stack([k[r], v[r]])[:, :, None]]
        keys, values = torch.cat([part.double() for part in seen], 2)  # (H, columns, K)
        scores = (keys @ q[r].double()[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
        rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
    return torch.stack(rows)


def numbers(rows, H, K, T, P, S, lengths, sizes, dtype, scale=1.0):
    """Arguments of attend_to_cache, `rows` of each question; what no row may read is NaN."""
    generator = torch.Generator().manual_seed(len(lengths) + K)

    def some(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    R, G = len(lengths), len(sizes)
    group = torch.arange(G).repeat_interleave(torch.tensor(rows))
    own, prompt = some(2, R + 3, H, T + 8, K)[:, :R, :, :T], some(2, G, H, P + 8, K)[..., :P, :]
    for r, length in enumerate(lengths):
        own[:, r, :, length:] = torch.nan
    for g, size in enumerate(sizes):
        prompt[:, g, :, size:] = torch.nan
    prefix = some(2, H, S, K) if S else None
    v = some(R, 3, H, K)[:, 2]  # as it comes from one product of q, k and v
    place = Place(None, None, torch.tensor(lengths), group, torch.tensor(sizes))
    place = Place(*(x if x is None else x.to(DEVICE) for x in place))
    return some(R, H, K), some(R, H, K), v, Cache(own, prompt, prefix), place


RAGGED = [3, 0, 40, 33, 1, 17, 5, 64, 2, 31, 32]
CASES = {
    "one row": dict(rows=[1], lengths=[5], sizes=[3]),
    "nothing of its own yet": dict(rows=[2, 1], lengths=[0, 0, 0], sizes=[3, 70]),
    "ragged": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 64]),
    "a prefix": dict(rows=[4, 4, 3], lengths=RAGGED, sizes=[5, 80, 1], S=70),
    "questions without rows": dict(rows=[0, 6, 0, 0, 5, 0], lengths=RAGGED, sizes=[3, 9, 0, 4, 1, 2]),
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
