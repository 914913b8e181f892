"""Write a GGUF model with random weights: the geometry of a large model with few layers, for measuring speed.

Its text is noise.  The defaults are the attention and feed-forward shapes of an 8B model.

    python bench/random_model.py random.gguf --layers 2
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

import click
import gguf
import numpy as np
from _common import COUNT, COUNT_OR_ZERO, SEED, force_option, run, tool

from mixkvq.core.outputs import check_output, writing

Q8_0_BLOCK = 32
Q8_0_CODES = 127


def byte_vocabulary(least: int) -> tuple[list[str], list[float], list[int]]:
    """The smallest SentencePiece vocabulary that any text can be split into: controls, bytes, printable characters; unused tokens up to `least`."""
    controls = ["<unk>", "<s>", "</s>"]
    single_bytes = [f"<0x{i:02X}>" for i in range(256)]
    characters = [*string.printable.strip(), "\u2581"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(single_bytes) + [gguf.TokenType.NORMAL] * len(characters)
    scores = [0.0] * (len(controls) + len(single_bytes)) + [-float(i) for i in range(len(characters))]
    unused = [f"<unused{i}>" for i in range(least - len(scores))]
    kinds += [gguf.TokenType.UNUSED] * len(unused)
    return controls + single_bytes + characters + unused, scores + [0.0] * len(unused), kinds


class RandomWeights:
    """Adds tensors of independent weights with a given standard deviation."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int, kind: str) -> None:
        self.writer, self.rng, self.kind = writer, np.random.default_rng(seed), kind

    def norm(self, name: str, width: int) -> None:
        self.writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """Rows of `columns` inputs; `gain` 1 keeps the variance of the input."""
        deviation = gain / columns**0.5
        if self.kind == "f16":
            weights = (self.rng.standard_normal((rows, columns), np.float32) * np.float32(deviation)).astype(np.float16)
            self.writer.add_tensor(f"{name}.weight", weights)
            return
        if columns % Q8_0_BLOCK:
            raise click.ClickException(f"{name}: {columns} columns are not a multiple of {Q8_0_BLOCK}, use --type f16")
        # Uniform codes under one scale, written as blocks of a scale and 32 codes: far quicker than quantising.
        blocks = np.empty((rows, columns // Q8_0_BLOCK, 2 + Q8_0_BLOCK), np.uint8)
        scale = np.float16(deviation * 3**0.5 / Q8_0_CODES)
        blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        codes = self.rng.integers(-Q8_0_CODES, Q8_0_CODES + 1, (rows, columns), np.int8)
        blocks[..., 2:] = codes.view(np.uint8).reshape(rows, -1, Q8_0_BLOCK)
        self.writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)


@tool(help=__doc__.split("\n\n")[0])
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layers", type=COUNT, default=2, show_default=True)
@click.option("--width", type=COUNT, default=4096, show_default=True)
@click.option("--heads", type=COUNT, default=32, show_default=True)
@click.option("--kv-heads", type=COUNT, default=8, show_default=True)
@click.option("--head-size", type=COUNT, default=128, show_default=True)
@click.option("--feed-forward", type=COUNT, default=14336, show_default=True)
@click.option("--vocabulary", type=COUNT_OR_ZERO, default=0, show_default=True, help="Tokens at least, of which most are never read.")
@click.option("--context", type=COUNT, default=131072, show_default=True)
@click.option("--type", "kind", type=click.Choice(["q8_0", "f16"]), default="q8_0", show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@force_option("OUTPUT")
def main(output, layers, width, heads, kv_heads, head_size, feed_forward, vocabulary, context, kind, seed, force):
    check_output(output, "model", force=force)
    with writing(output) as temporary:
        write_model(temporary, layers, width, heads, kv_heads, head_size, feed_forward, vocabulary, context, kind, seed)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.0f} MB, {layers} layers", err=True)


def write_model(path, layers, width, heads, kv_heads, head_size, feed_forward, vocabulary, context, kind, seed):
    writer = gguf.GGUFWriter(path, "llama")
    tokens, scores, kinds = byte_vocabulary(vocabulary)
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    weights = RandomWeights(writer, seed, kind)
    weights.matrix("token_embd", len(tokens), width, gain=width**0.5)
    weights.norm("output_norm", width)
    weights.matrix("output", len(tokens), width)
    for i in range(layers):
        block = f"blk.{i}"
        weights.norm(f"{block}.attn_norm", width)
        weights.norm(f"{block}.ffn_norm", width)
        # A gain of 2 gives attention something to choose from: without it every token would weigh the same.
        weights.matrix(f"{block}.attn_q", heads * head_size, width, gain=2)
        weights.matrix(f"{block}.attn_k", kv_heads * head_size, width, gain=2)
        weights.matrix(f"{block}.attn_v", kv_heads * head_size, width)
        weights.matrix(f"{block}.attn_output", width, heads * head_size)
        weights.matrix(f"{block}.ffn_gate", feed_forward, width)
        weights.matrix(f"{block}.ffn_up", feed_forward, width)
        weights.matrix(f"{block}.ffn_down", width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(run(main, "bench/random_model.py"))
