#include "rows.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "row_backward.h"
#include "row_pass.h"
#include "simd.h"

namespace nabla_tau {

void check_targets(const std::int64_t* targets, std::int64_t count, std::int64_t classes, std::int64_t ignore_index) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t y = targets[i];
        if ((y < 0 || y >= classes) && y != ignore_index) {
            throw std::invalid_argument("targets[" + std::to_string(i) + "] is " + std::to_string(y) +
                                        "; it must be in [0, " + std::to_string(classes) + ") or ignore_index " +
                                        std::to_string(ignore_index));
        }
    }
}

namespace {

// Label smoothing has kernels of its own, which always have class weights.
template <class T>
struct Smoothed {
    using Real = real_of<T>;
    std::vector<Real> ones;
    Rows<T> rows;
    Real class_weight_sum = 0;

    explicit Smoothed(const Rows<T>& plain) : rows(plain) {
        if (rows.class_weights == nullptr) {
            ones.assign(rows.classes, 1);
            rows.class_weights = ones.data();
        }
        double sum = 0;
        for (std::int64_t j = 0; j < rows.classes; ++j) sum += rows.class_weights[j];
        class_weight_sum = static_cast<Real>(sum);
    }
};

template <bool kGradient, class T>
void pass(const Rows<T>& rows, const real_of<T>* weights, const RowSignals<real_of<T>>& signals, T* gradient,
          int threads) {
    if (rows.label_smoothing == 0) {
        run(RowPass<T, false, kGradient>{rows, signals, weights, gradient, 0}, rows.count, rows.classes, threads);
    } else {
        const Smoothed<T> smoothed(rows);
        run(RowPass<T, true, kGradient>{smoothed.rows, signals, weights, gradient, smoothed.class_weight_sum},
            rows.count, rows.classes, threads);
    }
}

}  // namespace

template <class T>
void rows_forward(const Rows<T>& rows, const RowSignals<real_of<T>>& signals, int threads) {
    pass<false, T>(rows, nullptr, signals, nullptr, threads);
}

template <class T>
void rows_gradient(const Rows<T>& rows, const real_of<T>* weights, const RowSignals<real_of<T>>& signals, T* gradient,
                   int threads) {
    pass<true, T>(rows, weights, signals, gradient, threads);
}

template <class T>
void rows_backward(const Rows<T>& rows, const real_of<T>* lse, const real_of<T>* margin, const real_of<T>* weights,
                   T* gradient, int threads) {
    if (rows.label_smoothing == 0) {
        run(RowBackward<T, false>{rows, lse, margin, weights, gradient, 0}, rows.count, rows.classes, threads);
    } else {
        const Smoothed<T> smoothed(rows);
        run(RowBackward<T, true>{smoothed.rows, lse, margin, weights, gradient, smoothed.class_weight_sum},
            rows.count, rows.classes, threads);
    }
}

template <class T>
double rows_mean(const Rows<T>& rows, const real_of<T>* base, double weight, double samples, T* gradient,
                 int threads) {
    using Real = real_of<T>;
    const std::int64_t n = rows.count;
    if (samples < 0) {
        samples = 0;
        for (std::int64_t i = 0; i < n; ++i) samples += rows.kept(i);
    }
    const double share = weight / std::max(samples, 1.0);
    std::vector<Real> found(7 * n);
    const auto correct = std::make_unique<bool[]>(n);
    Real* const weights = found.data();
    Real* const loss = weights + n;
    for (std::int64_t i = 0; i < n; ++i) weights[i] = static_cast<Real>(base ? share * base[i] : share);
    const RowSignals<Real> signals{loss,         loss + n,     loss + 2 * n, loss + 3 * n,
                                   loss + 4 * n, loss + 5 * n, correct.get()};
    rows_gradient(rows, weights, signals, gradient, threads);
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        if (rows.kept(i)) sum += static_cast<double>(weights[i]) * loss[i];
    }
    return sum;
}

#define NABLA_TAU_ROWS(T)                                                                                          \
    template void rows_forward(const Rows<T>&, const RowSignals<real_of<T>>&, int);                                \
    template void rows_gradient(const Rows<T>&, const real_of<T>*, const RowSignals<real_of<T>>&, T*, int);        \
    template void rows_backward(const Rows<T>&, const real_of<T>*, const real_of<T>*, const real_of<T>*, T*, int); \
    template double rows_mean(const Rows<T>&, const real_of<T>*, double, double, T*, int);
NABLA_TAU_ROWS(float)
NABLA_TAU_ROWS(double)
NABLA_TAU_ROWS(float16)
NABLA_TAU_ROWS(bfloat16)
#undef NABLA_TAU_ROWS

}  // namespace nabla_tau
