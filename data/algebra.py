r"""Are two answers in LaTeX equal? By the math-verify library, in processes that may be killed.

The processes run this file as a script: it imports neither torch nor anything of ours, so they are
small, and nothing is forked. A comparison that takes too much time or memory ends its process.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

SECONDS = 2  # of processor time for one comparison; the most on answers of MATH was 0.6
MEMORY = 2**30  # bytes for one comparison; the most on answers of MATH was 0.1 GB


class Worker:
    """A process that runs `serve` of a script: started when first needed, again after it died.

    command: the script, this one by default, and what it is given after its limits.
    """

    process = None

    def __init__(self, *command):
        self.script, *self.more = command or (__file__,)

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", self.script, str(SECONDS), str(MEMORY), *self.more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders by hash here and there
            start_new_session=True,
        )
        said = self.process.stdout.readline()
        if said != "ready\n":
            why = "the grader's process does not start: pip install -r requirements.txt"
            if self.more:
                why = f"{self.more[0]}: its process ended while it was loaded, in a minute at most"
            raise ValueError(said.strip() or why)

    def ask(self, said, meant):
        """(are they equivalent, can `said` be read). What takes too long or too much is neither."""
        line = self.line([said, meant])
        return line[:1] == "1", line[1:2] == "1"

    def line(self, question, tries=2, patience=20):
        """The line that answers a question (JSON); "" if it took too much time or memory.

        tries: how often it is asked if the process dies of something else than its time. patience:
        seconds on the clock for one of processor time.
        """
        for _ in range(tries):
            if self.process is None or self.process.poll() is not None:
                self.start()
            line = ""
            try:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
                if wait([self.process.stdout], patience * SECONDS):
                    line = self.process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:  # an answer that was not waited for must not be taken for the next one's
                if not line:
                    self.process.kill()
                    self.process.wait()
            if line or self.process.returncode == -signal.SIGPROF:  # its time was up
                return line
        return ""


def worker_count():
    """How many processes: one a core of this rank, at most 8 (each holds 0.1 GB)."""
    known = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@functools.cache
def idle(process_id, *command):
    """The workers of this process that have nothing to do, those that ran last in front."""
    workers = queue.LifoQueue()
    for _ in range(worker_count()):
        workers.put(Worker(*command))
    return workers


@contextlib.contextmanager
def one_of(*command):
    """A worker of this process, to be asked. Safe in threads."""
    workers = idle(os.getpid(), *command)  # a fork must not write into its parent's pipes
    worker = workers.get()
    try:
        yield worker
    finally:
        workers.put(worker)


@functools.lru_cache(2**16)
def equivalent(said, meant):
    """(are two answers in LaTeX equal, can `said` be read), by one worker. Safe in threads."""
    with one_of() as worker:
        return worker.ask(said, meant)


def equivalent_all(pairs):
    """[equivalent(said, meant)] of different pairs, by several workers at a time."""
    if len(pairs) < 2:
        return [equivalent(*pair) for pair in pairs]
    with ThreadPoolExecutor(worker_count()) as threads:  # each waits for its worker's answer
        return list(threads.map(equivalent, *zip(*pairs, strict=True)))


def no_code(event, arguments):
    """Audit hook. sympy makes its numbers and symbols with eval; nothing else is evaluated."""
    if event == "exec" and sys._getframe(1).f_code.co_name == "eval_expr":
        if not {"Integer", "Float", "Symbol", "E"}.issuperset(arguments[0].co_names):
            raise PermissionError("the grader runs no code")


def serve(seconds, memory):
    """A JSON line [said, meant] in, a line of two digits out: are they equal, can said be read."""
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, FiniteSet, Float, I, Interval, N, Symbol, Tuple
    from sympy.core.random import seed

    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr
    # without its list of units: it would read 3t as 3 tons, and 3 tons as 3
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    )
    sys.addaudithook(no_code)
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    @functools.lru_cache(2**10)
    def read(text):
        """The whole text as one sympy object. ValueError if it is not one."""
        (found,) = parse(f"${text}$", [config], "no_fallback", "first_match", parsing_timeout=None)
        found = found.xreplace({symbol: I for symbol in found.free_symbols if symbol.name == "i"})
        if isinstance(found, Eq):  # over the reals, x^2 = -1 and 1 = 2 have the same solutions
            free = {symbol: Symbol(symbol.name) for symbol in found.free_symbols}
            found = Eq(found.lhs.xreplace(free), found.rhs.xreplace(free), evaluate=False)
        return found

    def same(said, meant):
        # 0, 1 is not the point (0, 1), which math-verify takes for an interval
        for one, other in ((said, meant), (meant, said)):
            if isinstance(one, FiniteSet) and isinstance(other, Tuple | Interval):
                return False
        if isinstance(said, FiniteSet) and isinstance(meant, FiniteSet):
            entries = [*said, *meant]
            numbers = all(isinstance(entry, Expr) and entry.is_number for entry in entries)
            if numbers and len(said) == len(meant):
                return all(any(same(one, other) for other in said) for one in meant)
        for kind in (Tuple, Interval):
            if isinstance(said, kind) and isinstance(meant, kind):
                if said.args and len(said.args) == len(meant.args):  # all reals have none
                    parts = zip(said.args, meant.args, strict=True)
                    return all(one == other or same(one, other) for one, other in parts)
        if not (isinstance(said, Expr) and isinstance(meant, Expr)):
            return by_math_verify(said, meant)
        if said.is_number and meant.is_number:
            # verify() rounds to 15 places, and 2^{-98} would be 2^{-99}
            gap = N(said - meant, 15, maxn=1000)
            if gap.is_finite and (said - meant).has(Float):  # decimals are read as floats
                return bool(abs(gap) <= 1e-12 * abs(N(meant)))
            parts = gap.as_real_imag()
            if all(part.is_Float or part.is_Integer for part in parts):
                return all(part == 0 or part._prec == 1 for part in parts)  # no digit is certain
        return by_math_verify(said, meant)

    def by_math_verify(said, meant):
        return verify(
            meant, said, float_rounding=10, allow_set_relation_comp=True, timeout_seconds=None
        )

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # at the end of the time the kernel ends this process, whatever it is in the middle of
        signal.setitimer(signal.ITIMER_PROF, seconds)
        right = readable = False
        try:
            seed(0)
            said, meant = json.loads(line)
            said, readable = read(said), True
            right = same(said, read(meant))
        except MemoryError:
            break  # a new process tries once more
        except Exception:  # of a parser that was given anything at all
            pass
        print(f"{right:d}{readable:d}", file=answers, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
