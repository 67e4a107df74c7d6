// Mean binary cross-entropy of multi-label rows, their signals and gradient: reference.multilabel_rows.
#pragma once

#include <cstdint>

#include "rows.h"

namespace nabla_tau {

template <class T>
struct LabelRows {
    const T* logits;            // [N, C]
    const real_of<T>* targets;  // [N, C] in [0, 1]
    std::int64_t count;
    std::int64_t labels;
};

template <class T>
void multilabel_forward(const LabelRows<T>& rows, const RowSignals<real_of<T>>& signals, int threads);

// gradient[i] = weights[i] * dloss_i/dz_i; zeros for weight 0. `gradient` may be the logits themselves.
template <class T>
void multilabel_backward(const LabelRows<T>& rows, const real_of<T>* weights, T* gradient, int threads);

}  // namespace nabla_tau
