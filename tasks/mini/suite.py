"""The mini suite: procedurally generated small versions of GSM8K, MATH500, HumanEval and MMLU, at three levels each.

A generator takes a random stream and a level (1 easy, 3 hard) and returns a row. One of mini_math, level 1:

    {"task": "mini_math", "level": 1, "key": "Compute $19-16$.", "problem": "Compute $19-16$.",
     "solution": "We have $19-16=3$. So the answer is $\\boxed{3}$.\\nFinal Answer: …",
     "prompt": "Problem:\\nCompute $19-16$.\\n\\nSolution:", "completion": " We have $19-16=3$. …"}

The hash of a row's key decides its split: 0 modulo HELD_OUT is test, else training. So no question is in both. Test
sets are the first TEST_ROWS rows of a stream with a fixed seed.

    python tasks/mini/suite.py --count 100000 --seed 1 --out train.jsonl     training rows: prompt, completion
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LEVELS = (1, 2, 3)
HELD_OUT = 16
TEST_ROWS = 70
TEST_SEED = 20260101

WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
NAMES, ITEMS, CATEGORIES, OPPOSITES = (WORDS[name] for name in ("names", "items", "categories", "opposites"))
REACH = {1: 20, 2: 30, 3: 40}
"""Largest number in a word problem, by level."""


def word_problem(rng: random.Random, level: int) -> Row:
    """A word problem with `level` arithmetic steps, answered step by step as in GSM8K."""
    name, friend = rng.sample(NAMES, 2)
    he, him = ("she", "her") if name in WORDS["female"] else ("he", "him")
    words = {"name": name, "friend": friend, "items": rng.choice(ITEMS), "he": he, "him": him}
    value = rng.randint(2, REACH[level] - 1)
    story = [rng.choice(WORDS["starts"]).format(n=value, **words)]
    steps = []
    for _ in range(level):
        sign, n, result = _change(rng, value, REACH[level])
        templates = rng.choice(WORDS["changes"][sign])
        story.append(rng.choice(templates).format(n=n, **words))
        shown = f"{value} {sign} {n} = <<{value}{sign}{n}={result}>>{result}"
        step = rng.choice(WORDS["steps"][sign]).format(sum=shown, **words)
        steps.append(step[0].upper() + step[1:])
        value = result
    question = ". ".join(s[0].upper() + s[1:] for s in story) + ". " + rng.choice(WORDS["asks"]).format(**words)
    answer = "\n".join([*steps, f"#### {value}"])
    return {
        "task": "mini_gsm8k", "level": level, "key": question, "question": question, "answer": answer,
        "prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}",
    }  # fmt: skip


def _change(rng: random.Random, value: int, reach: int) -> tuple[str, int, int]:
    """An operation, its operand and the result, a whole number in 1..reach."""
    choices = []
    if value < reach:
        n = rng.randint(1, min(9, reach - value))
        choices.append(("+", n, value + n))
    if value > 1:
        n = rng.randint(1, min(9, value - 1))
        choices.append(("-", n, value - n))
    if (factors := [n for n in (2, 3, 4) if value * n <= reach]) and value > 1:
        n = rng.choice(factors)
        choices.append(("*", n, value * n))
    if parts := [n for n in (2, 3, 4, 5) if value % n == 0 and value > n]:
        n = rng.choice(parts)
        choices.append(("/", n, value // n))
    return rng.choice(choices)


MathCase = tuple[str, str, int]
"""Problem, working, answer."""
COMPUTE = ("Compute ${}$.", "What is ${}$?", "Find the value of ${}$.")
SOLVE = ("Solve for $x$: ${}$.", "If ${}$, what is $x$?")


def _sum_case(rng: random.Random, top: int) -> MathCase:
    a, b = rng.randint(1, top), rng.randint(1, top)
    ask = rng.choice(COMPUTE).format(f"{a}+{b}")
    return ask, f"We have ${a}+{b}={a + b}$.", a + b


def _difference_case(rng: random.Random, top: int) -> MathCase:
    b, a = sorted((rng.randint(1, top), rng.randint(1, top)))
    ask = rng.choice(COMPUTE).format(f"{a}-{b}")
    return ask, f"We have ${a}-{b}={a - b}$.", a - b


def _product_case(rng: random.Random, top: int) -> MathCase:
    a, b = rng.randint(2, 9), rng.randint(2, max(3, top // 6))
    ask = rng.choice(("Compute ${}$.", "What is the product ${}$?")).format(f"{a} \\cdot {b}")
    return ask, f"We have ${a} \\cdot {b}={a * b}$.", a * b


def _equation_case(rng: random.Random, top: int) -> MathCase:
    x, b = rng.randint(1, top), rng.randint(1, top)
    ask = rng.choice(SOLVE).format(f"x+{b}={x + b}")
    return ask, f"Subtracting ${b}$ from both sides gives $x={x + b}-{b}={x}$.", x


def _rectangle_case(rng: random.Random, top: int) -> MathCase:
    a, b = rng.randint(2, top // 2), rng.randint(2, top // 2)
    ask = f"A rectangle has sides of length ${a}$ and ${b}$. What is its perimeter?"
    working = f"The sides add up to ${a}+{b}={a + b}$. The perimeter is $2 \\cdot {a + b}={2 * (a + b)}$."
    return ask, working, 2 * (a + b)


def _remainder_case(rng: random.Random, top: int) -> MathCase:
    b = rng.randint(2, 9)
    q, r = rng.randint(1, max(2, top // 9)), rng.randint(0, b - 1)
    ask = f"What is the remainder when ${q * b + r}$ is divided by ${b}$?"
    return ask, f"Since ${q} \\cdot {b}={q * b}$, the remainder is ${q * b + r}-{q * b}={r}$.", r


def _linear_case(rng: random.Random, top: int) -> MathCase:
    a, x, b = rng.randint(2, 5), rng.randint(1, max(2, top // 5)), rng.randint(1, top)
    ask = rng.choice(SOLVE).format(f"{a}x+{b}={a * x + b}")
    return ask, f"Subtracting gives ${a}x={a * x + b}-{b}={a * x}$. Dividing gives $x={x}$.", x


MATH_CASES: dict[int, tuple[Callable[[random.Random, int], MathCase], ...]] = {
    1: (_sum_case, _difference_case),
    2: (_product_case, _equation_case, _sum_case),
    3: (_rectangle_case, _remainder_case, _linear_case),
}


def boxed_problem(rng: random.Random, level: int) -> Row:
    """A short problem whose answer is boxed and repeated in Minerva's closing sentence, as in MATH500."""
    problem, working, value = rng.choice(MATH_CASES[level])(rng, {1: 20, 2: 24, 3: 30}[level])
    solution = (
        f"{working} So the answer is $\\boxed{{{value}}}$.\n"
        f"Final Answer: The final answer is ${value}$. I hope it is correct."
    )
    return {
        "task": "mini_math", "level": level, "key": problem, "problem": problem, "solution": solution,
        "prompt": f"Problem:\n{problem}\n\nSolution:", "completion": f" {solution}",
    }  # fmt: skip


ON_NUMBERS = (
    ("add_{n}", "x plus {n}", "x + {n}"),
    ("subtract_{n}", "x minus {n}", "x - {n}"),
    ("times_{n}", "x times {n}", "x * {n}"),
    ("is_multiple_of_{n}", "True if x is a multiple of {n}", "x % {n} == 0"),
    ("is_above_{n}", "True if x is above {n}", "x > {n}"),
    ("square_plus_{n}", "the square of x plus {n}", "x * x + {n}"),
)
ON_LISTS = (
    ("sum_times_{n}", "the sum of the numbers times {n}", "sum(numbers) * {n}"),
    ("largest_plus_{n}", "the largest number plus {n}", "max(numbers) + {n}"),
    ("smallest_minus_{n}", "the smallest number minus {n}", "min(numbers) - {n}"),
    ("length_plus_{n}", "how many numbers there are plus {n}", "len(numbers) + {n}"),
    ("above_{n}", "the numbers above {n}", "[x for x in numbers if x > {n}]"),
    ("each_times_{n}", "each number times {n}", "[x * {n} for x in numbers]"),
)
FILTERS = (
    ("above_{n}", "above {n}", "x > {n}"),
    ("below_{n}", "below {n}", "x < {n}"),
    ("other_than_{n}", "other than {n}", "x != {n}"),
    ("multiple_of_{n}", "that are multiples of {n}", "x % {n} == 0"),
)
MAPS = (
    ("plus_{m}", "plus {m}", "x + {m}"),
    ("minus_{m}", "minus {m}", "x - {m}"),
    ("times_{m}", "times {m}", "x * {m}"),
    ("squared_plus_{m}", "squared plus {m}", "x * x + {m}"),
)
FOLDS = (
    ("list", "a list of {}", "[{}]"),
    ("sum", "the sum of {}", "sum({})"),
    ("sorted", "a sorted list of {}", "sorted({})"),
    ("largest", "the largest of {}, or 0", "max(({}), default=0)"),
)
DOCSTRINGS = ("Return {what}.", "Give back {what}.", "The result is {what}.")


def function_body(rng: random.Random, level: int) -> Row:
    """A signature and docstring whose body the model writes, scored by tests, as in HumanEval."""
    # 1) the function: name, description, expression
    n, m = rng.randint(2, 99), rng.randint(2, 99)
    if level == 3:
        filter_name, filter_words, condition = rng.choice(FILTERS)
        map_name, map_words, mapped = rng.choice(MAPS)
        fold_name, fold_words, fold = rng.choice(FOLDS)
        name = f"{fold_name}_{map_name}_{filter_name}".format(n=n, m=m)
        what = fold_words.format(f"the numbers {filter_words}, each {map_words}".format(n=n, m=m))
        inside = f"{mapped} for x in numbers if {condition}".format(n=n, m=m)
        expression = fold.format(f"[{inside}]" if fold_name == "sorted" else inside)
    else:
        name, what, expression = (part.format(n=n) for part in rng.choice(ON_LISTS if level == 2 else ON_NUMBERS))
    # 2) prompt and body
    argument = "x" if level == 1 else "numbers"
    shape = "x: int" if level == 1 else "numbers: list[int]"
    docstring = rng.choice(DOCSTRINGS).format(what=what)
    prompt = f'def {name}({shape}):\n    """{docstring}"""\n'
    body = rng.choice((f"    return {expression}\n", f"    result = {expression}\n    return result\n"))
    # 3) tests
    inputs = [0, 1, n, n + 3, 6 * n] if level == 1 else [[3, 1, n, n + 4], [n + 1], [5, 2 * n, 7]]
    checks = "".join(f"    assert candidate({v!r}) == {eval(expression, {argument: v})!r}\n" for v in inputs)
    return {
        "task": "mini_humaneval", "level": level, "key": prompt, "prompt": prompt, "completion": body,
        "entry_point": name, "test": f"def check(candidate):\n{checks}",
    }  # fmt: skip


Choice = tuple[str, str, list[str]]
"""Question, right answer, wrong answers."""


LISTED = ("fruit", "animal", "colour", "tool")
"""Categories of levels 1 and 2, always in this order or rotated."""
RANGES = (("1 to 10", 1), ("11 to 20", 11), ("21 to 30", 21), ("31 to 40", 31))


def _kind_choice(rng: random.Random) -> Choice:
    kind = rng.choice(LISTED)
    words = ", ".join(rng.sample(CATEGORIES[kind], 3))
    ask = rng.choice(("What do {} have in common?", "Which kind are {}?", "The words {} all name one kind. Which?"))
    return ask.format(words), kind, [other for other in LISTED if other != kind]


def _range_choice(rng: random.Random) -> Choice:
    right, low = rng.choice(RANGES)
    n, item, name = rng.randint(low, low + 9), rng.choice(ITEMS), rng.choice(NAMES)
    ask = rng.choice(("{name} has {n} {items}. Which range is this in?", "Where does the number {n} of {items} lie?"))
    return ask.format(n=n, items=item, name=name), right, [other for other, _ in RANGES if other != right]


def _category_choice(rng: random.Random) -> Choice:
    kind, *others = rng.sample(list(CATEGORIES), 4)
    ask = rng.choice(("Which of these is a kind of {}?", "Which word names a {}?", "Find the {}.")).format(kind)
    return ask, rng.choice(CATEGORIES[kind]), [rng.choice(CATEGORIES[other]) for other in others]


def _opposite_choice(rng: random.Random) -> Choice:
    word, right = rng.choice(list(OPPOSITES.items()))
    others = [rng.choice(pair) for pair in OPPOSITES.items() if word not in pair]
    return f"What is the opposite of {word}?", right, rng.sample(others, 3)


def _largest_choice(rng: random.Random) -> Choice:
    numbers = sorted(rng.sample(range(1, 40), 4))
    mixed = rng.sample(numbers, 4)
    listing = ", ".join(map(str, mixed[:-1])) + f" and {mixed[-1]}"
    texts = [str(number) for number in numbers]
    if rng.random() < 0.5:
        return f"Which number is the largest of {listing}?", texts[-1], texts[:-1]
    return f"Which number is the smallest of {listing}?", texts[0], texts[1:]


CHOICES: dict[int, tuple[Callable[[random.Random], Choice], ...]] = {
    1: (_kind_choice, _range_choice),
    2: (_kind_choice, _range_choice),
    3: (_category_choice, _opposite_choice, _largest_choice),
}


def four_choices(rng: random.Random, level: int) -> Row:
    """A question with four choices, answered by the letter's likelihood, as in MMLU.

    The choices' order is fixed at level 1, rotated at level 2, random at level 3. Only at level 3 must a model bind a
    letter to its choice, which small models learn late.
    """
    question, right, wrong = rng.choice(CHOICES[level])(rng)
    if level == 3:
        choices = rng.sample([right, *wrong], 4)
    else:
        order = LISTED if right in LISTED else tuple(name for name, _ in RANGES)
        turn = rng.randrange(4) if level == 2 else 0
        choices = [*order[turn:], *order[:turn]]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    answer = choices.index(right)
    return {
        "task": "mini_mmlu", "level": level, "key": f"{question}\n{listed}", "question": question, "choices": choices,
        "answer": answer, "prompt": f"{question}\n{listed}\nAnswer:", "completion": f" {'ABCD'[answer]}",
    }  # fmt: skip


TASKS: dict[str, Callable[[random.Random, int], Row]] = {
    "mini_gsm8k": word_problem,
    "mini_math": boxed_problem,
    "mini_humaneval": function_body,
    "mini_mmlu": four_choices,
}
SHARES = {"mini_gsm8k": 4, "mini_math": 4, "mini_humaneval": 2, "mini_mmlu": 3}
"""Relative frequency of each task among training rows."""


def held_out(row: Row) -> bool:
    """Whether a row belongs to the test split."""
    return int.from_bytes(hashlib.sha256(row["key"].encode()).digest()[:4]) % HELD_OUT == 0


def stream(task: str, level: int, seed: int) -> Iterator[Row]:
    """An endless stream of rows of one task and level."""
    rng = random.Random(f"{task}/{level}/{seed}")
    make: Callable[[random.Random, int], Row] = TASKS[task]
    while True:
        yield make(rng, level)


def test_rows(task: str, level: int) -> list[Row]:
    """The task's fixed test set at one level: TEST_ROWS distinct held-out rows."""
    rows: dict[str, Row] = {}
    for row in stream(task, level, TEST_SEED):
        if held_out(row):
            rows.setdefault(row["key"], row)
        if len(rows) == TEST_ROWS:
            break
    return list(rows.values())


def dataset(task: str, level: int, **_metadata: Any) -> dict[str, Any]:
    """The test split, as lm-eval's `custom_dataset` expects it."""
    import datasets

    return {"test": datasets.Dataset.from_list(test_rows(task, level))}


def train_rows(count: int, seed: int) -> Iterator[Row]:
    """`count` training rows as prompt and completion, tasks drawn by SHARES and levels evenly."""
    rng = random.Random(seed)
    streams = {(task, level): stream(task, level, seed) for task in TASKS for level in LEVELS}
    for _ in range(count):
        (task,) = rng.choices(list(SHARES), list(SHARES.values()))
        rows = streams[task, rng.choice(LEVELS)]
        row = next(row for row in rows if not held_out(row))
        yield {"prompt": row["prompt"], "completion": row["completion"], "task": row["task"], "level": row["level"]}


def main() -> None:
    """Write training rows as JSON lines."""
    parser = argparse.ArgumentParser(description="training rows of the mini suite, as JSON lines")
    for name, kind in (("count", int), ("seed", int), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in train_rows(options.count, options.seed))


if __name__ == "__main__":
    main()
