// Scores as unsigned integers that sort as they do, and a stable radix sort of them, alone or with something attached.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace nabla_tau {

// IEEE numbers with all bits of the negatives flipped, and the sign of the rest.
template <class Score>
using KeyOf = std::conditional_t<sizeof(Score) == 4, std::uint32_t, std::uint64_t>;

template <class Score>
constexpr KeyOf<Score> kSign = KeyOf<Score>(1) << (8 * sizeof(Score) - 1);

template <class Score>
KeyOf<Score> key_of(Score score) {
    KeyOf<Score> bits;
    score += Score(0);  // -0.0 + 0.0 is +0.0, so both zeros get one key
    std::memcpy(&bits, &score, sizeof(bits));
    return bits & kSign<Score> ? ~bits : bits | kSign<Score>;
}

template <class Score>
Score score_of(KeyOf<Score> key) {
    const KeyOf<Score> bits = key & kSign<Score> ? key & ~kSign<Score> : ~key;
    Score score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
}

// A key and what travels with it: an index, a class or a label.
template <class Key>
struct Tagged {
    Key key;
    std::uint32_t tag;
};

template <class Key>
Key sort_key(Key key) {
    return key;
}
template <class Key>
Key sort_key(const Tagged<Key>& item) {
    return item.key;
}

// Sorts keys or Tagged items by key; items of one key keep their order.
template <class Item>
void radix_sort(std::vector<Item>& items) {
    using Key = decltype(sort_key(std::declval<Item>()));
    constexpr int kBits = 11;
    constexpr std::size_t kBuckets = std::size_t(1) << kBits;
    constexpr int kPasses = (8 * sizeof(Key) + kBits - 1) / kBits;
    // Clearing and scanning the histograms is what a short sort would mostly do.
    if (items.size() < 2048) {
        std::stable_sort(items.begin(), items.end(),
                         [](const Item& a, const Item& b) { return sort_key(a) < sort_key(b); });
        return;
    }
    std::vector<std::array<std::size_t, kBuckets>> offsets(kPasses);
    for (const Item& item : items) {
        const Key key = sort_key(item);
        for (int pass = 0; pass < kPasses; ++pass) ++offsets[pass][(key >> (pass * kBits)) % kBuckets];
    }
    std::vector<Item> sorted(items.size());
    for (int pass = 0; pass < kPasses; ++pass) {
        auto& offset = offsets[pass];
        const int shift = pass * kBits;
        // One bucket holds everything: nothing would move.
        if (offset[(sort_key(items[0]) >> shift) % kBuckets] == items.size()) continue;
        std::size_t sum = 0;
        for (std::size_t& slot : offset) {
            const std::size_t size = slot;
            slot = sum;
            sum += size;
        }
        for (const Item& item : items) sorted[offset[(sort_key(item) >> shift) % kBuckets]++] = item;
        items.swap(sorted);
    }
}

template <class Score>
void refuse_nan(const char* name, Score score, std::int64_t index) {
    if (std::isnan(score)) throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] is NaN");
}

}  // namespace nabla_tau
