"""Make the data that the stages read: python data/prepare.py COMMAND [flags]

toy      the default world, generated; nothing is downloaded
dolmino  the pre-training mix of the paper, from the Hugging Face hub or from --source FOLDER, to
         cl100k_base shards
text     your own text to cl100k_base shards: --source FOLDER of .txt and .jsonl ("text" field),
         .gz, .zst or neither
gsm8k, math, openmath    questions, from the hub or from --source FOLDER
questions    your own, from a file or the hub, by the names of their fields
split    easy and hard questions, by how often a checkpoint solved them
tasks    the six general-capability benchmarks, from the hub or from --source FOLDER

Each makes one folder, with its settings in world.json, and has its flags under --help. The same
command given again finds the folder finished; a dolmino or text command that was interrupted
resumes.
"""

import array
import functools
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from common import Count, Fraction, Range, Whole  # noqa: E402
from data import (  # noqa: E402
    corpus,
    files,
    own_questions,
    problems,
    questions,
    tasks,
    tokens,
    toy,
)

# ------------------------------------------------------------------------- the default world


@dataclass(frozen=True)
class Toy:
    out: str = "data/out/toy"  # the folder to make
    tokens: Count = 12_100_000  # of training text
    val_tokens: Count = 100_000  # of held-out text
    math_share: Fraction = 0.3  # of the text's tokens: word problems and drills
    # of the word problems in the text that look like the questions of post-training
    format_share: Fraction = 0.25
    train_questions: Count = 1600  # easy, and as many hard ones
    val_questions: Count = 200  # of each level
    test_questions: Count = 300  # of each level
    shots: Whole = 32  # solved questions to show a base model, of each level
    # of each general-capability task; there are 6,000 ways to ask for a fact
    task_items: Annotated[int, Range(1, 6000)] = 400
    seed: Whole = 0  # of everything
    overwrite: bool = False  # replace the folder if it exists


def toy_documents(cfg, split, count):
    """Documents of the toy's text until they have `count` tokens."""
    made = 0  # counted here: a bar may be switched off, and then counts nothing
    with tqdm(
        total=count, unit=" tokens", unit_scale=True, desc=f"{split} text", mininterval=1
    ) as bar:
        for text in toy.text(cfg.seed, split, cfg.math_share, cfg.format_share):
            yield text
            size = toy.length(text) + 1
            bar.update(size)
            made += size
            if made >= count:
                break


def write_text(folder, split, texts, enc):
    """Texts to {split}_000.bin, an end-of-text id after each."""
    ids = array.array("H")
    documents = 0
    for text in texts:
        ids.extend([*tokens.encode(enc, text), enc.eot_token])
        documents += 1
    path = folder / f"{split}_000.bin"
    tokens.write_shard(path, ids, enc.name)
    tokens.verify_shard(path)  # read back what the disk has
    print(f"{split:<11} {len(ids):>12,} tokens in {documents:,} documents")


def make_toy(cfg):
    """Text, easy and hard questions, and general-capability tasks of the default world."""
    name = f"toy-math{100 * cfg.math_share:g}"
    if is_finished(cfg, name):
        return
    enc = tokens.encoding("toy")
    form = problems.Form(toy.PROMPT, between_shots="")
    counts = {"train": cfg.train_questions, "val": cfg.val_questions, "test": cfg.test_questions}
    counts["shots"] = cfg.shots
    with files.new_folder(cfg, name) as folder:
        write_text(folder, "train", toy_documents(cfg, "train", cfg.tokens), enc)
        write_text(folder, "val", toy_documents(cfg, "val", cfg.val_tokens), enc)
        splits = {split: [] for split in counts}
        for level in toy.ASKED:
            problems.write_form(folder / level, form)
            for split, count in counts.items():
                if not count:  # --shots 0
                    continue
                rows = toy.questions(cfg.seed, level, split, count)
                questions.write_questions(folder, f"{level}/{split}", rows, form, enc)
                splits[split] += rows
        questions.check_apart(splits)
        for task, items in toy.tasks(cfg.seed, cfg.task_items).items():
            write_task(folder / "tasks", task, items)
        files.note(folder, shards=tokens.list_shards(folder))


# ------------------------------------------------------------------------------------- text

MIX = ("dclm=0.472", "flan=0.166", "wiki=0.071", "pes2o=0.058", "stackexchange=0.024", "math=0.208")


@dataclass(frozen=True)
class Dolmino:
    tokens: Count = 50_000_000_000  # of training text; what is held out comes on top (paper: 50B)
    # SOURCE=SHARE,... of the tokens, in proportion (OLMo 2's 50B high-quality mix)
    mix: tuple[str, ...] = MIX
    # SOURCE=TOKENS,... on top of the mix (paper's data study: math=10e9)
    extra: tuple[str, ...] = ()
    # a folder with a folder or file of each source's name; empty: allenai/dolmino-mix-1124, hub
    source: str = ""
    revision: str = "main"  # of the hub's data set; a commit hash pins it
    # times a source may be read to get its tokens (all of math is about 10.7B)
    repeat: Count = 1
    # folders of questions whose test prompts are looked for in the text: 13 words in a row
    check: tuple[str, ...] = ()
    out: str = "data/out/dolmino"  # the folder to make
    # held-out share of the documents: 10M tokens of 50B; copies of a document stay on one side
    val_share: Fraction = 0.0002
    shard_tokens: Count = 100_000_000  # tokens in a shard: 400 MB
    # how many tokenise (0: one a core); their number changes nothing in the result
    processes: Whole = 0
    seed: Whole = 0  # of the order of the files and of the choice of held-out documents
    overwrite: bool = False  # replace the folder if it exists


@dataclass(frozen=True)
class Text:
    # a file, or a folder that is searched for .txt and .jsonl, .gz, .zst or neither
    source: str
    # folders of questions whose test prompts are looked for in the text: 13 words in a row
    check: tuple[str, ...] = ()
    out: str = "data/out/text"  # the folder to make
    # held-out share of the documents; copies of a document stay on one side
    val_share: Fraction = 0.02
    shard_tokens: Count = 100_000_000  # tokens in a shard: 400 MB
    # how many tokenise (0: one a core); their number changes nothing in the result
    processes: Whole = 0
    seed: Whole = 0  # of the choice of held-out documents, and of the order of files
    overwrite: bool = False  # replace the folder if it exists


def shares(name, parts, least):
    """("math=10e9", ...) to {"math": 10e9}; each number at least `least`."""
    try:
        pairs = {source: float(value) for source, value in (part.split("=") for part in parts)}
    except ValueError:
        pairs = {"": -1}
    legal = all(least <= value < float("inf") for value in pairs.values())
    if len(pairs) < len(parts) or not legal:
        raise ValueError(
            f"--{name} takes SOURCE=NUMBER,SOURCE=NUMBER, each source once, not {','.join(parts)!r}"
        )
    return pairs


def budgets_of(cfg):
    """{source: training tokens}, and the name of this world."""
    mix = shares("mix", cfg.mix, 1e-9)
    if not mix:
        raise ValueError("--mix takes one source or more")
    extra = shares("extra", cfg.extra, 1)
    share = {name: mix.get(name, 0) / sum(mix.values()) for name in mix | extra}
    budgets = {name: max(1, round(share[name] * cfg.tokens + extra.get(name, 0))) for name in share}
    return budgets, f"dolmino-math{100 * budgets.get('math', 0) / sum(budgets.values()):.3g}"


def make_dolmino(cfg):
    """A mix of sources to cl100k_base shards, in parallel; given again, it resumes."""
    budgets, name = budgets_of(cfg)
    if not cfg.source:
        listed = functools.partial(corpus.hub_files, cfg.revision)
        sources = {source: functools.partial(listed, source) for source in budgets}
        make_shards(cfg, name, sources, budgets)
        return
    sources = {source: [] for source in budgets}
    others = 0
    for file in corpus.local_files(cfg.source):
        below = Path(file.name).relative_to(cfg.source).parts
        source = below[0].split(".")[0] if below else ""  # dclm.jsonl.gz
        if source in sources:
            sources[source].append(file)
        else:
            others += 1
    if others:
        print(f"{others:,} files are of no source of --mix or --extra: left out")
    make_local_shards(cfg, name, sources, budgets)


def make_text(cfg):
    """Your own text to cl100k_base shards, in parallel; given again, it resumes."""
    make_local_shards(cfg, "text", {"text": corpus.local_files(cfg.source)}, None)


def make_local_shards(cfg, name, sources, budgets):
    for source, listed in sources.items():
        if not listed:
            raise ValueError(
                f"no .txt, .jsonl or .json file (.gz, .zst or neither) of {source} at {cfg.source}"
            )
    sizes = {}
    for source, listed in sources.items():
        names = [os.path.relpath(file.name, cfg.source) for file in listed]
        sizes[source] = [[name, file.size] for name, file in zip(names, listed, strict=True)]
    listers = {source: functools.partial(list, listed) for source, listed in sources.items()}
    make_shards(cfg, name, listers, budgets, files=files.fingerprint(sizes))


def make_shards(cfg, name, sources, budgets, **facts):
    if is_finished(cfg, name, **facts):
        return
    with files.new_folder(cfg, name, **facts) as folder:
        made = corpus.write(
            folder,
            sources,
            budgets,
            seed=cfg.seed,
            val_share=cfg.val_share,
            shard_tokens=cfg.shard_tokens,
            processes=cfg.processes,
            repeat=getattr(cfg, "repeat", 1),
            check=cfg.check,
        )
        files.note(folder, **made)


def is_finished(cfg, name, **facts) -> bool:
    """files.finished, for folders with shards, which must be there.

    Raises ValueError as `files.finished` and `tokens.checked_shards` do.
    """
    if not cfg.overwrite:
        for split in tokens.SPLITS:
            tokens.checked_shards(cfg.out, split)
    done = files.finished(cfg, name, **facts)
    if done:
        (Path(cfg.out) / "state.json").unlink(missing_ok=True)  # its run was killed at the very end
    return done


# ----------------------------------------------------------------------- general capability


@dataclass(frozen=True)
class Tasks:
    # a folder with lambada/test.jsonl, hellaswag/validation.jsonl, ... (.gz or not); empty: the hub
    source: str = ""
    out: str = "data/out/tasks"  # the folder to make, for eval.py --tasks
    limit: Whole = 0  # items of each benchmark, the first ones (0: all)
    overwrite: bool = False  # replace the folder if it exists


def make_tasks(cfg):
    """LAMBADA, HellaSwag, ARC, PIQA and OpenBookQA as lm-evaluation-harness asks them."""
    facts = {"source_contents": questions.sources_of(cfg.source)}
    if files.finished(cfg, "tasks", **facts):
        return
    with files.new_folder(cfg, "tasks", **facts) as folder:
        for name in tasks.BENCHMARKS:
            items = itertools.islice(tasks.read(name, cfg.source), cfg.limit or None)
            write_task(folder, name, list(items))


def write_task(folder, name, items):
    """Write NAME.jsonl and print the numbers to expect."""
    if not items:
        raise ValueError(f"{name}: no item to ask, take 1 or more")
    for number, item in enumerate(items, 1):
        tasks.check(item, f"{name}, item {number}")
    files.write_rows(folder / f"{name}.jsonl", items)
    choices = sum(len(item["choices"]) for item in items) / len(items)
    print(f"{name:<15} {len(items):>6,} items, {choices:.1f} choices each")


COMMANDS = {
    "toy": (Toy, make_toy),
    "dolmino": (Dolmino, make_dolmino),
    "text": (Text, make_text),
    "gsm8k": (questions.Gsm8k, questions.make_gsm8k),
    "math": (questions.Math, questions.make_math),
    "openmath": (questions.OpenMath, questions.make_openmath),
    "questions": (own_questions.Own, own_questions.make_own),
    "split": (questions.Split, questions.make_split),
    "tasks": (Tasks, make_tasks),
}


def main(argv):
    common.commands(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
