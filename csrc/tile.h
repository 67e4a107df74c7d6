// A tile: some models' scores of a block of samples, and for each score the group it counts in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "group_moments.h"

namespace nabla_tau {

constexpr std::uint8_t kOut = 0, kIn = 1, kSkip = 2;

// Models of a tile: several times a multiple of kRows, and few enough to count in a byte.
constexpr std::int64_t kTileModels = 64;
// Models whose scores are taken together, so that sums are loaded and stored once for all of them.
constexpr std::int64_t kRows = 4;

template <class T>
class Tile {
public:
    using Real = real_of<T>;

    const Real* x[kTileModels];
    const std::uint8_t* code[kTileModels];
    std::int64_t rows = 0;  // a multiple of kRows: rows past the last model are all kSkip

    Tile(std::int64_t samples, std::int64_t queries)
        : samples_(static_cast<std::size_t>(samples)),
          seen_(static_cast<std::size_t>(2 * samples)),
          scores_(static_cast<std::size_t>(kTileModels * samples * queries)),
          codes_(scores_.size() + kStore) {}
    // Its pointers lead into its own buffers.
    Tile(const Tile& other)
        : samples_(other.samples_), seen_(other.seen_), scores_(other.scores_), codes_(other.codes_) {}

    // Models from m on, of `count` samples from `first` on. Models of a block are read in order, from 0.
    NABLA_TAU_INLINE void read(const Cells<T>& cells, const Membership& group, const GroupOptions& options,
                               std::int64_t m, std::int64_t first, std::int64_t count) {
        if (m == 0) std::fill(seen_.begin(), seen_.end(), 0);
        const std::int64_t columns = count * cells.queries, models = std::min(kTileModels, cells.models - m);
        rows = (models + kRows - 1) / kRows * kRows;
        for (std::int64_t r = 0; r < rows; ++r) {
            Real* buffer = scores_.data() + r * columns;
            std::uint8_t* codes = codes_.data() + r * columns;
            code[r] = codes;
            if (r < models) {
                x[r] = cells.row(m + r, first, count, buffer);
                find_codes(cells, group, options, m + r, first, count, x[r], codes);
                if (options.sigmoid) {
                    for (std::int64_t c = 0; c < columns; ++c) buffer[c] = sigmoid(x[r][c]);
                    x[r] = buffer;
                }
            } else {
                x[r] = x[0];
                std::fill_n(codes, columns, kSkip);
            }
        }
    }

private:
    static constexpr std::int64_t kStore = 16;

    std::vector<std::uint8_t> samples_;  // a row of groups
    std::vector<std::int64_t> seen_;     // models so far, of each sample and group
    std::vector<Real> scores_;           // those that cannot be read in place
    std::vector<std::uint8_t> codes_;

    NABLA_TAU_INLINE void find_codes(const Cells<T>& cells, const Membership& group, const GroupOptions& options,
                                     std::int64_t m, std::int64_t first, std::int64_t count, const Real* scores,
                                     std::uint8_t* codes) {
        const std::int64_t queries = cells.queries;
        std::uint8_t* of_sample = queries == 1 ? codes : samples_.data();
        group.row(m, first, count, of_sample);
        if (options.limit[0] >= 0) {
            for (std::int64_t n = 0; n < count; ++n) {
                const std::uint8_t g = of_sample[n];
                if (seen_[2 * n + g]++ >= options.limit[g]) of_sample[n] = kSkip;
            }
        }
        if (queries > 1) {
            for (std::int64_t n = 0; n < count; ++n) {
                // Whole stores; what they write too far the next sample or model overwrites, or the padding holds.
                std::uint8_t* to = codes + n * queries;
                for (std::int64_t a = 0; a < queries; a += kStore) std::memset(to + a, of_sample[n], kStore);
            }
        }
        Real difference = 0;
#pragma omp simd reduction(+ : difference)
        for (std::int64_t c = 0; c < count * queries; ++c) difference += scores[c] - scores[c];
        if (difference == 0) return;
        for (std::int64_t c = 0; c < count * queries; ++c) {
            const bool counts = options.sigmoid ? scores[c] == scores[c] : scores[c] - scores[c] == 0;
            if (counts) continue;
            const std::int64_t start = options.whole ? c - c % queries : c;
            std::fill_n(codes + start, options.whole ? queries : 1, kSkip);
        }
    }

    // 1 / (1 + e^-z), NaN for NaN.
    static NABLA_TAU_INLINE Real sigmoid(Real z) {
        const Real decay = exp_nonpositive(z > 0 ? -z : z);
        return (z > 0 ? Real(1) : decay) / (1 + decay) + (z == z ? Real(0) : z);
    }
};

}  // namespace nabla_tau
