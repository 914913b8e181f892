// Runs f(item, thread) for items 0..n on up to n_threads threads.
#pragma once

#include <algorithm>
#include <atomic>

namespace mixkvq {

// Calls work(data, thread) on up to n_threads threads, thread 0 to n_threads - 1, and waits for all. They are OpenMP's where ggml's CPU backend in this
// process has OpenMP: two pools would stand in each other's way, as threads that wait for work keep their processor. Otherwise a pool of the caller's own.
void run_on_threads(int n_threads, void (*work)(void * data, int thread), void * data);

// Whose threads they are: "OpenMP" or "own".
const char * thread_pool_name();

template <class F> void parallel_for(int n_threads, int n, F && f) {
    if (n_threads <= 1 || n <= 1) {
        for (int i = 0; i < n; ++i) f(i, 0);
        return;
    }
    struct Items {
        F & f;
        int n;
        std::atomic<int> next;
    } items = {f, n, {0}};
    const auto work = [](void * data, int thread) {
        Items & items = *static_cast<Items *>(data);
        for (int i; (i = items.next.fetch_add(1, std::memory_order_relaxed)) < items.n;) items.f(i, thread);
    };
    run_on_threads(std::min(n_threads, n), work, &items);
}

}  // namespace mixkvq
