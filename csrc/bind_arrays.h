// Arrays as Python passes them: dtype dispatch, strided views, and errors that name the offending shape.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <vector>

#include "strided.h"

namespace nabla_tau {

namespace py = pybind11;

inline std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

[[noreturn]] inline void wrong_dtype(const char* name, const char* expected, const py::array& array) {
    throw py::type_error(std::string(name) + " must be " + expected + ", got " + std::string(py::str(array.dtype())));
}

inline void require_threads(int threads) {
    if (threads < 1) throw py::value_error("num_threads must be at least 1, got " + std::to_string(threads));
}

// Scores [M, N] or [M, N, A]; T must be the dtype of the array.
template <class T>
Cells<T> cells_of(const char* name, const py::array& array) {
    if (array.ndim() != 2 && array.ndim() != 3) {
        throw py::value_error(std::string(name) + " must be [M, N] or [M, N, A], got " + shape_of(array));
    }
    if (array.ndim() == 3 && array.shape(2) == 0) {
        throw py::value_error(std::string(name) + " must have at least one query, got " + shape_of(array));
    }
    const bool queries = array.ndim() == 3;
    return {static_cast<const char*>(array.data()), array.shape(0),   array.shape(1),  queries ? array.shape(2) : 1,
            array.strides(0),                       array.strides(1), queries ? array.strides(2) : 0};
}

// Calls f(pointer to the element type); byte order must be the machine's.
template <class F>
auto dispatch_floats(const char* name, const py::array& array, F f) {
    const py::dtype dtype = array.dtype();
    if (dtype.kind() == 'f' && dtype.byteorder() == '=') {
        if (dtype.itemsize() == 4) return f(static_cast<float*>(nullptr));
        if (dtype.itemsize() == 8) return f(static_cast<double*>(nullptr));
        if (dtype.itemsize() == 2) return f(static_cast<float16*>(nullptr));
    }
    wrong_dtype(name, "float16, float32 or float64 in native byte order", array);
}

// A contiguous array of T in just this shape.
template <class T>
const T* contiguous(const char* name, const char* dtype, const py::array& array,
                    const std::vector<py::ssize_t>& shape) {
    if (!py::isinstance<py::array_t<T>>(array)) wrong_dtype(name, dtype, array);
    const bool same = static_cast<std::size_t>(array.ndim()) == shape.size() &&
                      std::equal(shape.begin(), shape.end(), array.shape());
    if (!same) {
        const std::string expected = py::str(py::tuple(py::cast(shape)));
        throw py::value_error(std::string(name) + " must have shape " + expected + ", got " + shape_of(array));
    }
    constexpr int kWanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & kWanted) != kWanted) {
        throw py::value_error(std::string(name) + " must be C-contiguous and aligned");
    }
    return static_cast<const T*>(array.data());
}

}  // namespace nabla_tau
