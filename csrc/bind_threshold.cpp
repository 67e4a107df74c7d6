#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bootstrap.h"
#include "class_thresholds.h"

namespace py = pybind11;
using namespace nabla_tau;

namespace {

// The data of a contiguous 1-D array of T, of `size` values where that is given.
template <class T>
const T* column(const char* name, const char* dtype, const py::array& array, py::ssize_t size = -1) {
    const std::string is = std::string(name) + " must ";
    if (!py::isinstance<py::array_t<T>>(array)) {
        throw py::type_error(is + "be " + dtype + ", got " + std::string(py::str(array.dtype())));
    }
    if (array.ndim() != 1 || (size >= 0 && array.shape(0) != size)) {
        throw py::value_error(is + "have shape [" + (size < 0 ? "N" : std::to_string(size)) + "], got " +
                              std::string(py::str(array.attr("shape"))));
    }
    constexpr int kWanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & kWanted) != kWanted) throw py::value_error(is + "be C-contiguous and aligned");
    return static_cast<const T*>(array.data());
}

// Calls f with the scores as float or double, whichever they are.
template <class F>
auto with_scores(const char* name, const py::array& scores, F f) {
    if (py::isinstance<py::array_t<float>>(scores)) return f(column<float>(name, "float32", scores));
    return f(column<double>(name, "float32 or float64", scores));
}

Ranks rank_arrays(const py::array& members, const py::array& nonmembers) {
    return with_scores("members", members, [&](const auto* in) {
        using Score = std::decay_t<decltype(*in)>;
        const auto* out = column<Score>("nonmembers", "the dtype of members", nonmembers);
        const std::int64_t n_in = members.shape(0), n_out = nonmembers.shape(0);
        const py::gil_scoped_release release;
        return rank(in, n_in, out, n_out);
    });
}

py::tuple placement_arrays(const py::array& members, const py::array& nonmembers) {
    const Ranks ranks = rank_arrays(members, nonmembers);
    py::array_t<double> of_members(members.shape(0)), of_nonmembers(nonmembers.shape(0));
    double *in = of_members.mutable_data(), *out = of_nonmembers.mutable_data();
    {
        const py::gil_scoped_release release;
        placements(ranks, in, out);
    }
    return py::make_tuple(of_members, of_nonmembers);
}

py::tuple bootstrap_arrays(const std::vector<py::array>& members, const std::vector<py::array>& nonmembers,
                           const std::vector<std::uint32_t>& allowed_false, std::int64_t replicates,
                           std::uint64_t seed, int num_threads) {
    if (members.empty() || members.size() != nonmembers.size()) {
        throw py::value_error("members and nonmembers must be lists of as many models, got " +
                              std::to_string(members.size()) + " and " + std::to_string(nonmembers.size()));
    }
    if (replicates < 0) throw py::value_error("replicates must be at least 0, got " + std::to_string(replicates));
    if (num_threads < 1) throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
    BootstrapJob job{{}, allowed_false, seed, replicates};
    for (std::size_t m = 0; m < members.size(); ++m) {
        if (members[m].size() != members[0].size() || nonmembers[m].size() != nonmembers[0].size()) {
            throw py::value_error("model " + std::to_string(m) + " has other sample counts than model 0");
        }
        job.models.push_back(rank_arrays(members[m], nonmembers[m]));
    }
    const auto models = static_cast<py::ssize_t>(members.size());
    const auto rates = static_cast<py::ssize_t>(allowed_false.size());
    py::array_t<double> auc({models, static_cast<py::ssize_t>(replicates) + 1});
    py::array_t<double> tpr({models, rates, static_cast<py::ssize_t>(replicates) + 1});
    double *auc_data = auc.mutable_data(), *tpr_data = tpr.mutable_data();
    {
        const py::gil_scoped_release release;
        bootstrap(job, auc_data, tpr_data, num_threads);
    }
    return py::make_tuple(auc, tpr);
}

py::tuple class_threshold_arrays(const py::array& scores, const py::array& labels, const py::array& classes,
                                 std::int64_t n_classes) {
    if (n_classes < 1 || n_classes > std::int64_t(1) << 31) {
        throw py::value_error("n_classes must be from 1 to 2^31, got " + std::to_string(n_classes));
    }
    const std::vector<ClassThreshold> found = with_scores("scores", scores, [&](const auto* data) {
        const std::int64_t count = scores.shape(0);
        const bool* label_data = column<bool>("labels", "bool", labels, count);
        const auto* class_data = column<std::int64_t>("classes", "int64", classes, count);
        const py::gil_scoped_release release;
        return class_thresholds(data, label_data, class_data, count, n_classes);
    });
    py::array_t<double> thresholds(n_classes + 1);
    py::array_t<std::int64_t> counts({py::ssize_t(4), static_cast<py::ssize_t>(n_classes + 1)});
    for (std::int64_t c = 0; c <= n_classes; ++c) {
        thresholds.mutable_at(c) = found[c].threshold;
        counts.mutable_at(0, c) = found[c].members;
        counts.mutable_at(1, c) = found[c].nonmembers;
        counts.mutable_at(2, c) = found[c].true_positives;
        counts.mutable_at(3, c) = found[c].false_positives;
    }
    return py::make_tuple(thresholds, counts);
}

}  // namespace

void bind_threshold(py::module_& m) {
    m.def("placements", &placement_arrays, py::arg("members"), py::arg("nonmembers"),
          R"(Placement of each sample in the other group, (of members [M], of nonmembers [N]) float64.

Member i: share of the non-members that score less, ties one half; non-member j: share of the members that score more.
The mean of either is the AUC (DeLong et al. 1988). members [M], nonmembers [N] float32 or float64, both the same.
Raises ValueError for NaN and for an empty group.)");

    m.def("bootstrap", &bootstrap_arrays, py::arg("members"), py::arg("nonmembers"), py::arg("allowed_false"),
          py::arg("replicates"), py::arg("seed"), py::arg("num_threads") = 1,
          R"(Stratified bootstrap, paired over models: (auc [models, 1 + B], tpr [models, rates, 1 + B]) float64.

members and nonmembers list each model's scores, [M] and [N], float32 or float64, of the same samples in the same order.
Entry 0 is that of the samples themselves, entry b of the b-th resample of M members and N non-members, common to all
models. tpr is the largest at a threshold with at most allowed_false[rate] false positives. The draws are a function of
seed (64 bits), b and the sizes alone (csrc/bootstrap.h has the formula), so results are the same at any num_threads.
Raises ValueError for NaN, for an empty group and for models that differ in sizes.)");

    m.def("class_thresholds", &class_threshold_arrays, py::arg("scores"), py::arg("labels"), py::arg("classes"),
          py::arg("n_classes"), R"(Best threshold of each class: (thresholds [C + 1] float64, counts [4, C + 1] int64).

Maximises P(member >= t) + P(non-member < t) over the class's scores t; the highest of equals; NaN for a class without
members or without non-members. The last entry is that of all classes together. counts: members,
non-members, and those of either at or above the threshold. scores [N] float32 or float64, labels [N] bool (True:
member), classes [N] int64 in [0, n_classes). Raises ValueError for NaN and for a class out of range.)");
}
