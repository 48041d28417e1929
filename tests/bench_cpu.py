"""Tokens a second of rollouts and of training beside the same model in transformers, on this machine, in one run.

    python tests/bench_cpu.py [--json]

Same weights, same shapes, fp32: our sampler compiled as in rl.py, transformers' `generate` with its default cache, no top-k,
every answer exactly NEW tokens. The training row is that of bench_pretrain.py. The two sides take turns, and the ratio is the
median over the turns, because the speed of a shared machine drifts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import Olmo2Config, Olmo2ForCausalLM  # noqa: E402

from data import tokens  # noqa: E402
from model import PRESETS, Model, ModelConfig, Sampler  # noqa: E402

PROMPT, NEW, GROUP = 24, 32, 8  # a default-world question and answer


def transformers_twin(model) -> Olmo2ForCausalLM:
    """transformers' Olmo2ForCausalLM with the weights of `model`."""
    c = model.config
    twin = Olmo2ForCausalLM(Olmo2Config(
        vocab_size=c.padded_vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.heads, max_position_embeddings=c.context, rms_norm_eps=c.eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta}, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ))  # fmt: skip
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}
    for i, b in enumerate(model.blocks):
        q, k, v = b.qkv.weight.chunk(3)
        gate, up = b.gate_up.weight.chunk(2)
        names = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": b.out.weight,
            "self_attn.q_norm": b.q_norm.weight, "self_attn.k_norm": b.k_norm.weight,
            "post_attention_layernorm": b.attention_norm.weight, "post_feedforward_layernorm": b.mlp_norm.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": b.down.weight,
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in names.items()}
    twin.load_state_dict({name: w.detach().clone() for name, w in weights.items()}, strict=True)
    return twin


def turns(ours, theirs, count: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median over turns of theirs / ours."""
    ours(), theirs()
    pairs = []
    for _ in range(count):
        pair = []
        for side in (ours, theirs):
            began = time.perf_counter()
            side()
            pair.append(time.perf_counter() - began)
        pairs.append(pair)
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def rollouts(model, twin, batch: int, count: int):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab, (batch // GROUP, PROMPT), generator=generator)
    sampler, never = Sampler(model, rows=batch, compile=True), [model.config.vocab]  # an end token that is never drawn
    expanded = prompts.repeat_interleave(GROUP, 0)

    def ours():
        sampler(prompts.tolist(), GROUP, NEW, list(range(batch)), never)

    def theirs():
        with torch.inference_mode():
            twin.generate(expanded, attention_mask=torch.ones_like(expanded), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                          max_new_tokens=NEW, min_new_tokens=NEW)  # fmt: skip

    a, b, ratio = turns(ours, theirs, count)
    return batch * NEW / a, batch * NEW / b, ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    args = parser.parse_args()
    vocab = tokens.VOCABULARY["toy"]
    model = Model(ModelConfig(**PRESETS["toy"], vocab=vocab, padded_vocab=-(-vocab // 128) * 128)).init_weights(0)
    twin = transformers_twin(model).eval()
    figures, table = {}, []
    for batch in (64, 512):
        *speeds, ratio = rollouts(model, twin, batch, args.turns)
        figures[f"rollout_vs_transformers_b{batch}"] = round(ratio, 3)
        table.append((f"rollout, {batch} rows, {PROMPT} + {NEW} tokens", *speeds, ratio))
    command = [sys.executable, str(Path(__file__).with_name("bench_pretrain.py")), "--json", "--turns", str(args.turns)]
    step = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    speeds = [step["sides"][side]["tokens_per_s"] for side in ("ours", "transformers")]
    figures["train_vs_transformers"] = step["vs_transformers"]
    table.append(("training step, 8 x 256 tokens", *speeds, step["vs_transformers"]))
    size = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, toy model of {size:,} parameters")
    print(f"{'':42}{'ours':>12}{'transformers':>14}{'ratio':>8}   (tokens/s)")
    for name, a, b, r in table:
        print(f"{name:42}{a:12,.0f}{b:14,.0f}{r:8.2f}")
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
