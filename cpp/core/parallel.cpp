// Threads: those that ggml computes with where they can be had, otherwise a pool for each thread that calls.

#include "parallel.h"

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mixkvq {

namespace {

// --- OpenMP of the process --------------------------------------------------------------------------------------

// The interface of GCC's runtime, which Clang's has, too.
struct OpenMp {
    void (*parallel)(void (*work)(void *), void * data, unsigned n_threads, unsigned flags) = nullptr;
    int (*thread_num)() = nullptr;
};

#if defined(__linux__)

// How often anything was loaded into the process.
unsigned long long loads() {
    unsigned long long n = 0;
    dl_iterate_phdr([](dl_phdr_info * info, size_t, void * to) { return *static_cast<unsigned long long *>(to) = info->dlpi_adds, 1; }, &n);
    return n;
}

// The OpenMP that a library uses. A look-up searches what the library depends on.
bool find_openmp(const char * library, OpenMp & found) {
    void * handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return false;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(handle, "omp_get_thread_num"));
    dlclose(handle);
    return found.parallel && found.thread_num;
}

// That of ggml's CPU backend. Names of its variants begin alike: libggml-cpu.so.0, libggml-cpu-haswell.so.
OpenMp find_openmp() {
    OpenMp found;
    std::vector<std::string> libraries;
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void * to) {
            const char * name = std::strrchr(info->dlpi_name, '/');
            if (name && !std::strncmp(name, "/libggml-cpu", 12)) static_cast<std::vector<std::string> *>(to)->push_back(info->dlpi_name);
            return 0;
        },
        &libraries);
    for (const std::string & library : libraries) {
        if (find_openmp(library.c_str(), found)) return found;
    }
    return {};
}

// Looked for until it is found, whenever something new was loaded.
const OpenMp & openmp() {
    static std::mutex mutex;
    static OpenMp found;
    static std::atomic<bool> is_found{false};
    static unsigned long long seen = 0;
    if (is_found.load(std::memory_order_acquire)) return found;
    static const OpenMp none;
    std::lock_guard<std::mutex> lock(mutex);
    if (is_found.load(std::memory_order_relaxed)) return found;
    const unsigned long long now = loads();
    if (now == seen) return none;
    seen = now;
    found = find_openmp();
    is_found.store(found.parallel != nullptr, std::memory_order_release);
    return found.parallel ? found : none;
}

#else

const OpenMp & openmp() {
    static const OpenMp none;
    return none;
}

#endif

// --- a pool -----------------------------------------------------------------------------------------------------

constexpr int kSpins = 1000;  // some ten microseconds, as between the work of two layers

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    __asm__ __volatile__("yield");
#endif
}

// Waits until is_true(), at first without giving the processor away.
template <class F> bool spin(F && is_true) {
    for (int i = 0; i < kSpins; ++i) {
        if (is_true()) return true;
        relax();
    }
    return false;
}

// Threads that wait for work of one caller.
class Pool {
  public:
    Pool() = default;
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
            round_.fetch_add(1, std::memory_order_release);
        }
        begins_.notify_all();
        for (std::thread & thread : threads_) thread.join();
    }

    void run(int n_threads, void (*work)(void *, int), void * data) {
        grow(n_threads - 1);
        const int n = std::min(n_threads - 1, int(threads_.size()));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = work, data_ = data, wanted_ = n;
            left_.store(n, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        begins_.notify_all();
        work(data, 0);
        if (spin([&] { return left_.load(std::memory_order_acquire) == 0; })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return left_.load(std::memory_order_acquire) == 0; });
    }

  private:
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable begins_, done_;
    std::atomic<unsigned> round_{0};
    std::atomic<int> left_{0};
    void (*work_)(void *, int) = nullptr;
    void * data_ = nullptr;
    int wanted_ = 0;  // threads that this round needs
    bool ends_ = false;

    // Where the system gives no more threads, those that there are do the work.
    void grow(int n) {
        try {
            while (int(threads_.size()) < n) threads_.emplace_back(&Pool::serve, this, int(threads_.size()), round_.load(std::memory_order_relaxed));
        } catch (const std::exception &) {
        }
    }

    // wanted_, work_ and data_ are those of the round that has begun: a thread that is wanted keeps it from ending, one that is not does not use them.
    void serve(int index, unsigned seen) {
        for (;;) {
            const auto has_begun = [&] { return round_.load(std::memory_order_acquire) != seen; };
            int wanted;
            {
                const bool now = spin(has_begun);
                std::unique_lock<std::mutex> lock(mutex_);
                if (!now) begins_.wait(lock, has_begun);
                if (ends_) return;
                seen = round_.load(std::memory_order_relaxed);
                wanted = wanted_;
            }
            if (index >= wanted) continue;
            work_(data_, index + 1);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }
};

// The pool of this thread. After a fork the child has none of its parent's threads, and makes its own.
Pool & pool() {
#if defined(_WIN32)
    static thread_local Pool * const mine = new Pool;  // kept: while a thread ends there, it cannot wait for others
    return *mine;
#else
    static thread_local std::unique_ptr<Pool> mine;
    static thread_local pid_t owner = getpid();
    if (owner != getpid()) {
        mine.release();  // its threads cannot be joined
        owner = getpid();
    }
    if (!mine) mine = std::make_unique<Pool>();
    return *mine;
#endif
}

}  // namespace

void run_on_threads(int n_threads, void (*work)(void * data, int thread), void * data) {
    const OpenMp & omp = openmp();
    if (!omp.parallel) return pool().run(n_threads, work, data);
    struct Call {
        void (*work)(void *, int);
        void * data;
        int (*thread_num)();
    } call = {work, data, omp.thread_num};
    omp.parallel(
        [](void * at) {
            const Call & call = *static_cast<Call *>(at);
            call.work(call.data, call.thread_num());
        },
        &call, unsigned(n_threads), 0);
}

const char * thread_pool_name() { return openmp().parallel ? "OpenMP" : "own"; }

}  // namespace mixkvq
