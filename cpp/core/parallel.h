// Runs f(item, thread) for items 0..n on up to n_threads threads. OpenMP where there is one: ggml uses the same pool.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mixkvq {

template <class F> void parallel_for(int n_threads, int n, F && f) {
#if defined(_OPENMP)
    if (n_threads > 1 && n > 1) {
#pragma omp parallel num_threads(n_threads)
        {
            const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < n; ++i) f(i, thread);
        }
        return;
    }
#else
    (void) n_threads;
#endif
    for (int i = 0; i < n; ++i) f(i, 0);
}

}  // namespace mixkvq
