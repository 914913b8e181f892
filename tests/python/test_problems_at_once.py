"""Problems that are answered together: the same answers as alone, and nothing of what was answered is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from bridge import backend
from bridge.sequences import Sequences
from mixkvq.cli.evaluate import main
from mixkvq.core.errors import ContextTooLargeError, SettingsError
from mixkvq.core.model_file import built_in_model
from mixkvq.study import caches, evaluate, problems
from mixkvq.study.steps import Steps

MODEL = str(built_in_model())
OPTIONS = {"n_batch": 512, "n_threads": 1, "n_threads_batch": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def drawn():
    """Short problems, and the context that the longest needs."""
    vocabulary = caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    found = problems.BuiltIn(("add", "sort"), ("easy",)).draw(5, 6)
    n_ctx = problems.add_tokens(vocabulary, found, 70)
    for i, problem in enumerate(found):
        problem["limit"] = 70 - 9 * i  # most are cut, each elsewhere
    return found, n_ctx


def alone(problem, cache, n_ctx):
    """The greedy answer with a plain context that has seen nothing else."""
    llm = caches.open_cache(MODEL, cache, n_ctx=n_ctx, **OPTIONS)
    llm.eval(problem["tokens"])
    tokens = [int(llm.last_logits().argmax())]
    while not llm.ends(tokens[-1]) and len(tokens) < problem["limit"]:
        llm.eval(tokens[-1:])
        tokens.append(int(llm.last_logits().argmax()))
    llm.close()
    return tokens


@pytest.mark.parametrize("cache", ["f16", "near-lossless", "tiny"])
def test_one_at_a_time_is_alone(drawn, cache):
    found, n_ctx = drawn
    solver = problems.Solver(MODEL, problems.BuiltIn(), n_ctx, 1, device="cpu")
    answers = dict(solver.solve([(i, p, [cache]) for i, p in enumerate(found[:3])], 1))
    for i, problem in enumerate(found[:3]):
        answer = answers[i][cache]
        assert answer["tokens"] == alone(problem, cache, n_ctx) and answer["seconds"] > 0
        assert answer["ended"] == (len(answer["tokens"]) < problem["limit"])


@pytest.mark.parametrize("cache", ["f16", "near-lossless", "tiny"])
def test_four_at_once_answer_as_one(drawn, cache):
    """But for the rounding of batches of another size, which hardly turns an answer. There are more problems than sequences."""
    found, n_ctx = drawn
    solver = problems.Solver(MODEL, problems.BuiltIn(), n_ctx, 1, device="cpu")
    jobs = [(i, p, [cache]) for i, p in enumerate(found)]
    one, four = dict(solver.solve(jobs, 1)), dict(solver.solve(jobs, 4))
    assert sorted(one) == sorted(four) == list(range(6))
    assert len({len(one[i][cache]["tokens"]) for i in one}) > 4
    assert sum(one[i][cache]["tokens"] == four[i][cache]["tokens"] for i in one) >= 5
    assert all(one[i][cache]["tokens"][:8] == four[i][cache]["tokens"][:8] for i in one)
    for key in ("body_bits", "total_bits", "bytes", "window"):  # what one sequence takes
        a, b = one[0][cache]["sizes"][key], four[0][cache]["sizes"][key]
        assert b == (pytest.approx(a, rel=0.02) if key != "window" else a)


def test_long_prompts_at_once_answer_as_one():
    """They are packed by queries of their own: with those of another problem among them an answer would be another."""
    source, vocabulary = problems.BuiltIn(("chain",), ("medium",)), caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    found = source.draw(3, 3)
    solver = problems.Solver(MODEL, source, problems.add_tokens(vocabulary, found, 24), 1, device="cpu")
    jobs = [(i, p, ["tiny"]) for i, p in enumerate(found)]
    one, two = dict(solver.solve(jobs, 1)), dict(solver.solve(jobs, 2))
    assert all(len(p["tokens"]) > 3 * 128 for p in found)
    assert [one[i]["tiny"]["tokens"] for i in range(3)] == [two[i]["tiny"]["tokens"] for i in range(3)]


@pytest.fixture
def shown(tmp_path):
    """A file of problems, asked with three examples: they are longer than a page, and the same before each question."""
    made = problems.BuiltIn(("add", "sort"), ("easy",)).draw(8, 9)
    entries = [{"question": p["prompt"], "answer": f"{p['reasoning']} <<1+1=2>>\n#### {i}"} for i, p in enumerate(made)]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return problems.NumberFile(tmp_path / "shown.jsonl", shots=3)


def test_examples_are_problems_that_are_not_asked(shown):
    found, fewer = shown.draw(4, None), shown.draw(4, 2)
    assert len(found) == 6 and fewer == found[:2] and found != shown.draw(5, None)
    beginning = found[0]["prompt"].rpartition("Question: ")[0]
    asked = [problem["prompt"].removeprefix(beginning) for problem in found]
    assert beginning.count("Question: ") == beginning.count("#### ") == 3 and "<<" not in beginning
    assert not any(question.partition("\n")[0] in beginning for question in asked)
    assert all(problem["prompt"].startswith(beginning) and problem["prompt"].endswith(problems.INSTRUCTION) for problem in found)
    with pytest.raises(SettingsError, match="holds 9 problems, fewer than 7 and 3 examples"):
        shown.draw(4, 7)
    plain = problems.NumberFile(shown.path).draw(4, 1)[0]["prompt"]
    assert "Question: " not in plain and not problems.shared_tokens([{"tokens": [1, 2, 3]}, {"tokens": [1, 2, 4]}])


@pytest.mark.parametrize("cache", ["f16", "tiny"])
def test_what_all_prompts_begin_with_is_read_once(shown, cache, monkeypatch):
    read = []

    def count(self, sequence, tokens, read_tokens=Sequences.read, **options):
        read.append(len(tokens))
        return read_tokens(self, sequence, tokens, **options)

    monkeypatch.setattr(Sequences, "read", count)
    vocabulary = caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    found = shown.draw(4, None)
    n_ctx = problems.add_tokens(vocabulary, found, 12)
    shared = problems.shared_tokens(found)
    lengths = [len(problem["tokens"]) for problem in found]
    assert 128 <= shared < min(lengths)
    solver = problems.Solver(MODEL, shown, n_ctx, 1, device="cpu", shared=shared)
    jobs = [(i, problem, [cache]) for i, problem in enumerate(found)]
    one = dict(solver.solve(jobs, 1))
    assert sum(read) == shared + sum(n - shared for n in lengths)
    three = dict(solver.solve(jobs, 3))
    apart = dict(problems.Solver(MODEL, shown, n_ctx, 1, device="cpu").solve(jobs, 1))
    assert [one[i][cache]["tokens"][0] for i in range(6)] == [three[i][cache]["tokens"][0] for i in range(6)]
    for others in (three, apart):
        assert sum(one[i][cache]["tokens"] == others[i][cache]["tokens"] for i in range(6)) >= 4  # the rest by rounding
    for key in ("body_bits", "total_bits"):
        assert one[0][cache]["sizes"][key] == pytest.approx(apart[0][cache]["sizes"][key], rel=0.02)


def test_as_many_at_once_as_fit(drawn, monkeypatch):
    """Unless somebody has said how many."""
    found, n_ctx = drawn
    asked = []

    def small(model, cache, kind, *, n_seq, open_cache=problems.open_cache, **options):
        asked.append(n_seq)
        if n_seq > 2:
            raise ContextTooLargeError("This takes 2 GiB, and 1 GiB is free.")
        return open_cache(model, cache, kind, n_seq=n_seq, **options)

    monkeypatch.setattr(problems, "open_cache", small)
    jobs = [(i, {**p, "limit": 2}, ["f16"]) for i, p in enumerate(found)]
    assert len(dict(problems.Solver(MODEL, problems.BuiltIn(), n_ctx, 1, device="cpu", fewer=True).solve(jobs, 6))) == 6
    assert asked == [6, 3, 1]
    with pytest.raises(ContextTooLargeError, match="1 GiB is free. It is for 6 problems at once; fewer --workers take less."):
        list(problems.Solver(MODEL, problems.BuiltIn(), n_ctx, 1, device="cpu").solve(jobs, 6))
    monkeypatch.setattr(backend, "stock_gpus", lambda: ["CUDA0"])
    assert problems.default_at_once("auto") == problems.default_at_once("CUDA0") == 32 and problems.default_at_once("cpu") == 8


def test_a_problem_gets_the_caches_that_it_lacks(drawn):
    found, n_ctx = drawn
    solver = problems.Solver(MODEL, problems.BuiltIn(), n_ctx, 1, device="cpu")
    short = [{**problem, "limit": 3} for problem in found]
    jobs = [(0, short[0], ["f16", "tiny"]), (3, short[1], ["tiny"]), (7, short[2], ["q8_0", "f16"])]
    pairs = [(index, cache) for index, answers in solver.solve(jobs, 2) for cache in answers]
    assert sorted(pairs) == [(0, "f16"), (0, "tiny"), (3, "tiny"), (7, "f16"), (7, "q8_0")]


# Ends as SIGKILL ends it, once it has saved the first answers.
KILLED = """
import os, signal, sys
from bridge import backend
from bridge.sequences import Sequences
from mixkvq.cli.evaluate import main
from mixkvq.core.errors import ContextTooLargeError, SettingsError
from mixkvq.study import evaluate

def save(path, result, save=evaluate.save_json):
    save(path, result)
    if result["problems"]["records"]:
        os.kill(os.getpid(), signal.SIGKILL)

evaluate.save_json = save
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(tmp_path):
    out = tmp_path / "answers.json"
    command = [
        sys.executable, "-m", "mixkvq.evaluate", MODEL, "--problems", "6", "--tasks", "add,mul", "--levels", "easy", "--kv", "tiny",
        "--out", out, "--threads", "1", "--workers", "2", "--device", "cpu", "-q",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, command[3:])], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = json.loads(out.read_text())["problems"]["records"]
    assert main([str(a) for a in command[3:]]) == 0
    part = json.loads(out.read_text())["problems"]
    assert len(part["records"]) == 6 and part["summary"]["tiny"]["problems"] == part["summary"]["f16"]["problems"] == 6
    for old in left:
        (new,) = (r for r in part["records"] if r["index"] == old["index"])
        assert all(new["answers"][cache] == answer for cache, answer in old["answers"].items())


def test_writing_a_long_result_does_not_take_over(tmp_path, monkeypatch):
    """Saving costs a second here, by a clock that only saving moves; a hundred answers are saved twice: the first, and all at the end."""
    saved, now = [], [0.0]

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

    def save(path, result):
        now[0] += 1.0
        saved.append(len(result["problems"]["records"]))

    class Everything:
        def __init__(self, *_arguments, **_options):
            pass

        def solve(self, jobs, at_once):
            for index, _, missing in jobs:
                for cache in missing:
                    yield index, {cache: {"correct": True, "ended": True, "tokens": [1], "seconds": 0.1, "sizes": {}}}

    monkeypatch.setattr(evaluate, "time", Clock)
    monkeypatch.setattr(evaluate, "save_json", save)
    monkeypatch.setattr(evaluate.problems, "Solver", Everything)
    monkeypatch.setattr(evaluate.problems, "summarise", lambda *_: {})
    vocabulary = caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    result = {"settings": {"baseline": "f16", "seed": 1}, "model": {"name": "m"}}
    run = evaluate.Evaluation(MODEL, result, tmp_path / "x.json", Steps(), set(), 1, 1, {})
    source = problems.BuiltIn(("add",), ("easy",))
    evaluate.answer_problems(run, vocabulary, source, 50, ["tiny"], max_tokens=5, first=1, workers=1, threads=1)
    assert saved == [1, 50] and len(result["problems"]["records"]) == 50
