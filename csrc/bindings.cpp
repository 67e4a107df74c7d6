#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "roc.h"
#include "rows.h"

namespace py = pybind11;
using namespace nabla_tau;

namespace {

std::string type_name(const py::array& array) { return py::str(array.dtype()); }

std::string shape_text(const py::array& array) { return py::str(array.attr("shape")); }

template <class T>
bool holds(const py::array& array) {
    return py::isinstance<py::array_t<T>>(array);
}

[[noreturn]] void wrong_dtype(const char* name, const char* expected, const py::array& array) {
    throw py::type_error(std::string(name) + " must be " + expected + ", got " + type_name(array));
}

void require_layout(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
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

template <class T>
const T* read(const char* name, const char* dtype, const py::array& array, const std::vector<py::ssize_t>& shape) {
    if (!holds<T>(array)) wrong_dtype(name, dtype, array);
    require_layout(name, array, shape);
    return static_cast<const T*>(array.data());
}

// How logits of T look from Python.
template <class T>
struct Numpy {
    using type = T;
};
template <>
struct Numpy<bfloat16> {
    using type = std::uint16_t;
};

template <class Real>
constexpr const char* kRealName = sizeof(Real) == 8 ? "float64" : "float32";

// Calls f with a null pointer of the type in which the logits are stored.
template <class F>
auto dispatch_logits(const py::array& logits, F f) {
    if (holds<float>(logits)) return f(static_cast<float*>(nullptr));
    if (holds<double>(logits)) return f(static_cast<double*>(nullptr));
    if (holds<std::uint16_t>(logits)) return f(static_cast<bfloat16*>(nullptr));
    wrong_dtype("logits", "float32, float64 or uint16 (the bits of bfloat16)", logits);
}

template <class T>
Rows<T> read_rows(const py::array& logits, const py::array& targets, std::int64_t ignore_index, int num_threads) {
    if (logits.ndim() != 2 || logits.shape(1) < 1) {
        throw py::value_error("logits must be [N, V] with V >= 1, got " + shape_text(logits));
    }
    if (num_threads < 1) throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
    const py::ssize_t count = logits.shape(0), classes = logits.shape(1);
    require_layout("logits", logits, {count, classes});
    return {static_cast<const T*>(logits.data()), read<std::int64_t>("targets", "int64", targets, {count}), count,
            classes, ignore_index};
}

template <class T>
void check(const Rows<T>& rows) {
    check_targets(rows.targets, rows.count, rows.classes, rows.ignore_index);
}

py::tuple forward(const py::array& logits, const py::array& targets, std::int64_t ignore_index, int num_threads) {
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        const auto rows = read_rows<T>(logits, targets, ignore_index, num_threads);
        py::array_t<Real> loss(rows.count), lse(rows.count), entropy(rows.count), margin(rows.count);
        py::array_t<bool> correct(rows.count);
        const RowSignals<Real> signals{loss.mutable_data(), lse.mutable_data(), entropy.mutable_data(),
                                       margin.mutable_data(), correct.mutable_data()};
        {
            const py::gil_scoped_release release;
            check(rows);
            rows_forward(rows, signals, num_threads);
        }
        return py::make_tuple(loss, lse, entropy, margin, correct);
    });
}

py::array backward(const py::array& logits, const py::array& targets, const py::array& lse, const py::array& margin,
                   const py::array& weights, std::int64_t ignore_index, int num_threads,
                   const std::optional<py::array>& out) {
    return dispatch_logits(logits, [&](auto* type) -> py::array {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        using Stored = typename Numpy<T>::type;
        const auto rows = read_rows<T>(logits, targets, ignore_index, num_threads);
        const auto* lse_data = read<Real>("lse", kRealName<Real>, lse, {rows.count});
        const auto* margin_data = read<Real>("margin", kRealName<Real>, margin, {rows.count});
        const auto* weight_data = read<Real>("weights", kRealName<Real>, weights, {rows.count});
        py::array gradient = out ? *out : py::array_t<Stored>({rows.count, rows.classes});
        read<Stored>("out", "the dtype of logits", gradient, {rows.count, rows.classes});
        if (!gradient.writeable()) throw py::value_error("out must be writeable");
        auto* data = static_cast<T*>(gradient.mutable_data());
        {
            const py::gil_scoped_release release;
            check(rows);
            rows_backward(rows, lse_data, margin_data, weight_data, data, num_threads);
        }
        return gradient;
    });
}

template <class F>
auto dispatch_scores(const py::array& scores, const py::array& labels, F f) {
    if (scores.ndim() != 1) throw py::value_error("scores must be [N], got " + shape_text(scores));
    const auto count = scores.shape(0);
    const auto run = [&](const auto* data) {
        const auto* label_data = read<bool>("labels", "bool", labels, {count});
        const py::gil_scoped_release release;
        return f(data, label_data, static_cast<std::int64_t>(count));
    };
    if (holds<float>(scores)) return run(read<float>("scores", "float32", scores, {count}));
    if (holds<double>(scores)) return run(read<double>("scores", "float64", scores, {count}));
    wrong_dtype("scores", "float32 or float64", scores);
}

py::array_t<double> to_numpy(const std::vector<double>& values) {
    return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = R"(CPU kernels of nabla_tau on numpy arrays.

Nothing is converted: an array of another dtype raises TypeError, one of another shape or layout ValueError. bfloat16
logits are passed as the uint16 of their bits, `t.view(torch.uint16).numpy()`. The GIL is released while a kernel runs.
Import torch before this module, so that both use one OpenMP runtime: the one that torch brings.)";

    m.def("rows_forward", &forward, py::arg("logits"), py::arg("targets"), py::arg("ignore_index") = -100,
          py::arg("num_threads") = 1, R"(Cross-entropy and attack signals of each row, as kernels.reference.rows.

logits [N, V] float32, float64 or uint16 (bfloat16); targets [N] int64, each in [0, V) or ignore_index. Returns
(loss, lse, entropy, margin, correct), each [N]: float32 (float64 for float64 logits), correct bool. A logit of -inf is
a class that is ruled out, also when it is the target: loss inf, margin -inf, lse finite. A row with a NaN has loss NaN
and is not correct. Results are the same at any num_threads. Raises ValueError for a target out of range.)");

    m.def("rows_backward", &backward, py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("margin"),
          py::arg("weights"), py::arg("ignore_index") = -100, py::arg("num_threads") = 1,
          py::arg("out") = py::none(), R"(Row-weighted gradient weights_i * (softmax(z_i) - onehot(y_i)).

logits, targets, ignore_index and num_threads as for rows_forward, whose lse and margin [N] are taken; weights [N] in
their dtype. Returns [N, V] in the dtype of logits (bfloat16 as uint16, rounded to nearest even): `out` if given, which
may be logits. Rows that are ignored or of weight 0 get zeros, whatever their logits. Raises ValueError for a target
out of range.)");

    m.def(
        "auc",
        [](const py::array& scores, const py::array& labels) {
            return dispatch_scores(scores, labels, [](auto... args) { return auc(args...); });
        },
        py::arg("scores"), py::arg("labels"), R"(Area under the ROC curve, exact under ties (half a win each).

scores [N] float32 or float64, infinities allowed; labels [N] bool, True for the class that should score higher. Raises
ValueError for a NaN or when one class is missing.)");

    m.def(
        "roc",
        [](const py::array& scores, const py::array& labels) {
            const RocCurve curve = dispatch_scores(scores, labels, [](auto... args) { return roc(args...); });
            return py::make_tuple(to_numpy(curve.fpr), to_numpy(curve.tpr), to_numpy(curve.thresholds));
        },
        py::arg("scores"), py::arg("labels"), R"(ROC curve (fpr, tpr, thresholds), each [K + 1] float64.

One point for each of the K distinct scores, from the highest down, after (0, 0) at threshold inf. Inputs and errors
as for auc.)");

    m.def("openmp_max_threads", &omp_get_max_threads, "Threads that OpenMP would use if it were not told a number.");
    m.def("simd_level", &simd_level,
          "Instruction set the row kernels run on: 'x86-64-v4', 'x86-64-v3' or 'baseline' (SSE2, or NEON on Arm). "
          "The environment variable NABLA_TAU_SIMD lowers it.");
}
