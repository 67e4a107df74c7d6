// Cross-entropy, attack signals and the row-weighted gradient of a logits matrix: the CPU side of kernels/reference.py.
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace nabla_tau {

// A contiguous matrix of logits with one class index per row; `ignore_index` marks rows that do not count.
template <class T>
struct Rows {
    const T* logits;
    const std::int64_t* targets;
    std::int64_t count;
    std::int64_t classes;
    std::int64_t ignore_index;

    const T* row(std::int64_t i) const { return logits + i * classes; }
    bool kept(std::int64_t i) const { return targets[i] != ignore_index; }
    // An ignored row still has an lse and an entropy; they do not depend on the class it is given.
    std::int64_t target(std::int64_t i) const { return kept(i) ? targets[i] : 0; }
};

template <class Real>
struct RowSignals {
    Real* loss;
    Real* lse;
    Real* entropy;
    Real* margin;
    bool* correct;
};

// Throws std::invalid_argument for the first target that is neither a class nor ignore_index.
void check_targets(const std::int64_t* targets, std::int64_t count, std::int64_t classes, std::int64_t ignore_index);

// T is float, double or bfloat16. Results do not depend on `threads`, the largest number of threads to use.
template <class T>
void rows_forward(const Rows<T>& rows, const RowSignals<real_of<T>>& signals, int threads);

// gradient[i] = weights[i] * (softmax(z_i) - onehot(y_i)), from the lse and margin of rows_forward. Ignored rows and
// rows of weight 0 get zeros and are not read. `gradient` may be the logits themselves.
template <class T>
void rows_backward(const Rows<T>& rows, const real_of<T>* lse, const real_of<T>* margin, const real_of<T>* weights,
                   T* gradient, int threads);

// The instruction set the kernels run on: "x86-64-v4", "x86-64-v3" or "baseline". The environment variable
// NABLA_TAU_SIMD names a lower one than the machine has; it is read once.
const char* simd_level();

}  // namespace nabla_tau
