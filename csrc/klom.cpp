#include "klom.h"

#include <cmath>
#include <limits>
#include <vector>

#include "blocks.h"
#include "linspace.h"

namespace nabla_tau {
namespace {

constexpr std::int64_t kBlockSamples = 128;

template <class Real>
struct KlomScratch {
    std::vector<Real> row, low, high, scale, near, place, edges;
    std::vector<std::int32_t> counts;  // [group][sample][bin]

    explicit KlomScratch(std::int64_t bins)
        : row(kBlockSamples),
          low(kBlockSamples),
          high(kBlockSamples),
          scale(kBlockSamples),
          near(kBlockSamples),
          place(kBlockSamples),
          edges(static_cast<std::size_t>(kBlockSamples * (bins + 1))),
          counts(static_cast<std::size_t>(2 * kBlockSamples * bins)) {}
};

template <class T>
struct KlomKernel {
    using Real = real_of<T>;

    const Cells<T>* groups[2];  // unlearned, retrained
    const KlomOptions& options;
    double* divergence;

    NABLA_TAU_INLINE void operator()(std::int64_t block, KlomScratch<Real>& scratch) const {
        const std::int64_t first = block * kBlockSamples, bins = options.bins;
        const std::int64_t samples = std::min(kBlockSamples, groups[0]->samples - first);
        find_edges(first, samples, scratch);
        std::fill(scratch.counts.begin(), scratch.counts.end(), 0);
        for (std::int64_t g = 0; g < 2; ++g) {
            for (std::int64_t m = 0; m < groups[g]->models; ++m) {
                count(groups[g]->row(m, first, samples, scratch.row.data()), samples, scratch,
                      scratch.counts.data() + g * kBlockSamples * bins);
            }
        }
        for (std::int64_t n = 0; n < samples; ++n) {
            const std::int32_t* p = scratch.counts.data() + n * bins;
            divergence[first + n] = relative_entropy(p, p + kBlockSamples * bins);
        }
    }

    // Where a margin is clear of the edges, arithmetic finds its bin; next to one the edge itself decides.
    NABLA_TAU_INLINE void count(const Real* x, std::int64_t samples, KlomScratch<Real>& scratch,
                                std::int32_t* counts) const {
        const std::int64_t bins = options.bins;
        const Real *low = scratch.low.data(), *scale = scratch.scale.data();
        Real* place = scratch.place.data();
#pragma omp simd
        for (std::int64_t n = 0; n < samples; ++n) place[n] = (clipped(x[n]) - low[n]) * scale[n];
        const Real* near = scratch.near.data();
        for (std::int64_t n = 0; n < samples; ++n) {
            auto bin = place[n] < static_cast<Real>(bins) ? static_cast<std::int64_t>(place[n]) : bins;
            const Real within = place[n] - static_cast<Real>(bin);
            if (!(within > near[n] && within < 1 - near[n])) {
                bin = bin_of(clipped(x[n]), scratch.edges.data() + n * (bins + 1));
                if (bin < 0) continue;
            }
            ++counts[n * bins + bin];
        }
    }

    NABLA_TAU_INLINE void find_edges(std::int64_t first, std::int64_t samples, KlomScratch<Real>& scratch) const {
        constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
        Real *low = scratch.low.data(), *high = scratch.high.data();
        std::fill_n(low, samples, kInfinity);
        std::fill_n(high, samples, -kInfinity);
        for (const Cells<T>* cells : groups) {
            for (std::int64_t m = 0; m < cells->models; ++m) {
                const Real* x = cells->row(m, first, samples, scratch.row.data());
#pragma omp simd
                for (std::int64_t n = 0; n < samples; ++n) {
                    low[n] = x[n] < low[n] ? x[n] : low[n];
                    high[n] = x[n] > high[n] ? x[n] : high[n];
                }
            }
        }
        for (std::int64_t n = 0; n < samples; ++n) {
            const Real bottom = clipped(low[n]), top = clipped(high[n]);
            const Linspace<Real> points(bottom, bottom >= top ? bottom + 1 : top, options.bins + 1);
            scratch.low[n] = bottom;
            scratch.scale[n] = static_cast<Real>(options.bins) / (points.stop - bottom);
            // Rounding of an edge, in bins: of the margins themselves, and of where they lie in the range.
            const Real largest = std::max(std::abs(bottom), std::abs(points.stop));
            scratch.near[n] = 8 * std::numeric_limits<Real>::epsilon() *
                              (static_cast<Real>(options.bins) + largest * scratch.scale[n]);
            for (std::int64_t k = 0; k <= options.bins; ++k) scratch.edges[n * points.count + k] = points[k];
        }
    }

    NABLA_TAU_INLINE Real clipped(Real x) const {
        const Real clip = static_cast<Real>(options.clip);
        return x < -clip ? -clip : (x > clip ? clip : x);
    }

    // Bin k holds edges[k] <= x < edges[k + 1]; the first guess is off by one at most. -1: in none.
    NABLA_TAU_INLINE std::int64_t bin_of(Real x, const Real* edges) const {
        const std::int64_t bins = options.bins;
        if (x != x) return -1;
        if (x >= edges[bins]) return options.open_top ? -1 : bins - 1;
        const Real place = (x - edges[0]) * (static_cast<Real>(bins) / (edges[bins] - edges[0]));
        std::int64_t k = std::min(static_cast<std::int64_t>(place), bins - 1);
        while (x < edges[k]) --k;
        while (x >= edges[k + 1]) ++k;
        return k;
    }

    NABLA_TAU_INLINE double relative_entropy(const std::int32_t* p, const std::int32_t* q) const {
        double p_count = 0, q_count = 0, q_total = 0, sum = 0;
        for (std::int64_t k = 0; k < options.bins; ++k) p_count += p[k], q_count += q[k];
        if (p_count == 0 || q_count == 0) return std::numeric_limits<double>::quiet_NaN();
        const auto floored = [&](std::int64_t k) NABLA_TAU_INLINE_LAMBDA {
            const double share = q[k] / q_count;
            return p[k] > 0 ? std::max(share, options.floor) : share;
        };
        for (std::int64_t k = 0; k < options.bins; ++k) q_total += floored(k);
        for (std::int64_t k = 0; k < options.bins; ++k) {
            if (p[k] == 0) continue;
            const double share = p[k] / p_count;
            sum += share * std::log(share / (floored(k) / q_total));
        }
        return sum;
    }
};

}  // namespace

template <class T>
void klom(const Cells<T>& unlearned, const Cells<T>& retrained, const KlomOptions& options, double* divergence,
          int threads) {
    for_blocks(KlomKernel<T>{{&unlearned, &retrained}, options, divergence},
               (unlearned.samples + kBlockSamples - 1) / kBlockSamples, KlomScratch<real_of<T>>(options.bins), threads);
}

template void klom(const Cells<float16>&, const Cells<float16>&, const KlomOptions&, double*, int);
template void klom(const Cells<float>&, const Cells<float>&, const KlomOptions&, double*, int);
template void klom(const Cells<double>&, const Cells<double>&, const KlomOptions&, double*, int);

}  // namespace nabla_tau
