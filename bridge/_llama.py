"""llama-cpp-python with a MixKVQ cache. The only module that imports llama_cpp, but for `state_caches`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import difflib
import functools
import inspect
import os
import re
import signal
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _logger as llama_logger
from llama_cpp import llama_chat_format, llama_tokenizer
from llama_cpp import llama_cpp as C

from . import session as reports
from . import states, streams
from .devices import Gpu, Placement, check_device, choose, place
from .dry_run import CELL_BYTES, DryRun, Need
from .errors import (
    BridgeError,
    CacheNotUsedError,
    ContextError,
    ContextTooLargeError,
    GeometryError,
    ModelFileError,
    SettingsError,
    StateError,
    VersionError,
    check_text,
)
from .library import library_path, native
from .machine import free_memory
from .memory import CELLS, Free, check_fits
from .model_file import ModelFile, open_model
from .page import Codec, Page
from .settings import Kv, KvLike, check_geometry, least_bits, resolve_kv, stock_type, with_profile
from .state_caches import StateCache

# What the backend was built and tested against. ggml's backend interface is not stable between releases, so a
# version outside these is refused: a mismatch would crash instead of failing.
LLAMA_CPP_VERSIONS = ((0, 3, 36), (0, 3, 37))  # from, below
GGML_VERSIONS = ((0, 25, 0), (0, 26, 0))
CPU_DEVICE, OURS = "MIXKVQ-CPU", "MIXKVQ-"  # our devices: the CPU's, and one for each of llama.cpp's own, MIXKVQ-CUDA0
_SETTINGS = ("MIXKVQ_PRESET", "MIXKVQ_PROFILE", "MIXKVQ_WINDOW", "MIXKVQ_SINKS")

_GPU = 1  # enum ggml_backend_dev_type
_ERROR = 4  # enum ggml_log_level; llama_cpp._logger still has the numbers of an older ggml

_SIZES = re.compile(r"^llama_(kv_cache|memory_recurrent): size =|compute buffer size =")  # of llama.cpp's log, the lines that are kept

_load_lock = threading.RLock()


# --- the ggml inside libllama ---------------------------------------------------------------------------------------------------


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A ggml function of the registry that libllama uses.

    The wheel ships copies of its libraries, and a process that opens libggml.so by name gets a second registry where libllama never
    looks. A look-up through libllama's own handle also searches the libraries it depends on, so it finds the right one.
    """
    for library in _libraries():
        try:
            f = getattr(library, name)
        except AttributeError:
            continue
        f.restype, f.argtypes = result, list(arguments)
        return f
    raise VersionError(f"The installed llama-cpp-python has no function {name}; {_install_hint()}.")


def _libraries() -> Iterator[ctypes.CDLL]:
    yield C._lib
    if sys.platform == "win32":  # a look-up there does not search dependencies, and the loader keeps one copy by name
        for name in ("ggml.dll", "ggml-base.dll"):
            with contextlib.suppress(OSError):
                yield ctypes.CDLL(os.path.join(os.path.dirname(llama_cpp.__file__), "lib", name))


def _install_hint() -> str:
    low, below = (".".join(map(str, v)) for v in LLAMA_CPP_VERSIONS)
    return f"install a supported version with: pip install 'llama-cpp-python>={low},<{below}'"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def ggml_version() -> str:
    return str(_function("ggml_version", ctypes.c_char_p)().decode())


def check_versions() -> None:
    """Raises VersionError, saying what to install, unless llama-cpp-python and its ggml are ones this backend was built for."""
    found = llama_cpp.__version__
    if not LLAMA_CPP_VERSIONS[0] <= _version(found) < LLAMA_CPP_VERSIONS[1]:
        raise VersionError(f"llama-cpp-python {found} is not supported; {_install_hint()}.")
    ggml = ggml_version()
    if not GGML_VERSIONS[0] <= _version(ggml) < GGML_VERSIONS[1]:
        low, below = (".".join(map(str, v)) for v in GGML_VERSIONS)
        raise VersionError(f"ggml {ggml} is not supported (this backend was built for {low} up to {below}); {_install_hint()}.")


@contextlib.contextmanager
def _without_settings() -> Iterator[None]:
    """The backend's environment variables are for programs that cannot say otherwise what they want; here `kv` says it."""
    hidden = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class _Backend:
    """The loaded ggml backend: its device, and the native handle that starts sessions."""

    def __init__(self) -> None:
        check_versions()
        module = native()
        try:
            module.isa()
        except RuntimeError as e:
            raise SettingsError(_sentence(str(e))) from None
        # A llama.cpp that loads its backends from files has read GGML_BACKEND_PATH; a second registration would list the device twice.
        by_name = _function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
        C.llama_backend_init()
        cpu = by_name(CPU_DEVICE.encode())
        self.loaded_before = bool(cpu)
        if cpu:
            registry = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(cpu)
        else:
            path = library_path()
            with _without_settings():
                registry = _function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)(os.fsencode(path))
            if not registry:
                raise VersionError(_log.reason(f"llama.cpp did not accept the backend {path}") + f"; {_install_hint()}.")
            if not by_name(CPU_DEVICE.encode()):
                raise VersionError(f"The backend {path} was loaded but offers no device {CPU_DEVICE}.")
        get = _function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        found = [get(registry, i) for i in range(_function("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p)(registry))]
        self.devices = {_device_name(device): device for device in found}
        self.cpu = self.devices[CPU_DEVICE]
        address = _function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(registry, b"mixkvq_backend_api")
        if not address:
            raise VersionError(f"The loaded device {CPU_DEVICE} is not the MixKVQ backend of this package; unset GGML_BACKEND_PATH.")
        try:
            self.native = module.Backend(address)
        except (RuntimeError, ValueError) as e:
            raise VersionError(f"{_sentence(str(e))}") from None
        # both begin with their version, mixkvq_backend_api and ggml_backend_reg
        self.api_version, self.ggml_api_version = (ctypes.c_int.from_address(at).value for at in (address, registry))

    def begin(self, kv: Kv, model: ModelFile | None, codec: Codec | None = None, *, all_threads: bool = False) -> Any:
        """A native session. With a codec only the window and the sinks of `kv` matter."""
        try:
            return self.native.begin(
                preset=kv.preset,
                profile=kv.profile,
                window=-1 if kv.window is None else kv.window,
                sinks=-1 if kv.sinks is None else kv.sinks,
                head_sizes=model.head_sizes if model is not None else None,
                codec=None if codec is None else lambda *fields: codec(Page(*fields)),
                all_threads=all_threads,
            )
        except (RuntimeError, ValueError) as e:
            raise SettingsError(_sentence(str(e))) from None


_backend_instance: _Backend | None = None


def _backend() -> _Backend:
    global _backend_instance
    with _load_lock:
        if _backend_instance is None:
            _log.install()
            _log.begin()
            try:
                _backend_instance = _Backend()
            finally:
                _log.end()
        return _backend_instance


def _device_name(device: int) -> str:
    return str(_function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)(device).decode())


def _gpu(device: int, name: str) -> Gpu:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _function("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(device, ctypes.byref(free), ctypes.byref(total))
    return Gpu(name, device, free.value)


def _stock_gpus() -> list[Gpu]:
    """The discrete GPUs of this process: what llama.cpp would use by default if our devices were not registered."""
    get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    devices = [get(i) for i in range(_function("ggml_backend_dev_count", ctypes.c_size_t)())]
    return [_gpu(d, _device_name(d)) for d in devices if kind(d) == _GPU and not _device_name(d).startswith(OURS)]


def _our_gpus(backend: _Backend) -> tuple[list[Gpu], str]:
    """The GPUs that can hold our cache, under llama.cpp's names for them, and why the others cannot, or ""."""
    ours = [_gpu(device, name.removeprefix(OURS)) for name, device in backend.devices.items() if name != CPU_DEVICE]
    others = [gpu.name for gpu in _stock_gpus() if gpu.name not in {gpu.name for gpu in ours}]
    if not others:
        return ours, ""
    reasons = {name: backend.native.why_unused(name) for name in others}
    if any(reasons.values()):
        return ours, "; ".join(f"{name} has no MixKVQ cache: {why}" for name, why in reasons.items() if why)
    if ours:
        return ours, ""
    if not any(name.startswith("CUDA") for name in others):
        return ours, f"MixKVQ has kernels for NVIDIA GPUs under CUDA only, and llama.cpp has {', '.join(others)}"
    if native().HAS_CUDA:
        return ours, f"the CUDA driver does not serve MixKVQ on {', '.join(others)}"
    return ours, f"MixKVQ was built without CUDA; for {', '.join(others)} install it with: pip install . -C cmake.define.MIXKVQ_CUDA=ON"


def examine_backend() -> dict[str, Any]:
    """What a report of a bug says of the loaded backend: api_version of MixKVQ and ggml_api_version, loaded_before (by GGML_BACKEND_PATH), gpus that
    can hold a cache (name and free bytes), and missing: why other GPUs cannot, or "".

    Raises VersionError, SettingsError for a MIXKVQ_ISA that cannot be had.
    """
    backend = _backend()
    with _log.kept():
        gpus, missing = _our_gpus(backend)
    return {
        "api_version": backend.api_version,
        "ggml_api_version": backend.ggml_api_version,
        "loaded_before": backend.loaded_before,
        "gpus": [{"name": gpu.name, "free": gpu.free} for gpu in gpus],
        "missing": missing,
    }


def measure_context(file: ModelFile, kv: Kv | None, n_ctx: int) -> Need | None:
    """What a context of the model takes, on GPUs if there are any; kv: checked settings, or None for llama.cpp's own cache in F16.

    None: llama.cpp does not create such a context. Raises the errors of `examine_backend`.
    """
    backend = _backend()
    with _log.kept():
        gpus = _our_gpus(backend)[0] if kv is not None else []
    devices = [gpu.device for gpu in gpus] or ([backend.cpu] if kv is not None else [])
    begin = None if kv is None else functools.partial(backend.begin, kv, file)
    with _load_lock, DryRun(file.path, devices, {}, begin, "f16") as dry:
        return dry.measure(n_ctx)


def _sentence(text: str) -> str:
    """First letter up (unless the first word is a name like llama.cpp), one full stop, one line."""
    text = " ".join(text.split()).rstrip(".")
    if text and text.split()[0].rstrip(",:").isalpha():
        text = text[:1].upper() + text[1:]
    return text + "." if text else text


# --- llama.cpp's log ------------------------------------------------------------------------------------------------------------


class _Log:
    """Stands between llama.cpp's log and llama-cpp-python's printer.

    The printer decides by `verbose` as before. Besides, the last errors of each thread are kept to explain a failure that
    llama-cpp-python reports without a reason.
    """

    def __init__(self) -> None:
        self._callback = C.llama_log_callback(self._on_line)
        # llama.cpp may log while the interpreter shuts down and this module is gone already: never free it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._callback))
        self._installed = False
        self._thread = threading.local()
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self.quiet = False  # True: llama.cpp's own errors go into our exceptions only

    def install(self) -> None:
        if not self._installed:
            C.llama_log_set(self._callback, ctypes.c_void_p(0))
            self._installed = True

    def begin(self) -> None:
        """A load begins in this thread: forget what it logged so far."""
        self._thread.errors, self._thread.caches, self._thread.loading = [], [], True

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], str]]:
        """What this thread logs meanwhile is not printed, whatever `verbose` says; the value returns the first error among it, or ""."""
        self.install()
        before = getattr(self._thread, "errors", [])
        self._thread.errors, self._thread.kept = [], True
        try:
            yield self.first_error
        finally:
            self._thread.errors, self._thread.kept = before, False

    def _on_line(self, level: int, raw: bytes, _: Any) -> None:
        try:
            text = raw.decode("utf-8", errors="replace")
            if level == _ERROR:
                errors = self._thread.__dict__.setdefault("errors", [])
                errors.append(text.strip())
                del errors[:-20]
            elif _SIZES.search(text):
                self._thread.__dict__.setdefault("caches", []).append(text.strip())
            if getattr(self._thread, "kept", False):
                return
            verbose = 0 < llama_logger.logger.level <= 10  # 0: llama-cpp-python has not set it yet
            # What a load says becomes the text of an exception; it need not be said twice. Without a stderr print would take stdout.
            if sys.stderr is not None and (verbose or not (self.quiet or getattr(self._thread, "loading", False))):
                llama_logger.llama_log_callback(level, text.encode(), None)
        except Exception:  # noqa: BLE001 - nothing may escape into C
            pass

    def say(self, text: str) -> None:
        """A warning on stderr, each text once in a process."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        streams.say(text)

    def end(self) -> None:
        """The load has ended: errors are printed again as `verbose` says."""
        self._thread.loading = False

    def first_error(self) -> str:
        """What this thread's log said first about a failure, without a full stop, or ""."""
        for line in getattr(self._thread, "errors", []):
            # "llama_model_load: error loading model: unknown model architecture: 'x'": the last error repeats, the first explains
            text = re.sub(r"^[\w~]+: ", "", line)
            text = re.sub(r"^error loading model: ", "", text)
            if text:
                return " ".join(text.split()).rstrip(".")
        return ""

    def reason(self, what: str) -> str:
        """`what`, with what this thread's log said about it."""
        error = self.first_error()
        return f"{what}: {error}" if error else what

    def caches(self) -> list[str]:
        """llama.cpp's own description of the caches that this thread created last."""
        return list(getattr(self._thread, "caches", []))

    def forget_caches(self) -> None:
        """Those that follow are described from here on."""
        self._thread.caches = []


_log = _Log()


def quiet_log() -> None:
    """From now on llama.cpp's errors are not printed unless `verbose`; what matters is in the exceptions."""
    _log.quiet = True
    _log.install()


# --- Llama ----------------------------------------------------------------------------------------------------------------------


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` with a quantised KV cache. Everything that is not listed here is inherited unchanged.

    Args:
        model_path: path of a GGUF model.
        kv: what the cache should be: a preset's name or alias, the path of a profile, a `bridge.Kv` or a mapping with its fields. Where it names
            neither preset nor profile: a profile that lies with the model (`model.mixkvq.gguf` beside `model.gguf`, or one embedded in it), else
            the preset `balanced`.
        stock: instead of MixKVQ, one of llama.cpp's own cache types ("f16", "q8_0", "q4_0", ...), for comparison.
        codec: takes the place of packing, to try another format: a function that gets a `bridge.Page` and returns (rows, bits): what its format would
            read back, array-like of the shape of page.rows, and the bits that the whole page would take. Every page is handed over once when
            MixKVQ would pack it (and again after it was written to or shifted), in the order of cells, in the thread that evaluates. The cache
            then keeps the result in F16: it saves no memory, and `kv_stats` gives the bits that the codec counts. `kv` gives window and sinks
            only. What the function raises ends the evaluation as a ContextError with that as its __cause__, and so do rows of another shape,
            NaN, and bits that are not positive. The function cannot use the model that calls it.
        device: where the model is computed: "auto" (a GPU if llama.cpp and MixKVQ both have one, else the CPU), "cpu", "gpu" (all
            GPUs, its layers split between them), or GPUs by llama.cpp's names, "CUDA0" or "CUDA0,CUDA1".
        on_load: called with the share of the model that is loaded, 0.0 to 1.0. What it raises stops the load and is raised again; so does Ctrl-C.
        **kwargs: as for `llama_cpp.Llama`; other names are refused with a TypeError. n_gpu_layers is how many layers GPUs get, the last ones,
            with their part of the cache; not given, it is as many as fit their memory, and -1 is all. flash_attn and offload_kqv are set as the
            cache needs them, whatever is given; n_ctx is rounded up to a multiple of 256 cells (as llama.cpp does inside), and 0 means the model's
            training context. logprobs need logits_all=True, with a draft_model as well.

    Attributes:
        on_read: None, or a function called with (tokens read, tokens to read) while a prompt is evaluated: at its start and after every batch.
            What it raises ends the evaluation; the tokens read so far stay in the cache.
        generated: tokens that the last `generate` (hence the last completion) has sampled, the one that ended it included.

    Raises (all are `bridge.BridgeError`):
        ModelFileError, SettingsError, ProfileError, GeometryError, VersionError: before anything is loaded.
        ContextTooLargeError: before weights are read, if the context cannot fit the memory that is free; it says which one would.
        ContextError, CacheNotUsedError, GeometryError: after loading; what was created is freed again.
        ContextError: from every method that needs the model, after close().

    Loading is serialised over threads, because llama-cpp-python turns the process's stderr off while it loads; contexts then run in
    parallel, each used by one thread at a time.
    """

    n_seq = 1  # sequences in the context, see `bridge.sequences`

    def __init__(
        self,
        model_path: str,
        *,
        kv: KvLike = None,
        stock: str | None = None,
        codec: Codec | None = None,
        device: str = "auto",
        on_load: Callable[[float], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._closed = self._coding = False
        self._evaluating = threading.RLock()  # held while llama.cpp computes
        self._stack = contextlib.ExitStack()  # close() must work whatever happens below
        self._session: Any = None
        self._model_params: Any = None
        self._devices: Any = None
        self._stock_cache: list[str] = []
        self.codec = codec
        self._answering = False
        self.on_read: Callable[[int, int], None] | None = None
        self.generated = 0

        _refuse_unknown("Llama", kwargs, {*_LLAMA_ARGUMENTS, "kv", "stock", "codec", "device", "on_load"})
        for name in ("type_k", "type_v"):
            if kwargs.pop(name, None) is not None:
                raise SettingsError(f"{name} does not go together with a MixKVQ cache; use stock='q8_0' or the like for llama.cpp's own cache types.")
        model_path = os.fspath(model_path)
        self._file = open_model(model_path)
        _check_name(model_path)
        if codec is not None and not callable(codec):
            raise SettingsError(f"codec is a {type(codec).__name__}; give a function of a bridge.Page that returns rows and bits.")
        if codec is not None and stock is not None:
            raise SettingsError("stock turns MixKVQ off, so it does not go together with codec.")
        if kwargs.get("vocab_only"):
            stock = stock or "f16"  # no context, hence no cache
        self.stock = stock
        self.kv = Kv() if stock is not None else resolve_kv(kv)
        if stock is not None:
            number = stock_type(stock)
            if _asks_for_something(kv):
                raise SettingsError("stock turns MixKVQ off, so it does not go together with kv.")
            kwargs.update(type_k=number, type_v=number)
            _log.install()
        else:
            check_geometry(self._file)
            self.kv = with_profile(self.kv, self._file) if codec is None else Kv(window=self.kv.window, sinks=self.kv.sinks)
        kwargs["n_ctx"] = self._checked_context(kwargs)
        check_device(device)
        self.device = device

        streams.fill_missing()  # llama-cpp-python needs descriptors 1 and 2
        loading = _Loading(on_load)
        self._on_load = C.llama_progress_callback(loading)

        with loading.ctrl_c_held():
            backend = _backend() if stock is None else None
            self._place(backend, kwargs)
            loading.finish()
            kwargs["flash_attn"] = True
            with _load_lock:
                _log.begin()
                if backend is not None:
                    self._session = backend.begin(self.kv, self._file, _guarded(codec, self) if codec is not None else None)
                try:
                    super().__init__(model_path, **kwargs)
                    loading.finish()
                except BaseException as e:
                    error = loading.raised or self._explain(e)
                    self.close()
                    if error is e:
                        raise
                    raise error from None
                finally:
                    if self._session is not None:
                        self._session.end()
                    _log.end()
        # With a draft model llama_cpp.Llama means to keep the logits of every token, in an array that holds n_batch of them.
        self._logits_all = bool(kwargs.get("logits_all", False))
        try:
            if not kwargs.get("vocab_only"):
                self._check_kind()
            self._verify()
        except BaseException:
            self.close()
            raise
        _open.add(self)

    # llama_cpp.Llama builds its parameters inside __init__; assigning them passes through here.
    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._devices is not None:
            params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.progress_callback = self._on_load
        self._model_params = params

    def _place(self, backend: _Backend | None, kwargs: dict[str, Any]) -> None:
        """Decide which devices compute the model, and check that the context fits them."""
        # The first look at the GPUs of a process makes CUDA list them in the log.
        with contextlib.nullcontext() if kwargs.get("verbose", True) else _log.kept():
            gpus, missing = _our_gpus(backend) if backend is not None else (_stock_gpus(), "")
        n_layers = self._file.n_layers
        n_gpu_layers = kwargs.get("n_gpu_layers")
        if n_gpu_layers is not None and (not isinstance(n_gpu_layers, int) or isinstance(n_gpu_layers, bool)):
            raise SettingsError(f"n_gpu_layers is {n_gpu_layers!r}; it must be a number of layers, or -1 for all.")
        self._placement = Placement()
        if not kwargs.get("vocab_only"):
            chosen = () if n_gpu_layers == 0 else choose(self.device, gpus, missing)
            weights = sum(os.path.getsize(path) for path in (self._file.path, *self._file.parts))

            def decide(need: Need | None) -> Placement:
                return place(
                    self.device, gpus, missing, n_gpu_layers=n_gpu_layers, n_layers=n_layers, weights=weights,
                    cache=need.cache + need.recurrent if need else 0, workspace=need.largest_work() if need else 0,
                )  # fmt: skip

            self._placement = self._measured(backend, chosen, kwargs, decide)
            if self._placement.note:
                _log.say(f"mixkvq: {self._placement.note}")
        on_gpus = [gpu.device for gpu in self._placement.gpus]
        split: list[float] | None = kwargs.get("tensor_split")
        if backend is None:
            devices = on_gpus
            kwargs["n_gpu_layers"] = (-1 if self._placement.n_layers is None else self._placement.n_layers) if on_gpus else 0
        else:
            devices = on_gpus or [backend.cpu]
            kwargs["n_gpu_layers"] = -1
            if self._placement.n_layers is not None:  # llama.cpp's own CPU device would hold the rest of the cache in F16
                devices = [backend.cpu, *on_gpus]
                free = sum(gpu.free for gpu in self._placement.gpus)
                # llama.cpp counts the output as one layer more, the last.
                split = [n_layers - self._placement.n_layers, *((self._placement.n_layers + 1) * gpu.free / free for gpu in self._placement.gpus)]
        kwargs.update(offload_kqv=True, split_mode=C.LLAMA_SPLIT_MODE_LAYER, main_gpu=0, tensor_split=split)
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)

    def _measured(
        self, backend: _Backend | None, chosen: Sequence[Gpu], kwargs: dict[str, Any], decide: Callable[[Need | None], Placement]
    ) -> Placement:
        """The placement of what a dry run finds, once it is sure to fit. Raises ContextTooLargeError."""
        devices = [gpu.device for gpu in chosen] or ([backend.cpu] if backend is not None else [])
        begin = None if backend is None else functools.partial(backend.begin, self.kv, self._file, self.codec)
        n_ctx, free = kwargs["n_ctx"], free_memory()
        least = CELL_BYTES if chosen else CELL_BYTES + self._least_bytes(kwargs) // n_ctx
        with _load_lock, DryRun(self._file.path, devices, {**kwargs, "n_seq": self.n_seq}, begin, self.stock or "f16") as dry:
            placement = decide(dry.measure(n_ctx) if n_ctx * least <= free.bytes else None)
            on_gpus = {prefix + gpu.name for gpu in placement.gpus for prefix in ("", OURS)}
            n_cpu = 0 if placement.gpus and placement.n_layers is None else self._file.n_layers - (placement.n_layers or 0)
            share = n_cpu / max(1, self._file.n_layers)
            check_fits(n_ctx, free, least, dry.bytes_of(lambda need: need.on_cpu(n_cpu, share, on_gpus)))
            if placement.gpus:
                room = Free(sum(gpu.free for gpu in placement.gpus), where=f"on {', '.join(gpu.name for gpu in placement.gpus)}")
                check_fits(n_ctx, room, 0, dry.bytes_of(lambda need: need.all - need.on_cpu(n_cpu, share, on_gpus)))
        return placement

    def _least_bytes(self, kwargs: dict[str, Any]) -> int:
        """What the keys and values take at least, from the file alone: a context too large even for that need not be tried."""
        swa_full = kwargs.get("swa_full")
        elements = self._file.cache_elements(kwargs["n_ctx"], kwargs.get("n_ubatch", 512), swa_full is None or swa_full)
        return int(elements * (16 if self.codec is not None else least_bits(self.kv, self.stock)) / 8)

    def _checked_context(self, kwargs: dict[str, Any]) -> int:
        n_ctx = kwargs.get("n_ctx", 512)
        if not isinstance(n_ctx, int) or isinstance(n_ctx, bool) or not 0 <= n_ctx < 1 << 31:
            raise SettingsError(f"n_ctx is {n_ctx!r}; it must be a number of tokens, or 0 for the model's training context.")
        for name in ("n_batch", "n_ubatch"):
            value = kwargs.get(name, 512)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
                raise SettingsError(f"{name} is {value!r}; it must be a positive number of tokens.")
        if 0 < n_ctx < CELLS:
            _log.say(f"mixkvq: {n_ctx} tokens of context were asked for; llama.cpp makes it {CELLS}, the smallest there is")
        n_ctx = n_ctx or self._file.n_ctx_train
        if not n_ctx:
            raise ModelFileError(f"{self._file.path} does not say its training context; give n_ctx.")
        # llama.cpp rounds up as well, but llama-cpp-python keeps arrays of the length asked for and would overrun them.
        n_ctx = (n_ctx + CELLS - 1) // CELLS * CELLS
        return n_ctx

    def _check_kind(self) -> None:
        """llama-cpp-python asks for the next token of a decoder. Another model would end the process."""
        name, model = f"{self._file.name} ({self._file.architecture})", self._model.model
        encoder, decoder = C.llama_model_has_encoder(model), C.llama_model_has_decoder(model)
        if encoder and decoder:
            raise GeometryError(f"{name} has an encoder beside its decoder, which llama-cpp-python does not run; use a model with a decoder only.")
        if (encoder or not self._ctx.memory) and (self.stock is None or not self.context_params.embeddings):
            why = f"{name} reads a text as a whole and generates none, so it has no key/value cache to keep"
            raise GeometryError(f"{why}; for its embeddings use stock='f16', embedding=True.", command=f"{why}; use another model.")

    def _verify(self) -> None:
        """The cache must be the one that was asked for: a backend in the wrong registry would be ignored without a word."""
        if self.stock is not None:
            self._stock_cache = _log.caches()
            return
        try:
            self._session.stats()
        except RuntimeError:
            why = self._session.error()
            raise CacheNotUsedError(
                _sentence(why) if why else f"llama.cpp did not put the cache of {self._file.path} on a device of MixKVQ, so MixKVQ is not in use."
            ) from None

    def _explain(self, e: BaseException) -> BaseException:
        """llama-cpp-python's error as one of ours."""
        if isinstance(e, BridgeError) or not isinstance(e, (ValueError, RuntimeError, MemoryError)):
            return e
        said = self._session.error() if self._session is not None else ""
        text = str(e)
        if isinstance(e, MemoryError):
            return ContextTooLargeError(f"There is not enough memory for this context: {_sentence(text) or 'allocation failed.'}")
        if text.startswith(("Failed to load model", "Failed to get vocab", "Model path does not exist")):
            return ModelFileError(_sentence(said or _log.reason(f"llama.cpp cannot load {self._file.path}")))
        if text.startswith("Failed to create llama_context"):
            return ContextError(_sentence(said or _log.reason("llama.cpp could not create the context")))
        return e

    # --- what is new ---

    def kv_stats(self) -> dict[str, Any]:
        """Figures of the cache: bytes, body_bits, total_bits, times_smaller (than F16), n_cells, plain_layers, device and so on.

        `bytes` (also `bytes_filled`) is what the cache takes when the context is full, `bytes_reserved` its addresses, `bytes_used` what the cells
        written so far take; `bytes_recurrent`, in none of these, are states of layers without keys and values. Bits are per key or value element.
        Where packing saves nothing, `n_cells_gain` is the length from which on it would.
        Raises ContextError after close().
        """
        self._check_open()
        if self.stock is not None:
            return {**reports.stock_stats(self.stock, self._stock_cache, self.n_tokens), "device": self._placement.describe(self._file.n_layers)}
        stats = reports.mixkvq_stats(self.kv, self._session.stats(), self._session.layers(), self.codec)
        return {**stats, "device": self._placement.describe(self._file.n_layers)}

    def kv_report(self) -> str:
        """The figures of `kv_stats` as a few lines of text."""
        return reports.format_report(self.kv_stats())

    def query_statistics(self) -> dict[int, tuple[Any, Any]]:
        """Mean |q_d| (the I_d of the paper, section 3.2) and mean q_d^2 of the queries so far, by layer.

        Each is float32 [n_heads, D], over all query heads that read a key head; the last few thousand query vectors count, older ones fade.
        Layers that are stored plainly or have not been read yet are left out. Raises ContextError after close() and on one of llama.cpp's own
        caches.
        """
        self._check_open()
        if self._session is None:
            raise ContextError("llama.cpp's own cache counts no queries.")
        found = {}
        for i, layer in enumerate(self._session.layers()):
            statistics = self._session.query_statistics(i)
            if statistics is not None:
                found[layer["layer"]] = statistics
        return found

    def forward(self, tokens: Sequence[int], n_logits: int = 1) -> Any:
        """Evaluate at most n_batch tokens behind those before; logits of the last `n_logits` of them.

        Returns float32 [n_logits, vocabulary]. Llama(logits_all=True) would keep the logits of the whole context.
        Raises SettingsError for numbers that do not fit together, ContextError if the context is full or llama.cpp fails.
        """
        n = len(tokens)
        if n > self.n_batch:
            raise SettingsError(f"{n} tokens are more than a batch holds; n_batch is {self.n_batch}.")
        if isinstance(n_logits, bool) or not isinstance(n_logits, (int, np.integer)) or not 0 <= n_logits <= n:
            raise SettingsError(f"n_logits is {n_logits!r}; of {n} tokens it must be a number from 0 to {n}.")
        self._check_tokens(tokens)
        with self._evaluating:
            if n:
                self._evaluate(tokens, int(n_logits))
            return self._logits(int(n_logits))

    def last_logits(self) -> Any:
        """Logits of the last evaluated token, float32 [vocabulary]. Raises ContextError if there is none."""
        self._check_ready()
        with self._evaluating:
            if self.n_tokens == 0 or self._requires_eval or not self._has_logits(-1):
                raise ContextError("There are no logits yet; evaluate a token first.")
            return np.ctypeslib.as_array(C.llama_get_logits_ith(self._ctx.ctx, -1), shape=(self.n_vocab(),)).copy()

    def _logits(self, n: int) -> Any:
        """Logits of the last batch's n outputs: a copy, since the next evaluation and close() take the context's."""
        if not n:
            return np.empty((0, self.n_vocab()), np.float32)
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n, self.n_vocab())).copy()

    def _has_logits(self, row: int) -> bool:
        with _log.kept():  # llama.cpp says there that a row is missing
            return bool(C.llama_get_logits_ith(self._ctx.ctx, row))

    def clear(self) -> None:
        """Empty the cache and forget the queries of what was in it: what is read next gets what a new context would.

        Unless MIXKVQ_KEEP_STATISTICS=1.
        """
        self.reset()
        if self._session is None:  # else reset() has done it
            self._ctx.kv_cache_clear()

    def reset(self) -> None:
        """Forget all tokens and give their memory back. A prompt that begins like the one before needs none: `create_completion` sees to that."""
        self._check_ready()
        super().reset()
        if self._session is not None:  # clearing would only write to all of llama.cpp's own cache
            self._ctx.kv_cache_clear()

    def ends(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return bool(C.llama_vocab_is_eog(self._model.vocab, token))

    def chat_tokens(self, messages: Sequence[Any], **kwargs: Any) -> list[int]:
        """The prompt that `create_chat_completion` would evaluate for these messages, as tokens.

        Raises SettingsError if a message is not Unicode text, or the chat template refuses the messages.
        """
        self._check_open()
        for i, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str):
                check_text(content, f"The text of message {i + 1}")
        name = str(self.chat_format)
        handler: Any = self.chat_handler or self._chat_handlers.get(name) or llama_chat_format.get_chat_completion_handler(name)
        try:
            handler(llama=_PromptOnly(self), messages=list(messages), **kwargs)
        except _Prompt as p:
            return p.tokens
        except BridgeError:
            raise
        except Exception as e:  # a template is a program of the model's author and may refuse anything
            raise SettingsError(f"The model's chat template does not accept these messages: {_sentence(str(e))}") from e
        raise ContextError(f"The chat format {self.chat_format} does not show its prompt.")

    # --- inherited, with a guard ---

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens in batches of n_batch. Of more than one, progress is reported to `on_read`, unless they continue an answer.

        Raises SettingsError for what is no token, ContextError if they do not fit the context or llama.cpp fails.
        """
        self._check_tokens(tokens)
        n = len(tokens)
        report = self.on_read if n > 1 and not self._answering else None
        with self._evaluating:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        if report is not None:
            report(0, n)
        for i in range(0, n, self.n_batch):
            batch = tokens[i : i + self.n_batch]
            with self._evaluating:
                past, all_logits = self.n_tokens, self._logits_all or self._answering  # a draft is checked by the logits of each of its tokens
                self._evaluate(batch, len(batch) if all_logits else 1)
                if self._logits_all:
                    self.scores[past : past + len(batch)] = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab))
            if report is not None:
                report(i + len(batch), n)

    def _evaluate(self, tokens: Sequence[int], n_logits: int) -> None:
        """One batch behind the tokens before it, with logits of its last tokens."""
        n, past = len(tokens), self.n_tokens
        self._batch.set_batch(batch=tokens, n_past=past, logits_all=False)
        for i in range(n - n_logits, n):
            self._batch.batch.logits[i] = True
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as e:
            failure = self._failure(e, n)
            raise failure from failure.__cause__
        self.input_ids[past : past + n] = tokens
        self.n_tokens = past + n
        self._requires_eval = False

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As in `llama_cpp.Llama`. What is evaluated after the first token is the answer's, drafts included, and not reported to `on_read`."""
        tokens = super().generate(*args, **kwargs)
        self.generated = n = 0
        more: Sequence[int] | None = None
        try:
            while True:
                self._answering = n > 0
                try:
                    token = tokens.send(more)
                except StopIteration:
                    return
                finally:
                    self._answering = False
                n += 1
                self.generated = n
                more = yield token
        finally:
            tokens.close()

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in `llama_cpp.Llama`. Raises ContextError if there are no logits to sample from, where llama.cpp would end the process."""
        self._check_ready()
        idx = kwargs.get("idx")
        with self._evaluating:
            if self.n_tokens == 0 or not self._has_logits(-1 if idx is None else idx - self.n_tokens):
                raise ContextError("There are no logits to sample from; evaluate a token first.")
            return int(super().sample(*args, **kwargs))

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As in `llama_cpp.Llama`. Raises ContextError if llama.cpp fails."""
        self._check_ready()
        with self._evaluating:
            try:
                return super().embed(*args, **kwargs)
            except RuntimeError as e:
                failure = self._failure(e, self._batch.n_tokens())
                raise failure from failure.__cause__

    def save_state(self, packed: bool = True) -> Any:
        """As in `llama_cpp.Llama`, but small: records in place of F16 rows, for contexts of the same model and settings.

        packed: False for llama.cpp's own state, whose rows are F16, which any context of the model takes. llama.cpp's own caches have no other.
        """
        self._check_ready()
        with self._evaluating:
            if self._session is None or not packed:
                return super().save_state()
            state, tokens = states.to_bytes(self, self._read_tokens()), self.input_ids[: self.n_tokens].copy()
            scores = self.scores[: self.n_tokens if self._logits_all else 0].copy()
        return llama_cpp.LlamaState(tokens, scores, len(tokens), state, len(state), self._seed)

    def load_state(self, state: Any) -> None:
        """As in `llama_cpp.Llama`, for states of both kinds. Raises StateError if a packed one does not fit; the context is then as it was."""
        self._check_ready()
        with self._evaluating:
            if not states.is_state(state.llama_state):
                super().load_state(state)
                return
            try:
                self._now_holds(states.from_bytes(state.llama_state, self))
            except StateError as e:
                raise StateError(f"The state cannot be loaded: {e}.") from None
            if len(state.scores) == self.n_tokens == len(self.scores[: self.n_tokens]):
                self.scores[: self.n_tokens] = state.scores
            self._seed = state.seed

    def set_cache(self, cache: Any) -> None:
        """As in `llama_cpp.Llama`. `bridge.RamCache` and `bridge.DiskCache` hold packed states."""
        if isinstance(cache, StateCache):
            self._check_open()
            cache = cache.serving(states.identity(self), self._can_go_back())
        super().set_cache(cache)

    def _can_go_back(self) -> bool:
        """Whether tokens can be taken back one by one: recurrent states have no past."""
        model = self._model.model
        return not (C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model))

    def save_file(self, path: str | os.PathLike[str]) -> int:
        """Write all that the context holds into a file, which appears whole or not at all; how many bytes it has.

        `load_file` puts it into a context of the same model and settings, in this program or another: what is evaluated then gives the same logits,
        bit for bit, as if there had been no file. Raises OSError that names the file, ContextError if llama.cpp does not give its state.
        """
        self._check_ready()
        with self._evaluating:
            return states.to_file(path, self, self._read_tokens())

    def load_file(self, path: str | os.PathLike[str]) -> int:
        """Go on from what `save_file` has written, in place of what the context holds; how many tokens that are.

        There are no logits before the next token is evaluated. Raises StateError with one sentence if the file is damaged or does not fit; the
        context is then as it was.
        """
        self._check_ready()
        with self._evaluating:
            self._now_holds(states.from_file(path, self))
            return self.n_tokens

    def _read_tokens(self) -> list[int]:
        return [int(token) for token in self.input_ids[: self.n_tokens]]

    def _now_holds(self, tokens: Any) -> None:
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = len(tokens)
        if self._logits_all:
            self.scores[:] = 0
        self._requires_eval = True

    def _state_port(self, sequence: int | None = None) -> StatePort:
        return StatePort(self._ctx.ctx, sequence)

    def tokenizer(self) -> Any:
        """The model's tokenizer. It keeps the model, and ends with it."""
        return _Tokenizer(self)

    def _check_open(self) -> None:
        if self._closed:
            raise ContextError(_CLOSED)

    def _check_ready(self) -> None:
        self._check_open()
        if self._coding:
            raise ContextError(_BUSY)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Before anything is evaluated, and with the numbers: llama.cpp says only that it failed."""
        self._check_ready()
        if not self._ctx.memory:
            raise ContextError("This model has no key/value cache to evaluate tokens in: it was loaded for its vocabulary or its embeddings only.")
        for token in tokens:
            if not (isinstance(token, (int, np.integer)) and 0 <= token < self._n_vocab):
                raise SettingsError(f"Token {token!r} is not in the vocabulary; tokens are numbers from 0 to {self._n_vocab - 1}.")
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextError(f"{len(tokens)} tokens do not fit behind the {self.n_tokens} in a context of {self._n_ctx}.")

    def _failure(self, e: RuntimeError, n_tokens: int) -> BaseException:
        """What to raise in place of an evaluation's error."""
        if not str(e).startswith("llama_decode returned"):
            return e
        said = self._session.error() if self._session is not None else ""
        cause = self._session.codec_failure() if self._session is not None else None
        if cause is not None and not isinstance(cause, Exception):
            return cause  # Ctrl-C in the codec
        if cause is not None:
            said = said.replace("it returned 1", type(cause).__name__ + (f": {cause}" if str(cause) else ""))
        failure = ContextError(_sentence(said or f"llama.cpp failed to evaluate {n_tokens} tokens ({e})"))
        failure.__cause__ = cause
        return failure

    def close(self) -> None:
        """Free the context and the model, once an evaluation in another thread has ended; safe to call twice and after a failed construction."""
        if getattr(self, "_coding", False):
            raise ContextError(_BUSY)
        stack = getattr(self, "_stack", None)
        if stack is None:
            return
        with self._evaluating:
            self._closed = True
            stack.close()
            closed: Any = _Closed()
            # Whoever has kept one of these gets an error from it as well, and not what now lies at the freed address.
            for owner, names in (("_ctx", ("ctx", "memory")), ("_model", ("model", "vocab")), ("_batch", ("batch",))):
                for name in names:
                    if isinstance(getattr(self, owner, closed), _Closed):
                        continue
                    setattr(getattr(self, owner), name, closed)
            self._ctx = self._model = self._batch = self.tokenizer_ = closed
        self._session = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("type_k", "type_v", "n_gpu_layers", "flash_attn", "offload_kqv", "tensor_split"):
            state.pop(name, None)
        state["device"] = self.device
        if self.stock is not None:
            state["stock"] = self.stock
        else:
            state["kv"] = self.kv
        if self.codec is not None:
            state["codec"] = self.codec
        return state


_SEQUENCE_MAGIC = 0xAF143CD8  # before a sequence's state, and a number; a context's begins with the length and name of its architecture


class StatePort:
    """llama.cpp's own functions for the state of a context, or of one sequence. Sizes are in bytes, 0 where it fails."""

    def __init__(self, context: Any, sequence: int | None = None) -> None:
        self._context, self._sequence = context, sequence
        self.flags = 0 if sequence is None else native().STATE_SEQUENCE

    def size(self) -> int:
        if self._sequence is None:
            return int(C.llama_state_get_size(self._context))
        return int(C.llama_state_seq_get_size_ext(self._context, self._sequence, 0))

    def get(self, address: int, size: int) -> int:
        data = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if self._sequence is None:
            return int(C.llama_state_get_data(self._context, data, size))
        return int(C.llama_state_seq_get_data_ext(self._context, data, size, self._sequence, 0))

    def set(self, address: int, size: int, *, may_write: bool = False) -> int:
        """may_write: whether the bytes may be changed on the way. Then a context of one sequence goes on in the cell where it would have.

        That matters where tokens leave a sliding window: after the state of a whole context llama.cpp looks for free cells from the first one on,
        after that of a sequence from its last one on, and the two differ in their first bytes.
        """
        skipped = self._before_cells(address, size) if may_write and self._sequence is None else 0
        sequence = self._sequence
        if skipped:
            address, size, sequence = address + skipped, size - skipped, 0
            ctypes.memmove(address, struct.pack("<Ii", _SEQUENCE_MAGIC, 0), 8)
            C.llama_memory_clear(C.llama_get_memory(self._context), True)
        data = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if sequence is None:
            return int(C.llama_state_set_data(self._context, data, size))
        return int(C.llama_state_seq_set_data_ext(self._context, data, size, sequence, 0))

    def cut(self, position: int) -> None:
        """Remove the cells from a position on, which only kept others in their places; -1: none."""
        whole = range(C.llama_n_seq_max(self._context))
        for sequence in (whole if self._sequence is None else [self._sequence]) if position >= 0 else ():
            C.llama_memory_seq_rm(C.llama_get_memory(self._context), sequence, position, -1)

    def _before_cells(self, address: int, size: int) -> int:
        """How many bytes of a context's state come before what that of its only sequence begins with; 0 if it has several, or recurrent states."""
        model = C.llama_get_model(self._context)
        if C.llama_n_seq_max(self._context) != 1 or C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model) or size < 4:
            return 0
        return max(0, 4 + ctypes.c_uint32.from_address(address).value - 8)


_CLOSED = "The model is closed."
_BUSY = "The codec cannot use the model that is evaluating: it only gets the page."


class _Busy:
    """Stands in for the context while a codec runs: llama.cpp is in the middle of an evaluation and must not be called."""

    def __getattr__(self, name: str) -> Any:
        raise ContextError(_BUSY)


class _Closed:
    """Stands in for what close() has freed."""

    def __getattr__(self, name: str) -> Any:
        raise ContextError(_CLOSED)


class _Tokenizer(llama_tokenizer.LlamaTokenizer):
    """llama-cpp-python's tokenizer holds on to a model that may be freed; this one asks for it every time."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            return self._llama._model
        raise AttributeError(name)


_open: weakref.WeakSet[Llama] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)
_LAST_BATCH = 60  # seconds


@atexit.register
def _stop_computing() -> None:
    """At the end of the program: a thread that still computes ends its batch and gets no further, before the libraries are torn down."""
    with contextlib.suppress(KeyboardInterrupt):
        for llama in list(_open):
            llama._evaluating.acquire(timeout=_LAST_BATCH)  # and keep it


def _guarded(codec: Codec, llama: Llama) -> Codec:
    model = weakref.ref(llama)  # the model's session holds the codec: no circle

    def call(page: Page) -> tuple[Any, float]:
        llama = model()
        context = getattr(llama, "_ctx", None)
        if llama is None or context is None:
            return codec(page)
        busy: Any = _Busy()
        llama._ctx, llama._coding = busy, True
        try:
            return codec(page)
        finally:
            llama._ctx, llama._coding = context, False

    return call


def _asks_for_something(kv: KvLike) -> bool:
    """Whether `kv` asks for something other than the default."""
    return kv is not None and kv != "balanced" and kv != Kv()


class _Loading:
    """llama.cpp's progress callback. What `on_load` raises, and Ctrl-C, stop the load; `raised` is then what to raise."""

    def __init__(self, on_load: Callable[[float], None] | None) -> None:
        self.on_load = on_load
        self.raised: BaseException | None = None
        self._held: tuple[Any, ...] | None = None
        self._handler: Any = None

    def __call__(self, share: float, _: Any) -> bool:
        try:  # nothing may escape into C
            self._deliver()
            if self.on_load is not None:
                self.on_load(share)
        except BaseException as e:  # noqa: BLE001 - raised again after llama.cpp has given up
            self.raised = e
        return self.raised is None

    @contextlib.contextmanager
    def ctrl_c_held(self) -> Iterator[None]:
        """Keep a SIGINT for the callback: Python would raise KeyboardInterrupt wherever it stands, and ctypes drops what reaches it.

        That holds for llama.cpp's log as well, which it writes while devices are looked at and memory is measured.
        """
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield
            return

        def hold(*arguments: Any) -> None:
            self._held = arguments

        self._handler = handler
        signal.signal(signal.SIGINT, hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _deliver(self) -> None:
        if self._held is not None:
            arguments, self._held = self._held, None
            self._handler(*arguments)

    def finish(self) -> None:
        """After a step that went through: raise what came in too late to stop it."""
        self._deliver()
        if self.raised is not None:
            raise self.raised


_LLAMA_ARGUMENTS = tuple(inspect.signature(llama_cpp.Llama.__init__).parameters)[2:-1]  # without self, model_path and **kwargs


def _refuse_unknown(function: str, given: Iterable[str], known: set[str]) -> None:
    """llama_cpp.Llama takes any keyword and does nothing with it: a typing error would silently mean the default."""
    fields = {"preset", "profile", "window", "sinks"}
    for name in given:
        if name in known:
            continue
        nearest = difflib.get_close_matches(name, known | fields, n=1)
        hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
        if nearest and nearest[0] in fields:
            hint += f", a field of kv: kv={{{nearest[0]!r}: ...}}"
        raise TypeError(f"{function} has no argument {name!r}{hint}.")


def _check_name(path: str) -> None:
    """llama-cpp-python passes the name of a file on as UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFileError(f"The file name {path!r} is not UTF-8, so llama-cpp-python cannot open it; rename it, or make a link to it.") from None


class _Prompt(Exception):
    def __init__(self, tokens: list[int]):
        self.tokens = tokens


class _PromptOnly:
    """Given to a chat handler in place of a model: everything is the model's, but it stops where the prompt would be evaluated."""

    def __init__(self, llama: Llama):
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def create_completion(self, prompt: Any, **_: Any) -> Any:
        raise _Prompt(list(prompt) if not isinstance(prompt, str) else self._llama.tokenize(prompt.encode(), add_bos=False, special=True))


# --- programs that build llama_cpp.Llama themselves -----------------------------------------------------------------------------


class Attachment:
    """What `attach` returns: the contexts that are created until `detach` get a MixKVQ cache."""

    def __init__(self, session: Any, kv: Kv) -> None:
        self._session = session
        self._attached = True
        self.kv = kv

    def detach(self) -> None:
        """Stop giving new contexts a MixKVQ cache; in any thread, and again. Caches that exist live on, and `kv_stats` keeps working."""
        self._session.end()
        self._attached = False

    def kv_stats(self) -> dict[str, Any]:
        """As `Llama.kv_stats`, over all caches created under this attachment. Raises CacheNotUsedError if there is none."""
        try:
            stats = self._session.stats()
        except RuntimeError as e:
            raise CacheNotUsedError(
                _sentence(self._session.error()) or f"No context has put its cache on {CPU_DEVICE}; pass n_gpu_layers=-1 and flash_attn=True."
            ) from e
        return reports.mixkvq_stats(self.kv, stats, self._session.layers())

    def kv_report(self) -> str:
        """The figures of `kv_stats` as a few lines of text."""
        return reports.format_report(self.kv_stats())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


_attached = threading.local()


def attach(kv: KvLike = None, *, model: str | None = None, **unknown: Any) -> Attachment:
    """Give MixKVQ caches to the contexts that are created from now on, by whatever code, in this thread and in others (a pool's workers).

    A thread that has called `attach` itself, or creates a `bridge.Llama`, keeps to its own settings; of several attachments in other threads the last
    counts.

        with bridge.attach("balanced") as cache:
            llama = llama_cpp.Llama("model.gguf", n_gpu_layers=-1, flash_attn=True)
        print(cache.kv_report())

    n_gpu_layers=-1 puts the cache on our device. flash_attn=True is needed as well: with flash attention off llama.cpp stores values
    transposed, one element at a time; they are then kept plainly in F16, and the report says so. Where the process has a discrete GPU,
    llama.cpp prefers it over our device: use `bridge.Llama` there.

    model: path of the model, if it is known here; then a profile is checked against it, and one that lies with the model is found.

    Raises SettingsError, ProfileError, ModelFileError, VersionError; TypeError for other keywords.
    """
    _refuse_unknown("attach", unknown, {"model"})
    streams.fill_missing()
    settings = resolve_kv(kv)
    file = open_model(model) if model is not None else None
    if file is not None:
        check_geometry(file)
        settings = with_profile(settings, file)
    current = getattr(_attached, "current", None)
    if current is not None and current._attached:
        raise SettingsError("This thread is attached already; call detach() first.")
    attachment = Attachment(_backend().begin(settings, file, all_threads=True), settings)
    _attached.current = attachment
    return attachment
