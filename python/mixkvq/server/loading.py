"""A service of a model that is loaded: its template, its marks, and what is said of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from jinja2 import TemplateError

from bridge.engine import Engine
from bridge.llama import Llama

from ..core.errors import SettingsError
from .embedder import Embedder
from .output import THINK
from .prompts import CHATML, Prompts
from .service import Service
from .tools import HERMES, LLAMA, MISTRAL


def service(engine: Engine, name: str, template: str | None = None) -> Service:
    """Of a model that answers. template: in place of the model's own."""
    llama = engine.llama
    bos, eos = llama.begins_and_ends()
    try:
        prompts = Prompts(template or llama.metadata.get("tokenizer.chat_template") or CHATML, bos, eos)
    except TemplateError as e:
        whose = "--chat-template" if template else "The model's chat template"
        raise SettingsError(f"{whose} is no Jinja template: {e.message}.") from None
    llama.show(_marks(prompts))
    found = Service(name, llama.model_path, engine, prompts)
    stats = llama.kv_stats()
    meta = {**_meta(llama), "n_ctx": engine.n_ctx, "n_ctx_train": int(llama.metadata.get(f"{_architecture(llama)}.context_length", 0))}
    cache = {
        "name": stats.get("profile") or stats.get("preset") or stats.get("type"),
        "bits": round(stats["total_bits"], 3),
        "device": stats["device"],
    }
    found.facts = {"bos_token": bos, "eos_token": eos, "build": f"mixkvq {version('mixkvq')}", "meta": meta, "cache": cache}
    return found


def embedding_service(llama: Llama, name: str) -> Service:
    """Of a model that makes embeddings."""
    found = Service(name, llama.model_path, None, Prompts(CHATML), Embedder(llama))
    what = f"embeddings of {llama.n_embd()} numbers, texts of up to {min(llama.n_batch, llama.n_ctx())} tokens"
    found.facts = {"build": f"mixkvq {version('mixkvq')}", "meta": _meta(llama), "what": what}
    return found


def _meta(llama: Llama) -> dict[str, Any]:
    return {"n_vocab": llama.n_vocab(), "n_embd": llama.n_embd(), "architecture": _architecture(llama)}


def _architecture(llama: Llama) -> str:
    return str(llama.metadata.get("general.architecture", ""))


def _marks(prompts: Prompts) -> list[str]:
    """Texts that answers are taken apart by; models have control tokens for some."""
    forms = [mark for form in (HERMES, LLAMA, MISTRAL) for mark in (form.start, form.end) if mark and form is prompts.form]
    return [*forms, "[ARGS]", "[CALL_ID]", *(mark for pair in THINK for mark in pair)]
