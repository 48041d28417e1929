"""Public checkpoints: OLMo2 in Hugging Face form to our one file, and back to a folder.

    python data/hf.py import allenai/OLMo-2-0425-1B ckpt/olmo2/step10000.pt \\
        --revision stage1-step10000-tokens21B
    python data/hf.py import FOLDER ckpt/olmo2/mine.pt --tokens 21e9
    python data/hf.py export ckpt/1b/step5000.pt FOLDER          # `transformers` loads it

The weights go through bit for bit, both ways. Only safetensors are read: nothing in a checkpoint
is ever executed. In memory: the weights once (5.9 GB for the 1B in fp32), and the largest file of
a folder where its dtype is converted.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from common import Count, Whole  # noqa: E402
from data import files, tokens  # noqa: E402
from model import PRESETS, ModelConfig, round_up  # noqa: E402


@dataclass(frozen=True)
class Import:
    # folder with config.json and safetensors, or a hub id such as allenai/OLMo-2-0425-1B
    source: str
    out: str  # checkpoint to write
    revision: str = ""  # branch of the hub id; beside a folder it only names the checkpoint
    # of pre-training (default: from the revision's or the folder's name, step10000-tokens21B)
    tokens: Count | None = None
    questions: str = ""  # questions that rl.py, sft.py, mix.py and eval.py take by default
    tasks: str = ""  # general-capability tasks that eval.py takes by default
    # name of the pre-training text, in rows and reports (OLMo2's first stage)
    world: str = "olmo-mix-1124"
    seed: Whole = 0  # pre-training seed, in rows and reports: number the runs of one size
    overwrite: bool = False  # replace what is there


@dataclass(frozen=True)
class Export:
    checkpoint: str  # what to export
    folder: str  # new or empty
    # of the weights: auto (as they are, float32), float32 or bfloat16
    dtype: str = "auto"
    shard: str = "1GB"  # largest file, unless one matrix is larger
    # false: leave out the rows of embedding and head that are no id, then log-probs are as ours
    padding: bool = True


LAYER = {  # ours -> theirs, stacked in this order
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",),
    "attention_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "mlp_norm": ("post_feedforward_layernorm",),
}


def layout(c: ModelConfig) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Our tensors -> the names of theirs that are stacked in it, and the shape of each of those."""
    D = c.width
    F = c.ffn
    V = c.padded_vocab
    shapes = {
        "qkv": (D, D),
        "out": (D, D),
        "gate_up": (F, D),
        "down": (D, F),
    }  # the others are norms
    found = {"embed.weight": (["model.embed_tokens.weight"], (V, D))}
    for i, (ours, theirs) in itertools.product(range(c.layers), LAYER.items()):
        names = [f"model.layers.{i}.{name}.weight" for name in theirs]
        found[f"blocks.{i}.{ours}.weight"] = (names, shapes.get(ours, (D,)))
    found["norm.weight"] = (["model.norm.weight"], (D,))
    return found | {"head.weight": (["lm_head.weight"], (V, D))}


# ----------------------------------------------------------------------------------- import

SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "padded_vocab": "vocab_size",
    "context": "max_position_embeddings",
}
FIXED = {
    "model_type": "olmo2",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
DTYPES = ("F32", "BF16", "F16")  # all of them fit fp32 exactly
PROBE = (
    "Question: it's 12345 + 1,234 = $5?\n\n\tAnswer:  DON'T  \r\n #### 18\n  e\u0301lan "
    "\u6771\u4eac \U0001f600 |||"
)


def read_config(path) -> tuple[ModelConfig, str]:
    """ModelConfig and encoding of a config.json.

    Raises ValueError for whatever model.py would compute otherwise, or not at all.
    """
    config = files.read_json(path, "a checkpoint in Hugging Face form has it")

    def refuse(name, value, want):
        raise ValueError(f"{path}: {name} is {value!r}, only {want} is OLMo2 as model.py has it")

    if config.get("model_type") is None:
        refuse("model_type", None, "'olmo2'")
    for name, want in FIXED.items():
        if config.get(name, want) != want:
            refuse(name, config[name], repr(want))
    size = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    for ours, value in size.items():
        if type(value) is not int or value < 1:
            refuse(SIZES[ours], value, "a whole number from 1")
    heads = size["heads"]
    head = size["width"] // heads
    if config.get("num_key_value_heads", heads) != heads:
        want = f"as many as num_attention_heads ({heads})"
        refuse("num_key_value_heads", config["num_key_value_heads"], want)
    if size["width"] % heads or head % 2 or config.get("head_dim", head) != head:
        refuse("head_dim", config.get("head_dim"), f"an even {size['width']} / {heads}")
    ropes = {name: dict(config.get(name) or {}) for name in ("rope_scaling", "rope_parameters")}
    places = (dict(config), *ropes.values())  # of transformers 4, and of 5
    thetas = [rope.pop("rope_theta") for rope in places if "rope_theta" in rope]
    for name, rope in ropes.items():
        # nothing but rope_type is left, or RoPE is scaled
        if any(kind != "default" for kind in rope.values()):
            refuse(name, config[name], "plain RoPE")
    if not thetas or any(theta != thetas[0] for theta in thetas):
        refuse("rope_theta", thetas, "one number")
    numbers = {"rope_theta": thetas[0], "rms_norm_eps": config.get("rms_norm_eps")}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            refuse(name, value, "a number above 0")
    for encoding, vocab in tokens.VOCABULARY.items():
        if size["padded_vocab"] in (vocab, padded(vocab)):
            numbers = {"theta": float(thetas[0]), "eps": float(config["rms_norm_eps"])}
            return ModelConfig(**size, vocab=vocab, **numbers), encoding
    known = [f"{vocab} or {padded(vocab)} ({name})" for name, vocab in tokens.VOCABULARY.items()]
    has = size["padded_vocab"]
    raise ValueError(f"{path}: vocab_size is {has}, the encodings here have {', '.join(known)}")


def padded(vocab: int) -> int:
    return round_up(vocab, 128)


def check_tokenizer(path, enc):
    """ValueError if the tokenizer that comes with a checkpoint gives other ids than ours."""
    try:
        theirs = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"cannot read {path} ({error})") from None
    same = theirs.encode(PROBE, add_special_tokens=False).ids == enc.encode_ordinary(PROBE)
    if not same or theirs.token_to_id("<|endoftext|>") != enc.eot_token:
        raise ValueError(f"{path} is not {enc.name}: the checkpoint was trained on other ids")


def weight_files(folder) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        why = "nothing to read"
        if any(folder.glob("*.bin")):
            why = "pickles (.bin) can run code when they are read and are refused"
        raise ValueError(f"{folder} has no model.safetensors and no {index.name}: {why}")
    listed = files.read_json(index, "download it again").get("weight_map", {}).values()
    names = sorted(set(map(str, listed)))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(
            f"{index} names {len(names)} files, {folder} lacks {', '.join(missing) or 'all'}: "
            "download it again"
        )
    return [folder / name for name in names]


def open_weights(folder, stack) -> dict:
    """{name of a tensor: the open file that has it}; `stack` closes the files."""
    where = {}
    try:
        for file in weight_files(folder):
            with open(file, "rb") as raw:
                files.refuse_pointer(raw.read(64), file)
            handle = stack.enter_context(safe_open(file, "pt"))
            for name in handle.keys():
                if name in where:
                    raise ValueError(f"{file}: {name} is also in another file of {folder}")
                where[name] = handle
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}): download it again"
        ) from None
    return where


def check_tensors(folder, where, c: ModelConfig):
    """Raises ValueError if the tensors are not those of config.json; none is read."""
    if c.layers > len(where):  # or as many names as it claims would be made
        raise ValueError(
            f"{folder}: its config.json has {c.layers} layers, its files {len(where)} tensors"
        )
    expected = {name: shape for names, shape in layout(c).values() for name in names}
    if odd := sorted(expected.keys() ^ where.keys()):
        what = "missing" if odd[0] in expected else "nothing that OLMo2 has"
        raise ValueError(f"{folder}: {odd[0]} is {what} ({len(odd)} such tensors)")
    for name, shape in expected.items():
        part = where[name].get_slice(name)
        if tuple(part.get_shape()) != shape or part.get_dtype() not in DTYPES:
            raise ValueError(
                f"{folder}: {name} is {part.get_dtype()} {part.get_shape()}, its config.json needs "
                f"{list(shape)} in one of {', '.join(DTYPES)}"
            )


def read_weights(folder, c: ModelConfig) -> tuple[dict[str, torch.Tensor], str]:
    """Our state dict in fp32, and a hash of it.

    All names and shapes are checked before the first weight is read. Raises ValueError for them,
    and for a weight that is NaN or infinite.
    """
    with contextlib.ExitStack() as stack:
        where = open_weights(folder, stack)
        check_tensors(folder, where, c)
        weights = {}
        digest = hashlib.sha256()
        with tqdm(total=len(where), desc="reading", unit=" tensors") as bar:
            for ours, (names, shape) in layout(c).items():
                weights[ours] = torch.empty(len(names) * shape[0], *shape[1:])
                # one at a time: of the files only this one is in memory
                for rows, name in zip(weights[ours].chunk(len(names)), names, strict=True):
                    rows.copy_(where[name].get_tensor(name))
                    check_finite(rows, f"{folder}: {name}", "take another revision")
                    bar.update()
                digest.update(weights[ours].numpy())
    return weights, digest.hexdigest()[:12]


def check_finite(tensor, where: str, way_out: str):
    """Raises ValueError if a weight is NaN or infinite: a model with it answers nothing."""
    broken = tensor.numel() - int(torch.isfinite(tensor).sum())
    if broken:
        raise ValueError(
            f"{where} has {broken:,} of {tensor.numel():,} weights that are NaN or infinite: "
            f"{way_out}"
        )


def pretraining_of(cfg: Import) -> tuple[int, int]:
    """Step and tokens of pre-training, from a name like step10000-tokens21B or from --tokens."""
    name = cfg.revision or Path(cfg.source).resolve().name
    match = re.search(r"step(\d+)-tokens(\d+)B", name)
    # a second stage counts its own tokens only
    if cfg.tokens is None and (not match or "stage2" in name):
        raise ValueError(
            f"{name!r} does not say after how many tokens of pre-training this is: give --tokens, "
            "21e9 for instance"
        )
    step = int(match[1]) if match else 0
    return step, int(match[2]) * 10**9 if cfg.tokens is None else cfg.tokens


def folder_of(cfg: Import) -> Path:
    """The folder cfg.source, or what the hub has under that id and revision."""
    if Path(cfg.source).is_dir():
        return Path(cfg.source)
    names = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        found = huggingface_hub.snapshot_download(
            cfg.source, revision=cfg.revision or None, allow_patterns=names
        )
    except (OSError, ValueError) as error:
        at = cfg.revision or "main"
        raise ValueError(
            f"{cfg.source} is no folder here, and the hub does not give it at {at}: {error}"
        ) from None
    return Path(found)


def import_folder(cfg: Import):
    """An OLMo2 checkpoint of Hugging Face form to one file that every stage takes as --init."""
    if Path(cfg.out).exists() and not cfg.overwrite:
        raise ValueError(f"{cfg.out} exists: --overwrite replaces it")
    step, count = pretraining_of(cfg)
    folder = folder_of(cfg)
    config, encoding = read_config(folder / "config.json")
    if (folder / "tokenizer.json").is_file():
        check_tokenizer(folder / "tokenizer.json", tokens.encoding(encoding))
    weights, content = read_weights(folder, config)
    meta = common.new_meta(
        cfg,
        {"source": content},
        stage="pretrain",
        recipe="base",
        step=step,
        tokens=count,
        parent=cfg.source + (f"@{cfg.revision}" if cfg.revision else ""),
        parent_hash=content,
        preset=preset_of(config),
        encoding=encoding,
        world=cfg.world,
        pretrain_seed=cfg.seed,
        questions=cfg.questions,
        tasks=cfg.tasks,
    )
    print(f"writing {cfg.out}", flush=True)
    model = SimpleNamespace(config=config, state_dict=lambda: weights)  # what `save` needs of one
    common.save(cfg.out, model, meta)
    total = sum(w.numel() for w in weights.values())
    print(
        f"{cfg.out}: {meta['preset']}, {total:,} parameters, step {step}, {count / 1e9:g}B tokens, "
        f"{encoding}"
    )
    print(f"next: python rl.py --init {cfg.out}" + ("" if cfg.questions else " --questions FOLDER"))


def preset_of(config: ModelConfig) -> str:
    """The name of a size in model.PRESETS; another one is named by its layers and width."""
    for name, preset in PRESETS.items():
        sizes = ("layers", "width", "heads", "ffn")
        if all(preset[size] == getattr(config, size) for size in sizes):
            return name
    return f"{config.layers}x{config.width}"


# ----------------------------------------------------------------------------------- export

EXTRA = [f"<|extra_id_{i}|>" for i in range(11)]
NAMED = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
NAMED += ["|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||"]
NAMED += ["<|im_start|>", "<|im_end|>"]
OLMO2 = [EXTRA[0], *NAMED, *EXTRA[1:], "<|endofprompt|>", tokens.PAD]  # ids 100256 and up


def tokenizer_of(enc) -> Tokenizer:
    """The encoding in the `tokenizers` library: every text gets the ids that tokens.py gives it.

    tiktoken merges any two neighbours whose bytes together are a token, the lowest id first; here
    that is a list of all such pairs. Bytes are shown as GPT-2's printable letters. cl100k_base
    gets OLMo2's 22 special tokens, 100256 and up.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = sorted({*range(256)} - {*plain})
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = enc._mergeable_ranks
    vocab = {}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        text = "".join(letters[byte] for byte in token)
        vocab[text] = rank
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((text[:i], text[i:]))
    special = enc._special_tokens
    if enc.name == "cl100k_base":
        special = {text: 100256 + i for i, text in enumerate(OLMO2)}
    # whole words come before merges, as in tiktoken
    made = Tokenizer(models.BPE(vocab | special, merges, ignore_merges=True))
    pattern = enc._pat_str.replace("{1,3}+", "{1,3}")  # Oniguruma reads it as "once or more"
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    made.decoder = decoders.ByteLevel()
    ordered = sorted(special, key=special.get)
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ordered])
    return made


def config_of(c: ModelConfig, rows: int, enc, dtype: str) -> dict:
    """config.json for transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype)."""
    sizes = {theirs: getattr(c, ours) for ours, theirs in SIZES.items()} | {"vocab_size": rows}
    fixed = {name: value for name, value in FIXED.items() if value is not None}
    return {
        "architectures": ["Olmo2ForCausalLM"],
        **fixed,
        **sizes,
        "num_key_value_heads": c.heads,
        "rms_norm_eps": c.eps,
        "rope_theta": c.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": enc.eot_token,
        "pad_token_id": tokens.pad_id(enc),
        # the first with OLMo2; without one, 4.57 takes the tokenizer for Mistral's and warns
        "transformers_version": "4.47.0",
    }


def write_folder(new, weights: dict, c: ModelConfig, rows: int, enc, dtype, shard: str):
    """All files of an exported model. rows: of embedding and head; shard: largest file, "1GB"."""
    tensors = {}
    for ours, (names, _) in layout(c).items():
        padded_ones = ours in ("embed.weight", "head.weight")
        whole = weights[ours][:rows] if padded_ones else weights[ours]
        tensors |= zip(names, whole.chunk(len(names)), strict=True)  # views, no copies
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: t.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard,
    )
    for file, names in tqdm(split.filename_to_tensors.items(), desc="writing", unit=" files"):
        part = {name: tensors[name].to(dtype) for name in names}
        for name, tensor in part.items():
            check_finite(tensor, f"{name} as {dtype}", "export another checkpoint, or --dtype auto")
        save_file(part, new / file, metadata={"format": "pt"})
    for file, content in texts_of(c, rows, enc, dtype, split).items():
        files.write_json(new / file, content)
    tokenizer_of(enc).save(str(new / "tokenizer.json"), pretty=False)


def texts_of(c: ModelConfig, rows: int, enc, dtype, split) -> dict[str, dict]:
    """{name: content} of the JSON files beside the weights."""
    generation = {"eos_token_id": enc.eot_token, "pad_token_id": tokens.pad_id(enc)}
    if rows > c.vocab:  # our softmax leaves the padding out, theirs does not
        generation["suppress_tokens"] = list(range(c.vocab, rows))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": tokens.PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.context,
        # a special token spelled out in a text stays text, as in data/tokens.py
        "split_special_tokens": True,
    }
    texts = {
        "config.json": config_of(c, rows, enc, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
    }
    if split.is_sharded:
        where = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        texts["model.safetensors.index.json"] = where
    return texts


def export_folder(cfg: Export):
    """A checkpoint of ours to a folder that transformers loads: weights, configs, tokenizer."""
    folder = Path(cfg.folder)
    new = Path(f"{folder}.new")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not an empty folder: nothing in it is replaced, name another"
        )
    saved = common.load(cfg.checkpoint)
    c = ModelConfig(**saved["config"])
    expected = layout(c).items()
    wanted = {ours: (len(names) * shape[0], *shape[1:]) for ours, (names, shape) in expected}
    if {name: tuple(w.shape) for name, w in saved["model"].items()} != wanted:
        raise ValueError(
            f"{cfg.checkpoint} is of another model than its config says: it cannot be exported"
        )
    own = saved["model"]["embed.weight"].dtype
    known = {"auto": own, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if cfg.dtype not in known:
        raise ValueError(f"--dtype takes {', '.join(known)}, not {cfg.dtype!r}")
    rows = c.padded_vocab if cfg.padding else c.vocab
    enc = tokens.encoding(saved["meta"]["encoding"])
    shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
    new.mkdir(parents=True)
    try:
        write_folder(new, saved["model"], c, rows, enc, known[cfg.dtype], cfg.shard)
        os.replace(new, folder)
    except SafetensorError as error:
        raise ValueError(f"could not write {folder}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    print(f"{folder}: {size:.2f} GB; AutoModelForCausalLM and AutoTokenizer load it")
    if rows > c.vocab:
        print(
            f"the last {rows - c.vocab} rows of its embedding and head are no ids: generate() "
            "keeps off them, other code gives them probability (--padding false leaves them out)"
        )


COMMANDS = {"import": (Import, import_folder), "export": (Export, export_folder)}


def main(argv):
    common.commands(COMMANDS, __doc__, argv, placed=2)


if __name__ == "__main__":
    main(sys.argv[1:])
