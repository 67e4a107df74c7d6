// The sums over a row from which all its numbers follow. Every function here is inlined into the instruction-set
// variants of simd.h, so the loops are written plainly and vectorised once per variant.
//
// The target never enters the sums. With m the largest of the other logits of a row,
//
//     S = sum_{j != y} e^(z_j - m),   T = sum_{j != y} (m - z_j) e^(z_j - m),   Q = sum_{j != y} e^(2 (z_j - m))
//
// all terms are non-negative and differences of logits are taken first, so neither a memorised row nor a large common
// offset costs precision.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "rows.h"

namespace nabla_tau {

// Rows whose per-row formulas are evaluated together, one per SIMD lane.
constexpr std::int64_t kLanes = 16;
// Up to this many classes, rows themselves are laid across the lanes.
constexpr std::int64_t kNarrow = 64;
// Logits staged, and lines asked for ahead, at a time.
constexpr std::int64_t kBlock = 512;

constexpr std::int64_t rounded_up(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }

template <class Real>
struct alignas(64) Sums {
    Real target_logit[kLanes];
    Real peak[kLanes];
    Real sum[kLanes];
    Real slope[kLanes];
    Real square[kLanes];
};

// Up to kLanes rows of at most kNarrow classes, transposed: tile[j * kLanes + r] is logit j of the r-th row.
template <class T, class Real = real_of<T>>
NABLA_TAU_INLINE void load_tile(const Rows<T>& rows, std::int64_t first, std::int64_t count, Real* tile) {
    for (std::int64_t r = 0; r < kLanes; ++r) {
        // Lanes past the last row repeat it, to keep them finite.
        const T* row = rows.row(rows.id(first + std::min(r, count - 1)));
        for (std::int64_t j = 0; j < rows.classes; ++j) tile[j * kLanes + r] = load(row[j]);
    }
}

// Turns a tile of logits into e^(z_j - m), and 0 at the targets.
template <class T, class Real = real_of<T>>
NABLA_TAU_INLINE void sum_tile(const Rows<T>& rows, std::int64_t first, std::int64_t count, Real* tile,
                               Sums<Real>& sums) {
    for (std::int64_t r = 0; r < kLanes; ++r) {
        Real& target = tile[rows.target(rows.id(first + std::min(r, count - 1))) * kLanes + r];
        sums.target_logit[r] = target;
        sums.peak[r] = std::numeric_limits<Real>::lowest();
        target = -std::numeric_limits<Real>::infinity();
    }
    for (std::int64_t j = 0; j < rows.classes; ++j) {
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) {
            const Real x = tile[j * kLanes + r];
            sums.peak[r] = x > sums.peak[r] ? x : sums.peak[r];
        }
    }
    for (std::int64_t j = 0; j < rows.classes; ++j) {
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) {
            const Real x = exp_clamp(tile[j * kLanes + r] - sums.peak[r]);
            const Real e = exp_clamped(x);
            sums.sum[r] += e;
            sums.slope[r] -= e * x;
            sums.square[r] += e * e;
            tile[j * kLanes + r] = e;
        }
    }
}

template <class Real>
NABLA_TAU_INLINE Real lane_max(Real* values) {
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
        for (std::int64_t l = 0; l < half; ++l) {
            values[l] = values[l + half] > values[l] ? values[l + half] : values[l];
        }
    }
    return values[0];
}

template <class Real>
NABLA_TAU_INLINE Real lane_sum(Real* values) {
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
        for (std::int64_t l = 0; l < half; ++l) values[l] += values[l + half];
    }
    return values[0];
}

template <bool kWrite, class T>
NABLA_TAU_INLINE void prefetch_block(const T* block) {
    for (std::int64_t j = 0; j < kBlock; j += 64 / std::int64_t(sizeof(T))) __builtin_prefetch(block + j, kWrite, 2);
}

// A block of a row: logits as Real, with -inf in place of the target and up to a whole number of lanes.
template <class T, class Real = real_of<T>>
struct Block {
    const T* logits;
    std::int64_t size;
    std::int64_t target;  // of the row, counted from the start of the block

    Block(const T* row, std::int64_t start, std::int64_t classes, std::int64_t y)
        : logits(row + start), size(std::min(kBlock, classes - start)), target(y - start) {}

    NABLA_TAU_INLINE bool has_target() const { return target >= 0 && target < size; }
    NABLA_TAU_INLINE std::int64_t padded() const { return rounded_up(size, kLanes); }

    // A full block that has no target and needs no conversion is used where it lies.
    NABLA_TAU_INLINE const Real* values(const Real* staged) const {
        if constexpr (std::is_same_v<T, Real>) {
            if (size == kBlock && !has_target()) return logits;
        }
        return staged;
    }

    NABLA_TAU_INLINE const Real* stage(Real* staged) const {
        const Real* z = values(staged);
        if (z == staged) {
#pragma omp simd
            for (std::int64_t j = 0; j < size; ++j) staged[j] = load(logits[j]);
            std::fill(staged + size, staged + padded(), -std::numeric_limits<Real>::infinity());
            if (has_target()) staged[target] = -std::numeric_limits<Real>::infinity();
        }
        return z;
    }
};

// Of one longer row, into lane `lane`: its peak, and then the sums. In between other rows may have their peaks found,
// so that nobody waits for the few steps from sixteen maxima to one. `line` has room for rounded_up(classes, kLanes)
// numbers.
template <class T, class Real = real_of<T>>
NABLA_TAU_INLINE void find_peak(const Rows<T>& rows, std::int64_t i, std::int64_t lane, Real* line,
                                Sums<Real>& sums) {
    const std::int64_t id = rows.id(i), y = rows.target(id);
    const T* row = rows.row(id);
    alignas(64) Real top[kLanes];
    std::fill_n(top, kLanes, std::numeric_limits<Real>::lowest());
    for (std::int64_t start = 0; start < rows.classes; start += kBlock) {
        const Block<T> block(row, start, rows.classes, y);
        const Real* z = block.stage(line + start);
        for (std::int64_t j = 0; j < block.padded(); j += kLanes) {
#pragma omp simd
            for (std::int64_t l = 0; l < kLanes; ++l) top[l] = z[j + l] > top[l] ? z[j + l] : top[l];
        }
    }
    sums.target_logit[lane] = load(row[y]);
    sums.peak[lane] = lane_max(top);
}

// With kKeep the line becomes e^(z_j - m), and 0 at the target. Memory fetches meanwhile the row that is `ahead` of
// this one, and `out`, where not null: the row that is going to be written.
template <bool kKeep, class T, class Real = real_of<T>>
NABLA_TAU_INLINE void sum_row(const Rows<T>& rows, std::int64_t i, std::int64_t lane, Real* line, Sums<Real>& sums,
                              const T* out, std::int64_t ahead) {
    const std::int64_t id = rows.id(i), y = rows.target(id);
    const T* row = rows.row(id);
    const T* next = rows.row(i + ahead < rows.count ? rows.id(i + ahead) : id);
    const Real peak = sums.peak[lane];
    // Block by block: thousands of equal terms added to one number would all be rounded the same way.
    alignas(64) Real sum[kLanes]{}, slope[kLanes]{}, square[kLanes]{};
    for (std::int64_t start = 0; start < rows.classes; start += kBlock) {
        const Block<T> block(row, start, rows.classes, y);
        const Real* z = block.values(line + start);
        Real* kept = line + start;
        prefetch_block<false>(next + start);
        if (out) prefetch_block<true>(out + start);
        alignas(64) Real block_sum[kLanes]{}, block_slope[kLanes]{}, block_square[kLanes]{};
        for (std::int64_t j = 0; j < block.padded(); j += kLanes) {
#pragma omp simd
            for (std::int64_t l = 0; l < kLanes; ++l) {
                const Real x = exp_clamp(z[j + l] - peak);
                const Real e = exp_clamped(x);
                block_sum[l] += e;
                block_slope[l] -= e * x;
                block_square[l] += e * e;
                if constexpr (kKeep) kept[j + l] = e;
            }
        }
#pragma omp simd
        for (std::int64_t l = 0; l < kLanes; ++l) {
            sum[l] += block_sum[l];
            slope[l] += block_slope[l];
            square[l] += block_square[l];
        }
    }
    sums.sum[lane] = lane_sum(sum);
    sums.slope[lane] = lane_sum(slope);
    sums.square[lane] = lane_sum(square);
}

// value(0) + ... + value(size - 1), block by block too.
template <class Real, class Value>
NABLA_TAU_INLINE Real blocked_sum(std::int64_t size, const Value& value) {
    Real total = 0;
    for (std::int64_t start = 0; start < size; start += kBlock) {
        const std::int64_t end = std::min(size, start + kBlock);
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t j = start; j < end; ++j) sum += value(j);
        total += sum;
    }
    return total;
}

}  // namespace nabla_tau
