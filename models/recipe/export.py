"""Weights of train.py and the tokenizer -> GGUF (architecture qwen2), in Q8_0 and F16.

    python export.py RUN/final.npz DATA/tokenizer.json OUTDIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from command_line import add_force, claim

NAME = "cot-tiny-34m"
DESCRIPTION = "Small Qwen2-style test model trained from scratch on public-domain prose, Python sources and synthetic chain-of-thought tasks"
CONTEXT = 16384
HEAD_SIZE = 128
ROPE_BASE = 1e6
NORM_EPSILON = 1e-6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GGUF_NAMES = {
    "n1": "attn_norm.weight", "n2": "ffn_norm.weight",
    "wq": "attn_q.weight", "wk": "attn_k.weight", "wv": "attn_v.weight",
    "bq": "attn_q.bias", "bk": "attn_k.bias", "bv": "attn_v.bias",
    "wo": "attn_output.weight", "wg": "ffn_gate.weight", "wu": "ffn_up.weight", "wd": "ffn_down.weight",
}  # fmt: skip


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], n_tokens: int) -> None:
    import gguf

    tokens: list[str | None] = [None] * n_tokens
    kinds = [gguf.TokenType.NORMAL] * n_tokens
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index] = token
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    if None in tokens:
        raise SystemExit(f"the tokenizer has no token {tokens.index(None)} of the model's {n_tokens}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(weights: dict[str, Any], tokenizer: dict[str, Any], path: Path, q8_0: bool) -> None:
    """Matrices in Q8_0 or F16; norms and biases in F32."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "qwen2")
    n_tokens, width = weights["emb"].shape
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")))
    writer.add_feed_forward_length(weights["blocks.0.wg"].shape[0])
    writer.add_head_count(weights["blocks.0.wq"].shape[0] // HEAD_SIZE)
    writer.add_head_count_kv(weights["blocks.0.wk"].shape[0] // HEAD_SIZE)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(n_tokens)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.MOSTLY_F16)
    if q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, n_tokens)

    def add(name: str, values: Any) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        elif q8_0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float16))

    add("token_embd.weight", weights["emb"])
    add("output_norm.weight", weights["nf"])
    for name, values in weights.items():
        if name.startswith("blocks."):
            _, layer, own = name.split(".")
            add(f"blk.{layer}.{GGUF_NAMES[own]}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("weights", type=Path, help="final.npz of train.py")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json of prep.py")
    parser.add_argument("out", type=Path, help="folder for the GGUF files")
    add_force(parser)
    args = parser.parse_args()
    claim(args.out, [f"{NAME}-f16.gguf", f"{NAME}-q8_0.gguf"], args.force)

    import numpy as np

    weights = dict(np.load(args.weights))
    tokenizer = json.loads(args.tokenizer.read_text(encoding="utf-8"))
    export(weights, tokenizer, args.out / f"{NAME}-f16.gguf", q8_0=False)
    export(weights, tokenizer, args.out / f"{NAME}-q8_0.gguf", q8_0=True)


if __name__ == "__main__":
    main()
