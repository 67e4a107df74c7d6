// Scores of many models as they lie in memory: any strides, float16, float32 or float64, no copy of the whole.
//
// A score is found by model m, sample n and query a. Kernels walk over *columns*, the pairs (n, a) in order, and read
// one model's scores of a few hundred columns at a time: in place where they are contiguous, into a buffer otherwise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_math.h"

namespace nabla_tau {

template <class T>
struct Cells {
    using Real = real_of<T>;

    const char* data;
    std::int64_t models, samples, queries;
    std::int64_t model_stride, sample_stride, query_stride;  // in bytes

    // Scores of model m in the columns of `count` samples from `first` on; `buffer` has room for them.
    NABLA_TAU_INLINE const Real* row(std::int64_t m, std::int64_t first, std::int64_t count, Real* buffer) const {
        const char* start = data + m * model_stride + first * sample_stride;
        const std::int64_t columns = count * queries, size = sizeof(T);
        const bool packed = (queries == 1 || query_stride == size) && (count == 1 || sample_stride == queries * size);
        if (packed) {
            if constexpr (std::is_same_v<T, Real>) {
                if (reinterpret_cast<std::uintptr_t>(start) % alignof(T) == 0) return reinterpret_cast<const T*>(start);
            }
            for (std::int64_t c = 0; c < columns; ++c) buffer[c] = read(start + c * size);
            return buffer;
        }
        for (std::int64_t n = 0; n < count; ++n) {
            const char* sample = start + n * sample_stride;
            for (std::int64_t a = 0; a < queries; ++a) buffer[n * queries + a] = read(sample + a * query_stride);
        }
        return buffer;
    }

    // By memcpy: a field of a packed record need not be aligned.
    static NABLA_TAU_INLINE Real read(const char* from) {
        T value;
        std::memcpy(&value, from, sizeof(T));
        return load(value);
    }
};

// Which model was trained on which sample: one byte each, or one bit, highest first, in rows of whole bytes.
struct Membership {
    const char* data;
    std::int64_t model_stride, sample_stride;  // in bytes; between bytes of a row when packed
    bool packed;

    // 1 for members and 0 for others among `count` samples from `first` on.
    NABLA_TAU_INLINE void row(std::int64_t m, std::int64_t first, std::int64_t count, std::uint8_t* out) const {
        const char* start = data + m * model_stride;
        if (packed) {
            std::int64_t n = 0;
            while (n < count && (first + n) % 8 != 0) out[n] = bit(start, first + n), ++n;
            for (; n + 8 <= count; n += 8) {
                const auto byte = static_cast<unsigned char>(start[(first + n) / 8 * sample_stride]);
                for (int k = 0; k < 8; ++k) out[n + k] = (byte >> (7 - k)) & 1u;
            }
            for (; n < count; ++n) out[n] = bit(start, first + n);
        } else if (sample_stride == 1) {
            std::memcpy(out, start + first, static_cast<std::size_t>(count));
        } else {
            for (std::int64_t n = 0; n < count; ++n) {
                out[n] = static_cast<std::uint8_t>(start[(first + n) * sample_stride]);
            }
        }
    }

    NABLA_TAU_INLINE std::uint8_t bit(const char* row, std::int64_t n) const {
        return (static_cast<unsigned char>(row[n / 8 * sample_stride]) >> (7 - n % 8)) & 1u;
    }
};

}  // namespace nabla_tau
