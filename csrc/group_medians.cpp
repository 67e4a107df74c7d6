// Medians of all columns at once, one column a SIMD lane.
//
// A score becomes an integer key of the same order. The key of rank k is built from the top bit down: a bit is kept
// if at most k keys are smaller than what it gives. Scores of the other group have the largest key, which is never
// smaller than anything, so both groups are searched in full rows, without branches or gathering. The search ends as
// soon as exactly k keys are smaller: then the rest is a minimum and a maximum.
#include <limits>

#include "blocks.h"
#include "group_moments.h"
#include "tile.h"

namespace nabla_tau {
namespace {

template <class Real>
struct KeyOf {
    using type = std::int32_t;
    using Unsigned = std::uint32_t;
};
template <>
struct KeyOf<double> {
    using type = std::int64_t;
    using Unsigned = std::uint64_t;
};

template <class T>
struct MedianScratch {
    using Key = typename KeyOf<real_of<T>>::type;

    Tile<T> tile;
    std::vector<Key> keys, count;

    MedianScratch(std::int64_t models, std::int64_t samples, std::int64_t queries, std::int64_t lanes)
        : tile(samples, queries) {
        const std::int64_t slabs = (samples * queries + lanes - 1) / lanes;
        keys.resize(static_cast<std::size_t>(2 * slabs * lanes * models));
        count.resize(static_cast<std::size_t>(2 * slabs * lanes));
    }
};

// Samples of a block, such that its keys stay in the second-level cache; at least one.
std::int64_t median_samples(std::int64_t models, std::int64_t queries) {
    const std::int64_t columns = (std::int64_t(1) << 15) / std::max<std::int64_t>(1, models);
    return std::max<std::int64_t>(1, std::min<std::int64_t>(256, std::max<std::int64_t>(16, columns)) / queries);
}

template <class T>
struct MedianKernel {
    using Real = real_of<T>;
    using Key = typename KeyOf<Real>::type;
    using Unsigned = typename KeyOf<Real>::Unsigned;
    static constexpr std::int64_t kLanes = 64 / sizeof(Key);
    typedef Key Vector __attribute__((vector_size(64)));
    typedef Key Stored __attribute__((vector_size(64), aligned(sizeof(Key)), may_alias));
    static constexpr Key kTop = std::numeric_limits<Key>::max(), kBottom = std::numeric_limits<Key>::min();

    const Cells<T>& cells;
    const Membership& group;
    const GroupOptions& options;
    double* median;

    NABLA_TAU_INLINE void operator()(std::int64_t block, MedianScratch<T>& scratch) const {
        const std::int64_t step = median_samples(cells.models, cells.queries), first = block * step;
        const std::int64_t samples = std::min(step, cells.samples - first), columns = samples * cells.queries;
        const std::int64_t slabs = (columns + kLanes - 1) / kLanes;
        fill_keys(first, samples, slabs, scratch);
        const std::int64_t all = cells.samples * cells.queries;
        for (std::int64_t g = 0; g < 2; ++g) {
            for (std::int64_t s = 0; s < slabs; ++s) {
                const std::int64_t slab = g * slabs + s, start = s * kLanes;
                double found[kLanes];
                search(scratch.keys.data() + slab * cells.models * kLanes, scratch.count.data() + slab * kLanes, found);
                std::copy_n(found, std::min(kLanes, columns - start),
                            median + g * all + first * cells.queries + start);
            }
        }
    }

    // Keys as [group][slab][model][lane] and their counts as [group][slab][lane].
    NABLA_TAU_INLINE void fill_keys(std::int64_t first, std::int64_t samples, std::int64_t slabs,
                                    MedianScratch<T>& scratch) const {
        const std::int64_t columns = samples * cells.queries;
        std::fill(scratch.keys.begin(), scratch.keys.end(), kTop);
        std::fill(scratch.count.begin(), scratch.count.end(), 0);
        for (std::int64_t m = 0; m < cells.models; ++m) {
            const std::int64_t r = m % kTileModels;
            if (r == 0) scratch.tile.read(cells, group, options, m, first, samples);
            for (std::int64_t s = 0; s < slabs; ++s) {
                const std::int64_t c = s * kLanes, size = std::min(kLanes, columns - c);
                const Real* x = scratch.tile.x[r] + c;
                const std::uint8_t* code = scratch.tile.code[r] + c;
                Key* out = scratch.keys.data() + (s * cells.models + m) * kLanes;
                Key* in = out + slabs * cells.models * kLanes;
                Key *n_out = scratch.count.data() + c, *n_in = n_out + slabs * kLanes;
#pragma omp simd
                for (std::int64_t l = 0; l < size; ++l) {
                    const bool is_in = code[l] == kIn, is_out = code[l] == kOut;
                    const Key key = key_of(x[l]);
                    out[l] = is_out ? key : kTop;
                    in[l] = is_in ? key : kTop;
                    n_out[l] += is_out;
                    n_in[l] += is_in;
                }
            }
        }
    }

    static NABLA_TAU_INLINE Key key_of(Real x) {
        const Key bits = bits_as<Key>(x);
        return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kTop);
    }

    NABLA_TAU_INLINE void search(const Key* keys, const Key* count, double* found) const {
        const auto* rows = reinterpret_cast<const Stored*>(keys);
        alignas(64) Key half_count[kLanes];
        for (std::int64_t l = 0; l < kLanes; ++l) half_count[l] = count[l] / 2;
        const Vector wanted = *reinterpret_cast<const Stored*>(half_count);
        Vector below = {}, bound = {};
        bound += kBottom;
        for (Unsigned bit = Unsigned(1) << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
            const Vector next = bound + static_cast<Key>(bit);
            Vector smaller = {};
            for (std::int64_t m = 0; m < cells.models; ++m) smaller += rows[m] < next;
            smaller = -smaller;
            const Vector keep = smaller <= wanted;
            bound = keep ? next : bound;
            below = keep ? smaller : below;
            if (all_equal(below, wanted)) break;
        }
        Vector upper = {}, lower = {};
        upper += kTop;
        lower += kBottom;
        for (std::int64_t m = 0; m < cells.models; ++m) {
            const Vector key = rows[m];
            const Vector right = key >= bound ? key : upper, left = key < bound ? key : lower;
            upper = right < upper ? right : upper;
            lower = left > lower ? left : lower;
        }
        for (std::int64_t l = 0; l < kLanes; ++l) {
            const double high = score_of(upper[l]);
            // With fewer than half below the bound, the middle pair are equal.
            const bool pair = count[l] % 2 == 0 && below[l] == wanted[l];
            found[l] = count[l] == 0 ? std::numeric_limits<double>::quiet_NaN()
                       : pair        ? 0.5 * score_of(lower[l]) + 0.5 * high
                                     : high;
        }
    }

    static NABLA_TAU_INLINE bool all_equal(const Vector& a, const Vector& b) {
        const Vector different = a ^ b;
        Key any = 0;
        for (std::int64_t l = 0; l < kLanes; ++l) any |= different[l];
        return any == 0;
    }

    static NABLA_TAU_INLINE double score_of(Key key) {
        return bits_as<Real>(static_cast<Key>(key ^ ((key >> (8 * sizeof(Key) - 1)) & kTop)));
    }
};

}  // namespace

template <class T>
void group_medians(const Cells<T>& cells, const Membership& group, const GroupOptions& options, double* median,
                   int threads) {
    using Kernel = MedianKernel<T>;
    const std::int64_t step = median_samples(cells.models, cells.queries);
    const MedianScratch<T> scratch(cells.models, step, cells.queries, Kernel::kLanes);
    for_blocks(Kernel{cells, group, options, median}, (cells.samples + step - 1) / step, scratch, threads);
}

template void group_medians(const Cells<float16>&, const Membership&, const GroupOptions&, double*, int);
template void group_medians(const Cells<float>&, const Membership&, const GroupOptions&, double*, int);
template void group_medians(const Cells<double>&, const Membership&, const GroupOptions&, double*, int);

}  // namespace nabla_tau
