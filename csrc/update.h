// One step of AdamW or of SGD over a list of parameters with two gradients each, in one pass over memory: the CPU side
// of kernels/update_reference.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace nabla_tau {

// What is known of a parameter, as the columns of a table of 64-bit integers with a row for each: the same table serves
// the GPU. Addresses are 0 where there is nothing; from kRate on a column holds the bits of a double.
enum Column : int {
    kParameter, kFirst, kSecond, kForget, kRetain, kMask, kCentre, kStep, kSize, kNumber, kRateAt,
    kRate, kDecay, kSign, kBeta1, kBeta2, kEps, kMomentum, kDampening, kNesterov,
    kColumns
};
constexpr const char* kColumnNames[] = {
    "parameter", "first", "second", "forget", "retain", "mask", "centre", "step", "size", "number", "rate_at",
    "rate", "decay", "sign", "beta1", "beta2", "eps", "momentum", "dampening", "nesterov",
};
static_assert(sizeof(kColumnNames) / sizeof(*kColumnNames) == kColumns, "a name for each column");

struct Table {
    const std::int64_t* data;
    std::int64_t rows;

    std::int64_t integer(std::int64_t row, Column column) const { return data[row * kColumns + column]; }
    double number(std::int64_t row, Column column) const {
        double value;
        std::memcpy(&value, data + row * kColumns + column, sizeof(value));
        return value;
    }
    template <class T>
    T* address(std::int64_t row, Column column) const {
        return reinterpret_cast<T*>(static_cast<std::intptr_t>(integer(row, column)));
    }
};

// The gradient is sign (forget_scale f + retain_scale r) + noise.
struct Scales {
    double forget;
    double retain;
    const Noise* noise;  // or null
};

// T, the type of parameters, gradients and state, is float, double, float16 or bfloat16. Results do not depend on
// `threads`, the largest number of threads to use.

// out: <f, f>, <f, r> and <r, r> over all parameters, of the entries that the masks let move.
template <class T>
void gradient_products(const Table& table, double* out, int threads);

// kFirst and kSecond are the means of gradients and of their squares; each step count (float) goes up by one.
template <class T>
void adamw(const Table& table, const Scales& scales, int threads);

// kFirst is the momentum buffer; null where there is no momentum.
template <class T>
void sgd(const Table& table, const Scales& scales, int threads);

// Squared distance of the parameters from their centres, of the entries that the masks let move.
template <class T>
double squared_distance(const Table& table, int threads);

// parameter <- centre + factor (parameter - centre), there.
template <class T>
void pull(const Table& table, double factor, int threads);

}  // namespace nabla_tau
