"""`mixkvq serve`: OpenAI's own client, llama.cpp's dialect, and what must not be answered, against the built-in model."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
import served
import soak_server
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from bridge.engine import Request, Sampling
from bridge.llama import Llama
from mixkvq.core.model_file import built_in_model
from mixkvq.server.errors import ApiError
from mixkvq.server.guards import Rules
from mixkvq.server.loading import embedding_service
from mixkvq.server.output import Reader, opens_thinking
from mixkvq.server.prompts import Prompts
from mixkvq.server.tools import HERMES, LLAMA, MISTRAL, Tools, grammar

PROBLEM = "Compute 48291 * 73."
ASKED = [{"role": "user", "content": PROBLEM}]
GREEDY = {"model": "tiny", "temperature": 0}
BEGINS = "a reversed: 19284"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.model_served(built_in_model(), n_seq=3, settings={"longest_queue": 4}) as (service, address):
        service.slots, service.shows_metrics = tmp_path_factory.mktemp("slots"), True
        service.address = address
        yield service


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


# --- OpenAI's client ----------------------------------------------------------------------------------------------------------------


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt")


def test_a_chat_whole_and_streamed_is_the_same(client):
    whole = client.chat.completions.create(messages=ASKED, max_completion_tokens=20, **GREEDY)
    (choice,) = whole.choices
    assert choice.message.content.startswith(BEGINS) and choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (23, 20, 43)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=ASKED, max_tokens=20, **GREEDY, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 20 and len({c.id for c in chunks}) == 1


def test_seeds_choices_stop_and_logprobs(client):
    hot = {"model": "tiny", "messages": ASKED, "temperature": 20.0, "max_tokens": 8, "top_p": 1, "extra_body": {"top_k": 0, "min_p": 0}}
    one, two = (client.chat.completions.create(n=2, seed=5, **hot) for _ in range(2))
    texts = [c.message.content for c in one.choices]
    assert texts == [c.message.content for c in two.choices] and texts[0] != texts[1] and one.usage.completion_tokens == 16
    stopped = client.chat.completions.create(messages=ASKED, stop=["x", "192"], max_tokens=50, **GREEDY).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (BEGINS[:-5], "stop")
    rows = client.chat.completions.create(messages=ASKED, max_tokens=3, logprobs=True, top_logprobs=4, **GREEDY).choices[0].logprobs.content
    assert len(rows) == 3 and all(len(row.top_logprobs) == 4 and row.logprob == row.top_logprobs[0].logprob <= 0 for row in rows)
    assert bytes(b for row in rows for b in row.bytes) == b"a reversed:"
    assert client.chat.completions.create(messages=ASKED, max_tokens=1, logit_bias={"64": -100}, **GREEDY).choices[0].message.content != "a"


def test_content_parts_and_the_developer_are_read(client, http):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Compute "}, {"type": "text", "text": "1 + 1."}]},
    ]
    prompt = http.post("/apply-template", json={"messages": parts}).json()["prompt"]
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCompute 1 + 1.<|im_end|>\n<|im_start|>assistant\n"
    assert client.chat.completions.create(messages=parts, max_tokens=3, **GREEDY).usage.prompt_tokens == 27
    with pytest.raises(openai.BadRequestError, match="reads text only") as e:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}])
    assert e.value.param == "messages[0].content[0].type"


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_where_it_must_be(client, stream):
    for choice, names in (({"type": "function", "function": {"name": "weather"}}, ["weather"]), ("required", ["weather", "clock"])):
        options = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "model": "tiny", "messages": ASKED, "seed": 3, "max_tokens": 400}
        if choice == "required":
            options["parallel_tool_calls"] = stream
        if stream:
            chunks = list(client.chat.completions.create(stream=True, **options))
            calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
            assert not any(c.choices[0].delta.content for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found = client.chat.completions.create(**options).choices[0]
            calls, reason = found.message.tool_calls, found.finish_reason
            assert found.message.content is None
            assert len(calls) == 1
        assert calls and reason in ("tool_calls", "length" if stream else "")  # a small model goes on and on
        for call in calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name in names and call.id
            assert call.function.name == "clock" or (arguments["town"] in ("Oslo", "Rome") and 0 <= arguments["days"] <= 9)


def test_an_answer_to_a_call_is_read(client, http):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    chat = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "snow"}]
    prompt = http.post("/apply-template", json={"messages": chat, "tools": [WEATHER]}).json()["prompt"]
    assert '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>' in prompt
    assert "<tool_response>\nsnow\n</tool_response>" in prompt and '"description": "The weather of a town."' in prompt
    assert (
        "weather of a town" not in http.post("/apply-template", json={"messages": chat, "tools": [WEATHER], "tool_choice": "none"}).json()["prompt"]
    )


def test_an_answer_has_the_form_that_is_asked_for(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}}, "required": ["ok", "n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=ASKED, response_format=form, max_tokens=60)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"ok", "n"} and found["n"] in (1, 2) and answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(model="tiny", messages=ASKED, response_format={"type": "json_object"}, max_tokens=5)
    assert answer.choices[0].message.content.startswith("{")


def test_responses_whole_and_streamed(client):
    whole = client.responses.create(model="tiny", input=PROBLEM, instructions="Be brief.", max_output_tokens=12, temperature=0)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 12
    events = list(
        client.responses.create(model="tiny", input=[{"role": "user", "content": PROBLEM}], max_output_tokens=12, temperature=0, stream=True)
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events][:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == text and text.startswith(BEGINS)
    tool = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    called = client.responses.create(
        model="tiny", input=PROBLEM, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=90
    )
    (item,) = called.output
    assert (item.type, item.name, json.loads(item.arguments), called.status) == ("function_call", "clock", {}, "completed")
    more = [{"role": "user", "content": PROBLEM}, item.model_dump(), {"type": "function_call_output", "call_id": item.call_id, "output": "noon"}]
    assert client.responses.create(model="tiny", input=more, max_output_tokens=2).usage.output_tokens == 2
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}}
    assert client.responses.create(model="tiny", input=PROBLEM, text=form).output_text in ('"yes"', '"no"')
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


def test_completions(client):
    prompt = f"<|im_start|>user\n{PROBLEM}<|im_end|>\n<|im_start|>assistant\n"
    found = client.completions.create(prompt=[prompt, "Once"], max_tokens=6, echo=True, **GREEDY)
    assert [c.index for c in found.choices] == [0, 1] and found.choices[1].text.startswith("Once")
    row = client.completions.create(prompt=prompt, logprobs=2, max_tokens=4, **GREEDY).choices[0]
    assert row.text == "".join(row.logprobs.tokens) == "a reversed: " + row.text[12:] and len(row.logprobs.top_logprobs[0]) == 2
    streamed = "".join(c.choices[0].text for c in client.completions.create(prompt=prompt, max_tokens=4, stream=True, **GREEDY))
    assert streamed == row.text


def test_embeddings_are_refused_where_there_are_none_and_made_where_there_are(client, tmp_path):
    with pytest.raises(openai.InternalServerError, match="--embeddings"):
        client.embeddings.create(model="tiny", input="a")
    llama = Llama(
        str(tiny_models.bert(tmp_path / "bert.gguf")), stock="f16", embedding=True, n_ctx=256, n_batch=256, n_ubatch=256, device="cpu", verbose=False
    )
    service = embedding_service(llama, "bert")
    with served.serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as other:
        plain = other.embeddings.create(model="bert", input=["abc", "xyz", "abc"], encoding_format="float")
        rows = np.array([row.embedding for row in plain.data])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        assert np.allclose(rows[0], rows[2], atol=1e-6) and not np.allclose(rows[0], rows[1], atol=1e-2) and plain.usage.prompt_tokens > 0
        packed = httpx.post(f"{address}/v1/embeddings", json={"input": "abc", "encoding_format": "base64"}).json()["data"][0]["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), rows[0], atol=1e-6)
        with pytest.raises(openai.InternalServerError, match="embeddings only"):
            other.chat.completions.create(model="bert", messages=ASKED)
    service.embedder.close()


# --- what models write --------------------------------------------------------------------------------------------------------------

CALL = '{"name": "weather", "arguments": {"town": "Oslo", "days": 1}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "written", "reasoning", "content", "n_calls"),
    [
        (None, "plain <tool_call> text", "", "plain <tool_call> text", 0),
        (None, "<think>\nhm\n</think>\n\nyes", "hm\n", "yes", 0),
        (None, "<think>never ends", "never ends", "", 0),
        (None, "<thin ice", "", "<thin ice", 0),
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", "", 1),
        (HERMES, f"<think>hm</think>I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", "hm", "I look.\n", 2),
        (HERMES, "<tool_call>nonsense</tool_call> so", "", "<tool_call>nonsense</tool_call> so", 0),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', 0),
        (HERMES, f"a < b <tool_call>{CALL[:30]}", "", f"a < b <tool_call>{CALL[:30]}", 0),
        (HERMES, f"```json\n{CALL}\n```", "", "", 1),
        (HERMES, f" {CALL}\n{CALL}", "", "", 2),
        (HERMES, "```json\n{}\n```", "", "```json\n{}\n```", 0),
        (HERMES, '{"name": "x"}', "", '{"name": "x"}', 0),
        (LLAMA, LLAMA_CALL, "", "", 1),
        (LLAMA, f"<|python_tag|>{LLAMA_CALL}; {LLAMA_CALL}", "", "", 2),
        (LLAMA, '{"an": "object"}', "", '{"an": "object"}', 0),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", 2),
        (MISTRAL, 'Well.[TOOL_CALLS]weather[ARGS]{"town": "Oslo", "days": 1}', "", "Well.", 1),
        (MISTRAL, "[THINK]hm[/THINK][1, 2]", "hm", "[1, 2]", 0),
    ],
)
def test_what_a_model_writes_is_taken_apart(form, written, reasoning, content, n_calls, size):
    reader = Reader(form, ["weather"])
    deltas = [delta for i in range(0, len(written), size) for delta in reader.feed(written[i : i + size])] + reader.end()
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == reasoning
    assert "".join(d.text for d in deltas if d.kind == "content") == content
    calls = [d.call for d in deltas if d.call]
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("weather", {"town": "Oslo", "days": 1})] * n_calls


def test_thinking_that_the_prompt_has_begun(server):
    prompts = Prompts("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}")
    prompt = prompts.text([{"role": "user", "content": "x"}], Tools())
    reader = Reader(ends=opens_thinking(prompt))
    assert [(d.kind, d.text) for d in reader.feed("hm</think>\nyes")] == [("reasoning", "hm"), ("content", "yes")]
    assert opens_thinking(prompts.closes_thinking(prompt)) is None


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL])
def test_what_a_grammar_forces_is_read_back(server, form):
    """With the built-in model at a high temperature: anything that the grammar allows is a call."""
    tools = Tools(tuple(t["function"] for t in (WEATHER, CLOCK)), "required", parallel=False)
    for seed in range(3):
        sampling = Sampling(temperature=5, seed=seed, grammar=grammar(form, tools))
        answer = server.engine.answer(Request(server.engine.llama.tokenize(b"Go"), sampling, 300))
        reader = Reader(form, ["weather", "clock"])
        calls = [d.call for d in reader.feed(answer.text) + reader.end()]
        assert len(calls) == 1 and calls[0] is not None and answer.reason == "end", answer.text


def test_templates_that_refuse_are_given_what_they_take():
    strict = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"""
    chat = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "a"), ("user", "b"))]
    assert Prompts(strict).text(chat, Tools()).split() == ["[user:S", "a", "b]"]
    with pytest.raises(ApiError, match="does not accept these messages: never"):
        Prompts("{{ raise_exception('never') }}").text(chat, Tools())
    assert Prompts("{{ messages[0]['content'] }}:").text([*chat[:2], {"role": "assistant", "content": "I say"}], Tools()) == "S:I say"


# --- llama.cpp's dialect ------------------------------------------------------------------------------------------------------------


def test_completion_in_the_dialect_of_llama_cpp(http):
    body = {"prompt": ["Once upon", 64], "n_predict": 5, "temperature": 0, "n_probs": 2, "return_tokens": True, "ignore_eos": True}
    found = http.post("/completion", json=body).json()
    assert len(found["tokens"]) == len(found["completion_probabilities"]) == found["tokens_predicted"] == 5
    assert found["stop"] and found["stop_type"] == "limit" and found["generation_settings"]["n_predict"] == 5
    lines = http.post("/completion", json={**body, "stream": True, "return_progress": True, "cache_prompt": False}).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line]
    assert events[0]["prompt_progress"] == {**events[0]["prompt_progress"], "processed": 0, "cache": 0}
    assert "".join(e["content"] for e in events) == found["content"] and events[-1]["stop"]
    timings = events[-1]["timings"]
    assert timings["prompt_n"] == found["tokens_evaluated"] and timings["predicted_n"] == 5 and 2 < timings["kv_bits"] < 16
    assert timings["kv_tokens"] == timings["prompt_n"] + 4 and timings["kv_mib"] > 0
    assert http.post("/completion", json={"prompt": "x", "json_schema": {"const": 7}}).json()["content"] == "7"


def test_tokens_there_and_back(http):
    text = "Grüße, 漢字! <|im_end|>"
    tokens = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"content": text}
    pieces = http.post("/tokenize", json={"content": "漢", "with_pieces": True}).json()["tokens"]
    assert bytes(b for p in pieces for b in (p["piece"] if isinstance(p["piece"], list) else p["piece"].encode())).decode() == "漢"
    assert len(http.post("/tokenize", json={"content": "<|im_end|>", "parse_special": False}).json()["tokens"]) > 1


def test_slots_are_saved_restored_and_erased(http, server):
    text = "The quick brown fox. " * 40
    first = http.post("/completion", json={"prompt": text, "n_predict": 4, "temperature": 0, "id_slot": 2}).json()
    assert first["id_slot"] == 2
    saved = http.post("/slots/2?action=save", json={"filename": "fox"}).json()
    assert saved["n_saved"] == first["tokens_cached"] and saved["n_written"] == sum(p.stat().st_size for p in server.slots.iterdir())
    assert (next(server.slots.iterdir()).stat().st_mode & 0o777) == 0o600
    assert http.post("/slots/2?action=erase").json()["n_erased"] == saved["n_saved"]
    assert http.get("/slots").json()[2]["n_tokens"] == 0
    assert http.post("/slots/2?action=restore", json={"filename": "fox"}).json()["n_restored"] == saved["n_saved"]
    again = http.post("/completion", json={"prompt": text, "n_predict": 4, "temperature": 0, "id_slot": 2}).json()
    assert again["timings"]["cache_n"] == first["tokens_evaluated"] - 1 and again["content"] == first["content"]
    for slot, query, body, status in (
        (2, "save", {"filename": "../fox"}, 400),
        (2, "restore", {"filename": "missing"}, 400),
        (2, "dance", {}, 400),
        (9, "erase", {}, 400),
    ):
        answer = http.post(f"/slots/{slot}?action={query}", json=body)
        assert answer.status_code == status and str(server.slots) not in answer.text


def test_facts_of_the_server(http):
    props = http.get("/props").json()
    assert props["total_slots"] == 3 and props["default_generation_settings"]["n_ctx"] == 1024 and "im_start" in props["chat_template"]
    assert http.get("/health").json() == {"status": "ok"}
    http.post("/tokenize", json={"content": "x"})
    lines = http.get("/metrics").text.splitlines()
    assert 'mixkvq_http_requests_total{path="/tokenize",status="200"}' in " ".join(lines)
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(figures["llamacpp:requests_processing"]) == 0 and float(figures["mixkvq_requests_total"]) >= 0


# --- what must not be answered, and who must not ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b'{"messages": NaN}', None),
        (b'"\xff"', None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b"[" * 100000, None),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "x", "content": "y"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": ASKED, "temperature": -1}, "temperature"),
        ({"messages": ASKED, "n": 0}, "n"),
        ({"messages": ASKED, "n": True}, "n"),
        ({"messages": ASKED, "stop": [1]}, "stop"),
        ({"messages": ASKED, "logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": ASKED, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": ASKED, "tools": [{"type": "web"}]}, "tools[0].type"),
        ({"messages": ASKED, "tool_choice": "required"}, "tool_choice"),
        ({"messages": ASKED, "tools": [WEATHER], "tool_choice": {"function": {"name": "no"}}}, "tool_choice"),
        ({"messages": ASKED, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": ASKED, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/no"}}}}, None),
        ({"messages": ASKED, "grammar": "root ::= ("}, None),
        ({"messages": ASKED, "id_slot": 7}, None),
    ],
)
def test_a_mistake_gets_a_sentence_of_openais_shape(http, body, param):
    answer = http.post("/v1/chat/completions", content=body if isinstance(body, bytes) else json.dumps(body).encode())
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error" and error["message"].endswith(".")


def test_a_prompt_that_does_not_fit_says_by_how_much(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 3000}])
    assert e.value.code == "context_length_exceeded" and e.value.body["n_ctx"] == 1024 and e.value.body["n_prompt_tokens"] > 3000


def test_paths_and_methods_that_are_not_served(http):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/slots/x", 404)):
        answer = http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_more_requests_than_may_wait_get_503_and_who_goes_away_is_forgotten(http, server):
    """Three run and four wait; when their clients have gone, all streams are free, whether they streamed or not."""
    long = {"prompt": "x", "n_predict": -1, "ignore_eos": True, "temperature": 1}
    with httpx.Client(base_url=server.address, timeout=60) as other:
        streams = [other.stream("POST", "/completion", json={**long, "stream": True}) for _ in range(7)]
        answers = [stream.__enter__() for stream in streams]
        assert [answer.status_code for answer in answers] == [200] * 7
        busy = http.post("/completion", json=long)
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "server_busy" and busy.headers["retry-after"]
        for stream in streams:
            stream.__exit__(None, None, None)
    assert served.until_idle(http)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/completion", json=long, timeout=0.2)
    assert served.until_idle(http)
    assert http.post("/completion", json={"prompt": "x", "n_predict": 1}).status_code == 200


def test_who_may_ask(server, caplog):
    rules = Rules(keys=("right", "other"), hosts=("my.house",), origins=("https://pages.example",), largest=2000)
    with served.serving(server, rules) as address, httpx.Client(base_url=address) as http:
        key, host = {"Authorization": "Bearer right"}, address.removeprefix("http://")

        def status(path="/v1/models", method="GET", **headers):
            return http.request(method, path, headers=headers).status_code

        assert status() == 401 and status(Authorization="Bearer wrong") == 401 and status("/health") == 200
        assert status(**key) == 200 == status(**{"X-Api-Key": "other"})
        assert status(Host="evil.example", **key) == 403 == status(Host="192.168.1.9:80", **key) and status(Host="my.house:80", **key) == 200
        assert status(Origin="https://evil.example", **key) == 403 == status(Origin="null", **key)
        assert status(Origin=f"http://{host}", **key) == 200
        asked = http.options("/v1/chat/completions", headers={"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 204 and asked.headers["access-control-allow-origin"] == "https://pages.example"
        assert "access-control-allow-credentials" not in asked.headers
        assert http.options("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        large = json.dumps({"content": "x" * 3000}).encode()
        assert http.post("/tokenize", content=large, headers=key).status_code == 413
        assert http.post("/tokenize", content=iter([large[:1500], large[1500:]]), headers=key).status_code == 413
        with caplog.at_level(logging.INFO, "mixkvq.server"):
            body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 2}
            assert http.post("/v1/chat/completions", json=body, headers=key).status_code == 200
            http.get("/v1/models%0Aforged")
        assert "POST /v1/chat/completions 200" in caplog.text and "answer 2, slot" in caplog.text
        assert "secret" not in caplog.text and "right" not in caplog.text and "\nforged" not in caplog.text


def test_every_address_of_this_machine_is_known_where_the_server_listens_on_all():
    rules = Rules(host="0.0.0.0")
    assert rules.knows_host("192.168.1.9:8080") and rules.knows_host("[fe80::1]:80") and not rules.knows_host("evil.example")
    assert not Rules().knows_host("") and not Rules().knows_host("[")


# --- anything at all ------------------------------------------------------------------------------------------------------------------

_NAMES = st.sampled_from(
    "messages prompt input n max_tokens n_predict temperature top_p top_k min_p seed stop logprobs top_logprobs logit_bias tools tool_choice grammar "
    "json_schema response_format text stream stream_options id_slot repeat_penalty mirostat content tokens filename encoding_format echo suffix "
    "chat_template_kwargs".split()
)
_LEAVES = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | _NAMES, inner, max_size=3), max_leaves=6
)
_GOOD = {"messages": ASKED, "prompt": "x", "input": "x", "content": "x", "max_tokens": 2, "n_predict": 2, "max_output_tokens": 2}
_PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/completion",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/slots/0?action=save",
]


@given(path=st.sampled_from(_PATHS), wrong=st.dictionaries(_NAMES, _VALUES, max_size=4))
def test_nothing_that_is_sent_makes_the_server_fail(http, path, wrong):
    """Answers are given or refused with a sentence; what runs then is stopped by its time."""
    body = {**_GOOD, **wrong, "t_max_predict_ms": 20}
    answer = http.post(path, json=body)
    assert answer.status_code in (200, 400, 501), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"].endswith(".")


# --- the command --------------------------------------------------------------------------------------------------------------------


def test_the_command_serves_parks_at_its_end_and_resumes(tmp_path):
    body = {"prompt": "The quick brown fox. " * 60, "n_predict": 4, "temperature": 0}
    cached = []
    for _ in range(2):
        server = soak_server.Server(str(built_in_model()), "-np", "2", "-c", "2048", "-t", "1", "--park", str(tmp_path), "--alias", "fox")
        with httpx.Client(base_url=server.address, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "fox" and http.get("/slots").json()[0]["n_ctx"] == 1024
            found = http.post("/completion", json=body).json()
            cached.append(found["timings"]["cache_n"])
            waiting = http.stream("POST", "/completion", json={**body, "n_predict": -1, "ignore_eos": True, "stream": True})
            with waiting as answer:
                assert answer.status_code == 200
                server.process.send_signal(signal.SIGTERM)
                answer.read()  # the stream ends in order
        assert server.stop() == 0 and len(list(tmp_path.iterdir())) >= 1
    assert cached == [0, found["tokens_evaluated"] - 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere.gguf"], "does not exist"),
        (["--mmproj", "x"], "reads text only"),
        (["-md", "x"], "drafts none"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (["--stock", "q8_0", "--kv", "balanced"], "does not go together"),
        (["--embeddings", "--window", "1"], "does not go together"),
        (["--allow-origin", "*"], "any page at all"),
        (["--api-key-file", os.devnull], "has no key"),
        (["--park", sys.executable], "is no folder"),
    ],
)
def test_a_command_that_cannot_be_served_says_why(options, says):
    done = subprocess.run([sys.executable, "-m", "mixkvq", "serve", "--port", "0", *options], capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_many_clients_of_all_kinds():
    """`make soak-server`, for some seconds."""
    server = soak_server.Server(str(built_in_model()), "-np", "3", "-c", "3072", "-t", "1")
    try:
        began = time.monotonic()
        assert soak_server.asyncio.run(soak_server.soak(server, 3, 12, 1)) == []
        assert time.monotonic() - began < 120
    finally:
        assert server.stop() == 0


def test_what_the_server_cannot_use_is_said_before_a_model_is_loaded(tmp_path):
    """A file that is no adapter would end the process with the first request."""
    (tmp_path / "none.gguf").write_bytes(b"GGUFdamaged")
    for words, said in (
        (["--lora", str(tmp_path / "missing.gguf")], "missing.gguf"),
        (["--lora", str(tmp_path / "none.gguf")], "none.gguf"),
        (["--lora", str(built_in_model())], "is no LoRA adapter"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", " , "], "--api-key is empty"),
        (["--chat-template", "{% if"], "--chat-template is no Jinja template"),
    ):
        small = ["-t", "1", "-np", "1", "-c", "256", "--device", "cpu", "--port", "0"]
        command = [sys.executable, "-m", "mixkvq", "serve", str(built_in_model()), *small, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stdout == "", words
        assert len(done.stderr.splitlines()) == 1 and said in done.stderr, (words, done.stderr)


def test_an_answer_that_the_end_of_the_server_cuts_is_no_whole_one():
    body = {**GREEDY, "messages": ASKED, "max_tokens": 900, "ignore_eos": True}
    with served.model_served(built_in_model(), n_seq=1) as (service, address), httpx.Client(base_url=address, timeout=120) as http:
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            service.engine.cancel_all()
            rest = "\n".join(lines)
        assert "The server ended before the answer did." in rest and '"stop"' not in rest and "[DONE]" not in rest.split("The server ended")[0]
        service.engine.cancel_all()
