"""OLMo2 in one file: the network, the optimizer, the KV-cache sampler, the loss head with its
Triton kernels. Tensors and lists of ids in, tensors out; no text and no checkpoints.

Shape letters: B rows, T tokens, D width, H heads, K = D/H head width, V vocabulary, N tokens in a
flat list, A answers to all questions, R of them being sampled, Q questions of a batch, P columns of
their prompts, S tokens of a few-shot prefix that all prompts share. `ids_BT` is a tensor (B, T).

What differs from a textbook transformer (this is what OLMo2 is, arXiv 2501.00656, section 3.2):
 1. the norms sit on the outputs of attention and MLP, and there are none on their inputs:
    h = x + Norm(Attn(x)),  y = h + Norm(MLP(h))
 2. queries and keys are RMS-normalised over the whole projection, before the split into heads and
    before RoPE
 3. no bias anywhere; embedding and head are two matrices; SwiGLU; RoPE with theta 500000 in fp32,
    first half of a head against its second half
What differs from the usual code of it:
 4. q, k, v are one matrix, gate and up are one matrix: fewer and larger products, which is most of
    the speed on a CPU
 5. the head is never applied to all tokens at once: `weighted_nll` and `log_probs` walk over chunks
    of rows
 6. rows of the vocabulary above `vocab` (padding that makes V a round number) are left out of every
    softmax
"""

import gc
import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

triton = None
if find_spec("triton") and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ):
    import triton  # takes most of a second, and a CPU only needs it to test the kernels
    import triton.language as tl

# cuDNN's attention plans anew for every (batch, length), which takes up to hundreds of
# milliseconds, and RL has a new length at nearly every step. The flash kernel, PyTorch's next
# choice, plans nothing.
torch.backends.cuda.enable_cudnn_sdp(False)


# -------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class ModelConfig:
    layers: int = 4
    width: int = 96
    heads: int = 4
    ffn: int = 256
    vocab: int = 100278  # ids that exist; rows from here on are never sampled nor counted
    padded_vocab: int = 100352  # rows of embedding and head: a multiple of 128 for the matrix units
    context: int = 512  # longest sequence
    theta: float = 500000.0  # RoPE base
    eps: float = 1e-6  # RMSNorm

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} does not split into {self.heads} heads of even width"
            )
        if self.vocab > self.padded_vocab:
            raise ValueError(f"vocab {self.vocab} is larger than padded_vocab {self.padded_vocab}")
        if self.context % 8:
            raise ValueError(f"context {self.context}: rows are filled up to a multiple of 8")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


PRESETS = {
    # half a million parameters
    "toy": dict(layers=4, width=96, heads=4, ffn=256, context=512),
    # 3.7 times as many, as 4b has of 1b: to tell the effect of data from that of size
    "toy-large": dict(layers=4, width=192, heads=8, ffn=512, context=512),
    # 190M beside the embedding
    "190m": dict(layers=12, width=768, heads=12, ffn=3072, context=4096),
    # OLMo-2-0425-1B
    "1b": dict(layers=16, width=2048, heads=16, ffn=8192, context=4096),
    # paper: "4B", shape not given; here: 4.01B
    "4b": dict(layers=30, width=3072, heads=24, ffn=8192, context=4096),
}


def paper_size(preset: str) -> bool:
    """Whether the paper's settings apply, rather than the laptop's."""
    return not preset.startswith("toy")


class Linear(nn.Linear):
    """No bias. The weight is cast to the dtype of its input: fp32 masters and bf16 compute need no
    autocast."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 where all is fp64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32 (or fp64), the weight included; the cast back comes last (OLMo2's order)."""
    wide = x.to(at_least_fp32(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def rope_table(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (...) int -> cos, sin (..., K/2), in fp32 whatever the compute dtype: angles in
    bf16 would be noise."""
    even = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** -(even / head_width)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., K) (RoFormer, eq. 34), first half against second."""
    a, b = x.to(at_least_fp32(x.dtype)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Layout(NamedTuple):
    """Rows that hold more than one sequence: which tokens belong together.

    A token sees what precedes it in its document, and there only the trunk (branch 0) and its own
    branch. A text is documents without branches; a question with several answers is a prompt with a
    branch for each answer, which do not see each other:

        token      p0 p1 p2 | p3 a0 a1 | p3 b0 b1 b2      predicts   .. .. .. | a0 a1 a2 | b0 ...
        branch      0  0  0 |  1  1  1 |  2  2  2  2
        position    0  1  2 |  3  4  5 |  3  4  5  6      (the prompt's last token begins a branch)
    """

    position: Tensor  # (B, T) int64, along the branch from the start of its document
    document: Tensor  # (B, T) int64, any number that the tokens of a document share
    branch: Tensor  # (B, T) int64, 0 in the trunk

    def mask(self) -> Tensor:
        """bool (B, 1, T, T): which tokens (last dimension) each token sees."""
        same = self.document[:, :, None] == self.document[:, None, :]
        trunk = self.branch[:, None, :] == 0
        own = self.branch[:, :, None] == self.branch[:, None, :]
        return (same & (trunk | own)).tril()[:, None]

    def blocks(self) -> flex.BlockMask:
        """The same for FlexAttention, which leaves out blocks of 128 x 128 that nobody sees.

        Only compiled blocks make one kernel of it, see `Model.hidden`. What is found here holds a
        few bool (B, T, T) for a moment, 0.13 GB each for 8 rows of 4096, once a pass and not once a
        layer: compiling that, too, would be one more thing to compile for every new shape.
        """
        document = self.document
        branch = self.branch

        def sees(b, h, query, key):  # tensors from outside: a new mask is no new code to compile
            same = document[b, query] == document[b, key]
            own = branch[b, query] == branch[b, key]
            return (query >= key) & same & ((branch[b, key] == 0) | own)

        B, T = document.shape
        return flex.create_block_mask(sees, B, None, T, T, device=document.device)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | flex.BlockMask | None) -> Tensor:
    """Causal attention, all (B, H, T, K). seen: which keys each query sees (None: all before it),
    as `Layout` has it."""
    if isinstance(seen, flex.BlockMask):
        return flex.flex_attention(q, k, v, block_mask=seen)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.head_width = c.head_width
        self.qkv = Linear(c.width, 3 * c.width)
        self.q_norm = RMSNorm(c.width, c.eps)
        self.k_norm = RMSNorm(c.width, c.eps)
        self.out = Linear(c.width, c.width)
        self.attention_norm = RMSNorm(c.width, c.eps)
        self.gate_up = Linear(c.width, 2 * c.ffn)
        self.down = Linear(c.ffn, c.width)
        self.mlp_norm = RMSNorm(c.width, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen=None) -> Tensor:
        """x (B, T, D); cos and sin of rope_table; seen: see `attend`."""
        q, k, v = self.project(x, cos, sin)
        return self.finish(x, attend(q, k, v, seen))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q, k, v (B, H, T, K), the first two normalised and rotated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = self._heads(self.q_norm(q))  # normalised over all heads together, as OLMo2 does
        k = self._heads(self.k_norm(k))
        return rotate(q, cos, sin), rotate(k, cos, sin), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        return x.view(B, T, self.heads, self.head_width).transpose(1, 2)  # (B, H, T, K)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention; x (B, T, D), attended (B, H, T, K)."""
        joined = attended.transpose(1, 2).reshape(x.shape)  # (B, T, D)
        x = x + self.attention_norm(self.out(joined))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.mlp_norm(self.down(F.silu(gate) * up))


class Model(nn.Module):
    """OLMo2. Weights are kept in fp32 (or fp64); `compute` is the dtype of activations and of
    matrix products."""

    # keep only the blocks' inputs; run each again when going backward
    checkpoint_activations = False
    # whether the blocks are compiled (common.compile_blocks says so)
    compiled = False

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute = compute
        self.embed = nn.Embedding(config.padded_vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.padded_vocab)

    @torch.no_grad()
    def init_weights(self, seed: int, embed_std: float = 0.02, put=Tensor.copy_) -> "Model":
        """Truncated normal, std 0.02, cut off at 3 std (OLMo2); norms start at 1.

        embed_std: the embedding's own std. put(parameter, whole tensor): what to do instead of a
        copy where each rank holds a part of a parameter."""
        # On the CPU, so that every device starts from the same weights.
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            fresh = torch.ones(p.shape)
            if p.dim() > 1:
                nn.init.trunc_normal_(fresh, std=0.02, a=-0.06, b=0.06, generator=generator)
            if p is self.embed.weight:
                fresh = fresh * (embed_std / 0.02)
            put(p, fresh)
        return self

    @torch.profiler.record_function("forward")  # a name in the traces of --profile
    def hidden(self, ids_BT: Tensor, layout: tuple | None = None) -> Tensor:
        """Final hidden states (B, T, D), what the head is applied to.

        layout: a Layout or its three tensors; None, each row is one sequence, and one above the
        context length raises ValueError."""
        B, T = ids_BT.shape
        c = self.config
        x = F.embedding(ids_BT, self.embed.weight).to(self.compute)
        position = torch.arange(T, device=x.device)
        seen = None
        if layout is not None:
            layout = Layout(*layout)
            position = layout.position[:, None]  # (B, 1, T)
            seen = layout.blocks() if self.takes_blocks(x) else layout.mask()
        elif T > c.context:
            raise ValueError(f"{T} tokens in a row, the model's context is {c.context}")
        cos, sin = rope_table(position, c.head_width, c.theta)
        for block in self.blocks:
            if self.checkpoint_activations:
                x = checkpoint(block, x, cos, sin, seen, use_reentrant=False)
            else:
                x = block(x, cos, sin, seen)
        return self.norm(x)

    def takes_blocks(self, x: Tensor) -> bool:
        """Whether a layout goes to FlexAttention, as blocks, and not to SDPA, as a dense mask.

        FlexAttention is one kernel only where a compiler makes it one: run as it is, it holds all
        scores in fp32, where SDPA with a mask holds the mask. A CPU has no backward pass of it, and
        Triton no products in fp64. `bash tests/gpu.sh tree` asks whether the kernels that Inductor
        generates run, and how fast; --compile false does without them."""
        return self.compiled and x.is_cuda and x.dtype != torch.float64

    def forward(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        layout: tuple | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probs of each target given its token and what that sees: the one way into the head
        for all trainers.

        ids and target (B, T); mask (B, T) bool, which targets count (None: all); weight (B, T).
        With weight:    -> loss, logp (B, T), entropy (B, T), the latter two detached.
                           loss = sum of weight * -logp + z_loss * sum of lse^2 over the mask
        Without weight: -> logp, entropy (B, T), both differentiable: for clipped updates, KL and
                           evaluation.
        Positions outside the mask come back as exactly 0 and cost no product with the head."""
        states = self.hidden(ids_BT, layout)
        B, T, D = states.shape
        rows = slice(None) if mask is None else mask.reshape(B * T).nonzero().squeeze(1)
        hidden = states.reshape(B * T, D)[rows]
        target = target_BT.reshape(B * T)[rows]

        def spread(values: Tensor) -> Tensor:
            """Values of the rows that count (N,) -> (B, T), zero elsewhere."""
            if mask is None:
                return values.view(B, T)
            whole = torch.zeros(B * T, dtype=values.dtype, device=values.device)
            return whole.index_put((rows,), values).view(B, T)

        head = self.head.weight
        vocab = self.config.vocab
        if weight is None:
            logp, entropy = log_probs(hidden, head, target, vocab, temperature)
            return spread(logp), spread(entropy)
        weight = weight.reshape(B * T)[rows]
        loss, logp, entropy = weighted_nll(hidden, head, target, weight, vocab, temperature, z_loss)
        return loss, spread(logp), spread(entropy)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token: 6 a weight outside the embedding, and 12*layers*D*T for attention
        with the causal half counted in full, as most reports do (PaLM, appendix B). At 1B and 4096
        tokens that is 9.287 GFLOP. A forward pass takes a third."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - c.padded_vocab * c.width
        return 6.0 * weights + 12.0 * c.layers * c.width * length


# ------------------------------------------------------------------------------------ optimizer


class OffloadedAdam(torch.optim.Adam):
    """Adam with its moments in the CPU's memory, which takes them, one parameter at a time, to
    where the parameter is. The arithmetic is Adam's, so the result is the same bit for bit.

    Copies and arithmetic do not overlap: at 1B 12 GB go each way, about a second in all at 25 GB/s
    (computed, not measured), beside steps of a minute."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        gradients = [p.grad for p in parameters]
        self.zero_grad(set_to_none=True)  # Adam takes no step where there is no gradient
        for p, gradient in zip(parameters, gradients, strict=True):
            kept = dict(self.state[p])  # nothing before the first step
            self.state[p].update({name: x.to(p.device) for name, x in kept.items()})
            p.grad = gradient
            super().step()
            p.grad = None
            self.put_away(p, kept)

    def put_away(self, p: nn.Parameter, kept: dict):
        """Move p's moments to the CPU's memory: into the tensors of `kept`, or else into new ones,
        which a GPU reads without help (pinned)."""
        for name, x in self.state[p].items():
            if name not in kept:
                kept[name] = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            self.state[p][name] = kept[name].copy_(x)


def adam(model: Model, offload: bool = False) -> torch.optim.Adam:
    """Adam without decay and with learning rate 0: `update` sets the rate and does the decay."""
    kind = OffloadedAdam if offload else torch.optim.Adam
    return kind(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.profiler.record_function("optimizer")
@torch.no_grad()
def update(model: Model, parts: list, weight_decay: float):
    """theta <- theta - sum_i lr_i * (weight_decay * theta + Adam_i(gradient_i)), all at one theta.

    parts: (optimizer, lr, gradients) each; gradients in the order of model.parameters().
    One entry is AdamW (Loshchilov & Hutter 2019, algorithm 2). Two are parallel averaging: an AdamW
    update is linear in its learning rate, so share * Delta_RL + (1 - share) * Delta_SFT needs no
    copy of the weights, only lr_i = share_i * lr. Adam's part depends on gradients alone; the decay
    is done first and once, as both would do it at the same theta. The embedding is not decayed
    (OLMo2)."""
    decay = 1 - weight_decay * sum(lr for _, lr, _ in parts)
    for p in model.parameters():
        if weight_decay and p is not model.embed.weight:
            p.mul_(decay)
    for optimizer, lr, gradients in parts:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad(set_to_none=True)


def cosine(step: int, steps: int, peak: float, warmup: int = 0, floor: float = 0.1) -> float:
    """Learning rate of update `step` (from 0) of `steps`: a linear warm-up, then a cosine from peak
    to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


# -------------------------------------------------------------------------------------- sampler
#
# Questions are taken in by prefill (each prompt through the network, whole) and a draw; then decode
# (one token of each row through the network) and a draw in turn, until every row has ended or is
# full.
#
# To read it: in Sampler `__call__`, `_change_rows`, `_take_in`, `_decode`, `_draw`; then `choose`.
# `_batches`, `_bytes` and `_reserve` are about memory, `_captured` and `refill` about CUDA.


class Samples(NamedTuple):
    """A = questions * n answers, question by question; `tokens` past the length of an answer are no
    part of it."""

    tokens: Tensor  # (A, max_new) int64, the sampled end token included
    lengths: Tensor  # (A,) int64, tokens sampled, the end token counted
    logp: Tensor  # (A, max_new) fp32, log-prob of each token at the temperature of sampling
    truncated: Tensor  # (A,) bool, stopped by max_new and not by an end token
    waste: float  # of all rows decoded, token by token, the share that had ended
    logp_1: Tensor  # (A, max_new) fp32, log-prob at temperature 1: what the model itself gives it


def uniform_noise(seeds: list[int], length: int) -> Tensor:
    """(A, length) fp64 in [0, 1). Row a is a function of seeds[a] alone, so neither the batch that
    an answer is in nor the number of ranks changes what it draws. One number a token is enough:
    `Sampler` inverts the cumulative distribution."""
    noise = torch.empty(len(seeds), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(length, generator=generator, dtype=torch.float64, out=row)
    return noise


def bucket(count: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `count` rows: few batch shapes, hence
    few graphs."""
    size = 16
    while size < count:
        power_of_two = size & (size - 1) == 0
        size = size * 3 // 2 if power_of_two else size * 4 // 3
    return size


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Cache(NamedTuple):
    """What a block's new token attends to, keys [0] and values [1] of it."""

    own: Tensor  # (2, R, H, T, K) of each row's own tokens
    prompt: Tensor  # (2, Q, H, P, K) of the questions' prompts
    prefix: Tensor | None  # (2, H, S, K) of what precedes every prompt, None without


class Place(NamedTuple):
    """Where the new tokens stand; the same for all blocks."""

    t: Tensor  # (R,) column of the new token: columns of `own` before it are read
    cos: Tensor  # (R, 1, 1, K/2) of the rotation
    sin: Tensor
    group: Tensor  # (R,) question of each row; for the kernels' speed its rows stand together
    mask: Tensor  # (Q, 1, P) added to the scores of a prompt: -inf where it is shorter, else 0
    # for the kernels
    length: Tensor  # (R,) columns of `own` that are read: t, and 0 once the answer has ended
    size: Tensor  # (Q,) tokens of each prompt


class Step(NamedTuple):
    """All that one decoded token's work depends on beside what tensors hold. On CUDA a graph is
    captured for each value of it."""

    rows: int  # R, those that are decoded
    max_new: int  # tokens of an answer
    columns: int  # T, columns of the rows' own cache that may be read, a multiple of SPAN
    prompt: int  # P, columns of the prompts' cache that are read, a multiple of SPAN
    prefix: int  # S, 0 without a prefix
    temperature: float
    ends: tuple[int, ...]  # ids that end an answer


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, cache: Cache, place: Place) -> Tensor:
    """Attention of one new token a row: q, k, v (R, H, K) -> (R, H, K).

    The softmax runs over four parts: the new token, the row's own tokens before it, the prompt of
    its question, and the prefix. The parts stay where they are and share one maximum and one sum.
    Weighted sums are written as products and sums, not as matrix products: a row has one query, and
    a compiler makes loops of them that read each key once, where a BLAS would be called 2 * R * H
    times for next to nothing. The prefix is one matrix product, as every row reads the same
    keys. On CUDA two Triton kernels do it, see the end of this file."""
    if use_triton(q):
        return _attend_by_kernels(q, k, v, *cache, place.length, place.group, place.size)
    compute = q.dtype
    q = q.to(at_least_fp32(compute)) * q.shape[-1] ** -0.5
    # Scores: (R, H, 1), (R, H, T), (R, H, P), (R, H, S)
    new = (q * k).sum(-1, keepdim=True)
    before = torch.arange(cache.own.shape[3], device=q.device) < place.t[:, None, None]
    own = (q[:, :, None] * cache.own[0]).sum(-1).masked_fill(~before, -math.inf)
    prompt = (q[:, :, None] * cache.prompt[0][place.group]).sum(-1) + place.mask[place.group]
    top = torch.maximum(own.amax(-1, keepdim=True), new)
    top = torch.maximum(top, prompt.amax(-1, keepdim=True))
    if cache.prefix is not None:
        prefix = q.to(compute).transpose(0, 1) @ cache.prefix[0].transpose(1, 2)
        prefix = prefix.transpose(0, 1).to(new.dtype)
        top = torch.maximum(top, prefix.amax(-1, keepdim=True))
    new = (new - top).exp()
    own = (own - top).exp()
    prompt = (prompt - top).exp()
    total = new + own.sum(-1, keepdim=True) + prompt.sum(-1, keepdim=True)
    y = new * v + (own[..., None] * cache.own[1]).sum(2)
    y = y + (prompt[..., None] * cache.prompt[1][place.group]).sum(2)
    if cache.prefix is not None:
        prefix = (prefix - top).exp()
        total = total + prefix.sum(-1, keepdim=True)
        y = y + (prefix.to(compute).transpose(0, 1) @ cache.prefix[1]).transpose(0, 1)
    return (y / total).to(compute)


def decode(block: Block, x: Tensor, cache: Cache, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """A block for one new token of each row: x (R, D) -> x after the block, and the token's key and
    value (R, H, K)."""
    q, k, v = (y[:, :, 0] for y in block.project(x[:, None], place.cos, place.sin))
    attended = attend_to_cache(q, k, v, cache, place)
    return block.finish(x[:, None], attended[:, :, None])[:, 0], k, v


class Request(NamedTuple):
    """What a call of Sampler asks for, A = questions * n answers, and what it has so far."""

    prompts: list[list[int]]
    n: int
    noise: Tensor  # (A, max_new), see `uniform_noise`
    answers: Samples  # on the CPU, filled as rows are dropped
    held: Tensor  # (slots,) on the CPU: for each row of Buffers the number of its answer; -1: free


class Buffers:
    """What a batch reads and writes, at addresses that captured graphs rely on. `sizes` are what
    there is room for: R rows, Q questions, P columns of their prompts, T columns of the answers."""

    def __init__(self, model: Model, device, sizes: tuple[int, int, int, int]):
        self.sizes = sizes
        R, Q, P, T = sizes
        c = model.config
        H = c.heads
        K = c.head_width

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # keys and values of all layers: see Cache
        self.own = zeros(c.layers, 2, R, H, T, K, dtype=model.compute)
        self.prompt = zeros(c.layers, 2, Q, H, P, K, dtype=model.compute)
        # what a draw and the next token need of each row; rows that go on are kept in front
        self.t = zeros(R)  # its last column in the cache; -1: none yet
        self.first = zeros(R)  # position of column 0
        self.token = zeros(R)  # the last token
        self.alive = zeros(R, dtype=torch.bool)  # whether no end token has been drawn
        self.slot = zeros(R)  # where the row's answer is in the tensors below
        self.group = zeros(R)  # its question: where the prompt is
        self.mask = zeros(Q, 1, P, dtype=torch.float32)  # see Place
        self.size = zeros(Q)  # tokens of each prompt
        self.noise = zeros(R, T, dtype=torch.float64)  # a uniform number for each draw
        # the answers
        self.tokens = zeros(R, T)
        self.lengths = zeros(R)
        self.logp = zeros(2, R, T, dtype=torch.float32)  # as sampled, and at temperature 1

    def keep(self, rows: Tensor, columns: int):
        """Move the state of these rows to the front, with the first `columns` of their cache."""
        count = len(rows)
        for x in (
            self.t,
            self.first,
            self.token,
            self.alive,
            self.slot,
            self.group,
            self.noise,
        ):
            x[:count] = x[rows]
        for kv in self.own.flatten(0, 1):  # one after the other: a copy of all would be as large
            kv[:count, :, :columns] = kv[rows, :, :columns]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


class Sampler:
    """Draws answers with a key/value cache, in the compute dtype of the model.

        prefix: S columns,        prompts: P columns         own: a row an answer,
        once                      a question                 T columns so far
        +----------------+        +----------+               +--+--+--+- - - - - -+
        |                | <- all | q0       | <- its n      |k0|k1|k2|           |  a row writes
        +----------------+        | q1   ----|    answers    +--+--+--+- - - - - -+  column t and
                                  +----------+    (- mask)                           reads 0..t

    A prompt is run once for its n answers, a few-shot prefix once for all prompts, and their keys
    are read where they are. Rows that finished are dropped as soon as the others fit the next
    smaller `bucket`. Buffers stay from one call to the next; on CUDA the work of one token is a
    captured graph for each `Step`.

    Where Triton kernels attend, a row costs what it has written, and the next questions take the
    places of rows that finished (refill). Elsewhere a row costs what the longest row has written,
    so a batch is finished before the next begins, and all its rows are equally long.

    rows: answers sampled side by side. compile: torch.compile the block, which takes seconds at the
    start, more of them the first time on a machine.
    Call `refresh()` after the weights of the model have changed.
    """

    CHECK = 4  # tokens from one look for finished rows to the next: a GPU waits for each look
    REFILL = 8  # the next questions are taken in when one row in so many is free
    SPAN = {"cpu": 8, "cuda": 64}  # T and P are multiples of it: few shapes to compile or capture
    SPARE = 8  # columns of either that are there and not used

    def __init__(self, model: Model, rows: int = 512, compile: bool = False):
        self.rows = rows
        self.copies = []  # (copy, weight of the model) for each weight that is copied
        with torch.device("meta"):  # the network again, over weights whole and in the compute dtype
            self.model = Model(model.config, model.compute).requires_grad_(False)
        own = {name: self._own(name, w.detach()) for name, w in model.named_parameters()}
        self.model.load_state_dict(own, assign=True)
        self.embed = self.model.embed.weight
        self.head = self.model.head.weight[: model.config.vocab]
        on_cuda = self.embed.is_cuda
        self.padded = on_cuda  # whether logits are made with the padding and cut: see `logits`
        self.capture = on_cuda  # whether a token's work is captured
        # whether Triton kernels attend and draw
        self.fused = use_triton(torch.empty(0, dtype=model.compute, device=self.embed.device))
        self.refill = self.fused  # whether the next questions join a batch that is not finished
        self.span = self.SPAN[self.embed.device.type]
        c = model.config
        positions = torch.arange(c.context, device=self.embed.device)
        self.cos, self.sin = rope_table(positions, c.head_width, c.theta)
        self.graphs = {}  # Step -> its graph; None: has run once, to be captured at the next use
        self.pool = None  # of the graphs' memory
        self.stream = torch.cuda.Stream() if on_cuda else None  # that they are captured on
        self.prefix = []  # keys and values of the prefix, (2, H, S, K) a layer
        self.buffers = None
        self.steps_left = 0  # tokens until every row is certainly full
        self.compiled = compile
        self.decode = torch.compile(decode, dynamic=True) if compile else decode
        self.refresh()

    def _own(self, name: str, weight: Tensor) -> Tensor:
        """Room for the weight, whole and in the compute dtype; the weight itself where it is that
        already, or is cast when used."""
        sharded = hasattr(weight, "full_tensor")
        cast_when_used = weight.dim() == 1 or name == "embed.weight"
        if not sharded and (cast_when_used or weight.dtype == self.model.compute):
            return weight
        # FSDP casts the norms of a block and not the final one: the dtypes that the trainer has
        dtype = weight.dtype if name == "norm.weight" else self.model.compute
        copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.copies.append((copy, weight))
        return copy

    @torch.no_grad()
    def refresh(self):
        """Take over the model's weights, in place: graphs go on reading the same addresses. All
        ranks together."""
        for copy, weight in self.copies:
            if hasattr(weight, "full_tensor"):
                weight = weight.to(copy.dtype).full_tensor()  # cast first: less to send
            copy.copy_(weight)
        self.prefix_ids = ()  # the cache of the prefix is of the old weights

    # Duck shapes: a compiler would take sizes that happen to be equal once to be equal always.
    @torch.fx.experimental._config.patch(use_duck_shape=False)
    @torch.inference_mode()
    def __call__(
        self,
        prompts: list[list[int]],
        n: int,
        max_new: int,
        seeds: list[int],
        ends: list[int],
        temperature: float = 1.0,
        prefix: Sequence[int] = (),
        progress=iter,
    ) -> Samples:
        """n answers to each prompt (ids), of at most max_new tokens, until one of the ids `ends` is
        drawn.

        seeds: one an answer, question by question. temperature 0 takes the most probable token.
        prefix: ids before every prompt. progress: wraps the list of batches, tqdm for instance.
        Raises ValueError for an empty prompt and for more than the context or the memory holds."""
        self._check(prompts, max_new, prefix)
        self._use_prefix(tuple(prefix))
        batches = self._batches(prompts, n, max_new, len(prefix))
        most = max(map(len, batches))
        # Of each a little more than is used: a slice is then never the whole, which a compiler
        # would tell apart, and make its code twice.
        longest = round_up(max(map(len, prompts)), self.span)
        columns = round_up(max_new, self.span)
        self._reserve(
            self._bytes(most, n, longest, max_new, len(prefix)),
            *(most * n + 1, self._groups(most, n) + 1, longest + self.SPARE, columns + self.SPARE),
        )
        A = len(prompts) * n
        answers = Samples(
            tokens=torch.full((A, max_new), ends[0]),
            lengths=torch.zeros(A, dtype=torch.long),
            logp=torch.zeros(A, max_new),
            truncated=torch.zeros(A, dtype=torch.bool),
            waste=0.0,
            logp_1=torch.zeros(A, max_new),
        )
        held = torch.full((most * n,), -1)
        request = Request(prompts, n, uniform_noise(seeds, max_new), answers, held)
        step = Step(
            rows=0,
            max_new=max_new,
            columns=columns,
            prompt=0,
            prefix=len(prefix),
            temperature=temperature,
            ends=tuple(ends),
        )
        decoded = A  # rows x tokens so far; the first token of an answer comes out of the prefill
        for batch in progress(batches):
            waiting = deque(batch)
            finish = not self.refill or batch is batches[-1]
            while True:
                step = self._change_rows(step, waiting, request)
                if not (waiting or finish and step.rows):
                    break
                count = min(self.CHECK, self.steps_left)
                self.steps_left -= count
                if not self.refill:
                    columns = max_new - 1 - self.steps_left
                    step = step._replace(columns=round_up(columns, self.span))
                for _ in range(count):
                    self._advance(step)
                decoded += count * step.rows
        return answers._replace(waste=1 - int(answers.lengths.sum()) / decoded)

    def _check(self, prompts, max_new: int, prefix):
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty: give at least one token")
        context = self.model.config.context
        widest = max(map(len, prompts))
        if len(prefix) + widest + max_new > context:
            raise ValueError(
                f"{len(prefix)} (shots) + {widest} (prompt) + {max_new} (answer) tokens "
                f"are more than the model's context of {context}: lower --max_new or --shots"
            )

    def _use_prefix(self, prefix: tuple[int, ...]):
        """Keys and values of the prefix, unless they are there; where it is as long as the one
        before, at the addresses that graphs read."""
        if not prefix or self.prefix_ids == prefix:
            return
        _, cache = self.prefill(torch.tensor([prefix], device=self.embed.device))
        new = [torch.cat(kv) for kv in cache]
        if self.prefix and self.prefix[0].shape == new[0].shape:
            for old, kv in zip(self.prefix, new, strict=True):
                old.copy_(kv)
        else:
            self.graphs = {}  # they read the old ones
            self.prefix = new
        self.prefix_ids = prefix

    def _batches(self, prompts, n: int, max_new: int, prefix: int) -> list[list[int]]:
        """Questions of each batch, by number: prompts of like length share one."""
        order = sorted(range(len(prompts)), key=lambda q: -len(prompts[q]))
        one, two = (self._bytes(q, n, len(prompts[order[0]]), max_new, prefix) for q in (1, 2))
        most = min(len(order), max(1, self.rows // n))
        held = self.buffers.nbytes if self.buffers else 0
        # memory is linear in the number of questions: two points give the line
        fit = 1 + (0.9 * (free_bytes(self.embed.device) + held) - one) / (two - one)
        if fit < most:
            need = (
                f"{n} answers of {max_new} tokens to a prompt of {len(prompts[order[0]])} "
                f"need {one / 2**30:.3g} GiB"
            )
            if fit < 1:
                raise ValueError(
                    f"{need}, more than is free: "
                    "lower --max_new or the number of answers a question"
                )
            warnings.warn(
                f"{need}: sampling {int(fit) * n} answers at a time, not {most * n}; "
                "a lower --max_new would fit more",
                stacklevel=3,
            )
        count = -(-len(order) // int(min(most, fit)))
        edges = [i * len(order) // count for i in range(count + 1)]
        return [order[first:end] for first, end in itertools.pairwise(edges)]

    def _groups(self, questions: int, n: int) -> int:
        """Prompts to keep for so many questions side by side. With refill twice as many: a prompt
        is there until the last of its answers has ended."""
        return 2 * questions if self.refill and n > 1 else questions

    def _bytes(self, questions: int, n: int, prompt: int, max_new: int, prefix: int) -> int:
        """Memory that a batch of so many questions with n answers each takes, in bytes."""
        c = self.model.config
        D = c.width
        size = self.model.compute.itemsize
        wide = at_least_fp32(self.model.compute).itemsize
        column = 2 * c.layers * D * size  # keys and values of one token
        P = round_up(prompt, self.span)
        T = round_up(max_new, self.span)
        # Buffers: keys and values, and what they hold of a column beside; __call__ says why more.
        question = (P + self.SPARE) * (column + 4)
        row = (T + self.SPARE) * (column + 24)
        # Prefill: keys and values as they come, and the activations of one layer; of the prefix
        # keys and values alone.
        prefill = P * (column + 4 * c.ffn * size + 8 * D * wide) + 2 * prefix * D * size
        # Decode: keys of a layer and their products with the queries, which only a compiler does
        # without, and a kernel; a prompt's keys once for each of its answers.
        product = wide if size == wide else 2 * wide  # bf16 keys are cast before
        no_products = self.compiled or self.fused
        decode = 0 if no_products else D * max(T * product, P * (size + product))
        if self.refill:  # the keys of a layer, when rows move
            decode = max(decode, D * T * size)
        # Draw: logits and their exponentials in 4 bytes, their sums in 8; a kernel: logits alone.
        draw = (size if self.fused else 16) * c.padded_vocab
        step = n * (max(decode, draw) + 8 * (c.ffn + 4 * D))
        graphs = step if self.capture else 0  # memory of their own, beside what comes and goes
        buffers = (self._groups(questions, n) + 1) * question + (questions * n + 1) * row
        return buffers + questions * (graphs + max(prefill, step))

    # ---- prefill

    def prefill(self, ids_BT: Tensor, past=None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run whole rows. -> final hidden states (B, T, D), and of each layer the keys and values,
        a pair of (B, H, T, K).

        past: keys and values of what precedes the rows, as returned here: (1 or B, H, S, K)."""
        m = self.model
        c = m.config
        B, T = ids_BT.shape
        S = past[0][0].shape[2] if past else 0
        x = F.embedding(ids_BT, self.embed).to(m.compute)
        position = torch.arange(S, S + T, device=ids_BT.device)
        cos, sin = rope_table(position, c.head_width, c.theta)
        seen = None
        if past:  # all of the past, and of the row what is not later
            seen = torch.ones(T, S + T, dtype=torch.bool, device=ids_BT.device).tril(S)
        cache = []
        for layer, block in enumerate(m.blocks):
            q, k, v = block.project(x, cos, sin)
            cache.append((k, v.clone()))  # v alone: as it is, it keeps the memory of q and k, too
            if past:
                past_k, past_v = past[layer]
                k = torch.cat([past_k.expand(B, -1, -1, -1), k], dim=2)  # (B, H, S + T, K)
                v = torch.cat([past_v.expand(B, -1, -1, -1), v], dim=2)
            x = block.finish(x, attend(q, k, v, seen))
        return m.norm(x), cache

    def _prefill_prompts(self, prompts: list[list[int]], groups: Tensor, step: Step) -> Tensor:
        """Prompts through the network, their keys and values to `groups` (Q,) of the buffers. ->
        the hidden state of each prompt's last token (Q, D)."""
        b = self.buffers
        device = self.embed.device
        size = torch.tensor([len(prompt) for prompt in prompts], device=device)
        P = round_up(max(map(len, prompts)), self.span)
        # Attention is causal, so what fills a row up changes nothing before it.
        ids = [prompt + prompt[:1] * (P - len(prompt)) for prompt in prompts]
        past = [kv[:, None] for kv in self.prefix] if step.prefix else None  # (2, 1, H, S, K) each
        x, cache = self.prefill(torch.tensor(ids, device=device), past)
        for layer, (keys, values) in enumerate(cache):
            b.prompt[layer, 0, groups, :, :P] = keys
            b.prompt[layer, 1, groups, :, :P] = values
        real = torch.arange(b.mask.shape[2], device=device) < size[:, None, None]
        b.mask[groups] = torch.where(real, 0.0, -math.inf)
        b.size[groups] = size
        return x[torch.arange(len(prompts), device=device), size - 1]

    # ---- which rows are decoded

    def _change_rows(self, step: Step, waiting: deque[int], request: Request) -> Step:
        """Drop rows that have ended, and take in questions that are `waiting` where there is room.
        -> the step with the rows that go on, or with none."""
        b = self.buffers
        n = request.n
        slots = len(request.held)
        alive = b.alive[: step.rows]
        live = int(alive.sum())
        new = 0  # questions to take in
        # One at a time would be a prefill and a move of the others' keys for little.
        if live == 0 or self.refill and (slots - live) * self.REFILL >= slots:
            used = set(b.group[: step.rows][alive].tolist())
            groups = [g for g in range(b.sizes[1] - 1) if g not in used]
            new = min(len(waiting), (slots - live) // n, len(groups))
        rows = min(bucket(live + new * n), step.rows + new * n, slots) if live + new else 0
        if rows == step.rows and not new:
            return step
        # The living, and as many others as fill the bucket; rows of a question stay together.
        kept = alive.to(torch.uint8).argsort(descending=True, stable=True)[: rows - new * n]
        if live:
            b.keep(kept.sort().values, int(b.t[: step.rows][alive].max()) + 1)
        self._collect(len(kept), request, step)
        if new:
            questions = [waiting.popleft() for _ in range(new)]
            self._take_in(questions, groups[:new], slice(len(kept), rows), request, step)
            longest = round_up(max(len(request.prompts[q]) for q in questions), self.span)
            step = step._replace(prompt=max(longest, step.prompt if live else 0))
            self.steps_left = step.max_new - 1
        return step._replace(rows=rows)

    def _take_in(
        self, questions: list[int], groups: list[int], rows: slice, request: Request, step: Step
    ):
        """Questions' prompts through the network, and the first token of their answers, which are
        these rows from now on."""
        b = self.buffers
        device = self.embed.device
        group = torch.tensor(groups, device=device)
        last = self._prefill_prompts([request.prompts[q] for q in questions], group, step)
        answers = torch.tensor([q * request.n + i for q in questions for i in range(request.n)])
        slot = (request.held < 0).nonzero()[: len(answers), 0]
        request.held[slot] = answers
        b.slot[rows] = slot.to(device)
        b.group[rows] = group.repeat_interleave(request.n)
        b.first[rows] = b.size[b.group[rows]] + step.prefix
        b.noise[rows, : step.max_new] = request.noise[answers].to(device)
        b.alive[rows] = True
        b.t[rows] = -1
        b.lengths[b.slot[rows]] = 0
        self._draw(last.repeat_interleave(request.n, 0), rows, step)

    def _collect(self, rows: int, request: Request, step: Step):
        """Answers of all but the first `rows` rows, to the CPU; their slots are free then."""
        b = self.buffers
        device = self.embed.device
        ended = request.held >= 0
        ended[b.slot[:rows].cpu()] = False
        slot = ended.nonzero()[:, 0]
        number = request.held[slot]
        request.held[slot] = -1
        slot = slot.to(device)
        lengths = b.lengths[slot]
        tokens = b.tokens[slot, : step.max_new]
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        said = torch.arange(step.max_new, device=device) < lengths[:, None]
        logp, logp_1 = b.logp[:, slot, : step.max_new].where(said, 0.0)
        answers = request.answers
        answers.tokens[number] = tokens.where(said, step.ends[0]).cpu()
        answers.lengths[number] = lengths.cpu()
        answers.logp[number] = logp.cpu()
        answers.logp_1[number] = logp_1.cpu()
        ends = torch.tensor(step.ends, device=device)
        answers.truncated[number] = ~torch.isin(last, ends).cpu()

    def _reserve(self, need: int, *sizes: int):
        """Buffers with room for at least these `sizes` of Buffers. No size becomes smaller, if that
        leaves room for a batch that needs so many bytes in all, and if it is little more than what
        one batch takes: many rows of one and the long prompt of another would together be many
        times that, and stay in the way of training."""
        device = self.embed.device
        have, held = (self.buffers.sizes, self.buffers.nbytes) if self.buffers else (sizes, 0)
        larger = tuple(map(max, have, sizes))
        exact, kept = (Buffers(self.model, "meta", some).nbytes for some in (sizes, larger))
        room = free_bytes(device) + held  # as if the old ones were gone
        too_much = need + kept - exact > (room if larger == have else 0.9 * room)
        if too_much or kept > 1.25 * max(exact, held):
            larger = sizes
        if self.buffers and larger == have:
            return
        self.graphs = {}  # they read the old buffers
        self.buffers = None  # freed before new ones are made
        self.buffers = Buffers(self.model, device, larger)

    # ---- decode

    def _advance(self, step: Step):
        """Decode a token and draw the next. On CUDA: run as it is the first time, which compiles;
        captured the second; then replayed."""
        if not self.capture:
            self._decode(step)
        elif step not in self.graphs:
            self.graphs[step] = None
            self._decode(step)
        else:
            if self.graphs[step] is None:
                self.graphs[step] = self._captured(step)
            self.graphs[step].replay()

    def _captured(self, step: Step):
        """A CUDA graph of `_decode`, not run yet.

        Not through torch.cuda.graph, which hands all unused memory back to the system at each of
        the tens of captures of a batch. Here it is handed back once, for a new pool, which cannot
        take what PyTorch holds unused."""
        if not any(self.graphs.values()):
            # A pool dies with the last graph that uses it, and PyTorch 2.11 refuses a capture into
            # a dead one.
            self.pool = torch.cuda.graph_pool_handle()
            gc.collect()
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        collects = gc.isenabled()
        # A tensor or graph that is collected in the middle of a capture makes it invalid.
        gc.disable()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool)
                try:
                    self._decode(step)
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph

    def _decode(self, step: Step):
        """The last token of each row through the network, and a draw of the next."""
        b = self.buffers
        R = step.rows
        # A row that has ended goes on in the columns after its answer, and stays in the last one.
        t = b.t[:R].add_(1).clamp_(max=step.max_new - 1)
        position = b.first[:R] + t
        place = Place(
            t=t,
            cos=self.cos[position][:, None, None],
            sin=self.sin[position][:, None, None],
            group=b.group[:R],
            mask=b.mask[..., : step.prompt],
            length=t * b.alive[:R],
            size=b.size,
        )
        rows = torch.arange(R, device=t.device)
        apart = self.refill or self.capture  # a graph must read the columns on the device
        column = None if apart else int(t[0])
        x = F.embedding(b.token[:R], self.embed).to(self.model.compute)
        for layer, block in enumerate(self.model.blocks):
            cache = Cache(
                own=b.own[layer, :, :R, :, : step.columns],
                prompt=b.prompt[layer, :, :, :, : step.prompt],
                prefix=self.prefix[layer] if step.prefix else None,
            )
            x, k, v = self.decode(block, x, cache, place)
            if apart:
                b.own[layer, 0, rows, :, t] = k
                b.own[layer, 1, rows, :, t] = v
            else:  # all rows are at the same column: one copy
                cache.own[0][:, :, column] = k
                cache.own[1][:, :, column] = v
        self._draw(self.model.norm(x), slice(0, R), step)

    # ---- draw

    def logits(self, x: Tensor) -> Tensor:
        """x (R, D) -> logits (R, V) of the ids that exist, in the compute dtype.

        On CUDA the product has the padding, too: rows of 100,278 numbers in bf16 would not begin at
        multiples of 16 bytes, which cuBLAS's fast kernels ask for. On a CPU the padding costs more
        than it gains."""
        head = self.model.head.weight if self.padded else self.head
        return (x @ head.T)[:, : len(self.head)]

    def _draw(self, x: Tensor, rows: slice, step: Step):
        """One token of each of these rows from x (R, D), the network's output for the last one."""
        b = self.buffers
        t = b.t[rows, None] + 1
        u = b.noise[rows].gather(1, t)
        token, logp = choose(self.logits(x), u, step.temperature)
        slot = b.slot[rows, None]
        b.tokens[slot, t] = token
        b.logp[0][slot, t] = logp[0].to(b.logp.dtype)
        b.logp[1][slot, t] = logp[1].to(b.logp.dtype)
        alive = b.alive[rows]
        b.lengths.index_add_(0, slot[:, 0], alive.long())
        b.token[rows] = token[:, 0]
        alive &= t[:, 0] + 1 < step.max_new
        for end in step.ends:
            alive &= token[:, 0] != end


def choose(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Sequence[Tensor]]:
    """One id a row of logits (R, V), by inverting the cumulative distribution at the row's uniform
    number u (R, 1) fp64: exact, and one random number a token where Gumbel noise takes V. -> ids
    (R, 1), and their log-probs as sampled and at temperature 1, (R, 1) each. Temperature 0 takes
    the most probable id.

    The sums are in fp64: in fp32 the tail of a large vocabulary would drown. Memory: 16 bytes a row
    and id at once, see `_bytes`; hence the sums in place, and logits in fp32 or fp64 are
    overwritten.

    On CUDA one Triton kernel does it, which sums in fp32 within blocks of 1024 ids and in fp64 over
    the blocks, and within the one that is picked. In total variation it samples from a distribution
    no farther than 1023 * 2^-24 = 6.1e-5 from the one here: a sum of 1024 positive numbers in fp32
    is off by at most that share, in whatever order, and ids within a block are weighed as here."""
    if use_triton(logits):
        return _launch_draw(logits, u, temperature)
    logits = logits.to(at_least_fp32(logits.dtype))
    logits -= logits.amax(1, keepdim=True)
    p = logits.exp()
    log_sum = p.sum(1, keepdim=True).log()
    scale = 1.0
    if temperature == 0:
        token = logits.argmax(1, keepdim=True)  # (R, 1)
        log_mass = log_sum
    else:
        if temperature != 1:
            scale = 1 / temperature
            torch.mul(logits, scale, out=p).exp_()
        mass = p.double().cumsum_(1)
        token = torch.searchsorted(mass, u * mass[:, -1:], right=True)  # (R, 1)
        token.clamp_(max=logits.shape[1] - 1)
        log_mass = mass[:, -1:].log()
    chosen = logits.gather(1, token)
    return token, (chosen * scale - log_mass, chosen - log_sum)


def free_bytes(device: torch.device, root: str = "/") -> float:
    """Memory that a batch may take; no limit where the system does not say.

    On a CPU what the machine has left, or what the process's container or job has left, if that is
    less. root: the folder that has proc and sys."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    machine = number_in(Path(root, "proc/meminfo"), math.inf, "MemAvailable:")
    return min(1024 * machine, container_bytes(Path(root)))


# of control groups (Linux's limits for containers and jobs), version 1 and 2: where they are, the
# limit, what is in use, and what of that is files that can be read again
GROUPS_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUPS_2 = ("", "memory.max", "memory.current", "inactive_file")


def container_bytes(root: Path) -> float:
    """What the control groups of this process leave it; no limit where there is none."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    room = math.inf
    for line in groups:  # 4:memory:/jobs/7 in version 1, 0::/jobs/7 in version 2
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, limit, used, files = GROUPS_1 if controllers else GROUPS_2
        top = root / "sys/fs/cgroup" / place
        # a container often sees its own group at the top, under a name from outside
        folder = top / (group.strip("/") if ".." not in group else "")
        for above in (folder, *folder.parents):
            held = number_in(above / used, 0) - number_in(above / "memory.stat", 0, files)
            room = min(room, number_in(above / limit, math.inf) - held)
            if above == top:  # a limit of a group is one of all below it
                break
    return max(0, room)


def number_in(path: Path, missing: float, name: str = "") -> float:
    """The number in a file of the system, or the one beside a name; `missing` if it is not there,
    or is a word."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        words = next(line for line in lines if line.startswith(name)).removeprefix(name).split()
        return int(words[0])
    except (OSError, StopIteration, IndexError, ValueError):
        return missing


# ------------------------------------------------------------------------------------ loss head
#
# Log-probs without ever holding the N x V logits.
# loss = sum_i w_i * -log pi(y_i | ...): pre-training has w = 1/n, SFT mask/n, on-policy GRPO
# advantage/n (its gradient at ratio 1). Two uses, with the same arguments:
#  (a) `weighted_nll`: the weights are known before the loss, so the gradient of a chunk of logits
#      can be taken as soon as the chunk exists, and the chunk be thrown away: 6NDV FLOPs, the same
#      as keeping all logits.
#  (b) `log_probs`: log-prob and entropy, 2NDV; its backward pass recomputes the logits, 6NDV more.
#      Old and new log-probs of a clipped update both come from here, from one forward function with
#      or without gradient, so their ratio is exactly 1 before the update (compiled blocks have code
#      for either: 1 but for rounding). On-policy (a) takes the ratio as 1 and never divides, so the
#      two need not agree in the last bits: in bf16 they do not, (a) rounds the logits to bf16 as
#      PyTorch would, (b) keeps them in fp32.
# Each is a loop in PyTorch, the reference and the CPU path, that hands its inner step to a Triton
# kernel on CUDA.
#
# Shape letters: C rows of a chunk; V here is `real`, the rows of the head that are multiplied.

# Logits held at once on a CPU: 2 MB in fp32 stay near the cache (8 MB: +30% time), but at least 64
# rows, to keep the products with the head at speed.
CHUNK = 1 << 19
ROWS = 64
# Computed for an H200: with 2048 rows reading and adding to dW (0.35 ms at 1B) is little beside a
# product (1.2 ms), and the logits are 0.41 GB. More rows for small vocabularies, whose launches
# would be short.
CHUNK_CUDA = 1 << 27
ROWS_CUDA = 2048


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve x: on CUDA, unless in fp64."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def sums_in_fp32(x: Tensor) -> bool:
    """Whether a matrix product of x in bf16 can return the fp32 sums that it makes inside."""
    return x.is_cuda  # torch 2.10 or later


def _chunks(count: int, vocab: int, fast: bool) -> list[tuple[int, int]]:
    """The chunks of `count` rows, as (first, end)."""
    rows = max(ROWS_CUDA, CHUNK_CUDA // vocab) if fast else max(ROWS, CHUNK // vocab)
    return [(i, min(i + rows, count)) for i in range(0, count, rows)]


def _room(chunks: list[tuple[int, int]], hidden: Tensor, real: Tensor) -> Tensor:
    """Memory for the logits of any chunk, the first of which is the largest."""
    rows = chunks[0][1] if chunks else 0
    return torch.empty(rows, len(real), dtype=hidden.dtype, device=hidden.device)


def _real(head: Tensor, vocab: int, hidden: Tensor, fast: bool) -> Tensor:
    """The head's rows that are multiplied, in the compute dtype: without the padding; but Triton
    keeps it, since the matrix units want round sizes, and reads none of its logits."""
    rows = head if fast else head[:vocab]
    return rows.to(hidden.dtype)


def _softmax(logits: Tensor, target: Tensor, temperature: float):
    """logits (C, V), divided by the temperature in place -> probabilities (C, V); log-prob and
    entropy (C,); log-sum-exp (2, C) as maximum and the rest: one number near 20 would lose the
    digits that make the probabilities sum to 1."""
    if temperature != 1.0:
        logits.div_(temperature)
    p = logits.softmax(1)
    top = logits.amax(1)
    rest = -p.amax(1).log()  # the largest p is exp(-rest): as exact as logsumexp, in fewer passes
    logp = logits.gather(1, target[:, None]).squeeze(1) - top - rest
    entropy = rest - logits.sub_(top[:, None]).mul_(p).sum(1)  # H = lse - E[logit]
    return p, logp, entropy, torch.stack([top, rest])


def _add_products(grad: Tensor, real: Tensor, hidden: Tensor, d_hidden: Tensor, d_head: Tensor):
    """d_hidden = grad @ real, and d_head += grad.T @ hidden, for one chunk's gradient (C, V), all
    sums in fp32. d_head has the padding, too, which gets nothing where `real` has none."""
    d_real = d_head[: len(real)]
    if grad.dtype == d_head.dtype:
        torch.mm(grad, real, out=d_hidden)
        d_real.addmm_(grad.T, hidden)
    elif sums_in_fp32(grad):  # a product split over V = 100k would add its parts in bf16
        d_hidden.copy_(torch.mm(grad, real, out_dtype=d_head.dtype))
        torch.addmm(d_real, grad.T, hidden, out_dtype=d_head.dtype, out=d_real)
    else:
        torch.mm(grad, real, out=d_hidden)
        d_real.addmm_(grad.T.to(d_head.dtype), hidden.to(d_head.dtype))


def _nll(hidden, head, target, weight, vocab, temperature, z_loss):
    """(a): log-prob, entropy (N,) and log-sum-exp (2, N) of every row; gradients of the loss in
    hidden and head."""
    fast = use_triton(hidden)
    real = _real(head, vocab, hidden, fast)
    wide = at_least_fp32(hidden.dtype)
    out = torch.empty(4, len(hidden), dtype=wide, device=hidden.device)  # log-prob, entropy, lse
    d_hidden = torch.empty_like(hidden)
    d_head = torch.zeros_like(head, dtype=at_least_fp32(head.dtype))
    chunks = _chunks(len(hidden), len(real), fast)
    buffer = _room(chunks, hidden, real)
    for i, j in chunks:
        row = target[i:j], weight[i:j], out[:, i:j]
        logits = torch.mm(hidden[i:j], real.T, out=buffer[: j - i])
        if fast:
            grad = _launch_rows(logits, *row, vocab, temperature, z_loss)
        else:
            grad = _nll_rows(logits.to(wide), *row, temperature, z_loss).to(hidden.dtype)
        _add_products(grad, real, hidden[i:j], d_hidden[i:j], d_head)
    return out[0], out[1], out[2:], d_hidden, d_head.to(head.dtype)


def _nll_rows(logits, target, weight, out, temperature, z_loss):
    """Log-prob, entropy and lse of a chunk into out (4, C) -> the loss' gradient in its logits."""
    p, out[0], out[1], out[2:] = _softmax(logits, target, temperature)
    scale = (weight + 2 * z_loss * out[2:].sum(0)) / temperature
    grad = p.mul_(scale[:, None])
    return grad.scatter_add_(1, target[:, None], (-weight / temperature)[:, None])


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, target, weight, *settings):
        logp, entropy, lse, *ctx.gradients = _nll(hidden, head, target, weight, *settings)
        ctx.save_for_backward(hidden, head, target, weight)
        ctx.settings = settings
        ctx.mark_non_differentiable(logp, entropy)
        loss = (settings[-1] * lse.sum(0).square() - weight * logp).sum()
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, d_loss, *_):
        # Handed over, not copied: the head's is 0.8 GB at 1B. Who goes backward a second time has
        # them made again.
        gradients = ctx.gradients or _nll(*ctx.saved_tensors, *ctx.settings)[3:]
        ctx.gradients = None
        d_hidden, d_head = (g.mul_(d_loss) for g in gradients)
        return d_hidden, d_head, None, None, None, None, None


@torch.profiler.record_function("loss head")
def weighted_nll(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor,
    vocab: int,
    temperature: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i weight_i * -log softmax(head[:vocab] @ hidden_i / temperature)[target_i]
    + z_loss * sum_i lse_i^2.

    hidden (N, D) compute dtype, head (V, D) master weights, target (N,) ids below vocab, weight
    (N,) any sign. z_loss keeps the log-normaliser lse near 0 (PaLM, section 5); give it as
    coefficient / count of targets: it does not go with the weights, a negative one would reverse
    it. Returns the loss (scalar, differentiable in hidden and head), logp (N,) and entropy (N,) in
    nats, both detached. Gradients are made in the forward pass, chunk by chunk, the head's in the
    head's own dtype."""
    hidden = hidden.contiguous()
    target = target.contiguous()
    weight = weight.to(at_least_fp32(hidden.dtype)).contiguous()
    return _WeightedNLL.apply(hidden, head, target, weight, vocab, temperature, z_loss)


def _measure(hidden, head, target, vocab, temperature):
    """(b): log-prob, entropy (N,) and log-sum-exp (2, N) of every row."""
    fast = use_triton(hidden)
    real = _real(head, vocab, hidden, fast)
    if fast:
        return _launch_log_probs(hidden, real, target, vocab, temperature)
    wide = at_least_fp32(hidden.dtype)
    out = torch.empty(4, len(hidden), dtype=wide, device=hidden.device)
    for i, j in _chunks(len(hidden), len(real), fast):
        logits = (hidden[i:j] @ real.T).to(wide)
        _, out[0, i:j], out[1, i:j], out[2:, i:j] = _softmax(logits, target[i:j], temperature)
    return out[0], out[1], out[2:]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, target, vocab, temperature):
        logp, entropy, lse = _measure(hidden, head, target, vocab, temperature)
        ctx.save_for_backward(hidden, head, target, lse, entropy)
        ctx.vocab = vocab
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        hidden, head, target, lse, entropy = ctx.saved_tensors
        fast = use_triton(hidden)
        real = _real(head, ctx.vocab, hidden, fast)
        wide = at_least_fp32(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=at_least_fp32(head.dtype))
        chunks = _chunks(len(hidden), len(real), fast)
        buffer = _room(chunks, hidden, real)
        for i, j in chunks:
            row = target[i:j], lse[:, i:j], entropy[i:j], d_logp[i:j], d_entropy[i:j]
            room = buffer[: j - i]
            if fast:
                settings = ctx.vocab, ctx.temperature
                grad = _launch_gradient(hidden[i:j], real, *row, room, *settings)
            else:
                # recomputed, never stored
                logits = torch.mm(hidden[i:j], real.T, out=room).to(wide)
                grad = _log_prob_rows(logits, *row, ctx.temperature).to(hidden.dtype)
            _add_products(grad, real, hidden[i:j], d_hidden[i:j], d_head)
        return d_hidden, d_head.to(head.dtype), None, None, None


def _log_prob_rows(logits, target, lse, entropy, d_logp, d_entropy, temperature):
    """A chunk's gradient in its logits, written over them.

    d logp / d logit_v = [v = y] - p_v          d H / d logit_v = -p_v (log p_v + H)"""
    log_p = logits.div_(temperature).sub_(lse[0, :, None]).sub_(lse[1, :, None])
    down = (entropy * d_entropy + d_logp)[:, None]
    grad = log_p.exp().mul_(log_p.mul_(d_entropy[:, None]).add_(down)).neg_()
    return grad.scatter_add_(1, target[:, None], d_logp[:, None]).div_(temperature)


@torch.profiler.record_function("loss head")
def log_probs(
    hidden: Tensor, head: Tensor, target: Tensor, vocab: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy (nats) of each distribution, both (N,) and
    differentiable; the arguments are those of `weighted_nll`. The backward pass recomputes the
    logits from the saved log-sum-exp: 2NDV forward, 6NDV backward."""
    return _LogProbs.apply(hidden.contiguous(), head, target.contiguous(), vocab, temperature)


# --------------------------------------------------------------- the loss head's Triton kernels
#
# (b) forward: a program owns BLOCK_N rows and a        (a): cuBLAS fills a chunk of 2048 rows, a
# segment of the vocabulary, and walks over it tile     program owns a row of it and walks over it
# by tile:                                              twice:
#
#           V -->  segment 0     segment 1  padding                V -->                     padding
#         +------+------+------+------+------+- - -+             +------+------+------+------+- - -+
#   rows  | tile > tile > tile|| tile > tile | -inf|        row  | 1st: max, sum, target's   | read|
#         +------+------+------+------+------+- - -+             | 2nd: gradient in its place| 0   |
#          m, s, e, y:         || m, s, e, y                     +------+------+------+------+- - -+
#          registers
#
# A tile is BLOCK_N x BLOCK_V logits, summed over D in fp32 by tl.dot and gone after its update of
# m = maximum, s = sum of exp(x - m), e = sum of exp(x - m)(x - m), y = target's logit. The parts of
# a row are joined at the end. (b) backward makes the same tiles, with the same bits, and stores the
# gradient that follows from the saved lse = m + log s.
#
# Counted at N = 32768, D = 2048, V = 100352 in bf16. A product is 13.5 TFLOP; an H200 does 0.99
# PFLOP/s and 4.8 TB/s on paper:
#   (a) forward and backward  6NDV = 40.4 TFLOP. Bytes: logits are written, read twice (the second
#       time from L2 if all goes well), overwritten, and read twice by products, 6 * 6.6 GB; dW is
#       read and added to 16 times, 26 GB. Scratch: logits and the head in bf16, 0.41 GB each.
#   (b) forward   2NDV = 13.5 TFLOP, no logits in memory, 32 bytes a row and segment.
#   (b) backward  6NDV, and (a)'s bytes less the first write and two reads.
# What bf16 tests do not show and an interpreter cannot is ruled out by construction:
#   fp32 products are in ieee precision (the default is tf32); row offsets are 64 bits (N * V is
#   3.3e9); no two programs write one element and there are no atomics; no thread of (a) reads in
#   its second walk what another has written: element for element, load then store, and the walks
#   are kept apart by the reductions of the first. A sum's order depends on the shapes alone: the
#   same bits twice.
#
# Sources: (b) is the idea of Apple's cut cross-entropy (Wijmans et al., arXiv 2411.09009), (a) is
# Liger-Kernel's fused linear cross-entropy (github.com/linkedin/Liger-Kernel), its row pass is also
# in quack (github.com/Dao-AILab/quack). Different here:
#   from cut cross-entropy: no atomics and locks, so deterministic; no gradient is filtered out as
#     too small; the entropy comes along; where weights are known (a) is used, 6NDV instead of the
#     8NDV of a recomputing backward pass;
#   from Liger: chunks are not made smaller as V/D grows; dW is summed in fp32 without being asked;
#     entropy; padding;
#   from quack: plain Triton for any shape; the row is read twice instead of being held by a cluster
#     of SMs.

# Bytes of a dtype: BLOCK_N, BLOCK_V, BLOCK_D, warps, stages. For 2 bytes: the largest tile whose
# sums fit the registers (128 of 255 a thread), with 3 stages of 48 KB. GPUs before Hopper keep both
# factors of a product in registers, too, and would spill some to memory: half of the columns.
TILES = {2: (128, 256, 64, 8, 3), 4: (64, 64, 32, 4, 2)}
SMALLER_TILES = {2: (128, 128, 64, 8, 3), 4: TILES[4]}
# Columns of a step of (a): 32 a thread of 8 warps; from 2048 on no element is held by two threads.
ROW_BLOCK = 8192
# Of (b): 8 * 16 programs are one wave on 132 SMs; together they read 8 MB of rows over and over and
# stream the head once a wave, which L2 (50 MB) bears. Constants, so that a row's sums do not depend
# on N.
SEGMENTS = 8
GROUP = 16

if triton is not None:

    @triton.jit
    def _online(m, s, e, y, x, hit):
        """Take further logits x (rows, columns) into m, s, e, y (rows,); hit marks the target's
        column."""
        top = tl.maximum(m, tl.max(x, 1))
        shifted = x - top[:, None]
        p = tl.exp(shifted)
        old = tl.exp(m - top)
        # -1e30: 0 * -inf would be NaN
        e = old * (e + s * (m - top)) + tl.sum(p * tl.maximum(shifted, -1e30), 1)
        s = old * s + tl.sum(p, 1)
        y = tl.maximum(y, tl.max(tl.where(hit, x, -float("inf")), 1))
        return top, s, e, y

    @triton.jit
    def _start(rows):
        """m, s, e, y before any logit. m is finite: -inf minus -inf would be NaN in a segment
        without columns."""
        zero = tl.zeros(rows.shape, tl.float32)
        return zero - 1e30, zero, zero, zero - float("inf")

    @triton.jit
    def _logits(hidden, head, rows, columns, D, inverse, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
        """(rows, columns) of hidden @ head.T / temperature in fp32. Indices are int64 and
        inside."""
        x = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for k in range(0, D, BLOCK_D):
            d = k + tl.arange(0, BLOCK_D)
            inside = (d < D) | EVEN
            a = tl.load(hidden + rows[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(head + columns[None, :] * D + d[:, None], mask=inside[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
        return x * inverse

    @triton.jit
    def _row_logits(logits, column, vocab, padded, inverse):
        """A step of a row, -inf in the padding. Loads of 16 bytes, as `padded` is round; a mask by
        vocab would make them 2."""
        x = tl.load(logits + column, mask=column < padded, other=0.0).to(tl.float32) * inverse
        return tl.where(column < vocab, x, -float("inf"))

    @triton.jit
    def _row_kernel(
        logits,
        target,
        weight,
        out,
        step,
        vocab,
        padded,
        inverse,
        z_loss,
        BLOCK: tl.constexpr,
    ):
        """(a): logits (C, padded) -> gradient of the loss, in place; out (4, C), its rows `step`
        apart: log-prob, entropy, lse."""
        rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        logits += rows[:, None] * padded
        t = tl.load(target + rows)
        w = tl.load(weight + rows)
        m, s, e, y = _start(rows)
        for first in range(0, vocab, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            x = _row_logits(logits, column, vocab, padded, inverse)
            m, s, e, y = _online(m, s, e, y, x, column == t[:, None])
        rest = tl.log(s)
        tl.store(out + rows, y - m - rest)
        tl.store(out + step + rows, rest - e / s)
        tl.store(out + 2 * step + rows, m)
        tl.store(out + 3 * step + rows, rest)
        scale = (w + 2 * z_loss * (m + rest)) / s
        for first in range(0, padded, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            x = _row_logits(logits, column, vocab, padded, inverse)
            g = tl.exp(x - m[:, None]) * scale[:, None]
            g = tl.where(column == t[:, None], g - w[:, None], g) * inverse
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < padded)

    @triton.jit
    def _log_prob_kernel(
        hidden,
        head,
        target,
        parts,
        N,
        D,
        vocab,
        inverse,
        BLOCK_N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        """(b) forward: m, s, e, y of BLOCK_N rows over one segment into parts (4, segments, N)."""
        block = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(rows, N - 1)  # rows past the end repeat the last one and are not stored
        t = tl.load(target + row)
        segment = tl.program_id(1)
        segments = tl.num_programs(1)
        tiles = tl.cdiv(vocab, BLOCK_V)
        m, s, e, y = _start(row)
        for tile in range(segment * tiles // segments, (segment + 1) * tiles // segments):
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
            inside = tl.minimum(column, vocab - 1)
            x = _logits(hidden, head, row, inside, D, inverse, BLOCK_D, EVEN)
            x = tl.where((column < vocab)[None, :], x, -float("inf"))
            m, s, e, y = _online(m, s, e, y, x, column[None, :] == t[:, None])
        out = parts + segment.to(tl.int64) * N + rows
        step = segments.to(tl.int64) * N
        tl.store(out, m, mask=rows < N)
        tl.store(out + step, s, mask=rows < N)
        tl.store(out + 2 * step, e, mask=rows < N)
        tl.store(out + 3 * step, y, mask=rows < N)

    @triton.jit
    def _gradient_kernel(
        hidden,
        head,
        target,
        lse,
        entropy,
        d_logp,
        d_entropy,
        grad,
        step,
        N,
        D,
        vocab,
        padded,
        inverse,
        BLOCK_N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
        EVEN: tl.constexpr,
    ):
        """(b) backward: one tile of the gradient in the logits, into grad (N, padded)."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.minimum(rows, N - 1)
        inside = tl.minimum(column, vocab - 1)
        x = _logits(hidden, head, row, inside, D, inverse, BLOCK_D, EVEN)
        log_p = x - tl.load(lse + row)[:, None] - tl.load(lse + step + row)[:, None]
        t = tl.load(target + row)
        a = tl.load(d_logp + row)
        b = tl.load(d_entropy + row)
        H = tl.load(entropy + row)
        g = -tl.exp(log_p) * (a[:, None] + b[:, None] * (log_p + H[:, None]))
        g = tl.where(column[None, :] == t[:, None], g + a[:, None], g) * inverse
        g = tl.where((column < vocab)[None, :], g, 0.0).to(grad.dtype.element_ty)
        place = grad + rows[:, None] * padded + column[None, :]
        tl.store(place, g, mask=(rows < N)[:, None] & (column < padded)[None, :])


def _tiles(hidden: Tensor) -> dict:
    """The settings of the kernels of (b)."""
    # on others, consumer Blackwell (12) too, the large tiles spill registers
    large = not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device)[0] in (9, 10)
    n, v, d, warps, stages = (TILES if large else SMALLER_TILES)[hidden.element_size()]
    even = hidden.shape[1] % d == 0
    return dict(BLOCK_N=n, BLOCK_V=v, BLOCK_D=d, EVEN=even, num_warps=warps, num_stages=stages)


def _launch_rows(logits, target, weight, out, vocab, temperature, z_loss):
    rows, padded = logits.shape
    numbers = out.stride(0), vocab, padded, 1 / temperature, z_loss
    _row_kernel[(rows,)](logits, target, weight, out, *numbers, BLOCK=ROW_BLOCK, num_warps=8)
    return logits


def _launch_log_probs(hidden, real, target, vocab, temperature):
    N, D = hidden.shape
    settings = _tiles(hidden)
    parts = torch.empty(4, SEGMENTS, N, device=hidden.device)
    blocks = triton.cdiv(N, settings["BLOCK_N"])
    if blocks:
        grid = min(GROUP, blocks), SEGMENTS, triton.cdiv(blocks, GROUP)
        numbers = N, D, vocab, 1 / temperature
        _log_prob_kernel[grid](hidden, real, target, parts, *numbers, **settings)
    m, s, e, y = parts
    top = m.amax(0)
    scale = (m - top).exp()
    total = (scale * s).sum(0)
    rest = total.log()
    logp = y.amax(0) - top - rest
    entropy = rest - (scale * (e + s * (m - top))).sum(0) / total
    return logp, entropy, torch.stack([top, rest])


def _launch_gradient(
    hidden, real, target, lse, entropy, d_logp, d_entropy, grad, vocab, temperature
):
    N, D = hidden.shape
    settings = _tiles(hidden)
    grid = triton.cdiv(N, settings["BLOCK_N"]), triton.cdiv(len(real), settings["BLOCK_V"])
    # The gradient of a sum is one number with stride 0.
    rows = lse, entropy, d_logp.contiguous(), d_entropy.contiguous()
    numbers = lse.stride(0), N, D, vocab, len(real), 1 / temperature
    _gradient_kernel[grid](hidden, real, target, *rows, grad, *numbers, **settings)
    return grad


# ------------------------------------------------------------------ the sampler's Triton kernels
#
# Attention of one new token a row, `attend_to_cache`, for each head:
#
# 1. shared: a program owns ROWS rows, in the order      2. own: a program owns a row, and walks
# of their questions, and walks over what they share:    over its keys and values SLOTS at a time:
#
#   rows      prefix        q0         q1                      T -->
#  +----+  +-------------+----------+- - - - - -+             +---+---+---+---+
#  | q0 |  | tile > tile > tile > ti|           |     slot 0  | 0 > 4 > 8 >12 |  up to the row's
#  | q0 |  |             |          |                      1  | 1 > 5 > 9 >   |  own length
#  | q1 |  |             + - - - - -+----------++          2  | 2 > 6 >10 >   |
#  | q1 |  |             |          > tile > ti|           3  | 3 > 7 >11 >   |
#  +----+  +-------------+- - - - - +----------+              +---+---+---+---+
#   m, s, y of each row: registers                         m, s, y of each slot: registers
#        -> y / s and m + log s, to memory                 + new token + shared -> y / s
#
# m = maximum, s = sum of exp(x - m), y = sum of exp(x - m) v, all in fp32.
#   shared: keys that many queries read are products on tensor cores (tl.dot). Each question in the
#     tile is walked over once for all its rows there; for the other rows its scores are -inf.
#   own: one query a key leaves nothing to multiply, and memory is the limit: 4K bytes a key in
#     bf16, in copies of 16 bytes a thread, two steps ahead. Each slot has sums of its own: threads
#     meet only at the end, where the slots, the new token and the shared part, which is one value
#     y / s with the score m + log s, are joined.
# There are no atomics, and what a row's sums are made of, and in which order, is given by the row's
# own lengths: the same bits twice, whatever rows are beside it. Lengths are read on the device: a
# captured graph serves all of them. Compiled for sm_90, own takes 49 instructions of a warp for a
# key and its value (python tests/ahead.py).
#
# Sources: parts of a cache joined by their log-sum-exp are Flash-Decoding (Dao et al. 2023); a
# shared part as one product for all its rows is Hydragen (Juravsky et al., arXiv 2402.05099).
#
# The draw, `choose`: a program owns a row of logits, reads it once, and keeps of each BLOCK ids
# their maximum and their sums in fp32; these, 98 for 100,278 ids, are summed in fp64. The uniform
# number picks a block; that one is read again, and summed in fp64, to pick the id.

ROWS_SHARED = 32  # two tiles for 64 answers to a question, four questions in a tile for 8
TILE = {2: 64, 4: 16}  # keys, by the bytes of a number: more of fp32 would spill to memory
SLOTS = 16  # 8 a warp: y has 32 registers a thread
BLOCK_DRAW = 1024  # see the bound in `choose`
BLOCKS_DRAW = 8  # of a step: 32 ids a thread of 8 warps


if triton is not None:

    @triton.jit
    def _walk(
        m, s, y, query, mine, keys, values, length, scale, K: tl.constexpr, TILE: tl.constexpr
    ):
        """Take `length` keys and values (length, K) into m, s (rows,), y (rows, HEAD) of the rows
        that are `mine`."""
        d = tl.arange(0, query.shape[1])
        for first in range(0, length, TILE):
            column = first + tl.arange(0, TILE)
            at = column[:, None] * K + d[None, :]
            inside = (column < length)[:, None] & (d < K)[None, :]
            key = tl.load(keys + at, mask=inside, other=0.0)
            value = tl.load(values + at, mask=inside, other=0.0)
            x = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            x = tl.where(mine[:, None] & (column < length)[None, :], x, -float("inf"))
            top = tl.maximum(m, tl.max(x, 1))
            p = tl.exp(x - top[:, None])
            old = tl.exp(m - top)
            s = old * s + tl.sum(p, 1)
            y = tl.dot(p.to(value.dtype), value, y * old[:, None], input_precision="ieee")
            m = top
        return m, s, y

    @triton.jit
    def _shared_kernel(
        q,
        prompt,
        prefix,
        group,
        size,
        shared,
        score,
        prompt_values,
        prompt_question,
        prompt_head,
        prefix_values,
        prefix_head,
        R,
        S,
        scale,
        K: tl.constexpr,
        HEAD: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Prefix and prompts: q (R, H, K) -> shared (R, H, K), score (R, H). `_values`: from a key
        to its value; `_question`, `_head`: from one to the next."""
        head = tl.program_id(1)
        heads = tl.num_programs(1)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(rows, R - 1)  # rows past the end repeat the last one and are not stored
        d = tl.arange(0, HEAD)
        here = (row.to(tl.int64) * heads + head)[:, None] * K + d[None, :]
        query = tl.load(q + here, mask=(d < K)[None, :], other=0.0)
        question = tl.load(group + row).to(tl.int32)
        m = tl.zeros((ROWS,), tl.float32) - 1e30
        s = tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS, HEAD), tl.float32)
        keys = prefix + head.to(tl.int64) * prefix_head
        m, s, y = _walk(m, s, y, query, rows >= 0, keys, keys + prefix_values, S, scale, K, TILE)
        g = tl.min(question)
        while g < 2**30:  # each question that one of the rows has
            mine = question == g
            length = tl.load(size + g).to(tl.int32)
            keys = prompt + g.to(tl.int64) * prompt_question + head.to(tl.int64) * prompt_head
            values = keys + prompt_values
            m, s, y = _walk(m, s, y, query, mine, keys, values, length, scale, K, TILE)
            g = tl.min(tl.where(question > g, question, 2**30))
        inside = (rows < R)[:, None] & (d < K)[None, :]
        tl.store(shared + here, y / s[:, None], mask=inside)
        tl.store(score + row.to(tl.int64) * heads + head, m + tl.log(s), mask=rows < R)

    @triton.jit
    def _own_kernel(
        q,
        k,
        v,
        own,
        length,
        shared,
        score,
        out,
        v_row,
        own_values,
        own_row,
        own_head,
        scale,
        K: tl.constexpr,
        HEAD: tl.constexpr,
        SLOTS: tl.constexpr,
    ):
        """The row's own tokens, the new one, and the shared part: -> out (R, H, K)."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        heads = tl.num_programs(1)
        d = tl.arange(0, HEAD)
        inside = d < K
        here = (row * heads + head) * K + d
        query = tl.load(q + here, mask=inside, other=0.0).to(tl.float32) * scale
        keys = own + row * own_row + head * own_head.to(tl.int64)
        values = keys + own_values
        t = tl.load(length + row).to(tl.int32)
        m = tl.zeros((SLOTS,), tl.float32) - 1e30
        s = tl.zeros((SLOTS,), tl.float32)
        y = tl.zeros((SLOTS, HEAD), tl.float32)
        # stages: the next steps are on their way (cp.async) while one is summed
        for first in tl.range(0, t, SLOTS, num_stages=3):
            column = first + tl.arange(0, SLOTS)
            at = column[:, None] * K + d[None, :]
            read = (column < t)[:, None] & inside[None, :]
            key = tl.load(keys + at, mask=read, other=0.0).to(tl.float32)
            value = tl.load(values + at, mask=read, other=0.0).to(tl.float32)
            x = tl.where(column < t, tl.sum(key * query[None, :], 1), -float("inf"))
            top = tl.maximum(m, x)
            p = tl.exp(x - top)
            old = tl.exp(m - top)
            s = old * s + p
            y = old[:, None] * y + p[:, None] * value
            m = top
        key = tl.load(k + here, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + row * v_row + head * K + d, mask=inside, other=0.0).to(tl.float32)
        new = tl.sum(key * query, 0)
        rest = tl.load(score + row * heads + head)
        top = tl.maximum(tl.maximum(new, rest), tl.max(m, 0))
        old = tl.exp(m - top)
        new = tl.exp(new - top)
        rest = tl.exp(rest - top)
        total = tl.sum(old * s, 0) + new + rest
        joined = tl.sum(old[:, None] * y, 0) + new * value
        joined += rest * tl.load(shared + here, mask=inside, other=0.0)
        tl.store(out + here, (joined / total).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _draw_kernel(
        logits,
        noise,
        token,
        logp,
        vocab,
        row_length,
        inverse,
        GREEDY: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCKS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """A row of logits and a number in [0, 1) -> token (R,), logp (2, R); see `choose`. STEPS is
        a power of two with STEPS * BLOCKS * BLOCK >= vocab."""
        row = tl.program_id(0).to(tl.int64)
        rows = tl.num_programs(0)
        logits += row * row_length
        steps = tl.arange(0, STEPS)[:, None]
        within = tl.arange(0, BLOCK)
        m = tl.zeros((STEPS, BLOCKS), tl.float32) - 1e30
        s = tl.zeros((STEPS, BLOCKS), tl.float32)  # at the temperature
        s_1 = tl.zeros((STEPS, BLOCKS), tl.float32)  # at 1
        for step in range(0, tl.cdiv(vocab, BLOCKS * BLOCK)):
            block = step * BLOCKS + tl.arange(0, BLOCKS)
            column = block[:, None] * BLOCK + within[None, :]
            x = _row_logits(logits, column, vocab, row_length, 1.0)
            top = tl.maximum(tl.max(x, 1), -1e30)  # -inf minus -inf would be NaN
            x -= top[:, None]
            here = steps == step
            m = tl.where(here, top[None, :], m)
            s = tl.where(here, tl.sum(tl.exp(x * inverse), 1)[None, :], s)
            s_1 = tl.where(here, tl.sum(tl.exp(x), 1)[None, :], s_1)
        m = tl.reshape(m, (STEPS * BLOCKS,))
        top = tl.max(m, 0)
        total_1 = tl.sum(tl.reshape(s_1, (STEPS * BLOCKS,)) * tl.exp(m - top), 0)
        mass = tl.reshape(s, (STEPS * BLOCKS,)).to(tl.float64)
        mass *= tl.exp((m - top) * inverse).to(tl.float64)
        blocks = tl.arange(0, STEPS * BLOCKS)
        last = tl.cdiv(vocab, BLOCK) - 1
        if GREEDY:
            block = tl.min(tl.where(m == top, blocks, last), 0)
            part = 0.0
        else:
            sums = tl.cumsum(mass, 0)
            point = tl.load(noise + row) * tl.sum(mass, 0)
            block = tl.minimum(tl.sum((sums <= point).to(tl.int32), 0), last)
            before = tl.max(tl.where(blocks < block, sums, 0.0), 0)
            part = (point - before) / tl.sum(tl.where(blocks == block, mass, 0.0), 0)
        x = _row_logits(logits, block * BLOCK + within, vocab, row_length, 1.0)
        high = tl.max(x, 0)
        last = tl.minimum(BLOCK, vocab - block * BLOCK) - 1
        if GREEDY:
            place = tl.min(tl.where(x == high, within, last), 0)
        else:
            p = tl.exp((x - high) * inverse).to(tl.float64)
            sums = tl.cumsum(p, 0)
            place = tl.sum((sums <= part * tl.sum(p, 0)).to(tl.int32), 0)
            place = tl.minimum(place, last)
        x = tl.sum(tl.where(within == place, x, 0.0), 0) - top
        tl.store(token + row, (block * BLOCK + place).to(tl.int64))
        if GREEDY:
            tl.store(logp + row, x - tl.log(total_1))
        else:
            tl.store(logp + row, x * inverse - tl.log(tl.sum(mass, 0).to(tl.float32)))
        tl.store(logp + rows + row, x - tl.log(total_1))


# An operator of its own: a compiled block calls it as it is.
@torch.library.custom_op("excursions::attend", mutates_args=())
def _attend_by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Tensor,
    prompt: Tensor,
    prefix: Tensor | None,
    length: Tensor,
    group: Tensor,
    size: Tensor,
) -> Tensor:
    """`attend_to_cache` by the kernels: the fields of Cache and, of Place, those it needs."""
    R, H, K = q.shape
    widths = dict(K=K, HEAD=max(16, triton.next_power_of_2(K)))
    shared = torch.empty(R, H, K, dtype=torch.float32, device=q.device)
    score = torch.empty(R, H, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    S = 0 if prefix is None else prefix.shape[2]
    before = prompt[:, 0] if prefix is None else prefix  # (2, H, S, K)
    strides = *prompt.stride()[:3], *before.stride()[:2]
    numbers = *strides, R, S, K**-0.5
    parts = shared, score
    tile = TILE[q.element_size()]
    _shared_kernel[triton.cdiv(R, ROWS_SHARED), H](
        q, prompt, before, group, size, *parts, *numbers, **widths, ROWS=ROWS_SHARED, TILE=tile
    )
    strides = v.stride(0), *own.stride()[:3]
    _own_kernel[R, H](
        q, k, v, own, length, *parts, out, *strides, K**-0.5, **widths, SLOTS=SLOTS, num_warps=2
    )
    return out


@_attend_by_kernels.register_fake
def _(q, *rest):
    return torch.empty_like(q)


def _launch_draw(logits: Tensor, u: Tensor, temperature: float):
    R, V = logits.shape
    token = torch.empty(R, 1, dtype=torch.long, device=logits.device)
    logp = torch.empty(2, R, 1, dtype=torch.float32, device=logits.device)
    steps = triton.next_power_of_2(triton.cdiv(V, BLOCKS_DRAW * BLOCK_DRAW))
    numbers = V, logits.stride(0), 1 / (temperature or 1)
    blocks = dict(STEPS=steps, BLOCKS=BLOCKS_DRAW, BLOCK=BLOCK_DRAW)
    greedy = temperature == 0
    _draw_kernel[(R,)](logits, u, token, logp, *numbers, GREEDY=greedy, **blocks, num_warps=8)
    return token, logp
