"""Make the data that the stages read: python data/prepare.py COMMAND [flags]

toy      the default world, generated; nothing is downloaded
text     your own text to cl100k_base shards: --source FOLDER of .txt and .jsonl ("text" field), .gz or not
gsm8k    the GSM8K questions, from the Hugging Face hub or from --source FOLDER
Each makes one folder, with its settings in world.json, and has its flags under --help.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import problems, run, tasks, tokens, toy  # noqa: E402

# ---- files


@contextlib.contextmanager
def new_folder(cfg, name):
    """A folder to fill. It becomes cfg.out when all went well; otherwise it is removed and what was there stays."""
    out = Path(cfg.out)
    new, old = Path(f"{out}.new"), Path(f"{out}.old")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists: --overwrite replaces it, --out makes another")
    if out.exists() and not (out / "world.json").is_file():
        raise ValueError(f"{out} is not replaced, it was not made by prepare.py (it has no world.json)")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)
    try:
        settings = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in ("out", "overwrite")}
        (new / "world.json").write_text(json.dumps({"name": name, **settings}, indent=1) + "\n")
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_rows(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_questions(folder, name, rows, enc):
    """Write {name}.jsonl, read it back through the checks of problems.load, and print the numbers to expect."""
    rows = problems.load(write_rows(folder, name, rows), name)
    prompts = [len(tokens.encode(enc, problems.prompt(enc.name, row["question"]))) for row in rows]
    answers = [len(problems.answer_ids(enc, solution)) for row in rows for solution in row["solutions"]]
    print(f"{name:<11} {len(rows):>6,} questions, {len(answers) / len(rows):4.1f} solutions each; "
          f"tokens (longest): prompt {sum(prompts) / len(prompts):5.1f} ({max(prompts)}), "
          f"solution {sum(answers) / len(answers):5.1f} ({max(answers)})")


def write_text(folder, documents, enc, shard_tokens=100_000_000):
    """(split, text) pairs to {split}_000.bin, {split}_001.bin, ...; an end-of-text id ends each text."""
    ids = {"train": array.array("I"), "val": array.array("I")}  # of the next shard
    texts, size, shards = (dict.fromkeys(ids, 0) for _ in range(3))

    def write(split):
        tokens.write_shard(folder / f"{split}_{shards[split]:03}.bin", ids[split], enc.name)
        tokens.verify_shard(folder / f"{split}_{shards[split]:03}.bin")  # read back what the disk has
        size[split] += len(ids[split])
        shards[split] += 1
        ids[split] = array.array("I")

    for split, text in documents:
        ids[split].extend([*tokens.encode(enc, text), enc.eot_token])
        texts[split] += 1
        if len(ids[split]) >= shard_tokens:
            write(split)
    for split in ids:
        if ids[split]:
            write(split)
        if not texts[split]:
            raise ValueError(f"no text for {split} among {sum(texts.values())} documents: change --val_share or --seed")
        print(f"{split:<11} {size[split]:>12,} tokens in {texts[split]:,} documents, {shards[split]} shards")


def words(question):
    """A question without case, punctuation and spacing, to find it again in another set."""
    return " ".join(re.findall(r"\w+", question.lower()))


def check_apart(splits):
    """ValueError if a question is in two of the splits {name: rows}."""
    where = {}
    for split, rows in splits.items():
        for row in rows:
            other = where.setdefault(words(row["question"]), split)
            if other != split:
                raise ValueError(f"question {row['id']!r} of {split} is also in {other}: {row['question'][:60]!r}")


def draw(seed, text):
    """A number in [0, 1) that depends on nothing but the seed and the text."""
    digest = hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---- the default world


@dataclass(frozen=True)
class Toy:
    out: str = "data/out/toy"  # the folder to make
    tokens: int = 5_600_000  # of training text
    val_tokens: int = 100_000  # of held-out text
    math_share: float = 0.3  # of the text's tokens: word problems and drills
    format_share: float = 0.04  # of the word problems in the text that look like the questions of post-training
    train_questions: int = 400  # easy, and as many hard ones
    val_questions: int = 200  # of each level
    test_questions: int = 300  # of each level
    shots: int = 8  # solved questions to show a base model, of each level
    task_items: int = 400  # of each general-capability task
    seed: int = 0  # of everything
    overwrite: bool = False  # replace the folder if it exists


def toy_documents(cfg):
    for split, count in (("train", cfg.tokens), ("val", cfg.val_tokens)):
        with tqdm(total=count, unit=" tokens", unit_scale=True, desc=f"{split} text", mininterval=1) as bar:
            for text in toy.text(cfg.seed, split, cfg.math_share, cfg.format_share):
                yield split, text
                bar.update(toy.length(text) + 1)
                if bar.n >= count:
                    break


def make_toy(cfg):
    """Text, easy and hard questions, and general-capability tasks of the default world."""
    if not (0 <= cfg.math_share <= 1 and 0 <= cfg.format_share <= 1):
        raise ValueError("--math_share and --format_share are between 0 and 1")
    enc = tokens.encoding("toy")
    counts = {"train": cfg.train_questions, "val": cfg.val_questions, "test": cfg.test_questions, "shots": cfg.shots}
    with new_folder(cfg, f"toy-math{100 * cfg.math_share:g}") as folder:
        write_text(folder, toy_documents(cfg), enc)
        splits = {split: [] for split in counts}
        for level in toy.LEVELS:
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


@dataclass(frozen=True)
class Text:
    source: str  # a file, or a folder that is searched for .txt, .txt.gz, .jsonl and .jsonl.gz
    out: str = "data/out/text"  # the folder to make
    val_share: float = 0.02  # held-out share of the documents; copies of a document stay on one side
    shard_tokens: int = 100_000_000  # tokens in a shard: 400 MB
    seed: int = 0  # of the choice of held-out documents
    overwrite: bool = False  # replace the folder if it exists


def documents(path, bar):
    """The texts of a file: one a line of .jsonl; a .txt is cut at the first blank line after each 4,000 characters,
    so that a part of one long file can be held out."""
    if ".jsonl" in path.suffixes:
        yield from (row["text"] for row in problems.read_jsonl(path, {"text": str}, bar))
        return
    gathered, size = [], 0
    for _, line in problems.lines_of(path, bar):
        gathered.append(line)
        size += len(line)
        if size >= 4000 and not line.strip():
            yield "".join(gathered)
            gathered, size = [], 0
    yield "".join(gathered)


def make_text(cfg):
    """Your own text to cl100k_base shards: files of .txt, or of .jsonl with a "text" field, gzipped or not."""
    source, suffixes = Path(cfg.source), (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
    paths = [path for path in sorted([source, *source.rglob("*")]) if path.name.endswith(suffixes) and path.is_file()]
    if not paths:
        raise ValueError(f"no {', '.join(suffixes)} file at {source}")
    with new_folder(cfg, "text") as folder:
        size = sum(path.stat().st_size for path in paths)
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=1) as bar:
            texts = (text for path in paths for text in documents(path, bar) if text.strip())
            pairs = (("val" if draw(cfg.seed, text) < cfg.val_share else "train", text) for text in texts)
            write_text(folder, pairs, tokens.encoding("cl100k_base"), cfg.shard_tokens)


# ---- GSM8K


@dataclass(frozen=True)
class Gsm8k:
    source: str = ""  # a folder with train.jsonl and test.jsonl, .gz or not; empty: openai/gsm8k from the hub
    shots: str = ""  # .json list of {"question", "target"} ending "The answer is N."; empty: 8 training questions
    out: str = "data/out/gsm8k"  # the folder to make
    val: int = 500  # training questions held out for validation
    seed: int = 0  # of the choice of validation questions
    overwrite: bool = False  # replace the folder if it exists


def gsm8k_rows(cfg, split):
    """GSM8K's rows as questions with one solution, without its <<48/2=24>> calculator notes."""
    if cfg.source:
        path = next((p for p in Path(cfg.source).glob(f"{split}.jsonl*") if p.name.endswith((".jsonl", ".gz"))), None)
        if path is None:
            raise ValueError(f"no {split}.jsonl or {split}.jsonl.gz in {cfg.source}")
        rows = problems.read_jsonl(path, {"question": str, "answer": str})
    else:
        from datasets import load_dataset  # slow to import
        rows = load_dataset("openai/gsm8k", "main", split=split)
    for index, row in enumerate(rows):
        solution = re.sub("<<[^<>]*>>", "", row["answer"]).strip()
        if not problems.well_formed(solution):
            raise ValueError(f"row {index + 1} of {split} does not end in '#### number': {solution[-60:]!r}")
        yield {"id": f"gsm8k-{split}-{index}", "question": row["question"].strip(),
               "answer": problems.final_answer(solution), "solutions": [solution]}


def gsm8k_shots(path):
    """Shots whose last sentence is "The answer is N." as questions that end in the one ending, #### N."""
    try:
        rows = [(row["question"].strip(), row["target"]) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
        parts = [target.rpartition("The answer is ") for _, target in rows]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}: must be a JSON list of {{"question": text, "target": text}}') from None
    for index, ((question, _), (reasons, _, answer)) in enumerate(zip(rows, parts, strict=True)):
        answer = answer.strip().removesuffix(".")
        yield {"id": f"gsm8k-shot-{index}", "question": question, "answer": answer,
               "solutions": [f"{reasons.strip()}\n#### {answer}"]}


def make_gsm8k(cfg):
    """The GSM8K questions, each with its one solution."""
    with new_folder(cfg, "gsm8k") as folder:
        train, test = list(gsm8k_rows(cfg, "train")), list(gsm8k_rows(cfg, "test"))
        in_test = {words(row["question"]) for row in test}
        apart = [row for row in train if words(row["question"]) not in in_test]
        print(f"{len(train) - len(apart)} training questions are also in test (without case and punctuation): left out")
        fixed = sorted(apart, key=lambda row: draw("shots", row["id"]))[:8]
        shots = list(gsm8k_shots(cfg.shots)) if cfg.shots else fixed
        shown = {words(row["question"]) for row in shots}
        # drawn from the distinct questions, so that copies of one stay on one side
        rest = sorted({words(row["question"]) for row in apart} - shown, key=lambda question: draw(cfg.seed, question))
        held_out = set(rest[:cfg.val])
        splits = {"train": [row for row in apart if words(row["question"]) not in held_out | shown],
                  "val": [row for row in apart if words(row["question"]) in held_out], "test": test, "shots": shots}
        check_apart(splits)
        for split, rows in splits.items():
            write_questions(folder, split, rows, tokens.encoding("cl100k_base"))


COMMANDS = {"toy": (Toy, make_toy), "text": (Text, make_text), "gsm8k": (Gsm8k, make_gsm8k)}


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
