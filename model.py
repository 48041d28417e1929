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
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

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
    "toy-large": dict(layers=4, width=192, heads=8, ffn=512, context=512),  # 3.7 times that, as 4b to 1b: data against size
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


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Causal attention (B, H, T, K). documents: None, a row is one; bool (B, 1, T, T), which keys each query sees; or `starts`
    of Model.hidden, for the flash kernel that takes such (CUDA, bf16)."""
    if documents is None or documents.dtype == torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents, is_causal=documents is None)
    flat, T = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v)), q.shape[2]  # (B*T, H, K)
    y = varlen.varlen_attn(*flat, documents, documents, T, T, window_size=(-1, 0))  # no document is longer than its row
    return y.unflatten(0, (-1, T)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.head_width, self.ffn = c.heads, c.width // c.heads, c.ffn
        self.qkv = Linear(c.width, 3 * c.width)
        self.q_norm, self.k_norm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        self.out = Linear(c.width, c.width)
        self.attention_norm = RMSNorm(c.width, c.eps)
        self.gate_up = Linear(c.width, 2 * c.ffn)
        self.down = Linear(c.ffn, c.width)
        self.mlp_norm = RMSNorm(c.width, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None) -> Tensor:
        return self.finish(x, attend(*self.project(x, cos, sin), documents))

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

    def decode(self, x, weights, keys, values, t, cos, sin, prompt, mask, group, prefix):
        """One new token a row, for the sampler, which brings its own copy of the weights. x (R, D); keys and values
        (R, H, T, K) of the rows' own tokens, columns before t (1,) are read; prompt (2, G, H, P, K) and mask (G, 1, P), -inf
        where a prompt is shorter, are read through group (R,); prefix (2, H, S, K), or None, is read by all.
        -> x after the block, and the token's key and value (R, H, K).

        Weighted sums are written as products and sums, not as matrix products: a row has one query, and a compiler makes
        loops of them that read each key once, where a BLAS would be called 2 * R * H times for next to nothing."""
        qkv, q_norm, k_norm, out, attention_norm, gate_up, down, mlp_norm = weights
        H, K, eps = self.heads, self.head_width, self.mlp_norm.eps
        x = x.view(-1, H * K)  # numbers that a compiler can rely on
        q, k, v = (x @ qkv.T).split(H * K, dim=1)
        q, k = (rotate(rms_norm(y, w, eps).view(-1, H, K), cos, sin) for y, w in ((q, q_norm), (k, k_norm)))
        v, q_wide = v.view(-1, H, K), q.to(torch.promote_types(q.dtype, torch.float32)) * K**-0.5
        now = (q_wide * k).sum(-1, keepdim=True)  # (R, H, 1)
        before = torch.arange(keys.shape[2], device=x.device) < t
        own = (q_wide[:, :, None] * keys).sum(-1).masked_fill(~before, -math.inf)  # (R, H, T)
        asked = (q_wide[:, :, None] * prompt[0][group]).sum(-1) + mask[group]  # (R, H, P)
        top = torch.maximum(torch.maximum(own.amax(-1, keepdim=True), now), asked.amax(-1, keepdim=True))
        if prefix is not None:  # one matrix product: every row reads the same keys
            shown = (q_wide.to(x.dtype).transpose(0, 1) @ prefix[0].transpose(1, 2)).transpose(0, 1).to(now.dtype)  # (R, H, S)
            top = torch.maximum(top, shown.amax(-1, keepdim=True))
        now, own, asked = (now - top).exp(), (own - top).exp(), (asked - top).exp()
        total = now + own.sum(-1, keepdim=True) + asked.sum(-1, keepdim=True)
        y = now * v + (own[..., None] * values).sum(2) + (asked[..., None] * prompt[1][group]).sum(2)  # (R, H, K)
        if prefix is not None:
            shown = (shown - top).exp()
            total = total + shown.sum(-1, keepdim=True)
            y = y + (shown.to(x.dtype).transpose(0, 1) @ prefix[1]).transpose(0, 1)
        x = x + rms_norm((y / total).to(x.dtype).reshape(-1, H * K) @ out.T, attention_norm, eps)
        gate, up = (x @ gate_up.T).split(self.ffn, dim=1)
        return x + rms_norm((F.silu(gate) * up) @ down.T, mlp_norm, eps), k, v


class Model(nn.Module):
    """OLMo2. Weights are kept in fp32 (or fp64); `compute` is the dtype of activations and matrix products."""

    checkpoint_activations = False  # keep only the blocks' inputs and run each again in the backward pass

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute = config, compute
        self.embed = nn.Embedding(config.padded_vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.padded_vocab)

    @torch.no_grad()
    def init_weights(self, seed: int, embed_std: float = 0.02, put=Tensor.copy_) -> "Model":
        """Truncated normal, std 0.02, cut at 3 std (OLMo2); norms start at 1. embed_std: the embedding's own std.
        put(parameter, whole tensor): where each rank has a part of a parameter, something else than a copy."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same weights
        for p in self.parameters():
            fresh = torch.ones(p.shape)
            if p.dim() > 1:
                nn.init.trunc_normal_(fresh, std=0.02, a=-0.06, b=0.06, generator=generator)
            put(p, fresh * (embed_std / 0.02) if p is self.embed.weight else fresh)
        return self

    @torch.profiler.record_function("forward")  # a name in the traces of --profile, as others below and in the scripts
    def hidden(self, ids_BT: Tensor, starts: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D), what the head is applied to. Raises ValueError above the context length.
        starts: int32 (documents + 1,), where documents start in the B*T tokens, each row with one, and B*T: attention does not
        leave them, and positions count from their start. None: a row is one document."""
        B, T = ids_BT.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens in a row, the model's context is {self.config.context}")
        c, again = self.config, self.checkpoint_activations
        x = F.embedding(ids_BT, self.embed.weight).to(self.compute)
        position, documents = torch.arange(T, device=x.device), None
        if starts is not None:
            first = starts.new_zeros(B * T).scatter(0, starts[:-1].long(), starts[:-1]).cummax(0).values  # of each token's document
            position, first = (torch.arange(B * T, device=x.device) - first).view(B, 1, T), first.view(B, 1, T)
            documents = starts if x.is_cuda and x.dtype == torch.bfloat16 else (first[..., None] == first[:, :, None]).tril()
            torch._dynamo.maybe_mark_dynamic(starts, 0)  # or another number of documents would be compiled anew
        cos, sin = rope_table(position, c.width // c.heads, c.theta)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, documents, use_reentrant=False) if again else block(x, cos, sin, documents)
        return self.norm(x)

    def forward(self, ids_BT: Tensor, weight=None, mask=None, temperature: float = 1.0, z_loss: float = 0.0, starts=None):
        """Log-probs of ids[:, 1:] given what precedes them: the one way into the head for all trainers.

        ids (B, T+1); mask (B, T) bool, which targets count (None: all); weight (B, T); starts: as in `hidden`.
        With weight:    -> loss, logp, entropy (B, T).  loss = sum of weight * -logp + z_loss * sum of lse^2 over the mask;
                           logp and entropy are detached
        Without weight: -> logp, entropy (B, T), both differentiable (clipped updates, KL, evaluation).
        Positions outside the mask come back as exactly 0 and cost no head products.
        """
        hidden = self.hidden(ids_BT[:, :-1], starts)
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


@torch.profiler.record_function("loss head")
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


@torch.profiler.record_function("loss head")
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
    truncated: Tensor  # (R,) bool, stopped by max_new and not by an end token
    waste: float  # idle slot-steps / all slot-steps
    logp_1: Tensor  # (R, max_new) fp32, log-prob of each token at temperature 1: what the model itself gives it


def uniform_noise(seeds: list[int], length: int) -> Tensor:
    """(R, length) fp64 in [0, 1): row r is a function of seeds[r] alone, so neither the batch a row is in nor the number
    of ranks changes what it draws. One number a token is enough: `Sampler` inverts the cumulative distribution."""
    noise, generator = torch.empty(len(seeds), length, dtype=torch.float64), torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        torch.rand(length, generator=generator.manual_seed(seed), dtype=torch.float64, out=row)
    return noise


def bucket(count: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `count` rows: few batch shapes, hence few graphs."""
    size = 16
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def free_bytes(device: torch.device) -> float:
    """Memory that a batch may take; no limit where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return math.inf


class Sampler:
    """Draws answers with a key/value cache, in the compute dtype of the model.

        prefix  S columns, once        prompts  P columns a question       own  a row an answer, T columns so far
        +------------------+           +----------+                        +--+--+--+- - - - - -+
        |                  | <- all    | q0       | <- its n answers       |k0|k1|k2|           |  all rows write column t
        +------------------+           | q1   ----|    (- mask)            +--+--+--+- - - - - -+  and read columns 0..t

    A prompt is run once for its n answers, a few-shot prefix once for all prompts, and their keys are read where they are.
    Answers begin together, so all rows are equally long and columns past t are not read, but for what rounds T up to SPAN.
    Rows that finished are dropped as soon as the others fit the next smaller `bucket`.
    Buffers stay from one batch to the next; on CUDA the work of one token is a captured graph for each shape.
    compile: torch.compile the block: seconds at the start, more of them the first time on a machine.
    Call `refresh()` after the weights of the model have changed.
    """

    CHECK = 4  # look for finished rows every so many tokens: each look makes a GPU wait for the host
    SPAN = {"cpu": 8, "cuda": 64}  # T and P are multiples: few shapes to compile or capture

    def __init__(self, model: Model, rows: int = 512, compile: bool = False):
        self.rows = rows  # answers sampled side by side
        self.progress = iter  # wraps the list of batches, tqdm for instance
        self.copies, self.graphs, self.buffers, self.sizes, self.prefix_ids = [], {}, None, (0, 0, 0, 0), None
        with torch.device("meta"):  # the same network, over weights that are whole and in the compute dtype
            self.model = Model(model.config, model.compute).requires_grad_(False)
        self.model.load_state_dict({name: self._own(name, w.detach()) for name, w in model.named_parameters()}, assign=True)
        self.layers = [tuple(w.detach() for w in block.parameters()) for block in self.model.blocks]
        self.embed, self.head = self.model.embed.weight, self.model.head.weight[: model.config.vocab]
        self.capture = self.embed.is_cuda
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None
        self.block = self.model.blocks[0].decode  # the weights are arguments: one code for all blocks
        if compile:
            self.block = torch.compile(self.block, dynamic=True)
        self.refresh()

    def _own(self, name: str, weight: Tensor) -> Tensor:
        """Room for the weight, whole and in the compute dtype; itself where it is that, or is cast when used."""
        sharded, norm = hasattr(weight, "full_tensor"), weight.dim() == 1
        dtype = weight.dtype if norm and not (sharded and "blocks" in name) else self.model.compute  # as the trainer has them
        if not sharded and (dtype == weight.dtype or name == "embed.weight"):
            return weight
        self.copies.append((torch.empty(weight.shape, dtype=dtype, device=weight.device), weight))
        return self.copies[-1][0]

    @torch.no_grad()
    def refresh(self):
        """Take over the model's weights, in place: graphs go on reading the same addresses. All ranks together."""
        for copy, weight in self.copies:
            copy.copy_(weight.to(copy.dtype).full_tensor() if hasattr(weight, "full_tensor") else weight)  # cast first: less to send
        self.prefix_ids = None

    @torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that happen to be equal once are not taken to be always
    @torch.inference_mode()
    def __call__(self, prompts, n: int, max_new: int, seeds, ends, temperature=1.0, prefix=(), progress=iter) -> Samples:
        """prompts: Q lists of ids; n answers each, of at most max_new tokens, until one of the ids `ends` is drawn.
        seeds: Q*n ints, one an answer. temperature 0 takes the most probable token. prefix: ids before every prompt."""
        c, device = self.model.config, self.embed.device
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty: give at least one token")
        widest = max(map(len, prompts))
        if len(prefix) + widest + max_new > c.context:
            raise ValueError(
                f"{len(prefix)} (shots) + {widest} (prompt) + {max_new} (answer) tokens "
                f"are more than the model's context of {c.context}: lower --max_new or --shots"
            )
        if prefix and self.prefix_ids != tuple(prefix):
            self.prefix_ids, self.graphs = tuple(prefix), {}
            self.prefix = [torch.cat(kv) for kv in self.prefill(torch.tensor([prefix], device=device))[1]]  # (2, H, S, K)
        total = len(prompts) * n
        tokens = torch.full((total, max_new), ends[0])
        logp, lengths = torch.zeros(2, total, max_new), torch.zeros(total, dtype=torch.long)
        cut = torch.zeros(total, dtype=torch.bool)
        noise = uniform_noise(seeds, max_new)
        order = sorted(range(len(prompts)), key=lambda q: -len(prompts[q]))  # alike lengths share a batch
        count, used, spent = -(-len(prompts) // self._questions(len(prompts), n, widest, max_new)), 0, 0
        for questions in progress([order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]):
            rows = torch.tensor([q * n + a for q in questions for a in range(n)])
            *out, slots = self._batch([prompts[q] for q in questions], n, noise[rows], ends, temperature, bool(prefix))
            tokens[rows], logp[:, rows], lengths[rows], cut[rows] = (x.cpu() for x in out)
            used, spent = used + int(out[2].sum()), spent + slots
        return Samples(tokens, lengths, logp[0], cut, 1 - used / max(1, spent), logp[1])

    def _questions(self, count, n, prompt, max_new) -> int:
        """Questions a batch: as many of `count` as --rows allows and the memory has room for."""
        c, size = self.model.config, self.model.compute.itemsize
        column = 2 * c.layers * c.width * size  # bytes of the keys and values of one token
        row = column * max_new + 16 * c.vocab + 40 * max_new + 8 * (c.ffn + 4 * c.width)  # cache; logits and their sums; the rest
        question = n * row + prompt * (2 * column + 4 * size * (c.ffn + 4 * c.width))  # twice: as it comes and in its buffer
        wanted, fit = min(count, max(1, self.rows // n)), int(0.9 * (free_bytes(self.embed.device) + self._held()) / question)
        need = f"{n} answers of {max_new} tokens to a prompt of {prompt} need {question / 2**30:.3g} GiB"
        if fit < 1:
            raise ValueError(f"{need}, more than is free: lower --max_new or the number of answers a question")
        if fit < wanted:
            warnings.warn(f"{need}: sampling {fit * n} answers at a time, not {wanted * n}; a lower --max_new would fit more", stacklevel=3)
        return min(wanted, fit)

    def _held(self) -> int:
        return sum(y.nbytes for y in vars(self.buffers).values()) if self.buffers else 0

    def prefill(self, ids_BT: Tensor, past=None):
        """Run whole prompts: final hidden states (B, T, D) and, a layer, the keys and values (B, H, T, K). past: the same of
        what precedes them, (1 or B, H, S, K)."""
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

    def _reserve(self, *sizes):
        """Buffers for at least (rows, questions, columns of the prompts, columns of the answers)."""
        if all(have >= want for have, want in zip(self.sizes, sizes, strict=True)):
            return
        self.sizes = R, G, P, T = tuple(map(max, self.sizes, sizes))
        self.buffers, self.graphs = None, {}  # freed before new ones are made
        c, compute, device = self.model.config, self.model.compute, self.embed.device
        H, K, integer = c.heads, c.width // c.heads, dict(dtype=torch.long, device=device)
        self.buffers = SimpleNamespace(
            own=torch.zeros(c.layers, 2, R, H, T, K, dtype=compute, device=device),
            prompt=torch.zeros(c.layers, 2, G, H, P, K, dtype=compute, device=device),
            mask=torch.zeros(G, 1, P, device=device), group=torch.zeros(R, **integer), t=torch.zeros(1, **integer),
            noise=torch.zeros(R, T, dtype=torch.float64, device=device), cos=torch.zeros(R, T, K // 2, device=device),
            sin=torch.zeros(R, T, K // 2, device=device), row=torch.zeros(R, **integer), token=torch.zeros(R, **integer),
            alive=torch.zeros(R, dtype=torch.bool, device=device), tokens=torch.zeros(R, T, **integer),
            logp=torch.zeros(2, R, T, device=device), lengths=torch.zeros(R, **integer),
        )  # fmt: skip

    def _batch(self, prompts, n, noise, ends, temperature, shots: bool):
        c, device, span = self.model.config, self.embed.device, self.SPAN[self.embed.device.type]
        Q, R, max_new = len(prompts), len(prompts) * n, noise.shape[1]
        P = -(-max(map(len, prompts)) // span) * span
        self._reserve(R, Q, P + span, -(-max_new // span) * span + span)  # one span more: a slice never is the whole
        b, S = self.buffers, self.prefix[0].shape[2] if shots else 0
        size = torch.tensor([len(p) for p in prompts], device=device)
        ids = torch.tensor([p + p[:1] * (P - len(p)) for p in prompts], device=device)  # causal: what fills up changes nothing
        x, cache = self.prefill(ids, [y[:, None] for y in self.prefix] if shots else None)
        for layer, kv in enumerate(cache):
            b.prompt[layer, 0, :Q, :, :P], b.prompt[layer, 1, :Q, :, :P] = kv
        b.mask[:Q, 0, :P] = torch.where(torch.arange(P, device=device) < size[:, None], 0.0, -math.inf)
        b.group[:R] = torch.arange(Q, device=device).repeat_interleave(n)
        position = size[b.group[:R], None] + S + torch.arange(max_new, device=device)  # (R, max_new)
        b.cos[:R, :max_new], b.sin[:R, :max_new] = rope_table(position, c.width // c.heads, c.theta)
        b.noise[:R, :max_new], b.row[:R], b.alive[:R] = noise.to(device), torch.arange(R, device=device), True
        b.tokens[:R], b.logp[:, :R], b.lengths[:R], b.t[:] = ends[0], 0, 0, -1
        self._draw(x[torch.arange(Q, device=device), size - 1].repeat_interleave(n, 0), temperature, tuple(ends))
        slots = R
        for t in range(max_new - 1):  # answers have t + 1 tokens, the last of them not yet in the cache
            if t % self.CHECK == self.CHECK - 1:
                live = int(b.alive[:R].sum())
                if live == 0:
                    break
                if bucket(live) < R:  # the living come first, in their order; then as many of the others as fill the bucket
                    keep = b.alive[:R].to(torch.uint8).argsort(descending=True, stable=True)[: bucket(live)]
                    R = len(keep)
                    for y in (b.group, b.noise, b.cos, b.sin, b.row, b.token, b.alive):
                        y[:R] = y[keep]
                    for kv in b.own.flatten(0, 1):
                        kv[:R, :, :t] = kv[keep, :, :t]
            self._advance(R, -(-(t + 1) // span) * span, P, temperature, tuple(ends), S)
            slots += R
        cut = torch.zeros(len(noise), dtype=torch.bool, device=device)
        cut[b.row[:R]] = b.alive[:R]
        R = len(noise)
        said = torch.arange(max_new, device=device) < b.lengths[:R, None]
        tokens, logp = b.tokens[:R, :max_new].where(said, ends[0]), b.logp[:, :R, :max_new].where(said, 0.0)
        return tokens, logp, b.lengths[:R], cut, slots

    def _advance(self, *shape):
        """The work of one token. On CUDA: run as it is the first time, which compiles; captured the second; then replayed."""
        if not self.capture or shape not in self.graphs:
            self.graphs[shape] = None
            return self._token(*shape)
        if self.graphs[shape] is None:
            self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shape], pool=self.pool):
                self._token(*shape)
        self.graphs[shape].replay()

    def _token(self, R, T, P, temperature, ends, S):
        """The last token of rows :R through the network, and a draw of the next."""
        b = self.buffers
        b.t += 1
        cos, sin = (y[:R].index_select(1, b.t) for y in (b.cos, b.sin))  # (R, 1, K/2)
        x = F.embedding(b.token[:R], self.embed).to(self.model.compute)
        column = b.t if self.capture else slice(int(b.t), int(b.t) + 1)  # a graph must read it on the device
        for layer, weights in enumerate(self.layers):
            keys, values = b.own[layer, :, :R, :, :T]
            prompt, prefix = b.prompt[layer, :, :, :, :P], self.prefix[layer] if S else None
            x, k, v = self.block(x, weights, keys, values, b.t, cos, sin, prompt, b.mask[..., :P], b.group[:R], prefix)
            keys[:, :, column], values[:, :, column] = k[:, :, None], v[:, :, None]
        self._draw(rms_norm(x, self.model.norm.weight, self.model.config.eps), temperature, ends)

    def _draw(self, x, temperature, ends):
        """One token a row by inverting the cumulative distribution at its uniform number: exact, and one random number a
        token where gumbel noise takes V. fp64 sums: in fp32 the tail of a large vocabulary would drown."""
        b, R = self.buffers, len(x)
        logits = x @ self.head.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits -= logits.amax(1, keepdim=True)
        p = logits.exp()
        log_sum = p.sum(1, keepdim=True).log()
        if temperature == 0:
            token, scale, log_mass = logits.argmax(1, keepdim=True), 1.0, log_sum
        else:
            scale = 1 / temperature
            mass = (p if temperature == 1 else (logits * scale).exp()).cumsum(1, dtype=torch.float64)
            u = b.noise[:R].index_select(1, b.t + 1)
            token = torch.searchsorted(mass, u * mass[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)  # (R, 1)
            log_mass = mass[:, -1:].log()
        chosen, row, t = logits.gather(1, token), b.row[:R, None], b.t + 1
        b.tokens[row, t] = token
        b.logp[0][row, t], b.logp[1][row, t] = (chosen * scale - log_mass).to(b.logp.dtype), (chosen - log_sum).to(b.logp.dtype)
        b.lengths.index_add_(0, b.row[:R], b.alive[:R].long())
        b.token[:R] = token[:, 0]
        for end in ends:
            b.alive[:R] &= b.token[:R] != end


# --------------------------------------------------------------------------------------------------------- optimizer


def adam(model: Model, betas=(0.9, 0.95), eps: float = 1e-8) -> torch.optim.Adam:
    """Adam without its decay and with learning rate 0: `update` sets the rate and does the decay."""
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=betas, eps=eps, fused=True)


@torch.profiler.record_function("optimizer")
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
