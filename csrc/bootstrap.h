// Ranks of members among non-members, exact under ties, and the stratified bootstrap of AUC and TPR that reuses them.
#pragma once

#include <cstdint>
#include <vector>

namespace nabla_tau {

// One model's order of M members and N non-members, found once: every replicate reuses it with other counts.
struct Ranks {
    std::vector<std::uint32_t> member_order;     // [M] members by score, ascending
    std::vector<std::uint32_t> nonmember_order;  // [N]
    std::vector<std::uint32_t> below;            // [M] non-members that score less than the i-th member in that order
    std::vector<std::uint32_t> upto;             // [M] ... at most as much
    std::vector<std::uint32_t> members_below;    // [N] members that score less than the j-th non-member in that order
    std::vector<std::uint32_t> members_upto;     // [N] ... at most as much
};

// Score is float or double. Throws std::invalid_argument for NaN, for an empty group and for more than 2^31 samples.
template <class Score>
Ranks rank(const Score* members, std::int64_t n_members, const Score* nonmembers, std::int64_t n_nonmembers);

// Placement of each sample in the other group: wins and half the ties over the size of that group, in the order of the
// samples (DeLong et al. 1988). Member i: P(it scores higher than a non-member); non-member j: P(a member beats it).
void placements(const Ranks& ranks, double* of_members, double* of_nonmembers);

struct BootstrapJob {
    std::vector<Ranks> models;                // of the same samples
    std::vector<std::uint32_t> allowed_false;  // false positives allowed, for each true-positive rate wanted
    std::uint64_t seed;
    std::int64_t replicates;
};

// auc [models, 1 + replicates] and tpr [models, rates, 1 + replicates]; entry 0 is that of the samples themselves.
//
// Replicate b >= 1 draws M members and N non-members with replacement, the same ones for every model. Draws are a
// function of (seed, b, group, position) alone, so neither the threads nor the other models matter: with mix the
// finaliser of SplitMix64 and G its increment, the w-th word of group g (members 0, non-members 1) is
// mix(mix(mix(seed) + 2 b + g) + (w + 1) G), and gives two draws: the high halves of word * n and of its low half * n.
// No sample is preferred by more than n^2 / 2^64.
void bootstrap(const BootstrapJob& job, double* auc, double* tpr, int threads);

}  // namespace nabla_tau
