"""The endpoints of the chat window: chats, answers that are stored as they come, the end of the context, what goes with a chat."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from windowed import started, window_served

from bridge.dry_run import measure_context
from bridge.engine.parking import Parking
from mixkvq.chats import Store
from mixkvq.core.model_file import built_in_model, open_model
from mixkvq.core.settings import Kv
from mixkvq.server.window.routes import PAGE

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("window")
    states = folder / "states"
    with window_served(folder / "chats.db", states, parking=Parking(states, 1 << 30)) as (window, address):
        with httpx.Client(base_url=f"{address}/window", timeout=120) as http:
            yield window, http


def created(http, **fields):
    fields["settings"] = {**GREEDY, "max_tokens": 60, **fields.get("settings", {})}
    return http.post("/chats", json=fields).json()["id"]


def heard(http, message, until=None):
    """The events of an answer; until: leaves when it is true of one."""
    events = []
    with http.stream("GET", f"/messages/{message}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if until is not None and until(events[-1]):
                    break
    return events


def asked(http, chat, content="Compute 12 * 34.", parent=None, **fields):
    return http.post(f"/chats/{chat}/messages", json={"content": content, "parent": parent, **fields}).json()


def text_of(events, kind="content"):
    return events[0].get(kind, "") + "".join(e["text"] for e in events if e["type"] == kind)


def test_an_answer_streams_and_is_stored(served):
    window, http = served
    chat = created(http)
    said = asked(http, chat)
    events = heard(http, said["answer"])
    assert [e["type"] for e in (events[0], events[-1])] == ["start", "end"] and events[-1]["state"] == "done"
    figures = events[-1]["figures"]
    assert figures["predicted_n"] == figures["tokens"] <= 60 and figures["predicted_per_second"] > 0 and figures["kv_f16_mib"] > 0
    stored = http.get(f"/chats/{chat}").json()
    assert stored["title"] == "Compute 12 * 34."
    answer = stored["messages"][-1]
    assert answer["content"] == text_of(events) != "" and answer["state"] == "done" and answer["figures"]["model"] == "cot-tiny"
    assert text_of(heard(http, said["answer"])) == answer["content"]  # whoever comes later hears all of it
    assert answer["content"] in window.store.message(said["answer"]).content


def test_an_answer_is_the_same_as_over_openai(served):
    _, http = served
    chat = created(http, system="Be exact.")
    mine = text_of(heard(http, asked(http, chat)["answer"]))
    messages = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Compute 12 * 34."}]
    at = str(http.base_url).replace("/window/", "")
    theirs = httpx.post(f"{at}/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 60}, timeout=120).json()
    assert theirs["choices"][0]["message"]["content"] == mine


def test_branches(served):
    _, http = served
    chat = created(http, settings={"max_tokens": 8})
    first = asked(http, chat)
    heard(http, first["answer"])
    again = http.post(f"/messages/{first['question']}/answer").json()["answer"]
    heard(http, again)
    edited = asked(http, chat, "Compute 5 * 6.")
    heard(http, edited["answer"])
    tree = http.get(f"/chats/{chat}").json()
    assert tree["shown"] == edited["question"]
    http.post(f"/messages/{first['answer']}/show")
    tree = http.get(f"/chats/{chat}").json()
    shown = {m["id"]: m["shown"] for m in tree["messages"]}
    assert tree["shown"] == first["question"] and shown[first["question"]] == first["answer"]
    assert [m["parent"] for m in tree["messages"]] == [None, first["question"], first["question"], None, edited["question"]]


def test_stop_keeps_what_there_is(served):
    window, http = served
    chat = created(http, settings={"max_tokens": -1})
    said = asked(http, chat, "Compute 48291 * 73.")
    heard(http, said["answer"], until=lambda e: e["type"] == "content")
    http.post(f"/messages/{said['answer']}/stop")
    events = heard(http, said["answer"])
    assert events[-1]["state"] == "stopped"
    stored = window.store.message(said["answer"])
    assert stored.state == "stopped" and stored.content == text_of(events) != ""


def test_two_windows_hear_the_same(served):
    _, http = served
    said = asked(http, created(http))
    first = heard(http, said["answer"], until=lambda e: e["type"] == "content")
    rest = heard(http, said["answer"])
    assert text_of(first) and text_of(rest).startswith(text_of(first))


def test_at_the_end_of_the_context_the_chat_stops_or_shifts(served):
    window, http = served
    n_ctx = window.service.answering.n_ctx
    for at_end in ("stop", "shift"):
        chat, at = created(http, settings={"max_tokens": 4, "at_end": at_end}), None
        long = "word " * (n_ctx // 3)
        for i in range(4):
            said = asked(http, chat, f"{i} {long}", at)
            events = heard(http, said["answer"])
            at = said["answer"]
            if events[-1]["state"] != "done":
                break
        if at_end == "stop":
            assert events[-1]["state"] == "failed" and f"the context {n_ctx}" in events[-1]["figures"]["error"]
        else:
            assert i == 3 and events[-1]["state"] == "done" and events[-1]["figures"]["dropped"] >= 2
            assert [e["text"] for e in events if e["type"] == "note"] == [str(events[-1]["figures"]["dropped"])]
            assert len(window.store.readings(chat)) >= 2  # states of it begin in more than one way now
        assert len(http.get(f"/chats/{chat}").json()["messages"]) == 2 * (i + 1)  # what the model no longer reads is still there


def test_an_answer_that_fills_the_context_goes_on_where_it_may_shift(served):
    window, http = served
    n_ctx = window.service.answering.n_ctx
    chat = created(http, settings={"max_tokens": 4})
    said = asked(http, chat, "word " * (n_ctx // 3))
    heard(http, said["answer"])
    http.post(f"/chats/{chat}", json={"settings": {"temperature": 1.5, "max_tokens": -1, "at_end": "shift", "seed": 3}})
    reader = window.answers
    second = asked(http, chat, "word " * (n_ctx // 3 * 2 - 700), said["answer"])
    events = heard(http, second["answer"], until=lambda e: e["type"] == "note" or e["type"] == "end")
    running = reader.get(second["answer"])
    if running is not None:
        running.stop()
    assert events[-1]["type"] == "note" and events[-1]["kind"] == "dropped"


def test_attached_files_are_read(served):
    window, http = served
    chat = created(http, settings={"max_tokens": 2})
    said = asked(http, chat, "What is it?", files=[{"name": "a.txt", "text": "some text"}])
    heard(http, said["answer"])
    prompt = window.answers.of(chat).prompt
    assert "File a.txt:\n```\nsome text\n```\n\nWhat is it?" in window.service.answering.llama.detokenize(prompt).decode()


def test_what_the_cache_holds(served):
    _, http = served
    for i in range(2):  # one for each stream
        chat = created(http, settings={"max_tokens": 2})
        heard(http, asked(http, chat, f"{i} " + "word " * 1900)["answer"])
    found = http.get(f"/chats/{chat}/cache").json()
    assert found["tokens"] > 1900 and found["all_tokens"] == sum(found["streams"]) == found["packed_tokens"] + found["f16_tokens"]
    assert 2 * 12 * 128 <= found["packed_tokens"] <= 2 * 14 * 128
    assert found["bytes"] < found["bytes_q8_0"] < found["bytes_f16"]
    layers = http.get("/layers").json()
    assert len(layers) == 20 and all(layer["pages_packed"] >= 24 for layer in layers)
    assert http.get(f"/chats/{created(http)}/cache").json()["tokens"] == 0


def test_a_chat_goes_with_its_states_and_streams(served):
    window, http = served
    engine = window.service.answering
    chats = [created(http, settings={"max_tokens": 2}) for _ in range(2)]
    for i, chat in enumerate(chats):
        heard(http, asked(http, chat, f"{i} " + f"secret{i} " * 150)["answer"])
    until = time.monotonic() + 60
    while engine._unparked and time.monotonic() < until:
        time.sleep(0.05)
    before = len(list(window.states.iterdir()))
    assert before >= 2
    beginning = window.store.readings(chats[0])
    assert len(beginning) == 1 and beginning[0]
    assert http.delete(f"/chats/{chats[0]}").json() == {"states": 1}
    assert len(list(window.states.iterdir())) == before - 1
    held = engine.call(lambda: [engine.llama.detokenize(engine.llama.tokens_of(i)).decode() for i in range(engine.llama.n_seq)]).result()
    assert not any("secret0" in text for text in held) and any("secret1" in text for text in held)
    assert http.get(f"/chats/{chats[0]}").status_code == 404


def test_deleting_a_chat_ends_its_answer(served):
    window, http = served
    chat = created(http, settings={"max_tokens": -1})
    said = asked(http, chat)
    heard(http, said["answer"], until=lambda e: e["type"] == "content")
    assert http.delete(f"/chats/{chat}").status_code == 200
    assert window.answers.get(said["answer"]) is None and not window.service.answering.jobs()


def test_a_full_disk_is_said_and_the_answer_is_not_lost(served):
    window, http = served
    chat = created(http, settings={"max_tokens": 120})
    db = window.store._db
    said = asked(http, chat, "Compute 48291 * 73.")
    pages = db.execute("PRAGMA page_count").fetchone()[0] + db.execute("PRAGMA freelist_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    # fill what is free, so that the next page is one too many
    with pytest.raises(Exception, match="full"):
        while True:
            window.store.read(chat, os.urandom(2000))
    events = heard(http, said["answer"], until=lambda e: e["type"] in ("note", "end"))
    db.execute("PRAGMA max_page_count = 1000000")
    if events[-1]["type"] == "note":
        assert events[-1]["kind"] == "unsaved" and "full" in events[-1]["text"]
    events = heard(http, said["answer"])
    assert events[-1]["state"] == "done" and window.store.message(said["answer"]).content == text_of(events)


def test_an_answer_that_is_ended_while_its_pieces_are_being_stored_is_whole(served, monkeypatch):
    """As the server does with all that runs when it ends."""
    window, http = served
    own = window.store.append

    def slowly(message, pieces):
        task = window.answers.get(message).task
        task.get_loop().call_soon_threadsafe(task.cancel)
        time.sleep(1)
        own(message, pieces)

    monkeypatch.setattr(window.store, "append", slowly)
    said = asked(http, created(http, settings={"max_tokens": -1}), "Compute 48291 * 73.")
    events = heard(http, said["answer"])
    assert events[-1]["state"] == "stopped" and window.store.message(said["answer"]).content == text_of(events) != ""


def test_export_and_import(served):
    _, http = served
    chat = created(http, title="Mine")
    heard(http, asked(http, chat)["answer"])
    for form, ending in (("json", ".json"), ("markdown", ".md"), ("sharegpt", ".sharegpt.json")):
        file = http.get(f"/chats/{chat}/export", params={"format": form})
        assert file.headers["content-disposition"].endswith(f'{ending}"')
        (copy,) = http.post("/import", content=file.content).json()["chats"]
        rows = [[(m["role"], m["content"]) for m in http.get(f"/chats/{each}").json()["messages"]] for each in (chat, copy)]
        assert rows[0] == rows[1]
    assert http.post("/import", content=b"\xff").status_code == 400
    assert http.post("/import", content=b"no chat").status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/chats", {"settings": {"at_end": "explode"}}, 400),
        ("/chats", {"settings": {"top_p": 7}}, 400),
        ("/chats", {"settings": {"colour": "red"}}, 400),
        ("/chats", {"settings": []}, 200),
        ("/chats", {"title": 5}, 400),
        ("/chats/999999/messages", {"content": "x"}, 404),
        ("/chats/999999", {"title": "x"}, 404),
        ("/messages/999999/answer", {}, 404),
        ("/messages/999999/show", {}, 404),
        ("/messages/999999/stop", {}, 200),
    ],
)
def test_mistakes_are_sentences(served, path, body, status):
    _, http = served
    response = http.post(path, json=body)
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["message"].endswith(".")


def test_nothing_is_answered_where_nothing_is_said(served):
    _, http = served
    chat = created(http)
    assert http.post(f"/chats/{chat}/messages", json={"content": "  "}).status_code == 400
    large = [{"name": "a", "text": "x" * ((1 << 20) + 1)}]
    assert http.post(f"/chats/{chat}/messages", json={"content": "x", "files": large}).status_code == 400
    assert http.get(f"/chats/{chat}").json()["messages"] == []


def test_the_page_loads_nothing_from_elsewhere(served):
    _, http = served
    at = str(http.base_url).replace("/window/", "")
    page = httpx.get(f"{at}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "script-src" not in policy and "http" not in policy
    own = [p for p in PAGE.iterdir() if p.is_file()]
    assert len(own) >= 8
    for path in own:
        assert httpx.get(f"{at}/{path.name}").status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text()), path
    for library in ("markdown-it", "texmath", "temml", "dompurify", "highlight"):
        assert "ermission" in (PAGE / "vendor" / f"{library}.LICENSE").read_text()


@pytest.fixture
def command(tmp_path):
    """`mixkvq chat --no-open` in a process; gives a function that starts one and returns it, a client, and the address that lets in."""
    with started(tmp_path) as start:
        yield start


def test_kill_9_and_come_back(command, tmp_path):
    process, client, address = command()
    assert client.get("/window/chats").status_code == client.get("/").status_code == 401  # others on this machine cannot read them
    assert client.get(address.partition("=")[0] + "=another").status_code == 401 and not client.cookies  # a page may lead here with any
    assert client.get(address).status_code == 200  # which gives the cookie
    assert client.get("/").status_code == 200
    chat = client.post("/window/chats", json={"settings": {"temperature": 1.5, "seed": 1}}).json()["id"]
    said = client.post(f"/window/chats/{chat}/messages", json={"content": "Compute 48291 * 73."}).json()
    before = ""
    with client.stream("GET", f"/window/messages/{said['answer']}/events") as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                before += event.get("content", "") + (event["text"] if event["type"] == "content" else "")
                if len(before) > 20:
                    break
    time.sleep(1.5)  # it is stored within a fraction of a second
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = tmp_path / "data" / "mixkvq" / "chats.db"
    assert path.stat().st_mode & 0o777 == 0o600
    _, client, address = command()
    client.get(address)
    messages = client.get(f"/window/chats/{chat}").json()["messages"]
    assert messages[0]["content"] == "Compute 48291 * 73."
    assert messages[1]["state"] in ("cut", "done") and messages[1]["content"].startswith(before)


def test_how_long_a_context_fits(command):
    _, client, address = command("--kv", "balanced")
    client.get(address)
    found = client.get("/window/fits").json()
    file = open_model(str(built_in_model()))
    for name, kv in (("packed", Kv("balanced")), ("f16", None)):
        n = found[name]
        if n < found["largest"]:  # it fits, and hardly more does
            assert measure_context(file, kv, n).all <= found["free"] < measure_context(file, kv, n + n // 100 + 512).all
    assert found["f16"] < found["packed"] or found["f16"] == found["largest"]
    assert found["trained"] == file.n_ctx_train


def test_private_chats_are_nowhere(command, tmp_path):
    process, client, address = command("--private")
    client.get(address)
    assert client.get("/window/about").json()["private"] is True
    chat = client.post("/window/chats", json={"settings": {"max_tokens": 2}}).json()["id"]
    said = client.post(f"/window/chats/{chat}/messages", json={"content": "private words " * 200}).json()
    with client.stream("GET", f"/window/messages/{said['answer']}/events") as response:
        response.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not list(tmp_path.rglob("*.db")) and not list(tmp_path.rglob("*state*"))


def test_an_answer_that_runs_is_kept_when_the_window_ends(command, tmp_path):
    process, client, address = command()
    client.get(address)
    chat = client.post("/window/chats", json={"settings": {"temperature": 1.5, "seed": 1}}).json()["id"]
    said = client.post(f"/window/chats/{chat}/messages", json={"content": "Compute 48291 * 73."}).json()
    with client.stream("GET", f"/window/messages/{said['answer']}/events") as response:
        for line in response.iter_lines():
            if '"content","text"' in line:
                break
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with Store(tmp_path / "data" / "mixkvq" / "chats.db") as store:
        answer = store.message(said["answer"])
        assert answer.state in ("stopped", "done") and answer.content


def test_without_a_display_it_is_the_terminal(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    words = [sys.executable, "-m", "mixkvq", "chat", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=120)
    assert "there is no display, so the chat is here in the terminal" in done.stderr and done.returncode == 2
    done = subprocess.run([*words, "--terminal", "-np", "2"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=120)
    assert done.returncode == 2 and "--parallel is an option of the window" in done.stderr
