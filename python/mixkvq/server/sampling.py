"""The settings of the samplers in a request: OpenAI's fields and llama-server's, in every endpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bridge.engine import Sampling
from bridge.engine.sampling import grammar_for

from .errors import bad
from .fields import Fields


def sampling_of(fields: Fields, defaults: Sampling, grammar: str = "") -> Sampling:
    """What a request asks for. grammar: of what was asked otherwise, which goes before the field of that name."""
    n = fields.number
    return replace(
        defaults,
        temperature=n("temperature", defaults.temperature, 0, 100),
        top_k=fields.whole("top_k", defaults.top_k, -1),
        top_p=n("top_p", defaults.top_p, 0, 1),
        min_p=n("min_p", defaults.min_p, 0, 1),
        typical_p=n("typical_p", defaults.typical_p, 0, 1),
        top_n_sigma=n("top_n_sigma", defaults.top_n_sigma, -1, 1e6),
        xtc_probability=n("xtc_probability", defaults.xtc_probability, 0, 1),
        xtc_threshold=n("xtc_threshold", defaults.xtc_threshold, 0, 1),
        repeat_last_n=fields.whole("repeat_last_n", defaults.repeat_last_n, -1, 1 << 20),
        repeat_penalty=n("repeat_penalty", defaults.repeat_penalty, 1e-3, 1e3),
        frequency_penalty=n("frequency_penalty", defaults.frequency_penalty, -100, 100),
        presence_penalty=n("presence_penalty", defaults.presence_penalty, -100, 100),
        dry_multiplier=n("dry_multiplier", defaults.dry_multiplier, 0, 1e3),
        dry_base=n("dry_base", defaults.dry_base, 1, 1e3),
        dry_allowed_length=fields.whole("dry_allowed_length", defaults.dry_allowed_length, 0, 1 << 20),
        dry_penalty_last_n=fields.whole("dry_penalty_last_n", defaults.dry_penalty_last_n, -1, 1 << 20),
        mirostat=fields.whole("mirostat", defaults.mirostat, 0, 2),
        mirostat_tau=n("mirostat_tau", defaults.mirostat_tau, 0, 1e3),
        mirostat_eta=n("mirostat_eta", defaults.mirostat_eta, 0, 1e3),
        min_keep=fields.whole("min_keep", defaults.min_keep, 0, 1 << 20),
        seed=fields.seed(),
        logit_bias=_biases(fields.get("logit_bias")),
        grammar=grammar or grammar_of(fields),
    )


def grammar_of(fields: Fields) -> str:
    """Of the fields `grammar` and `json_schema`; "" if neither is there."""
    if fields.get("json_schema") is not None and fields.get("grammar"):
        raise bad("grammar and json_schema do not go together; give one of the two.", "grammar")
    if (schema := fields.get("json_schema")) is not None:
        return grammar_for(schema)
    return fields.text("grammar")


def format_grammar(form: Fields | None) -> str:
    """Of OpenAI's response_format, or of text.format in /v1/responses; "" for text."""
    kind = form.text("type", "text") if form is not None else "text"
    if form is None or kind == "text":
        return ""
    if kind == "json_object":
        schema = form.get("schema")
        return grammar_for({"type": "object"} if schema is None else schema)
    if kind == "json_schema":
        inner = form.record("json_schema") or form
        schema = inner.get("schema")
        if not isinstance(schema, dict):
            raise bad(f"{inner.name('schema')} must be a JSON schema.", inner.name("schema"))
        return grammar_for(schema)
    if kind == "grammar":
        return form.text("grammar")
    raise bad(f"{form.name('type')} must be text, json_object or json_schema, not {kind!r}.", form.name("type"))


def _biases(value: Any) -> dict[int, float]:
    """OpenAI's object by token, or llama-server's list of [token, bias]; false takes a token out."""
    if value is None:
        return {}
    rows = list(value.items()) if isinstance(value, dict) else value
    found: dict[int, float] = {}
    try:
        if len(rows) > 10000:
            raise ValueError
        for token, bias in rows:
            found[int(token)] = float("-inf") if bias is False else float(bias)
            if found[int(token)] != found[int(token)] or abs(int(token)) >= 1 << 31:
                raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise bad("logit_bias must be an object from tokens to numbers, or a list of pairs.", "logit_bias") from None
    return found
