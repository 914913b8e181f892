// What a session is made with: preset or profile, window, sinks, codec; and the formats of a layer that follow from it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "mixkvq/backend_api.h"
#include "mixkvq/page.h"
#include "mixkvq/profile.h"

namespace mixkvq::MIXKVQ_GLUE {

struct Settings {
    const Preset * preset = nullptr;
    std::shared_ptr<const Profile> profile;
    int window = 128, sinks = 128;
    std::vector<std::pair<int, int>> head_sizes;  // by layer: keys, values; empty if not known
    bool any_model = false;                       // the profile is for some of the models that are loaded: others get the preset
    mixkvq_codec codec = nullptr;                 // in place of the formats of preset and profile
    void * codec_user = nullptr;
};

// From MIXKVQ_PRESET, MIXKVQ_PROFILE, MIXKVQ_WINDOW and MIXKVQ_SINKS. False: `error` says what is wrong with them.
bool settings_from_environment(Settings & settings, std::string & error);
bool keeps_statistics();  // MIXKVQ_KEEP_STATISTICS, for all sessions
bool settings_from_api(const mixkvq_settings & from, Settings & settings, std::string & error);
bool load_profile(const std::string & path, Profile & profile, std::string & error);

// What the profile says about a tensor of a layer whose cells have `row` elements; `n_heads` and `head_size` are 0 as long as they are not known.
struct ProfileFit {
    enum Kind {
        none,     // nothing: the preset's formats
        fits,     // `layer`
        left_out, // that the layer has no cache: it stays F16. `why` says so.
        wrong,    // it is for another model. `why` says so.
    } kind = none;
    const LayerProfile * layer = nullptr;
    std::string why;
};
ProfileFit profile_fit(const Settings & s, int layer, bool is_value, int row, int n_heads, int head_size);

// Formats of a layer, of a profile's if there is one; false: `error` says why there are none.
bool key_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<KeyFormat> & formats, std::string & error);
bool value_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<ValueFormat> & formats, std::string & error);

}  // namespace mixkvq::MIXKVQ_GLUE
