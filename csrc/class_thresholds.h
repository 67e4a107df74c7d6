// The best membership threshold of each class (Song and Mittal 2021).
#pragma once

#include <cstdint>
#include <vector>

namespace nabla_tau {

// Of one class: the score at and above which a sample is called a member, and what that calls right and wrong.
struct ClassThreshold {
    double threshold;  // NaN where the class has no members or no non-members
    std::int64_t members, nonmembers;
    std::int64_t true_positives, false_positives;
};

// For each class, and last for all of them together, the threshold among the scores that maximises
// P(member >= t) + P(non-member < t); the highest of equals. labels: true for a member; classes: in [0, n_classes).
// One sort and one pass, whatever the number of classes. Throws std::invalid_argument for NaN and for a class out of
// range.
template <class Score>
std::vector<ClassThreshold> class_thresholds(const Score* scores, const bool* labels, const std::int64_t* classes,
                                             std::int64_t count, std::int64_t n_classes);

}  // namespace nabla_tau
