"""Stands in for python and torchrun on the PATH of test_matrix.py.

It notes the command in $CALLS, demands the checkpoints that the script would read, and makes the
files that it would write. $FAILING and $SLOW: a part of the commands that fail, or that take a
minute and save when a SIGTERM comes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

words = sys.argv[1:]
while not words[0].endswith(".py"):  # flags of torchrun
    words.pop(0)
script = Path(words.pop(0)).stem
flags = {}
plain = []
while words:
    word = words.pop(0)
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        plain.append(word)
        continue
    if not equals:
        value = words.pop(0) if words and not words[0].startswith("--") else "true"
    flags[name[2:]] = value

calls = Path(os.environ["CALLS"])
temporary = calls / f"{os.getpid()}.tmp"
temporary.write_text(json.dumps([script, plain, flags, os.environ["OMP_NUM_THREADS"]]))
temporary.rename(calls / f"{time.monotonic_ns():020}.json")


def make(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


def save(*_):
    time.sleep(0.3)
    (calls / f"saved-{os.getpid()}").touch()
    sys.exit(143)


line = " ".join([script, *plain, *map(str, flags.items())])
if os.environ.get("FAILING", "\n") in line:
    sys.exit(f"{script}.py: error: no luck today")
if os.environ.get("SLOW", "\n") in line:
    signal.signal(signal.SIGTERM, save)
    (calls / f"slow-{os.getpid()}").touch()
    time.sleep(60)

read = plain if script == "eval" else [flags[name] for name in ("init",) if name in flags]
for path in read:
    if not Path(path).exists():
        sys.exit(f"{script}.py: error: no checkpoint at {path}")
if script == "pretrain":
    paper = flags.get("preset") in ("1b", "4b")
    batch = int(flags.get("batch_tokens", 2_097_152 if paper else 2048))
    whole = round(int(flags.get("tokens", 12_000_000)) / batch)
    last = int(flags.get("stop", 0)) or whole
    for step in [*filter(None, flags.get("save_steps", "").split(",")), last]:
        make(f"{flags['out']}/step{step}.pt")
elif script == "eval" and "report" not in flags:
    for path in plain:
        drawn = f"-s{flags['shot_seed']}" if "shot_seed" in flags else ""
        rows = f"{flags['results']}/{Path(path).stem}{drawn}.jsonl"
        make(rows)
        row = {"checkpoint": path, "split": "test" if flags.get("final") == "true" else "val"}
        Path(rows).write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
elif script == "hf":
    make(plain[2])
elif script == "prepare":
    make(f"{flags['out']}/world.json")
elif script != "eval":
    make(flags["out"])
    line = json.dumps({"step": 0, "correct": float(os.environ.get("CORRECT", "0.25")), "flat": 0.5})
    Path(f"{flags['out']}.metrics.jsonl").write_text(f"{line}\n")
