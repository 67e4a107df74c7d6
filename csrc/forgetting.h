// How well one can tell, for one sample, unlearned from retrained models by a threshold on the margin, as the epsilon
// of differential privacy: the per-sample part of the NeurIPS 2023 unlearning competition's forgetting quality.
#pragma once

#include <cstdint>

#include "strided.h"

namespace nabla_tau {

enum class ThresholdRule {
    exact,      // one threshold, at every margin
    published,  // one threshold on a grid, and pairs of thresholds on grids
};

struct ForgettingOptions {
    ThresholdRule rule;
    double delta;
    double cap;  // the largest epsilon, also that of groups which a threshold separates
};

// epsilon [samples] from margins of unlearned and retrained models, which must be [M, N]. Only finite margins count;
// NaN where a group has none or no threshold errs on both sides.
template <class T>
void forgetting_epsilon(const Cells<T>& unlearned, const Cells<T>& retrained, const ForgettingOptions& options,
                        double* epsilon, int threads);

}  // namespace nabla_tau
