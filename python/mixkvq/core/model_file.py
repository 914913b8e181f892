"""What a GGUF file says about a model, without loading it."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from .errors import GeometryError, ModelFileError
from .gguf_header import Header, ParseError, parse
from .memory import CELLS

MIN_HEAD_SIZE, MAX_HEAD_SIZE, HEAD_SIZE_STEP = 32, 256, 8
MAX_COUNT = 1 << 31
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # llama.cpp's
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


def served(head_size: int) -> bool:
    """Whether the page format has this head size."""
    return MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE and head_size % HEAD_SIZE_STEP == 0


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the key-value pairs and the tensor directory of a GGUF file.

    Raises ModelFileError with one sentence if the file is missing, unreadable, not GGUF, damaged or shorter than its tensors.
    """
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            raise ModelFileError(f"{path} is a directory, not a GGUF file.")
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            _check_version(path, f.read(8))
            header = parse(f)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist{_how_to_get(path)}.") from None
    except ParseError as e:
        raise ModelFileError(f"{path} is truncated or damaged: {e}.") from None
    except ModelFileError:
        raise
    except (OSError, ValueError) as e:
        raise ModelFileError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    if header.end > size:
        raise ModelFileError(f"{path} is truncated: its tensors end at byte {header.end}, the file at byte {size}; download or copy it again.")
    return header


def _how_to_get(path: str) -> str:
    """What to do about a name that is no file but an address, or a model's name on a hub."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        return "; a model must be a file here: download it first, e.g. with curl -LO"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", path) and not path.endswith(".gguf") and not os.path.isdir(os.path.dirname(path)):
        name = path.partition(":")[0]
        return f"; if it is the name of a model on a hub, download a GGUF file of it first: pip install huggingface_hub, hf download {name} FILE.gguf"
    return ""


def _check_version(path: str, start: bytes) -> None:
    """What the parser would refuse as well, but in words for its developers."""
    if start[:4] != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file." if start else f"{path} is empty.")
    version = int.from_bytes(start[4:], "little")
    if len(start) == 8 and version & 0xFFFF == 0:
        raise ModelFileError(f"{path} is a big-endian GGUF file, which is not supported.")
    if len(start) == 8 and version not in (2, 3):
        raise ModelFileError(f"{path} is GGUF version {version}; versions 2 and 3 are supported.")


@dataclass(frozen=True)
class ModelFile:
    """The geometry of a model as far as its cache is concerned. Lists are per layer, 0 where a layer has no attention."""

    path: str
    architecture: str
    name: str
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_head_kv: list[int] = field(repr=False)
    head_size_k: list[int] = field(repr=False)
    head_size_v: list[int] = field(repr=False)
    window: int = 0  # sliding window, tokens; 0: none
    windowed: list[bool] | None = field(default=None, repr=False)  # None: the file does not say which layers
    exact: bool = True  # False: some layers have head sizes that these lists do not show
    mla: bool = False  # latent attention: values are a view of the keys
    windowed_sizes: tuple[int, int] | None = None  # head sizes of windowed layers where the file does not say which these are
    attention_every: int = 1  # of a hybrid model: one layer in so many has attention
    fingerprint: str = ""
    parts: tuple[str, ...] = ()  # the other files of a model in several files
    has_profile: bool = False  # a profile is embedded
    norm: str = ""  # 8 hexadecimal digits of the weights of the last norm, which no quantisation changes; "": they are not there as F32

    @property
    def n_layers(self) -> int:
        """Of the model, those without attention included."""
        return len(self.n_head_kv)

    @property
    def head_sizes(self) -> list[tuple[int, int]] | None:
        """(key, value) head size per layer, or None if they are not known for certain."""
        return list(zip(self.head_size_k, self.head_size_v)) if self.exact else None

    def served_layers(self) -> int:
        """How many layers have a cache that can be packed."""
        if self.mla:
            return 0
        others = self.windowed_sizes or (0, 0)
        return sum(1 for n, *sizes in zip(self.n_head_kv, self.head_size_k, self.head_size_v) if n and any(map(served, (*sizes, *others))))

    def cache_elements(self, n_ctx: int, n_ubatch: int = 512, swa_full: bool = True) -> int:
        """Key and value elements of a cache of n_ctx tokens, from what the file says.

        swa_full: layers with a sliding window have all cells, as is llama.cpp's default; without it this is a lower bound where the file does not
        say which layers these are. What a context takes in bytes is measured (dry_run.py).
        """
        total = 0
        least_k, least_v = self.windowed_sizes or (MAX_COUNT, MAX_COUNT)
        for i, (n, k, v) in enumerate(zip(self.n_head_kv, self.head_size_k, self.head_size_v)):
            cells, k, v = n_ctx, min(k, least_k), min(v, least_v)
            if self.window and not swa_full and (self.windowed is None or self.windowed[i]):
                cells = min(n_ctx, -(-(self.window + n_ubatch) // CELLS) * CELLS)
            total += cells * n * (k + (0 if self.mla else v))
        return total // self.attention_every


_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Check a model file and read its geometry.

    Raises ModelFileError if it is missing, not GGUF, truncated, part of an incomplete set, or not a language model.
    """
    path = os.fspath(path)
    try:
        stat = os.stat(path)
    except OSError:
        read_header(path)  # says what is wrong
        raise
    model = _open_model(path, stat.st_mtime_ns, stat.st_size)
    for part in model.parts:
        read_header(part)
    return model


@lru_cache(maxsize=16)
def _open_model(path: str, mtime_ns: int, size: int) -> ModelFile:
    header = read_header(path)
    v = header.values
    kind = v.get("general.type", "model")
    arch = v.get("general.architecture")
    if kind in ("adapter", "mmproj", "imatrix", "mixkvq-profile") or arch in ("clip", "imatrix"):
        raise ModelFileError(f"{path} is not a language model but a GGUF file of type {kind if kind != 'model' else arch!r}.")
    if not isinstance(arch, str) or not arch:
        raise ModelFileError(f"{path} does not name its architecture, so it is not a model that llama.cpp can load.")
    parts = _other_parts(header)

    keys = _Keys(v, arch)
    n_layers = keys.number("block_count")
    if n_layers > _MAX_LAYERS:
        raise ModelFileError(f"{path} is damaged: it claims {n_layers} layers.")
    n_ctx_train = v.get(f"{arch}.context_length", 0)
    if isinstance(n_ctx_train, int) and n_ctx_train >= MAX_COUNT:  # llama.cpp's counts have 31 bits
        raise ModelFileError(f"{path} is damaged: it claims a context of {n_ctx_train} tokens.")
    if wrong := _unlike_llama_cpp(keys):
        raise ModelFileError(f"{path} is damaged: it claims {wrong}.")
    heads = _read_heads(keys, n_layers, header)

    # Newer hybrid models give one head count for all layers although most of them are recurrent.
    hybrid = keys.number("ssm.state_size") > 0 and isinstance(v.get(f"{arch}.attention.head_count_kv"), int)
    tokens = v.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) and all(isinstance(token, bytes) for token in tokens) else []
    n_embd = keys.number("embedding_length")
    return ModelFile(
        path=path,
        architecture=arch,
        name=str(v.get("general.name") or Path(path).stem),
        n_ctx_train=keys.number("context_length"),
        n_embd=n_embd,
        n_vocab=keys.number("vocab_size", len(tokens)),
        n_head_kv=heads.n_kv,
        head_size_k=heads.size_k,
        head_size_v=heads.size_v,
        window=keys.number("attention.sliding_window"),
        windowed=heads.windowed,
        exact=not hybrid and heads.windowed_sizes is None,
        # llama.cpp's own rule. A rank alone (minicpm3, plm, older files of deepseek2) means an ordinary cache.
        mla=keys.number("attention.key_length_mla") > 0 and keys.number("attention.value_length_mla") > 0,
        windowed_sizes=heads.windowed_sizes,
        attention_every=max(1, keys.number("full_attention_interval", 4)) if hybrid else 1,
        fingerprint=_fingerprint(header, arch, n_layers, heads.n_kv, heads.size_k, heads.size_v, n_embd, tokens),
        parts=parts,
        has_profile="mixkvq.profile.version" in v,
        norm=_norm(header),
    )


@dataclass(frozen=True)
class _Keys:
    """The keys of a model's architecture. What is no count is as if it were not there."""

    values: dict[str, Any]
    architecture: str

    def number(self, key: str, default: int = 0) -> int:
        value = self.values.get(f"{self.architecture}.{key}", default)
        return value if _counts(value) else default

    def per_layer(self, key: str, n_layers: int, default: list[int]) -> list[int]:
        """One for each layer, or one for all."""
        value: Any = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and len(value) >= n_layers and all(_counts(x) for x in value):
            return [int(x) for x in value[:n_layers]]
        return [int(value)] * n_layers if _counts(value) else default


def _counts(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


@dataclass(frozen=True)
class _Heads:
    """See the fields of `ModelFile`."""

    n_kv: list[int]
    size_k: list[int]
    size_v: list[int]
    windowed: list[bool] | None
    windowed_sizes: tuple[int, int] | None


def _read_heads(keys: _Keys, n_layers: int, header: Header) -> _Heads:
    n_embd = keys.number("embedding_length")
    n_head = keys.per_layer("attention.head_count", n_layers, [0] * n_layers)
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)
    default_size = [n_embd // n if n else 0 for n in n_head]
    size_k = keys.per_layer("attention.key_length", n_layers, default_size)
    size_v = keys.per_layer("attention.value_length", n_layers, default_size)

    pattern = keys.values.get(f"{keys.architecture}.attention.sliding_window_pattern")
    windowed = [bool(x) for x in pattern[:n_layers]] if isinstance(pattern, list) and len(pattern) >= n_layers else None
    # Windowed layers may have head sizes of their own, and the last layers may read the cache of earlier ones (gemma4 does both).
    k_swa, v_swa = keys.number("attention.key_length_swa"), keys.number("attention.value_length_swa")
    if windowed is not None:
        size_k = [k_swa if k_swa and w else k for k, w in zip(size_k, windowed)]
        size_v = [v_swa if v_swa and w else s for s, w in zip(size_v, windowed)]
    windowed_sizes = (k_swa or max(size_k, default=0), v_swa or max(size_v, default=0)) if windowed is None and (k_swa or v_swa) else None
    if windowed_sizes is None and isinstance(keys.values.get(f"{keys.architecture}.attention.head_count_kv"), list):
        _check_key_weights(header, n_head_kv, size_k)
    shared = min(keys.number("attention.shared_kv_layers"), n_layers)
    n_head_kv = [n if i < n_layers - shared else 0 for i, n in enumerate(n_head_kv)]
    size_k = [k if n else 0 for k, n in zip(size_k, n_head_kv)]
    size_v = [s if n else 0 for s, n in zip(size_v, n_head_kv)]
    return _Heads(n_head_kv, size_k, size_v, windowed, windowed_sizes)


def _unlike_llama_cpp(keys: _Keys) -> str:
    """Which numbers of a header do not go together, or "". llama.cpp asserts that they do: it would end the process."""
    n_layers, n_predict = keys.number("block_count"), keys.number("nextn_predict_layers")
    if n_predict > n_layers:
        return f"{n_layers} layers, of which {n_predict} predict further tokens"
    rope_scaling = keys.values.get(f"{keys.architecture}.rope.scaling.type", "none")
    if isinstance(rope_scaling, str) and rope_scaling not in _ROPE_SCALINGS:
        return f"a scaling of positions {rope_scaling!r}, and there are {', '.join(_ROPE_SCALINGS)}"
    n, used = keys.number("expert_count"), max(keys.per_layer("expert_used_count", n_layers, []), default=0)
    if keys.architecture.startswith("hunyuan") and n <= 1:
        return ""
    if n > _MAX_EXPERTS or used > n or (n and not used):
        return f"{n} experts, of which {used} are used"
    groups, groups_used = keys.number("expert_group_count"), keys.number("expert_group_used_count")
    if groups and groups >= n or groups > 1 and (n % groups or not 0 < groups_used < groups):
        return f"{n} experts in {groups} groups, of which {groups_used} are used"
    return ""


def _check_key_weights(header: Header, n_head_kv: list[int], size_k: list[int]) -> None:
    """Raises ModelFileError where a layer makes keys of another width than a list of head counts claims.

    For many architectures llama.cpp takes the shape of these weights from the first layer, and ends the process when another one is computed.
    Recurrent layers claim no heads and may have weights of that name.
    """
    path, tensors = header.path, header.tensors
    recurrent = {name.split(".")[1] for name in tensors if name.startswith("blk.") and ".ssm_" in name}
    for i, (n, size) in enumerate(zip(n_head_kv, size_k)):
        weight = tensors.get(f"blk.{i}.attn_k.weight")
        if weight is not None and str(i) not in recurrent and weight.shape[1:] != (n * size,):
            width = weight.shape[-1]
            raise ModelFileError(f"{path} is damaged: layer {i} claims {n} key/value heads of {size}, but its weights make keys of {width} numbers.")
        if not n and f"blk.{i}.attn_qkv.weight" in tensors and str(i) not in recurrent:
            raise ModelFileError(f"{path} is damaged: layer {i} claims no key/value heads, but has weights that make keys.")


def _fingerprint(
    header: Header,
    arch: str,
    n_layers: int,
    n_head_kv: list[int],
    size_k: list[int],
    size_v: list[int],
    n_embd: int,
    tokens: list[bytes],
) -> str:
    """Says "the same model" across weight quantisations: everything that shapes the cache, and the vocabulary.

    Each token is hashed behind its length (8 bytes, little-endian), as in the file, but ends at its first zero byte, as in ggml.
    """
    digest = hashlib.sha256()
    for part in (arch, n_layers, n_head_kv, size_k, size_v, n_embd, len(tokens)):
        digest.update(repr(part).encode() + b"\n")
    base = header.values.get(f"{arch}.rope.freq_base")
    digest.update(struct.pack("<f", base if isinstance(base, float) and abs(base) < 1e38 else 10000.0))
    for token in tokens:
        digest.update(len(token).to_bytes(8, "little") + token)
    return digest.hexdigest()[:32]


def _norm(header: Header) -> str:
    """Quantisations of a model share these numbers; a model that was trained further has others."""
    tensor = header.tensors.get("output_norm.weight")
    if tensor is None or tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        return ""
    with open(header.path, "rb") as f:
        f.seek(tensor.offset)
        return hashlib.sha256(f.read(4 * tensor.shape[0])).hexdigest()[:8]


def _other_parts(header: Header) -> tuple[str, ...]:
    """The further files of a model in several files. Raises ModelFileError unless the first one is given."""
    count, number = header.values.get("split.count", 0), header.values.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return ()
    match = _SPLIT_NAME.match(header.path)
    if number != 0:
        first = f"{match[1]}-00001-of-{count:05d}.gguf" if match else "the first file"
        raise ModelFileError(f"{header.path} is file {number + 1} of {count} of a model; give {first}.")
    if not match or int(match[3]) != count:
        raise ModelFileError(f"{header.path} is the first of {count} files of a model but its name does not end in -00001-of-{count:05d}.gguf.")
    return tuple(f"{match[1]}-{i:05d}-of-{count:05d}.gguf" for i in range(2, count + 1))


def check_geometry(model: ModelFile) -> None:
    """Raises GeometryError if no layer of the model could be packed."""
    if model.served_layers():
        return
    if model.mla:
        why = "its attention layers keep one latent vector for keys and values"
    elif not any(model.n_head_kv):
        why = "it has no attention layers"
    else:
        sizes = sorted({f"{k}/{v}" for k, v in zip(model.head_size_k, model.head_size_v) if k})
        why = f"its key/value head sizes are {', '.join(sizes)}, and multiples of {HEAD_SIZE_STEP} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE} are served"
    raise GeometryError(f"MixKVQ cannot pack the cache of {model.name} ({model.architecture}): {why}; stock='f16' runs it on llama.cpp's own cache.")


def built_in_model() -> Path:
    """The path of the model that comes with the repository and with wheels.

    Raises ModelFileError if this installation has none.
    """
    name = "cot-tiny-34m-q8_0.gguf"
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parents[1] / "models", package / "models", Path.cwd() / "models"):
        if (folder / name).is_file():
            return folder / name
    raise ModelFileError(f"The built-in model models/{name} is not part of this installation; give the path of a GGUF model.")
