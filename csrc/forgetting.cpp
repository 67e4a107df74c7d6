#include "forgetting.h"

#include <cmath>
#include <limits>
#include <vector>

#include "blocks.h"
#include "linspace.h"

namespace nabla_tau {
namespace {

// Samples of a block, which are sorted side by side in SIMD lanes.
constexpr std::int64_t kBlockSamples = 16;
constexpr double kNone = -std::numeric_limits<double>::infinity();

// log(k / n) and log(1 - delta - k / n) for k = 0 ... n, the latter -inf where there is no logarithm.
struct Logs {
    std::vector<double> rate, rest;

    void fill(std::size_t n, double delta) {
        if (rate.size() == n + 1) return;
        rate.resize(n + 1);
        rest.resize(n + 1);
        for (std::size_t k = 0; k <= n; ++k) {
            const double share = static_cast<double>(k) / static_cast<double>(n);
            rate[k] = std::log(share);
            rest[k] = share < 1 - delta ? std::log(1 - delta - share) : kNone;
        }
    }
};

template <class Real>
struct ForgettingScratch {
    std::vector<Real> gathered[2];  // kBlockSamples rows each
    std::vector<Real> margins[2];
    Logs logs[2];

    ForgettingScratch(std::int64_t unlearned, std::int64_t retrained) {
        gathered[0].resize(static_cast<std::size_t>(unlearned * kBlockSamples));
        gathered[1].resize(static_cast<std::size_t>(retrained * kBlockSamples));
    }
};

template <class Real>
double median(const std::vector<Real>& sorted) {
    const std::size_t n = sorted.size();
    return 0.5 * sorted[(n - 1) / 2] + 0.5 * sorted[n / 2];
}

template <class Real>
Real range(const std::vector<Real>& sorted) {
    return sorted.back() - sorted.front();
}

// The largest epsilon of the thresholds tried so far.
template <class Real>
class Attack {
public:
    Attack(const std::vector<Real>& positive, const std::vector<Real>& negative, const Logs& of_positive,
           const Logs& of_negative)
        : positive_(positive), negative_(negative), of_positive_(of_positive), of_negative_(of_negative) {}

    double best() const { return best_; }

    // A rule that calls so many of each group positive.
    void add(std::size_t hits, std::size_t alarms) {
        const std::size_t misses = positive_.size() - hits;
        if (misses == 0 && alarms == 0) best_ = std::numeric_limits<double>::infinity();
        if (misses == 0 || alarms == 0) return;
        const double epsilon = std::max(of_negative_.rest[alarms] - of_positive_.rate[misses],
                                        of_positive_.rest[misses] - of_negative_.rate[alarms]);
        if (epsilon > kNone) best_ = std::max(best_, std::max(epsilon, 0.0));
    }

    void every_margin() {
        std::size_t p = 0, n = 0;
        while (p < positive_.size() || n < negative_.size()) {
            add(positive_.size() - p, negative_.size() - n);
            const Real next = p == positive_.size()   ? negative_[n]
                              : n == negative_.size() ? positive_[p]
                                                      : std::min(positive_[p], negative_[n]);
            while (p < positive_.size() && positive_[p] == next) ++p;
            while (n < negative_.size() && negative_[n] == next) ++n;
        }
    }

    // As torch.linspace of float32, 100 points a unit of the joint range. Many points lie between two margins where
    // the range is wide; of those all but a few are passed over.
    void grid() {
        const Real low = std::min(positive_.front(), negative_.front());
        const Real high = std::max(positive_.back(), negative_.back());
        const double points = std::ceil((high - low) * 100);
        // Margins that far apart are no logits; the grid is finer than any two of them.
        if (!(points < 1e9)) return every_margin();
        const double last = points - 1;
        const auto start = static_cast<float>(low), stop = static_cast<float>(high);
        const auto step = static_cast<float>((stop - start) / last);
        std::size_t p = 0, n = 0;
        for (double i = 0; i < points;) {
            const float threshold = i < std::floor(points / 2) ? start + rounded(step * static_cast<float>(i))
                                                               : stop - rounded(step * static_cast<float>(last - i));
            while (p < positive_.size() && positive_[p] < threshold) ++p;
            while (n < negative_.size() && negative_[n] < threshold) ++n;
            add(positive_.size() - p, negative_.size() - n);
            Real next = std::numeric_limits<Real>::infinity();
            if (p < positive_.size()) next = positive_[p];
            if (n < negative_.size()) next = std::min(next, negative_[n]);
            const double steps = std::floor((static_cast<double>(next) - threshold) / step) - 2;
            i += steps > 1 ? steps : 1;
        }
    }

    // Intervals about as wide as the positive group, which must be the narrower one.
    void pairs() {
        const Real width = range(positive_), buffer = 2;
        const Real low = positive_.front() + width - buffer, high = positive_.back() + buffer;
        const Real points = std::ceil((high - low) * 100);
        // About 400 unless margins are so large that the buffer is lost in rounding.
        if (!(points < 4000)) return;
        const auto count = static_cast<std::int64_t>(points);
        const Linspace<Real> rights(low, high, count);
        std::size_t p_right = 0, n_right = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const Real right = rights[i];
            while (p_right < positive_.size() && positive_[p_right] <= right) ++p_right;
            while (n_right < negative_.size() && negative_[n_right] <= right) ++n_right;
            const Linspace<Real> lefts(right - width - buffer, right - width + buffer, 400);
            std::size_t p = 0, n = 0;
            for (std::int64_t k = 0; k < lefts.count; ++k) {
                const Real left = lefts[k];
                const std::size_t p_before = p, n_before = n;
                while (p < p_right && positive_[p] < left) ++p;
                while (n < n_right && negative_[n] < left) ++n;
                if (k == 0 || p != p_before || n != n_before) add(p_right - p, n_right - n);
            }
        }
    }

private:
    const std::vector<Real>&positive_, &negative_;
    const Logs &of_positive_, &of_negative_;
    double best_ = kNone;
};

template <class T>
struct ForgettingKernel {
    using Real = real_of<T>;

    const Cells<T>* groups[2];  // unlearned, retrained
    const ForgettingOptions& options;
    double* epsilon;

    NABLA_TAU_INLINE void operator()(std::int64_t block, ForgettingScratch<Real>& scratch) const {
        const std::int64_t first = block * kBlockSamples;
        const std::int64_t samples = std::min(kBlockSamples, groups[0]->samples - first);
        for (std::int64_t g = 0; g < 2; ++g) gather(*groups[g], first, samples, scratch.gathered[g]);
        for (std::int64_t n = 0; n < samples; ++n) epsilon[first + n] = of_sample(n, scratch);
    }

    // Margins of a block, each sample's in ascending order down the rows, those that are not finite last as infinity.
    static NABLA_TAU_INLINE void gather(const Cells<T>& cells, std::int64_t first, std::int64_t samples,
                                        std::vector<Real>& to) {
        Real buffer[kBlockSamples];
        for (std::int64_t m = 0; m < cells.models; ++m) {
            Real* row = to.data() + m * kBlockSamples;
            const Real* x = cells.row(m, first, samples, buffer);
            for (std::int64_t n = 0; n < samples; ++n) {
                row[n] = x[n] - x[n] == 0 ? x[n] : std::numeric_limits<Real>::infinity();
            }
        }
        sort_columns(to.data(), cells.models);
    }

    // Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M): its comparisons do not depend on the data.
    static NABLA_TAU_INLINE void sort_columns(Real* rows, std::int64_t count) {
        std::int64_t top = 1;
        while (2 * top < count) top *= 2;
        for (std::int64_t p = count > 1 ? top : 0; p > 0; p /= 2) {
            std::int64_t distance = p, rest = 0;
            for (std::int64_t q = top;; q /= 2) {
                for (std::int64_t i = 0; i + distance < count; ++i) {
                    if ((i & p) == rest) order(rows + i * kBlockSamples, rows + (i + distance) * kBlockSamples);
                }
                if (q == p) break;
                distance = q - p;
                rest = p;
            }
        }
    }

    static NABLA_TAU_INLINE void order(Real* low, Real* high) {
#pragma omp simd
        for (std::int64_t n = 0; n < kBlockSamples; ++n) {
            const Real a = low[n], b = high[n];
            low[n] = a < b ? a : b;
            high[n] = a < b ? b : a;
        }
    }

    double of_sample(std::int64_t n, ForgettingScratch<Real>& scratch) const {
        for (int g = 0; g < 2; ++g) {
            auto& margins = scratch.margins[g];
            margins.clear();
            for (std::int64_t m = 0; m < groups[g]->models; ++m) {
                const Real x = scratch.gathered[g][static_cast<std::size_t>(m * kBlockSamples + n)];
                if (x - x == 0) margins.push_back(x);
            }
            if (margins.empty()) return std::numeric_limits<double>::quiet_NaN();
            scratch.logs[g].fill(margins.size(), options.delta);
        }
        const int larger = median(scratch.margins[1]) > median(scratch.margins[0]) ? 1 : 0;
        const auto attack = [&](int positive) {
            return Attack<Real>(scratch.margins[positive], scratch.margins[1 - positive], scratch.logs[positive],
                                scratch.logs[1 - positive]);
        };
        Attack<Real> single = attack(larger);
        if (options.rule == ThresholdRule::exact) {
            single.every_margin();
            return capped(single.best());
        }
        const Real widths[] = {range(scratch.margins[0]), range(scratch.margins[1])};
        if (std::min(widths[0], widths[1]) / std::max(widths[0], widths[1]) < Real(0.01)) return options.cap;
        single.grid();
        // Of equally wide groups, that of the smaller median.
        const int narrow = widths[larger] >= widths[1 - larger] ? 1 - larger : larger;
        Attack<Real> pair = attack(narrow);
        pair.pairs();
        return capped(std::max(single.best(), pair.best()));
    }

    double capped(double best) const {
        return best == kNone ? std::numeric_limits<double>::quiet_NaN() : std::min(best, options.cap);
    }
};

}  // namespace

template <class T>
void forgetting_epsilon(const Cells<T>& unlearned, const Cells<T>& retrained, const ForgettingOptions& options,
                        double* epsilon, int threads) {
    for_blocks(ForgettingKernel<T>{{&unlearned, &retrained}, options, epsilon},
               (unlearned.samples + kBlockSamples - 1) / kBlockSamples,
               ForgettingScratch<real_of<T>>(unlearned.models, retrained.models), threads);
}

template void forgetting_epsilon(const Cells<float16>&, const Cells<float16>&, const ForgettingOptions&, double*, int);
template void forgetting_epsilon(const Cells<float>&, const Cells<float>&, const ForgettingOptions&, double*, int);
template void forgetting_epsilon(const Cells<double>&, const Cells<double>&, const ForgettingOptions&, double*, int);

}  // namespace nabla_tau
