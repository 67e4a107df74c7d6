// Gaussian noise by number, not by order: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3") on a counter, and Box-Muller. Formula and constants: kernels/update_reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "vector_math.h"

namespace nabla_tau {

struct Noise {
    double std = 0;
    std::uint64_t seed = 0;
    std::uint64_t step = 0;
};

// The 32 random bits x[k][b], k < 4, of the counters (first + b, number, step) for b < kCount.
template <int kCount>
NABLA_TAU_INLINE void philox(std::uint64_t seed, std::uint32_t first, std::uint32_t number, std::uint64_t step,
                             std::uint32_t (&x)[4][kCount]) {
    for (int b = 0; b < kCount; ++b) {
        std::uint32_t c0 = first + static_cast<std::uint32_t>(b), c1 = number;
        auto c2 = static_cast<std::uint32_t>(step), c3 = static_cast<std::uint32_t>(step >> 32);
        auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t a = std::uint64_t(0xD2511F53u) * c0, d = std::uint64_t(0xCD9E8D57u) * c2;
            c0 = static_cast<std::uint32_t>(d >> 32) ^ c1 ^ k0;
            c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
            c1 = static_cast<std::uint32_t>(d);
            c3 = static_cast<std::uint32_t>(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        x[0][b] = c0;
        x[1][b] = c1;
        x[2][b] = c2;
        x[3][b] = c3;
    }
}

// x 2^-32 + 2^-33 in (0, 1]: the conversion rounds once, and what follows is exact but for the sum.
NABLA_TAU_INLINE float open_unit(std::uint32_t x, float) {
    // Two signed halves, since there is no unsigned conversion before AVX-512.
    const float high = static_cast<float>(static_cast<std::int32_t>(x >> 16));
    const float low = static_cast<float>(static_cast<std::int32_t>(x & 0xffffu));
    return (high * 65536.0f + low) * 0x1p-32f + 0x1p-33f;
}
NABLA_TAU_INLINE double open_unit(std::uint32_t x, double) { return x * 0x1p-32 + 0x1p-33; }

// cos and sin of 2 pi x / 2^32, x taken as signed.
NABLA_TAU_INLINE void turn(std::uint32_t x, float& cosine, float& sine) {
    // The nearest half turn goes into the sign; what is left lies within a quarter turn.
    const std::uint32_t half = x + 0x40000000u;
    const auto rest = static_cast<std::int32_t>((half & 0x7fffffffu) - 0x40000000u);
    const std::uint32_t sign = half & 0x80000000u;
    const float a = static_cast<float>(rest) * (6.283185307f * 0x1p-32f), s = a * a;
    // Taylor to a^13 and a^14: what is left out is below 1e-9 at a = pi / 2.
    float c = -1.0f / 87178291200.0f, d = 1.0f / 6227020800.0f;
    c = c * s + 1.0f / 479001600.0f, d = d * s - 1.0f / 39916800.0f;
    c = c * s - 1.0f / 3628800.0f, d = d * s + 1.0f / 362880.0f;
    c = c * s + 1.0f / 40320.0f, d = d * s - 1.0f / 5040.0f;
    c = c * s - 1.0f / 720.0f, d = d * s + 1.0f / 120.0f;
    c = c * s + 1.0f / 24.0f, d = d * s - 1.0f / 6.0f;
    c = c * s - 0.5f, d = d * s;
    cosine = bits_as<float>(bits_as<std::uint32_t>(c * s + 1.0f) ^ sign);
    sine = bits_as<float>(bits_as<std::uint32_t>(d * a + a) ^ sign);
}
NABLA_TAU_INLINE void turn(std::uint32_t x, double& cosine, double& sine) {
    const double angle = static_cast<std::int32_t>(x) * (6.283185307179586477 * 0x1p-32);
    cosine = std::cos(angle);
    sine = std::sin(angle);
}

// Adds std * normal to the numbers [begin, begin + 4 kCount) of parameter `number`; begin is a multiple of 4.
template <class Real, int kCount>
NABLA_TAU_INLINE void add_noise(const Noise& noise, std::int64_t begin, std::int64_t number,
                                Real (&values)[4 * kCount]) {
    alignas(64) std::uint32_t x[4][kCount];
    alignas(64) Real normal[4][kCount];
    philox<kCount>(noise.seed, static_cast<std::uint32_t>(begin / 4), static_cast<std::uint32_t>(number), noise.step,
                   x);
    const Real std = static_cast<Real>(noise.std);
    for (int pair = 0; pair < 4; pair += 2) {
        for (int b = 0; b < kCount; ++b) {
            const Real radius = std * std::sqrt(-2 * log_positive(open_unit(x[pair][b], Real())));
            Real cosine, sine;
            turn(x[pair + 1][b], cosine, sine);
            normal[pair][b] = radius * cosine;
            normal[pair + 1][b] = radius * sine;
        }
    }
    for (int b = 0; b < kCount; ++b) {
        for (int k = 0; k < 4; ++k) values[4 * b + k] += normal[k][b];
    }
}

}  // namespace nabla_tau
