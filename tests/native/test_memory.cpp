// The limit of control groups, read from trees of files as the kernel shows them; and what a store takes when it is full.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

using namespace mixkvq;
namespace fs = std::filesystem;

namespace {

struct Tree {
    fs::path root = fs::temp_directory_path() / ("mixkvq-groups-" + std::to_string(std::rand()));
    Tree(const std::string & membership, const std::string & mounts) {
        file("proc/self/cgroup", membership);
        file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\nnot a line\n" + mounts);
    }
    ~Tree() { fs::remove_all(root); }
    void file(const std::string & name, const std::string & text) {
        fs::create_directories((root / name).parent_path());
        std::ofstream(root / name) << text << "\n";
    }
    uint64_t limit() const { return group_memory(root.string()); }
};

const std::string kVersion2 = "30 20 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", kVersion1 = "31 20 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";

void limits() {
    Tree none("0::/a/b", kVersion2);
    CHECK(none.limit() == 0, "a limit of %llu where there is none", (unsigned long long)none.limit());
    none.file("sys/fs/cgroup/a/b/memory.max", "max");
    CHECK(none.limit() == 0, "\"max\" is no limit");
    none.file("sys/fs/cgroup/a/memory.max", "5000000");
    CHECK(none.limit() == 5000000, "of the group around it: %llu", (unsigned long long)none.limit());
    none.file("sys/fs/cgroup/a/b/memory.high", "4000000");
    CHECK(none.limit() == 4000000, "the smallest: %llu", (unsigned long long)none.limit());
    none.file("sys/fs/cgroup/memory.max", "3000000");
    CHECK(none.limit() == 3000000, "of the outermost group: %llu", (unsigned long long)none.limit());

    Tree one("5:cpu:/x\n4:memory:/docker/x\n0::/", kVersion1);
    one.file("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
    CHECK(one.limit() == 0, "version 1 writes 2^63: %llu", (unsigned long long)one.limit());
    one.file("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", "7000000");
    CHECK(one.limit() == 7000000, "version 1: %llu", (unsigned long long)one.limit());

    Tree container("0::/docker/x", "30 20 0:27 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
    container.file("sys/fs/cgroup/memory.max", "6000000");
    CHECK(container.limit() == 6000000, "mounted at the container's group: %llu", (unsigned long long)container.limit());

    const uint64_t machine = physical_memory();
    CHECK(machine > 0, "a machine without memory");
}

// Rows one after the other into a store, and the most pages of both kinds that there ever were: no byte more is touched.
void filled() {
    const Kernels & k = *kernels_for(Isa::scalar);
    const Preset & preset = *find_preset("balanced");
    const KeyFormat format = key_format(preset, 64);
    for (int window : {0, 1, 128, 300, 1024}) {
        for (int sinks : {0, 128, 200}) {
            for (int n_cells : {256, 384, 1024, 2048}) {
                StoreShape shape;
                shape.row = 64, shape.n_cells = n_cells, shape.window = window, shape.sinks = sinks;
                ScratchPool pool;
                const size_t reserved = reserve_bytes(shape, format.record_bytes());
                std::vector<uint8_t> memory(reserved + 64);
                uint8_t * region = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
                PageStore store(shape, k, region, reserved, pool);
                store.set_formats({format}, {});
                int most_packed = 0, most_half = 0;
                std::vector<float> row(64, 0.5f);
                for (int i = 0; i < n_cells; ++i) {
                    store.write(0, i, 1, row.data(), 64);
                    most_half = std::max(most_half, std::min(store.pages_half(), shape.home_pages()));  // more of them are scratch, until settle
                    store.settle(1);
                    most_packed = std::max(most_packed, store.pages_packed());
                }
                const size_t touched = most_half * shape.page_bytes() + most_packed * format.record_bytes();
                CHECK(filled_bytes(shape, format.record_bytes()) == touched && touched <= reserved,
                      "window %d, sinks %d, %d cells: %zu bytes, touched %zu of %zu", window, sinks, n_cells,
                      filled_bytes(shape, format.record_bytes()), touched, reserved);
            }
        }
    }
}

}  // namespace

int main() {
    limits();
    filled();
    return check_result();
}
