#include "objective.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace nabla_tau {
namespace {

// A group of rows, all forget or all retain, in the order of the batch.
template <class T>
struct Group {
    using Real = real_of<T>;

    std::vector<std::int64_t> ids;
    Rows<T> rows;
    const Real* base;
    double samples;
    double per_sample;

    Group(const Rows<T>& all, const Objective<Real>& objective, bool forget) : rows(all), base(objective.base) {
        ids.reserve(all.count);
        for (std::int64_t i = 0; i < all.count; ++i) {
            if (objective.forget[i] == forget) ids.push_back(i);
        }
        rows.count = static_cast<std::int64_t>(ids.size());
        rows.order = ids.data();
        if (base) {
            samples = forget ? objective.forget_count : objective.retain_count;
        } else {
            samples = std::count_if(ids.begin(), ids.end(), [&](std::int64_t i) { return all.kept(i); });
        }
        per_sample = 1 / std::max(samples, 1.0);
    }

    // Not copied: `rows` points into `ids`.
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    double share(std::int64_t i) const {
        if (!rows.kept(i)) return 0;
        return base ? per_sample * static_cast<double>(base[i]) : per_sample;
    }

    // Mean of value(i) over samples. A row without a share is left out, not multiplied: it may be infinite.
    template <class Value>
    double mean(const Value& value) const {
        double sum = 0;
        for (const std::int64_t i : ids) {
            const double part = share(i);
            if (part != 0) sum += part * value(i);
        }
        return sum;
    }

    template <class Value>
    void weigh(Real* weights, const Value& value) const {
        for (const std::int64_t i : ids) {
            const double part = share(i);
            weights[i] = part == 0 ? 0 : static_cast<Real>(part * value(i));
        }
    }
};

// As torch does: NaN for NaN.
double relu(double x) { return x < 0 ? 0 : x; }

double raised(double x, int power) { return power == 2 ? x * x : x; }

// d relu(x)^power / dx
double slope(double x, int power) {
    if (x <= 0) return 0;
    return power == 2 ? 2 * x : 1;
}

}  // namespace

template <class T>
void nabla_tau_rows(const Rows<T>& rows, const Objective<real_of<T>>& objective, const RowSignals<real_of<T>>& signals,
                    real_of<T>* terms, real_of<T>* weights, T* gradient, int threads) {
    using Real = real_of<T>;
    const auto& [mask, tau, alpha, gate, power, base, forget_count, retain_count] = objective;
    const Group<T> forget(rows, objective, true), retain(rows, objective, false);
    const auto loss = [&](std::int64_t i) { return static_cast<double>(signals.loss[i]); };

    rows_forward(forget.rows, signals, threads);
    const double forget_loss = forget.mean(loss);
    double forget_term, gate_open;
    if (gate == Gate::sample) {
        const auto gap = [&](std::int64_t i) { return tau - loss(i); };
        forget_term = forget.mean([&](std::int64_t i) { return raised(relu(gap(i)), power); });
        gate_open = forget.mean([&](std::int64_t i) { return gap(i) > 0 ? 1.0 : 0.0; });
        forget.weigh(weights, [&](std::int64_t i) { return -alpha * slope(gap(i), power); });
    } else {
        const double gap = forget.samples > 0 ? tau - forget_loss : 0;
        const bool down = gate == Gate::two_sided && gap < 0;
        const double size = down ? -gap : relu(gap);
        forget_term = raised(size, power);
        gate_open = gate == Gate::two_sided ? forget.samples > 0 : gap > 0;
        const double pull = (down ? alpha : -alpha) * slope(size, power);
        forget.weigh(weights, [&](std::int64_t) { return pull; });
    }
    retain.weigh(weights, [&](std::int64_t) { return 1 - alpha; });

    if (gradient) {
        rows_backward(forget.rows, signals.lse, signals.margin, weights, gradient, threads);
        rows_gradient(retain.rows, weights, signals, gradient, threads);
    } else {
        rows_forward(retain.rows, signals, threads);
    }
    const double retain_loss = retain.mean(loss);
    const double values[kTerms] = {alpha * forget_term + (1 - alpha) * retain_loss, forget_term, forget_loss,
                                   retain_loss, gate_open};
    std::transform(values, values + kTerms, terms, [](double value) { return static_cast<Real>(value); });
}

#define NABLA_TAU_OBJECTIVE(T)                                                                                     \
    template void nabla_tau_rows(const Rows<T>&, const Objective<real_of<T>>&, const RowSignals<real_of<T>>&,      \
                                 real_of<T>*, real_of<T>*, T*, int);
NABLA_TAU_OBJECTIVE(float)
NABLA_TAU_OBJECTIVE(double)
NABLA_TAU_OBJECTIVE(float16)
NABLA_TAU_OBJECTIVE(bfloat16)
#undef NABLA_TAU_OBJECTIVE

}  // namespace nabla_tau
