// Branch-free exp, log and log1p that a compiler vectorises without -ffast-math, for the ranges the row ops need.
//
// exp: n = round(x / ln 2), r = x - n ln 2, a polynomial for e^r, and 2^n written straight into the exponent bits. Its
// argument is at most about 0 here, because a maximum has been subtracted, so only the lower end needs care: at kFloor
// the exponent bits become 0 and so does the result, which makes exp(-inf) exactly 0. NaN stays NaN throughout.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define NABLA_TAU_INLINE inline __attribute__((always_inline))
#define NABLA_TAU_INLINE_LAMBDA __attribute__((always_inline))

namespace nabla_tau {

// The bits of a bfloat16: the upper half of a float32.
struct bfloat16 {
    std::uint16_t bits;
};

// The bits of an IEEE binary16.
struct float16 {
    std::uint16_t bits;
};

template <class T>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};
// The type in which rows of T are computed, and in which their per-row results are returned.
template <class T>
using real_of = typename RealOf<T>::type;

template <class To, class From>
NABLA_TAU_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// condition ? yes : no in bit arithmetic: compilers turn some chains of conditionals back into branches, and a loop
// with a branch is not vectorised.
template <class Bits>
NABLA_TAU_INLINE Bits select_bits(bool condition, Bits yes, Bits no) {
    const Bits mask = Bits(0) - static_cast<Bits>(condition);
    return (yes & mask) | (no & ~mask);
}

NABLA_TAU_INLINE float load(float x) { return x; }
NABLA_TAU_INLINE double load(double x) { return x; }
NABLA_TAU_INLINE float load(bfloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
NABLA_TAU_INLINE float load(float16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the exponent to float's bias, for subnormal numbers too.
    const auto finite = bits_as<std::uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
    return bits_as<float>(sign | select_bits(magnitude >= 0x0f800000u, magnitude | 0x7f800000u, finite));
}

NABLA_TAU_INLINE void store(float x, float& to) { to = x; }
NABLA_TAU_INLINE void store(double x, double& to) { to = x; }
NABLA_TAU_INLINE void store(float x, bfloat16& to) {
    const auto u = bits_as<std::uint32_t>(x);
    // Round to nearest even. A NaN is set apart, because the addition could carry it into an infinity.
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    to.bits = static_cast<std::uint16_t>(select_bits((u & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded));
}
NABLA_TAU_INLINE void store(float x, float16& to) {
    const auto u = bits_as<std::uint32_t>(x);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    // The new bias, and round to nearest even; a number that rounds up to 2^16 carries into an infinity by itself.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Beside 1/2 a float's last place is a subnormal's, 2^-24: the addition does the rounding.
    const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - (126u << 23);
    const std::uint32_t finite = select_bits(magnitude < (113u << 23), subnormal, normal);
    const std::uint32_t beyond = select_bits(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
    to.bits = static_cast<std::uint16_t>((u >> 16 & 0x8000u) | select_bits(magnitude >= (143u << 23), beyond, finite));
}

// kFloor is defined in vector_math.cpp, out of the compiler's sight: where it knows the value it also knows e^kFloor,
// and makes a masked computation out of what is one maximum.
template <class Real>
struct Exp;

template <>
struct Exp<float> {
    using Bits = std::uint32_t;
    static const float kFloor;
    // 1.5 * 2^23 rounds the sum to an integer; the exponent's bias rides along in the low bits.
    static constexpr float kRound = 12582912.0f + 127.0f;
    static constexpr int kMantissa = 23;
    static constexpr float kLn2High = 0.693359375f;
    static constexpr float kLn2Low = -2.12194440e-4f;
    // One constant does where n * ln 2 is not rounded on its own (FMA): what it lacks is 2e-9 for each n. Elsewhere the
    // error is |x| half places, that is e^x |x| < 0.4 of half a place of the largest term of a sum.
    static NABLA_TAU_INLINE float reduce(float x, float n) { return x - n * 0x1.62e430p-1f; }
    // Minimax for the relative error of 1 + r + r^2 q(r) on |r| <= ln(2) / 2: 3e-9.
    // Two short chains instead of one long one: the loops are bound by latency.
    static NABLA_TAU_INLINE float polynomial(float r) {
        const float r2 = r * r;
        const float high = (0x1.6a23cep-10f * r + 0x1.123a20p-7f) * r + 0x1.5558f2p-5f;
        const float middle = 0x1.555492p-3f * r + 0x1.fffffcp-2f;
        return (high * r2 + middle) * r2 + (r + 1.0f);
    }
};

template <>
struct Exp<double> {
    using Bits = std::uint64_t;
    static const double kFloor;
    static constexpr double kRound = 6755399441055744.0 + 1023.0;
    static constexpr int kMantissa = 52;
    // The low 21 bits of the high part are zero, so n times it is exact.
    static constexpr double kLn2High = 0x1.62e42fee00000p-1;
    static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
    static NABLA_TAU_INLINE double reduce(double x, double n) { return (x - n * kLn2High) - n * kLn2Low; }
    // Taylor to r^13: the first term left out is 4e-18.
    static NABLA_TAU_INLINE double polynomial(double r) {
        double q = 1.0 / 6227020800.0;
        q = q * r + 1.0 / 479001600.0;
        q = q * r + 1.0 / 39916800.0;
        q = q * r + 1.0 / 3628800.0;
        q = q * r + 1.0 / 362880.0;
        q = q * r + 1.0 / 40320.0;
        q = q * r + 1.0 / 5040.0;
        q = q * r + 1.0 / 720.0;
        q = q * r + 1.0 / 120.0;
        q = q * r + 1.0 / 24.0;
        q = q * r + 1.0 / 6.0;
        q = q * r + 0.5;
        q = q * r + 1.0;
        return q * r + 1.0;
    }
};

template <class Real>
NABLA_TAU_INLINE Real select(bool condition, Real yes, Real no) {
    using Bits = typename Exp<Real>::Bits;
    return bits_as<Real>(select_bits(condition, bits_as<Bits>(yes), bits_as<Bits>(no)));
}

// max(x, kFloor), and NaN for NaN.
template <class Real>
NABLA_TAU_INLINE Real exp_clamp(Real x) {
    return Exp<Real>::kFloor > x ? Exp<Real>::kFloor : x;
}

// e^x for an x in [kFloor, about 1] that exp_clamp has passed.
template <class Real>
NABLA_TAU_INLINE Real exp_clamped(Real x) {
    using E = Exp<Real>;
    constexpr Real kLog2E = static_cast<Real>(1.4426950408889634074);
    const Real shifted = x * kLog2E + E::kRound;
    const Real n = shifted - E::kRound;
    const Real r = E::reduce(x, n);
    const auto scale = bits_as<Real>(bits_as<typename E::Bits>(shifted) << E::kMantissa);
    return E::polynomial(r) * scale;
}

template <class Real>
NABLA_TAU_INLINE Real exp_nonpositive(Real x) {
    return exp_clamped(exp_clamp(x));
}

// log x for x = 0 or a normal number.
NABLA_TAU_INLINE float log_positive(float x) {
    constexpr std::uint32_t kSqrtHalf = 0x3f3504f3u;
    const std::uint32_t offset = bits_as<std::uint32_t>(x) - kSqrtHalf;
    const auto k = static_cast<float>(static_cast<std::int32_t>(offset) >> 23);
    const float f = bits_as<float>((offset & 0x7fffffu) + kSqrtHalf) - 1.0f;
    // log(1 + f) = 2 atanh(s), arranged so that f itself leads and s, which is rounded, only corrects it.
    const float s = f / (2.0f + f);
    const float t = s * s;
    const float tail = t * (2.0f / 3.0f + t * (2.0f / 5.0f + t * (2.0f / 7.0f + t * (2.0f / 9.0f))));
    const float half_square = 0.5f * f * f;
    const float rest = s * (half_square + tail) - half_square + k * Exp<float>::kLn2Low;
    const float result = k * Exp<float>::kLn2High + (f + rest);
    return select(x > 0.0f, result, select(x == 0.0f, -std::numeric_limits<float>::infinity(), x));
}

NABLA_TAU_INLINE double log_positive(double x) { return std::log(x); }

// log(1 + x) for x in [0, 1], to full relative precision: what 1 + x rounds away is put back to first order.
template <class Real>
NABLA_TAU_INLINE Real log1p_unit(Real x) {
    const Real u = 1 + x;
    return log_positive(u) + (x - (u - 1)) / u;
}

}  // namespace nabla_tau
