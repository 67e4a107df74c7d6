// Runs a kernel over rows: on the widest instruction set the machine has, on several threads where that pays.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "row_sums.h"

#if defined(__x86_64__) && !defined(NABLA_TAU_BASELINE)
#define NABLA_TAU_WIDE_SIMD 1
#else
#define NABLA_TAU_WIDE_SIMD 0
#endif

namespace nabla_tau {

enum class Simd { baseline, v3, v4 };

// The instruction set in use. The environment variable NABLA_TAU_SIMD names a lower one than the machine has; it is
// read once. Throws std::invalid_argument for a name that is none.
Simd simd();

// "x86-64-v4", "x86-64-v3" or "baseline".
const char* simd_level();

// Below this many logits a parallel region costs more than it saves.
constexpr std::int64_t kParallelLogits = 1 << 15;

// Explicit variants rather than target_clones: those need ifunc, which sanitizers and some C libraries lack. With
// NABLA_TAU_BASELINE there is one: they are one source, and sanitizers make each slow to compile.
template <class Kernel, class Real>
void run_baseline(const Kernel& kernel, std::int64_t begin, std::int64_t end, Real* scratch) {
    kernel(begin, end, scratch);
}

#if NABLA_TAU_WIDE_SIMD
template <class Kernel, class Real>
__attribute__((target("avx2,fma"))) void run_v3(const Kernel& kernel, std::int64_t begin, std::int64_t end,
                                                Real* scratch) {
    kernel(begin, end, scratch);
}

template <class Kernel, class Real>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void run_v4(const Kernel& kernel,
                                                                                   std::int64_t begin,
                                                                                   std::int64_t end, Real* scratch) {
    kernel(begin, end, scratch);
}
#endif

template <class Kernel, class Real>
auto variant() -> void (*)(const Kernel&, std::int64_t, std::int64_t, Real*) {
#if NABLA_TAU_WIDE_SIMD
    if (simd() == Simd::v4) return run_v4<Kernel, Real>;
    if (simd() == Simd::v3) return run_v3<Kernel, Real>;
#endif
    return run_baseline<Kernel, Real>;
}

// A kernel computes rows [begin, end), with room for scratch() numbers of its own.
template <class Kernel>
void run(const Kernel& kernel, std::int64_t count, std::int64_t classes, int threads) {
    using Real = typename Kernel::Real;
    struct alignas(64) Line {
        Real values[kLanes];
    };
    const auto run_range = variant<Kernel, Real>();
    const int team = count * classes >= kParallelLogits ? team_size(threads) : 1;
    const std::int64_t lines = rounded_up(kernel.scratch(), kLanes) / kLanes;
    std::vector<Line> scratch(lines * team);
    // A few pieces a thread; whole sets of lanes while rows are short.
    const std::int64_t unit = classes <= 1024 ? kLanes : 1;
    const std::int64_t piece = team == 1 ? count : rounded_up(std::max<std::int64_t>(count / (8 * team), 1), unit);
    parallel_for(count, std::max<std::int64_t>(piece, 1), team, [&](std::int64_t begin, std::int64_t end, int thread) {
        run_range(kernel, begin, end, lines ? scratch[lines * thread].values : nullptr);
    });
}

}  // namespace nabla_tau
