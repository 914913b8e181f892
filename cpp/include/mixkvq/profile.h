// Presets and profiles: which format each layer and head gets.
#pragma once

#include <string>
#include <vector>

#include "mixkvq/page.h"

namespace mixkvq {

// How a preset splits a head. Fractions of the channels; `formats` turns them into counts that are multiples of four.
struct Preset {
    const char * name;         // by its body bits at head size 128
    const char * alias;        // a word for it, or ""
    const char * description;
    double f16, f8, f4, f3;    // the rest is 2 bits
    int key_group;
    int value_bits;
    int value_group;
};

const std::vector<Preset> & presets();
const Preset * find_preset(const std::string & name);  // by name or alias; nullptr
const Preset & default_preset();

KeyFormat   key_format(const Preset & preset, int head_size);
ValueFormat value_format(const Preset & preset, int head_size);

// Bits per element of one head's records.
double body_bits(const KeyFormat & k, const ValueFormat & v);

// One layer of a profile: a format per head.
struct LayerProfile {
    std::vector<KeyFormat>   keys;
    std::vector<ValueFormat> values;
    std::vector<float>       query_prior;  // [head][channel] mean |q|, or empty
};

struct Profile {
    std::string path;  // for messages
    int window = -1, sinks = -1;  // -1: not said
    std::vector<LayerProfile> layers;  // by layer index; empty entries have no cache
};

}  // namespace mixkvq
