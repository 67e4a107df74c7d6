// Counts, means, sums of squares and medians of each sample's scores over the models trained on it ("in", group 1)
// and the others ("out", group 0): what every likelihood-ratio attack starts from.
#pragma once

#include <array>
#include <cstdint>

#include "strided.h"

namespace nabla_tau {

// What group g has in column c = n * queries + a lies at [g * columns + c]; of `scatter`, a matrix [queries, queries].
// Each pointer but count and mean may be null.
template <class Count, class Value>
struct MomentArrays {
    Count* count;
    Value* mean;
    Value* m2;
    Value* scatter;
};
using Moments = MomentArrays<std::int32_t, double>;
using KnownMoments = MomentArrays<const std::int32_t, const double>;

struct GroupOptions {
    // Of each sample's out- and in-models only so many count, the first in order; negative: all.
    std::array<std::int64_t, 2> limit{-1, -1};
    // Leave a model out for a sample with all its queries if one of them is not finite.
    bool whole = false;
    // Take the moments of 1 / (1 + e^-score), for which infinite scores count.
    bool sigmoid = false;
};

// Moments over finite scores, joined with those of models seen before if known.count is not null (Chan et al. 1979).
template <class T>
void group_moments(const Cells<T>& cells, const Membership& group, const GroupOptions& options,
                   const KnownMoments& known, const Moments& moments, int threads);

// Median of the finite scores [2, columns]; NaN where there are none.
template <class T>
void group_medians(const Cells<T>& cells, const Membership& group, const GroupOptions& options, double* median,
                   int threads);

}  // namespace nabla_tau
