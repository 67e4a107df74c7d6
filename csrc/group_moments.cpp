#include "group_moments.h"

#include <limits>

#include "blocks.h"
#include "tile.h"

namespace nabla_tau {
namespace {

// Samples of a block: rows long enough to be read in whole pages, few enough for a tile to stay in the cache, and such
// that the columns fill whole vectors of codes.
std::int64_t moment_samples(std::int64_t queries) {
    const std::int64_t samples = std::max<std::int64_t>(1, 1536 / queries);
    return samples >= 32 ? samples / 32 * 32 : samples;
}

// Count, mean and sum of squared differences of the columns of a block, for both groups: [out columns, in columns].
struct Columns {
    std::vector<std::int32_t> count;
    std::vector<double> mean, m2;

    explicit Columns(std::size_t size) : count(size), mean(size), m2(size) {}
};

template <class T>
struct MomentScratch {
    Tile<T> tile;
    Columns part, total;
    std::vector<std::uint8_t> few;
    std::vector<double> difference;

    MomentScratch(std::int64_t samples, std::int64_t queries)
        : tile(samples, queries),
          part(static_cast<std::size_t>(2 * samples * queries)),
          total(part.count.size()),
          few(part.count.size()),
          difference(static_cast<std::size_t>(queries)) {}
};

// scatter += weight * d d^T.
NABLA_TAU_INLINE void add_outer(const double* d, std::int64_t size, double weight, double* scatter) {
    for (std::int64_t a = 0; a < size; ++a) {
        const double scaled = weight * d[a];
#pragma omp simd
        for (std::int64_t b = 0; b < size; ++b) scatter[a * size + b] += scaled * d[b];
    }
}

// Each tile in two passes while the cache holds it: means first, then squares of differences from them, which neither
// a common offset nor an outlier of the other group can spoil. Tiles are joined as models seen before are.
template <class T>
struct MomentKernel {
    using Real = real_of<T>;

    const Cells<T>& cells;
    const Membership& group;
    const GroupOptions& options;
    const KnownMoments& known;
    const Moments& moments;

    NABLA_TAU_INLINE void operator()(std::int64_t block, MomentScratch<T>& scratch) const {
        const std::int64_t step = moment_samples(cells.queries), first = block * step;
        const std::int64_t samples = std::min(step, cells.samples - first), columns = samples * cells.queries;
        start(first, samples, scratch.total);
        for (std::int64_t m = 0; m < cells.models; m += kTileModels) {
            scratch.tile.read(cells, group, options, m, first, samples);
            find_means(columns, scratch);
            if (moments.m2 != nullptr) add_squares(columns, scratch.tile, scratch.part);
            if (moments.scatter != nullptr) add_products(first, samples, scratch);
            join(2 * columns, scratch.part, scratch.total);
        }
        finish(first, columns, scratch.total);
    }

    NABLA_TAU_INLINE std::int64_t place(std::int64_t g, std::int64_t first) const {
        return (g * cells.samples + first) * cells.queries;
    }

    NABLA_TAU_INLINE void start(std::int64_t first, std::int64_t samples, Columns& total) const {
        const std::int64_t columns = samples * cells.queries;
        for (std::int64_t g = 0; g < 2; ++g) {
            const std::int64_t from = place(g, first), to = g * columns;
            if (moments.scatter != nullptr) {
                double* scatter = moments.scatter + from * cells.queries;
                if (known.count == nullptr) {
                    std::fill_n(scatter, columns * cells.queries, 0.0);
                } else {
                    std::copy_n(known.scatter + from * cells.queries, columns * cells.queries, scatter);
                }
            }
            if (known.count == nullptr) {
                std::fill_n(total.count.data() + to, columns, 0);
                std::fill_n(total.mean.data() + to, columns, 0.0);
                std::fill_n(total.m2.data() + to, columns, 0.0);
            } else {
                std::copy_n(known.count + from, columns, total.count.data() + to);
                std::copy_n(known.mean + from, columns, total.mean.data() + to);
                std::copy_n(known.m2 + from, columns, total.m2.data() + to);
            }
        }
    }

    NABLA_TAU_INLINE void find_means(std::int64_t columns, MomentScratch<T>& scratch) const {
        const Tile<T>& tile = scratch.tile;
        std::uint8_t *n_out = scratch.few.data(), *n_in = n_out + columns;
        double *out = scratch.part.mean.data(), *in = out + columns;
        std::fill_n(n_out, 2 * columns, std::uint8_t(0));
        std::fill_n(out, 2 * columns, 0.0);
        for (std::int64_t r = 0; r < tile.rows; r += kRows) {
            const Real *x0 = tile.x[r], *x1 = tile.x[r + 1], *x2 = tile.x[r + 2], *x3 = tile.x[r + 3];
            const std::uint8_t *g0 = tile.code[r], *g1 = tile.code[r + 1], *g2 = tile.code[r + 2],
                               *g3 = tile.code[r + 3];
#pragma omp simd
            for (std::int64_t c = 0; c < columns; ++c) {
                in[c] += (pick(x0[c], g0[c] == kIn) + pick(x1[c], g1[c] == kIn)) +
                         (pick(x2[c], g2[c] == kIn) + pick(x3[c], g3[c] == kIn));
                out[c] += (pick(x0[c], g0[c] == kOut) + pick(x1[c], g1[c] == kOut)) +
                          (pick(x2[c], g2[c] == kOut) + pick(x3[c], g3[c] == kOut));
            }
#pragma omp simd
            for (std::int64_t c = 0; c < columns; ++c) {
                n_in[c] += (g0[c] == kIn) + (g1[c] == kIn) + (g2[c] == kIn) + (g3[c] == kIn);
                n_out[c] += (g0[c] == kOut) + (g1[c] == kOut) + (g2[c] == kOut) + (g3[c] == kOut);
            }
        }
        std::int32_t* count = scratch.part.count.data();
#pragma omp simd
        for (std::int64_t c = 0; c < 2 * columns; ++c) {
            count[c] = n_out[c];
            out[c] /= count[c] > 0 ? count[c] : 1;
        }
    }

    NABLA_TAU_INLINE void add_squares(std::int64_t columns, const Tile<T>& tile, Columns& part) const {
        const double *out = part.mean.data(), *in = out + columns;
        double *m2_out = part.m2.data(), *m2_in = m2_out + columns;
        std::fill_n(m2_out, 2 * columns, 0.0);
        for (std::int64_t r = 0; r < tile.rows; r += kRows) {
            const Real *x0 = tile.x[r], *x1 = tile.x[r + 1], *x2 = tile.x[r + 2], *x3 = tile.x[r + 3];
            const std::uint8_t *g0 = tile.code[r], *g1 = tile.code[r + 1], *g2 = tile.code[r + 2],
                               *g3 = tile.code[r + 3];
#pragma omp simd
            for (std::int64_t c = 0; c < columns; ++c) {
                m2_in[c] += (square(x0[c], in[c], g0[c] == kIn) + square(x1[c], in[c], g1[c] == kIn)) +
                            (square(x2[c], in[c], g2[c] == kIn) + square(x3[c], in[c], g3[c] == kIn));
                m2_out[c] += (square(x0[c], out[c], g0[c] == kOut) + square(x1[c], out[c], g1[c] == kOut)) +
                             (square(x2[c], out[c], g2[c] == kOut) + square(x3[c], out[c], g3[c] == kOut));
            }
        }
    }

    static NABLA_TAU_INLINE double pick(Real x, bool counts) { return counts ? static_cast<double>(x) : 0.0; }

    static NABLA_TAU_INLINE double square(Real x, double mean, bool counts) {
        const double difference = x - mean;
        return counts ? difference * difference : 0.0;
    }

    NABLA_TAU_INLINE void add_products(std::int64_t first, std::int64_t samples, MomentScratch<T>& scratch) const {
        const std::int64_t queries = cells.queries, columns = samples * queries;
        const Tile<T>& tile = scratch.tile;
        const Columns &part = scratch.part, &total = scratch.total;
        double* d = scratch.difference.data();
        for (std::int64_t n = 0; n < samples; ++n) {
            for (std::int64_t r = 0; r < tile.rows; ++r) {
                const std::int64_t g = tile.code[r][n * queries], from = g * columns + n * queries;
                if (g == kSkip) continue;
                for (std::int64_t a = 0; a < queries; ++a) d[a] = tile.x[r][n * queries + a] - part.mean[from + a];
                add_outer(d, queries, 1.0, moments.scatter + place(g, first + n) * queries);
            }
            for (std::int64_t g = 0; g < 2; ++g) {
                const std::int64_t from = g * columns + n * queries;
                const double n_new = part.count[from], n_old = total.count[from];
                if (n_new == 0 || n_old == 0) continue;
                for (std::int64_t a = 0; a < queries; ++a) d[a] = part.mean[from + a] - total.mean[from + a];
                add_outer(d, queries, n_old * n_new / (n_old + n_new),
                          moments.scatter + place(g, first + n) * queries);
            }
        }
    }

    static NABLA_TAU_INLINE void join(std::int64_t size, const Columns& part, Columns& total) {
        const std::int32_t* n_part = part.count.data();
        const double *mean_part = part.mean.data(), *m2_part = part.m2.data();
        std::int32_t* n_total = total.count.data();
        double *mean = total.mean.data(), *m2 = total.m2.data();
#pragma omp simd
        for (std::int64_t c = 0; c < size; ++c) {
            const double n_old = n_total[c], n_new = n_part[c], n = n_old + n_new;
            const double weight = n_new / (n > 0 ? n : 1);
            const double delta = n_old > 0 ? mean_part[c] - mean[c] : 0;
            const double base = n_old > 0 ? mean[c] : mean_part[c];
            mean[c] = n_new > 0 ? base + delta * weight : mean[c];
            m2[c] += m2_part[c] + (n_new > 0 ? delta * delta * weight * n_old : 0);
            n_total[c] += n_part[c];
        }
    }

    NABLA_TAU_INLINE void finish(std::int64_t first, std::int64_t columns, const Columns& total) const {
        for (std::int64_t g = 0; g < 2; ++g) {
            const std::int64_t from = g * columns, to = place(g, first);
            std::copy_n(total.count.data() + from, columns, moments.count + to);
            if (moments.m2 != nullptr) std::copy_n(total.m2.data() + from, columns, moments.m2 + to);
            for (std::int64_t c = 0; c < columns; ++c) {
                constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
                moments.mean[to + c] = total.count[from + c] > 0 ? total.mean[from + c] : kNone;
            }
        }
    }
};

}  // namespace

template <class T>
void group_moments(const Cells<T>& cells, const Membership& group, const GroupOptions& options,
                   const KnownMoments& known, const Moments& moments, int threads) {
    const std::int64_t step = moment_samples(cells.queries);
    for_blocks(MomentKernel<T>{cells, group, options, known, moments}, (cells.samples + step - 1) / step,
               MomentScratch<T>(step, cells.queries), threads);
}

template void group_moments(const Cells<float16>&, const Membership&, const GroupOptions&, const KnownMoments&,
                            const Moments&, int);
template void group_moments(const Cells<float>&, const Membership&, const GroupOptions&, const KnownMoments&,
                            const Moments&, int);
template void group_moments(const Cells<double>&, const Membership&, const GroupOptions&, const KnownMoments&,
                            const Moments&, int);

}  // namespace nabla_tau
