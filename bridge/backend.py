"""The ggml backend of MixKVQ: loaded once into the ggml that libllama uses, with its devices and the handle that starts sessions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

from mixkvq.core.errors import SettingsError, VersionError
from mixkvq.core.model_file import ModelFile
from mixkvq.core.native import native
from mixkvq.core.page import Codec, Page
from mixkvq.core.settings import Kv

from ._compat import C, folder, libraries, version
from .devices import Gpu
from .library import library_path
from .log import log, sentence
from .versions import LLAMA_CPP, LLAMA_CPP_OLDEST

CPU_DEVICE, OURS = "MIXKVQ-CPU", "MIXKVQ-"  # our devices: the CPU's, and one for each of llama.cpp's own, MIXKVQ-CUDA0
_SETTINGS = ("MIXKVQ_PRESET", "MIXKVQ_PROFILE", "MIXKVQ_WINDOW", "MIXKVQ_SINKS")

_GPU = 1  # enum ggml_backend_dev_type

load_lock = threading.RLock()


def function(name: str, result: Any, *arguments: Any) -> Any:
    """A ggml function of the registry that libllama uses.

    The wheel ships copies of its libraries, and a process that opens libggml.so by name gets a second registry where libllama never
    looks. A look-up through libllama's own handle also searches the libraries it depends on, so it finds the right one.
    """
    for library in libraries():
        try:
            f = getattr(library, name)
        except AttributeError:
            continue
        f.restype, f.argtypes = result, list(arguments)
        return f
    raise VersionError(f"The installed llama-cpp-python has no function {name}; {_install_hint()}.")


def _install_hint() -> str:
    return f"install a supported version with: pip install '{LLAMA_CPP}'"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def ggml_version() -> str:
    """Of the ggml that libllama uses."""
    return str(function("ggml_version", ctypes.c_char_p)().decode())


def llama_cpp_python() -> dict[str, str]:
    """Its version, and the folder in which it is installed."""
    return {"version": version(), "folder": str(folder())}


def check_versions() -> None:
    """Raises VersionError, saying what to install, if llama-cpp-python is too old. Its ggml is examined by the backend, when that is loaded."""
    found = version()
    if _version(found) < LLAMA_CPP_OLDEST:
        raise VersionError(f"llama-cpp-python {found} is not supported; {_install_hint()}.")


@contextlib.contextmanager
def _without_settings() -> Iterator[None]:
    """The backend's environment variables are for programs that cannot say otherwise what they want; here `kv` says it."""
    hidden = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Backend:
    """The loaded ggml backend: its device, and the native handle that starts sessions."""

    def __init__(self) -> None:
        check_versions()
        module = native()
        try:
            module.isa()
        except RuntimeError as e:
            raise SettingsError(sentence(str(e))) from None
        # A llama.cpp that loads its backends from files has read GGML_BACKEND_PATH; a second registration would list the device twice.
        by_name = function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
        C.llama_backend_init()
        cpu = by_name(CPU_DEVICE.encode())
        self.loaded_before = bool(cpu)
        if cpu:
            registry = function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(cpu)
        else:
            path = library_path()
            with _without_settings():
                registry = function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)(os.fsencode(path))
            if not registry:
                raise VersionError(log.reason(f"llama.cpp did not accept the backend {path}") + f"; {_install_hint()}.")
            if not by_name(CPU_DEVICE.encode()):
                raise VersionError(f"The backend {path} was loaded but offers no device {CPU_DEVICE}.")
        get = function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        found = [get(registry, i) for i in range(function("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p)(registry))]
        self.devices = {_device_name(device): device for device in found}
        self.cpu = self.devices[CPU_DEVICE]
        address = function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(registry, b"mixkvq_backend_api")
        if not address:
            raise VersionError(f"The loaded device {CPU_DEVICE} is not the MixKVQ backend of this package; unset GGML_BACKEND_PATH.")
        try:
            self.native = module.Backend(address)
        except (RuntimeError, ValueError) as e:
            raise VersionError(f"{sentence(str(e))}") from None
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
            raise SettingsError(sentence(str(e))) from None


_instance: Backend | None = None


def backend() -> Backend:
    """The loaded backend. Raises VersionError, SettingsError for a MIXKVQ_ISA that cannot be had."""
    global _instance
    with load_lock:
        if _instance is None:
            log.install()
            log.begin()
            try:
                _instance = Backend()
            finally:
                log.end()
        return _instance


def _device_name(device: int) -> str:
    return str(function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)(device).decode())


def _gpu(device: int, name: str) -> Gpu:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    function("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(device, ctypes.byref(free), ctypes.byref(total))
    return Gpu(name, device, free.value)


def stock_gpus() -> list[Gpu]:
    """The discrete GPUs of this process: what llama.cpp would use by default if our devices were not registered."""
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    devices = [get(i) for i in range(function("ggml_backend_dev_count", ctypes.c_size_t)())]
    return [_gpu(d, _device_name(d)) for d in devices if kind(d) == _GPU and not _device_name(d).startswith(OURS)]


def our_gpus(backend: Backend) -> tuple[list[Gpu], str]:
    """The GPUs that can hold our cache, under llama.cpp's names for them, and why the others cannot, or ""."""
    ours = [_gpu(device, name.removeprefix(OURS)) for name, device in backend.devices.items() if name != CPU_DEVICE]
    others = [gpu.name for gpu in stock_gpus() if gpu.name not in {gpu.name for gpu in ours}]
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
    """What a report of a bug says of the loaded backend.

    api_version: of MixKVQ. ggml_api_version. loaded_before: by GGML_BACKEND_PATH. gpus: those that can hold a cache, name and free bytes. missing:
    why other GPUs cannot, or "".
    Raises VersionError, SettingsError for a MIXKVQ_ISA that cannot be had.
    """
    loaded = backend()
    with log.kept():
        gpus, missing = our_gpus(loaded)
    return {
        "api_version": loaded.api_version,
        "ggml_api_version": loaded.ggml_api_version,
        "loaded_before": loaded.loaded_before,
        "gpus": [{"name": gpu.name, "free": gpu.free} for gpu in gpus],
        "missing": missing,
    }
