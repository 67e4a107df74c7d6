// Random jobs for the attack statistics.
#pragma once

#include <cstdint>

// Rounds first, first + 1 and so on, each a function of its number alone; ends the program where one fails.
void fuzz(std::uint64_t first, std::uint64_t rounds);
