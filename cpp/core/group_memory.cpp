// The memory limit of this process's control groups. mixkvq.core.machine reads them the same way.

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include "mixkvq/memory.h"

namespace mixkvq {

namespace {

constexpr uint64_t kNoLimit = uint64_t(1) << 60;  // version 1 writes a number near 2^63

// A number that a file of a control group holds, or "no limit".
uint64_t limit_in(const std::string & path) {
    std::ifstream file(path);
    uint64_t n = 0;
    return file >> n && n < kNoLimit ? n : std::numeric_limits<uint64_t>::max();  // "max" is no number
}

bool has(const std::string & list, const std::string & word) {
    std::istringstream words(list);
    for (std::string w; std::getline(words, w, ',');) {
        if (w == word) return true;
    }
    return false;
}

// The path of this process's group: in the hierarchy of the memory controller, or in the unified one.
std::string group_path(const std::string & root, bool unified) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        const size_t a = line.find(':'), b = a == std::string::npos ? a : line.find(':', a + 1);
        if (b == std::string::npos) continue;
        const std::string controllers = line.substr(a + 1, b - a - 1);
        if (unified ? controllers.empty() : has(controllers, "memory")) return line.substr(b + 1);
    }
    return "";
}

// The smallest limit of a group and those around it, up to where the hierarchy is mounted.
uint64_t smallest_limit(const std::string & top, std::string inner) {
    uint64_t least = std::numeric_limits<uint64_t>::max();
    for (;;) {
        for (const char * name : {"/memory.max", "/memory.high", "/memory.limit_in_bytes"}) least = std::min(least, limit_in(top + inner + name));
        if (inner.empty()) return least;
        inner.resize(inner.rfind('/') == std::string::npos ? 0 : inner.rfind('/'));
    }
}

}  // namespace

uint64_t group_memory(const std::string & root) {
    uint64_t least = std::numeric_limits<uint64_t>::max();
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(mounts, line);) {
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream mount(line.substr(0, dash)), kind(line.substr(dash + 3));
        std::string skip, from, at, type, source, options;
        mount >> skip >> skip >> skip >> from >> at;
        kind >> type >> source >> options;
        const bool unified = type == "cgroup2";
        if (!unified && !(type == "cgroup" && has(options, "memory"))) continue;
        std::string path = group_path(root, unified);
        if (path.empty()) continue;
        if (path == "/") path.clear();
        // In a container the mount may begin at the container's group, or the path may be one that is not to be seen from here.
        if (from != "/") path = path.compare(0, from.size(), from) == 0 ? path.substr(from.size()) : "";
        if (path.find("/..") != std::string::npos) path.clear();
        least = std::min(least, smallest_limit(root + at, path));
    }
    return least == std::numeric_limits<uint64_t>::max() ? 0 : least;
}

}  // namespace mixkvq
