// The nabla-tau loss of a mixed batch with the gradient of its logits in one call: nabla_tau/objective.py over rows.
#pragma once

#include "rows.h"

namespace nabla_tau {

// How the forget losses are held against tau: see nabla_tau/objective.py.
enum class Gate { batch, two_sided, sample };

template <class Real>
struct Objective {
    const bool* forget;  // [N]
    double tau;
    double alpha;
    Gate gate;
    int power;         // 1 or 2
    const Real* base;  // [N] weight of a row within its sample, or null: every row that counts is a sample
    double forget_count;  // of samples, given with base
    double retain_count;
};

// total, forget term, forget loss, retain loss, gate_open.
constexpr int kTerms = 5;

// Writes the signals, terms [kTerms], weights [N] = dtotal/dloss_i and, unless null, gradient = weights_i dloss_i/dz.
// Forget rows are read a second time for it, and only while the gate is open; retain rows are read once.
template <class T>
void nabla_tau_rows(const Rows<T>& rows, const Objective<real_of<T>>& objective, const RowSignals<real_of<T>>& signals,
                    real_of<T>* terms, real_of<T>* weights, T* gradient, int threads);

}  // namespace nabla_tau
