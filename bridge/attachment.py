"""Programs that build llama_cpp.Llama themselves: their contexts get our cache."""

from __future__ import annotations

import threading
from typing import Any

from mixkvq.core.errors import CacheNotUsedError, SettingsError
from mixkvq.core.model_file import check_geometry, open_model
from mixkvq.core.profile import with_profile
from mixkvq.core.settings import Kv, KvLike, resolve_kv

from . import report, streams
from .arguments import refuse_unknown
from .backend import CPU_DEVICE, backend, our_gpus
from .log import sentence


def not_used() -> str:
    """Why no context of a program has our cache, as far as its devices tell."""
    gpus, _ = our_gpus(backend())
    if gpus:
        return (
            f"No context has a MixKVQ cache: llama.cpp prefers {gpus[0].name} to our devices where a program leaves the choice to it; "
            "use bridge.Llama, or hide the GPU with CUDA_VISIBLE_DEVICES= (set to nothing)."
        )
    return f"No context has put its cache on {CPU_DEVICE}; pass n_gpu_layers=-1 and flash_attn=True."


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
            raise CacheNotUsedError(sentence(self._session.error()) or not_used()) from e
        return report.mixkvq_stats(self.kv, stats, self._session.layers())

    def kv_report(self) -> str:
        """The figures of `kv_stats` as a few lines of text."""
        return report.format_report(self.kv_stats())

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
    refuse_unknown("attach", unknown, {"model"})
    streams.fill_missing()
    settings = resolve_kv(kv)
    file = open_model(model) if model is not None else None
    if file is not None:
        check_geometry(file)
        settings = with_profile(settings, file)
    current = getattr(_attached, "current", None)
    if current is not None and current._attached:
        raise SettingsError("This thread is attached already; call detach() first.")
    attachment = Attachment(backend().begin(settings, file, all_threads=True), settings)
    _attached.current = attachment
    return attachment
