"""Small models with random weights, one per kind of attention that the cache must serve, as GGUF files.

Weights are F32 and a vocabulary is 259 byte tokens, so a file takes well under 3 MB and a token well under a millisecond. Queries and keys are
scaled up: scores of a random model are otherwise nearly equal, attention averages all values, and errors of the cache would not show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

N_VOCAB = 259
EMBD = 64


class _Tensors(dict):
    def __init__(self, seed: int):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def normal(self, name: str, *shape: int, scale: float) -> None:
        self[name] = (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        """Maps unit variance to a variance of gain squared."""
        self.normal(name, n_out, n_in, scale=gain / np.sqrt(n_in))

    def ones(self, name: str, n: int, value: float = 1.0) -> None:
        self[name] = np.full(n, value, np.float32)


def _save(path: Path, arch: str, values: dict, tensors: _Tensors, token_types: int = 0) -> Path:
    writer = GGUFWriter(path, arch)
    if token_types:
        writer.add_token_type_count(token_types)
    for key, value in {"context_length": 8192, "vocab_size": N_VOCAB, **values}.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _attention(t: _Tensors, p: str, n_head: int, n_kv: int, d: int, n_embd: int = EMBD) -> None:
    t.matrix(p + "attn_q.weight", n_head * d, n_embd, 1.5)
    t.matrix(p + "attn_k.weight", n_kv * d, n_embd, 1.5)
    # A few key channels are much larger than the rest, as in trained models: those are what the tiers are for.
    for h in range(n_kv):
        t[p + "attn_k.weight"][h * d + d // 3] *= 4
    t.matrix(p + "attn_v.weight", n_kv * d, n_embd)
    t.matrix(p + "attn_output.weight", n_embd, n_head * d)


def _gated_ffn(t: _Tensors, p: str, n_ff: int, n_embd: int = EMBD) -> None:
    t.matrix(p + "ffn_gate.weight", n_ff, n_embd)
    t.matrix(p + "ffn_up.weight", n_ff, n_embd)
    t.matrix(p + "ffn_down.weight", n_embd, n_ff)


def _ends(t: _Tensors, n_embd: int = EMBD) -> None:
    t.normal("token_embd.weight", N_VOCAB, n_embd, scale=1.0)
    t.ones("output_norm.weight", n_embd)
    t.matrix("output.weight", N_VOCAB, n_embd, 2.0)


def llama(path: Path, head_size: int = 64, n_kv: int = 2, ratio: int = 2, n_layers: int = 2, seed: int = 1, claims: dict | None = None) -> Path:
    """Grouped-query attention: `ratio` query heads read each of the `n_kv` key/value heads. `claims` take the place of what the header says."""
    n_head = n_kv * ratio
    t = _Tensors(seed)
    _ends(t)
    for i in range(n_layers):
        p = f"blk.{i}."
        t.ones(p + "attn_norm.weight", EMBD)
        t.ones(p + "ffn_norm.weight", EMBD)
        _attention(t, p, n_head, n_kv, head_size)
        _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": n_layers,
        "embedding_length": EMBD,
        "feed_forward_length": 2 * EMBD,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": head_size,
        "rope.freq_base": 10000.0,
        **(claims or {}),
    }
    return _save(path, "llama", values, t)


def gemma2(path: Path, head_size: int = 128, window: int = 150) -> Path:
    """Soft-capping of the scores, and a sliding window in every other layer: llama.cpp makes two caches.

    llama.cpp's own CUDA kernels have soft-capping for heads of 128 and 256 only, and end the process when they are given others.
    """
    n_head, n_kv, n_layers = 4, 2, 4
    t = _Tensors(2)
    t.normal("token_embd.weight", N_VOCAB, EMBD, scale=0.05)
    t.ones("output_norm.weight", EMBD, 6.0)  # the output matrix is the embedding
    for i in range(n_layers):
        p = f"blk.{i}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            t.ones(p + name + ".weight", EMBD)
        _attention(t, p, n_head, n_kv, head_size)
        _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": n_layers,
        "embedding_length": EMBD,
        "feed_forward_length": 2 * EMBD,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.sliding_window": window,
        "attn_logit_softcapping": 6.0,
        "final_logit_softcapping": 30.0,
        "rope.dimension_count": head_size,
    }
    return _save(path, "gemma2", values, t)


def gemma4(path: Path, head_size: int = 64, full_size: int = 320, window: int = 150) -> Path:
    """Windowed layers have a head size of their own; that of the other layers is too large for the page format. The last two layers have no cache
    and read that of earlier ones."""
    n_head, n_kv, windowed = 2, 1, [True, False, True, False, True, False]
    t = _Tensors(9)
    t.normal("token_embd.weight", N_VOCAB, EMBD, scale=0.05)
    t.ones("output_norm.weight", EMBD, 6.0)  # the output matrix is the embedding
    t.ones("rope_freqs.weight", full_size // 2)
    for i, w in enumerate(windowed):
        p, d = f"blk.{i}.", head_size if w else full_size
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            t.ones(p + name + ".weight", EMBD)
        _attention(t, p, n_head, n_kv, d)
        for name in ("attn_q_norm", "attn_k_norm"):
            t.ones(p + name + ".weight", d, 1.2 / d**0.25)  # gemma4 does not scale its scores
        _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": len(windowed),
        "embedding_length": EMBD,
        "embedding_length_per_layer_input": 0,
        "feed_forward_length": 2 * EMBD,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": full_size,
        "attention.value_length": full_size,
        "attention.key_length_swa": head_size,
        "attention.value_length_swa": head_size,
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": windowed,
        "attention.shared_kv_layers": 2,
        "rope.dimension_count": full_size,
        "rope.dimension_count_swa": head_size,
    }
    return _save(path, "gemma4", values, t)


def bloom(path: Path, head_size: int = 64, n_head: int = 3, claims: dict | None = None) -> Path:
    """ALiBi. Three heads: the slopes of a number that is no power of two come from two series."""
    d = head_size * n_head
    t = _Tensors(3)
    t.normal("token_embd.weight", N_VOCAB, d, scale=1.0)
    t.matrix("output.weight", N_VOCAB, d, 2.0)

    def norm(name: str) -> None:
        t.ones(name + ".weight", d)
        t.normal(name + ".bias", d, scale=0.1)

    norm("token_embd_norm")
    norm("output_norm")
    for i in range(2):
        p = f"blk.{i}."
        norm(p + "attn_norm")
        norm(p + "ffn_norm")
        t.matrix(p + "attn_qkv.weight", 3 * d, d, 1.5)
        t.normal(p + "attn_qkv.bias", 3 * d, scale=0.1)
        t.matrix(p + "attn_output.weight", d, d)
        t.normal(p + "attn_output.bias", d, scale=0.1)
        t.matrix(p + "ffn_up.weight", 2 * d, d)
        t.normal(p + "ffn_up.bias", 2 * d, scale=0.1)
        t.matrix(p + "ffn_down.weight", d, 2 * d)
        t.normal(p + "ffn_down.bias", d, scale=0.1)
    values = {
        "block_count": 2,
        "embedding_length": d,
        "feed_forward_length": 2 * d,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head,
        "attention.layer_norm_epsilon": 1e-5,
        **(claims or {}),
    }
    return _save(path, "bloom", values, t)


def gpt_oss(path: Path, head_size: int = 64, window: int = 150) -> Path:
    """A sink logit per head, a sliding window in every other layer, and a mixture of experts. Every expert is used: which ones a router picks would
    turn on the last bit of an attention."""
    n_head, n_kv, n_layers, n_expert, n_ff = 8, 1, 2, 2, 64
    t = _Tensors(4)
    _ends(t)
    for i in range(n_layers):
        p = f"blk.{i}."
        t.ones(p + "attn_norm.weight", EMBD)
        t.ones(p + "post_attention_norm.weight", EMBD)
        _attention(t, p, n_head, n_kv, head_size)
        t.normal(p + "attn_output.bias", EMBD, scale=0.1)
        t[p + "attn_sinks.weight"] = np.linspace(-4, 12, n_head, dtype=np.float32)  # from no part in the softmax to nearly all of it
        t.matrix(p + "ffn_gate_inp.weight", n_expert, EMBD)
        t.normal(p + "ffn_gate_inp.bias", n_expert, scale=0.1)
        for name, n_out, n_in in (("gate", n_ff, EMBD), ("up", n_ff, EMBD), ("down", EMBD, n_ff)):
            t.normal(p + f"ffn_{name}_exps.weight", n_expert, n_out, n_in, scale=1 / np.sqrt(n_in))
            t.normal(p + f"ffn_{name}_exps.bias", n_expert, n_out, scale=0.1)
    values = {
        "block_count": n_layers,
        "embedding_length": EMBD,
        "feed_forward_length": n_ff,
        "expert_feed_forward_length": n_ff,
        "expert_count": n_expert,
        "expert_used_count": n_expert,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.sliding_window": window,
        "rope.dimension_count": head_size,
        "rope.freq_base": 10000.0,
    }
    return _save(path, "gpt-oss", values, t)


def lfm2(path: Path) -> Path:
    """A hybrid: two layers of short convolutions, which keep a recurrent state, and two of attention."""
    n_head, head_size, kv, n_ff = 2, 64, [0, 1, 0, 1], 96
    d = n_head * head_size
    t = _Tensors(5)
    t.normal("token_embd.weight", N_VOCAB, d, scale=1.0)
    t.ones("token_embd_norm.weight", d)
    t.matrix("output.weight", N_VOCAB, d, 2.0)
    for i, n_kv in enumerate(kv):
        p = f"blk.{i}."
        t.ones(p + "attn_norm.weight", d)
        t.ones(p + "ffn_norm.weight", d)
        _gated_ffn(t, p, n_ff, d)
        if n_kv:
            _attention(t, p, n_head, n_kv, head_size, d)
            t.ones(p + "attn_q_norm.weight", head_size, 1.5)
            t.ones(p + "attn_k_norm.weight", head_size, 1.5)
        else:
            t.normal(p + "shortconv.conv.weight", d, 3, scale=0.6)
            t.matrix(p + "shortconv.in_proj.weight", 3 * d, d)
            t.matrix(p + "shortconv.out_proj.weight", d, d)
    values = {
        "block_count": len(kv),
        "embedding_length": d,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_size,
        "rope.freq_base": 10000.0,
        "shortconv.l_cache": 3,
    }
    return _save(path, "lfm2", values, t)


def mamba(path: Path) -> Path:
    """No attention at all, only a recurrent state."""
    d_inner, d_state, d_conv, dt_rank = 2 * EMBD, 8, 4, 4
    t = _Tensors(6)
    _ends(t)
    for i in range(2):
        p = f"blk.{i}."
        t.ones(p + "attn_norm.weight", EMBD)
        t.matrix(p + "ssm_in.weight", 2 * d_inner, EMBD)
        t.normal(p + "ssm_conv1d.weight", d_inner, d_conv, scale=0.5)
        t.normal(p + "ssm_conv1d.bias", d_inner, scale=0.1)
        t.matrix(p + "ssm_x.weight", dt_rank + 2 * d_state, d_inner)
        t.matrix(p + "ssm_dt.weight", d_inner, dt_rank)
        t.normal(p + "ssm_dt.bias", d_inner, scale=0.1)
        t[p + "ssm_a"] = -np.tile(np.arange(1, d_state + 1, dtype=np.float32), (d_inner, 1))
        t.ones(p + "ssm_d", d_inner)
        t.matrix(p + "ssm_out.weight", EMBD, d_inner)
    values = {
        "block_count": 2,
        "embedding_length": EMBD,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "ssm.conv_kernel": d_conv,
        "ssm.inner_size": d_inner,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": dt_rank,
    }
    return _save(path, "mamba", values, t)


def deepseek2(path: Path, latent: bool) -> Path:
    """Multi-head latent attention. `latent`: the cache holds one latent vector per token and the values are a part of the keys; otherwise, as
    in older files, keys of 96 and values of 64 dimensions per head."""
    n_head, nope, rope, v, q_rank, kv_rank, n_layers = 2, 64, 32, 64, 48, 64, 2
    t = _Tensors(7)
    _ends(t)
    for i in range(n_layers):
        p = f"blk.{i}."
        t.ones(p + "attn_norm.weight", EMBD)
        t.ones(p + "ffn_norm.weight", EMBD)
        t.ones(p + "attn_q_a_norm.weight", q_rank)
        t.ones(p + "attn_kv_a_norm.weight", kv_rank)
        t.matrix(p + "attn_q_a.weight", q_rank, EMBD)
        t.matrix(p + "attn_q_b.weight", n_head * (nope + rope), q_rank, 2.0)
        t.matrix(p + "attn_kv_a_mqa.weight", kv_rank + rope, EMBD)
        if latent:
            t.normal(p + "attn_k_b.weight", n_head, kv_rank, nope, scale=1 / np.sqrt(kv_rank))
            t.normal(p + "attn_v_b.weight", n_head, v, kv_rank, scale=1 / np.sqrt(kv_rank))
        else:
            t.matrix(p + "attn_kv_b.weight", n_head * (nope + v), kv_rank)
        t.matrix(p + "attn_output.weight", EMBD, n_head * v)
        _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": n_layers,
        "leading_dense_block_count": n_layers,
        "embedding_length": EMBD,
        "feed_forward_length": 2 * EMBD,
        "expert_feed_forward_length": 2 * EMBD,
        "expert_shared_count": 0,
        "attention.head_count": n_head,
        "attention.head_count_kv": 1 if latent else n_head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope if latent else nope + rope,
        "attention.value_length": kv_rank if latent else v,
        "rope.dimension_count": rope,
        "rope.freq_base": 10000.0,
    }
    if latent:
        values["attention.key_length_mla"] = nope + rope
        values["attention.value_length_mla"] = v
    return _save(path, "deepseek2", values, t)


def t5(path: Path) -> Path:
    """An encoder and a decoder. The decoder's cache is read with a bias per position, so llama.cpp uses plain matrix products on keys and values
    that are stored for flash attention."""
    n_head, d, n_layers = 2, 64, 2
    inner = n_head * d
    t = _Tensors(8)
    t.normal("token_embd.weight", N_VOCAB, EMBD, scale=1.0)
    t.matrix("output.weight", N_VOCAB, EMBD, 2.0)
    t.ones("enc.output_norm.weight", EMBD)
    t.ones("dec.output_norm.weight", EMBD)
    for i in range(n_layers):
        for side in ("enc", "dec"):
            p = f"{side}.blk.{i}."
            for kind in ("attn", "cross_attn") if side == "dec" else ("attn",):
                t.ones(p + kind + "_norm.weight", EMBD)
                gain = 1.5 / d**0.25  # T5 does not scale its scores
                t.matrix(p + kind + "_q.weight", inner, EMBD, gain)
                t.matrix(p + kind + "_k.weight", inner, EMBD, gain)
                t.matrix(p + kind + "_v.weight", inner, EMBD)
                t.matrix(p + kind + "_o.weight", EMBD, inner)
            if i == 0:
                t.normal(p + "attn_rel_b.weight", 32, n_head, scale=0.5)
            t.ones(p + "ffn_norm.weight", EMBD)
            _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": n_layers,
        "embedding_length": EMBD,
        "feed_forward_length": 2 * EMBD,
        "attention.head_count": n_head,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.relative_buckets_count": 32,
        "decoder_start_token_id": 0,
    }
    return _save(path, "t5", values, t)


def bert(path: Path) -> Path:
    """An encoder: it reads a text as a whole, has no cache, and gives an embedding."""
    n_head, n_ff, n_ctx, n_types = 2, 96, 512, 2
    t = _Tensors(11)
    t.normal("token_embd.weight", N_VOCAB, EMBD, scale=1.0)
    t.normal("token_types.weight", n_types, EMBD, scale=0.1)
    t.normal("position_embd.weight", n_ctx, EMBD, scale=0.1)

    def norm(name: str) -> None:
        t.ones(name + ".weight", EMBD)
        t.normal(name + ".bias", EMBD, scale=0.1)

    def linear(name: str, n_out: int, n_in: int) -> None:
        t.matrix(name + ".weight", n_out, n_in)
        t.normal(name + ".bias", n_out, scale=0.1)

    norm("token_embd_norm")
    for i in range(2):
        p = f"blk.{i}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(p + name, EMBD, EMBD)
        norm(p + "attn_output_norm")
        linear(p + "ffn_up", n_ff, EMBD)
        linear(p + "ffn_down", EMBD, n_ff)
        norm(p + "layer_output_norm")
    values = {
        "block_count": 2,
        "context_length": n_ctx,
        "embedding_length": EMBD,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.layer_norm_epsilon": 1e-5,
        "pooling_type": 1,
    }
    return _save(path, "bert", values, t, n_types)


def t5_encoder(path: Path) -> Path:
    """The encoder of a T5 by itself."""
    n_head, d = 2, 64
    inner = n_head * d
    t = _Tensors(12)
    t.normal("token_embd.weight", N_VOCAB, EMBD, scale=1.0)
    t.ones("enc.output_norm.weight", EMBD)
    for i in range(2):
        p = f"enc.blk.{i}."
        t.ones(p + "attn_norm.weight", EMBD)
        for name in "qkv":
            t.matrix(p + f"attn_{name}.weight", inner, EMBD)
        t.matrix(p + "attn_o.weight", EMBD, inner)
        if i == 0:
            t.normal(p + "attn_rel_b.weight", 32, n_head, scale=0.5)
        t.ones(p + "ffn_norm.weight", EMBD)
        _gated_ffn(t, p, 2 * EMBD)
    values = {
        "block_count": 2,
        "embedding_length": EMBD,
        "feed_forward_length": 2 * EMBD,
        "attention.head_count": n_head,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.relative_buckets_count": 32,
    }
    return _save(path, "t5encoder", values, t)


def adapter(path: Path, n_in: int, n_out: int, seed: int) -> str:
    """A LoRA adapter of the first layer's queries."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(seed)
    for name, shape in (("a", (4, n_in)), ("b", (n_out, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
