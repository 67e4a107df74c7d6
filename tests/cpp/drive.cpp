// Every kernel over ragged sizes, dtypes, thread counts and extreme logits, for the sanitizers (`make sanitize`): on
// buffers of exactly the size they need, and with a check that results are finite and alike at any number of threads.
// That they are right is what the tests in Python are for.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/block_pool.h"
#include "../../csrc/bootstrap.h"
#include "../../csrc/class_thresholds.h"
#include "../../csrc/forgetting.h"
#include "../../csrc/group_moments.h"
#include "../../csrc/klom.h"
#include "../../csrc/multilabel.h"
#include "../../csrc/objective.h"
#include "../../csrc/roc.h"
#include "../../csrc/simd.h"
#include "drive_update.h"
#include "fuzz.h"
#include "require.h"

using namespace nabla_tau;

namespace {

// What one op has written: all of it, as bytes, and as numbers.
template <class T>
struct Output {
    using Real = real_of<T>;
    std::vector<Real> loss, lse, entropy, margin, p_max, grad_sq, weights, terms;
    std::vector<unsigned char> correct;
    std::vector<T> gradient;

    Output(std::int64_t count, std::int64_t classes)
        : loss(count), lse(count), entropy(count), margin(count), p_max(count), grad_sq(count), weights(count),
          terms(kTerms), correct(count), gradient(count * classes) {}

    RowSignals<Real> signals() {
        return {loss.data(),  lse.data(),     entropy.data(), margin.data(),
                p_max.data(), grad_sq.data(), reinterpret_cast<bool*>(correct.data())};
    }

    template <class F>
    void each(F f) const {
        for (const auto* values : {&loss, &lse, &entropy, &margin, &p_max, &grad_sq, &weights, &terms}) f(*values);
        f(gradient);
    }

    bool finite() const {
        bool all = true;
        each([&](const auto& values) {
            for (const auto& value : values) all = all && std::isfinite(load(value));
        });
        return all;
    }

    bool same(const Output& other) const {
        std::vector<unsigned char> mine = correct, theirs = other.correct;
        const auto append = [](std::vector<unsigned char>& to) {
            return [&to](const auto& values) {
                const auto* data = reinterpret_cast<const unsigned char*>(values.data());
                to.insert(to.end(), data, data + values.size() * sizeof(values[0]));
            };
        };
        each(append(mine));
        other.each(append(theirs));
        return mine == theirs;
    }
};

enum class Logits { normal, memorised, extreme };

template <class T>
struct Batch {
    using Real = real_of<T>;
    std::int64_t count, classes;
    std::vector<T> logits;
    std::vector<std::int64_t> targets;
    std::vector<Real> weights, class_weights, labels;
    std::vector<unsigned char> forget;

    Batch(std::int64_t n, std::int64_t v, Logits kind)
        : count(n), classes(v), logits(n * v), targets(n), weights(n), class_weights(v, Real(0.5)), labels(n * v),
          forget(n) {
        std::mt19937 random(static_cast<unsigned>(n * 1009 + v));
        std::normal_distribution<float> normal(0.0f, 3.0f);
        constexpr float kInfinity = std::numeric_limits<float>::infinity();
        const float extremes[] = {kInfinity, -kInfinity, std::nanf(""), 6e4f, -6e4f, 0.0f, -0.0f, 1e-7f};
        for (T& z : logits) store(static_cast<Real>(kind == Logits::extreme ? extremes[random() % 8] : normal(random)), z);
        for (std::int64_t i = 0; i < n; ++i) {
            targets[i] = i % 5 == 3 ? -100 : static_cast<std::int64_t>(random() % v);
            weights[i] = i % 7 == 2 ? 0 : Real(normal(random));
            forget[i] = random() % 2;
            if (kind == Logits::memorised && targets[i] >= 0) store(Real(60), logits[i * v + targets[i]]);
        }
        for (Real& label : labels) label = Real(random() % 2);
    }

    Rows<T> rows(Real smoothing, bool weighted) const {
        return {logits.data(), targets.data(), count, classes, -100, smoothing,
                weighted ? class_weights.data() : nullptr};
    }
};

// Runs an op at several thread counts into outputs that must agree.
template <class T, class Op>
void at_any_threads(const Batch<T>& batch, bool finite, const char* name, const Op& op) {
    Output<T> one(batch.count, batch.classes);
    op(one, 1);
    require(!finite || one.finite(), name);
    for (const int threads : {2, 5}) {
        Output<T> more(batch.count, batch.classes);
        op(more, threads);
        require(one.same(more), name);
    }
}

template <class T>
void drive_rows(const Batch<T>& batch, bool finite) {
    using Real = real_of<T>;
    for (const Real smoothing : {Real(0), Real(0.125)}) {
        for (const bool weighted : {false, true}) {
            const Rows<T> rows = batch.rows(smoothing, weighted);
            at_any_threads(batch, finite, "forward and backward", [&](Output<T>& out, int threads) {
                rows_forward(rows, out.signals(), threads);
                rows_backward(rows, out.lse.data(), out.margin.data(), batch.weights.data(), out.gradient.data(),
                              threads);
            });
            at_any_threads(batch, finite, "gradient", [&](Output<T>& out, int threads) {
                rows_gradient(rows, static_cast<const Real*>(nullptr), out.signals(), out.gradient.data(), threads);
            });
            at_any_threads(batch, finite, "gradient in place", [&](Output<T>& out, int threads) {
                out.gradient = batch.logits;
                Rows<T> own = rows;
                own.logits = out.gradient.data();
                rows_gradient(own, batch.weights.data(), out.signals(), out.gradient.data(), threads);
            });
        }
    }
    const double share = 1.0 / static_cast<double>(std::max<std::int64_t>(batch.count, 1));
    const std::vector<Real> base(batch.count, Real(share));
    for (const Real* of_rows : {static_cast<const Real*>(nullptr), base.data()}) {
        at_any_threads(batch, finite, "mean", [&](Output<T>& out, int threads) {
            const double samples = of_rows ? 3 : -1;
            out.terms[0] = Real(rows_mean(batch.rows(0, false), of_rows, 0.5, samples, out.gradient.data(), threads));
        });
    }
    for (const Gate gate : {Gate::batch, Gate::two_sided, Gate::sample}) {
        for (const double tau : {-1.0, 50.0}) {
            const bool* forget = reinterpret_cast<const bool*>(batch.forget.data());
            const Objective<Real> objective{forget, tau, 0.25, gate, 2, nullptr, 0, 0};
            at_any_threads(batch, finite, "objective", [&](Output<T>& out, int threads) {
                nabla_tau_rows(batch.rows(0, false), objective, out.signals(), out.terms.data(), out.weights.data(),
                               out.gradient.data(), threads);
            });
        }
    }
    const LabelRows<T> labels{batch.logits.data(), batch.labels.data(), batch.count, batch.classes};
    at_any_threads(batch, finite, "multilabel", [&](Output<T>& out, int threads) {
        multilabel_forward(labels, out.signals(), threads);
        multilabel_backward(labels, batch.weights.data(), out.gradient.data(), threads);
    });
}

template <class T>
void drive() {
    const std::int64_t sizes[][2] = {{0, 10},  {1, 1},   {1, 2},    {7, 10},   {16, 15},  {33, 16},   {3301, 10}, {5, 17},
                                     {9, 64},  {520, 64}, {17, 65},  {5, 511},  {5, 512},  {67, 513},  {3, 1003},  {5, 9001}};
    for (const auto& [count, classes] : sizes) {
        for (const Logits kind : {Logits::normal, Logits::memorised, Logits::extreme}) {
            // With one class the margin is infinite.
            drive_rows(Batch<T>(count, classes, kind), kind != Logits::extreme && classes > 1);
        }
    }
    Batch<T> ignored(6, 20, Logits::normal);
    ignored.targets.assign(6, -100);
    drive_rows(ignored, true);
}

void drive_roc() {
    std::mt19937 random(0);
    for (const std::size_t count : {2u, 100u, 5000u}) {
        std::vector<float> scores(count);
        std::vector<unsigned char> labels(count);
        for (std::size_t i = 0; i < count; ++i) {
            scores[i] = static_cast<float>(random() % 100);
            labels[i] = i % 2;
        }
        const bool* positive = reinterpret_cast<const bool*>(labels.data());
        const RocCurve curve = roc(scores.data(), positive, static_cast<std::int64_t>(count));
        require(curve.auc >= 0 && curve.auc <= 1, "auc");
        require(curve.fpr.back() == 1 && curve.tpr.back() == 1, "roc");
    }
}

void drive_attacks() {
    std::mt19937 random(1);
    for (const std::int64_t count : {1, 2, 300, 5001}) {
        std::vector<double> members(count), nonmembers(2 * count);
        for (auto* scores : {&members, &nonmembers}) {
            for (double& score : *scores) score = static_cast<double>(random() % 50);
        }
        const auto ranks = rank(members.data(), count, nonmembers.data(), 2 * count);
        std::vector<double> of_members(count), of_nonmembers(2 * count);
        placements(ranks, of_members.data(), of_nonmembers.data());
        const BootstrapJob job{{ranks, ranks}, {0, 1}, 7, 20};
        std::vector<double> auc_1(2 * 21), tpr_1(4 * 21), auc_3(2 * 21), tpr_3(4 * 21);
        bootstrap(job, auc_1.data(), tpr_1.data(), 1);
        bootstrap(job, auc_3.data(), tpr_3.data(), 3);
        require(auc_1 == auc_3 && tpr_1 == tpr_3, "bootstrap at any number of threads");

        std::vector<std::int64_t> classes(count);
        std::vector<unsigned char> labels(count);
        for (std::int64_t i = 0; i < count; ++i) classes[i] = i % 3, labels[i] = random() % 2;
        const auto* positive = reinterpret_cast<const bool*>(labels.data());
        require(class_thresholds(members.data(), positive, classes.data(), count, 3).size() == 4, "class thresholds");
    }
}

// Scores [models, samples, queries] in a buffer of exactly that size, some of them not finite; every second sample of
// a wider one when strided.
template <class T>
struct Scores {
    std::vector<T> values;
    Cells<T> cells;

    Scores(std::int64_t models, std::int64_t samples, std::int64_t queries, bool strided, int seed) {
        const std::int64_t step = strided ? 2 : 1, size = sizeof(T);
        values.resize(models * samples * step * queries);
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        for (T& value : values) {
            const float number = random() % 97 == 0 ? std::numeric_limits<float>::infinity() : 3 * normal(random);
            if constexpr (std::is_same_v<T, float16>) {
                store(number, value);
            } else {
                value = number;
            }
        }
        const auto* data = reinterpret_cast<const char*>(values.data());
        cells = {data, models, samples, queries, samples * step * queries * size, step * queries * size, size};
    }
};

template <class T>
void drive_shadows() {
    const std::int64_t sizes[][3] = {{2, 1, 1}, {5, 7, 1}, {17, 33, 3}, {64, 515, 1}, {9, 1030, 2}};
    for (const auto& [models, samples, queries] : sizes) {
        for (const bool strided : {false, true}) {
            const Scores<T> scores(models, samples, queries, strided, 0);
            const std::int64_t bytes = (samples + 7) / 8;
            std::vector<unsigned char> bits(models * bytes);
            std::mt19937 random(2);
            for (auto& byte : bits) byte = static_cast<unsigned char>(random());
            const Membership group{reinterpret_cast<const char*>(bits.data()), bytes, 1, true};
            const std::int64_t columns = samples * queries;
            const GroupOptions options{{-1, 3}, queries > 1, false};
            std::vector<std::vector<double>> found;
            for (const int threads : {1, 3}) {
                std::vector<std::int32_t> counts(2 * columns);
                std::vector<double> mean(2 * columns), m2(2 * columns), scatter(2 * columns * queries), median(2 * columns);
                group_moments(scores.cells, group, options, KnownMoments{},
                              Moments{counts.data(), mean.data(), m2.data(), queries > 1 ? scatter.data() : nullptr},
                              threads);
                group_medians(scores.cells, group, options, median.data(), threads);
                std::vector<double> all(counts.begin(), counts.end());
                for (const auto* part : {&mean, &m2, &scatter, &median}) all.insert(all.end(), part->begin(), part->end());
                found.push_back(all);
            }
            require(std::memcmp(found[0].data(), found[1].data(), found[0].size() * sizeof(double)) == 0,
                    "groups at any number of threads");
            if (queries > 1) continue;
            const Scores<T> others(models + 3, samples, 1, strided, 5);
            std::vector<double> epsilon(samples), divergence(samples);
            for (const ThresholdRule rule : {ThresholdRule::exact, ThresholdRule::published}) {
                // The grids of the published rule are long, and instrumented code is slow.
                if (rule == ThresholdRule::published && samples > 40) continue;
                forgetting_epsilon(scores.cells, others.cells, {rule, 1e-5, 50}, epsilon.data(), 3);
            }
            klom(scores.cells, others.cells, {20, 100, 1e-5, false}, divergence.data(), 3);
        }
    }
}

void drive_targets() {
    const std::int64_t targets[] = {0, -100, 7};
    try {
        check_targets(targets, 3, 7, -100);
    } catch (const std::invalid_argument&) {
        return;
    }
    require(false, "a target out of range is refused");
}

void drive_pool() {
    BlockPool pool;
    const auto work = [&pool](int thread) {
        for (int round = 0; round < 200; ++round) {
            const std::size_t size = BlockPool::kSmallest / 2 << (round % 4);
            const BlockPool::Block block = pool.take(size);
            require(block.size >= size, "a block is large enough");
            std::memset(block.data, thread, size);
            std::this_thread::yield();
            const auto* bytes = static_cast<const unsigned char*>(block.data);
            require(bytes[0] == thread && bytes[size - 1] == thread, "a block has one owner");
            pool.give(block);
        }
    };
    std::vector<std::thread> team;
    for (int thread = 0; thread < 4; ++thread) team.emplace_back(work, thread);
    for (std::thread& member : team) member.join();
}

}  // namespace

// Without arguments all of it and some rounds of fuzzing; with two, only the fuzzing from round FIRST on.
int main(int argc, char** argv) {
    if (argc == 3) {
        fuzz(std::strtoull(argv[1], nullptr, 10), std::strtoull(argv[2], nullptr, 10));
        return 0;
    }
    drive<float>();
    drive<double>();
    drive<float16>();
    drive<bfloat16>();
    drive_roc();
    drive_attacks();
    drive_shadows<float>();
    drive_shadows<double>();
    drive_shadows<float16>();
    drive_update<float>();
    drive_update<double>();
    drive_update<float16>();
    drive_update<bfloat16>();
    drive_targets();
    drive_pool();
    fuzz(0, 100);
    std::printf("every kernel ran at %s\n", simd_level());
}
