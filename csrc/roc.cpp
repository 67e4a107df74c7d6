#include "roc.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "score_sort.h"

namespace nabla_tau {
namespace {

// Sorted keys of the negatives and of the positives, each behind a 0, which is the key of no number: a walk downwards
// ends there without asking how far it is.
template <class Score>
using Groups = std::array<std::vector<KeyOf<Score>>, 2>;

template <class Score>
Groups<Score> sorted_groups(const Score* scores, const bool* labels, std::int64_t count) {
    const auto positives = std::count(labels, labels + count, true);
    if (positives == 0 || positives == count) {
        throw std::invalid_argument("labels has " + std::to_string(positives) + " True among " +
                                    std::to_string(count) + " values; both classes are needed");
    }
    Groups<Score> groups;
    groups[0].reserve(count - positives + 1);
    groups[1].reserve(positives + 1);
    for (auto& group : groups) group.push_back(0);
    for (std::int64_t i = 0; i < count; ++i) {
        refuse_nan("scores", scores[i], i);
        groups[labels[i]].push_back(key_of(scores[i]));
    }
    for (auto& group : groups) radix_sort(group);
    return groups;
}

// Calls visit(score, positives so far, negatives so far) for each distinct score, from the highest down. A step goes
// by one on either side without a branch: which side is next is what no processor can guess.
template <class Score, class Visit>
void descend(const Groups<Score>& groups, Visit visit) {
    const auto *negative = groups[0].data(), *positive = groups[1].data();
    const std::size_t negatives = groups[0].size() - 1, positives = groups[1].size() - 1;
    std::size_t n = negatives, p = positives;
    auto key = std::max(negative[n], positive[p]);
    while (key != 0) {
        n -= negative[n] == key;
        p -= positive[p] == key;
        const auto next = std::max(negative[n], positive[p]);
        if (next != key) visit(score_of<Score>(key), positives - p, negatives - n);
        key = next;
    }
}

}  // namespace

template <class Score>
RocCurve roc(const Score* scores, const bool* labels, std::int64_t count) {
    const Groups<Score> groups = sorted_groups(scores, labels, count);
    const std::size_t negatives = groups[0].size() - 1, positives = groups[1].size() - 1;
    std::size_t points = 1;
    descend<Score>(groups, [&](Score, std::size_t, std::size_t) { ++points; });
    RocCurve curve;
    for (auto* values : {&curve.fpr, &curve.tpr, &curve.thresholds}) values->resize(points);
    curve.thresholds[0] = std::numeric_limits<double>::infinity();
    const auto all_positive = static_cast<double>(positives), all_negative = static_cast<double>(negatives);
    std::size_t at = 1, wins = 0, alarms = 0;
    // Pairs won, ties one half, twice: at most count^2 / 2, in range for any count below 2^32.
    std::uint64_t twice_wins = 0;
    descend<Score>(groups, [&](Score threshold, std::size_t true_positives, std::size_t false_positives) {
        twice_wins += (true_positives - wins) * (2 * negatives - alarms - false_positives);
        wins = true_positives;
        alarms = false_positives;
        curve.fpr[at] = static_cast<double>(false_positives) / all_negative;
        curve.tpr[at] = static_cast<double>(true_positives) / all_positive;
        curve.thresholds[at++] = static_cast<double>(threshold);
    });
    curve.auc = static_cast<double>(twice_wins) / (2 * all_positive * all_negative);
    return curve;
}

template RocCurve roc(const float*, const bool*, std::int64_t);
template RocCurve roc(const double*, const bool*, std::int64_t);

}  // namespace nabla_tau
