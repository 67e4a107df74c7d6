#include "rows.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace nabla_tau {
namespace {

// Below this many logits a parallel region costs more than it saves.
constexpr std::int64_t kParallelLogits = 1 << 15;

enum class Simd { baseline, v3, v4 };
constexpr const char* kSimdNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

Simd supported_simd() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return v4 ? Simd::v4 : Simd::v3;
    }
#endif
    return Simd::baseline;
}

Simd choose_simd() {
    const Simd best = supported_simd();
    const char* wanted = std::getenv("NABLA_TAU_SIMD");
    if (wanted == nullptr) return best;
    for (const Simd level : {Simd::baseline, Simd::v3, Simd::v4}) {
        if (kSimdNames[static_cast<int>(level)] == std::string(wanted)) return std::min(level, best);
    }
    throw std::invalid_argument("NABLA_TAU_SIMD is \"" + std::string(wanted) +
                                "\"; it must be baseline, x86-64-v3 or x86-64-v4");
}

Simd simd() {
    static const Simd level = choose_simd();
    return level;
}

// Explicit variants rather than target_clones: those need ifunc, which sanitizers and some C libraries lack.
template <class Kernel>
void run_baseline(const Kernel& kernel, std::int64_t begin, std::int64_t end) {
    kernel(begin, end);
}

#if defined(__x86_64__)
template <class Kernel>
__attribute__((target("avx2,fma"))) void run_v3(const Kernel& kernel, std::int64_t begin, std::int64_t end) {
    kernel(begin, end);
}

template <class Kernel>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void run_v4(
    const Kernel& kernel, std::int64_t begin, std::int64_t end) {
    kernel(begin, end);
}
#endif

template <class Kernel>
auto variant() -> void (*)(const Kernel&, std::int64_t, std::int64_t) {
#if defined(__x86_64__)
    if (simd() == Simd::v4) return run_v4<Kernel>;
    if (simd() == Simd::v3) return run_v3<Kernel>;
#endif
    return run_baseline<Kernel>;
}

template <class Kernel>
void run(const Kernel& kernel, std::int64_t count, std::int64_t classes, int threads) {
    const auto run_range = variant<Kernel>();
    // A chunk is a full set of lanes while rows are short, and a single row once that alone is work enough.
    const std::int64_t chunk = classes <= 1024 ? kLanes : 1;
    const std::int64_t chunks = (count + chunk - 1) / chunk;
    const bool parallel = threads > 1 && chunks > 1 && count * classes >= kParallelLogits;
    // More threads than processors gain nothing, and OpenMP aborts when it cannot start them.
    const int team = std::min(threads, omp_get_num_procs());
#pragma omp parallel for schedule(static) num_threads(team) if (parallel)
    for (std::int64_t c = 0; c < chunks; ++c) {
        run_range(kernel, c * chunk, std::min(count, (c + 1) * chunk));
    }
}

}  // namespace

const char* simd_level() { return kSimdNames[static_cast<int>(simd())]; }

void check_targets(const std::int64_t* targets, std::int64_t count, std::int64_t classes, std::int64_t ignore_index) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t y = targets[i];
        if ((y < 0 || y >= classes) && y != ignore_index) {
            throw std::invalid_argument("targets[" + std::to_string(i) + "] is " + std::to_string(y) +
                                        "; it must be in [0, " + std::to_string(classes) + ") or ignore_index " +
                                        std::to_string(ignore_index));
        }
    }
}

template <class T>
void rows_forward(const Rows<T>& rows, const RowSignals<real_of<T>>& signals, int threads) {
    run(Forward<T>{rows, signals}, rows.count, rows.classes, threads);
}

template <class T>
void rows_backward(const Rows<T>& rows, const real_of<T>* lse, const real_of<T>* margin, const real_of<T>* weights,
                   T* gradient, int threads) {
    run(Backward<T>{rows, lse, margin, weights, gradient}, rows.count, rows.classes, threads);
}

template void rows_forward(const Rows<float>&, const RowSignals<float>&, int);
template void rows_forward(const Rows<double>&, const RowSignals<double>&, int);
template void rows_forward(const Rows<bfloat16>&, const RowSignals<float>&, int);
template void rows_backward(const Rows<float>&, const float*, const float*, const float*, float*, int);
template void rows_backward(const Rows<double>&, const double*, const double*, const double*, double*, int);
template void rows_backward(const Rows<bfloat16>&, const float*, const float*, const float*, bfloat16*, int);

}  // namespace nabla_tau
