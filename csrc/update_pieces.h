// A table of parameters cut into pieces for the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "update.h"

namespace nabla_tau {

// What one thread takes at a time.
constexpr std::int64_t kPiece = 1 << 14;

struct Piece {
    std::int64_t row, begin, end;
};

inline std::vector<Piece> pieces_of(const Table& table) {
    std::vector<Piece> pieces;
    for (std::int64_t row = 0; row < table.rows; ++row) {
        const std::int64_t size = table.integer(row, kSize);
        for (std::int64_t begin = 0; begin < size; begin += kPiece) {
            pieces.push_back({row, begin, std::min(begin + kPiece, size)});
        }
    }
    return pieces;
}

// Few numbers are not worth waking threads for.
inline int team_for(const std::vector<Piece>& pieces, int threads) {
    std::int64_t count = 0;
    for (const Piece& piece : pieces) count += piece.end - piece.begin;
    return count >= kParallelLogits ? threads : 1;
}

}  // namespace nabla_tau
