#include "roc.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace nabla_tau {
namespace {

// Unsigned integers that sort as the scores do: IEEE numbers with all bits of the negatives flipped, and the sign of
// the rest.
template <class Score>
using KeyOf = std::conditional_t<sizeof(Score) == 4, std::uint32_t, std::uint64_t>;

template <class Score>
constexpr KeyOf<Score> kSign = KeyOf<Score>(1) << (8 * sizeof(Score) - 1);

template <class Score>
KeyOf<Score> key_of(Score score) {
    KeyOf<Score> bits;
    score += Score(0);  // -0.0 + 0.0 is +0.0, so both zeros get one key
    std::memcpy(&bits, &score, sizeof(bits));
    return bits & kSign<Score> ? ~bits : bits | kSign<Score>;
}

template <class Score>
Score score_of(KeyOf<Score> key) {
    const KeyOf<Score> bits = key & kSign<Score> ? key & ~kSign<Score> : ~key;
    Score score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
}

template <class Key>
void radix_sort(std::vector<Key>& keys) {
    constexpr int kBits = 11;
    constexpr std::size_t kBuckets = std::size_t(1) << kBits;
    constexpr int kPasses = (8 * sizeof(Key) + kBits - 1) / kBits;
    // Clearing and scanning the histograms is what a short sort would mostly do.
    if (keys.size() < 2048) {
        std::sort(keys.begin(), keys.end());
        return;
    }
    std::vector<std::array<std::size_t, kBuckets>> offsets(kPasses);
    for (const Key key : keys) {
        for (int pass = 0; pass < kPasses; ++pass) ++offsets[pass][(key >> (pass * kBits)) % kBuckets];
    }
    std::vector<Key> sorted(keys.size());
    for (int pass = 0; pass < kPasses; ++pass) {
        auto& offset = offsets[pass];
        const int shift = pass * kBits;
        // One bucket holds everything: nothing would move.
        if (offset[(keys[0] >> shift) % kBuckets] == keys.size()) continue;
        std::size_t sum = 0;
        for (std::size_t& slot : offset) {
            const std::size_t size = slot;
            slot = sum;
            sum += size;
        }
        for (const Key key : keys) sorted[offset[(key >> shift) % kBuckets]++] = key;
        keys.swap(sorted);
    }
}

template <class Score>
struct Groups {
    std::vector<KeyOf<Score>> positive;
    std::vector<KeyOf<Score>> negative;
};

template <class Score>
Groups<Score> sorted_groups(const Score* scores, const bool* labels, std::int64_t count) {
    Groups<Score> groups;
    const auto positives = std::count(labels, labels + count, true);
    if (positives == 0 || positives == count) {
        throw std::invalid_argument("labels has " + std::to_string(positives) + " True among " +
                                    std::to_string(count) + " values; both classes are needed");
    }
    groups.positive.reserve(positives);
    groups.negative.reserve(count - positives);
    for (std::int64_t i = 0; i < count; ++i) {
        if (std::isnan(scores[i])) throw std::invalid_argument("scores[" + std::to_string(i) + "] is NaN");
        (labels[i] ? groups.positive : groups.negative).push_back(key_of(scores[i]));
    }
    radix_sort(groups.positive);
    radix_sort(groups.negative);
    return groups;
}

}  // namespace

template <class Score>
double auc(const Score* scores, const bool* labels, std::int64_t count) {
    const auto groups = sorted_groups(scores, labels, count);
    const auto& negative = groups.negative;
    // wins + (wins + ties) for each positive. The total is at most count^2 / 2, in range for any count below 2^32.
    std::uint64_t twice_wins = 0;
    std::size_t below = 0, not_above = 0;
    for (const auto key : groups.positive) {
        while (below < negative.size() && negative[below] < key) ++below;
        not_above = std::max(not_above, below);
        while (not_above < negative.size() && negative[not_above] == key) ++not_above;
        twice_wins += below + not_above;
    }
    const std::uint64_t pairs = static_cast<std::uint64_t>(groups.positive.size()) * negative.size();
    return static_cast<double>(twice_wins) / (2.0 * static_cast<double>(pairs));
}

template <class Score>
RocCurve roc(const Score* scores, const bool* labels, std::int64_t count) {
    const auto groups = sorted_groups(scores, labels, count);
    const auto &positive = groups.positive, &negative = groups.negative;
    RocCurve curve;
    for (auto* values : {&curve.fpr, &curve.tpr, &curve.thresholds}) values->reserve(count + 1);
    curve.fpr.push_back(0.0);
    curve.tpr.push_back(0.0);
    curve.thresholds.push_back(std::numeric_limits<double>::infinity());
    std::size_t p = positive.size(), n = negative.size();
    while (p > 0 || n > 0) {
        const auto key = std::max(p > 0 ? positive[p - 1] : 0, n > 0 ? negative[n - 1] : 0);
        while (p > 0 && positive[p - 1] == key) --p;
        while (n > 0 && negative[n - 1] == key) --n;
        curve.fpr.push_back(static_cast<double>(negative.size() - n) / static_cast<double>(negative.size()));
        curve.tpr.push_back(static_cast<double>(positive.size() - p) / static_cast<double>(positive.size()));
        curve.thresholds.push_back(static_cast<double>(score_of<Score>(key)));
    }
    return curve;
}

template double auc(const float*, const bool*, std::int64_t);
template double auc(const double*, const bool*, std::int64_t);
template RocCurve roc(const float*, const bool*, std::int64_t);
template RocCurve roc(const double*, const bool*, std::int64_t);

}  // namespace nabla_tau
