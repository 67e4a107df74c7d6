// What a step needs to know of all parameters at once: inner products of the gradients, and the ball around centres.
#include <vector>

#include "update.h"
#include "update_pieces.h"

namespace nabla_tau {
namespace {

// Sums over a piece, in double and in lanes that do not depend on the instruction set.
constexpr int kSums = 3;
struct Lanes {
    alignas(64) double sums[kSums][8];

    double total(int which) const {
        const double* s = sums[which];
        return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
};

// Calls add(lane, j) for the numbers j of a piece.
template <class Add>
NABLA_TAU_INLINE void in_lanes(const Piece& piece, const Add& add) {
    std::int64_t j = piece.begin;
    for (; j + 8 <= piece.end; j += 8) {
#pragma omp simd
        for (int lane = 0; lane < 8; ++lane) add(lane, j + lane);
    }
    for (int lane = 0; j < piece.end; ++lane, ++j) add(lane, j);
}

template <class T>
struct Products {
    const Table& table;
    const std::vector<Piece>& pieces;
    double* sums;

    template <bool kForget_, bool kRetain_, bool kMasked>
    NABLA_TAU_INLINE void add(const Piece& piece, Lanes& lanes) const {
        const T *f = table.address<const T>(piece.row, kForget), *r = table.address<const T>(piece.row, kRetain);
        const bool* mask = table.address<const bool>(piece.row, kMask);
        Lanes own{};
        in_lanes(piece, [&](int lane, std::int64_t j) NABLA_TAU_INLINE_LAMBDA {
            double a = 0, b = 0;
            if constexpr (kForget_) a = load(f[j]);
            if constexpr (kRetain_) b = load(r[j]);
            if constexpr (kMasked) a = select<double>(mask[j], a, 0), b = select<double>(mask[j], b, 0);
            if constexpr (kForget_) own.sums[0][lane] += a * a;
            if constexpr (kForget_ && kRetain_) own.sums[1][lane] += a * b;
            if constexpr (kRetain_) own.sums[2][lane] += b * b;
        });
        lanes = own;
    }

    template <bool kMasked>
    NABLA_TAU_INLINE void choose(const Piece& piece, Lanes& lanes) const {
        const bool f = table.integer(piece.row, kForget) != 0, r = table.integer(piece.row, kRetain) != 0;
        lanes = {};
        if (f && r) add<true, true, kMasked>(piece, lanes);
        if (f && !r) add<true, false, kMasked>(piece, lanes);
        if (!f && r) add<false, true, kMasked>(piece, lanes);
    }

    NABLA_TAU_INLINE void operator()(std::int64_t at, Lanes& lanes) const {
        const Piece piece = pieces[static_cast<std::size_t>(at)];
        if (table.integer(piece.row, kMask) != 0) {
            choose<true>(piece, lanes);
        } else {
            choose<false>(piece, lanes);
        }
        for (int which = 0; which < kSums; ++which) sums[at * kSums + which] = lanes.total(which);
    }
};

template <class T>
struct Distance {
    const Table& table;
    const std::vector<Piece>& pieces;
    double* sums;

    NABLA_TAU_INLINE void operator()(std::int64_t at, Lanes&) const {
        const Piece piece = pieces[static_cast<std::size_t>(at)];
        const T *p = table.address<const T>(piece.row, kParameter), *c = table.address<const T>(piece.row, kCentre);
        const bool* mask = table.address<const bool>(piece.row, kMask);
        Lanes own{};
        in_lanes(piece, [&](int lane, std::int64_t j) NABLA_TAU_INLINE_LAMBDA {
            const double away = static_cast<double>(load(p[j])) - static_cast<double>(load(c[j]));
            own.sums[0][lane] += mask && !mask[j] ? 0 : away * away;
        });
        sums[at] = own.total(0);
    }
};

template <class T>
struct Pull {
    using Real = real_of<T>;
    const Table& table;
    const std::vector<Piece>& pieces;
    Real factor;

    NABLA_TAU_INLINE void operator()(std::int64_t at, Lanes&) const {
        const Piece piece = pieces[static_cast<std::size_t>(at)];
        T* p = table.address<T>(piece.row, kParameter);
        const T* c = table.address<const T>(piece.row, kCentre);
        const bool* mask = table.address<const bool>(piece.row, kMask);
        for (std::int64_t j = piece.begin; j < piece.end; ++j) {
            const Real centre = load(c[j]), value = load(p[j]);
            const Real moved = centre + factor * (value - centre);
            store(mask && !mask[j] ? value : moved, p[j]);
        }
    }
};

}  // namespace

template <class T>
void gradient_products(const Table& table, double* out, int threads) {
    const auto pieces = pieces_of(table);
    std::vector<double> sums(pieces.size() * kSums);
    for_blocks(Products<T>{table, pieces, sums.data()}, static_cast<std::int64_t>(pieces.size()), Lanes{},
               team_for(pieces, threads));
    std::fill_n(out, kSums, 0.0);
    for (std::size_t at = 0; at < sums.size(); ++at) out[at % kSums] += sums[at];
}

template <class T>
double squared_distance(const Table& table, int threads) {
    const auto pieces = pieces_of(table);
    std::vector<double> sums(pieces.size());
    for_blocks(Distance<T>{table, pieces, sums.data()}, static_cast<std::int64_t>(pieces.size()), Lanes{},
               team_for(pieces, threads));
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

template <class T>
void pull(const Table& table, double factor, int threads) {
    const auto pieces = pieces_of(table);
    for_blocks(Pull<T>{table, pieces, static_cast<real_of<T>>(factor)}, static_cast<std::int64_t>(pieces.size()),
               Lanes{}, team_for(pieces, threads));
}

#define NABLA_TAU_UPDATE(T) \
    template void gradient_products<T>(const Table&, double*, int); \
    template double squared_distance<T>(const Table&, int); \
    template void pull<T>(const Table&, double, int);
NABLA_TAU_UPDATE(float)
NABLA_TAU_UPDATE(double)
NABLA_TAU_UPDATE(float16)
NABLA_TAU_UPDATE(bfloat16)
#undef NABLA_TAU_UPDATE

}  // namespace nabla_tau
