"""OLMo2 in one file: the network, the log-prob primitive, the KV-cache sampler, the optimizer. Tensors in, tensors out.

Shape letters: B rows, T tokens, D width, H heads, K = D/H head width, V vocabulary, N tokens in a flat list,
Q questions, R = Q*n answers being sampled, S tokens of a shared few-shot prefix.

What differs from a textbook transformer (this is what OLMo2 is, arXiv 2501.00656, section 3.2):
 1. the norms sit on the outputs of attention and MLP, none on their inputs:  h = x + Norm(Attn(x)),  y = h + Norm(MLP(h))
 2. queries and keys are RMS-normalised over the whole projection, before the split into heads and RoPE
 3. no bias anywhere, embedding and head are two matrices, SwiGLU, RoPE with theta 500000 in fp32, halves rotated
What differs from an ordinary code of it:
 4. q, k, v are one matrix, gate and up are one matrix: fewer and larger products, which is most of the speed on a CPU
 5. the head is never applied to all tokens at once: `weighted_nll` and `log_probs` walk over chunks of rows
 6. rows of the vocabulary above `vocab` (padding that makes V a round number) are cut off before every softmax
"""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

triton = None
if find_spec("triton") and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ):
    import triton  # takes most of a second, and a CPU has no use for it but to test the kernels
    import triton.language as tl

# ----------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class ModelConfig:
    layers: int = 4
    width: int = 96
    heads: int = 4
    ffn: int = 256
    vocab: int = 100278  # ids that exist; those from here to padded_vocab are never sampled nor counted
    padded_vocab: int = 100352  # rows of embedding and head, a multiple of 64 or 128 for the matrix units
    context: int = 512  # longest sequence
    theta: float = 500000.0  # RoPE base
    eps: float = 1e-6  # RMSNorm

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of even width")
        if self.vocab > self.padded_vocab:
            raise ValueError(f"vocab {self.vocab} is larger than padded_vocab {self.padded_vocab}")


PRESETS = {
    "toy": dict(layers=4, width=96, heads=4, ffn=256, context=512),  # half a million parameters
    "toy-large": dict(layers=6, width=192, heads=6, ffn=512, context=512),  # five times that: data against size
    "190m": dict(layers=12, width=768, heads=12, ffn=3072, context=4096),  # 190M beside the embedding
    "1b": dict(layers=16, width=2048, heads=16, ffn=8192, context=4096),  # OLMo-2-0425-1B
    "4b": dict(layers=30, width=3072, heads=24, ffn=8192, context=4096),  # paper: "4B", shape not given; here: 4.01B
}


class Linear(nn.Linear):
    """No bias; the weight is cast to the dtype of its input, so fp32 masters and bf16 compute need no autocast."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (or fp64), the cast back comes last (OLMo2's order)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def rope_table(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (...) int -> cos, sin (..., K/2) in fp32 whatever the compute dtype: bf16 angles would be noise."""
    frequency = theta ** -(torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) of x (..., K), first half against second half."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.qkv = Linear(c.width, 3 * c.width)
        self.q_norm, self.k_norm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        self.out = Linear(c.width, c.width)
        self.attention_norm = RMSNorm(c.width, c.eps)
        self.gate_up = Linear(c.width, 2 * c.ffn)
        self.down = Linear(c.ffn, c.width)
        self.mlp_norm = RMSNorm(c.width, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        q, k, v = self.qkv(x).split(D, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # over all heads together, as OLMo2 does
        q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention; x (B, T, D), attended (B, H, T, K)."""
        B, T, D = x.shape
        x = x + self.attention_norm(self.out(attended.transpose(1, 2).reshape(B, T, D)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.mlp_norm(self.down(F.silu(gate) * up))


class Model(nn.Module):
    """OLMo2. Weights are kept in fp32 (or fp64); `compute` is the dtype of activations and matrix products."""

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute = config, compute
        self.embed = nn.Embedding(config.padded_vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.padded_vocab)

    def init_weights(self, seed: int, embed_std: float = 0.02) -> "Model":
        """Truncated normal, std 0.02, cut at 3 std (OLMo2); norms start at 1. embed_std: the embedding's own std."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same weights
        for p in self.parameters():
            if p.dim() > 1:
                fresh = torch.empty(p.shape)
                nn.init.trunc_normal_(fresh, std=0.02, a=-0.06, b=0.06, generator=generator)
                p.data.copy_(fresh * (embed_std / 0.02) if p is self.embed.weight else fresh)
        return self

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states (B, T, D), what the head is applied to. Raises ValueError above the context length."""
        if ids_BT.shape[1] > self.config.context:
            raise ValueError(f"{ids_BT.shape[1]} tokens in a row, the model's context is {self.config.context}")
        c = self.config
        x = F.embedding(ids_BT, self.embed.weight).to(self.compute)
        cos, sin = rope_table(torch.arange(ids_BT.shape[1], device=ids_BT.device), c.width // c.heads, c.theta)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, ids_BT: Tensor, weight=None, mask=None, temperature: float = 1.0, z_loss: float = 0.0):
        """Log-probs of ids[:, 1:] given what precedes them: the one way into the head for all trainers.

        ids (B, T+1); mask (B, T) bool, which targets count (None: all); weight (B, T).
        With weight:    -> loss, logp, entropy (B, T).  loss = sum of weight * -logp + z_loss * sum of lse^2 over the mask;
                           logp and entropy are detached
        Without weight: -> logp, entropy (B, T), both differentiable (clipped updates, KL, evaluation).
        Positions outside the mask come back as exactly 0 and cost no head products.
        """
        hidden = self.hidden(ids_BT[:, :-1])
        B, T, D = hidden.shape
        hidden, target = hidden.reshape(B * T, D), ids_BT[:, 1:].reshape(B * T)
        rows = None if mask is None else mask.reshape(B * T).nonzero().squeeze(1)
        if rows is not None:
            hidden, target = hidden[rows], target[rows]

        def spread(values: Tensor) -> Tensor:  # (N,) of the rows that count -> (B, T), zero elsewhere
            if rows is None:
                return values.view(B, T)
            return torch.zeros(B * T, dtype=values.dtype, device=values.device).index_put((rows,), values).view(B, T)

        if weight is None:
            return tuple(map(spread, log_probs(hidden, self.head.weight, target, self.config.vocab, temperature)))
        weight = weight.reshape(B * T) if rows is None else weight.reshape(B * T)[rows]
        loss, *told = weighted_nll(hidden, self.head.weight, target, weight, self.config.vocab, temperature, z_loss)
        return loss, *map(spread, told)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token: 6 a weight outside the embedding, 12*layers*D*T for attention with the causal
        half counted in full, as most reports do (PaLM, appendix B): 9.287 GFLOP at 1B and 4096. Forward: a third."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - c.padded_vocab * c.width
        return 6.0 * weights + 12.0 * c.layers * c.width * length


# ------------------------------------------------------------------------------------------- log-probs, never N x V
# loss = sum_i w_i * -log pi(y_i | ...): pre-training has w = 1/n, SFT mask/n, on-policy GRPO advantage/n (its gradient
# at ratio 1). Two uses, with the same arguments:
#  (a) `weighted_nll`: the weights are known before the loss, so the gradient of a chunk of logits can be taken as soon as
#      the chunk exists and the chunk be thrown away: 6NDV FLOPs, the same as keeping all logits.
#  (b) `log_probs`: log-prob and entropy, 2NDV; its backward pass recomputes the logits, 6NDV more. Old and new log-probs
#      of a clipped update both come from here, from one forward function with or without gradient, so their ratio is
#      exactly 1 before the update. On-policy (a) takes the ratio as 1 and never divides, so the two need not agree in the
#      last bits: in bf16 they do not, (a) rounds the logits to bf16 as PyTorch would, (b) keeps them in fp32.
# Each is a loop in PyTorch, the reference and the CPU path, that hands its inner step to a Triton kernel on CUDA.

CHUNK, ROWS = 1 << 19, 64  # logits held at once on a CPU: 2 MB in fp32 stays near the cache (8 MB: +30% time), at least 64
# rows, to keep the products with the head at speed
CHUNK_CUDA, ROWS_CUDA = 1 << 27, 2048  # on an H200: with 2048 rows reading and adding to dW (0.35 ms at 1B) is little beside
# a product (1.2 ms), and the logits are 0.41 GB; more of them for small vocabularies, whose launches would be short


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve x: on CUDA, unless in fp64."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def _chunks(count: int, head: Tensor, fast: bool):
    """Rows a chunk, and the chunks as (first, end)."""
    rows = max(ROWS_CUDA, CHUNK_CUDA // len(head)) if fast else max(ROWS, CHUNK // len(head))
    return min(rows, count), [(i, min(i + rows, count)) for i in range(0, count, rows)]


def _operands(hidden: Tensor, head: Tensor, vocab: int):
    """-> whether Triton does it, head in the compute dtype, dtype of sums. The padding is cut off; Triton keeps it, the
    matrix units want round sizes, and reads none of its logits."""
    fast = use_triton(hidden)
    return fast, (head if fast else head[:vocab]).to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)


def _softmax(logits: Tensor, target: Tensor, temperature: float):
    """logits (C, V), divided by the temperature in place -> probabilities (C, V); log-prob and entropy (C,); log-sum-exp
    (2, C) as maximum and the rest: one number near 20 would lose the digits that make the probabilities sum to 1."""
    if temperature != 1.0:
        logits.div_(temperature)
    p, top = logits.softmax(1), logits.amax(1)
    rest = -p.amax(1).log()  # the largest p is exp(-rest): as exact as logsumexp, in fewer passes
    logp = logits.gather(1, target[:, None]).squeeze(1) - top - rest
    entropy = rest - logits.sub_(top[:, None]).mul_(p).sum(1)  # H = lse - E[logit]
    return p, logp, entropy, torch.stack([top, rest])


def _add_products(grad: Tensor, real: Tensor, hidden: Tensor, d_hidden: Tensor, d_head: Tensor):
    """d_hidden = grad @ head and d_head += grad.T @ hidden for one chunk's gradient (C, V), all sums in fp32."""
    if grad.dtype == d_head.dtype:
        torch.mm(grad, real, out=d_hidden)
        d_head[: len(real)].addmm_(grad.T, hidden)
    elif grad.is_cuda:  # fp32 results (torch 2.10 or later): a product split over V = 100k would add its parts in bf16
        d_hidden.copy_(torch.mm(grad, real, out_dtype=d_head.dtype))
        torch.addmm(d_head, grad.T, hidden, out_dtype=d_head.dtype, out=d_head)
    else:
        torch.mm(grad, real, out=d_hidden)
        d_head[: len(real)].addmm_(grad.T.to(d_head.dtype), hidden.to(d_head.dtype))


def _nll(hidden, head, target, weight, vocab, temperature, z_loss):
    """(a): log-prob, entropy (N,) and log-sum-exp (2, N) of every row; gradients of the loss in hidden and head."""
    fast, real, wide = _operands(hidden, head, vocab)
    out = torch.empty(4, len(hidden), dtype=wide, device=hidden.device)
    logp, entropy, lse = out[0], out[1], out[2:]
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
    rows, chunks = _chunks(len(hidden), real, fast)
    buffer = torch.empty(rows, len(real), dtype=hidden.dtype, device=hidden.device)  # one for all chunks
    for i, j in chunks:
        logits = torch.mm(hidden[i:j], real.T, out=buffer[: j - i])
        if fast:
            grad = _launch_rows(logits, target[i:j], weight[i:j], out[:, i:j], vocab, temperature, z_loss)
        else:
            p, logp[i:j], entropy[i:j], lse[:, i:j] = _softmax(logits.to(wide), target[i:j], temperature)
            grad = p.mul_(((weight[i:j] + 2 * z_loss * lse[:, i:j].sum(0)) / temperature)[:, None])  # d loss / d logits
            grad = grad.scatter_add_(1, target[i:j, None], (-weight[i:j] / temperature)[:, None]).to(hidden.dtype)
        _add_products(grad, real, hidden[i:j], d_hidden[i:j], d_head)
    return logp, entropy, lse, d_hidden, d_head.to(head.dtype)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, target, weight, *settings):
        logp, entropy, lse, *ctx.gradients = _nll(hidden, head, target, weight, *settings)
        ctx.save_for_backward(hidden, head, target, weight)
        ctx.settings = settings
        ctx.mark_non_differentiable(logp, entropy)
        return _total(weight, logp, lse, settings[-1]), logp, entropy

    @staticmethod
    def backward(ctx, d_loss, *_):
        # Handed over, not copied: the head's is 0.8 GB at 1B. Who goes backward a second time has them made again.
        gradients, ctx.gradients = ctx.gradients or _nll(*ctx.saved_tensors, *ctx.settings)[3:], None
        return *(g.mul_(d_loss) for g in gradients), None, None, None, None, None


def _total(weight, logp, lse, z_loss):
    return (z_loss * lse.sum(0).square() - weight * logp).sum()


def weighted_nll(hidden, head, target, weight, vocab: int, temperature: float = 1.0, z_loss: float = 0.0):
    """sum_i weight_i * -log softmax(head[:vocab] @ hidden_i / temperature)[target_i]  +  z_loss * sum_i lse_i^2.

    hidden (N, D) compute dtype, head (V, D) master weights, target (N,) ids below vocab, weight (N,) any sign.
    z_loss keeps the log-normaliser lse near 0 (PaLM, section 5); give it as coefficient / count of targets: it does not go
    with the weights, a negative one would reverse it. Returns the loss (scalar, differentiable in hidden and head),
    logp (N,) and entropy (N,) in nats, both detached. Gradients are made in the forward pass, chunk by chunk, the head's
    in the head's own dtype."""
    hidden, target = hidden.contiguous(), target.contiguous()
    weight = weight.to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _WeightedNLL.apply(hidden, head, target, weight, vocab, temperature, z_loss)
    logp, entropy, lse = _measure(hidden, head, target, vocab, temperature)
    return _total(weight, logp, lse, z_loss), logp, entropy


def _measure(hidden, head, target, vocab, temperature):
    """(b): log-prob, entropy (N,) and log-sum-exp (2, N) of every row."""
    fast, real, wide = _operands(hidden, head, vocab)
    if fast:
        return _launch_log_probs(hidden, real, target, vocab, temperature)
    out = torch.empty(4, len(hidden), dtype=wide, device=hidden.device)
    for i, j in _chunks(len(hidden), real, fast)[1]:
        logits = (hidden[i:j] @ real.T).to(wide)
        _, out[0, i:j], out[1, i:j], out[2:, i:j] = _softmax(logits, target[i:j], temperature)
    return out[0], out[1], out[2:]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, target, vocab, temperature):
        logp, entropy, lse = _measure(hidden, head, target, vocab, temperature)
        ctx.save_for_backward(hidden, head, target, lse, entropy)
        ctx.vocab, ctx.temperature = vocab, temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        hidden, head, target, lse, entropy = ctx.saved_tensors
        fast, real, wide = _operands(hidden, head, ctx.vocab)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
        rows, chunks = _chunks(len(hidden), real, fast)
        buffer = torch.empty(rows, len(real), dtype=hidden.dtype, device=hidden.device)
        for i, j in chunks:
            if fast:
                row = target[i:j], lse[:, i:j], entropy[i:j], d_logp[i:j], d_entropy[i:j]
                grad = _launch_gradient(hidden[i:j], real, *row, buffer[: j - i], ctx.vocab, ctx.temperature)
            else:
                logits = torch.mm(hidden[i:j], real.T, out=buffer[: j - i]).to(wide)  # recomputed, never stored
                log_p = logits.div_(ctx.temperature).sub_(lse[0, i:j, None]).sub_(lse[1, i:j, None])
                # d logp / d logit_v = [v = y] - p_v          d H / d logit_v = -p_v (log p_v + H)
                down = (entropy[i:j] * d_entropy[i:j] + d_logp[i:j])[:, None]
                grad = log_p.exp().mul_(log_p.mul_(d_entropy[i:j, None]).add_(down)).neg_()
                grad = grad.scatter_add_(1, target[i:j, None], d_logp[i:j, None]).div_(ctx.temperature).to(hidden.dtype)
            _add_products(grad, real, hidden[i:j], d_hidden[i:j], d_head)
        return d_hidden, d_head.to(head.dtype), None, None, None


def log_probs(hidden, head, target, vocab: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy (nats) of each distribution, both (N,) and differentiable; the arguments of
    `weighted_nll`. The backward pass recomputes the logits from the saved log-sum-exp: 2NDV forward, 6NDV backward."""
    return _LogProbs.apply(hidden.contiguous(), head, target.contiguous(), vocab, temperature)


# -------------------------------------------------------------------------------------- the same on CUDA, in Triton
#
#   (b) forward: a program owns BLOCK_N rows and a segment of       (a): cuBLAS fills a chunk of 2048 rows,
#   the vocabulary, and walks over the segment tile by tile:        a program owns a row of it and walks over it twice:
#
#               V -->  segment 0     segment 1    padding                    V -->                      padding
#             +------+------+------+------+------+- - -+                   +------+------+------+------+- - -+
#      rows   | tile > tile > tile|| tile > tile | -inf|             row   | 1st: max, sum, target's logit   |  read
#             +------+------+------+------+------+- - -+                   | 2nd: the gradient, in its place | 0 |
#             m, s, e, y: registers || m, s, e, y                          +------+------+------+------+- - -+
#
#   A tile is BLOCK_N x BLOCK_V logits, summed over D in fp32 by tl.dot and gone after its update of m = maximum,
#   s = sum of exp(x - m), e = sum of exp(x - m)(x - m), y = target's logit. The parts of a row are joined at the end.
#   (b) backward makes the same tiles, with the same bits, and stores the gradient that follows from the saved lse = m + log s.
#
# Counted at N = 32768, D = 2048, V = 100352, bf16 (13.5 TFLOP a product; H200: 0.99 PFLOP/s and 4.8 TB/s on paper):
#   (a) forward and backward  6NDV = 40.4 TFLOP. Bytes: logits written, read twice (the second time from L2 if all goes well),
#       overwritten, read twice by products: 6 * 6.6 GB; dW read and added to 16 times: 26 GB. Scratch: 0.41 GB of logits,
#       0.41 GB of head in bf16.      (b) forward  2NDV = 13.5 TFLOP, no logits in memory, 32 bytes a row and segment.
#       (b) backward  6NDV, and (a)'s bytes less the first write and two reads.
# What bf16 tests do not show and an interpreter cannot, so it is ruled out by construction: fp32 products are in ieee
# precision (the default is tf32); row offsets are 64 bits (N * V is 3.3e9); no two programs write one element, there are
# no atomics, and no thread of (a) reads in its second walk what another has written: element for element, load then store,
# and the walks are kept apart by the reductions of the first. A sum's order depends on the shapes alone: same bits twice.
#
# Sources: (b) is the idea of Apple's cut cross-entropy (Wijmans et al., arXiv 2411.09009), (a) Liger-Kernel's fused linear
# cross-entropy (github.com/linkedin/Liger-Kernel), its row pass also in quack (github.com/Dao-AILab/quack). Different here:
#   from cut cross-entropy: no atomics and locks, so deterministic; no gradient is filtered out as too small; the entropy
#     comes along; where weights are known (a) is used, 6NDV instead of the 8NDV of a recomputing backward pass;
#   from Liger: chunks are not made smaller as V/D grows, dW is summed in fp32 without being asked, entropy, padding;
#   from quack: plain Triton for any shape, the row is read twice instead of being held by a cluster of SMs.

TILES = {2: (128, 256, 64, 8, 3), 4: (64, 64, 32, 4, 2)}  # bytes of a dtype: BLOCK_N, BLOCK_V, BLOCK_D, warps, stages
# 2 bytes: the largest tile whose sums fit the registers (128 of 255 a thread), 3 stages of 48 KB fit A100 and H200
ROW_BLOCK = 8192  # columns of a step of (a): 32 a thread of 8 warps; from 2048 on no element is held by two threads
SEGMENTS, GROUP = 8, 16  # of (b): 8 * 16 programs are one wave on 132 SMs; together they read 8 MB of rows over and over and
# stream the head once a wave, which L2 (50 MB) bears. Constants, so that a row's sums do not depend on N.

if triton is not None:

    @triton.jit
    def _online(m, s, e, y, x, hit):
        """Take further logits x (rows, columns) into m, s, e, y (rows,); hit marks the target's column."""
        top = tl.maximum(m, tl.max(x, 1))
        shifted = x - top[:, None]
        p = tl.exp(shifted)
        old = tl.exp(m - top)
        e = old * (e + s * (m - top)) + tl.sum(p * tl.maximum(shifted, -1e30), 1)  # 0 * -inf would be nan
        return top, old * s + tl.sum(p, 1), e, tl.maximum(y, tl.max(tl.where(hit, x, -float("inf")), 1))

    @triton.jit
    def _start(rows):
        """m, s, e, y before any logit. m is finite: -inf minus -inf would be nan in a segment without columns."""
        zero = tl.zeros(rows.shape, tl.float32)
        return zero - 1e30, zero, zero, zero - float("inf")

    @triton.jit
    def _logits(hidden, head, rows, columns, D, inverse, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
        """(rows, columns) of hidden @ head.T / temperature in fp32; all indices int64 and inside."""
        x = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for k in range(0, D, BLOCK_D):
            d = k + tl.arange(0, BLOCK_D)
            inside = (d < D) | EVEN
            a = tl.load(hidden + rows[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(head + columns[None, :] * D + d[:, None], mask=inside[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
        return x * inverse

    @triton.jit
    def _row_kernel(logits, target, weight, out, step, vocab, padded, inverse, z_loss, BLOCK: tl.constexpr):
        """(a): logits (C, padded) -> gradient of the loss, in place; out (4, C), rows `step` apart: log-prob, entropy, lse."""
        rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        logits += rows[:, None] * padded
        t, w = tl.load(target + rows), tl.load(weight + rows)
        m, s, e, y = _start(rows)
        for first in range(0, vocab, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            x = tl.load(logits + column, mask=column < padded, other=0.0).to(tl.float32) * inverse  # 16 bytes a load, as
            x = tl.where(column < vocab, x, -float("inf"))  # padded is round; a mask by vocab would make it 2
            m, s, e, y = _online(m, s, e, y, x, column == t[:, None])
        rest = tl.log(s)
        tl.store(out + rows, y - m - rest)
        tl.store(out + step + rows, rest - e / s)
        tl.store(out + 2 * step + rows, m)
        tl.store(out + 3 * step + rows, rest)
        scale = (w + 2 * z_loss * (m + rest)) / s
        for first in range(0, padded, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            x = tl.load(logits + column, mask=column < padded, other=0.0).to(tl.float32) * inverse
            x = tl.where(column < vocab, x, -float("inf"))
            g = tl.exp(x - m[:, None]) * scale[:, None]
            g = tl.where(column == t[:, None], g - w[:, None], g) * inverse
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < padded)

    @triton.jit
    def _log_prob_kernel(
        hidden, head, target, parts, N, D, vocab, inverse,
        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """(b) forward: m, s, e, y of BLOCK_N rows over one segment into parts (4, segments, N)."""
        rows = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(rows, N - 1)  # rows past the end repeat the last one and are not stored
        t = tl.load(target + row)
        segment, segments, tiles = tl.program_id(1), tl.num_programs(1), tl.cdiv(vocab, BLOCK_V)
        m, s, e, y = _start(row)
        for tile in range(segment * tiles // segments, (segment + 1) * tiles // segments):
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
            x = _logits(hidden, head, row, tl.minimum(column, vocab - 1), D, inverse, BLOCK_D, EVEN)
            x = tl.where((column < vocab)[None, :], x, -float("inf"))
            m, s, e, y = _online(m, s, e, y, x, column[None, :] == t[:, None])
        out, step = parts + segment.to(tl.int64) * N + rows, segments.to(tl.int64) * N
        tl.store(out, m, mask=rows < N)
        tl.store(out + step, s, mask=rows < N)
        tl.store(out + 2 * step, e, mask=rows < N)
        tl.store(out + 3 * step, y, mask=rows < N)

    @triton.jit
    def _gradient_kernel(
        hidden, head, target, lse, entropy, d_logp, d_entropy, grad, step, N, D, vocab, padded, inverse,
        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """(b) backward: one tile of the gradient in the logits, into grad (N, padded)."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.minimum(rows, N - 1)
        x = _logits(hidden, head, row, tl.minimum(column, vocab - 1), D, inverse, BLOCK_D, EVEN)
        log_p = x - tl.load(lse + row)[:, None] - tl.load(lse + step + row)[:, None]
        t, a, b, H = tl.load(target + row), tl.load(d_logp + row), tl.load(d_entropy + row), tl.load(entropy + row)
        g = -tl.exp(log_p) * (a[:, None] + b[:, None] * (log_p + H[:, None]))
        g = tl.where(column[None, :] == t[:, None], g + a[:, None], g) * inverse
        g = tl.where((column < vocab)[None, :], g, 0.0).to(grad.dtype.element_ty)
        tl.store(grad + rows[:, None] * padded + column[None, :], g, mask=(rows < N)[:, None] & (column < padded)[None, :])


def _tiles(hidden):
    n, v, d, warps, stages = TILES[hidden.element_size()]
    return n, v, dict(BLOCK_N=n, BLOCK_V=v, BLOCK_D=d, EVEN=hidden.shape[1] % d == 0, num_warps=warps, num_stages=stages)


def _launch_rows(logits, target, weight, out, vocab, temperature, z_loss):
    (rows, padded), step = logits.shape, out.stride(0)
    _row_kernel[(rows,)](logits, target, weight, out, step, vocab, padded, 1 / temperature, z_loss, BLOCK=ROW_BLOCK, num_warps=8)
    return logits


def _launch_log_probs(hidden, real, target, vocab, temperature):
    (N, D), (block, _, settings) = hidden.shape, _tiles(hidden)
    parts = torch.empty(4, SEGMENTS, N, device=hidden.device)
    blocks = triton.cdiv(N, block)
    if blocks:
        grid = min(GROUP, blocks), SEGMENTS, triton.cdiv(blocks, GROUP)
        _log_prob_kernel[grid](hidden, real, target, parts, N, D, vocab, 1 / temperature, **settings)
    m, s, e, y = parts
    top = m.amax(0)
    scale = (m - top).exp()
    total = (scale * s).sum(0)
    rest = total.log()
    return y.amax(0) - top - rest, rest - (scale * (e + s * (m - top))).sum(0) / total, torch.stack([top, rest])


def _launch_gradient(hidden, real, target, lse, entropy, d_logp, d_entropy, grad, vocab, temperature):
    (N, D), (n, v, settings) = hidden.shape, _tiles(hidden)
    grid, numbers = (triton.cdiv(N, n), triton.cdiv(len(real), v)), (lse.stride(0), N, D, vocab, len(real), 1 / temperature)
    rows = lse, entropy, d_logp.contiguous(), d_entropy.contiguous()  # a sum's gradient is one number with stride 0
    _gradient_kernel[grid](hidden, real, target, *rows, grad, *numbers, **settings)
    return grad


# ----------------------------------------------------------------------------------------------------------- sampler


class Samples(NamedTuple):
    """R = questions * n answers, question by question. `tokens` past a row's length are not part of the answer."""

    tokens: Tensor  # (R, max_new) int64, the sampled end token included
    lengths: Tensor  # (R,) int64, tokens sampled, the end token counted
    logp: Tensor  # (R, max_new) fp32, log-prob of each token under the distribution it was drawn from
    cut: Tensor  # (R,) bool, stopped by max_new and not by an end token
    waste: float  # idle slot-steps / all slot-steps


def uniform_noise(seeds: list[int], length: int) -> Tensor:
    """(R, length) fp64 in [0, 1): row r is a function of seeds[r] alone, so neither the batch a row is in nor the number
    of ranks changes what it draws. One number a token is enough: `Sampler` inverts the cumulative distribution."""
    noise, generator = torch.empty(len(seeds), length, dtype=torch.float64), torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        torch.rand(length, generator=generator.manual_seed(seed), dtype=torch.float64, out=row)
    return noise


class SharedKV(NamedTuple):
    """Keys and values that several rows read: the few-shot prefix (one group of all rows) or the prompts (a group a
    question). One product a group reads them once, where a cache a row would read them for every answer.

    Three questions with two answers each: group = [0 0 1 1 2 2], row_of_slot = [[0 1] [2 3] [4 5]]. Once the second
    answer of question 1 is finished: group = [0 0 1 2 2], row_of_slot = [[0 1] [2 0] [3 4]], slot_of_row = [0 1 2 4 5]."""

    cache: list[tuple[Tensor, Tensor]]  # a layer: keys and values (G, H, S, K)
    hole: Tensor  # (G, 1, 1, S), -inf where a prompt is shorter than the longest
    group: Tensor  # (R,) the group of each row, ascending
    row_of_slot: Tensor  # (G, m) a row for each slot of each group, m = rows of the largest; slots left over repeat row 0
    slot_of_row: Tensor  # (R,) the slot of each row, counted through

    def keep(self, rows: Tensor) -> "SharedKV":
        used, group = torch.unique_consecutive(self.group[rows], return_inverse=True)
        cache = self.cache if len(used) == len(self.hole) else [(k[used], v[used]) for k, v in self.cache]
        return share(cache, self.hole[used], group)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """q (R, H, K) -> (R, H, S)"""
        score = q[self.row_of_slot].transpose(1, 2) @ self.cache[layer][0].transpose(2, 3) + self.hole  # (G, H, m, S)
        return score.transpose(1, 2).reshape(-1, *q.shape[1:2], score.shape[3])[self.slot_of_row]

    def values(self, layer: int, p: Tensor) -> Tensor:
        """Probabilities p (R, H, S) -> weighted sum of the values (R, H, K)"""
        y = p[self.row_of_slot].transpose(1, 2) @ self.cache[layer][1]  # (G, H, m, K)
        return y.transpose(1, 2).reshape(-1, p.shape[1], y.shape[3])[self.slot_of_row]


def share(cache, hole: Tensor, group: Tensor) -> SharedKV:
    row, count = torch.arange(len(group), device=group.device), torch.bincount(group, minlength=len(hole))
    slot, most = row - (count.cumsum(0) - count)[group], int(count.max())
    row_of_slot = torch.zeros(len(hole), most, dtype=torch.long, device=group.device)
    row_of_slot[group, slot] = row
    return SharedKV(cache, hole, group, row_of_slot, group * most + slot)


class Sampler:
    """Draws answers with a key/value cache, in the compute dtype of the model.

    A prompt is run once for its n answers, a few-shot prefix once for all prompts, and their keys stay shared while the
    answers grow (`SharedKV`). Every row writes the same column of its own cache and reads a plain slice; positions count
    real tokens. Rows that finished are dropped when a quarter of the batch has.
    Call `refresh()` after the weights of the model have changed.
    """

    CHECK = 4  # look for finished rows every so many tokens: each look makes a GPU wait for the host

    def __init__(self, model: Model, rows: int = 512):
        self.model, self.rows = model, rows  # rows: answers sampled side by side
        self.progress = iter  # wraps the list of batches, tqdm for instance
        self.refresh()

    def refresh(self):
        """Take over the model's weights, cast to the compute dtype. Aliases where there is nothing to cast."""
        m, cast = self.model, self.model.compute
        wide = torch.promote_types(cast, torch.float32)  # norms multiply in fp32
        self.layers = [
            (
                *(w.weight.detach().to(cast) for w in (b.qkv, b.out, b.gate_up, b.down)),
                torch.stack([b.q_norm.weight, b.k_norm.weight]).detach().to(wide),  # (2, D)
                *(n.weight.detach().to(wide) for n in (b.attention_norm, b.mlp_norm)),
            )
            for b in m.blocks
        ]
        self.embed, self.head = m.embed.weight.detach(), m.head.weight.detach()[: m.config.vocab].to(cast)
        self.prefix_ids, self.prefix = None, None

    @torch.inference_mode()
    def __call__(self, prompts, n: int, max_new: int, seeds, ends, temperature=1.0, prefix=()) -> Samples:
        """prompts: Q lists of ids; n answers each, of at most max_new tokens, until one of the ids `ends` is drawn.
        seeds: Q*n ints, one an answer. temperature 0 takes the most probable token. prefix: ids before every prompt."""
        c, device = self.model.config, self.embed.device
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty: give at least one token")
        longest = len(prefix) + max(map(len, prompts)) + max_new
        if longest > c.context:
            raise ValueError(
                f"{len(prefix)} (shots) + {max(map(len, prompts))} (prompt) + {max_new} (answer) tokens "
                f"are more than the model's context of {c.context}: lower --max_new or --shots"
            )
        total = len(prompts) * n
        tokens = torch.full((total, max_new), ends[0])
        logp, lengths = torch.zeros(total, max_new), torch.zeros(total, dtype=torch.long)
        cut = torch.zeros(total, dtype=torch.bool)
        noise = uniform_noise(seeds, max_new)
        order = sorted(range(len(prompts)), key=lambda q: -len(prompts[q]))  # alike lengths share a batch
        step, used, spent = max(1, self.rows // n), 0, 0
        for questions in self.progress([order[i : i + step] for i in range(0, len(order), step)]):
            rows = torch.tensor([q * n + a for q in questions for a in range(n)])
            out = self._batch([prompts[q] for q in questions], n, noise[rows].to(device), ends, temperature, prefix)
            tokens[rows], logp[rows], lengths[rows], cut[rows] = (x.cpu() for x in out[:4])
            used, spent = used + int(out[2].sum()), spent + out[4]
        return Samples(tokens, lengths, logp, cut, 1 - used / max(1, spent))

    def _prefill(self, ids_BT: Tensor, past=None):
        """Run whole prompts: final hidden states (B, T, D) and, a layer, the keys and values (B, H, T, K)."""
        m, c = self.model, self.model.config
        B, T = ids_BT.shape
        S = past[0][0].shape[2] if past else 0
        x = F.embedding(ids_BT, self.embed).to(m.compute)
        cos, sin = rope_table(torch.arange(S, S + T, device=ids_BT.device), c.width // c.heads, c.theta)
        seen = torch.ones(T, S + T, dtype=torch.bool, device=ids_BT.device).tril(S) if past else None
        cache = []
        for layer, block in enumerate(m.blocks):
            q, k, v = block.project(x, cos, sin)
            cache.append((k, v))
            if past:
                k, v = (torch.cat([p.expand(B, -1, -1, -1), y], dim=2) for p, y in zip(past[layer], (k, v), strict=True))
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not past))
        return m.norm(x), cache

    def _batch(self, prompts, n, noise, ends, temperature, prefix):
        c, device, m = self.model.config, self.embed.device, self.model
        Q, R, max_new, P = len(prompts), len(prompts) * n, noise.shape[1], max(map(len, prompts))
        if prefix and self.prefix_ids != tuple(prefix):
            self.prefix_ids = tuple(prefix)
            self.prefix = self._prefill(torch.tensor([prefix], device=device))[1]
        past = self.prefix if prefix else None

        end, stop = ends[0], torch.tensor(ends, device=device)
        size = torch.tensor([len(p) for p in prompts], device=device)
        ids = torch.tensor([p + [end] * (P - len(p)) for p in prompts], device=device)  # causal: padding changes nothing
        x, prompt_cache = self._prefill(ids, past)
        x = x[torch.arange(Q, device=device), size - 1].repeat_interleave(n, 0)  # (R, D), state at the last prompt token
        group = torch.arange(Q, device=device).repeat_interleave(n)
        hole = torch.zeros(Q, 1, 1, P, dtype=m.compute, device=device)
        hole.masked_fill_(torch.arange(P, device=device) >= size[:, None, None, None], -math.inf)
        sources = [share(prompt_cache, hole, group)]
        if past:
            sources.append(share(past, torch.zeros(1, 1, 1, len(prefix), dtype=m.compute, device=device), group * 0))
        cache = torch.empty(c.layers, 2, R, c.heads, max_new, c.width // c.heads, dtype=m.compute, device=device)
        position = size[group, None] + len(prefix) + torch.arange(max_new, device=device)  # (R, max_new)
        cos, sin = rope_table(position, c.width // c.heads, c.theta)

        tokens = torch.full((R, max_new), end, device=device)
        logp = torch.zeros(R, max_new, device=device)
        lengths = torch.zeros(R, dtype=torch.long, device=device)
        row, alive = torch.arange(R, device=device), torch.ones(R, dtype=torch.bool, device=device)  # of the rows kept
        cut, spent = torch.zeros(R, dtype=torch.bool, device=device), 0
        for t in range(max_new):
            token, chosen = self._draw(x @ self.head.T, noise[:, t], temperature)
            tokens[row, t], logp[row, t] = token, chosen.to(logp.dtype)
            lengths[row] += alive
            spent += len(row)
            alive &= (token[:, None] != stop).all(1)
            if t + 1 == max_new:
                break
            if t % self.CHECK == self.CHECK - 1:
                live = int(alive.sum())
                if live == 0:
                    break
                if live <= 0.75 * len(row):
                    keep = alive.nonzero().squeeze(1)
                    cache, sources = cache[:, :, keep], [source.keep(keep) for source in sources]
                    row, alive, token, noise, cos, sin = (y[keep] for y in (row, alive, token, noise, cos, sin))
            x = self._step(token, cache, t + 1, cos[:, t], sin[:, t], sources)
        cut[row] = alive
        lengths_mask = torch.arange(max_new, device=device) < lengths[:, None]
        return tokens.where(lengths_mask, end), logp.where(lengths_mask, 0.0), lengths, cut, spent

    def _draw(self, logits, u, temperature):
        """One token a row by inverting the cumulative distribution at u (R,): exact, and one random number a token
        where gumbel noise takes V. fp64 sums: in fp32 the tail of a large vocabulary would drown. -> ids, log-probs."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature == 0:
            logp, token = logits.log_softmax(1).max(1)
            return token, logp
        logp = logits.div_(temperature).log_softmax(1)
        mass = logp.exp().cumsum(1, dtype=torch.float64)
        token = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
        return token.squeeze(1), logp.gather(1, token).squeeze(1)

    def _step(self, token, cache, T, cos, sin, sources):
        """One token (R,) for every row; cache (L, 2, R, H, max_new, K), of which T columns are filled, the last one here;
        sources: SharedKV, and values before them. -> final hidden states (R, D)."""
        c = self.model.config
        R, H, K = len(token), c.heads, c.width // c.heads
        cos, sin = cos[:, None, None], sin[:, None, None]  # (R, 1, 1, K/2)
        x = F.embedding(token, self.embed).to(self.model.compute)
        for layer, (qkv, out, gate_up, down, qk_norm, attention_norm, mlp_norm) in enumerate(self.layers):
            mixed = x @ qkv.T
            qk = rotate(rms_norm(mixed[:, : 2 * c.width].view(R, 2, c.width), qk_norm, c.eps).view(R, 2, H, K), cos, sin)
            cache[layer, 0, :, :, T - 1], cache[layer, 1, :, :, T - 1] = qk[:, 1], mixed[:, 2 * c.width :].view(R, H, K)
            key, value = cache[layer].view(2, R * H, -1, K)[:, :, :T].unbind()  # (R*H, T, K)
            q = qk[:, 0] * K**-0.5  # (R, H, K)
            own = torch.bmm(q.view(R * H, 1, K), key.transpose(1, 2)).view(R, H, T)
            score = torch.cat([own, *(source.scores(layer, q) for source in sources)], dim=2)
            p = score.softmax(2, dtype=torch.promote_types(score.dtype, torch.float32)).to(score.dtype)
            own, *others = p.split([T, *(source.hole.shape[3] for source in sources)], dim=2)
            y = torch.bmm(own.reshape(R * H, 1, T), value).view(R, H, K)
            for source, part in zip(sources, others, strict=True):
                y += source.values(layer, part)
            x = x + rms_norm(y.view(R, c.width) @ out.T, attention_norm, c.eps)
            gate, up = (x @ gate_up.T).chunk(2, dim=1)
            x = x + rms_norm((F.silu(gate) * up) @ down.T, mlp_norm, c.eps)
        return rms_norm(x, self.model.norm.weight, c.eps)


# --------------------------------------------------------------------------------------------------------- optimizer


def adam(model: Model, betas=(0.9, 0.95), eps: float = 1e-8) -> torch.optim.Adam:
    """Adam without its decay and with learning rate 0: `update` sets the rate and does the decay."""
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def update(model: Model, steps: list, weight_decay: float):
    """theta <- theta - sum_i lr_i * (weight_decay * theta + Adam_i(gradient_i)), all taken at one theta.

    steps: (optimizer, lr, gradients) each; gradients in the order of model.parameters(). One entry is AdamW
    (Loshchilov & Hutter 2019, algorithm 2). Two are parallel averaging: an AdamW update is linear in its learning
    rate, so share * Delta_RL + (1 - share) * Delta_SFT needs no copy of the weights, only lr_i = share_i * lr.
    Adam's part depends on gradients alone; the decay is done first and once, as both would do it at the same theta.
    The embedding is not decayed (OLMo2)."""
    decay = 1 - weight_decay * sum(lr for _, lr, _ in steps)
    for p in model.parameters():
        if weight_decay and p is not model.embed.weight:
            p.mul_(decay)
    for optimizer, lr, gradients in steps:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad(set_to_none=True)


def cosine(step: int, steps: int, peak: float, warmup: int = 0, floor: float = 0.1) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up, then a cosine to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
