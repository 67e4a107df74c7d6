#include "multilabel.h"

#include <algorithm>

#include "row_signals.h"
#include "simd.h"

namespace nabla_tau {
namespace {

// Not sigmoid(z) - t, which is 0 for a memorised label: here each part keeps its own tail.
template <class Real>
NABLA_TAU_INLINE Real label_gradient(Real z, Real t, Real decay) {
    return (1 - t) * sigmoid(z, decay) - t * sigmoid(-z, decay);
}

template <class T>
struct MultilabelForward {
    using Real = real_of<T>;

    const LabelRows<T>& rows;
    const RowSignals<Real>& signals;

    std::int64_t scratch() const { return 0; }

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end, Real*) const {
        for (std::int64_t i = begin; i < end; ++i) sum_row(i);
    }

    NABLA_TAU_INLINE void sum_row(std::int64_t i) const {
        const T* z = rows.logits + i * rows.labels;
        const Real* t = rows.targets + i * rows.labels;
        Real loss = 0, entropy = 0, margin = 0, p_max = 0, square = 0, wrong = 0;
#pragma omp simd reduction(+ : loss, entropy, margin, p_max, square, wrong)
        for (std::int64_t j = 0; j < rows.labels; ++j) {
            const Real x = load(z[j]), decay = decay_of(x), size = select(x > 0, x, -x);
            const Real tail = log1p_unit(decay);
            loss += t[j] * (select(x > 0, Real(0), -x) + tail) + (1 - t[j]) * (select(x > 0, x, Real(0)) + tail);
            entropy += tail + size * sigmoid(-size, decay);
            margin += (2 * t[j] - 1) * x;
            p_max += 1 / (1 + decay);
            const Real g = label_gradient(x, t[j], decay);
            square += g * g;
            wrong += select((x > 0) != (t[j] > Real(0.5)), Real(1), Real(0));
        }
        const Real labels = static_cast<Real>(rows.labels);
        signals.loss[i] = loss / labels;
        signals.lse[i] = 0;
        signals.entropy[i] = entropy / labels;
        signals.margin[i] = margin / labels;
        signals.p_max[i] = p_max / labels;
        signals.grad_sq[i] = square / (labels * labels);
        signals.correct[i] = wrong == 0;
    }
};

template <class T>
struct MultilabelBackward {
    using Real = real_of<T>;

    const LabelRows<T>& rows;
    const Real* weights;
    T* gradient;

    std::int64_t scratch() const { return 0; }

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end, Real*) const {
        for (std::int64_t i = begin; i < end; ++i) {
            const T* z = rows.logits + i * rows.labels;
            const Real* t = rows.targets + i * rows.labels;
            T* out = gradient + i * rows.labels;
            const Real factor = weights[i] / static_cast<Real>(rows.labels);
            if (weights[i] == 0) {
                std::fill_n(out, rows.labels, T{});
                continue;
            }
#pragma omp simd
            for (std::int64_t j = 0; j < rows.labels; ++j) {
                const Real x = load(z[j]);
                store(factor * label_gradient(x, t[j], decay_of(x)), out[j]);
            }
        }
    }
};

}  // namespace

template <class T>
void multilabel_forward(const LabelRows<T>& rows, const RowSignals<real_of<T>>& signals, int threads) {
    run(MultilabelForward<T>{rows, signals}, rows.count, rows.labels, threads);
}

template <class T>
void multilabel_backward(const LabelRows<T>& rows, const real_of<T>* weights, T* gradient, int threads) {
    run(MultilabelBackward<T>{rows, weights, gradient}, rows.count, rows.labels, threads);
}

#define NABLA_TAU_MULTILABEL(T)                                                                   \
    template void multilabel_forward(const LabelRows<T>&, const RowSignals<real_of<T>>&, int);    \
    template void multilabel_backward(const LabelRows<T>&, const real_of<T>*, T*, int);
NABLA_TAU_MULTILABEL(float)
NABLA_TAU_MULTILABEL(double)
NABLA_TAU_MULTILABEL(float16)
NABLA_TAU_MULTILABEL(bfloat16)
#undef NABLA_TAU_MULTILABEL

}  // namespace nabla_tau
