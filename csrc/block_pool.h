// Memory for gradients, kept for the next one. A fresh gradient of 100 MB costs more in page faults than in arithmetic,
// and training asks for the same sizes at every step.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace nabla_tau {

// Blocks are aligned to 64 bytes. Both functions may be called from any thread. A thread never waits for another, nor
// in a forked process for one that is gone: when the pool is taken, the block goes past it.
class BlockPool {
   public:
    // Smaller blocks are left to malloc, which keeps them itself. At most kKept bytes in kBlocks blocks are held back.
    static constexpr std::size_t kSmallest = std::size_t(1) << 17;
    static constexpr std::size_t kKept = std::size_t(1) << 30;
    static constexpr std::size_t kBlocks = 32;

    struct Block {
        void* data;
        std::size_t size;
    };

    BlockPool();
    ~BlockPool();

    // A block of at least `size` bytes and, unless that is small, at most twice as many. Throws std::bad_alloc.
    Block take(std::size_t size);
    void give(Block block) noexcept;

   private:
    std::mutex mutex_;
    std::vector<Block> free_;  // oldest first
    std::size_t kept_ = 0;
};

}  // namespace nabla_tau
