"""Our own pages through the real packer, for a preset or a profile: `packed:of=balanced`, `packed:of=model.mixkvq.gguf`.

The cache itself reads packed pages with integer arithmetic, which adds a little; as a codec the format is compared with other formats on the
same ground.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...core.errors import SettingsError
from ...core.native import native
from ...core.page import Page
from ...core.profile import LayerProfile, read_profile
from ._base import Codec, Maker, Options, Rows


def make(name: str, options: Options) -> Codec:
    """The codec `packed`: of a preset or a profile. Raises SettingsError if it is neither, and the errors of `read_profile`."""
    of = options.text("of", "balanced")
    preset = any(of in (p["name"], p["alias"]) for p in native().presets())
    if not preset and not Path(of).is_file():
        raise options.fail(f"{of!r} is neither a preset nor a file")
    profile = None if preset else read_profile(of)

    def layer_of(page: Page) -> LayerProfile:
        assert profile is not None
        layer = profile.layers[page.layer] if page.layer < len(profile.layers) else None
        n_heads, _, size = page.rows.shape
        if layer is None or len(layer.tiers) != n_heads or (not page.is_value and layer.head_size != size):
            raise SettingsError(f"The profile {of} was made for another model: it does not fit layer {page.layer}.")
        return layer

    def keys(page: Page) -> tuple[Rows, float]:
        if profile is None:
            formats = [native().preset(of, page.rows.shape[2])[0]] * len(page.rows)
        else:
            layer = layer_of(page)
            formats = [native().KeyFormat(layer.head_size, tuple(row[:5]), row[5]) for row in layer.tiers.tolist()]
        assert page.q_abs is not None
        records = [native().pack_keys(f, rows.astype(np.float16), np.ascontiguousarray(q)) for f, rows, q in zip(formats, page.rows, page.q_abs)]
        read = [native().unpack_keys(f, record) for f, record in zip(formats, records)]
        return np.stack(read).astype(np.float32), 8.0 * sum(map(len, records))

    def values(page: Page) -> tuple[Rows, float]:
        size = page.rows.shape[2]
        if profile is None:
            formats = [native().preset(of, size)[1]] * len(page.rows)
        else:
            layer = layer_of(page)
            formats = [native().ValueFormat(size, bits, group) for bits, group in layer.values.tolist()]
        records = [native().pack_values(f, rows.astype(np.float16)) for f, rows in zip(formats, page.rows)]
        read = [native().unpack_values(f, record) for f, record in zip(formats, records)]
        return np.stack(read).astype(np.float32), 8.0 * sum(map(len, records))

    window, sinks = (None, None) if profile is None else (profile.window, profile.sinks)
    return Codec(name, f"our packed pages: {of}", keys, values, window, sinks)


MAKERS: dict[str, Maker] = {"packed": make}
