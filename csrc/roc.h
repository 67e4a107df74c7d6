// ROC curve and the area under it, exact under ties, for the attack statistics.
#pragma once

#include <cstdint>
#include <vector>

namespace nabla_tau {

// The points (0, 0) at threshold +inf and then one for each distinct score, from the highest down: the rates at which
// score >= threshold holds. auc: P(score of a positive > score of a negative) + P(equal) / 2, an integer count and one
// division.
struct RocCurve {
    std::vector<double> fpr;
    std::vector<double> tpr;
    std::vector<double> thresholds;
    double auc;
};

// Score is float or double. Throws std::invalid_argument for a NaN score or when a class is missing.
template <class Score>
RocCurve roc(const Score* scores, const bool* labels, std::int64_t count);

}  // namespace nabla_tau
