"""transformers' Olmo2ForCausalLM with the weights of a model of ours: an independent reference."""

PLAIN = {
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "down": "mlp.down_proj",
    "attention_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}
FUSED = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
}


def transformers_twin(model, padding=True, **more):
    """On the CPU, in the dtype of the model's weights.

    padding: whether the rows of embedding and head that are no ids come along, too. more: of the
    Olmo2Config.
    """
    from transformers import Olmo2Config, Olmo2ForCausalLM

    c = model.config
    rows = c.padded_vocab if padding else c.vocab
    config = Olmo2Config(
        vocab_size=rows,
        hidden_size=c.width,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )
    twin = Olmo2ForCausalLM(config).to(model.head.weight.dtype)
    twin.load_state_dict(renamed(dict(model.named_parameters()), rows), strict=True)
    return twin


def renamed(tensors: dict, rows: int) -> dict:
    """Our names and fused matrices -> transformers' names; works for weights and for gradients.

    rows: of embedding and head.
    """
    out = {
        "model.embed_tokens.weight": tensors["embed.weight"][:rows],
        "lm_head.weight": tensors["head.weight"][:rows],
        "model.norm.weight": tensors["norm.weight"],
    }
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            _, layer, part, _ = name.split(".")
            names = FUSED.get(part) or [PLAIN[part]]
            for theirs, piece in zip(names, tensor.chunk(len(names)), strict=True):
                out[f"model.layers.{layer}.{theirs}.weight"] = piece
    return {name: tensor.detach() for name, tensor in out.items()}
