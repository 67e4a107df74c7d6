// What the bindings of the row kernels know of numpy: logits in any type, and arrays for results.
#pragma once

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bind_arrays.h"
#include "block_pool.h"
#include "rows.h"

namespace nabla_tau {

// An array in the computing dtype.
template <class Real>
const Real* read_real(const char* name, const py::array& array, const Shape& shape) {
    return read<Real>(name, sizeof(Real) == 8 ? "float64" : "float32", array, shape);
}

template <class Real>
const Real* read_real(const char* name, const std::optional<py::array>& array, const Shape& shape) {
    return array ? read_real<Real>(name, *array, shape) : nullptr;
}

// Calls f with a null pointer of the type in which the logits are stored.
template <class F>
auto dispatch_logits(const py::array& logits, F f) {
    if (logits.ndim() != 2 || logits.shape(1) < 1) {
        throw py::value_error("logits must be [N, V] with V >= 1, got " + shape_text(logits));
    }
    require_layout("logits", logits, {logits.shape(0), logits.shape(1)});
    if (holds<float>(logits)) return f(static_cast<float*>(nullptr));
    if (holds<double>(logits)) return f(static_cast<double*>(nullptr));
    if (holds<bfloat16>(logits)) return f(static_cast<bfloat16*>(nullptr));
    if (holds<float16>(logits)) return f(static_cast<float16*>(nullptr));
    wrong_dtype("logits", "float32, float64, float16 or uint16 (the bits of bfloat16)", logits);
}

template <class Real>
struct SignalArrays {
    py::array_t<Real> loss, lse, entropy, margin, p_max, grad_sq;
    py::array_t<bool> correct;

    explicit SignalArrays(py::ssize_t count)
        : loss(count), lse(count), entropy(count), margin(count), p_max(count), grad_sq(count), correct(count) {}

    RowSignals<Real> pointers() {
        return {loss.mutable_data(),   lse.mutable_data(),     entropy.mutable_data(), margin.mutable_data(),
                p_max.mutable_data(), grad_sq.mutable_data(), correct.mutable_data()};
    }

    py::tuple tuple() const { return py::make_tuple(loss, lse, entropy, margin, p_max, grad_sq, correct); }
};

// An array like the logits, in memory that the next one of about its size gets again.
inline py::array pooled_like(const py::array& logits) {
    // Never destroyed: arrays may outlive every static object.
    static BlockPool& pool = *new BlockPool;
    auto block = std::make_unique<BlockPool::Block>(pool.take(static_cast<std::size_t>(logits.nbytes())));
    const py::capsule owner(block.get(), [](void* given) {
        const std::unique_ptr<BlockPool::Block> block(static_cast<BlockPool::Block*>(given));
        pool.give(*block);
    });
    const void* data = block.release()->data;
    return py::array(logits.dtype(), Shape(logits.shape(), logits.shape() + 2), data, owner);
}

// The array that a gradient is written to: `out`, if given.
inline py::array gradient_array(const py::array& logits, const std::optional<py::array>& out) {
    if (!out) return pooled_like(logits);
    if (!out->dtype().equal(logits.dtype())) wrong_dtype("out", "the dtype of logits", *out);
    require_layout("out", *out, {logits.shape(0), logits.shape(1)});
    if (!out->writeable()) throw py::value_error("out must be writeable");
    return *out;
}

}  // namespace nabla_tau
