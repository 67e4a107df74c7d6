#include "update.h"

#include <cmath>
#include <vector>

#include "update_pieces.h"

namespace nabla_tau {
namespace {

// What stays in the first-level cache between two loops over it.
constexpr int kBlock = 512;

template <class T>
struct Gradient {
    using Real = real_of<T>;
    const T* forget;
    const T* retain;
    Real forget_scale, retain_scale;
    std::int64_t number;

    Gradient(const Table& table, std::int64_t row, const Scales& scales)
        : forget(table.address<const T>(row, kForget)), retain(table.address<const T>(row, kRetain)),
          forget_scale(static_cast<Real>(table.number(row, kSign) * scales.forget)),
          retain_scale(static_cast<Real>(table.number(row, kSign) * scales.retain)),
          number(table.integer(row, kNumber)) {
        if (forget == nullptr) {
            forget = retain;
            forget_scale = retain_scale;
            retain = nullptr;
        }
    }

    // The gradient of the numbers [begin, begin + count).
    NABLA_TAU_INLINE void fill(std::int64_t begin, int count, const Noise* noise, Real (&g)[kBlock]) const {
        const T* f = forget + begin;
        const Real a = forget_scale, b = retain_scale;
        if (retain == nullptr) {
#pragma omp simd
            for (int j = 0; j < count; ++j) g[j] = a * load(f[j]);
        } else {
            const T* r = retain + begin;
#pragma omp simd
            for (int j = 0; j < count; ++j) g[j] = a * load(f[j]) + b * load(r[j]);
        }
        if (noise) add_noise<Real, kBlock / 4>(*noise, begin, number, g);
    }
};

// All ones where an entry moves, as wide as the numbers: a loop over bytes and numbers at once is not vectorised.
template <class Real>
using Bits = typename Exp<Real>::Bits;

// Where an entry does not move, what was there is written back.
template <class T, bool kMasked>
NABLA_TAU_INLINE void put(real_of<T> value, const Bits<real_of<T>>* moves, int j, T& to) {
    using Real = real_of<T>;
    if constexpr (kMasked) {
        const auto there = bits_as<Bits<Real>>(load(to));
        value = bits_as<Real>((bits_as<Bits<Real>>(value) & moves[j]) | (there & ~moves[j]));
    }
    store(value, to);
}

template <class T>
struct AdamW {
    using Real = real_of<T>;
    Gradient<T> gradient;
    T *parameter, *first, *second;
    const bool* mask;
    Real keep, beta1, rest1, beta2, rest2, size, root, eps;
    bool near;

    AdamW(const Table& table, std::int64_t row, const Scales& scales)
        : gradient(table, row, scales), parameter(table.address<T>(row, kParameter)),
          first(table.address<T>(row, kFirst)), second(table.address<T>(row, kSecond)),
          mask(table.address<const bool>(row, kMask)) {
        const double rate = table.number(row, kRate), b1 = table.number(row, kBeta1), b2 = table.number(row, kBeta2);
        const double step = *table.address<const float>(row, kStep);
        keep = static_cast<Real>(1 - rate * table.number(row, kDecay));
        beta1 = static_cast<Real>(b1), rest1 = static_cast<Real>(1 - b1);
        beta2 = static_cast<Real>(b2), rest2 = static_cast<Real>(1 - b2);
        size = static_cast<Real>(rate / (1 - std::pow(b1, step)));
        root = static_cast<Real>(1 / std::sqrt(1 - std::pow(b2, step)));
        eps = static_cast<Real>(table.number(row, kEps));
        near = rest1 < Real(0.5);
    }

    template <bool kMasked>
    NABLA_TAU_INLINE void block(std::int64_t begin, int count, const Real* g, const Bits<Real>* moves) const {
        T *p = parameter + begin, *m = first + begin, *v = second + begin;
        // Interpolated from the nearer end, as torch.lerp does: a mean that has arrived stays.
        const Real towards = near ? rest1 : -beta1;
        const Real c2 = beta2, d2 = rest2, scale = size, inverse = root, least = eps, kept = keep;
        const bool from_mean = near;
#pragma omp simd
        for (int j = 0; j < count; ++j) {
            const Real old = load(m[j]);
            const Real mean = (from_mean ? old : g[j]) + towards * (g[j] - old);
            const Real square = c2 * load(v[j]) + d2 * g[j] * g[j];
            const Real moved = kept * load(p[j]) - scale * mean / (std::sqrt(square) * inverse + least);
            put<T, kMasked>(moved, moves, j, p[j]);
            put<T, kMasked>(mean, moves, j, m[j]);
            put<T, kMasked>(square, moves, j, v[j]);
        }
    }
};

template <class T>
struct Sgd {
    using Real = real_of<T>;
    Gradient<T> gradient;
    T *parameter, *buffer;
    const bool* mask;
    Real rate, decay, momentum, rest;
    bool nesterov;

    Sgd(const Table& table, std::int64_t row, const Scales& scales)
        : gradient(table, row, scales), parameter(table.address<T>(row, kParameter)),
          buffer(table.address<T>(row, kFirst)), mask(table.address<const bool>(row, kMask)),
          rate(static_cast<Real>(table.number(row, kRate))), decay(static_cast<Real>(table.number(row, kDecay))),
          momentum(static_cast<Real>(table.number(row, kMomentum))),
          rest(static_cast<Real>(1 - table.number(row, kDampening))), nesterov(table.number(row, kNesterov) != 0) {}

    template <bool kMasked>
    NABLA_TAU_INLINE void block(std::int64_t begin, int count, const Real* g, const Bits<Real>* moves) const {
        T *p = parameter + begin, *held = buffer + begin;
        const Real lr = rate, wd = decay, mu = momentum, share = rest;
        if (buffer == nullptr) {
#pragma omp simd
            for (int j = 0; j < count; ++j) {
                const Real value = load(p[j]);
                put<T, kMasked>(value - lr * (g[j] + wd * value), moves, j, p[j]);
            }
            return;
        }
        // The direction is ahead * gradient + behind * buffer.
        const Real ahead = nesterov ? 1 : 0, behind = nesterov ? mu : 1;
#pragma omp simd
        for (int j = 0; j < count; ++j) {
            const Real value = load(p[j]), whole = g[j] + wd * value;
            const Real next = mu * load(held[j]) + share * whole;
            put<T, kMasked>(value - lr * (ahead * whole + behind * next), moves, j, p[j]);
            put<T, kMasked>(next, moves, j, held[j]);
        }
    }
};

template <class Real>
struct alignas(64) Scratch {
    Real g[kBlock];
    Bits<Real> moves[kBlock];
};

template <class Rule>
struct Update {
    const std::vector<Piece>& pieces;
    const std::vector<Rule>& rules;
    const Noise* noise;

    NABLA_TAU_INLINE void operator()(std::int64_t at, Scratch<typename Rule::Real>& scratch) const {
        const Piece piece = pieces[static_cast<std::size_t>(at)];
        const Rule& rule = rules[static_cast<std::size_t>(piece.row)];
        for (std::int64_t begin = piece.begin; begin < piece.end; begin += kBlock) {
            const int count = static_cast<int>(std::min<std::int64_t>(kBlock, piece.end - begin));
            rule.gradient.fill(begin, count, noise, scratch.g);
            if (rule.mask) {
                const bool* mask = rule.mask + begin;
                using Ones = Bits<typename Rule::Real>;
                for (int j = 0; j < count; ++j) scratch.moves[j] = Ones(0) - static_cast<Ones>(mask[j]);
                rule.template block<true>(begin, count, scratch.g, scratch.moves);
            } else {
                rule.template block<false>(begin, count, scratch.g, nullptr);
            }
        }
    }
};

template <class Rule>
void update(const Table& table, const Scales& scales, int threads) {
    const auto pieces = pieces_of(table);
    std::vector<Rule> rules;
    rules.reserve(static_cast<std::size_t>(table.rows));
    for (std::int64_t row = 0; row < table.rows; ++row) rules.emplace_back(table, row, scales);
    for_blocks(Update<Rule>{pieces, rules, scales.noise}, static_cast<std::int64_t>(pieces.size()),
               Scratch<typename Rule::Real>{}, team_for(pieces, threads));
}

}  // namespace

template <class T>
void adamw(const Table& table, const Scales& scales, int threads) {
    for (std::int64_t row = 0; row < table.rows; ++row) *table.address<float>(row, kStep) += 1;
    update<AdamW<T>>(table, scales, threads);
}

template <class T>
void sgd(const Table& table, const Scales& scales, int threads) {
    update<Sgd<T>>(table, scales, threads);
}

#define NABLA_TAU_UPDATE(T) \
    template void adamw<T>(const Table&, const Scales&, int); \
    template void sgd<T>(const Table&, const Scales&, int);
NABLA_TAU_UPDATE(float)
NABLA_TAU_UPDATE(double)
NABLA_TAU_UPDATE(float16)
NABLA_TAU_UPDATE(bfloat16)
#undef NABLA_TAU_UPDATE

}  // namespace nabla_tau
