// From the sums of a row to its loss and attack signals:
//
//     margin  = (z_y - m) - log S,    loss = log(1 + e^-margin),   q = 1 - p_y = sigmoid(-margin)
//     entropy = p_y loss + q (T / S + lse - m),   p_j = q e^(z_j - m) / S,   grad_sq = q^2 (1 + Q / S^2)
#pragma once

#include <algorithm>

#include "row_sums.h"

namespace nabla_tau {

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

// What the gradient of each row needs beside its exponentials.
template <class Real>
struct alignas(64) Softmax {
    Real p[kLanes];      // of the target
    Real q[kLanes];      // 1 - p
    Real scale[kLanes];  // q / S
};

// Whether argmax finds the target; of equal logits it finds the first. The comparison of the sum with itself turns
// down rows with a NaN, which the maximum passes over.
template <class T, class Real = real_of<T>>
NABLA_TAU_INLINE bool wins(const Rows<T>& rows, std::int64_t id, Real z_y, Real peak, Real sum) {
    if (!(z_y >= peak) || sum != sum) return false;
    if (z_y > peak) return true;
    const T* row = rows.row(id);
    for (std::int64_t j = 0; j < rows.target(id); ++j) {
        if (load(row[j]) == z_y) return false;
    }
    return true;
}

// Writes the signals of rows first .. first + count - 1; under label smoothing grad_sq is left to the caller.
template <bool kSmooth, class T, class Real = real_of<T>>
NABLA_TAU_INLINE Softmax<Real> finish(const Rows<T>& rows, std::int64_t first, std::int64_t count,
                                      const Sums<Real>& sums, Real class_weight_sum,
                                      const RowSignals<Real>& signals) {
    Softmax<Real> softmax;
    alignas(64) Real loss[kLanes], height[kLanes], lse[kLanes], entropy[kLanes], margin[kLanes], p_max[kLanes],
        grad_sq[kLanes];
#pragma omp simd
    for (std::int64_t r = 0; r < kLanes; ++r) {
        const Real z_y = sums.target_logit[r], m = sums.peak[r], sum = sums.sum[r];
        const Real log_sum = log_positive(sum);
        const Real phi = (z_y - m) - log_sum;
        const Real decay = decay_of(phi);
        const Real l = softplus(-phi, decay);
        const Real p = sigmoid(phi, decay), q = sigmoid(-phi, decay);
        // The larger of the two sides carries lse; starting from the smaller one would cancel.
        const Real base = select(phi > 0, z_y, m);
        const Real above = select(phi > 0, Real(0), log_sum) + log1p_unit(decay);
        height[r] = (base - m) + above;
        // q = 0 leaves one possible class (S may be 0), p = 0 an infinite loss: both have entropy terms of 0.
        const Real share = select(q == 0, Real(0), 1 / sum);
        const Real others = select(q == 0, Real(0), q * (sums.slope[r] * share + height[r]));
        margin[r] = phi;
        loss[r] = l;
        lse[r] = base + above;
        entropy[r] = select(p == 0, Real(0), p * l) + others;
        softmax.p[r] = p;
        softmax.q[r] = q;
        softmax.scale[r] = q * share;
        p_max[r] = select(p > q * share, p, q * share);
        grad_sq[r] = q * q * (1 + (sums.square[r] * share) * share);
    }
    for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t id = rows.id(first + r), y = rows.target(id);
        const bool kept = rows.kept(id);
        const Real c = rows.target_weight(id);
        Real row_loss = c * loss[r];
        if constexpr (kSmooth) {
            // sum_j c_j (lse - z_j), each term of which is positive.
            const T* row = rows.row(id);
            const Real* weights = rows.class_weights;
            const Real peak = sums.peak[r];
            const Real depth = blocked_sum<Real>(rows.classes, [=](std::int64_t j) NABLA_TAU_INLINE_LAMBDA {
                return weights[j] * (j == y ? Real(0) : peak - load(row[j]));
            });
            const Real smooth = depth + (class_weight_sum - c) * height[r] + c * loss[r];
            row_loss = (1 - rows.label_smoothing) * row_loss + rows.label_smoothing / Real(rows.classes) * smooth;
        }
        signals.loss[id] = kept ? row_loss : 0;
        signals.lse[id] = lse[r];
        signals.entropy[id] = entropy[r];
        signals.margin[id] = kept ? margin[r] : 0;
        signals.p_max[id] = p_max[r];
        signals.grad_sq[id] = kept ? c * c * grad_sq[r] : 0;
        signals.correct[id] = kept && wins(rows, id, sums.target_logit[r], sums.peak[r], sums.sum[r]);
    }
    return softmax;
}

// gradient[i] = tile, transposed back, but target[r] at the target; zeros for a row of weight 0.
template <class T, class Real = real_of<T>>
NABLA_TAU_INLINE void store_tile(const Rows<T>& rows, std::int64_t first, std::int64_t count, const Real* tile,
                                 const Real* weight, const Real* target, T* gradient) {
    alignas(64) T stored[kNarrow * kLanes];
    for (std::int64_t j = 0; j < rows.classes; ++j) {
#pragma omp simd
        for (std::int64_t r = 0; r < kLanes; ++r) store(tile[j * kLanes + r], stored[j * kLanes + r]);
    }
    for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t id = rows.id(first + r);
        T* out = gradient + id * rows.classes;
        if (weight[r] == 0) {
            std::fill_n(out, rows.classes, T{});
        } else {
            for (std::int64_t j = 0; j < rows.classes; ++j) out[j] = stored[j * kLanes + r];
            store(target[r], out[rows.target(id)]);
        }
    }
}

// gradient[i][j] = value(j), but `target` at the target.
template <class T, class Real, class Value>
NABLA_TAU_INLINE void store_row(const Rows<T>& rows, std::int64_t id, Real target, T* gradient, const Value& value) {
    T* out = gradient + id * rows.classes;
#pragma omp simd
    for (std::int64_t j = 0; j < rows.classes; ++j) store(value(j), out[j]);
    store(target, out[rows.target(id)]);
}

}  // namespace nabla_tau
