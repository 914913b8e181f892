#include <cmath>

#include "mixkvq/profile.h"

namespace mixkvq {

// Fractions are in 32nds: at head size 128 one 32nd is a quad of channels. docs/quality.md has what each preset measures.
const std::vector<Preset> & presets() {
    static const std::vector<Preset> list = {
        {"mix2.4", "tiny", "the smallest: 2-bit values, 1/8 of the key channels above 2 bits", 0, 1 / 32.0, 3 / 32.0, 0, 128, 2, 0},
        {"mix2.5", "small", "2-bit values, half of the key channels at 3 or 4 bits", 0, 0, 4 / 32.0, 12 / 32.0, 128, 2, 0},
        {"mix3.2", "balanced", "the default: 3-bit values, key channels at 4, 3 and 2 bits", 0, 0, 8 / 32.0, 16 / 32.0, 128, 3, 0},
        {"mix3.8", "careful", "3-bit values, key channels at 4 and 8 bits", 0, 2 / 32.0, 30 / 32.0, 0, 128, 3, 0},
        {"mix4.3", "quality", "4-bit values, key channels at 4 and 8 bits", 0, 2 / 32.0, 30 / 32.0, 0, 128, 4, 0},
        {"mix6.2", "high", "4-bit values, all key channels at 8 bits", 0, 1, 0, 0, 128, 4, 0},
        {"mix8.2", "near-lossless", "8-bit values and keys", 0, 1, 0, 0, 128, 8, 0},
        {"paper", "", "the paper's layout: 16/4/2-bit key channels in groups of 32 tokens, 2-bit values in groups of 32", 1 / 32.0, 0, 3 / 32.0, 0,
         32, 2, 32},
    };
    return list;
}

const Preset * find_preset(const std::string & name) {
    for (const Preset & p : presets()) {
        if (name == p.name || (*p.alias && name == p.alias)) return &p;
    }
    return nullptr;
}

const Preset & default_preset() { return *find_preset("balanced"); }

KeyFormat key_format(const Preset & preset, int head_size) {
    const int quads = head_size / 4;
    int left = quads;
    auto take = [&](double fraction) {
        int n = int(std::lround(fraction * quads));
        if (fraction > 0 && n == 0) n = 1;
        if (n > left) n = left;
        left -= n;
        return 4 * n;
    };
    KeyFormat f;
    f.head_size = head_size;
    f.group = preset.key_group;
    f.n16 = take(preset.f16);
    f.n8 = take(preset.f8);
    f.n4 = take(preset.f4);
    f.n3 = take(preset.f3);
    f.n2 = 4 * left;
    return f;
}

ValueFormat value_format(const Preset & preset, int head_size) {
    ValueFormat f;
    f.head_size = head_size;
    f.bits = preset.value_bits;
    f.group = preset.value_group;
    return f;
}

double body_bits(const KeyFormat & k, const ValueFormat & v) {
    const double bytes = double(k.record_bytes()) + double(v.record_bytes());
    return 8.0 * bytes / (double(kPageCells) * (k.head_size + v.head_size));
}

}  // namespace mixkvq
