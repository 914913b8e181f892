"""The task generators: the built-in model was trained on exactly these problems, so they must never drift."""

import hashlib
from random import Random

import pytest

from mixkvq.study.tasks import LEVELS, TASKS, Problem, chat, check, completion, make

# sha256 of the problems of seeds 0, 1 and 2, per level, from the generators that trained the built-in model.
GOLDEN = {
    "recall": ("72a4aca94c5e", "ca5347d19fcc", "4b804842b978", "9a3ce863d60c"),
    "chain": ("cb7beeac1c6a", "f46f43b296d8", "3faecf061ffa", "abe8d290bac5"),
    "add": ("0fad2bd78ab2", "4fb3f46684ab", "a787cf2a0903", "afe3b9a1e807"),
    "mul": ("693b0044e18c", "654be7484153", "1cf4a1d8dd66", "3412e0ab277a"),
    "sort": ("dc4493882646", "dc16727b3ab1", "008eca224182", "ae65e98f498d"),
    "vm": ("46b4f533cbf6", "12ea97aff6cc", "50e3182378f9", "9b3ced892373"),
    "path": ("ac563cb98e08", "a1b7169bf3e6", "1956134ceb8d", "e5a38e30ff25"),
}

every_cell = pytest.mark.parametrize(
    ("task", "level"), [(t, lv) for t in TASKS for lv in range(len(LEVELS))], ids=lambda v: str(v)
)


@every_cell
def test_problems_are_those_of_the_training(task, level):
    digest = hashlib.sha256()
    for seed in range(3):
        digest.update("\0".join(make(task, Random(seed), level)).encode())
    assert digest.hexdigest()[:12] == GOLDEN[task][level]


@every_cell
def test_checker_accepts_the_reference_and_rejects_a_wrong_answer(task, level):
    for seed in range(5):
        prompt, reasoning, answer = make(task, Random(seed), level)
        reference = completion(reasoning, answer)
        assert check(task, reference, answer)
        assert check(task, reference + "<|im_end|>\n", answer)
        assert not check(task, reasoning, answer), "no answer mark"
        wrong = answer[:-1] + ("1" if answer[-1] != "1" else "2")
        assert not check(task, completion(reasoning, wrong), answer)
        assert not check(task, completion(reasoning, answer + "0"), answer)
        assert not check(task, completion(reasoning, answer[:-1]), answer)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("#### 1,2", True),
        ("####1, 2", True),
        ("#### 1,2<|im_end|>", True),
        ("#### 3\n#### 1,2", True),  # the last mark counts
        ("#### 1,2\n#### 3", False),
        ("#### 1,2\nand more text", True),  # only the line of the mark
        ("1,2", False),
        ("####", False),
        ("", False),
    ],
)
def test_what_the_checker_reads(text, accepted):
    assert check("sort", text, "1,2") is accepted


def test_a_problem_is_a_plain_tuple_with_names():
    problem = make("add", Random(0), 0)
    assert isinstance(problem, Problem)
    assert tuple(problem) == (problem.prompt, problem.reasoning, problem.answer)


def test_generator_state_decides_the_problem():
    rng = Random(11)
    first, second = make("vm", rng, 1), make("vm", rng, 1)
    assert first != second
    assert make("vm", Random(11), 1) == first


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_answers_are_right(level):
    """Against arithmetic that does not go through the written steps."""
    for seed in range(20):
        prompt, _, answer = make("add", Random(seed), level)
        a, b = prompt.removeprefix("Compute ").removesuffix(".").split(" + ")
        assert int(answer) == int(a) + int(b)
        prompt, _, answer = make("mul", Random(seed), level)
        a, b = prompt.removeprefix("Compute ").removesuffix(".").split(" * ")
        assert int(answer) == int(a) * int(b)
        prompt, _, answer = make("sort", Random(seed), level)
        numbers = prompt.split(": ")[1].rstrip(".").split(",")
        assert answer == ",".join(sorted(numbers, key=int))
        prompt, _, answer = make("recall", Random(seed), level)
        asked = prompt.rsplit(": ", 1)[1].rstrip("?").split(", ")
        codes = [prompt.split(f"The code of {owner} is ")[1][:4] for owner in asked]
        assert answer == ",".join(codes)


def test_recall_may_be_filled_with_prose():
    prose_asked = []

    def prose(rng, n_chars):
        prose_asked.append(n_chars)
        return "Once upon a time."

    problems = [make("recall", Random(seed), 0, prose) for seed in range(12)]
    with_prose = [p for p in problems if "Once upon a time." in p.prompt]
    assert prose_asked and 0 < len(with_prose) < len(problems)
    assert all(check("recall", completion(p.reasoning, p.answer), p.answer) for p in problems)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="'juggle'"):
        make("juggle", Random(0), 0)


def test_chat_and_completion_make_one_text():
    assert chat("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert completion("a=1", "1") == "a=1\n#### 1"
