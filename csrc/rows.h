// Cross-entropy, attack signals and the row-weighted gradient of a logits matrix: the CPU side of kernels/reference.py.
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace nabla_tau {

// A contiguous matrix of logits with one class index per row; `ignore_index` marks rows that do not count. With label
// smoothing e and class weights c the loss of a row is (1 - e) c_y (-log p_y) + e/V sum_j c_j (-log p_j).
template <class T>
struct Rows {
    const T* logits;
    const std::int64_t* targets;
    std::int64_t count;
    std::int64_t classes;
    std::int64_t ignore_index;
    real_of<T> label_smoothing = 0;
    const real_of<T>* class_weights = nullptr;  // [classes]; null where all are 1
    // Which row of the matrix the i-th one is, where `count` rows are picked out of it.
    const std::int64_t* order = nullptr;

    std::int64_t id(std::int64_t i) const { return order ? order[i] : i; }
    const T* row(std::int64_t id) const { return logits + id * classes; }
    bool kept(std::int64_t id) const { return targets[id] != ignore_index; }
    // An ignored row still has an lse and an entropy; they do not depend on the class it is given.
    std::int64_t target(std::int64_t id) const { return kept(id) ? targets[id] : 0; }
    real_of<T> target_weight(std::int64_t id) const { return class_weights ? class_weights[target(id)] : 1; }
};

template <class Real>
struct RowSignals {
    Real* loss;
    Real* lse;
    Real* entropy;
    Real* margin;
    Real* p_max;
    Real* grad_sq;
    bool* correct;
};

// Throws std::invalid_argument for the first target that is neither a class nor ignore_index.
void check_targets(const std::int64_t* targets, std::int64_t count, std::int64_t classes, std::int64_t ignore_index);

// T is float, double, float16 or bfloat16. Results do not depend on `threads`, the largest number of threads to use.
template <class T>
void rows_forward(const Rows<T>& rows, const RowSignals<real_of<T>>& signals, int threads);

// gradient[i] = weights[i] * dloss_i/dz_i, from the lse and margin of rows_forward. Ignored rows and rows of weight 0
// get zeros and are not read. `gradient` may be the logits themselves.
template <class T>
void rows_backward(const Rows<T>& rows, const real_of<T>* lse, const real_of<T>* margin, const real_of<T>* weights,
                   T* gradient, int threads);

// Both, with one read of the logits; null weights are ones.
template <class T>
void rows_gradient(const Rows<T>& rows, const real_of<T>* weights, const RowSignals<real_of<T>>& signals, T* gradient,
                   int threads);

// A mean of losses and its gradient with one read of the logits: weight / samples * sum_i base_i loss_i over the rows
// that count. base is the weight of each row within its sample; without it (null) every row is a sample. samples: how
// many there are; below 0 the rows that count are them, which only goes without a base.
template <class T>
double rows_mean(const Rows<T>& rows, const real_of<T>* base, double weight, double samples, T* gradient, int threads);

}  // namespace nabla_tau
