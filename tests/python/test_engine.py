"""The engine: several answers at once, each as if it were alone, from what streams and files hold of its prompt."""

from __future__ import annotations

import json
import queue
import time

import numpy as np
import pytest
import tiny_models

from bridge.engine import Done, Engine, Failed, Piece, Progress, Request, Sampling, Streams
from bridge.engine.events import Chosen
from bridge.engine.parking import Parking
from bridge.engine.prefixes import Begin, choose, common
from bridge.engine.sampling import Sampler, grammar_for, logprobs
from bridge.engine.stopping import Writer
from mixkvq.core.errors import BusyError, ContextError, SettingsError, TimeLimitError
from mixkvq.core.model_file import built_in_model

SPARE = {"n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False, "n_batch": 256, "n_ubatch": 256}
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("engine") / "tiny.gguf"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return str(tiny_models.lfm2(tmp_path_factory.mktemp("engine") / "lfm2.gguf"))


def engine_of(model, n_seq=2, n_ctx=1024, **options):
    settings = {name: options.pop(name) for name in ("parking", "longest_queue", "pause") if name in options}
    return Engine(Streams(model, n_seq=n_seq, n_ctx=n_ctx, **{**SPARE, **options}), **settings)


def words(seed, n):
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


def tokens_of(answer):
    return [chosen.token for chosen in answer.tokens]


def heard(engine, request):
    """Submit, and give the job and a queue of what it hears of."""
    events = queue.SimpleQueue()
    return engine.submit(request, events.put), events


def rest(events, timeout=60):
    found = [events.get(timeout=timeout)]
    while not isinstance(found[-1], (Done, Failed)):
        found.append(events.get(timeout=timeout))
    return found


# --- what does not need a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "said", "word"),
    [
        (["a", "b", "c"], "abc", ""),
        (["Hello w", "orld", "! more"], "Hello world", "!"),
        (["one ST", "OP two"], "one ", "STOP"),
        (["one ST", "ART"], "one START", ""),
        (["xSTOPEND"], "x", "STOPEND"),
    ],
)
def test_stop_strings_are_found_across_tokens_and_never_said(texts, said, word):
    writer = Writer(["!", "STOP", "STOPEND"])
    pieces = []
    for text in texts:
        pieces.append(writer.add(Chosen(1, text.encode())))
        if writer.word:
            break
    else:
        pieces.append(writer.end())
    assert "".join(piece.text for piece in pieces if piece) == said
    assert writer.word == word


def test_characters_of_several_tokens_are_said_whole():
    writer, text = Writer(), "é漢🙂"
    pieces = [writer.add(Chosen(1, bytes([byte]))) for byte in text.encode()]
    assert [piece.text for piece in pieces if piece] == list(text)
    assert sum(len(piece.tokens) for piece in pieces if piece) == len(text.encode())


def test_where_a_prompt_begins():
    assert common(list(range(100)), [*range(80), 5]) == 80 and common([1], [2]) == common([], [1]) == 0
    assert choose([100, 0], [90, 0], [0, 1]) == Begin(0, 90)  # goes on
    assert choose([1000, 0], [90, 0], [0, 1]) == Begin(1, 90, 0)  # another chat with the same beginning
    assert choose([1000, 500], [90, 0], [0]) == Begin(0, 90)  # no other is free
    assert choose([1000, 0], [90, 0], [1]) == Begin(1, 90, 0)  # the best is busy
    assert choose([1000, 500], [10, 0], [1, 0]) == Begin(1, 0)  # the least recently used
    assert choose([0, 0], [0, 0], [1, 0]) == Begin(0, 0)  # neighbours share a batch
    assert choose([1000, 995, 500], [1000, 990, 0], [2, 1]) == Begin(1, 990)  # no other chat goes for the sake of ten tokens


def test_logprobs_are_those_of_softmax():
    row = np.array([1.0, 3.0, 2.0, -4.0], np.float32)
    own, top = logprobs(row, 2, 3)
    expected = row - np.log(np.exp(row).sum())
    assert own == pytest.approx(expected[2])
    assert [i for i, _ in top] == [1, 2, 0] and top[0][1] == pytest.approx(expected[1])


# --- answers ------------------------------------------------------------------------------------------------------------------------


def alone(model, prompt, n, **options):
    with engine_of(model, **options) as engine:
        return tokens_of(engine.answer(Request(prompt, GREEDY, max_tokens=n, ignore_end=True)))


@pytest.mark.parametrize("cache", [{"stock": "f16"}, {"kv": "balanced"}])
def test_answers_beside_each_other_are_those_of_one_alone(tiny, cache):
    prompts = [words(seed, n) for seed, n in ((1, 300), (2, 20), (3, 150), (4, 1))]
    expected = [alone(tiny, prompt, 12, **cache) for prompt in prompts]
    with engine_of(tiny, n_seq=3, **cache) as engine:  # the fourth waits for a stream
        asked = [heard(engine, Request(prompt, GREEDY, max_tokens=12, ignore_end=True))[1] for prompt in prompts]
        for events, tokens in zip(asked, expected):
            found = rest(events)
            assert [chosen.token for event in found if isinstance(event, Piece) for chosen in event.tokens] == tokens
            assert found[-1].reason == "limit" and found[-1].generated == 12
        assert engine.totals["requests"] == 4 and engine.totals["failed"] == 0


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(tiny):
    with engine_of(tiny) as engine:
        answers = [tokens_of(engine.answer(Request(words(1, 30), Sampling(temperature=2, top_k=0, seed=seed), 20))) for seed in (7, 7, 8)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("cache", [{"stock": "f16"}, {"kv": "balanced"}])
def test_a_chat_goes_on_in_its_stream_and_another_takes_a_copy_of_the_beginning(tiny, cache):
    first = words(1, 400)
    with engine_of(tiny, n_seq=3, **cache) as engine:
        one = engine.answer(Request(first, GREEDY, 10, ignore_end=True))
        again = [*first, *tokens_of(one), *words(2, 20)]
        two = engine.answer(Request(again, GREEDY, 10, ignore_end=True))
        assert (two.done.stream, two.done.cached) == (one.done.stream, 409)  # the last token was chosen, not evaluated
        branch = [*first[:150], *words(3, 30)]
        three = engine.answer(Request(branch, GREEDY, 10, ignore_end=True))
        assert three.done.stream != one.done.stream and three.done.cached == 150
        if "stock" in cache:  # else what was packed of the first is not packed in a text of 180 tokens: other roundings
            assert tokens_of(three) == alone(tiny, branch, 10, **cache)
        four = engine.answer(Request([*again, *tokens_of(two)], GREEDY, 2))
        assert (four.done.stream, four.done.cached) == (one.done.stream, len(again) + 9)  # the branch has left it alone
        assert engine.answer(Request(first, GREEDY, 2, reuse=False)).done.cached == 0


def test_a_prompt_that_another_request_reads_is_read_once(tiny):
    prompt = words(1, 900)
    with engine_of(tiny, n_seq=4) as engine:
        asked = [heard(engine, Request(prompt, Sampling(seed=i, temperature=2, top_k=0), 5, ignore_end=True))[1] for i in range(4)]
        ends = [rest(events)[-1] for events in asked]
        assert sorted(end.cached for end in ends) == [0, 899, 899, 899]
        assert engine.totals["prompt"] == 903


def test_a_hybrid_goes_on_from_whole_streams_only(hybrid):
    """What its recurrent layers hold cannot be taken back: of another end nothing is used, and the answer is right."""
    first = words(1, 300)
    with engine_of(hybrid, n_seq=2, kv="balanced") as engine:
        one = engine.answer(Request(first, GREEDY, 8, ignore_end=True))
        held = [*first, *tokens_of(one)]
        other = [*first[:200], *words(2, 10)]
        two = engine.answer(Request(other, GREEDY, 8, ignore_end=True))
        assert two.done.cached == 0 and tokens_of(two) == alone(hybrid, other, 8, kv="balanced")
        three = engine.answer(Request([*held, *words(3, 5)], GREEDY, 8, ignore_end=True))
        assert three.done.cached == len(held) - 1
        assert tokens_of(three) == alone(hybrid, [*held, *words(3, 5)], 8, kv="balanced")


@pytest.mark.parametrize("swa_full", [True, False])
def test_a_sliding_window_goes_back_as_far_as_it_still_sees(tmp_path, swa_full):
    model = str(tiny_models.gemma2(tmp_path / "gemma2.gguf"))  # a window of 150
    first = words(1, 700)
    with engine_of(model, n_seq=2, n_ubatch=64, swa_full=swa_full) as engine:
        engine.answer(Request(first, GREEDY, 2, ignore_end=True))
        other = [*first[:200], *words(2, 10)]
        answer = engine.answer(Request(other, GREEDY, 6, ignore_end=True))
        assert answer.done.cached == (200 if swa_full else 0)
        assert tokens_of(answer) == alone(model, other, 6, n_ubatch=64, swa_full=swa_full)


def test_a_lora_adapter_counts(tiny, tmp_path):
    adapter = tiny_models.adapter(tmp_path / "lora.gguf", 64, 256, 1)
    assert alone(tiny, words(1, 30), 8, lora_path=adapter) != alone(tiny, words(1, 30), 8)


# --- files --------------------------------------------------------------------------------------------------------------------------


def test_chats_are_parked_and_resumed_also_by_another_engine(tiny, tmp_path):
    chats = [words(seed, 400) for seed in range(3)]
    expected = []
    with engine_of(tiny, n_seq=1, parking=Parking(tmp_path)) as engine:
        for chat in chats:  # the second time from what the stream holds, as later from what the file holds
            request = Request([*chat, 5, 6], GREEDY, 5, ignore_end=True)
            engine.answer(request)
            expected.append(tokens_of(engine.answer(request)))
        assert engine.totals["parked"] == 2
        again = engine.answer(Request([*chats[0], 5, 6], GREEDY, 5, ignore_end=True))
        assert again.done.cached == 401 and tokens_of(again) == expected[0]
    with engine_of(tiny, n_seq=1, parking=Parking(tmp_path)) as engine:  # the first has parked what it held when it was closed
        for chat, tokens in zip(chats, expected):
            answer = engine.answer(Request([*chat, 5, 6], GREEDY, 5, ignore_end=True))
            assert answer.done.cached == 401 and tokens_of(answer) == tokens
        assert engine.totals["resumed"] == 3
    with engine_of(tiny, n_seq=1, kv="tiny", parking=Parking(tmp_path)) as engine:  # another cache
        assert engine.answer(Request([*chats[0], 5, 6], GREEDY, 5)).done.cached == 0


def test_a_damaged_file_is_deleted_and_its_prompt_read(tiny, tmp_path):
    chats = [words(seed, 400) for seed in range(2)]
    with engine_of(tiny, n_seq=1, parking=Parking(tmp_path)) as engine:
        expected = tokens_of(engine.answer(Request(chats[0], GREEDY, 5, ignore_end=True)))
        engine.answer(Request(chats[1], GREEDY, 5))
        (path,) = tmp_path.glob("*.mixkvq-state")
        data = bytearray(path.read_bytes())
        data[-100] ^= 255
        path.write_bytes(data)
        answer = engine.answer(Request(chats[0], GREEDY, 5, ignore_end=True))
        assert answer.done.cached == 0 and tokens_of(answer) == expected and not path.exists()


def test_files_stay_within_the_budget(tiny, tmp_path):
    with engine_of(tiny, n_seq=1, parking=Parking(tmp_path)) as engine:
        engine.answer(Request(words(0, 400), GREEDY, 2))
        engine.answer(Request(words(1, 400), GREEDY, 2))
        size = next(tmp_path.glob("*.mixkvq-state")).stat().st_size
    with engine_of(tiny, n_seq=1, parking=Parking(tmp_path, capacity_bytes=2 * size + size // 2)) as engine:
        for seed in range(2, 6):
            engine.answer(Request(words(seed, 400), GREEDY, 2))
        assert len(list(tmp_path.glob("*.mixkvq-state"))) == 2


# --- ends and errors ----------------------------------------------------------------------------------------------------------------


def test_a_request_is_cancelled_while_its_prompt_is_read_and_its_stream_goes_on(tiny):
    with engine_of(tiny, n_ctx=8192, n_batch=64, n_ubatch=64) as engine:
        job, events = heard(engine, Request(words(1, 8000), GREEDY, 5, progress=True))
        while not (isinstance(event := events.get(timeout=60), Progress) and event.read):
            pass
        job.cancel()
        end = rest(events)[-1]
        assert end.reason == "cancelled" and end.generated == 0 and engine.totals["prompt"] < 8000
        read = engine.totals["prompt"]
        assert engine.answer(Request([*words(1, 8000)[:read], 5], GREEDY, 2)).done.cached == read  # what was read counts


def test_running_answers_go_on_while_a_prompt_is_read(tiny):
    with engine_of(tiny, n_ctx=4096, pause=0.0) as engine:
        heard(engine, Request(words(2, 10), GREEDY, 4000, ignore_end=True))[1].get(timeout=60)
        _, events = heard(engine, Request(words(1, 320), GREEDY, 1, progress=True))
        found = rest(events)
        reads = [event.read for event in found if isinstance(event, Progress)]
        assert all(b - a <= 16 for a, b in zip(reads, reads[1:])) and len(reads) >= 20
        assert next(iter(engine.jobs().values())).generated >= 19


def test_more_requests_than_may_wait_are_refused(tiny):
    with engine_of(tiny, n_seq=1, longest_queue=2, n_ctx=4096) as engine:
        running, events = heard(engine, Request(words(1, 10), GREEDY, 4000, ignore_end=True))
        events.get(timeout=60)
        waiting = [heard(engine, Request([7], GREEDY, 1, deadline=0.3)) for _ in range(2)]
        with pytest.raises(BusyError, match="as many requests wait as may, 2"):
            engine.submit(Request([7]), print)
        for _, events in waiting:
            assert isinstance(rest(events)[-1].error, TimeLimitError)
        running.cancel()
        assert engine.answer(Request([7], GREEDY, 1)).done.generated == 1
    with engine_of(tiny, n_seq=1, longest_queue=0) as engine:  # what finds a stream does not wait
        assert engine.answer(Request([7], GREEDY, 1)).done.generated == 1


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request([]), SettingsError, "empty"),
        (Request([259]), SettingsError, "Token 259"),
        (Request([1] * 1024), ContextError, "1024 tokens"),
        (Request([1], Sampling(grammar="root ::= (")), SettingsError, "GBNF"),
        (Request([1], Sampling(grammar="a ::= b")), SettingsError, "GBNF"),
        (Request([1], Sampling(logit_bias={300: 1.0})), SettingsError, "logit_bias"),
        (Request([1], stream=2), SettingsError, "no stream 2"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(tiny, request_, error, says):
    with engine_of(tiny) as engine, pytest.raises(error, match=says):
        engine.submit(request_, print)


def test_an_answer_ends_where_the_stream_is_full(tiny):
    with engine_of(tiny, n_ctx=256) as engine:
        done = engine.answer(Request(words(1, 250), GREEDY, ignore_end=True)).done
        assert done.reason == "full" and done.prompt + done.generated == 257


def test_an_error_ends_the_request_it_is_of(tiny):
    """A codec that fails for one text, beside another one and alone: the other answer goes on to its end, and so does the engine."""
    fail = [2]

    def codec(page):
        if page.stream == 1 and fail[0]:
            fail[0] -= 1
            raise ValueError("as the test wants it")
        return page.rows, 16.0

    with engine_of(tiny, codec=codec, kv={"window": 0, "sinks": 0}) as engine:
        expected = tokens_of(engine.answer(Request(words(1, 5), GREEDY, 900, ignore_end=True, stream=0, reuse=False)))
        _, beside = heard(engine, Request(words(1, 5), GREEDY, 900, ignore_end=True, stream=0, reuse=False))
        first = [beside.get(timeout=60)]
        _, failing = heard(engine, Request(words(2, 400), GREEDY, 5, ignore_end=True, stream=1))
        failed = rest(failing)[-1]
        assert isinstance(failed, Failed) and isinstance(failed.error, ContextError) and "as the test wants it" in str(failed.error)
        assert engine.jobs()  # the other one still runs
        found = [*first, *rest(beside)]
        assert [chosen.token for event in found if isinstance(event, Piece) for chosen in event.tokens] == expected
        assert engine.totals["failed"] == 1
        assert engine.answer(Request(words(2, 400), GREEDY, 5, ignore_end=True, stream=1)).done.generated == 5


def test_closing_ends_what_runs(tiny):
    engine = engine_of(tiny, n_ctx=8192)
    _, events = heard(engine, Request(words(1, 10), GREEDY, ignore_end=True))
    events.get(timeout=60)
    assert engine.runs
    engine.close()
    engine.close()
    assert not engine.runs
    assert rest(events)[-1].reason == "cancelled"
    with pytest.raises(ContextError, match="closed"):
        engine.submit(Request([1]), print)


# --- samplers -----------------------------------------------------------------------------------------------------------------------


def test_a_grammar_is_followed_to_its_end(tiny):
    with engine_of(tiny) as engine:
        answer = engine.answer(Request(words(1, 9), Sampling(temperature=2, top_k=0, grammar='root ::= "yes" | "no"'), 20))
        assert answer.text in ("yes", "no") and answer.reason == "end"
        schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
        answer = engine.answer(Request(words(1, 9), Sampling(seed=1, grammar=grammar_for(schema)), 100))
        assert set(json.loads(answer.text)) == {"a", "b"}
        answer = engine.answer(Request(words(1, 9), Sampling(temperature=0, grammar='root ::= "ab"'), 5, trigger="", logprobs=3))
        assert answer.text == "ab" and len(answer.tokens[0].top) == 3


def test_a_grammar_begins_behind_its_trigger(tiny):
    with engine_of(tiny) as engine:
        plain = engine.answer(Request(words(1, 9), GREEDY, 6, ignore_end=True))
        word = plain.tokens[2].text.decode("latin-1")
        if len(word.encode()) == 1 and plain.tokens[2].text.isascii():
            answer = engine.answer(Request(words(1, 9), GREEDY, 9, trigger=word, triggered='root ::= "!?"'))
            assert answer.text.endswith(word + "!?")


def test_a_schema_that_is_none_is_refused():
    deep = {}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    for schema in ({"$ref": "https://example.org/x"}, {"type": "nonsense"}, deep, {"$ref": "#/missing"}):
        with pytest.raises(SettingsError, match="JSON schema"):
            grammar_for(schema)


def test_each_setting_of_the_samplers_is_heard(tiny):
    llama = Streams(tiny, n_seq=1, n_ctx=256, **SPARE)
    llama.advance([(0, t) for t in words(1, 20)], [19])
    likeliest = int(np.argmax(llama.logits_row(19)))

    def chosen(**settings):
        sampler = Sampler(llama, Sampling(**settings))
        sampler.saw(words(1, 20))
        found = [sampler.sample(19) for _ in range(30)]
        sampler.close()
        return found

    hot = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert set(chosen(temperature=0)) == {likeliest}
    assert len(set(chosen(**hot))) > 20
    assert set(chosen(**{**hot, "top_k": 1})) == {likeliest}
    assert set(chosen(**{**hot, "min_p": 1.0})) == {likeliest}
    assert set(chosen(temperature=1.0, top_k=0, top_p=1e-9, min_p=0.0)) == {likeliest}
    assert likeliest not in chosen(temperature=0, logit_bias={likeliest: -1e9})
    assert len(set(chosen(temperature=0, presence_penalty=100.0))) > 20
    assert len(set(chosen(temperature=5.0, mirostat=2, mirostat_tau=20.0))) > 5
    for settings in ({"typical_p": 0.5}, {"top_n_sigma": 1.0}, {"xtc_probability": 1.0}, {"dry_multiplier": 1.0}, {"mirostat": 1}):
        assert len(chosen(**settings)) == 30
    llama.close()


def test_the_built_in_model_answers_beside_others_what_it_answers_alone():
    with Engine(Streams(str(built_in_model()), n_seq=4, n_ctx=512, **SPARE)) as engine:
        prompt = engine.llama.tokenize(b"<|im_start|>user\nCompute 48291 * 73.<|im_end|>\n<|im_start|>assistant\n", special=True)
        alone = engine.answer(Request(prompt, GREEDY, 40, reuse=False))
        others = [heard(engine, Request(prompt, Sampling(seed=i), 40)) for i in range(3)]
        began = time.monotonic()
        answer = engine.answer(Request(prompt, GREEDY, 40))
        assert answer.text == alone.text and answer.text.startswith("a reversed: 19284")
        assert answer.done.prompt == len(prompt) and 0 < answer.done.answer_s < time.monotonic() - began
        for _, events in others:
            rest(events)
