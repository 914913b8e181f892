// The threads of cuda_runtime.h.
#include "cuda_runtime.h"

#include <atomic>
#include <csetjmp>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

Place here;
dim3 grid_size, block_size;

namespace {

constexpr size_t kStack = 128 * 1024;

struct Started {
    std::vector<std::pair<int, Work>> list;  // by group
    int group = 0;
};

// A coroutine that lives on from block to block.
struct Thread {
    ucontext_t start;
    jmp_buf at;  // where it goes on
    bool started = false;
    Place place;
    Started started_work[2];  // by unit
    Count count;  // what its last barrier found
};

struct Warp {
    uint32_t there, ready, arrived;  // lanes
    int turn;                        // which of the two is filled next
    Met met[2];
};

struct Barrier {
    std::vector<int> waiting;
    int passed = 0, yes = 0, wanted = 0;  // passed: those that do not wait
};

constexpr int kBarriers = 16, kMostThreads = 1024, kMostPauses = 10'000'000;  // of a block

std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
std::vector<int> order;  // in which warps are asked whether they can go on
Barrier barriers[kBarriers];
jmp_buf scheduler;
int current, n_living, n_pauses;
bool any_warp;  // goes on next, though one of this warp could
const std::function<void()> * body;
unsigned seed() {
    const char * seed = std::getenv("MIXKVQ_EMULATOR_SEED");
    return seed ? unsigned(std::atoi(seed)) : 1u;
}
std::mt19937 random_order(seed());

uint8_t * map(size_t bytes, int flags) {
    void * p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (p == MAP_FAILED) std::perror("emulator: mmap"), std::abort();
    return static_cast<uint8_t *>(p);
}

Warp & warp_of(int thread) { return warps[thread / kWarpLanes]; }

void wake(int thread) { warp_of(thread).ready |= 1u << thread % kWarpLanes; }

void release(Barrier & b) {
    for (int thread : b.waiting) {
        threads[thread]->count = {int(b.waiting.size()), b.yes};
        wake(thread);
    }
    b.waiting.clear();
    b.passed = b.yes = 0;
}

void end_meeting(Warp & warp) {
    warp.ready |= warp.arrived;
    warp.met[warp.turn].lanes = warp.arrived;
    warp.arrived = 0;
    warp.turn ^= 1;
}

// A warp or a block may have waited for a thread that has ended.
void end_thread() {
    Warp & warp = warp_of(current);
    warp.there &= ~(1u << current % kWarpLanes);
    if (warp.arrived && warp.arrived == warp.there) end_meeting(warp);
    --n_living;
    for (Barrier & b : barriers) {
        if (!b.waiting.empty() && b.wanted == 0 && int(b.waiting.size()) == n_living) release(b);
    }
}

[[noreturn]] void stuck() {
    std::fprintf(stderr, "emulator: block %u,%u,%u waits for ever:", here.block.x, here.block.y, here.block.z);
    for (int i = 0; i < kBarriers; ++i) {
        if (!barriers[i].waiting.empty()) std::fprintf(stderr, " %zu threads at barrier %d", barriers[i].waiting.size(), i);
    }
    for (size_t w = 0; w < warps.size(); ++w) {
        if (warps[w].arrived) std::fprintf(stderr, " lanes %08x of warp %zu at an instruction of the warp (living: %08x)", warps[w].arrived, w, warps[w].there);
    }
    std::fputc('\n', stderr);
    std::abort();
}

// The lanes of a warp go on as long as one is ready, then any warp; back to run_block when all have ended.
[[noreturn]] void switch_thread() {
    if (n_living == 0) _longjmp(scheduler, 1);
    Warp * warp = current >= 0 ? &warp_of(current) : nullptr;
    if (!warp || !warp->ready || any_warp) {
        any_warp = false;
        std::shuffle(order.begin(), order.end(), random_order);
        warp = nullptr;
        for (int w : order) {
            if (warps[w].ready) {
                warp = &warps[w];
                break;
            }
        }
        if (!warp) stuck();
    }
    const int lane = __builtin_ctz(warp->ready);
    warp->ready &= ~(1u << lane);
    current = int(warp - warps.data()) * kWarpLanes + lane;
    Thread & t = *threads[current];
    here = t.place;
    if (t.started) _longjmp(t.at, 1);
    t.started = true;
    setcontext(&t.start);
    std::abort();
}

// Others go on; comes back when this one is ready again.
void wait() {
    if (_setjmp(threads[current]->at) == 0) switch_thread();
}

void enter() {
    while (true) {
        (*body)();
        end_thread();
        wait();  // for the next block
    }
}

void run_block() {
    order.resize(warps.size());
    for (size_t w = 0; w < order.size(); ++w) order[w] = int(w);
    if (_setjmp(scheduler) == 0) switch_thread();
}

}  // namespace

uint8_t * dynamic_shared() {
#ifdef MAP_32BIT
    constexpr int kLow = MAP_32BIT;
#else
    constexpr int kLow = 0;
#endif
    static uint8_t * const memory = static_cast<uint8_t *>(std::memset(map(kShared, kLow), 0xff, kShared));
    return memory;
}

void run(dim3 grid, int n, size_t shared_bytes, const std::function<void()> & kernel) {
    if (n < 1 || n > kMostThreads || shared_bytes > size_t(kShared)) std::fprintf(stderr, "emulator: a block of %d threads, %zu bytes\n", n, shared_bytes), std::abort();
    while (int(threads.size()) < n) {
        threads.push_back(std::make_unique<Thread>());
        Thread & t = *threads.back();
        getcontext(&t.start);
        t.start.uc_stack.ss_sp = map(kStack, MAP_NORESERVE);
        t.start.uc_stack.ss_size = kStack;
        t.start.uc_link = nullptr;
        makecontext(&t.start, enter, 0);
    }
    warps.resize((n + kWarpLanes - 1) / kWarpLanes);
    grid_size = grid;
    block_size = dim3(unsigned(n));
    body = &kernel;
    std::vector<dim3> blocks;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
        }
    }
    std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (const dim3 & block : blocks) {
        for (int i = 0; i < n; ++i) {
            Thread & t = *threads[i];
            t.place = {block, dim3(unsigned(i), 0, 0)};
            for (Started & s : t.started_work) s.list.clear(), s.group = 0;
        }
        for (size_t w = 0; w < warps.size(); ++w) {
            const int lanes = std::min(kWarpLanes, n - int(w) * kWarpLanes);
            warps[w].there = warps[w].ready = lanes == kWarpLanes ? ~0u : (1u << lanes) - 1;
            warps[w].arrived = 0;
            warps[w].turn = 0;
        }
        n_living = n;
        n_pauses = 0;
        current = -1;
        run_block();
        for (int i = 0; i < n; ++i) {  // copies that nobody waited for
            for (auto & [group, work] : threads[i]->started_work[0].list) work();
        }
        const uint8_t * beyond = dynamic_shared() + shared_bytes;
        if (shared_bytes < kShared && (*beyond != 0xff || std::memcmp(beyond, beyond + 1, kShared - shared_bytes - 1) != 0)) {
            std::fprintf(stderr, "emulator: block %u,%u,%u wrote past its %zu bytes of shared memory\n", block.x, block.y, block.z, shared_bytes);
            std::abort();
        }
        std::memset(dynamic_shared(), 0xff, shared_bytes);  // NaN: nobody may read what nobody has written
    }
}

namespace {
std::recursive_mutex mutex;  // one thread of the program at a time
std::vector<Work> queue, * recording = nullptr;
bool busy = false;
std::atomic<bool> records{false};
std::map<std::string, std::pair<int, int>> failures;  // by call: how many do not fail, and then how many do
}  // namespace

const std::vector<Gpu> & gpus() {
    static const std::vector<Gpu> list = [] {
        std::vector<Gpu> found;
        const char * text = std::getenv("MIXKVQ_EMULATED_GPUS");
        for (std::istringstream in(text ? text : "8.0"); in.good(); in.get()) {
            Gpu gpu;
            in >> gpu.major;
            in.get();
            in >> gpu.minor;
            found.push_back(gpu);
        }
        return found;
    }();
    return list;
}
std::string bus_of(int gpu) { return "emulated:" + std::to_string(gpu); }
void begin_order(unsigned number) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    finish();
    random_order.seed(seed() + 1000003u * number);
}
int & current_gpu() {
    static thread_local int gpu = 0;
    return gpu;
}

void fail(const char * call, int skip, int times) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    failures[call] = {skip, times};
}
bool fails(const char * call) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    const auto found = failures.find(call);
    if (found == failures.end()) return false;
    auto & [skip, times] = found->second;
    if (skip > 0) return --skip, false;
    return times > 0 && times-- > 0;
}

bool is_recording() { return records; }

void later(Work work) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    (recording ? *recording : queue).push_back(std::move(work));
    if (random_order() % 4 == 0) finish();
}

void finish() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (busy || recording) return;
    busy = true;
    for (size_t i = 0; i < queue.size(); ++i) queue[i]();
    queue.clear();
    busy = false;
}

void record(std::vector<Work> * to) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    finish();
    recording = to;
    records = to != nullptr;
}

const Met & meet(const void * brought, size_t bytes) {
    Warp & warp = warp_of(current);
    const Met & met = warp.met[warp.turn];
    if (bytes) std::memcpy(warp.met[warp.turn].words[lane()], brought, bytes);
    warp.arrived |= 1u << lane();
    if (warp.arrived == warp.there) end_meeting(warp);
    wait();
    return met;
}

Count barrier(int id, int n, bool brought) {
    Barrier & b = barriers[id];
    b.waiting.push_back(current);
    b.yes += brought;
    b.wanted = n;
    if (int(b.waiting.size()) + b.passed == (n ? n : n_living)) release(b);
    wait();
    return threads[current]->count;
}

void barrier_arrive(int id, int n) {
    Barrier & b = barriers[id];
    ++b.passed;
    if (int(b.waiting.size()) + b.passed == n) release(b);
}

void pause() {
    if (++n_pauses > kMostPauses) stuck();
    wake(current);
    any_warp = true;
    wait();
}

void start(Unit unit, Work work) {
    Started & s = threads[current]->started_work[int(unit)];
    if (s.list.empty() && random_order() % 2) {
        work();
    } else {
        s.list.emplace_back(s.group, std::move(work));
    }
}

void end_group(Unit unit) { ++threads[current]->started_work[int(unit)].group; }

void finish(Unit unit, int but_groups) {
    Started & s = threads[current]->started_work[int(unit)];
    size_t n = 0;
    while (n < s.list.size() && s.list[n].first < s.group - but_groups) s.list[n++].second();
    s.list.erase(s.list.begin(), s.list.begin() + n);
}

}  // namespace emulator
