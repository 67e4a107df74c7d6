// Statistics over many models.
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bind_arrays.h"
#include "forgetting.h"
#include "group_moments.h"
#include "klom.h"

namespace nabla_tau {
namespace {

using Limits = std::array<std::int64_t, 2>;
using Known = std::tuple<py::array, py::array, py::array, std::optional<py::array>>;

template <class T>
Membership membership_of(const py::array& group, const Cells<T>& cells) {
    const bool packed = py::isinstance<py::array_t<std::uint8_t>>(group);
    if (!packed && !py::isinstance<py::array_t<bool>>(group)) {
        wrong_dtype("group", "bool, or uint8 as from numpy.packbits(group, axis=1)", group);
    }
    const py::ssize_t width = packed ? (cells.samples + 7) / 8 : cells.samples;
    if (group.ndim() != 2 || group.shape(0) != cells.models || group.shape(1) != width) {
        throw py::value_error("group must be [" + std::to_string(cells.models) + ", " + std::to_string(width) +
                              "], one row a model, got " + shape_text(group));
    }
    return {static_cast<const char*>(group.data()), group.strides(0), group.strides(1), packed};
}

Shape result_shape(const py::array& scores) {
    Shape shape(scores.shape(), scores.shape() + scores.ndim());
    shape[0] = 2;
    return shape;
}

py::tuple moments(const py::array& scores, const py::array& group, const Limits& limit, bool joint, bool sigmoid,
                  bool squares, const std::optional<Known>& known, int num_threads) {
    require_threads(num_threads);
    return dispatch_floats("scores", scores, [&](auto* type) -> py::tuple {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto cells = cells_of<T>("scores", scores);
        const Membership membership = membership_of(group, cells);
        const auto shape = result_shape(scores);
        auto square = shape;
        square.push_back(cells.queries);
        if (joint && scores.ndim() != 3) throw py::value_error("joint moments need [M, N, A], got " + shape_text(scores));
        const GroupOptions options{limit, joint, sigmoid};
        KnownMoments before{};
        if (known) {
            const auto& [count, mean, m2, scatter] = *known;
            before.count = read<std::int32_t>("known count", "int32", count, shape);
            before.mean = read<double>("known mean", "float64", mean, shape);
            before.m2 = read<double>("known m2", "float64", m2, shape);
            if (joint != scatter.has_value()) throw py::value_error("known scatter must be given just when joint is");
            if (joint) before.scatter = read<double>("known scatter", "float64", *scatter, square);
        }
        py::array_t<std::int32_t> count(shape);
        py::array_t<double> mean(shape);
        std::optional<py::array_t<double>> m2, scatter;
        if (squares) m2.emplace(shape);
        if (joint) scatter.emplace(square);
        const Moments out{count.mutable_data(), mean.mutable_data(), m2 ? m2->mutable_data() : nullptr,
                          scatter ? scatter->mutable_data() : nullptr};
        {
            const py::gil_scoped_release release;
            group_moments(cells, membership, options, before, out, num_threads);
        }
        return py::make_tuple(count, mean, m2, scatter);
    });
}

py::array_t<double> medians(const py::array& scores, const py::array& group, const Limits& limit, bool joint,
                            int num_threads) {
    require_threads(num_threads);
    return dispatch_floats("scores", scores, [&](auto* type) -> py::array_t<double> {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto cells = cells_of<T>("scores", scores);
        const Membership membership = membership_of(group, cells);
        py::array_t<double> median(result_shape(scores));
        double* data = median.mutable_data();
        {
            const py::gil_scoped_release release;
            group_medians(cells, membership, {limit, joint, false}, data, num_threads);
        }
        return median;
    });
}

// Calls f(unlearned, retrained, output) on margins [M, N] of two groups of models; returns the output [N].
template <class F>
py::array_t<double> compare(const py::array& unlearned, const py::array& retrained, int num_threads, F f) {
    require_threads(num_threads);
    if (unlearned.ndim() != 2 || retrained.ndim() != 2 || unlearned.shape(1) != retrained.shape(1)) {
        throw py::value_error("unlearned and retrained must be [M, N] with one N, got " + shape_text(unlearned) +
                              " and " + shape_text(retrained));
    }
    if (!unlearned.dtype().is(retrained.dtype()) && !unlearned.dtype().equal(retrained.dtype())) {
        wrong_dtype("retrained", "of the dtype of unlearned", retrained);
    }
    return dispatch_floats("unlearned", unlearned, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto first = cells_of<T>("unlearned", unlearned), second = cells_of<T>("retrained", retrained);
        py::array_t<double> result(unlearned.shape(1));
        double* data = result.mutable_data();
        {
            const py::gil_scoped_release release;
            f(first, second, data);
        }
        return result;
    });
}

py::array_t<double> epsilon(const py::array& unlearned, const py::array& retrained, bool exact, double delta,
                            double cap, int num_threads) {
    if (!(delta >= 0 && delta < 1)) throw py::value_error("delta must be in [0, 1), got " + std::to_string(delta));
    const ForgettingOptions options{exact ? ThresholdRule::exact : ThresholdRule::published, delta, cap};
    return compare(unlearned, retrained, num_threads, [&](const auto& first, const auto& second, double* out) {
        forgetting_epsilon(first, second, options, out, num_threads);
    });
}

py::array_t<double> divergence(const py::array& unlearned, const py::array& retrained, std::int64_t bins, double clip,
                               double floor, bool open_top, int num_threads) {
    if (bins < 1) throw py::value_error("bins must be at least 1, got " + std::to_string(bins));
    if (!(clip > 0)) throw py::value_error("clip must be positive, got " + std::to_string(clip));
    const KlomOptions options{bins, clip, floor, open_top};
    return compare(unlearned, retrained, num_threads, [&](const auto& first, const auto& second, double* out) {
        klom(first, second, options, out, num_threads);
    });
}

constexpr Limits kNoLimit{-1, -1};

}  // namespace

void bind_shadow(py::module_& m) {
    m.def("group_moments", &moments, py::arg("scores"), py::arg("group"), py::arg("limit") = kNoLimit,
          py::arg("joint") = false, py::arg("sigmoid") = false, py::arg("squares") = true,
          py::arg("known") = py::none(), py::arg("num_threads") = 1,
          R"(Count, mean and sum of squared differences of each sample's scores, for the models without it and with it.

scores [M, N] or [M, N, A] float16, float32 or float64, any strides; group [M, N] bool, or uint8 from
numpy.packbits(group, axis=1). Only finite scores count. limit: at most so many of the out- and in-models of a sample
count, the first in order; negative: all. joint: also the products of the queries' differences, over models whose
queries are all finite. sigmoid: of 1 / (1 + exp(-score)). known: the result for other models, which is joined.
Returns (count int32, mean, m2, scatter), each [2, N(, A)], index 1 the models with the sample; scatter [2, N, A, A] or
None; m2 None without squares. The mean of no scores is NaN. The same at any num_threads.)");

    m.def("group_medians", &medians, py::arg("scores"), py::arg("group"), py::arg("limit") = kNoLimit,
          py::arg("joint") = false, py::arg("num_threads") = 1,
          "Median of each sample's finite scores, [2, N(, A)] float64, NaN where there are none; as group_moments.");

    m.def("forgetting_epsilon", &epsilon, py::arg("unlearned"), py::arg("retrained"), py::arg("exact"),
          py::arg("delta"), py::arg("cap") = 50.0, py::arg("num_threads") = 1,
          R"(Largest epsilon of a threshold attack on each sample, [N] float64.

unlearned [Mu, N] and retrained [Mr, N] margins of one dtype, float16, float32 or float64, any strides; not finite ones
do not count. exact: one threshold at every margin; otherwise the competition's grids of one and of two thresholds. NaN
where a group is empty or no threshold errs on both sides.)");

    m.def("klom", &divergence, py::arg("unlearned"), py::arg("retrained"), py::arg("bins") = 20,
          py::arg("clip") = 100.0, py::arg("floor") = 1e-5, py::arg("open_top") = false, py::arg("num_threads") = 1,
          R"(KL divergence of each sample's margins, unlearned from retrained, over histograms, [N] float64.

Arrays as forgetting_epsilon; infinite margins are clipped, NaN left out, and a sample with an empty group gets NaN.
open_top leaves out margins at the upper end of the joint range.)");
}

}  // namespace nabla_tau
