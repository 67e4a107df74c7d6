#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nabla_tau {
namespace {

constexpr const char* kSimdNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

Simd supported_simd() {
#if NABLA_TAU_WIDE_SIMD
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

}  // namespace

Simd simd() {
    static const Simd level = choose_simd();
    return level;
}

const char* simd_level() { return kSimdNames[static_cast<int>(simd())]; }

}  // namespace nabla_tau
