#include "bootstrap.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "score_sort.h"

namespace nabla_tau {
namespace {

__extension__ typedef unsigned __int128 uint128;

constexpr std::uint64_t kIncrement = 0x9e3779b97f4a7c15u;

// Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// How often each of n samples is drawn. A byte holds it: a count above 255 has a probability below 1 / 256!.
using Counts = std::vector<std::uint8_t>;

void resample(std::uint64_t seed, std::int64_t replicate, int group, Counts& counts) {
    const std::uint64_t n = counts.size();
    std::fill(counts.begin(), counts.end(), 0);
    std::uint64_t state = mix(mix(seed) + 2 * static_cast<std::uint64_t>(replicate) + group);
    std::uint8_t* const count = counts.data();
    for (std::uint64_t pair = 0; pair < n / 2; ++pair) {
        const uint128 first = static_cast<uint128>(mix(state += kIncrement)) * n;
        const uint128 second = static_cast<uint128>(static_cast<std::uint64_t>(first)) * n;
        ++count[static_cast<std::uint64_t>(first >> 64)];
        ++count[static_cast<std::uint64_t>(second >> 64)];
    }
    if (n % 2) ++count[static_cast<std::uint64_t>(static_cast<uint128>(mix(state + kIncrement)) * n >> 64)];
}

// Cumulated counts in a model's order, one longer than the counts.
struct Cumulated {
    std::vector<std::uint32_t> members, nonmembers;
};

// What one thread needs for one replicate.
struct Scratch {
    Counts members, nonmembers;
    Cumulated sums;
};

void cumulate(const Counts& counts, const std::vector<std::uint32_t>& order, std::vector<std::uint32_t>& sums) {
    std::uint32_t sum = 0;
    sums[0] = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
        sum += counts[order[i]];
        sums[i + 1] = sum;
    }
}

double resampled_auc(const Ranks& ranks, const Cumulated& sums) {
    // A sum of integers, hence exact: at most 2 M N.
    std::uint64_t twice_wins = 0;
    for (std::size_t i = 0; i < ranks.below.size(); ++i) {
        const std::uint64_t count = sums.members[i + 1] - sums.members[i];
        twice_wins += count * (std::uint64_t(sums.nonmembers[ranks.below[i]]) + sums.nonmembers[ranks.upto[i]]);
    }
    const double pairs = static_cast<double>(ranks.below.size()) * static_cast<double>(ranks.members_upto.size());
    return static_cast<double>(twice_wins) / (2.0 * pairs);
}

// The largest true-positive rate of a threshold that lets at most `allowed` false positives through.
double resampled_tpr(const Ranks& ranks, const Cumulated& sums, std::uint32_t allowed) {
    const auto n_members = static_cast<std::uint32_t>(ranks.below.size());
    const auto n_nonmembers = static_cast<std::uint32_t>(ranks.members_upto.size());
    if (allowed >= n_nonmembers) return 1.0;
    // The highest non-member that a threshold may not reach: with it there are more than `allowed` at or above.
    const auto above = std::lower_bound(sums.nonmembers.begin(), sums.nonmembers.end(), n_nonmembers - allowed);
    const auto refused = (above - sums.nonmembers.begin()) - 1;
    return static_cast<double>(n_members - sums.members[ranks.members_upto[refused]]) / n_members;
}

void check_size(const char* name, std::int64_t size) {
    if (size < 1 || size > std::int64_t(1) << 31) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) +
                                    " values; it must have from 1 to 2^31");
    }
}

template <class Score>
std::vector<Tagged<KeyOf<Score>>> sorted(const char* name, const Score* scores, std::int64_t count) {
    check_size(name, count);
    std::vector<Tagged<KeyOf<Score>>> items(count);
    for (std::int64_t i = 0; i < count; ++i) {
        refuse_nan(name, scores[i], i);
        items[i] = {key_of(scores[i]), static_cast<std::uint32_t>(i)};
    }
    radix_sort(items);
    return items;
}

// For each of `items`, how many of `others` have a lower key, and how many a key at most as high; both lists sorted.
template <class Key>
void count_others(const std::vector<Tagged<Key>>& items, const std::vector<Tagged<Key>>& others,
                  std::vector<std::uint32_t>& order, std::vector<std::uint32_t>& below,
                  std::vector<std::uint32_t>& upto) {
    for (auto* values : {&order, &below, &upto}) values->resize(items.size());
    std::uint32_t lower = 0, not_above = 0;
    const auto end = static_cast<std::uint32_t>(others.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
        while (lower < end && others[lower].key < items[i].key) ++lower;
        not_above = std::max(not_above, lower);
        while (not_above < end && others[not_above].key == items[i].key) ++not_above;
        order[i] = items[i].tag;
        below[i] = lower;
        upto[i] = not_above;
    }
}

}  // namespace

template <class Score>
Ranks rank(const Score* members, std::int64_t n_members, const Score* nonmembers, std::int64_t n_nonmembers) {
    const auto in = sorted("members", members, n_members), out = sorted("nonmembers", nonmembers, n_nonmembers);
    Ranks ranks;
    count_others(in, out, ranks.member_order, ranks.below, ranks.upto);
    count_others(out, in, ranks.nonmember_order, ranks.members_below, ranks.members_upto);
    return ranks;
}

void placements(const Ranks& ranks, double* of_members, double* of_nonmembers) {
    const std::size_t n_members = ranks.below.size(), n_nonmembers = ranks.members_below.size();
    for (std::size_t i = 0; i < n_members; ++i) {
        const std::uint64_t twice_wins = std::uint64_t(ranks.below[i]) + ranks.upto[i];
        of_members[ranks.member_order[i]] = static_cast<double>(twice_wins) / (2.0 * static_cast<double>(n_nonmembers));
    }
    for (std::size_t j = 0; j < n_nonmembers; ++j) {
        const std::uint64_t twice_lost = 2 * n_members - ranks.members_below[j] - ranks.members_upto[j];
        of_nonmembers[ranks.nonmember_order[j]] =
            static_cast<double>(twice_lost) / (2.0 * static_cast<double>(n_members));
    }
}

void bootstrap(const BootstrapJob& job, double* auc, double* tpr, int threads) {
    const std::size_t n_members = job.models.at(0).below.size(), n_nonmembers = job.models[0].members_below.size();
    const std::int64_t width = 1 + job.replicates;
    const auto rates = static_cast<std::int64_t>(job.allowed_false.size());
    const int team = team_size(threads);
    const Scratch empty{Counts(n_members), Counts(n_nonmembers),
                        {std::vector<std::uint32_t>(n_members + 1), std::vector<std::uint32_t>(n_nonmembers + 1)}};
    std::vector<Scratch> scratches(team, empty);
    const auto replicate = [&](std::int64_t b, Scratch& scratch) {
        Cumulated& sums = scratch.sums;
        if (b == 0) {
            std::fill(scratch.members.begin(), scratch.members.end(), 1);
            std::fill(scratch.nonmembers.begin(), scratch.nonmembers.end(), 1);
        } else {
            resample(job.seed, b, 0, scratch.members);
            resample(job.seed, b, 1, scratch.nonmembers);
        }
        for (std::size_t m = 0; m < job.models.size(); ++m) {
            const Ranks& ranks = job.models[m];
            cumulate(scratch.members, ranks.member_order, sums.members);
            cumulate(scratch.nonmembers, ranks.nonmember_order, sums.nonmembers);
            const auto model = static_cast<std::int64_t>(m);
            auc[model * width + b] = resampled_auc(ranks, sums);
            for (std::int64_t r = 0; r < rates; ++r) {
                tpr[(model * rates + r) * width + b] = resampled_tpr(ranks, sums, job.allowed_false[r]);
            }
        }
    };
    parallel_for(width, 1, team, [&](std::int64_t begin, std::int64_t end, int thread) {
        for (std::int64_t b = begin; b < end; ++b) replicate(b, scratches[static_cast<std::size_t>(thread)]);
    });
}

template Ranks rank(const float*, std::int64_t, const float*, std::int64_t);
template Ranks rank(const double*, std::int64_t, const double*, std::int64_t);

}  // namespace nabla_tau
