"""What `run` does about a model without a profile: it offers to make one, once, and makes it only where it was told to."""

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
from rich.console import Console

from bridge import Kv, Llama
from mixkvq.cli import offer
from mixkvq.cli.answer import Answer, Sampling
from mixkvq.cli.chat import Chat
from mixkvq.cli.offer import Offer
from mixkvq.cli.running import Options
from mixkvq.core.model_file import built_in_model
from mixkvq.core.profile import read_profile, side_car, uniform_profile, write_profile

READ = Answer(read_tokens=100, read_seconds=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_kv=2, ratio=1, n_layers=3)


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return str(shutil.copy(tiny, tmp_path / "model.gguf"))


def options(model, calibrate, kv=None, stock=None):
    return Options(
        model=str(model), prompt=None, raw=False, system=None, ctx=512, threads=1, batch=128, device="cpu", gpu_layers=None,
        sampling=Sampling(0.0, 40, 0.95, 0.05, 8), kv=kv or Kv(), stock=stock, report="text", report_file=None, force=False, autosave=False,
        verbose=False, calibrate=calibrate,
    )  # fmt: skip


def test_it_is_offered_once_with_its_time(model):
    said = []
    Offer(options(model, "ask"), said.append).answered(Answer())  # nothing was read: nobody knows how fast
    assert not said
    Offer(options(model, "ask"), said.append).answered(READ)
    (line,) = said
    assert f"`mixkvq calibrate {model}` makes one, about 1.8 minutes, once" in line  # 110 000 tokens at 1000 a second
    Offer(options(model, "ask"), said.append).answered(READ)
    assert len(said) == 1 and not Path(side_car(model)).exists()


@pytest.mark.parametrize("way", ["never", "idle"])
def test_nothing_is_said_where_that_was_not_asked_for(model, way):
    Offer(options(model, way), pytest.fail).answered(READ)


def test_nor_where_there_is_a_profile_or_another_cache(model):
    for kv, stock in ((Kv(preset="balanced"), None), (None, "f16")):
        Offer(options(model, "ask", kv, stock), pytest.fail).answered(READ)
    Offer(options(built_in_model(), "ask"), pytest.fail).answered(READ)
    write_profile(side_car(model), uniform_profile(model))
    Offer(options(model, "ask"), pytest.fail).answered(READ)


@pytest.mark.parametrize(("reply", "made"), [("", False), ("n", False), ("y", True)])
def test_at_a_terminal_it_is_asked_for(model, monkeypatch, reply, made):
    monkeypatch.setattr(offer, "command_for", lambda model: [sys.executable, "-m", "mixkvq.calibrate", model, "--minutes", "0.1"])
    asked, said = [], []
    Offer(options(model, "ask"), said.append, lambda question: asked.append(question) or reply).answered(READ)
    assert asked == ["Make it now? [y/N] "] and Path(side_car(model)).exists() == made
    assert ("is used from the next start on" in said[-1]) == made


class Terminal:
    """Calibration in the background of a chat that counts as idle at once."""

    def __init__(self, model, monkeypatch, *command):
        monkeypatch.setattr(offer, "IDLE_SECONDS", 0.01)
        monkeypatch.setattr(offer, "command_for", lambda model: [sys.executable, *command] if command else [*calibration(model), "--minutes", "0.1"])
        self.said = []
        self.offer = Offer(options(model, "idle"), self.said.append)

    def process(self):
        """Once it has begun."""
        self.offer.waits()
        while self.offer._process is None:
            time.sleep(0.01)
        return self.offer._process


calibration = offer.command_for


def test_a_chat_that_is_idle_gets_its_profile(model, monkeypatch):
    terminal = Terminal(model, monkeypatch)
    assert terminal.process().wait() == 0
    assert not Path(side_car(model)).exists()  # not while somebody may be loading it
    terminal.offer.returned()
    assert terminal.said == ["model.mixkvq.gguf was made meanwhile; it is used from the next start on."]
    assert read_profile(side_car(model), model).layers and not list(Path(model).parent.glob(".*"))
    terminal.offer.waits()
    assert terminal.offer._timer is None  # there is nothing more to do


def test_a_key_ends_what_goes_on_in_the_background(model, monkeypatch):
    terminal = Terminal(model, monkeypatch, "-c", "import time; time.sleep(600)")
    for _ in range(offer.ATTEMPTS):
        process = terminal.process()
        begin = time.monotonic()
        terminal.offer.typed()
        assert time.monotonic() - begin < 5  # it does not wait
        assert process.wait() != 0
        terminal.offer.returned()
    terminal.offer.waits()
    assert terminal.offer._timer is None and not terminal.said and not Path(side_car(model)).exists()


def test_a_key_in_time_leaves_the_machine_alone(model, monkeypatch):
    terminal = Terminal(model, monkeypatch)
    monkeypatch.setattr(offer, "IDLE_SECONDS", 600)
    terminal.offer.waits()
    timer = terminal.offer._timer
    terminal.offer.typed()
    timer.join()
    assert terminal.offer._process is None


def run(model, *more):
    command = [sys.executable, "-m", "bridge.run", model, "-t", "1", "-p", "a", "--raw", "-n", "2", "-c", "512", "--device", "cpu", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_now_makes_it_first(model):
    done = run(model, "--calibrate", "now")
    assert done.returncode == 0 and "MixKVQ profile model.mixkvq.gguf (found beside the model)" in done.stderr, done.stderr
    assert "no profile of its own" not in done.stderr and read_profile(side_car(model), model).measured


def test_a_single_answer_says_it_in_one_line(model):
    first, second = (run(model).stderr for _ in range(2))
    assert "This model has no profile of its own yet" in first.splitlines()[-1] and "no profile" not in second


def test_a_chat_tells_the_offer_when_it_waits(model):
    """Before every line of the user, at its end and after every answer."""
    calls, lines = [], ["hello", "/memory"]

    class Recorder:
        def __getattr__(self, name):
            return lambda *_: calls.append(name)

    def ask(_):
        if not lines:
            raise EOFError
        return lines.pop(0)

    llama = Llama(model, kv="balanced", n_ctx=512, n_threads=1, n_threads_batch=1, device="cpu", verbose=False)
    chat = Chat(llama, Sampling(0.0, 40, 0.95, 0.05, 4), None, Console(file=io.StringIO()), lambda piece: None, ask, offer=Recorder())
    chat.loop()
    llama.close()
    assert calls == ["waits", "returned", "answered", "waits", "returned", "waits", "returned"]
