#include "block_pool.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nabla_tau {
namespace {

constexpr std::size_t kHugePage = std::size_t(1) << 21;

BlockPool::Block allocate(std::size_t size) {
    const std::size_t alignment = size < 2 * kHugePage ? 64 : kHugePage;
    const std::size_t rounded = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, rounded);
    if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // A fourth of the time that the first touch of ordinary pages takes. Where it is refused nothing is lost.
    if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
#endif
    return {data, rounded};
}

}  // namespace

// Room for one more, so that giving a block back never allocates.
BlockPool::BlockPool() { free_.reserve(kBlocks + 1); }

BlockPool::~BlockPool() {
    for (const Block& block : free_) std::free(block.data);
}

BlockPool::Block BlockPool::take(std::size_t size) {
    if (size >= kSmallest) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock) {
            auto best = free_.end();
            for (auto it = free_.begin(); it != free_.end(); ++it) {
                const bool fits = it->size >= size && it->size / 2 <= size;
                if (fits && (best == free_.end() || it->size <= best->size)) best = it;
            }
            if (best != free_.end()) {
                const Block block = *best;
                free_.erase(best);
                kept_ -= block.size;
                return block;
            }
        }
    }
    return allocate(size);
}

void BlockPool::give(Block block) noexcept {
    if (block.size >= kSmallest && block.size <= kKept) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock) {
            free_.push_back(block);
            kept_ += block.size;
            while (kept_ > kKept || free_.size() > kBlocks) {
                kept_ -= free_.front().size;
                std::free(free_.front().data);
                free_.erase(free_.begin());
            }
            return;
        }
    }
    std::free(block.data);
}

}  // namespace nabla_tau
