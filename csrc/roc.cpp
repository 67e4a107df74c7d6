#include "roc.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "score_sort.h"

namespace nabla_tau {
namespace {

// How many labels are true; throws unless both classes are there.
std::int64_t count_positives(const bool* labels, std::int64_t count) {
    const auto positives = std::count(labels, labels + count, true);
    if (positives == 0 || positives == count) {
        throw std::invalid_argument("labels has " + std::to_string(positives) + " True among " +
                                    std::to_string(count) + " values; both classes are needed");
    }
    return positives;
}

}  // namespace

template <class Score>
double auc(const Score* scores, const bool* labels, std::int64_t count) {
    const std::int64_t positives = count_positives(labels, count);
    std::vector<KeyOf<Score>> positive, negative;
    positive.reserve(positives);
    negative.reserve(count - positives);
    for (std::int64_t i = 0; i < count; ++i) {
        refuse_nan("scores", scores[i], i);
        (labels[i] ? positive : negative).push_back(key_of(scores[i]));
    }
    radix_sort(positive);
    radix_sort(negative);
    // wins + (wins + ties) for each positive. The total is at most count^2 / 2, in range for any count below 2^32.
    std::uint64_t twice_wins = 0;
    std::size_t below = 0, not_above = 0;
    for (const auto key : positive) {
        while (below < negative.size() && negative[below] < key) ++below;
        not_above = std::max(not_above, below);
        while (not_above < negative.size() && negative[not_above] == key) ++not_above;
        twice_wins += below + not_above;
    }
    const std::uint64_t pairs = static_cast<std::uint64_t>(positive.size()) * negative.size();
    return static_cast<double>(twice_wins) / (2.0 * static_cast<double>(pairs));
}

template <class Score>
RocCurve roc(const Score* scores, const bool* labels, std::int64_t count) {
    const std::int64_t positives = count_positives(labels, count);
    // Both classes in one sort: merging two sorted lists would mispredict a branch at every second point.
    std::vector<Tagged<KeyOf<Score>>> items(count);
    for (std::int64_t i = 0; i < count; ++i) {
        refuse_nan("scores", scores[i], i);
        items[i] = {key_of(scores[i]), labels[i]};
    }
    radix_sort(items);
    RocCurve curve;
    for (auto* values : {&curve.fpr, &curve.tpr, &curve.thresholds}) values->resize(count + 1);
    curve.fpr[0] = curve.tpr[0] = 0.0;
    curve.thresholds[0] = std::numeric_limits<double>::infinity();
    const auto all_positive = static_cast<double>(positives), all_negative = static_cast<double>(count - positives);
    std::int64_t true_positives = 0, false_positives = 0;
    std::size_t points = 1;
    for (std::int64_t i = count - 1; i >= 0; --i) {
        true_positives += items[i].tag;
        false_positives += 1 - items[i].tag;
        curve.fpr[points] = static_cast<double>(false_positives) / all_negative;
        curve.tpr[points] = static_cast<double>(true_positives) / all_positive;
        curve.thresholds[points] = static_cast<double>(score_of<Score>(items[i].key));
        // A point that ties with the next is written over by it.
        points += i == 0 || items[i - 1].key != items[i].key;
    }
    for (auto* values : {&curve.fpr, &curve.tpr, &curve.thresholds}) values->resize(points);
    return curve;
}

template double auc(const float*, const bool*, std::int64_t);
template double auc(const double*, const bool*, std::int64_t);
template RocCurve roc(const float*, const bool*, std::int64_t);
template RocCurve roc(const double*, const bool*, std::int64_t);

}  // namespace nabla_tau
