// The one place where threads start. With NABLA_TAU_STD_THREADS they are std::thread: ThreadSanitizer follows these, and
// not libgomp; and on macOS a second OpenMP library beside PyTorch's would end the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef NABLA_TAU_STD_THREADS
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace nabla_tau {

// More threads than processors gain nothing, and OpenMP aborts when it cannot start them.
inline int team_size(int threads) {
#ifdef NABLA_TAU_STD_THREADS
    return threads;
#else
    return std::min(threads, omp_get_num_procs());
#endif
}

// Threads that would be used if nobody told a number.
inline int max_threads() {
#ifdef NABLA_TAU_STD_THREADS
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#else
    return omp_get_max_threads();
#endif
}

// Calls body(begin, end, thread) on pieces that cover [0, count), with thread in [0, threads). Who gets which piece is
// open: a thread that the machine holds up takes fewer.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t piece, int threads, const Body& body) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int thread) {
        for (std::int64_t begin; (begin = next.fetch_add(piece)) < count;) {
            body(begin, std::min(count, begin + piece), thread);
        }
    };
    if (threads == 1) return work(0);
#ifdef NABLA_TAU_STD_THREADS
    std::vector<std::thread> team;
    for (int thread = 1; thread < threads; ++thread) team.emplace_back(work, thread);
    work(0);
    for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
#endif
}

}  // namespace nabla_tau
