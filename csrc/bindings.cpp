#include "bindings.h"


#include <type_traits>

#include "multilabel.h"
#include "objective.h"
#include "simd.h"

using namespace nabla_tau;

namespace {

using OptionalArray = std::optional<py::array>;

// The options that every cross-entropy op takes.
struct Options {
    std::int64_t ignore_index;
    int num_threads;
    double label_smoothing;
    const OptionalArray& class_weights;
};

template <class T>
Rows<T> read_rows(const py::array& logits, const py::array& targets, const Options& options) {
    const py::ssize_t count = logits.shape(0), classes = logits.shape(1);
    require_threads(options.num_threads);
    if (!(options.label_smoothing >= 0 && options.label_smoothing <= 1)) {
        throw py::value_error("label_smoothing must be in [0, 1], got " + std::to_string(options.label_smoothing));
    }
    return {static_cast<const T*>(logits.data()),
            read<std::int64_t>("targets", "int64", targets, {count}),
            count,
            classes,
            options.ignore_index,
            static_cast<real_of<T>>(options.label_smoothing),
            read_real<real_of<T>>("class_weights", options.class_weights, {classes})};
}

template <class T>
void check(const Rows<T>& rows) {
    check_targets(rows.targets, rows.count, rows.classes, rows.ignore_index);
}

py::tuple forward(const py::array& logits, const py::array& targets, std::int64_t ignore_index, int num_threads,
                  double label_smoothing, const OptionalArray& class_weights) {
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto rows =
            read_rows<T>(logits, targets, {ignore_index, num_threads, label_smoothing, class_weights});
        SignalArrays<real_of<T>> arrays(rows.count);
        const auto signals = arrays.pointers();
        {
            const py::gil_scoped_release release;
            check(rows);
            rows_forward(rows, signals, num_threads);
        }
        return arrays.tuple();
    });
}

py::array backward(const py::array& logits, const py::array& targets, const py::array& lse, const py::array& margin,
                   const py::array& weights, std::int64_t ignore_index, int num_threads, double label_smoothing,
                   const OptionalArray& class_weights, const OptionalArray& out) {
    return dispatch_logits(logits, [&](auto* type) -> py::array {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        const auto rows =
            read_rows<T>(logits, targets, {ignore_index, num_threads, label_smoothing, class_weights});
        const auto* lse_data = read_real<Real>("lse", lse, {rows.count});
        const auto* margin_data = read_real<Real>("margin", margin, {rows.count});
        const auto* weight_data = read_real<Real>("weights", weights, {rows.count});
        py::array gradient = gradient_array(logits, out);
        auto* data = static_cast<T*>(gradient.mutable_data());
        {
            const py::gil_scoped_release release;
            check(rows);
            rows_backward(rows, lse_data, margin_data, weight_data, data, num_threads);
        }
        return gradient;
    });
}

py::tuple gradient(const py::array& logits, const py::array& targets, const OptionalArray& weights,
                   std::int64_t ignore_index, int num_threads, double label_smoothing,
                   const OptionalArray& class_weights, const OptionalArray& out) {
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        const auto rows =
            read_rows<T>(logits, targets, {ignore_index, num_threads, label_smoothing, class_weights});
        const auto* weight_data = read_real<Real>("weights", weights, {rows.count});
        SignalArrays<Real> arrays(rows.count);
        const auto signals = arrays.pointers();
        py::array result = gradient_array(logits, out);
        auto* data = static_cast<T*>(result.mutable_data());
        {
            const py::gil_scoped_release release;
            check(rows);
            rows_gradient(rows, weight_data, signals, data, num_threads);
        }
        return arrays.tuple() + py::make_tuple(result);
    });
}

py::tuple mean(const py::array& logits, const py::array& targets, double weight, const OptionalArray& base,
               std::optional<double> samples, std::int64_t ignore_index, int num_threads, double label_smoothing,
               const OptionalArray& class_weights) {
    if (base && !samples) throw py::value_error("base needs the number of samples");
    if (samples && !(*samples >= 0)) throw py::value_error("samples must not be negative, got " + std::to_string(*samples));
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        const auto rows =
            read_rows<T>(logits, targets, {ignore_index, num_threads, label_smoothing, class_weights});
        const auto* base_data = read_real<Real>("base", base, {rows.count});
        const py::array result = pooled_like(logits);
        auto* data = static_cast<T*>(py::array(result).mutable_data());
        py::array_t<Real> value(Shape{});
        double found;
        {
            const py::gil_scoped_release release;
            check(rows);
            found = rows_mean(rows, base_data, weight, samples.value_or(-1), data, num_threads);
        }
        *value.mutable_data() = static_cast<Real>(found);
        return py::make_tuple(value, result);
    });
}

Gate read_gate(const std::string& gate) {
    if (gate == "batch") return Gate::batch;
    if (gate == "two_sided") return Gate::two_sided;
    if (gate == "sample") return Gate::sample;
    throw py::value_error("gate must be batch, two_sided or sample, got " + gate);
}

py::tuple fused(const py::array& logits, const py::array& targets, const py::array& forget, double tau, double alpha,
                const std::string& gate, int power, const OptionalArray& base, double forget_count,
                double retain_count, std::int64_t ignore_index, int num_threads, double label_smoothing,
                const OptionalArray& class_weights, bool with_gradient) {
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        using Real = real_of<T>;
        const auto rows =
            read_rows<T>(logits, targets, {ignore_index, num_threads, label_smoothing, class_weights});
        const Objective<Real> objective{read<bool>("forget", "bool", forget, {rows.count}),
                                        tau,
                                        alpha,
                                        read_gate(gate),
                                        power,
                                        read_real<Real>("base", base, {rows.count}),
                                        forget_count,
                                        retain_count};
        if (power != 1 && power != 2) throw py::value_error("power must be 1 or 2, got " + std::to_string(power));
        if (base && objective.gate == Gate::sample) {
            throw py::value_error("gate=\"sample\" needs the loss of whole samples: it cannot be used with base");
        }
        SignalArrays<Real> arrays(rows.count);
        const auto signals = arrays.pointers();
        py::array_t<Real> terms(kTerms), weights(rows.count);
        Real *terms_data = terms.mutable_data(), *weights_data = weights.mutable_data();
        const OptionalArray result = with_gradient ? OptionalArray(pooled_like(logits)) : std::nullopt;
        T* data = result ? static_cast<T*>(py::array(*result).mutable_data()) : nullptr;
        {
            const py::gil_scoped_release release;
            check(rows);
            nabla_tau_rows(rows, objective, signals, terms_data, weights_data, data, num_threads);
        }
        return py::make_tuple(terms, weights, arrays.tuple(), result);
    });
}

template <class T>
LabelRows<T> read_label_rows(const py::array& logits, const py::array& targets, int num_threads) {
    require_threads(num_threads);
    const py::ssize_t count = logits.shape(0), labels = logits.shape(1);
    return {static_cast<const T*>(logits.data()), read_real<real_of<T>>("targets", targets, {count, labels}), count,
            labels};
}

py::tuple label_forward(const py::array& logits, const py::array& targets, int num_threads) {
    return dispatch_logits(logits, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto rows = read_label_rows<T>(logits, targets, num_threads);
        SignalArrays<real_of<T>> arrays(rows.count);
        const auto signals = arrays.pointers();
        {
            const py::gil_scoped_release release;
            multilabel_forward(rows, signals, num_threads);
        }
        return arrays.tuple();
    });
}

py::array label_backward(const py::array& logits, const py::array& targets, const py::array& weights, int num_threads,
                         const OptionalArray& out) {
    return dispatch_logits(logits, [&](auto* type) -> py::array {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto rows = read_label_rows<T>(logits, targets, num_threads);
        const auto* weight_data = read_real<real_of<T>>("weights", weights, {rows.count});
        py::array gradient = gradient_array(logits, out);
        auto* data = static_cast<T*>(gradient.mutable_data());
        {
            const py::gil_scoped_release release;
            multilabel_backward(rows, weight_data, data, num_threads);
        }
        return gradient;
    });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = R"(CPU kernels of nabla_tau on numpy arrays.

Nothing is converted: an array of another dtype raises TypeError, one of another shape or layout ValueError. bfloat16
logits are passed as the uint16 of their bits, `t.view(torch.uint16).numpy()`. Per-row numbers are float32 (float64 for
float64 logits), and so are all arrays given beside the logits. The GIL is released while a kernel runs, and results
are the same at any num_threads. New gradients lie in memory that is used again once they are freed. Import torch
before this module, so that both use one OpenMP runtime: the one that torch brings.)";

    const auto options = [](auto&& define, auto... more) {
        define(py::arg("ignore_index") = -100, py::arg("num_threads") = 1, py::arg("label_smoothing") = 0.0,
               py::arg("class_weights") = py::none(), more...);
    };

    options(
        [&](auto... args) {
            m.def("rows_forward", &forward, py::arg("logits"), py::arg("targets"), args...);
        },
        R"(Cross-entropy and attack signals of each row, as kernels.reference.rows.

logits [N, V] float32, float64, float16 or uint16 (bfloat16); targets [N] int64, each in [0, V) or ignore_index;
label_smoothing in [0, 1]; class_weights [V]. Returns (loss, lse, entropy, margin, p_max, grad_sq, correct), each [N],
correct bool. A logit of -inf is a class that is ruled out, also when it is the target: loss inf, margin -inf, lse
finite. A row with a NaN has loss NaN and is not correct. Raises ValueError for a target out of range.)");

    options(
        [&](auto... args) {
            m.def("rows_backward", &backward, py::arg("logits"), py::arg("targets"), py::arg("lse"),
                  py::arg("margin"), py::arg("weights"), args...);
        },
        py::arg("out") = py::none(), R"(Row-weighted gradient weights_i * dloss_i/dz_i, as kernels.reference.rows_grad.

logits, targets and options as for rows_forward, whose lse and margin [N] are taken; weights [N]. Returns [N, V] in the
dtype of logits (low precision rounded to nearest even): `out` if given, which may be logits. Rows that are ignored or
of weight 0 get zeros, whatever their logits. Raises ValueError for a target out of range.)");

    options(
        [&](auto... args) {
            m.def("rows_gradient", &gradient, py::arg("logits"), py::arg("targets"), py::arg("weights") = py::none(),
                  args...);
        },
        py::arg("out") = py::none(), R"(rows_forward and rows_backward with one read of the logits.

weights [N], or None for ones; everything else as for those two. Returns the seven signals and the gradient.)");

    m.def("rows_mean", &mean, py::arg("logits"), py::arg("targets"), py::arg("weight") = 1.0,
          py::arg("base") = py::none(), py::arg("samples") = py::none(), py::arg("ignore_index") = -100,
          py::arg("num_threads") = 1, py::arg("label_smoothing") = 0.0, py::arg("class_weights") = py::none(),
          R"(weight times the mean loss of the rows that are not ignored, and its gradient, with one read of the logits.

base [N] is the weight of each row within its sample; without it every row is a sample. samples: how many there are,
which base needs; by default the rows that are not ignored. Returns the mean, of no dimension, and the gradient [N, V].
Everything else as for rows_gradient.)");

    m.def("nabla_tau_rows", &fused, py::arg("logits"), py::arg("targets"), py::arg("forget"), py::arg("tau"),
          py::arg("alpha"), py::arg("gate") = "batch", py::arg("power") = 2, py::arg("base") = py::none(),
          py::arg("forget_count") = 0.0, py::arg("retain_count") = 0.0, py::arg("ignore_index") = -100,
          py::arg("num_threads") = 1, py::arg("label_smoothing") = 0.0, py::arg("class_weights") = py::none(),
          py::arg("with_gradient") = true,
          R"(Loss of a mixed batch with its gradient: nabla_tau.objective.objective over rows_forward.

forget [N] bool, True for a row to forget, in any order. gate "batch", "two_sided" or "sample"; power 1 or 2. base [N]
is the weight of each row within its sample, and forget_count and retain_count the samples that count; without it every
row that is not ignored is a sample, and gate "sample" needs that. Returns (terms, weights, signals, gradient): terms
[5] are total, forget term, forget loss, retain loss and gate_open; weights [N] are dtotal/dloss_i; the gradient [N, V]
is weights_i * dloss_i/dz_i, or None. Raises ValueError for a target out of range.)");

    m.def("multilabel_forward", &label_forward, py::arg("logits"), py::arg("targets"), py::arg("num_threads") = 1,
          R"(Mean binary cross-entropy and signals of multi-label rows, as kernels.reference.multilabel_rows.

logits [N, C] as for rows_forward; targets [N, C] in [0, 1]. Returns the seven signals.)");

    m.def("multilabel_backward", &label_backward, py::arg("logits"), py::arg("targets"), py::arg("weights"),
          py::arg("num_threads") = 1, py::arg("out") = py::none(),
          R"(Row-weighted gradient of multi-label rows, [N, C] in the dtype of logits; weights [N]. Rows of weight 0 get
zeros. `out` as for rows_backward.)");

    bind_shadow(m);
    bind_threshold(m);
    bind_update(m);

    m.def("openmp_max_threads", &nabla_tau::max_threads, "Threads that would be used if nobody told a number.");
    m.def("simd_level", &simd_level,
          "Instruction set the row kernels run on: 'x86-64-v4', 'x86-64-v3' or 'baseline' (SSE2, or NEON on Arm). "
          "The environment variable NABLA_TAU_SIMD lowers it.");
}
