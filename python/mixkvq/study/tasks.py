"""Synthetic chain-of-thought problems whose reasoning copies exact digits from far back.

The built-in model was trained on these seven tasks.  The reference reasoning is a function of the prompt,
so a derivation can be scored token by token as well as by its final answer: one digit read wrongly from the
cache breaks it.

    problem = make("chain", random.Random(7), level=1)
    text = chat(problem.prompt) + completion(problem.reasoning, problem.answer)
    check("chain", text, problem.answer)        # True

The same task, generator state and level always give the same problem (tests/python/test_tasks.py holds
golden hashes).  Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

TASKS = ("recall", "chain", "add", "mul", "sort", "vm", "path")
LEVELS = ("easy", "medium", "hard", "xl")

ANSWER_MARK = "####"
END_OF_TURN = "<|im_end|>"

Prose = Callable[[Random, int], str]
"""Called with a generator and a number of characters; returns about that much running text."""


class Problem(NamedTuple):
    """A question, how it is solved, and the answer."""

    prompt: str
    reasoning: str
    answer: str


def make(task: str, rng: Random, level: int, prose: Prose | None = None) -> Problem:
    """Draw one problem.  `level` indexes LEVELS; `prose`, used in training, may fill the notes of `recall`."""
    if task == "recall":
        return _recall(rng, level, prose)
    if task not in _GENERATORS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    return _GENERATORS[task](rng, level)


def chat(prompt: str) -> str:
    """The prompt as ChatML, up to and including the header of the assistant's turn."""
    return f"<|im_start|>user\n{prompt}{END_OF_TURN}\n<|im_start|>assistant\n"


def completion(reasoning: str, answer: str) -> str:
    """The reference text of the assistant's turn, without the end-of-turn token."""
    return f"{reasoning}\n{ANSWER_MARK} {answer}"


def check(task: str, text: str, answer: str) -> bool:
    """Whether `text` ends in the right answer: the line that follows its last answer mark.

    All tasks share this rule; `task` is there so that a later one may differ.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    if not mark:
        return False
    given = tail.strip().split("\n")[0].replace(END_OF_TURN, "")
    return _without_spaces(given.strip()) == _without_spaces(answer)


def _without_spaces(text: str) -> str:
    return text.replace(" ", "")


def _draw(rng: Random, level: int, *ranges: tuple[int, int]) -> int:
    low, high = ranges[level]
    return rng.randint(low, high)


# ---- recall: codes scattered over long notes -------------------------------------------------------------

_ADJECTIVES = (
    "amber azure bold brave brisk calm clever coral crimson dusty eager early faint fair fancy gentle giant "
    "golden green grey happy hidden humble icy ivory jolly keen kind lively lonely lucky merry mighty misty "
    "noble olive pale plain proud quick quiet rapid red royal rusty scarlet sharp shy silent silver simple "
    "sleepy slow small solid stormy sunny swift tall tiny violet warm wild wise young"
).split()
_NOUNS = (
    "ant badger bear beaver bison camel cat cobra crab crane crow deer dog dove duck eagle eel falcon ferret "
    "finch fox frog goat goose hare hawk heron horse jackal koala lark lion lizard llama lynx mole moose "
    "mouse newt otter owl panda parrot pony quail rabbit raven robin salmon seal shark sheep snail spider "
    "squid stork swan tiger toad trout turtle walrus wasp weasel whale wolf wren zebra"
).split()
_SUBJECTS = (
    "The old clerk", "A traveller", "The captain", "My aunt", "The gardener", "A young painter",
    "The baker", "Her brother", "The schoolmaster", "An engineer", "The innkeeper", "A neighbour",
    "The doctor", "His sister", "The librarian", "A sailor", "The postman", "Our guide",
)  # fmt: skip
_VERBS = (
    "walked slowly to", "wrote a long letter about", "remembered", "was often seen near",
    "could not forget", "spoke at length of", "kept a careful record of", "had never visited",
    "looked with pleasure at", "made a small drawing of", "asked many questions about",
    "returned in the evening to", "was tired of hearing about", "planned to repair",
)  # fmt: skip
_OBJECTS = (
    "the harbour", "the narrow bridge", "the market square", "the railway station", "the mill",
    "the garden behind the church", "the empty house", "the north road", "the museum",
    "the river bank", "the winter fair", "the library", "the lighthouse", "the orchard",
    "the stone tower", "the village school", "the old theatre", "the ferry landing",
)  # fmt: skip
_ENDINGS = (
    "before the rain began", "in the early spring", "without saying a word", "as the day was ending",
    "while the others waited", "for reasons nobody understood", "during the long summer",
    "when the clocks struck", "after a quiet breakfast", "in spite of the cold wind",
    "and nothing more was said", "with great patience", "as people often did in those days",
)  # fmt: skip


def _filler_sentence(rng: Random) -> str:
    sentence = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
    if rng.random() < 0.7:
        sentence += " " + rng.choice(_ENDINGS)
    return sentence + "."


def _filler(rng: Random, n_chars: int) -> str:
    sentences: list[str] = []
    length = 0
    while length < n_chars:
        sentences.append(_filler_sentence(rng))
        length += len(sentences[-1]) + 1
    return " ".join(sentences)


def _recall(rng: Random, level: int, prose: Prose | None) -> Problem:
    n_chars = _draw(rng, level, (1000, 3200), (4500, 13000), (16000, 34000), (36000, 44000))
    n_codes = _draw(rng, level, (4, 10), (12, 32), (32, 80), (60, 120))
    n_asked = _draw(rng, level, (1, 4), (3, 6), (6, 10), (10, 16))
    codes: dict[str, str] = {}
    while len(codes) < n_codes:
        owner = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
        if owner not in codes:
            codes[owner] = f"{rng.randrange(10000):04d}"
    fill = prose if prose is not None and rng.random() < 0.6 else _filler
    gap = max(40, (n_chars - 42 * n_codes) // n_codes)
    notes = []
    for owner, code in codes.items():
        width = rng.randint(0, 2 * gap)
        if width > 30:
            notes.append(fill(rng, width))
        notes.append(_code_sentence(owner, code))
    notes.append(fill(rng, gap))
    asked = rng.sample(list(codes.items()), min(n_asked, n_codes))
    prompt = (
        "Read the notes and give the requested codes in order.\n\n"
        + "\n".join(notes)
        + "\n\nWhich codes belong to: "
        + ", ".join(f"the {owner}" for owner, _ in asked)
        + "?"
    )
    reasoning = "\n".join(_code_sentence(owner, code) for owner, code in asked)
    return Problem(prompt, reasoning, ",".join(code for _, code in asked))


def _code_sentence(owner: str, code: str) -> str:
    return f"The code of the {owner} is {code}."


# ---- chain: variables defined by one another, in shuffled order ------------------------------------------


def _chain(rng: Random, level: int) -> Problem:
    n_steps = _draw(rng, level, (5, 15), (16, 45), (50, 120), (150, 250))
    n_extra = _draw(rng, level, (0, 6), (4, 30), (20, 60), (20, 100))
    names = [f"x{i:03d}" for i in rng.sample(range(1000), n_steps + n_extra)]
    chain = names[:n_steps]
    definition: dict[str, tuple[str, str, int]] = {}  # name -> (parent or "", operator, constant)
    value: dict[str, int] = {}
    for i, name in enumerate(names):
        on_chain = i < n_steps
        if i == 0 or (not on_chain and rng.random() < 0.2):
            constant = rng.randrange(100)
            definition[name], value[name] = ("", "", constant), constant
            continue
        parent = names[i - 1] if on_chain else rng.choice(names[:i])
        operator = rng.choice("++--*")
        constant = rng.randint(2, 9) if operator == "*" else rng.randint(1, 99)
        definition[name] = (parent, operator, constant)
        value[name] = _apply(operator, value[parent], constant)

    def right_side(name: str) -> str:
        parent, operator, constant = definition[name]
        return f"{parent}{operator}{constant}"

    order = list(names)
    rng.shuffle(order)
    goal = chain[-1]
    prompt = (
        "All values are taken modulo 100.\n"
        + "\n".join(f"{name}={right_side(name)}" for name in order)
        + f"\nWhat is the value of {goal}?"
    )
    lines = ["Trace:"] + [f"{name}={right_side(name)}" for name in reversed(chain)] + ["Compute:"]
    for name in chain:
        parent, operator, constant = definition[name]
        step = f"{value[parent]}{operator}{constant}=" if parent else ""
        lines.append(f"{name}={step}{value[name]}")
    return Problem(prompt, "\n".join(lines), str(value[goal]))


def _apply(operator: str, left: int, right: int) -> int:
    result = left + right if operator == "+" else left - right if operator == "-" else left * right
    return result % 100


# ---- add, mul: written arithmetic, least significant digit first -----------------------------------------


def _number(rng: Random, n_digits: int) -> str:
    return str(rng.randint(1, 9)) + "".join(str(rng.randrange(10)) for _ in range(n_digits - 1))


def _reversed_lines(a: str, b: str) -> list[str]:
    return [f"a reversed: {a[::-1]}", f"b reversed: {b[::-1]}"]


def _write_sum(a: str, b: str, lines: list[str]) -> str:
    """Append the steps of a + b to `lines` and return the sum."""
    width = max(len(a), len(b))
    carry, digits = 0, []
    for i, (x, y) in enumerate(zip(a[::-1].ljust(width, "0"), b[::-1].ljust(width, "0"))):
        total = int(x) + int(y) + carry
        lines.append(f"{i}: {x}+{y}+{carry}={total}")
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
    if carry:
        lines.append(f"{width}: {carry}")
        digits.append(str(carry))
    result = "".join(digits)[::-1]
    lines.append(f"sum {result}")
    return result


def _write_row(a: str, factor: str, lines: list[str]) -> str:
    """Append the steps of a * (one digit) to `lines` and return the product."""
    carry, digits = 0, []
    for i, x in enumerate(a[::-1]):
        total = int(x) * int(factor) + carry
        lines.append(f"{i}: {x}*{factor}+{carry}={total}")
        carry, digit = divmod(total, 10)
        digits.append(str(digit))
    if carry:
        lines.append(f"{len(a)}: {carry}")
        digits.append(str(carry))
    return "".join(digits)[::-1]


def _add(rng: Random, level: int) -> Problem:
    low, high = ((3, 7), (8, 14), (15, 26), (27, 40))[level]
    a, b = (_number(rng, rng.randint(low, high)) for _ in range(2))
    lines = _reversed_lines(a, b)
    result = _write_sum(a, b, lines)
    return Problem(f"Compute {a} + {b}.", "\n".join(lines), result)


def _mul(rng: Random, level: int) -> Problem:
    a_digits = ((2, 4), (3, 6), (5, 9), (8, 12))[level]
    b_digits = ((1, 1), (2, 2), (3, 4), (5, 6))[level]
    a, b = (_number(rng, rng.randint(low, high)) for low, high in (a_digits, b_digits))
    lines = _reversed_lines(a, b)
    total = ""
    for j, factor in enumerate(b[::-1]):
        lines.append(f"row {j}: times {factor}")
        row = _write_row(a, factor, lines) + "0" * j
        lines.append(f"product {row}")
        if not total:
            total = row
        else:
            lines.append(f"add {total} + {row}")
            lines += _reversed_lines(total, row)
            total = _write_sum(total, row, lines)
    return Problem(f"Compute {a} * {b}.", "\n".join(lines), total.lstrip("0") or "0")


# ---- sort: insertion sort, the whole list after every step -----------------------------------------------


def _sort(rng: Random, level: int) -> Problem:
    n = _draw(rng, level, (6, 10), (11, 20), (24, 40), (45, 60))
    numbers = [rng.randint(10, 99) for _ in range(n)]
    lines: list[str] = []
    ordered: list[int] = []
    for number in numbers:
        i = len(ordered)
        while i and ordered[i - 1] > number:
            i -= 1
        ordered.insert(i, number)
        lines.append(f"insert {number}: {_commas(ordered)}")
    return Problem(
        f"Sort these numbers in ascending order: {_commas(numbers)}.", "\n".join(lines), _commas(ordered)
    )


def _commas(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


# ---- vm: a small register machine with one loop ----------------------------------------------------------


def _vm(rng: Random, level: int) -> Problem:
    n_steps = _draw(rng, level, (8, 20), (21, 60), (80, 200), (220, 400))
    registers = "abcdef"[: (4, 5, 6, 6)[level]]
    work, counter = registers[:-1], registers[-1]
    body_length = rng.randint(3, (4, 6, 9, 10)[level])
    n_loops = min(60, max(1, round((n_steps - len(registers)) / (body_length + 1))))

    program: list[tuple[str, str, int | str | None]] = [("set", r, rng.randrange(100)) for r in work]
    program.append(("set", counter, n_loops))
    loop_start = len(program)
    for _ in range(body_length):
        operation = rng.choice(("add", "sub", "addi", "add", "mov"))
        target = rng.choice(work)
        source = rng.choice([r for r in work if r != target])
        program.append((operation, target, rng.randint(1, 99) if operation == "addi" else source))
    program.append(("loop", counter, loop_start))
    program.append(("out", rng.choice(work), None))
    listing = [
        f"{i}: {operation} {target}" + ("" if operand is None else f",{operand}")
        for i, (operation, target, operand) in enumerate(program)
    ]

    trace, result = _run(program, listing)
    prompt = (
        "Run this program. Arithmetic is modulo 100. The loop instruction subtracts one and jumps back "
        "unless the register became 0.\n" + "\n".join(listing) + "\nWhat does it print?"
    )
    return Problem(prompt, "\n".join(trace), str(result))


def _run(program: list[tuple[str, str, int | str | None]], listing: list[str]) -> tuple[list[str], int]:
    """Execute the program; return one line per executed instruction and what it prints."""
    value: dict[str, int] = {}
    trace: list[str] = []
    counter = 0
    while True:
        operation, target, operand = program[counter]
        old = value.get(target, 0)
        amount = value[operand] if isinstance(operand, str) else operand or 0
        if operation in ("set", "mov"):
            new = amount
            shown = f"{new}"
        elif operation == "loop":
            new = old - 1
            shown = f"{old}-1={new}"
        elif operation == "out":
            new = old
            shown = f"{old}"
        else:
            sign = "-" if operation == "sub" else "+"
            new = _apply(sign, old, amount)
            shown = f"{old}{sign}{amount}={new}"
        trace.append(f"{listing[counter]}; {target}={shown}")
        if operation == "out":
            return trace, new
        value[target] = new
        counter = amount if operation == "loop" and new else counter + 1


# ---- path: follow pointers through a cycle ---------------------------------------------------------------


def _path(rng: Random, level: int) -> Problem:
    n_nodes = _draw(rng, level, (12, 40), (50, 150), (160, 300), (320, 600))
    n_steps = _draw(rng, level, (3, 10), (11, 30), (31, 80), (100, 200))
    nodes = [f"{i:03d}" for i in rng.sample(range(1000), n_nodes)]
    cycle = list(nodes)
    rng.shuffle(cycle)
    successor = {node: cycle[(i + 1) % n_nodes] for i, node in enumerate(cycle)}
    rng.shuffle(nodes)
    here = nodes[rng.randrange(n_nodes)]
    prompt = (
        "Pointers:\n"
        + "\n".join(f"{node}>{successor[node]}" for node in nodes)
        + f"\nStart at {here} and follow {n_steps} pointers. Where do you arrive?"
    )
    lines = []
    for i in range(1, n_steps + 1):
        lines.append(f"{i}: {here}>{successor[here]}")
        here = successor[here]
    return Problem(prompt, "\n".join(lines), here)


_GENERATORS = {"chain": _chain, "add": _add, "mul": _mul, "sort": _sort, "vm": _vm, "path": _path}
