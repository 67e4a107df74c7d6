// Statistics on the scores of one model.
#include <pybind11/stl.h>

#include <utility>

#include "bind_arrays.h"
#include "bootstrap.h"
#include "class_thresholds.h"
#include "roc.h"

namespace nabla_tau {
namespace {

// Calls f with the scores as float or double, whichever they are.
template <class F>
auto with_scores(const char* name, const py::array& scores, F f) {
    if (holds<float>(scores)) return f(read_column<float>(name, "float32", scores));
    return f(read_column<double>(name, "float32 or float64", scores));
}

Ranks rank_arrays(const py::array& members, const py::array& nonmembers) {
    return with_scores("members", members, [&](const auto* in) {
        using Score = std::decay_t<decltype(*in)>;
        const auto* out = read_column<Score>("nonmembers", "the dtype of members", nonmembers);
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
    require_threads(num_threads);
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
        const bool* label_data = read<bool>("labels", "bool", labels, {count});
        const auto* class_data = read<std::int64_t>("classes", "int64", classes, {count});
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

// An array that owns the numbers.
py::array_t<double> moved(std::vector<double>&& values) {
    auto* kept = new std::vector<double>(std::move(values));
    const py::capsule owner(kept, [](void* given) { delete static_cast<std::vector<double>*>(given); });
    return py::array_t<double>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple roc_arrays(const py::array& scores, const py::array& labels) {
    RocCurve curve = with_scores("scores", scores, [&](const auto* data) {
        const std::int64_t count = scores.shape(0);
        const bool* label_data = read<bool>("labels", "bool", labels, {count});
        const py::gil_scoped_release release;
        return roc(data, label_data, count);
    });
    return py::make_tuple(moved(std::move(curve.fpr)), moved(std::move(curve.tpr)), moved(std::move(curve.thresholds)),
                          curve.auc);
}

}  // namespace

void bind_threshold(py::module_& m) {
    m.def("roc", &roc_arrays, py::arg("scores"), py::arg("labels"),
          R"(ROC curve and the area under it: (fpr, tpr, thresholds, each [K + 1] float64, auc).

One point for each of the K distinct scores, from the highest down, after (0, 0) at threshold inf. The area is exact
under ties, which count one half. scores [N] float32 or float64, infinities allowed; labels [N] bool, True for the
class that should score higher. Raises ValueError for a NaN or when one class is missing.)");

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

}  // namespace nabla_tau
