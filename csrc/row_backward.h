// The backward kernel: the weighted gradient of rows whose logits have left the cache since their loss was taken, from
// two numbers a row.
#pragma once

#include <algorithm>

#include "row_signals.h"

namespace nabla_tau {

template <class T, bool kSmooth>
struct RowBackward {
    using Real = real_of<T>;

    const Rows<T>& rows;
    const Real* lse;
    const Real* margin;
    const Real* weights;
    T* gradient;
    Real class_weight_sum;

    // Entry j of a row is factor e^((z_j - reference) - excess), and under label smoothing less each c_j.
    struct alignas(64) Scales {
        Real reference[kLanes];
        Real excess[kLanes];
        Real weight[kLanes];
        Real factor[kLanes];
        Real each[kLanes];
        Real target[kLanes];
    };

    // A row as long as a vector is worth transposing no more: unlike the forward kernel this one has nothing to sum.
    bool narrow() const { return !kSmooth && rows.classes < kLanes; }
    std::int64_t scratch() const { return narrow() ? kLanes * rows.classes : 0; }

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end, Real* scratch) const {
        for (std::int64_t first = begin; first < end; first += kLanes) {
            const std::int64_t count = std::min(kLanes, end - first);
            const Scales scales = scale(first, count);
            if (narrow()) {
                write_tile(first, count, scales, scratch);
            } else {
                for (std::int64_t r = 0; r < count; ++r) write_row(rows.id(first + r), r, scales);
            }
        }
    }

    NABLA_TAU_INLINE Scales scale(std::int64_t first, std::int64_t count) const {
        Scales scales{};
        alignas(64) Real phi[kLanes]{}, log_sum[kLanes]{}, own[kLanes]{}, target_each[kLanes]{};
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t id = rows.id(first + r);
            const Real weight = rows.kept(id) ? weights[id] : 0, c = rows.target_weight(id);
            scales.weight[r] = weight;
            scales.reference[r] = load(rows.row(id)[rows.target(id)]);
            phi[r] = margin[id];
            log_sum[r] = lse[id];
            own[r] = weight * c;
            if constexpr (kSmooth) {
                own[r] *= 1 - rows.label_smoothing;
                scales.each[r] = weight * (rows.label_smoothing / Real(rows.classes));
                target_each[r] = scales.each[r] * c;
            }
        }
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) {
            const Real decay = decay_of(phi[r]);
            const Real loss = softplus(-phi[r], decay);
            const Real all = kSmooth ? scales.each[r] * class_weight_sum : Real(0);
            scales.factor[r] = own[r] + all;
            scales.target[r] = -own[r] * sigmoid(-phi[r], decay);
            if constexpr (kSmooth) scales.target[r] += all * sigmoid(phi[r], decay) - target_each[r];
            // lse = z_y + loss, rounded: under a large common offset the two parts keep the digits that lse has
            // lost. For a target far below the rest it is the loss that is large, and lse serves.
            const bool parts = loss <= select(log_sum[r] < 0, -log_sum[r], log_sum[r]);
            scales.reference[r] = select(parts, scales.reference[r], log_sum[r]);
            scales.excess[r] = select(parts, loss, Real(0));
        }
        return scales;
    }

    NABLA_TAU_INLINE void write_tile(std::int64_t first, std::int64_t count, const Scales& scales, Real* tile) const {
        load_tile(rows, first, count, tile);
        for (std::int64_t j = 0; j < rows.classes; ++j) {
#pragma omp simd
            for (std::int64_t r = 0; r < kLanes; ++r) {
                Real& z = tile[j * kLanes + r];
                z = scales.factor[r] * exp_nonpositive((z - scales.reference[r]) - scales.excess[r]);
            }
        }
        store_tile(rows, first, count, tile, scales.weight, scales.target, gradient);
    }

    NABLA_TAU_INLINE void write_row(std::int64_t id, std::int64_t lane, const Scales& scales) const {
        if (scales.weight[lane] == 0) {
            std::fill_n(gradient + id * rows.classes, rows.classes, T{});
            return;
        }
        const T* row = rows.row(id);
        const Real reference = scales.reference[lane], excess = scales.excess[lane];
        const Real factor = scales.factor[lane], each = scales.each[lane];
        const Real* c = rows.class_weights;
        store_row(rows, id, scales.target[lane], gradient, [=](std::int64_t j) NABLA_TAU_INLINE_LAMBDA {
            const Real value = factor * exp_nonpositive((load(row[j]) - reference) - excess);
            if constexpr (kSmooth) return value - each * c[j];
            return value;
        });
    }
};

}  // namespace nabla_tau
