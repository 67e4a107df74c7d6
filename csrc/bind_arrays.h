// Arrays as Python passes them: dtype dispatch, strided views, and errors that name the offending dtype or shape.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "strided.h"

namespace nabla_tau {

namespace py = pybind11;

using Shape = std::vector<py::ssize_t>;

inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")); }

template <class T>
bool holds(const py::array& array) {
    return py::isinstance<py::array_t<T>>(array);
}

// bfloat16 comes as the bits of its numbers; float16 is a type that numpy has and C++ has not.
template <>
inline bool holds<bfloat16>(const py::array& array) {
    return holds<std::uint16_t>(array);
}
template <>
inline bool holds<float16>(const py::array& array) {
    return array.dtype().equal(py::dtype("float16"));
}

[[noreturn]] inline void wrong_dtype(const char* name, const char* expected, const py::array& array) {
    throw py::type_error(std::string(name) + " must be " + expected + ", got " + std::string(py::str(array.dtype())));
}

inline void require_layout(const char* name, const py::array& array, const Shape& shape) {
    if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
        const py::tuple expected = py::cast(shape);
        throw py::value_error(std::string(name) + " must have shape " + std::string(py::str(expected)) + ", got " +
                              shape_text(array));
    }
    constexpr int kWanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & kWanted) != kWanted) {
        throw py::value_error(std::string(name) + " must be C-contiguous and aligned; its strides are " +
                              std::string(py::str(array.attr("strides"))));
    }
}

// The data of a contiguous array of T in just this shape.
template <class T>
const T* read(const char* name, const char* dtype, const py::array& array, const Shape& shape) {
    if (!holds<T>(array)) wrong_dtype(name, dtype, array);
    require_layout(name, array, shape);
    return static_cast<const T*>(array.data());
}

// The data of a contiguous 1-D array of T of any length.
template <class T>
const T* read_column(const char* name, const char* dtype, const py::array& array) {
    if (array.ndim() != 1) throw py::value_error(std::string(name) + " must be [N], got " + shape_text(array));
    return read<T>(name, dtype, array, {array.shape(0)});
}

inline void require_threads(int num_threads) {
    if (num_threads < 1) throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
}

// Scores [M, N] or [M, N, A]; T must be the dtype of the array.
template <class T>
Cells<T> cells_of(const char* name, const py::array& array) {
    if (array.ndim() != 2 && array.ndim() != 3) {
        throw py::value_error(std::string(name) + " must be [M, N] or [M, N, A], got " + shape_text(array));
    }
    if (array.ndim() == 3 && array.shape(2) == 0) {
        throw py::value_error(std::string(name) + " must have at least one query, got " + shape_text(array));
    }
    const bool queries = array.ndim() == 3;
    return {static_cast<const char*>(array.data()), array.shape(0),   array.shape(1),  queries ? array.shape(2) : 1,
            array.strides(0),                       array.strides(1), queries ? array.strides(2) : 0};
}

// Calls f(null pointer of the element type); byte order must be the machine's.
template <class F>
auto dispatch_floats(const char* name, const py::array& array, F f) {
    if (holds<float>(array)) return f(static_cast<float*>(nullptr));
    if (holds<double>(array)) return f(static_cast<double*>(nullptr));
    if (holds<float16>(array)) return f(static_cast<float16*>(nullptr));
    wrong_dtype(name, "float16, float32 or float64 in native byte order", array);
}

void bind_shadow(py::module_& m);
void bind_threshold(py::module_& m);
void bind_update(py::module_& m);

}  // namespace nabla_tau
