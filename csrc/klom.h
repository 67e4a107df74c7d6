// KL divergence of margins (KLOM, Georgiev et al. 2024): for each sample, how far the margins of unlearned models are
// distributed from those of retrained ones, by histograms over their joint range.
#pragma once

#include <cstdint>

#include "strided.h"

namespace nabla_tau {

struct KlomOptions {
    std::int64_t bins;
    double clip;
    double floor;    // of the retrained models' share, in bins where unlearned models are
    bool open_top;   // leave out margins at the top of the range, as the published script does
};

// divergence [samples] from margins [M, N]. NaN margins are left out; NaN where a group has none left.
template <class T>
void klom(const Cells<T>& unlearned, const Cells<T>& retrained, const KlomOptions& options, double* divergence,
          int threads);

}  // namespace nabla_tau
