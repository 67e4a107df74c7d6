#pragma once

#include <cstdio>
#include <cstdlib>

namespace {

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

}  // namespace
