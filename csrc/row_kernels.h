// The two row kernels, over a range of rows each. Every function here is inlined into the instruction-set variants
// of rows.cpp, so the loops are written plainly and vectorised once per variant.
//
// The target never enters the sums. With m the largest of the other logits of a row,
//
//     S = sum_{j != y} e^(z_j - m),   T = sum_{j != y} (m - z_j) e^(z_j - m)
//     margin  = (z_y - m) - log S,    loss = log(1 + e^-margin),   q = 1 - p_y = sigmoid(-margin)
//     entropy = p_y loss + q (T / S + lse - m)
//
// all terms of every sum are non-negative and differences of logits are taken first, so neither a memorised row nor
// a large common offset costs precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "rows.h"

namespace nabla_tau {

// Rows whose per-row formulas are evaluated together, one per SIMD lane.
constexpr std::int64_t kLanes = 16;
// Up to this many classes, rows themselves are laid across the lanes.
constexpr std::int64_t kNarrow = 64;
// Logits staged at a time: 2 to 4 KB, which stays in the first-level cache between the two passes over it.
constexpr std::int64_t kBlock = 512;

template <class Real>
struct alignas(64) Sums {
    Real target_logit[kLanes];
    Real peak[kLanes];
    Real sum[kLanes];
    Real slope[kLanes];
};

// With decay = e^-|x|, sigmoid and softplus of x and of -x all follow without cancellation.
template <class Real>
NABLA_TAU_INLINE Real decay_of(Real x) {
    return exp_nonpositive(select(x > 0, -x, x));
}

template <class Real>
NABLA_TAU_INLINE Real sigmoid(Real x, Real decay) {
    return select(x > 0, Real(1), decay) / (1 + decay);
}

template <class Real>
NABLA_TAU_INLINE Real softplus(Real x, Real decay) {
    return select(x > 0, x, Real(0)) + log1p_unit(decay);
}

template <class T>
struct Forward {
    using Real = real_of<T>;
    static constexpr Real kLowest = std::numeric_limits<Real>::lowest();
    static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

    const Rows<T>& rows;
    const RowSignals<Real>& signals;

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end) const {
        for (std::int64_t first = begin; first < end; first += kLanes) {
            const std::int64_t count = std::min(kLanes, end - first);
            Sums<Real> sums{};
            if (rows.classes <= kNarrow) {
                sum_narrow(first, count, sums);
            } else {
                for (std::int64_t r = 0; r < count; ++r) sum_wide(first + r, r, sums);
            }
            finish(first, count, sums);
        }
    }

    NABLA_TAU_INLINE void sum_narrow(std::int64_t first, std::int64_t count, Sums<Real>& sums) const {
        alignas(64) Real z[kNarrow * kLanes];
        const std::int64_t classes = rows.classes;
        for (std::int64_t r = 0; r < kLanes; ++r) {
            // Lanes past the last row repeat it, to keep them finite.
            const std::int64_t i = first + std::min(r, count - 1);
            const T* row = rows.row(i);
            for (std::int64_t j = 0; j < classes; ++j) z[j * kLanes + r] = load(row[j]);
            Real& target = z[rows.target(i) * kLanes + r];
            sums.target_logit[r] = target;
            sums.peak[r] = kLowest;
            target = -kInfinity;
        }
        for (std::int64_t j = 0; j < classes; ++j) {
#pragma omp simd
            for (std::int64_t r = 0; r < kLanes; ++r) {
                const Real x = z[j * kLanes + r];
                sums.peak[r] = x > sums.peak[r] ? x : sums.peak[r];
            }
        }
        for (std::int64_t j = 0; j < classes; ++j) {
#pragma omp simd
            for (std::int64_t r = 0; r < kLanes; ++r) {
                const Real x = exp_clamp(z[j * kLanes + r] - sums.peak[r]);
                const Real e = exp_clamped(x);
                sums.sum[r] += e;
                sums.slope[r] -= e * x;
            }
        }
    }

    NABLA_TAU_INLINE void sum_wide(std::int64_t i, std::int64_t lane, Sums<Real>& sums) const {
        const T* row = rows.row(i);
        const std::int64_t y = rows.target(i);
        Real peak = kLowest, total = 0, total_slope = 0;
        for (std::int64_t start = 0; start < rows.classes; start += kBlock) {
            const std::int64_t size = std::min(kBlock, rows.classes - start);
            alignas(64) Real staged[kBlock];
            const Real* z = stage(row + start, size, y - start, staged);
            const std::int64_t half = padded(size) / 2;
            // Two chains: one alone would wait for the latency of each maximum.
            Real low = peak, high = peak;
#pragma omp simd reduction(max : low, high)
            for (std::int64_t j = 0; j < half; ++j) {
                low = z[j] > low ? z[j] : low;
                high = z[j + half] > high ? z[j + half] : high;
            }
            const Real block_peak = std::max(low, high);
            if (block_peak > peak) {
                // Clamped, so that a first finite peak scales zeros by zero and not by NaN.
                const Real drop = exp_clamp(peak - block_peak);
                const Real scale = exp_clamped(drop);
                total_slope = scale * (total_slope - drop * total);
                total *= scale;
                peak = block_peak;
            }
            Real sum = 0, slope = 0;
#pragma omp simd reduction(+ : sum, slope)
            for (std::int64_t j = 0; j < 2 * half; ++j) {
                const Real x = exp_clamp(z[j] - peak);
                const Real e = exp_clamped(x);
                sum += e;
                slope -= e * x;
            }
            total += sum;
            total_slope += slope;
        }
        sums.target_logit[lane] = load(row[y]);
        sums.peak[lane] = peak;
        sums.sum[lane] = total;
        sums.slope[lane] = total_slope;
    }

    // Whole vectors for both halves of a block.
    static NABLA_TAU_INLINE std::int64_t padded(std::int64_t size) {
        constexpr std::int64_t pair = 2 * kLanes;
        return (size + pair - 1) / pair * pair;
    }

    // A block of logits in Real, with -inf in place of the target and up to padded(size); a full block
    // that has no target and needs no conversion is used where it lies.
    NABLA_TAU_INLINE const Real* stage(const T* z, std::int64_t size, std::int64_t y, Real* staged) const {
        const bool has_target = y >= 0 && y < size;
        if constexpr (std::is_same_v<T, Real>) {
            if (size == kBlock && !has_target) return z;
        }
#pragma omp simd
        for (std::int64_t j = 0; j < size; ++j) staged[j] = load(z[j]);
        std::fill(staged + size, staged + padded(size), -kInfinity);
        if (has_target) staged[y] = -kInfinity;
        return staged;
    }

    NABLA_TAU_INLINE void finish(std::int64_t first, std::int64_t count, const Sums<Real>& sums) const {
        alignas(64) Real loss[kLanes], lse[kLanes], entropy[kLanes], margin[kLanes];
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) {
            const Real z_y = sums.target_logit[r], m = sums.peak[r], sum = sums.sum[r], slope = sums.slope[r];
            const Real log_sum = log_positive(sum);
            const Real phi = (z_y - m) - log_sum;
            const Real decay = decay_of(phi);
            const Real l = softplus(-phi, decay);
            const Real p = sigmoid(phi, decay), q = sigmoid(-phi, decay);
            // The larger of the two sides carries lse; starting from the smaller one would cancel.
            const Real base = select(phi > 0, z_y, m);
            const Real above = select(phi > 0, Real(0), log_sum) + log1p_unit(decay);
            // q = 0 leaves one possible class (S may be 0), p = 0 an infinite loss: both have entropy terms of 0.
            const Real others = select(q == 0, Real(0), q * (slope / sum + ((base - m) + above)));
            margin[r] = phi;
            loss[r] = l;
            lse[r] = base + above;
            entropy[r] = select(p == 0, Real(0), p * l) + others;
        }
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t i = first + r;
            const bool kept = rows.kept(i);
            signals.loss[i] = kept ? loss[r] : 0;
            signals.lse[i] = lse[r];
            signals.entropy[i] = entropy[r];
            signals.margin[i] = kept ? margin[r] : 0;
            signals.correct[i] = kept && wins(i, sums.target_logit[r], sums.peak[r], sums.sum[r]);
        }
    }

    // Whether argmax finds the target; of equal logits it finds the first. The comparison of the sum with itself
    // turns down rows with a NaN, which the maximum passes over.
    NABLA_TAU_INLINE bool wins(std::int64_t i, Real z_y, Real peak, Real sum) const {
        if (!(z_y >= peak) || sum != sum) return false;
        if (z_y > peak) return true;
        const T* row = rows.row(i);
        return std::none_of(row, row + rows.target(i), [&](T z) { return load(z) == z_y; });
    }
};

template <class T>
struct Backward {
    using Real = real_of<T>;

    const Rows<T>& rows;
    const Real* lse;
    const Real* margin;
    const Real* weights;
    T* gradient;

    // softmax(z)_j = e^((z_j - reference) - excess).
    struct alignas(64) Scales {
        Real reference[kLanes];
        Real excess[kLanes];
        Real weight[kLanes];
        Real target[kLanes];
    };

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end) const {
        for (std::int64_t first = begin; first < end; first += kLanes) {
            const std::int64_t count = std::min(kLanes, end - first);
            const Scales scales = scale(first, count);
            if (rows.classes <= kNarrow) {
                write_narrow(first, count, scales);
            } else {
                for (std::int64_t r = 0; r < count; ++r) write_wide(first + r, r, scales);
            }
        }
    }

    NABLA_TAU_INLINE Scales scale(std::int64_t first, std::int64_t count) const {
        Scales scales{};
        alignas(64) Real phi[kLanes]{}, log_sum[kLanes]{};
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t i = first + r;
            scales.weight[r] = rows.kept(i) ? weights[i] : 0;
            scales.reference[r] = load(rows.row(i)[rows.target(i)]);
            phi[r] = margin[i];
            log_sum[r] = lse[i];
        }
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) {
            const Real decay = decay_of(phi[r]);
            const Real loss = softplus(-phi[r], decay);
            scales.target[r] = -scales.weight[r] * sigmoid(-phi[r], decay);
            // lse = z_y + loss, rounded: under a large common offset the two parts keep the digits that lse has
            // lost. For a target far below the rest it is the loss that is large, and lse serves.
            const bool parts = loss <= select(log_sum[r] < 0, -log_sum[r], log_sum[r]);
            scales.reference[r] = select(parts, scales.reference[r], log_sum[r]);
            scales.excess[r] = select(parts, loss, Real(0));
        }
        return scales;
    }

    NABLA_TAU_INLINE void write_narrow(std::int64_t first, std::int64_t count, const Scales& scales) const {
        // Each row is computed in whole vectors; what it writes past its end is overwritten by the next row.
        alignas(64) Real z[(kNarrow + 1) * kLanes];
        alignas(64) Real g[(kNarrow + 1) * kLanes];
        const std::int64_t classes = rows.classes;
        const std::int64_t size = count * classes;
        std::fill_n(z + size, kLanes, Real(0));
        const T* in = rows.row(first);
        T* out = gradient + first * rows.classes;
#pragma omp simd
        for (std::int64_t k = 0; k < size; ++k) z[k] = load(in[k]);
        for (std::int64_t r = 0; r < count; ++r) {
            const Real weight = scales.weight[r], reference = scales.reference[r], excess = scales.excess[r];
            Real* row = g + r * classes;
            for (std::int64_t j = 0; j < classes; j += kLanes) {
#pragma omp simd
                for (std::int64_t l = 0; l < kLanes; ++l) {
                    const Real x = (z[r * classes + j + l] - reference) - excess;
                    row[j + l] = weight * exp_nonpositive(x);
                }
            }
            row[rows.target(first + r)] = scales.target[r];
            if (weight == 0) std::fill_n(row, classes, Real(0));
        }
#pragma omp simd
        for (std::int64_t k = 0; k < size; ++k) store(g[k], out[k]);
    }

    NABLA_TAU_INLINE void write_wide(std::int64_t i, std::int64_t lane, const Scales& scales) const {
        T* out = gradient + i * rows.classes;
        const Real weight = scales.weight[lane];
        if (weight == 0) {
            std::fill_n(out, rows.classes, T{});
            return;
        }
        const T* row = rows.row(i);
        const Real reference = scales.reference[lane], excess = scales.excess[lane];
#pragma omp simd
        for (std::int64_t j = 0; j < rows.classes; ++j) {
            store(weight * exp_nonpositive((load(row[j]) - reference) - excess), out[j]);
        }
        store(scales.target[lane], out[rows.target(i)]);
    }
};

}  // namespace nabla_tau
