// Points of numpy.linspace, rounded as numpy rounds them.
#pragma once

#include <cstdint>

namespace nabla_tau {

// A product that is not fused with the sum after it, as GCC does where the machine can.
template <class Real>
inline Real rounded(Real x) {
    asm("" : "+m"(x));
    return x;
}

template <class Real>
struct Linspace {
    Real start, stop, step;
    std::int64_t count;

    Linspace(Real from, Real to, std::int64_t points)
        : start(from), stop(to), step(points > 1 ? (to - from) / static_cast<Real>(points - 1) : Real(0)),
          count(points) {}

    Real operator[](std::int64_t i) const {
        return i + 1 == count && count > 1 ? stop : rounded(static_cast<Real>(i) * step) + start;
    }
};

}  // namespace nabla_tau
