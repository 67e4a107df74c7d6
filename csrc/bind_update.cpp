// The fused optimizer step. It takes addresses, not arrays: making an array of each tensor of a model would take longer
// than the step of a small one. `nabla_tau/_library_update.py` has checked what they point to.
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "bind_arrays.h"
#include "update.h"

namespace nabla_tau {
namespace {

using NoiseTuple = std::tuple<double, std::uint64_t, std::uint64_t>;

Table table_of(const py::array& table, int num_threads) {
    require_threads(num_threads);
    if (table.ndim() != 2) throw py::value_error("table must be [P, columns], got " + shape_text(table));
    return {read<std::int64_t>("table", "int64", table, {table.shape(0), kColumns}), table.shape(0)};
}

// Throws unless every row of the table has an address in each of the columns.
void require_addresses(const Table& table, std::initializer_list<Column> columns) {
    for (std::int64_t row = 0; row < table.rows; ++row) {
        if (table.integer(row, kSize) < 0) throw py::value_error("size must not be negative");
        for (const Column column : columns) {
            if (table.integer(row, kSize) > 0 && table.integer(row, column) == 0) {
                throw py::value_error(std::string(kColumnNames[column]) + " is missing in row " + std::to_string(row));
            }
        }
    }
}

void require_gradient(const Table& table) {
    for (std::int64_t row = 0; row < table.rows; ++row) {
        if (table.integer(row, kSize) > 0 && table.integer(row, kForget) == 0 && table.integer(row, kRetain) == 0) {
            throw py::value_error("forget and retain are missing in row " + std::to_string(row));
        }
    }
}

// Calls f(null pointer of the element type), without the interpreter's lock.
template <class F>
void dispatch(const std::string& dtype, const F& f) {
    const py::gil_scoped_release release;
    if (dtype == "float32") return f(static_cast<float*>(nullptr));
    if (dtype == "float64") return f(static_cast<double*>(nullptr));
    if (dtype == "float16") return f(static_cast<float16*>(nullptr));
    if (dtype == "bfloat16") return f(static_cast<bfloat16*>(nullptr));
    throw std::invalid_argument("dtype must be float32, float64, float16 or bfloat16, got " + dtype);
}

void step(bool is_adamw, const py::array& array, const std::string& dtype, double forget_scale, double retain_scale,
          const std::optional<NoiseTuple>& given, int num_threads) {
    const Table table = table_of(array, num_threads);
    require_addresses(table, {kParameter});
    if (is_adamw) require_addresses(table, {kFirst, kSecond, kStep});
    require_gradient(table);
    Noise noise;
    if (given) std::tie(noise.std, noise.seed, noise.step) = *given;
    const Scales scales{forget_scale, retain_scale, given ? &noise : nullptr};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        is_adamw ? adamw<T>(table, scales, num_threads) : sgd<T>(table, scales, num_threads);
    });
}

}  // namespace

void bind_update(py::module_& m) {
    py::list columns;
    for (const char* name : kColumnNames) columns.append(name);
    m.attr("UPDATE_COLUMNS") = py::tuple(columns);

    const auto define = [&](const char* name, bool is_adamw, const char* text) {
        m.def(
            name,
            [is_adamw](const py::array& table, const std::string& dtype, double forget_scale, double retain_scale,
                       const std::optional<NoiseTuple>& noise, int num_threads) {
                step(is_adamw, table, dtype, forget_scale, retain_scale, noise, num_threads);
            },
            py::arg("table"), py::arg("dtype"), py::arg("forget_scale"), py::arg("retain_scale"),
            py::arg("noise") = py::none(), py::arg("num_threads") = 1, text);
    };
    define("adamw", true, R"(One step of AdamW over a list of parameters, as kernels.update_reference.adamw.

table [P, len(UPDATE_COLUMNS)] int64, a row a parameter: addresses of contiguous tensors of dtype ("float32",
"float64", "bfloat16" or "float16"), 0 where there is none, mask bool, step float32; from "rate" on the bits of a
float64. noise: (std, seed, step). Nothing is checked of what the addresses point to. The same at any num_threads.)");
    define("sgd", false, "One step of SGD, first being the momentum buffer or 0, as kernels.update_reference.sgd.");

    m.def(
        "gradient_products",
        [](const py::array& array, const std::string& dtype, int num_threads) {
            const Table table = table_of(array, num_threads);
            std::array<double, 3> sums{};
            dispatch(dtype, [&](auto* type) {
                gradient_products<std::remove_pointer_t<decltype(type)>>(table, sums.data(), num_threads);
            });
            return sums;
        },
        py::arg("table"), py::arg("dtype"), py::arg("num_threads") = 1,
        "<f, f>, <f, r> and <r, r> of the forget and retain gradients of a table, where the masks let entries move.");

    m.def(
        "squared_distance",
        [](const py::array& array, const std::string& dtype, int num_threads) {
            const Table table = table_of(array, num_threads);
            require_addresses(table, {kParameter, kCentre});
            double sum = 0;
            dispatch(dtype, [&](auto* type) {
                sum = squared_distance<std::remove_pointer_t<decltype(type)>>(table, num_threads);
            });
            return sum;
        },
        py::arg("table"), py::arg("dtype"), py::arg("num_threads") = 1,
        "Squared distance of the parameters of a table from their centres, where the masks let entries move.");

    m.def(
        "pull",
        [](const py::array& array, const std::string& dtype, double factor, int num_threads) {
            const Table table = table_of(array, num_threads);
            require_addresses(table, {kParameter, kCentre});
            dispatch(dtype, [&](auto* type) {
                pull<std::remove_pointer_t<decltype(type)>>(table, factor, num_threads);
            });
        },
        py::arg("table"), py::arg("dtype"), py::arg("factor"), py::arg("num_threads") = 1,
        "parameter <- centre + factor (parameter - centre), where the masks let entries move.");
}

}  // namespace nabla_tau
