#include "class_thresholds.h"

#include <limits>

#include "score_sort.h"

namespace nabla_tau {
namespace {

// One class on the way down its scores: calls so far, and the best threshold passed.
template <class Key>
struct Descent {
    Key last = 0, best = 0;
    std::int64_t true_positives = 0, false_positives = 0;
    // Advantage times members times non-members: an integer, so that equal thresholds compare equal.
    std::int64_t best_advantage = std::numeric_limits<std::int64_t>::min();

    void add(Key key, std::int64_t member, ClassThreshold& result) {
        if (key != last) {
            if (true_positives + false_positives > 0) consider(result);
            last = key;
        }
        true_positives += member;
        false_positives += 1 - member;
    }

    // All samples at `last` and above have been counted: may that be the threshold?
    void consider(ClassThreshold& result) {
        const std::int64_t advantage = true_positives * result.nonmembers - false_positives * result.members;
        if (advantage > best_advantage) {
            best_advantage = advantage;
            best = last;
            result.true_positives = true_positives;
            result.false_positives = false_positives;
        }
    }
};

}  // namespace

template <class Score>
std::vector<ClassThreshold> class_thresholds(const Score* scores, const bool* labels, const std::int64_t* classes,
                                             std::int64_t count, std::int64_t n_classes) {
    using Key = KeyOf<Score>;
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    std::vector<ClassThreshold> results(n_classes + 1, {kNaN, 0, 0, 0, 0});
    std::vector<Tagged<Key>> items(count);
    for (std::int64_t i = 0; i < count; ++i) {
        refuse_nan("scores", scores[i], i);
        if (classes[i] < 0 || classes[i] >= n_classes) {
            throw std::invalid_argument("classes[" + std::to_string(i) + "] is " + std::to_string(classes[i]) +
                                        "; it must be in [0, " + std::to_string(n_classes) + ")");
        }
        items[i] = {key_of(scores[i]), static_cast<std::uint32_t>(2 * classes[i] + labels[i])};
        ++(labels[i] ? results[classes[i]].members : results[classes[i]].nonmembers);
    }
    ClassThreshold& all = results[n_classes];
    for (std::int64_t c = 0; c < n_classes; ++c) {
        all.members += results[c].members;
        all.nonmembers += results[c].nonmembers;
    }
    radix_sort(items);
    std::vector<Descent<Key>> descents(n_classes + 1);
    for (std::int64_t i = count - 1; i >= 0; --i) {
        const std::uint32_t c = items[i].tag / 2, member = items[i].tag % 2;
        descents[c].add(items[i].key, member, results[c]);
        descents[n_classes].add(items[i].key, member, all);
    }
    for (std::int64_t c = 0; c <= n_classes; ++c) {
        ClassThreshold& result = results[c];
        if (result.members == 0 || result.nonmembers == 0) {
            result.true_positives = result.false_positives = 0;
            continue;
        }
        descents[c].consider(result);
        result.threshold = static_cast<double>(score_of<Score>(descents[c].best));
    }
    return results;
}

template std::vector<ClassThreshold> class_thresholds(const float*, const bool*, const std::int64_t*, std::int64_t,
                                                      std::int64_t);
template std::vector<ClassThreshold> class_thresholds(const double*, const bool*, const std::int64_t*, std::int64_t,
                                                      std::int64_t);

}  // namespace nabla_tau
