// parallel_for: every item once, on as many threads as may be, whoever calls. No OpenMP is in this process, so the threads are our own.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "../../cpp/core/parallel.h"
#include "check.h"

using namespace mixkvq;

namespace {

void run(int n_threads, int n) {
    std::vector<std::atomic<int>> count(n), on(n_threads);
    for (auto & x : count) x = 0;
    for (auto & x : on) x = 0;
    parallel_for(n_threads, n, [&](int item, int thread) {
        CHECK(thread >= 0 && thread < n_threads, "thread %d of %d", thread, n_threads);
        CHECK(on[thread]++ == 0, "two items at once on thread %d", thread);
        count[item]++;
        on[thread]--;
    });
    for (int i = 0; i < n; ++i) CHECK(count[i] == 1, "item %d of %d: %d times, %d threads", i, n, int(count[i]), n_threads);
}

// Two items that wait for each other need two threads.
void test_that_threads_are_several() {
    std::atomic<int> here{0};
    parallel_for(2, 2, [&](int, int) {
        here++;
        while (here < 2) std::this_thread::yield();
    });
    CHECK(here == 2, "%d", int(here));
}

void test_all_sizes() {
    for (int round = 0; round < 20; ++round) {
        for (int n_threads : {1, 4, 2, 9, 3}) {
            for (int n : {0, 1, 2, 3, 17, 200}) run(n_threads, n);
        }
    }
}

void test_many_callers() {
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([i] {
            for (int round = 0; round < 300; ++round) run(2 + (i + round) % 3, 1 + round % 7);
        });
    }
    for (std::thread & caller : callers) caller.join();
}

#if !defined(_WIN32)
void test_after_a_fork() {
    run(3, 10);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        run(3, 10);
        _exit(check::failures != 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %d", status);
    run(3, 10);
}
#endif

}  // namespace

int main() {
    CHECK(!std::strcmp(thread_pool_name(), "own"), "%s", thread_pool_name());
    test_that_threads_are_several();
    test_all_sizes();
    test_many_callers();
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
    test_after_a_fork();
#endif
    return check_result();
}
