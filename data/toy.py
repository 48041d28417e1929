"""The default world: a small language with facts and word problems, generated from a seed.

Text (`text`), one document of each kind; every document starts with a space, and all its words are
in `words()`:

    facts       zoe hill of lima has a goat . she works as a nurse . the colour of zoe hill is red .
    agreement   the goats near the bird jump at night . the king behind the girls waits here .
    stories     mia gave the drum to leo and the hat to rosa . it was a warm day . leo was glad
                about the drum .
    drills      21 - 11 = 10 . 4 times 12 is 48 . 30 - 9 + 4 = 25 .
    problems    exercise : sam has 21 apples . he loses 11 . he finds 8 . how many now ?
                work : first 21 - 11 = 10 then 10 + 8 = 18 . so the answer is 18 .

Questions (`questions`) are such problems, and their solutions all end in "#### answer":

    tom has 12 keys . ann has 5 more than tom . he sees 9 birds . how many together ?
    12 + 5 = 17 , 12 + 17 = 29 . #### 29
    12 + 12 + 5 = 29 . they have 29 . #### 29

No two splits share a question, and the text counts as one of them. What decides is the arithmetic
of a question, whatever its names, things, verbs, distractor and the order of its additions: a hash
of it says which split may use it (`canonical`, `owner`). Only drills are free of that rule: those
of one operation, which are the tables everyone learns, and 7 + 7 + 3, which is drilled because the
text has the problem of 7 keys, and of 3 more than 7, together.

General capability (`tasks`): facts ask what the text states. Lastword asks about the tenth of all
stories that is kept out of the text (`held_out`).
"""

import hashlib
import re
from random import Random
from typing import NamedTuple

import tiktoken

PROMPT = " Q : {} A :"  # how its questions are put before a model; the form of EXACT below

HE = "sam tom ben leo max omar ivan hugo finn paul".split()
SHE = "ann eva mia zoe lena nora rosa tara iris jane".split()
FAMILIES = (
    "stone wood hill frost reed snow marsh vale moss birch lake field ford brook cliff dale thorn "
    "ash glen heath rowan pike holt shaw wick"
).split()
VALUES = {  # what each of the 500 people has one of
    "home": (
        "rome oslo lima cairo delhi quito dakar tunis berlin prague vienna lisbon dublin athens "
        "kyoto"
    ).split(),
    "job": (
        "baker nurse pilot farmer painter teacher doctor sailor tailor singer cook judge clerk "
        "miner guard"
    ).split(),
    "pet": "cat dog horse parrot rabbit turtle goat snake mouse duck pig frog".split(),
    "colour": "red blue green yellow brown black white purple orange pink".split(),
}
# {p} is the full name; a sentence that starts with it may say he or she once the person is known
FACTS = {
    "home": ["{p} lives in {home}", "the home of {p} is {home}", "you can meet {p} in {home}"],
    "job": ["{p} works as a {job}", "the job of {p} is {job}", "they know {p} as a {job}"],
    "pet": ["{p} has a pet {pet}", "the pet of {p} is a {pet}", "{p} feeds a {pet}"],
    "colour": [
        "{p} likes {colour}",
        "the colour of {p} is {colour}",
        "{p} paints the door {colour}",
    ],
}
TWO_FACTS = [
    "{p} the {job} lives in {home}",
    "{p} of {home} has a {pet}",
    "{p} the {job} likes {colour}",
]

NOUNS = "cat dog horse duck goat bird boy girl king farmer teacher sailor".split()
VERBS = "run sleep sing jump wait swim dance smile work play".split()
BETWEEN = "near behind beside under above with".split()
TAILS = ["", " every day", " at night", " here", " in the garden"]

OBJECTS = "kite drum ball lamp book cup key ring hat coat bell map pen shoe".split()
PLACES = "box bag drawer basket chest kitchen attic barn school shop".split()
# what happens to one object or two, then an end that asks for the first, for the second;
# {s}: a filler
STORIES = [
    ("{a} bought a {x} for the {p} .{s}", ("{b} also wanted a",)),
    ("{a} lost the {x} in the {p} .{s}", ("{b} came to the {p} and found the",)),
    (
        "{a} put the {x} in the {p} and the {y} in the {q} .{s}",
        ("{b} looked in the {p} and found the", "{b} looked in the {q} and found the"),
    ),
    (
        "{a} gave the {x} to {b} and the {y} to {c} .{s}",
        ("{b} was glad about the", "{c} was glad about the"),
    ),
    (
        "{a} had a {x} and a {y} .{s}",
        ("{he} lost the {y} . now {he} has only the", "{he} lost the {x} . now {he} has only the"),
    ),
    ("{b} wanted a {x} but {c} wanted a {y} .{s}", ("so {a} gave {b} a", "so {a} gave {c} a")),
    (
        "the {x} was in the {p} . the {y} was in the {q} .{s}",
        ("{a} went to the {p} to get the", "{a} went to the {q} to get the"),
    ),
]
FILLERS = [
    "",
    "",
    " it was a warm day .",
    " then the sun went down .",
    " it rained all day .",
    " nobody was at home .",
]

THINGS = "apples pears coins books cards eggs stamps shells beads cups keys nuts".split()
GAINS = "finds buys gets wins picks earns".split()
LOSSES = "drops loses sells gives uses breaks".split()
MULTIPLES = {2: ("doubles them", "twice"), 3: ("triples them", "three times")}
DISTRACTORS = [
    "{he} is {n} years old .",
    "{he} sees {n} birds .",
    "{he} walks {n} miles .",
    "there are {n} trees .",
]
OPENERS = ["", "", "", "", "", "", "so ", "first ", "we get ", "we know that ", "let us see : "]
JOINERS = [" , ", " , ", " , ", " . ", " then ", " so "]
CLOSERS = ["", "", "", "", " that is all .", " so {claim} .", " {claim} ."]
NARRATED = 0.15  # share of solutions that tell what happens: "he finds 8 so"
SPELLED = 0.1  # that spell the signs: "3 plus 4 is 7"
BY_ADDING = 0.3  # that write 6 + 6 for 6 * 2
ONCE = 0.1  # share of those not narrated that are one expression
REGROUPED = 0.4  # and that have the terms in other orders and portions
SPELLING = str.maketrans({"+": "plus", "-": "minus", "*": "times", "=": "is"})

EXACT = ("Q :", "A :")  # the form of post-training, with the ending "#### 18"
HEADERS = [  # of the other documents, so that EXACT is always followed by its ending
    ("problem :", "solution :"),
    ("question :", "answer :"),
    ("exercise :", "work :"),
    ("", ""),
    ("{a} asks :", "{b} says :"),
    ("now this :", "we write :"),
]
ENDINGS = ["#### {n}", "the answer is {n} .", "so it is {n} .", "result = {n} ."]
OTHER = (
    "he she has had many more fewer than as does do have now how together and the they of with "
    "? : . , ( ) + - * = ####"
).split()

SHARES = {"facts": 0.2, "agreement": 0.03, "stories": 0.77}  # of the tokens that are not math
DRILLS = 0.25  # of the math tokens
ANSWER_ONLY = 0.18  # of the documents of problems: no working is shown
WRONG = 0.05  # of the problems in the text: the last number is a slip
LONG = 0.35  # of the problems in the text; the others are short
SHEETS = 0.7  # of the documents of problems: several problems
# number of steps, each as often as it is named; the first number; the other numbers; the largest
# number on the way. Short ones are in the text beside hard ones, and never asked, but shown.
LEVELS = {
    "short": ((1, 1, 2, 2, 2), (3, 30), (2, 12), 70),
    "long": ((3, 3, 4, 4, 4), (10, 60), (3, 30), 150),
    "easy": ((1, 1, 2, 3, 4, 5), (10, 99), (5, 60), 300),
    "hard": ((4, 4, 5, 5), (10, 99), (5, 60), 300),
}
ASKED = ("easy", "hard")
MULTIPLY = 0.12  # of the steps
COMPARE = 0.25  # of the problems: with another person's number
DISTRACT = 0.25  # of the problems: with a number that is not needed
# percent of all arithmetic that is theirs
OWNERS = {"text": 50, "train": 25, "val": 10, "test": 13, "shots": 2}
SHORT = 16  # tokens of a question that is shown as an example, without its first
SOLUTIONS = 24  # a question; the paper's gold set has about 23


# ------------------------------------------------------------------------------------- the language


def plural(word):
    return word + "s"


def words():
    """All words in id order, each with its leading space.

    Digits also without one, to continue a number: " 1" "8".
    """
    nouns = NOUNS + OBJECTS + PLACES + THINGS
    nouns_and_plurals = [nouns, [plural(n) for n in NOUNS]]
    verbs = [VERBS, [plural(v) for v in VERBS], BETWEEN, TAILS]
    told = [*[(start, *ends) for start, ends in STORIES], FILLERS]
    asked = [GAINS, LOSSES, *MULTIPLES.values(), DISTRACTORS]
    solved = [OPENERS, JOINERS, CLOSERS, SPELLING.values(), EXACT, *HEADERS, ENDINGS, OTHER]
    parts = [HE, SHE, FAMILIES, *VALUES.values(), *FACTS.values(), TWO_FACTS, *nouns_and_plurals]
    parts += [*verbs, *told, *asked, *solved]
    plain = re.sub(r"\{\w+\}", " ", " ".join(piece for part in parts for piece in part)).split()
    digits = list("0123456789")
    return digits + [f" {word}" for word in digits + sorted(set(plain))]


VOCAB = len(words()) + 2  # ids that a model may sample: the words, <|endoftext|> and <|pad|>


def ranks():
    """Token bytes -> id.

    tiktoken panics without all single bytes: those that are no word have ids >= VOCAB.
    """
    known = {word.encode(): i for i, word in enumerate(words())}
    others = [bytes([b]) for b in range(256) if bytes([b]) not in known]
    return known | {byte: VOCAB + i for i, byte in enumerate(others)}


PATTERN = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def encoding():
    """The tiktoken.Encoding "toy": one token per word or digit.

    An id >= VOCAB is a byte of something unknown.
    """
    specials = {"<|endoftext|>": VOCAB - 2, "<|pad|>": VOCAB - 1}
    return tiktoken.Encoding(
        "toy", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=specials
    )


def length(document):
    """Its number of tokens: one a word, and one for each further digit of a number."""
    return document.count(" ") + len(re.findall(r"\d(?=\d)", document))


# ------------------------------------------------------------------------ facts, agreement, stories


def people(seed):
    """What is true in this world: [{"p": full name, "he": "she", "home": "oslo", ...}, ...]."""
    rng = Random(f"{seed} people")
    known = []
    for first in HE + SHE:
        for family in FAMILIES:
            person = {"p": f"{first} {family}", "he": pronoun(first)}
            known.append(person | {kind: rng.choice(VALUES[kind]) for kind in VALUES})
    return known


def pronoun(name):
    return "he" if name in HE else "she"


def percent(key):
    """0..99 from a text, the same in every world: what a split owns does not depend on the seed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 100


def held_out(key):
    return percent(key) < 10


def facts(rng, seed):
    """Documents that state facts.

    Each round of biographies over all the people states all that there is to know.
    """
    everybody = people(seed)
    while True:
        for person in rng.sample(everybody, len(everybody)):
            kinds = rng.sample(list(FACTS), 4)
            forms = [rng.choice(FACTS[kind]) for kind in kinds]
            if rng.random() < 0.3:
                forms.insert(rng.randrange(5), rng.choice(TWO_FACTS))
            if rng.random() < 0.3:
                forms[1:] = [with_pronoun(form) for form in forms[1:]]
            yield "".join(f" {form} ." for form in forms).format(**person)
            document = ""
            for other in rng.sample(everybody, 4):
                form = rng.choice(FACTS[rng.choice(kinds)])
                document += f" {form} .".format(**other)
            yield document


def with_pronoun(form):
    return form if form in TWO_FACTS else re.sub(r"^\{p}", "{he}", form)


def subject(rng):
    """("the cats near the dog" or "near the dog the cats", is it plural), with one to three
    distractors.
    """
    nouns = rng.sample(NOUNS, rng.choice((2, 3, 4)))
    many = [rng.random() < 0.5 for _ in nouns]
    both = zip(nouns, many, strict=True)
    named = [plural(noun) if several else noun for noun, several in both]
    others = [f"{rng.choice(BETWEEN)} the {noun}" for noun in named[1:]]
    before = rng.randrange(len(named))  # so many of them come first
    return " ".join([*others[:before], f"the {named[0]}", *others[before:]]), many[0]


def agreement(rng):
    while True:
        document = ""
        for _ in range(rng.randint(2, 5)):
            phrase, several = subject(rng)
            verb = rng.choice(VERBS)
            document += f" {phrase} {verb if several else plural(verb)}{rng.choice(TAILS)} ."
        yield document


def story(rng, wanted=False):
    """(the story up to its last word, that word, the object that would be wrong).

    wanted: whether it is one of those that are held out from the text.
    """
    while True:
        start, ends = rng.choice(STORIES)
        asked = rng.randrange(len(ends))
        pair = rng.sample(OBJECTS, 2)
        p, q = rng.sample(PLACES, 2)
        a, b, c = rng.sample(HE + SHE, 3)
        filler = rng.choice(FILLERS)
        told = f"{start} {ends[asked]}".replace("{x}", pair[0]).replace("{y}", pair[1])
        told = told.replace("{p}", p).replace("{q}", q)
        if held_out(told) == wanted:  # people and filler do not make it another story
            break
    told = told.format(a=a, b=b, c=c, he=pronoun(a), s=filler)
    return told, pair[asked], pair[1 - asked]


def stories(rng):
    while True:
        told = [story(rng)[:2] for _ in range(rng.randint(1, 3))]
        yield "".join(f" {context} {word} ." for context, word in told)


# ----------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    question: str
    start: int
    # [(operation, number)]: "+", "-", "*", at the end perhaps ("&", 0): with the one before
    steps: list
    said: list  # what the question says of each step: "he drops 11"
    claim: str  # "sam has {n} now"
    answer: int


def canonical(start, steps):
    """The arithmetic of a question up to the order of its additions.

    (21, +4, -9, *2) -> "+21 +4 -9 *2".
    """
    parts = []
    run = [f"+{start}"]
    for operation, number in steps:
        if operation in "+-":
            run.append(f"{operation}{number}")
        else:
            parts += [*sorted(run), f"{operation}{number}"]
            run = []
    return " ".join(parts + sorted(run))


def owner(start, steps):
    """The split (or "text") that alone may use this arithmetic."""
    place = percent(canonical(start, steps))
    for split, share in OWNERS.items():
        if place < share:
            return split
        place -= share


def values(start, steps):
    """All numbers on the way, the first and the answer included."""
    line = [start]
    for operation, number in steps:
        now = line[-1]
        before = line[-2:][0]
        found = {"+": now + number, "-": now - number, "*": now * number, "&": now + before}
        line.append(found[operation])
    return line


def draw(rng, level, split):
    """(start, steps, is the last number another person's) of a level that belongs to a split."""
    counts, first, others, most = LEVELS[level]
    while True:
        start = rng.randint(*first)
        compared = rng.random() < COMPARE
        steps = []
        for _ in range(rng.choice(counts)):
            if rng.random() < MULTIPLY:
                steps.append(("*", rng.choice((2, 3))))
            else:
                steps.append((rng.choice("+-"), rng.randint(*others)))
        if compared and len(steps) > 1 and rng.random() < 0.5:
            steps[-1] = ("&", 0)
        line = values(start, steps)
        if min(line) > 0 and max(line) <= most and owner(start, steps) == split:
            return start, steps, compared


def problem(rng, level, split):
    """A Problem whose arithmetic belongs to the split."""
    start, steps, compared = draw(rng, level, split)
    a, b = rng.sample(HE + SHE, 2)
    he = pronoun(a)
    thing = rng.choice(THINGS)
    together = steps[-1][0] == "&"
    said = []
    for operation, number in steps[: len(steps) - compared - together]:
        verb = rng.choice(GAINS if operation == "+" else LOSSES)
        said.append(f"{he} {MULTIPLES[number][0]}" if operation == "*" else f"{he} {verb} {number}")
    if compared:
        operation, number = steps[len(said)]
        more = "more" if operation == "+" else "fewer"
        how_many = f"{number} {more} than {a}"
        if operation == "*":
            how_many = f"{MULTIPLES[number][1]} as many as {a}"
        said.append(f"{b} has {how_many}")
    told = [f"{a} has {start} {thing} ."] + [f"{clause} ." for clause in said]
    if rng.random() < DISTRACT:
        extra = rng.choice(DISTRACTORS).format(he=he, n=rng.randint(*LEVELS[level][2]))
        told.insert(rng.randint(1, len(told)), extra)
    if together:
        asked = rng.choice(("how many together ?", "how many do they have ?"))
        claim = "they have {n}"
        said.append("they put them together")
    elif compared:
        asked = f"how many does {b} have ?"
        claim = f"{b} has {{n}}"
    else:
        asked = rng.choice(("how many now ?", f"how many does {he} have now ?"))
        claim = f"{a} has {{n}} now"
    answer = values(start, steps)[-1]
    return Problem(" ".join([*told, asked]), start, steps, said, claim, answer)


def regroup(rng, steps):
    """(sums to be done first, steps in another order or other portions): another way to it."""
    fixed = 2 if steps[-1][0] == "&" else 0  # together needs the number before the comparison
    middle, end = steps[: len(steps) - fixed], steps[len(steps) - fixed :]
    if fixed and rng.random() < 0.3:  # x + (x + 4) = x * 2 + 4, and x + x * 2 = x * 3
        operation, number = end[0]
        end = [("*", number + 1)] if operation == "*" else [("*", 2), end[0]]
    runs = [[]]  # of steps that may change places: between multiplications
    for step in middle:
        if step[0] == "*":
            runs += [[step], []]
        else:
            runs[-1].append(step)
    way = rng.choice(("order", "group", "portion"))
    sums = []
    for run in runs:
        if way == "order":
            rng.shuffle(run)
        elif way == "group" and len(run) > 1:
            sums += group(rng, run)
        elif way == "portion" and run and run[0][0] != "*":  # - 23 = - 20 - 3
            i = rng.randrange(len(run))
            sign, number = run[i]
            tens = number // 10 * 10
            run[i : i + 1] = [(sign, part) for part in (tens, number - tens) if part]
    return sums, [step for run in runs for step in run] + end


def group(rng, run):
    """Put all that is added into one step of the run, and all that is taken away, or both.

    Returns the sums that this takes.
    """
    totals = {}
    sums = []
    for sign in "+-":
        parts = [number for operation, number in run if operation == sign]
        totals[sign] = sum(parts)
        if len(parts) > 1:
            sums.append((" + ".join(map(str, parts)), totals[sign]))
    small, large = sorted("+-", key=totals.get)
    if 0 < totals[small] < totals[large] and rng.random() < 0.5:
        net = totals[large] - totals[small]
        sums.append((f"{totals[large]} - {totals[small]}", net))
        totals = {large: net}
    run[:] = [(sign, number) for sign, number in totals.items() if number]
    return sums


def one_by_one(start, steps, by_adding=False):
    """[(expression, value), ...], one for each step; by_adding writes 6 * 2 as 6 + 6."""
    line, expressions = values(start, steps), []
    for i, (operation, number) in enumerate(steps):
        if operation == "&":
            expressions.append(f"{line[i - 1]} + {line[i]}")
        elif operation == "*" and by_adding:
            expressions.append(" + ".join([str(line[i])] * number))
        else:
            expressions.append(f"{line[i]} {operation} {number}")
    return list(zip(expressions, line[1:], strict=True))


def at_once(start, steps):
    """The same in one expression with brackets.

    "together" first finds the number before the comparison.
    """
    together = steps[-1][0] == "&"
    before = steps[:-2] if together else steps
    expression = str(start)
    is_sum = False
    value = values(start, before)[-1]
    for operation, number in before:
        expression = f"( {expression} )" if operation == "*" and is_sum else expression
        expression += f" {operation} {number}"
        is_sum = operation != "*"
    done = [(expression, value)] if before else []
    if together:
        operation, number = steps[-2]
        done.append((f"{value} + {value} {operation} {number}", values(start, steps)[-1]))
    return done


def solve(rng, task, wrong=False):
    """(text, answer): one of the many solutions of a Problem, without its ending.

    wrong: the last number is a slip.
    """
    start = task.start
    steps = task.steps
    answer = task.answer
    narrated = rng.random() < NARRATED
    way = rng.random()
    by_adding = rng.random() < BY_ADDING
    if narrated:
        done = one_by_one(start, steps)
    elif way < ONCE and len(steps) > 1:
        done = at_once(start, steps)
    else:
        sums, regrouped = [], steps
        if way < ONCE + REGROUPED:
            sums, regrouped = regroup(rng, steps)
        if min(values(start, regrouped)) < 0:  # this order takes away more than there is yet
            sums, regrouped = [], steps
        done = sums + one_by_one(start, regrouped, by_adding)
    if wrong:
        answer = max(0, answer + rng.choice((-10, -2, -1, 1, 2, 10)))
        done[-1] = (done[-1][0], answer)
    lines = [f"{expression} = {value}" for expression, value in done]
    if rng.random() < SPELLED:
        lines = [line.translate(SPELLING) for line in lines]
    if narrated:
        both = zip(task.said, lines, strict=True)
        body = " . ".join(f"{clause} so {line}" for clause, line in both)
    else:
        body = rng.choice(OPENERS) + rng.choice(JOINERS).join(lines)
    return f"{body} .{rng.choice(CLOSERS)}".format(claim=task.claim.format(n=answer)), answer


# ---------------------------------------------------------------------- documents, questions, tasks


def problems(rng, format_share):
    """Documents of one problem or a sheet of several, each in one layout.

    format_share of them look as in post-training.
    """
    while True:
        a, b = rng.sample(HE + SHE, 2)
        exact = rng.random() < format_share
        header = EXACT if exact else rng.choice(HEADERS)
        ending = ENDINGS[0] if exact else rng.choice(ENDINGS)
        only_answer = not exact and rng.random() < ANSWER_ONLY
        ask, reply = (f" {part}".rstrip().format(a=a, b=b) for part in header)
        document = ""
        for _ in range(rng.randint(2, 8) if rng.random() < SHEETS else 1):
            task = problem(rng, "long" if rng.random() < LONG else "short", "text")
            worked, answer = solve(rng, task, wrong=rng.random() < WRONG)
            shown = f"{answer} ." if only_answer else f"{worked} {ending.format(n=answer)}"
            document += f"{ask} {task.question}{reply} {shown}"
        yield document


def drills(rng):
    while True:
        document = ""
        for _ in range(rng.randint(3, 9)):
            if rng.random() < 0.25:
                start, steps, _ = draw(rng, "short", "text")
            else:
                *_, others, most = LEVELS[rng.choice(ASKED)]
                sign = rng.choice("++--*")
                number = rng.randint(2, 3) if sign == "*" else rng.randint(*others)
                ranges = {"+": (0, most - number), "-": (number, most), "*": (1, most // number)}
                start = rng.randint(*ranges[sign])
                steps = [(sign, number)]
            expression, value = at_once(start, steps)[-1]
            line = f" {expression} = {value} ."
            document += line.translate(SPELLING) if rng.random() < SPELLED else line
        yield document


def text(seed, split, math_share=0.3, format_share=0.25):
    """Endless documents of split "train" or "val".

    math_share is of tokens, format_share of the problem documents.
    """
    rng = Random(f"{seed} text {split}")
    sources = {
        "facts": facts(rng, seed),
        "agreement": agreement(rng),
        "stories": stories(rng),
        "drills": drills(rng),
        "problems": problems(rng, format_share),
    }
    shares = {kind: share * (1 - math_share) for kind, share in SHARES.items()}
    shares |= {"drills": math_share * DRILLS, "problems": math_share * (1 - DRILLS)}
    made = dict.fromkeys(sources, 0)  # tokens of each
    # at random, but what is behind its share comes sooner: never off by more than some 5000 tokens
    while True:
        total = sum(made.values()) + 5000
        behind = [max(0, shares[kind] * total - made[kind]) for kind in sources]
        kind = rng.choices(list(sources), behind)[0]
        document = next(sources[kind])
        made[kind] += length(document)
        yield document


def questions(seed, level, split, count):
    """`count` different questions [{"id", "question", "answer", "solutions"}, ...].

    SOLUTIONS each, in random order. The shots of both levels are short questions of one step, the
    shortest solution first: three of them and a question fit the rows that the model was trained
    on, 128 tokens by default.
    """
    if level not in ASKED or split not in OWNERS or split == "text":
        known = "levels are easy, hard; splits train, val, test, shots"
        raise ValueError(f"no questions {level!r} {split!r}: {known}")
    rng = Random(f"{seed} {level} {split}")
    rows = {}
    while len(rows) < count:
        task = problem(rng, "short" if split == "shots" else level, split)
        long = len(task.steps) > 1 or length(task.question) > SHORT
        # as different as what they measure: the questions of a test by what is calculated
        key = canonical(task.start, task.steps) if split in ("val", "test") else task.question
        if key in rows or (split == "shots" and long):
            continue
        solutions = set()
        while len(solutions) < SOLUTIONS:
            solutions.add(f"{solve(rng, task)[0]} #### {task.answer}")
        chosen = rng.sample(sorted(solutions), SOLUTIONS)
        rows[key] = {
            "id": f"{level}-{split}-{len(rows)}",
            "question": task.question,
            "answer": str(task.answer),
            "calculation": canonical(task.start, task.steps),
            "solutions": sorted(chosen, key=length) if split == "shots" else chosen,
        }
    return list(rows.values())


def tasks(seed, count=400):
    """{"facts" | "lastword": [{"context", "choices", "label"}, ...]}, with 4 choices each.

    Agreement of subject and verb is no task: models of this size have learned all of it early.
    """
    rng = Random(f"{seed} tasks")
    everybody = people(seed)

    def item(context, right, wrong):
        choices = [f" {word}" for word in rng.sample([right, *wrong], 1 + len(wrong))]
        return {"context": f" {context}", "choices": choices, "label": choices.index(f" {right}")}

    made = {"facts": {}, "lastword": {}}  # by context, so that none is asked twice
    while len(made["facts"]) < count:
        person, kind = rng.choice(everybody), rng.choice(list(FACTS))
        context = rng.choice(FACTS[kind]).removesuffix(f" {{{kind}}}").format(**person)
        others = [value for value in VALUES[kind] if value != person[kind]]
        made["facts"][context] = item(context, person[kind], rng.sample(others, 3))
    while len(made["lastword"]) < count:
        context, right, wrong = story(rng, wanted=True)
        others = [thing for thing in OBJECTS if thing not in (right, wrong)]
        made["lastword"][context] = item(context, right, [wrong, *rng.sample(others, 2)])
    return {name: list(items.values()) for name, items in made.items()}
