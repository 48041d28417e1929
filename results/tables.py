"""What the report says in words: report.md of a folder, the block of findings, the terminal."""

from contextlib import suppress

import pandas as pd

from results.findings import BASE, FINDINGS, RL, SEEDS, SFT, SFT_RL, gain, trains_by_rl
from results.rows import RECIPES, Arm, Missing, of_row, tokens_name
from results.stats import estimate

ABOUT = """In %, differences in points. ±: half of the 95% interval over models; SE: one standard
error over questions, where there are fewer than four models. By run: the means of the models, by
their pre-training seed. The rules are in results/findings.py.
"""
ALONG = (0, 50, 100, 200, 300, 600)  # steps of RL whose validation is printed
METRICS = {  # metric -> heading; the last two are measured once, not per set of questions
    "pass@1": "pass@1",
    "pass@8": "pass@8",
    "pass@32": "pass@32",
    "32 in format": "pass@k, 32 in format",
    "formatted": "in format",
    "flexible@1": "right in any format",
    "flops": "FLOPs",
    "accuracy": "general capability",
    "loss": "text loss (nats per token)",
}


def table(header, rows):
    """Markdown, without the columns in which no row has anything."""
    kept = [i for i in range(len(header)) if any(str(row[i]) not in ("", "-") for row in rows)]
    lines = [[line[i] for i in kept] for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n" if rows else ""


def shown(e, metric="", sign=""):
    if not e:
        return "-"
    if metric == "flops":
        return f"{e.mean:.3g}"
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    error = f" ±{scale * e.half():.{digits}f}{'' if e.df else ' SE'}" if e.half() else ""
    return f"{scale * e.mean:{sign}.{digits}f}{error}"


def unit(part):
    """Scale and digits of a difference: points, text loss in nats."""
    return (1, 3) if part.name.endswith("loss") else (100, 1)


def span(part):
    """The estimate of a difference and its interval of 95%, in points; text loss in nats."""
    e = part.estimate
    scale, digits = unit(part)
    mean, half = scale * e.mean, scale * e.half()
    if not e.df:  # no error is known of what is one number a model
        return f"{mean:+.{digits}f}" + f" ±{half:.{digits}f} SE" * bool(half)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def said(v, waived):
    """The verdict, also without the rule of convergence, and the difference that it hangs on: of
    several the one that is least likely to lie where the claim says."""
    other = f"; without this rule: {waived.verdict}" if waived.verdict != v.verdict else ""
    reason = f" ({v.reason}{other})" if v.reason else ""
    words = f"**{v.verdict}**{reason}"
    if not v.parts:
        return words
    part = max(v.parts, key=lambda part: part.chances[0])
    weakest = f", the weakest of {len(v.parts)}" if len(v.parts) > 1 else ""
    return f"{words} {span(part)} ({part.name}{weakest})"


def block(records):
    """{name: (verdicts, verdicts with convergence waived)} -> the table of the claims, one column
    per record."""
    rows = []
    for finding in FINDINGS:
        number = finding.number
        told = [said(verdicts[number], waived[number]) for verdicts, waived in records.values()]
        rows.append([finding.number, finding.claim, finding.paper, *told, finding.earlier])
    names = [name.replace("-", " ") for name in records]
    return table(["", "claim", "paper", *names, "records 1 and 2"], rows)


def region(part):
    """Where the claim says that a difference lies: "> 0", "-2 to +2"."""
    scale, _ = unit(part)
    low, high = scale * part.low, scale * part.high
    if high == float("inf"):
        return f"> {low:g}"
    return f"< {high:g}" if low == -float("inf") else f"{low:g} to {high:+g}"


def in_full(verdicts, waived):
    """The claims of one record, a row for each difference of each; waived: the verdicts without the
    rule of convergence, of which those are shown that differ."""
    rows = []
    for finding, v in zip(FINDINGS, verdicts.values(), strict=True):
        word = f"**{v.verdict}**" + (f" ({v.reason})" if v.reason else "")
        first = [finding.number, finding.claim, word, f"{v.p:.2g} ({v.holm:.2g})"]
        other = waived[finding.number]
        first += [f"{other.verdict} ({other.holm:.2g})" if other.verdict != v.verdict else ""]
        rows += [first + [""] * 5] if not v.parts else []
        for part in v.parts:
            e = part.estimate
            scale, digits = unit(part)
            runs = ", ".join(f"{run}: {scale * mean:+.{digits}f}" for run, mean in e.runs.items())
            at = ", ".join(map(tokens_name, part.tokens))
            rows.append([*first, part.name, region(part), span(part), runs, at])
            first = [""] * 5
    header = ["", "claim", "verdict", "p (Holm)", "with convergence waived (Holm)"]
    return table([*header, "difference", "claimed", "found", "by run", "at"], rows)


def convergence(r):
    """How far validation still rises at the end of each arm with RL."""
    rows = []
    for arm in filter(trains_by_rl, r.arms):
        for t in r.tokens:
            for asked in r.benchmarks:
                try:
                    e = gain(r, arm, t, asked)
                except Missing:
                    continue
                bound = f"{100 * (e.mean + e.half(0.9)):+.2f}" if e.df else "-"
                curve = r.curve(arm, t, "pass@1", asked)
                along = [f"{100 * curve[step].mean:.1f}" for step in ALONG if step in curve]
                runs = ", ".join(f"{run}: {100 * mean:+.1f}" for run, mean in e.runs.items())
                first = [str(arm), tokens_name(t), asked, ", ".join(along)]
                rows.append([*first, f"{100 * e.mean:+.1f}", bound, runs])
    header = ["arm", "tokens", "questions", f"at step {', '.join(map(str, ALONG))}"]
    return table([*header, "last 100 steps - 100 before", "upper bound", "by run"], rows)


def seeds(r):
    """Ends of the seeds of a model, where it has as many as the claim about them asks for."""
    rows = []
    for arm, t in ((arm, t) for arm in filter(trains_by_rl, r.arms) for t in r.tokens):
        for metric in ("pass@1", "pass@8", "pass@32"):
            with suppress(Missing):
                ends = 100 * r.values(arm, t, metric).mean()
                for run, some in ends.groupby(level=0):
                    if len(some) >= SEEDS:
                        reach = f"{some.min():.1f} to {some.max():.1f}"
                        where = [f"**{arm}**", tokens_name(t), run, len(some)]
                        rows.append([*where, metric, reach, f"{some.std():.1f}"])
    header = ["arm", "tokens", "model", "seeds", "", "ends", "standard deviation"]
    return f"## Seeds of a model\n\n{table(header, rows)}" if rows else ""


def longer(r):
    """What more steps changed, where an arm was run again with more of them."""
    ended = r.shorter[(r.shorter.split == r.split) & (r.shorter.asked == r.main)]
    kinds = {"pass@1": "pass", "pass@8": "pass", "pass@32": "pass", "loss": "text"}
    rows = []
    for (t, *key), runs in ended.groupby(["tokens", *Arm._fields]):
        arm, changes, steps, before = Arm(*key), {metric: {} for metric in kinds}, "", {}
        for row in runs.to_dict("records"):
            run = row["pretrain_seed"], row["seed"]
            alike = r.rows(row["kind"], arm, t, part=row["part"])
            [more] = [other for other in alike if (other["pretrain_seed"], other["seed"]) == run]
            steps = f"{row['step']} to {more['step']}"
            for metric in (metric for metric in kinds if kinds[metric] == row["kind"]):
                with suppress(Missing):  # pass@32 of 8 answers
                    changes[metric][run] = of_row(more, metric) - of_row(row, metric)
            if row["kind"] == "pass":
                before[run] = of_row(row, "pass@1")
        found = {m: estimate(pd.DataFrame(each)) for m, each in changes.items() if each}
        cells = (shown(found.get(metric), metric, "+") for metric in kinds)
        shorter = by_run(estimate(pd.DataFrame(before))) if before else ""
        rows.append([tokens_name(t), f"**{arm}**", steps, *cells, shorter])
    title = "## What more steps of RL changed\n\nThe longer run less the shorter one.\n"
    header = ["tokens", "arm", "steps", *(METRICS[metric] for metric in kinds)]
    header += ["pass@1 of the shorter, by run"]
    return f"{title}\n{table(header, rows)}" if rows else ""


def references(r, arm):
    """What an arm is compared with. First what it varies: "rl-dr" rl, "a->b" a and b, another
    number of rollouts that of 5, another share, world or model the usual; "rl-x" also "sft-x"; then
    base, sft, rl and sft->rl, as far as they come before it."""
    if arm.recipe == "base":
        return [arm._replace(shots=0)] if arm.shots else []
    alike = {other.recipe: other for other in r.arms if other == arm._replace(recipe=other.recipe)}
    change = "" if arm.recipe.startswith("sft") else arm.recipe.partition("-")[2]
    parts = arm.recipe.split("->")
    names = [name for name in alike if arm.recipe.startswith(name + "-") or name in parts]
    names = sorted(names, key=len, reverse=True)
    names += [name for name in alike if change and name.startswith(f"sft-{change}")]
    found = [alike[name] for name in names] + [r.with_rollouts(5)] * (arm.group > 0)
    found += [Arm(arm.recipe)] * bool(arm.share or arm.world or arm.model)
    known = [x._replace(world=arm.world, model=arm.model) for x in (BASE, SFT, RL, SFT_RL)]
    found += known[: known.index(arm) if arm in known else None]
    return [other for other in dict.fromkeys(found) if other != arm]


def levels(r, asked):
    """Every arm on a question set, each followed by its differences."""
    rows, metrics = [], list(METRICS)[: len(METRICS) if asked == r.main else -2]
    for t, arm in ((t, arm) for t in r.tokens for arm in r.arms):
        found = {metric: r.level(arm, t, metric, asked) for metric in metrics}
        if not any(found.values()):
            continue
        seeds = max(e.seeds for e in found.values() if e)
        cells = [shown(e, metric) for metric, e in found.items()]
        cells += [by_run(found[metric]) for metric in ("pass@1", "pass@32")]
        rows.append([tokens_name(t), f"**{arm}**", seeds, *cells])
        for other in references(r, arm):
            gaps = [m != "flops" and r.gap(m, arm, other, t, asked) for m in metrics]
            if any(gaps):
                seeds = max(e.seeds for e in gaps if e)
                cells = [shown(e, m, "+") for m, e in zip(metrics, gaps, strict=True)]
                cells += [by_run(gaps[metrics.index(m)], "+") for m in ("pass@1", "pass@32")]
                rows.append([tokens_name(t), f"{arm} - {other}", seeds, *cells])
    heads = [METRICS[metric] for metric in metrics] + ["pass@1 by run", "pass@32 by run"]
    return table(["tokens", asked or "arm", "seeds", *heads], rows)


def by_run(e, sign=""):
    runs = e.runs.items() if e else ()
    return ", ".join(f"{run}: {100 * mean:{sign}.1f}" for run, mean in runs)


def by_task(r):
    """Accuracy of each task of general capability, which the levels have as one mean."""
    rows = []
    for t, arm in ((t, arm) for t in r.tokens for arm in r.arms if not arm.shots):
        base = BASE._replace(world=arm.world, model=arm.model)
        cells = []
        for task in r.tasks:
            gap = r.gap(task, arm, base, t) if arm.recipe != "base" else None
            cells += [shown(r.level(arm, t, task)), shown(gap, sign="+")]
        rows += [[tokens_name(t), f"**{arm}**", *cells]] if {*cells} != {"-"} else []
    heads = [head for task in r.tasks for head in (task, f"{task}, less the base's")]
    return table(["tokens", "arm", *heads], rows)


def training(r):
    """What the runs of each arm took, each counted once; arms after SFT without their SFT."""
    seed = r.frame.seed.where(r.frame.recipe != "base", 0)  # those of a base are draws of shots
    runs = pd.concat([r.frame.assign(seed=seed), r.shorter])
    runs = runs.dropna(subset="flops").drop_duplicates(["checkpoint", "seed"])
    order = {arm: i for i, arm in enumerate(r.arms)}
    found = [(order[Arm(*key)], steps, some)
             for (*key, steps), some in runs.groupby([*Arm._fields, "step"])]  # fmt: skip
    rows = []
    for i, steps, some in sorted(found, key=lambda group: group[:2]):
        name = "pre-training" if r.arms[i].recipe == "base" else r.arms[i]
        costs = f"{some.seconds.mean():,.0f}", f"{some.flops.mean():.2e}"
        rows.append([name, steps, len(some), *costs, f"{some.seconds.sum() / 3600:.2f}"])
    if not rows:
        return ""
    header = ["arm", "steps", "runs", "seconds of a run", "FLOPs of a run", "hours of all"]
    return f"## Training\n\nWithout evaluation; runs side by side.\n\n{table(header, rows)}"


def page(r, verdicts, waived, pictures, torn, along):
    """The text of report.md. along: sections about the runs, see results/along.py."""
    parts = [f"# Report\n\nWorld {r.world}, model {r.model}, {r.split} questions. {ABOUT}", *torn]
    if any(v.parts for v in verdicts.values()) and r.split == "test":
        bases = {t: r.level(BASE, t, "pass@32", split="val") for t in r.tokens}
        room = [f"{tokens_name(t)} {shown(e)}" for t, e in bases.items() if e]
        room = f"Base pass@32 on validation questions: {', '.join(room)}.\n" if room else ""
        parts += ["## Claims\n", in_full(verdicts, waived), room]
        parts += ["## Has RL converged? Validation pass@1, in points\n", convergence(r)]
        parts += [longer(r), *along, seeds(r)]
    parts += [f"![{name}]({name})\n" for name in pictures]
    for asked in r.benchmarks or [""]:
        parts += [f"## Levels and differences{', ' * bool(asked)}{asked}\n", levels(r, asked)]
    if len(r.tasks) > 1:
        parts += ["## Accuracy of each task\n", by_task(r)]
    return "\n".join([*parts, training(r)])


# ---- the terminal


def grid(r):
    """Recipes by checkpoints, in %."""
    columns = {}
    for metric in ("pass@1", "pass@8", "pass@32", "accuracy"):
        for t in r.tokens:
            found = {str(arm): r.level(arm, t, metric) for arm in r.arms}
            columns[metric, tokens_name(t)] = {arm: 100 * e.mean for arm, e in found.items() if e}
    frame = pd.DataFrame(columns).reindex([*map(str, r.arms)]).dropna(how="all")
    if frame.empty:
        return "no rows of questions or of tasks here"
    return frame.to_string(float_format="{:.1f}".format, na_rep="-", line_width=100)


def arrow(e):
    flat = e.half() * (1 if e.df else 2)  # two standard errors
    return "→" if abs(e.mean) <= flat else "↑" if e.mean > 0 else "↓"


def directions(r, verdicts):
    """What the rows say about the claims, and about recipes that the paper does not have."""
    tested = any(not v.reason for v in verdicts.values())
    compared = any(v.parts for v in verdicts.values())
    head = "directions, no verdicts (points; SE: over questions)"
    lines = [head] if compared and not tested else []
    for finding, v in zip(FINDINGS, verdicts.values(), strict=True):
        for i, part in enumerate(v.parts):
            word = f" {v.verdict:14}" * tested
            start = f"{finding.number}{word} {finding.claim}\n" if i == 0 else ""
            here = f"{arrow(part.estimate)} {span(part)}"
            lines.append(f"{start}    {here:24} claimed {region(part):12} {part.name}")
    absent = ", ".join(number for number, v in verdicts.items() if not v.parts)
    if absent and compared:
        lines.append(f"claims {absent}: not all arms or checkpoints they compare have rows here")
    own = [arm for arm in r.arms if arm.recipe not in RECIPES and " lr=" not in arm.recipe]
    for arm in own[:8]:
        other = references(r, arm)[0]
        gaps = [(tokens_name(t), r.gap("pass@1", arm, other, t)) for t in r.tokens]
        told = [f"{t} {arrow(e)} {shown(e, sign='+')}" for t, e in gaps if e]
        lines += [f"{arm} - {other}, pass@1: {', '.join(told)}"] if told else []
    return lines
