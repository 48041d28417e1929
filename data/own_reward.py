"""A reward of one's own: reward(question, answer, text) -> float of a file, for rl.py --reward.

It runs in processes like those of data/algebra.py, which are killed if an answer takes too long.
They run this file as a script: it imports nothing of ours.
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path

LOADING = 60  # seconds of processor time to run the file itself, its imports with it


def place(error, path) -> str:
    """FILE:LINE of an error, the last line of the file that took part in it."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == path]
    return f"{path}:{own[-1]}" if own else path


def told(error, path) -> str:
    """An error in one line."""
    return " ".join(f"{place(error, path)}: {type(error).__name__}: {error}".split())


def load(path):
    """The function `reward` of a file. Raises AttributeError if it has none."""
    spec = importlib.util.spec_from_file_location("own_reward", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))
    spec.loader.exec_module(module)
    if not callable(getattr(module, "reward", None)):
        raise AttributeError("it has no function reward(question, answer, text)")
    return module.reward


def number(value) -> float:
    """What the function returned, if it is a finite number."""
    if hasattr(value, "__float__") and math.isfinite(float(value)):
        return float(value)
    raise ValueError(f"reward returned {value!r}, not a finite number")


def serve(seconds, memory, path):
    """A JSON line [question, answer, text] in, one out: {"reward": ...} or {"error": ...}."""
    import resource

    # what it prints, or a program that it starts, goes to people; neither can read the questions
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = sys.stderr  # line by line: what a killed process has not written is lost
    signal.setitimer(signal.ITIMER_PROF, LOADING)
    try:
        reward = load(path)
    except (Exception, SystemExit) as error:
        print(told(error, path), file=answers, flush=True)
        raise SystemExit(1) from None
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit, and has no /proc
        pages, *_ = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        most = int(pages) * resource.getpagesize() + memory  # beside what its imports have mapped
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print("ready", file=answers, flush=True)
    for line in asked:
        # at the end of the time the kernel ends this process, whatever it is in the middle of
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            said = {"reward": number(reward(*json.loads(line)))}
        except (Exception, SystemExit) as error:
            said = {"error": told(error, path)}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
