// The forward kernel: signals, and with kGradient also the weighted gradient, from the exponentials that the sums were
// made of, so that the logits are read once.
#pragma once

#include <algorithm>

#include "row_signals.h"

namespace nabla_tau {

// Exponentials kept between sums and gradient, unless one row has more: a first-level cache of them.
constexpr std::int64_t kKeptLogits = 8192;

template <class T, bool kSmooth, bool kGradient>
struct RowPass {
    using Real = real_of<T>;

    const Rows<T>& rows;
    const RowSignals<Real>& signals;
    const Real* weights;  // null: ones
    T* gradient;
    Real class_weight_sum;

    // Label smoothing is not worth a second form that lays rows across the lanes.
    bool narrow() const { return !kSmooth && rows.classes <= kNarrow; }
    std::int64_t line() const { return rounded_up(rows.classes, kLanes); }
    std::int64_t group() const {
        return narrow() ? kLanes : std::clamp<std::int64_t>(kKeptLogits / line(), 1, kLanes);
    }
    std::int64_t scratch() const { return group() * line(); }

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end, Real* scratch) const {
        const std::int64_t step = group();
        for (std::int64_t first = begin; first < end; first += step) {
            const std::int64_t count = std::min(step, end - first);
            Sums<Real> sums{};
            if (narrow()) {
                load_tile(rows, first, count, scratch);
                sum_tile(rows, first, count, scratch, sums);
            } else {
                for (std::int64_t r = 0; r < count; ++r) {
                    find_peak(rows, first + r, r, scratch + r * line(), sums);
                }
                for (std::int64_t r = 0; r < count; ++r) {
                    const T* out = kGradient ? gradient + rows.id(first + r) * rows.classes : nullptr;
                    sum_row<kSmooth || kGradient>(rows, first + r, r, scratch + r * line(), sums, out, step);
                }
            }
            const auto softmax = finish<kSmooth>(rows, first, count, sums, class_weight_sum, signals);
            if constexpr (kSmooth) {
                for (std::int64_t r = 0; r < count; ++r) smooth_row(first + r, r, scratch + r * line(), softmax);
            }
            if constexpr (kGradient) {
                if (narrow()) {
                    write_tile(first, count, scratch, softmax);
                } else {
                    for (std::int64_t r = 0; r < count; ++r) write_row(first + r, r, scratch + r * line(), softmax);
                }
            }
        }
    }

    // Exponentials into dloss/dz of a row, and its square norm: summed as it stands, since its parts may cancel.
    NABLA_TAU_INLINE void smooth_row(std::int64_t i, std::int64_t lane, Real* e, const Softmax<Real>& softmax) const {
        const std::int64_t id = rows.id(i), y = rows.target(id);
        const Real* c = rows.class_weights;
        const Real own = (1 - rows.label_smoothing) * c[y];
        const Real each = rows.label_smoothing / Real(rows.classes);
        const Real factor = (own + each * class_weight_sum) * softmax.scale[lane];
#pragma omp simd
        for (std::int64_t j = 0; j < rows.classes; ++j) e[j] = factor * e[j] - each * c[j];
        e[y] = each * (softmax.p[lane] * class_weight_sum - c[y]) - own * softmax.q[lane];
        const Real square =
            blocked_sum<Real>(rows.classes, [=](std::int64_t j) NABLA_TAU_INLINE_LAMBDA { return e[j] * e[j]; });
        signals.grad_sq[id] = rows.kept(id) ? square : 0;
    }

    NABLA_TAU_INLINE Real weight(std::int64_t id) const {
        return rows.kept(id) ? (weights ? weights[id] : Real(1)) : Real(0);
    }

    NABLA_TAU_INLINE void write_tile(std::int64_t first, std::int64_t count, Real* e,
                                     const Softmax<Real>& softmax) const {
        alignas(64) Real own[kLanes]{}, target[kLanes];
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t id = rows.id(first + r);
            own[r] = weight(id) * rows.target_weight(id);
            target[r] = -own[r] * softmax.q[r];
        }
        for (std::int64_t j = 0; j < rows.classes; ++j) {
#pragma omp simd
            for (std::int64_t r = 0; r < kLanes; ++r) e[j * kLanes + r] *= own[r] * softmax.scale[r];
        }
        store_tile(rows, first, count, e, own, target, gradient);
    }

    NABLA_TAU_INLINE void write_row(std::int64_t i, std::int64_t lane, const Real* line,
                                    const Softmax<Real>& softmax) const {
        const std::int64_t id = rows.id(i);
        const Real w = weight(id);
        if (w == 0) {
            std::fill_n(gradient + id * rows.classes, rows.classes, T{});
            return;
        }
        Real factor = w, target = w;
        if constexpr (kSmooth) {
            target *= line[rows.target(id)];
        } else {
            factor *= rows.target_weight(id) * softmax.scale[lane];
            target *= -rows.target_weight(id) * softmax.q[lane];
        }
        store_row(rows, id, target, gradient,
                  [=](std::int64_t j) NABLA_TAU_INLINE_LAMBDA { return factor * line[j]; });
    }
};

}  // namespace nabla_tau
