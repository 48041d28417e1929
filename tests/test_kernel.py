"""The log-prob kernels against fp64, in Triton's interpreter where there is no GPU, and what they compile to for an H200.

The rule: an error against fp64 at most 3 times that of plain PyTorch in the same dtype plus 1e-5 for log-probs and
entropy, 2 times plus 1e-4 for gradients. bf16 is wrong in the interpreter, so fp16 stands in for it there.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, small_model

import model as network
from model import log_probs, weighted_nll

pytestmark = pytest.mark.skipif(network.triton is None, reason="needs triton")
CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Tiles and chunks so small that each case has several of them, and nan in every buffer that starts uninitialised."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(network, "TILES", {2: (32, 128, 32, 4, 2), 4: (32, 128, 32, 4, 2)})
    for name, value in {"ROW_BLOCK": 128, "SEGMENTS": 2, "GROUP": 2, "CHUNK_CUDA": 1, "ROWS_CUDA": 32, "CHUNK": 1, "ROWS": 32}.items():
        monkeypatch.setattr(network, name, value)


@pytest.fixture(params=["triton", "pytorch"])
def path(request, monkeypatch):
    monkeypatch.setattr(network, "use_triton", lambda x: request.param == "triton")
    return request.param


def numbers(N=33, D=40, V=150, padding=20, dtype=torch.float32, shift=0.0, scale=1.0):
    """hidden in dtype; head an fp32 master whose numbers dtype can hold, with rows beyond V that would win every softmax;
    all real logits moved by shift; target; weight of both signs and some zeros; a weight for the entropy."""
    generator = torch.Generator().manual_seed(N + V)
    hidden, head = (torch.randn(n, D, generator=generator) * scale for n in (N, V + padding))
    hidden[:, 0], head[:, 0], head[V:] = 1, head[:, 0] + shift, 30
    target, weight = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    weight[::4] = 0
    hidden, head = hidden.to(DEVICE, dtype).requires_grad_(), head.to(dtype).to(DEVICE, torch.float32).requires_grad_()
    return hidden, head, target.to(DEVICE), weight.to(DEVICE), torch.randn(N, generator=generator).to(DEVICE)


def plain(hidden, head, target, vocab, temperature, dtype):
    """log-prob, entropy, log-sum-exp with all logits at once; products in dtype, sums in fp32 or fp64."""
    logits = (hidden.to(dtype) @ head[:vocab].to(dtype).T).to(torch.promote_types(dtype, torch.float32)) / temperature
    log_p = logits.log_softmax(1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1), logits.logsumexp(1)


def everything(function, hidden, head, *weights):
    """Outputs of the function and the gradients of its first one, weighted, in fp64."""
    outputs = function(hidden, head)
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=False))
    gradients = torch.autograd.grad(total, (hidden, head))
    return [x.detach().double() for x in (*outputs, *gradients)]


def within(ours, theirs, exact, factors):
    for x, y, truth, (factor, extra) in zip(ours, theirs, exact, factors, strict=True):
        assert torch.isfinite(x).all() and x.shape == truth.shape
        if truth.numel():
            assert float((x - truth).abs().max()) <= factor * float((y - truth).abs().max()) + extra


LOG, GRAD = (3, 1e-5), (2, 1e-4)
CASES = {
    "ragged": {},
    "many tiles": {"V": 300},
    "one row": {"N": 1},
    "one tile, no padding": {"N": 32, "D": 64, "V": 64, "padding": 0},
    "tiny": {"N": 3, "D": 1, "V": 5, "padding": 3},
    "segments without columns": {"N": 33, "D": 33, "V": 65, "padding": 1},
    "shifted down": {"shift": -20.0},
    "shifted up": {"shift": 20.0},
    "peaked": {"scale": 2.0},
    "temperature": {"temperature": 0.6},
    "z-loss": {"z_loss": 0.01, "temperature": 1.5},
    "no rows": {"N": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_errors_against_fp64(path, case, dtype):
    sizes = dict(CASES[case])
    temperature, z_loss = sizes.pop("temperature", 1.0), sizes.pop("z_loss", 0.0)
    hidden, head, target, weight, other = numbers(dtype=dtype, **sizes)
    vocab = len(head) - sizes.get("padding", 20)

    def reference(dtype, nll):
        def function(hidden, head):
            logp, entropy, lse = plain(hidden, head, target, vocab, temperature, dtype)
            return ((z_loss * lse.square() - weight * logp).sum(), logp, entropy) if nll else (logp, entropy)

        return function

    for nll, ours, weights, factors in (
        (True, lambda h, w: weighted_nll(h, w, target, weight, vocab, temperature, z_loss), (1,), ((3, 1e-4), LOG, LOG, GRAD, GRAD)),
        (False, lambda h, w: log_probs(h, w, target, vocab, temperature), (weight, other), (LOG, LOG, GRAD, GRAD)),
    ):
        exact = everything(reference(torch.float64, nll), hidden.detach().double().requires_grad_(), head, *weights)
        found = everything(ours, hidden, head, *weights)
        within(found, everything(reference(dtype, nll), hidden, head, *weights), exact, factors)
        assert not found[-1][vocab:].any(), "the padding has a gradient"
    with torch.no_grad():  # no gradient: (b) in both
        loss, logp, _ = weighted_nll(hidden, head, target, weight, vocab, temperature, z_loss)
        assert torch.equal(logp, log_probs(hidden, head, target, vocab, temperature)[0])
        lse = plain(hidden, head, target, vocab, temperature, torch.float64)[2]
        torch.testing.assert_close(loss, (z_loss * lse.square() - weight * logp).sum().float(), atol=1e-3, rtol=1e-3)


def test_entropy_of_the_row_kernel(path):
    hidden, head, target, weight, _ = numbers()
    found = network._nll(hidden.detach(), head.detach(), target, weight, 150, 0.6, 0.0)[1]
    torch.testing.assert_close(found, plain(hidden, head, target, 150, 0.6, torch.float64)[1].float().detach())


def test_rows_without_weight_get_exact_zeros(path):
    hidden, head, target, weight, _ = numbers(N=9, dtype=HALF)
    loss, *_ = weighted_nll(hidden, head, target, weight, 150)
    loss.backward()
    assert not hidden.grad[weight == 0].any() and hidden.grad[weight != 0].any(1).all()
    hidden.grad = head.grad = None
    loss, logp, _ = weighted_nll(hidden, head, target, 0 * weight, 150)
    loss.backward()
    assert float(loss.detach()) == 0 and not hidden.grad.any() and not head.grad.any() and (logp < 0).all()


def test_old_and_new_log_prob_have_ratio_one(path):
    """With and without gradient, and whichever other rows there are. Triton only: a BLAS product depends on its rows."""
    hidden, head, target, _, _ = numbers(dtype=HALF)
    with torch.no_grad():
        old = log_probs(hidden, head, target, 150, 0.7)[0]
    new = log_probs(hidden, head, target, 150, 0.7)[0]
    assert bool(((new - old).exp() == 1).all())
    if path == "triton":
        assert torch.equal(log_probs(hidden[:30], head, target[:30], 150, 0.7)[0], old[:30])


def test_same_bits_twice_and_a_second_backward(path):
    """Gradients are handed over at the first backward pass; a second one must make the same again."""
    hidden, head, target, weight, other = numbers(N=9, dtype=HALF)
    runs = []
    for _ in range(2):
        loss, logp, _ = weighted_nll(hidden, head, target, weight, 150, 0.7, 0.01)
        first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
        runs.append([loss, logp, *first, *torch.autograd.grad(loss, (hidden, head))])
        assert all(map(torch.equal, first, runs[-1][-2:]))
        logp, entropy = log_probs(hidden, head, target, 150, 0.7)
        runs[-1] += [logp, entropy, *torch.autograd.grad((weight * logp + other * entropy).sum(), (hidden, head))]
    assert all(map(torch.equal, *runs))


def test_a_target_in_the_padding_has_probability_zero(monkeypatch):
    monkeypatch.setattr(network, "use_triton", lambda x: True)
    hidden, head, target, weight, _ = numbers(N=4)
    target[1] = 155
    for logp in (log_probs(hidden, head, target, 150)[0], weighted_nll(hidden, head, target, weight, 150)[1]):
        assert logp.isinf().tolist() == [False, True, False, False]


def test_model_drops_ignored_targets(monkeypatch):
    """Masked positions are exact zeros and all ignored is no error; both paths give one loss and one gradient."""
    results = []
    ids = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask, weight = torch.arange(8, device=DEVICE) > torch.tensor([[2], [7], [5]], device=DEVICE), torch.ones(3, 8, device=DEVICE)
    for fast in (True, False):
        monkeypatch.setattr(network, "use_triton", lambda x, fast=fast: fast)
        net = small_model(dtype=torch.float32).to(DEVICE)
        loss, logp, _ = net(ids, weight=weight, mask=mask)
        new, entropy = net(ids, mask=mask)
        (loss + new.sum() + entropy.sum()).backward()
        assert not logp[~mask].any() and not new[~mask].any() and not entropy[~mask].any()
        results.append([loss, logp, new, entropy, net.head.weight.grad, net.embed.weight.grad])
        assert not net(ids, weight=weight, mask=mask & False)[0]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_a_cpu_takes_pytorch():
    assert network.use_triton(torch.zeros(1)) is False


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import model
types = dict.fromkeys("N D vocab padded step".split(), "i32") | dict.fromkeys("inverse z_loss".split(), "fp32") | {"target": "*i64"}
for short in ("bf16", "fp32"):
    n, v, d, warps, stages = model.TILES[2 if short == "bf16" else 4]
    blocks = dict(BLOCK_N=n, BLOCK_V=v, BLOCK_D=d, BLOCK=model.ROW_BLOCK, EVEN=True)
    for kernel in (model._log_prob_kernel, model._gradient_kernel, model._row_kernel)[: 3 if short == "bf16" else 1]:
        names = kernel.arg_names
        given = types | dict.fromkeys("hidden head logits grad".split(), "*" + short) | dict.fromkeys(blocks, "constexpr")
        signature = {name: given.get(name, "*fp32") for name in names}
        round_ = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if signature[x][0] == "*" or x in ("D", "padded")}
        source = ASTSource(kernel, signature, {x: blocks[x] for x in names if x in blocks}, round_)
        options = dict(num_warps=warps, num_stages=stages) if kernel is not model._row_kernel else dict(num_warps=8)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert built.metadata.shared <= 227 * 1024, "more shared memory than an SM has"
        assert "tf32" not in built.asm["ptx"], "a product of fp32 is rounded to tf32"
        assert "atomic" not in built.asm["ttir"] and not re.search(r"\bred[.]", built.asm["ptx"]), "sums in any order"
        assert not re.search(r"arith.muli .*tensor<.*xi32>", built.asm["ttir"]), "an offset of 32 bits"
        if short == "bf16" and kernel is not model._row_kernel:
            assert "wgmma" in built.asm["ptx"] and "cp.async" in built.asm["ptx"], "Hopper's matrix units lie idle"
        if kernel is model._row_kernel:
            assert built.asm["ptx"].count("ld.global.v4") >= 8, "loads of 2 bytes"
"""


@pytest.mark.slow
def test_compiles_for_an_h200(tmp_path):
    """What the interpreter does not see: no tf32, 64-bit offsets, no atomics, shared memory, wide loads. No GPU is needed."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
