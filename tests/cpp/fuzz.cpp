// Random jobs for the statistics over many models and over one: any sizes, strides (also backwards, repeated and
// unaligned), dtypes, ties, infinities and NaN, in buffers without a byte to spare. The sanitizers watch the memory;
// what is checked here is that a result depends neither on how its input lies in memory nor on the number of threads,
// and that it is a number where it has to be one.
#include "fuzz.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/bootstrap.h"
#include "../../csrc/class_thresholds.h"
#include "../../csrc/forgetting.h"
#include "../../csrc/group_moments.h"
#include "../../csrc/klom.h"
#include "../../csrc/roc.h"

namespace {

using namespace nabla_tau;
using Random = std::mt19937_64;

std::uint64_t current;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed in round %llu: %s\n", static_cast<unsigned long long>(current), what);
    std::exit(1);
}

std::int64_t below(Random& random, std::int64_t limit) { return static_cast<std::int64_t>(random() % limit); }

bool one_in(Random& random, std::int64_t n) { return below(random, n) == 0; }

// What a number may look like; the kind is drawn once for a job, since ties come in masses.
double number(Random& random, int kind) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double x = std::normal_distribution<double>()(random);
    if (kind == 1) return std::round(x);
    if (kind == 2) return x * 1e30;
    if (kind == 3) return 0.5;
    if (kind == 4 && one_in(random, 5)) return std::array<double, 3>{kInfinity, -kInfinity, std::nan("")}[random() % 3];
    if (kind == 5) return x * 1e-40;
    return x;
}

template <class T>
T stored(double value) {
    if constexpr (std::is_same_v<T, float16>) {
        T half;
        store(static_cast<float>(value), half);
        return half;
    } else {
        return static_cast<T>(value);
    }
}

// The same scores [models, samples, queries] twice: packed, and lying about in some other way.
template <class T>
struct Twice {
    std::vector<char> packed, spread;
    Cells<T> plain, odd;

    Twice(Random& random, std::int64_t models, std::int64_t samples, std::int64_t queries, int kind) {
        constexpr std::int64_t kSize = sizeof(T);
        const std::int64_t shape[3] = {models, samples, queries};
        packed.resize(models * samples * queries * kSize);
        plain = {packed.data(), models, samples, queries, samples * queries * kSize, queries * kSize, kSize};
        // Axes in any order, some with a gap between elements, of which the first may be off by one byte.
        int order[3] = {0, 1, 2};
        std::shuffle(order, order + 3, random);
        std::int64_t stride[3], extent = kSize;
        for (const int axis : order) {
            stride[axis] = extent * (1 + below(random, 2));
            extent = stride[axis] * (shape[axis] - 1) + extent;
        }
        const std::int64_t shift = one_in(random, 3);
        spread.resize(extent + shift);
        const char* start = spread.data() + shift;
        for (int axis = 0; axis < 3; ++axis) {
            if (!one_in(random, 3)) continue;
            start += stride[axis] * (shape[axis] - 1);
            stride[axis] = -stride[axis];
        }
        odd = {start, models, samples, queries, stride[0], stride[1], stride[2]};
        for (std::int64_t m = 0; m < models; ++m) {
            for (std::int64_t n = 0; n < samples; ++n) {
                for (std::int64_t a = 0; a < queries; ++a) {
                    const T value = stored<T>(number(random, kind));
                    std::memcpy(packed.data() + ((m * samples + n) * queries + a) * kSize, &value, kSize);
                    const char* to = start + m * stride[0] + n * stride[1] + a * stride[2];
                    std::memcpy(const_cast<char*>(to), &value, kSize);
                }
            }
        }
    }
};

// The same groups twice: a bit each, and a byte each in some other layout.
struct Groups {
    std::vector<char> bits, bytes;
    Membership packed, plain;

    Groups(Random& random, std::int64_t models, std::int64_t samples) {
        const std::int64_t width = (samples + 7) / 8, gap = 1 + below(random, 2);
        const bool by_sample = one_in(random, 2);
        bits.resize(models * width);
        bytes.resize((models * samples - 1) * gap + 1);
        const std::int64_t of_model = by_sample ? gap : samples * gap, of_sample = by_sample ? models * gap : gap;
        const int share = static_cast<int>(below(random, 5));
        for (std::int64_t m = 0; m < models; ++m) {
            for (std::int64_t n = 0; n < samples; ++n) {
                const bool member = below(random, 4) < share;
                bits[m * width + n / 8] |= static_cast<char>(member << (7 - n % 8));
                bytes[m * of_model + n * of_sample] = member;
            }
        }
        packed = {bits.data(), width, 1, true};
        plain = {bytes.data(), of_model, of_sample, false};
    }
};

bool same(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) {
               return x == y || (std::isnan(x) && std::isnan(y));
           });
}

template <class T>
std::vector<double> group_numbers(const Cells<T>& cells, const Membership& group, const GroupOptions& options,
                                  int threads) {
    const std::int64_t columns = 2 * cells.samples * cells.queries;
    const bool joint = options.whole;
    std::vector<std::int32_t> count(columns);
    std::vector<double> mean(columns), m2(columns), scatter(joint ? columns * cells.queries : 0), median(columns);
    const Moments out{count.data(), mean.data(), m2.data(), joint ? scatter.data() : nullptr};
    group_moments(cells, group, options, KnownMoments{}, out, threads);
    // Once more on top of itself, as a stream does.
    std::vector<std::int32_t> count_2(columns);
    std::vector<double> mean_2(columns), m2_2(columns), scatter_2(scatter.size());
    const KnownMoments known{count.data(), mean.data(), m2.data(), joint ? scatter.data() : nullptr};
    const Moments twice{count_2.data(), mean_2.data(), m2_2.data(), joint ? scatter_2.data() : nullptr};
    group_moments(cells, group, options, known, twice, threads);
    for (std::int64_t c = 0; c < columns; ++c) {
        require(count[c] >= 0 && count[c] <= cells.models && count_2[c] == 2 * count[c], "counts of models");
        require(!(m2[c] < 0), "a sum of squares is not negative");
    }
    if (!options.sigmoid) group_medians(cells, group, options, median.data(), threads);
    std::vector<double> all(count.begin(), count.end());
    for (const auto* part : {&mean, &m2, &scatter, &median, &mean_2, &m2_2, &scatter_2}) {
        all.insert(all.end(), part->begin(), part->end());
    }
    return all;
}

template <class T>
void groups(Random& random) {
    const std::int64_t models = 1 + below(random, one_in(random, 8) ? 300 : 12);
    const std::int64_t samples = 1 + below(random, one_in(random, 8) ? 700 : 40), queries = 1 + below(random, 4);
    const Twice<T> scores(random, models, samples, queries, static_cast<int>(below(random, 6)));
    const Groups group(random, models, samples);
    const GroupOptions options{{below(random, 6) - 1, below(random, 6) - 1}, one_in(random, 3), one_in(random, 4)};
    const auto plain = group_numbers(scores.plain, group.packed, options, 1);
    require(same(plain, group_numbers(scores.odd, group.plain, options, 3)), "groups, however they lie");
}

template <class T>
void comparisons(Random& random) {
    const std::int64_t samples = 1 + below(random, 30);
    const int kind = static_cast<int>(below(random, 6));
    const Twice<T> first(random, 1 + below(random, 40), samples, 1, kind);
    const Twice<T> second(random, 1 + below(random, 40), samples, 1, kind);
    std::vector<double> plain(samples), odd(samples);
    // The published rule lays a grid of a hundred points a unit over the range.
    const bool exact = kind == 2 || one_in(random, 2);
    const ForgettingOptions options{exact ? ThresholdRule::exact : ThresholdRule::published, 1e-5, 50};
    forgetting_epsilon(first.plain, second.plain, options, plain.data(), 1);
    forgetting_epsilon(first.odd, second.odd, options, odd.data(), 3);
    require(same(plain, odd), "epsilon, however the margins lie");
    for (const double epsilon : plain) require(std::isnan(epsilon) || (epsilon >= 0 && epsilon <= 50), "epsilon");
    const KlomOptions histogram{1 + below(random, 25), 100, 1e-5, one_in(random, 2)};
    klom(first.plain, second.plain, histogram, plain.data(), 1);
    klom(first.odd, second.odd, histogram, odd.data(), 3);
    require(same(plain, odd), "divergence, however the margins lie");
    for (const double divergence : plain) require(std::isnan(divergence) || divergence > -1e-9, "divergence");
}

template <class Score>
void attacks(Random& random) {
    const std::int64_t count = 2 + below(random, one_in(random, 8) ? 6000 : 60);
    const int kind = static_cast<int>(below(random, 6));
    std::vector<Score> scores(count), members, others;
    std::vector<unsigned char> labels(count);
    std::vector<std::int64_t> classes(count);
    bool has_nan = false;
    for (std::int64_t i = 0; i < count; ++i) {
        scores[i] = static_cast<Score>(number(random, kind));
        labels[i] = i < 2 ? static_cast<unsigned char>(i) : random() % 2;
        classes[i] = below(random, 4);
        has_nan |= std::isnan(scores[i]);
        (labels[i] ? members : others).push_back(scores[i]);
    }
    const auto* positive = reinterpret_cast<const bool*>(labels.data());
    const auto of = [](const auto& values) { return static_cast<std::int64_t>(values.size()); };
    try {
        const RocCurve curve = roc(scores.data(), positive, count);
        require(curve.auc >= 0 && curve.auc <= 1 && curve.fpr.back() == 1 && curve.tpr.back() == 1, "roc");
        require(std::is_sorted(curve.fpr.begin(), curve.fpr.end()), "false-positive rates rise");
        require(std::is_sorted(curve.tpr.begin(), curve.tpr.end()), "true-positive rates rise");
        const Ranks ranks = rank(members.data(), of(members), others.data(), of(others));
        std::vector<double> in(members.size()), out(others.size());
        placements(ranks, in.data(), out.data());
        const double mean = std::accumulate(in.begin(), in.end(), 0.0) / static_cast<double>(in.size());
        require(std::abs(mean - curve.auc) < 1e-12, "placements average to the area");
        const BootstrapJob job{{ranks}, {0, static_cast<std::uint32_t>(below(random, of(others)))}, random(), 5};
        std::vector<double> auc(6), tpr(12), auc_3(6), tpr_3(12);
        bootstrap(job, auc.data(), tpr.data(), 1);
        bootstrap(job, auc_3.data(), tpr_3.data(), 3);
        require(auc == auc_3 && tpr == tpr_3, "bootstrap at any number of threads");
        require(std::abs(auc[0] - curve.auc) < 1e-12, "the bootstrap starts from the samples themselves");
        require(class_thresholds(scores.data(), positive, classes.data(), count, 4).size() == 5, "class thresholds");
        require(!has_nan, "NaN is refused");
    } catch (const std::invalid_argument&) {
        require(has_nan, "only NaN is refused");
    }
}

}  // namespace

void fuzz(std::uint64_t first, std::uint64_t rounds) {
    for (current = first; current < first + rounds; ++current) {
        Random random(current);
        groups<float>(random);
        groups<double>(random);
        groups<float16>(random);
        comparisons<float>(random);
        comparisons<double>(random);
        comparisons<float16>(random);
        attacks<float>(random);
        attacks<double>(random);
    }
}
