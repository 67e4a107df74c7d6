// Blocks of work over threads, in the widest instruction set that the machine has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace nabla_tau {

template <class Kernel, class Scratch>
struct Blocks {
    const Kernel& kernel;

    NABLA_TAU_INLINE void operator()(std::int64_t begin, std::int64_t end, Scratch* scratch) const {
        for (std::int64_t b = begin; b < end; ++b) kernel(b, *scratch);
    }
};

// Calls kernel(block, scratch) for each block; kernel's operator() must be NABLA_TAU_INLINE. Each thread has its own
// copy of `scratch`, made before threads start, so that running out of memory throws. What a block computes must
// depend on its number alone: then results are the same at any thread count.
template <class Kernel, class Scratch>
void for_blocks(const Kernel& kernel, std::int64_t blocks, const Scratch& scratch, int threads) {
    const auto run = variant<Blocks<Kernel, Scratch>, Scratch>();
    const auto most = std::min<std::int64_t>(team_size(threads), blocks);
    const int team = static_cast<int>(std::max<std::int64_t>(1, most));
    std::vector<Scratch> scratches(static_cast<std::size_t>(team), scratch);
    parallel_for(blocks, 1, team, [&](std::int64_t begin, std::int64_t end, int thread) {
        run({kernel}, begin, end, &scratches[static_cast<std::size_t>(thread)]);
    });
}

}  // namespace nabla_tau
