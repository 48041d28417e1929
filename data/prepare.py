"""Make the data that the stages read: python data/prepare.py COMMAND [flags]

toy      the default world, generated; nothing is downloaded
dolmino  the pre-training mix of the paper, from the Hugging Face hub or from --source FOLDER, to cl100k_base shards
text     your own text to cl100k_base shards: --source FOLDER of .txt and .jsonl ("text" field), .gz, .zst or neither
gsm8k, math, openmath    questions, from the hub or from --source FOLDER
split    easy and hard questions, by how often a checkpoint solved them
tasks    the six general-capability benchmarks, from the hub or from --source FOLDER
Each makes one folder, with its settings in world.json, and has its flags under --help. A dolmino or text command that was
cut off goes on when it is given again.
"""

import array
import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import checkpoint, corpus, questions, run, tasks, tokens, toy  # noqa: E402
from data.folder import new_folder, note, read_world, settings, write_rows  # noqa: E402
from data.questions import Gsm8k, Math, OpenMath, check_apart, make_gsm8k, make_math, make_openmath, write_questions  # noqa: E402

# ---- the default world


@dataclass(frozen=True)
class Toy:
    out: str = "data/out/toy"  # the folder to make
    tokens: int = 7_200_000  # of training text
    val_tokens: int = 100_000  # of held-out text
    math_share: float = 0.3  # of the text's tokens: word problems and drills
    format_share: float = 0.04  # of the word problems in the text that look like the questions of post-training
    train_questions: int = 400  # easy, and as many hard ones
    val_questions: int = 200  # of each level
    test_questions: int = 300  # of each level
    shots: int = 32  # solved questions to show a base model, of each level
    task_items: int = 400  # of each general-capability task
    seed: int = 0  # of everything
    overwrite: bool = False  # replace the folder if it exists


def toy_documents(cfg, split, count):
    with tqdm(total=count, unit=" tokens", unit_scale=True, desc=f"{split} text", mininterval=1) as bar:
        for text in toy.text(cfg.seed, split, cfg.math_share, cfg.format_share):
            yield text
            bar.update(toy.length(text) + 1)
            if bar.n >= count:
                break


def write_text(folder, split, texts, enc):
    """Texts to {split}_000.bin, an end-of-text id after each."""
    ids, documents = array.array("H"), 0
    for text in texts:
        ids.extend([*tokens.encode(enc, text), enc.eot_token])
        documents += 1
    tokens.write_shard(folder / f"{split}_000.bin", ids, enc.name)
    tokens.verify_shard(folder / f"{split}_000.bin")  # read back what the disk has
    print(f"{split:<11} {len(ids):>12,} tokens in {documents:,} documents")


def make_toy(cfg):
    """Text, easy and hard questions, and general-capability tasks of the default world."""
    if not (0 <= cfg.math_share <= 1 and 0 <= cfg.format_share <= 1):
        raise ValueError("--math_share and --format_share are between 0 and 1")
    enc = tokens.encoding("toy")
    counts = {"train": cfg.train_questions, "val": cfg.val_questions, "test": cfg.test_questions, "shots": cfg.shots}
    with new_folder(cfg, f"toy-math{100 * cfg.math_share:g}") as folder:
        for split, count in (("train", cfg.tokens), ("val", cfg.val_tokens)):
            write_text(folder, split, toy_documents(cfg, split, count), enc)
        splits = {split: [] for split in counts}
        for level in toy.ASKED:
            for split, count in counts.items():
                rows = toy.questions(cfg.seed, level, split, count)
                write_questions(folder, f"{level}/{split}", rows, enc)
                splits[split] += rows
        check_apart(splits)
        for name, items in toy.tasks(cfg.seed, cfg.task_items).items():
            write_rows(folder, f"tasks/{name}", items)
        for name, items in tasks.load(folder / "tasks").items():
            print(f"tasks/{name:<10} {len(items):>6,} items, {len(items[0]['choices'])} choices each")


# ---- text

MIX = ("dclm=0.472", "flan=0.166", "wiki=0.071", "pes2o=0.058", "stackexchange=0.024", "math=0.208")


@dataclass(frozen=True)
class Dolmino:
    tokens: int = 50_000_000_000  # of training text; what is held out comes on top (paper: 50B)
    mix: tuple[str, ...] = MIX  # SOURCE=SHARE,... of the tokens, in proportion (OLMo 2's 50B high-quality mix)
    extra: tuple[str, ...] = ()  # SOURCE=TOKENS,... on top of the mix (paper's data study: math=10e9)
    source: str = ""  # a folder with a folder or file of each source's name in it; empty: allenai/dolmino-mix-1124 of the hub
    revision: str = "main"  # of the hub's data set; a commit hash pins it
    repeat: int = 1  # times a source may be read to get its tokens (all of math is about 10.7B)
    check: tuple[str, ...] = ()  # folders of questions whose test prompts are looked for in the text and counted: 13 words in a row
    out: str = "data/out/dolmino"  # the folder to make
    val_share: float = 0.0002  # held-out share of the documents: 10M tokens of 50B; copies of a document stay on one side
    shard_tokens: int = 100_000_000  # tokens in a shard: 400 MB
    processes: int = 0  # how many tokenise (0: one a core); their number changes nothing in the result
    seed: int = 0  # of the order of the files and of the choice of held-out documents
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Text:
    source: str  # a file, or a folder that is searched for .txt and .jsonl, .gz, .zst or neither
    check: tuple[str, ...] = ()  # folders of questions whose test prompts are looked for in the text and counted: 13 words in a row
    out: str = "data/out/text"  # the folder to make
    val_share: float = 0.02  # held-out share of the documents; copies of a document stay on one side
    shard_tokens: int = 100_000_000  # tokens in a shard: 400 MB
    processes: int = 0  # how many tokenise (0: one a core); their number changes nothing in the result
    seed: int = 0  # of the choice of held-out documents
    overwrite: bool = False  # replace the folder if it exists


def shares(name, parts, least):
    """("math=10e9", ...) to {"math": 10e9}; each number at least `least`."""
    try:
        pairs = {source: float(value) for source, value in (part.split("=") for part in parts)}
    except ValueError:
        pairs = {"": -1}
    if len(pairs) < len(parts) or not all(least <= value < float("inf") for value in pairs.values()):
        raise ValueError(f"--{name} takes SOURCE=NUMBER,SOURCE=NUMBER, each source once, not {','.join(parts)!r}")
    return pairs


def budgets_of(cfg):
    """{source: training tokens}, and the name of this world."""
    mix, extra = shares("mix", cfg.mix, 1e-9), shares("extra", cfg.extra, 1)
    share = {name: mix.get(name, 0) / sum(mix.values()) for name in mix | extra}
    budgets = {name: max(1, round(share[name] * cfg.tokens + extra.get(name, 0))) for name in share}
    return budgets, f"dolmino-math{100 * budgets.get('math', 0) / sum(budgets.values()):.3g}"


def make_dolmino(cfg):
    """A mix of sources to cl100k_base shards, in parallel; given again after it was cut off, it goes on."""
    budgets, name = budgets_of(cfg)
    if cfg.source:
        found = corpus.local_files(cfg.source)
        below = {file: Path(file.name).relative_to(cfg.source).parts for file in found}
        sources = {source: [file for file in found if below[file][:1] and below[file][0].split(".")[0] == source]  # dclm.jsonl.gz
                   for source in budgets}
        return make_local_shards(cfg, name, sources, budgets)
    sources = {source: functools.partial(corpus.hub_files, cfg.revision, source) for source in budgets}
    make_shards(cfg, name, sources, budgets)


def make_text(cfg):
    """Your own text to cl100k_base shards, in parallel; given again after it was cut off, it goes on."""
    make_local_shards(cfg, "text", {"text": corpus.local_files(cfg.source)}, None)


def make_local_shards(cfg, name, sources, budgets):
    for source, files in sources.items():
        if not files:
            raise ValueError(f"no .txt, .jsonl or .json file (.gz, .zst or neither) of {source} at {cfg.source}")
    sizes = {source: [[file.name, file.size] for file in files] for source, files in sources.items()}
    listed = {source: functools.partial(list, files) for source, files in sources.items()}
    make_shards(cfg, name, listed, budgets, files=checkpoint.fingerprint(sizes))


def make_shards(cfg, name, sources, budgets, **facts):
    done = read_world(cfg.out)
    if not cfg.overwrite and all(done.get(key) == value for key, value in {"name": name, **settings(cfg), **facts}.items()):
        (Path(cfg.out) / "state.json").unlink(missing_ok=True)  # of a run that was killed after its last word
        return print(f"{cfg.out} is finished")
    with new_folder(cfg, name, **facts) as folder:
        note(folder, **corpus.write(
            folder, sources, budgets, seed=cfg.seed, val_share=cfg.val_share, shard_tokens=cfg.shard_tokens,
            processes=cfg.processes, repeat=getattr(cfg, "repeat", 1), check=cfg.check))  # fmt: skip


# ---- general capability


@dataclass(frozen=True)
class Tasks:
    source: str = ""  # a folder with lambada/test.jsonl, hellaswag/validation.jsonl, ... (.gz or not); empty: from the hub
    out: str = "data/out/tasks"  # the folder to make, for eval.py --tasks
    limit: int = 0  # items of each benchmark, the first ones (0: all)
    overwrite: bool = False  # replace the folder if it exists


def make_tasks(cfg):
    """LAMBADA, HellaSwag, ARC-Easy, ARC-Challenge, PIQA and OpenBookQA as lm-evaluation-harness asks them."""
    with new_folder(cfg, "tasks") as folder:
        for name in tasks.BENCHMARKS:
            write_rows(folder, name, itertools.islice(tasks.read(name, cfg.source), cfg.limit or None))
        for name, items in tasks.load(folder).items():
            print(f"{name:<15} {len(items):>6,} items, {sum(len(item['choices']) for item in items) / len(items):.1f} choices each")


COMMANDS = {
    "toy": (Toy, make_toy), "dolmino": (Dolmino, make_dolmino), "text": (Text, make_text), "gsm8k": (Gsm8k, make_gsm8k),
    "math": (Math, make_math), "openmath": (OpenMath, make_openmath), "split": (questions.Split, questions.make_split),
    "tasks": (Tasks, make_tasks),
}  # fmt: skip


def main(argv):
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__.strip())
    elif argv[0] not in COMMANDS:
        print(f"prepare.py: error: {argv[0]!r} is not a command: {', '.join(COMMANDS)} are", file=sys.stderr)
        raise SystemExit(2)
    else:
        Config, script = COMMANDS[argv[0]]
        run.main(script, Config, script.__doc__, argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
