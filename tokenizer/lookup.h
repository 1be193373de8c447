/* The tables behind tokenizer.cc (C++): which literal begins a text, where a text may be cut, which words are
 * known.
 */
#ifndef LTN_LOOKUP_H
#define LTN_LOOKUP_H

#include "tokenizer/sp_model.h"
#include "tokenizer/utf8.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string_view>
#include <utility>
#include <vector>

namespace ltn
{

inline std::string_view view(const struct ltn_sp_string &s)
{
    return {s.data, s.bytes};
}

/* A set of strings in which the longest that begins a text is found in time that does not depend on the text.
 */
class Literals
{
  public:
    struct Item {
        std::string_view text; /* owned by others; no two alike */
        int32_t id;
    };

    void assign(std::vector<Item> items)
    {
        items_ = std::move(items);
        std::sort(items_.begin(), items_.end(), [](const Item &a, const Item &b) { return a.text < b.text; });
        for (const Item &item : items_) {
            begins[(unsigned char)item.text[0]] = true;
            longest = std::max(longest, item.text.size());
        }
    }
    /* NULL: none. *more: all of the text begins an item that is longer. */
    const Item *match(const char *text, size_t bytes, bool *more) const
    {
        const Item *lo = items_.data(), *hi = lo + items_.size(), *best = nullptr;

        *more = false;
        for (size_t depth = 0; lo < hi; depth++) { /* [lo, hi) begin with text[0, depth) */
            if (lo->text.size() == depth)
                best = lo++;
            if (depth == bytes) {
                *more = lo < hi;
                break;
            }
            const unsigned char c = text[depth];
            lo =
                std::partition_point(lo, hi, [=](const Item &i) { return (unsigned char)i.text[depth] < c; });
            hi = std::partition_point(lo, hi,
                                      [=](const Item &i) { return (unsigned char)i.text[depth] == c; });
        }
        return best;
    }
    const Item *find(std::string_view text) const
    {
        const auto at = std::lower_bound(items_.begin(), items_.end(), text,
                                         [](const Item &item, std::string_view t) { return item.text < t; });
        return at != items_.end() && at->text == text ? &*at : nullptr;
    }

    size_t longest = 0;    /* bytes */
    bool begins[256] = {}; /* whether a byte begins one */

  private:
    std::vector<Item> items_; /* sorted by bytes: an item stands right before those that it begins */
};

/* Between which characters a text may be cut without any token noticing. */
class Cuts
{
  public:
    void learn(const struct ltn_sp_model &model)
    {
        merges_unknown_ = !model.byte_fallback;
        for (size_t i = 0; i < model.n_pieces; i++) {
            const struct ltn_sp_piece &piece = model.pieces[i];
            if (piece.type != LTN_SP_NORMAL && piece.type != LTN_SP_USER_DEFINED)
                continue;
            uint32_t c, before = 0;
            for (size_t at = 0; at < piece.text.bytes; before = c) {
                const size_t n = ltn_utf8_decode(piece.text.data + at, piece.text.bytes - at, &c);
                if (n == piece.text.bytes)
                    alone_.push_back(c);
                if (at > 0)
                    pairs_.push_back((uint64_t)before << 32 | c);
                at += n;
            }
        }
        sort_unique(pairs_);
        sort_unique(alone_);
        for (uint32_t a = 0; a < kCommon; a++)
            for (uint32_t b = 0; b < kCommon; b++)
                common_[a][b] = look_up(a == 0x80 ? kSpaceMark : a, b == 0x80 ? kSpaceMark : b);
    }

    /* A token that spans a and b would hold them side by side. Without byte fallback SentencePiece also joins
     * neighbouring unknown characters to one token: then one of the two must be a piece by itself. */
    bool safe(uint32_t a, uint32_t b) const
    {
        const uint32_t i = common(a), j = common(b);

        return i < kCommon && j < kCommon ? common_[i][j] : look_up(a, b);
    }

  private:
    static constexpr uint32_t kSpaceMark = 0x2581,
                              kCommon = 0x81; /* ASCII, and the space in the place of U+0080 */

    static uint32_t common(uint32_t c)
    {
        return c < 0x80 ? c : c == kSpaceMark ? 0x80 : kCommon;
    }
    bool look_up(uint32_t a, uint32_t b) const
    {
        return !std::binary_search(pairs_.begin(), pairs_.end(), (uint64_t)a << 32 | b) &&
               (!merges_unknown_ || std::binary_search(alone_.begin(), alone_.end(), a) ||
                std::binary_search(alone_.begin(), alone_.end(), b));
    }
    template <class T> static void sort_unique(std::vector<T> &v)
    {
        std::sort(v.begin(), v.end());
        v.erase(std::unique(v.begin(), v.end()), v.end());
        v.shrink_to_fit();
    }

    std::vector<uint64_t> pairs_; /* neighbours inside a piece, first character << 32 | second; sorted */
    std::vector<uint32_t> alone_; /* characters that are a piece; sorted */
    bool merges_unknown_ = false;
    bool common_[kCommon][kCommon]; /* look_up of the characters that most texts are made of */
};

/* The ids of words met before: a word's slot is its hash, and whoever comes later takes it. Takes 2 MiB once
 * it is in use. */
class Words
{
  public:
    struct Slot {
        uint8_t bytes, n; /* bytes 0: empty */
        char text[26];
        int32_t ids[9];
    };

    bool in_use() const
    {
        return slots_ != nullptr;
    }
    void use()
    {
        if (!in_use())
            slots_.reset(static_cast<Slot *>(calloc(kSlots, sizeof(Slot))));
        if (!in_use())
            throw std::bad_alloc();
    }
    /* NULL: none in use, or too long to be kept. */
    Slot *slot(std::string_view word)
    {
        return !in_use() || word.size() > sizeof(Slot::text)
                   ? nullptr
                   : &slots_[std::hash<std::string_view>()(word) % kSlots];
    }
    static bool holds(const Slot &slot, std::string_view word)
    {
        return slot.bytes == word.size() && memcmp(slot.text, word.data(), word.size()) == 0;
    }
    static void keep(Slot &slot, std::string_view word, const std::vector<int> &ids)
    {
        if (ids.size() > sizeof slot.ids / sizeof *slot.ids)
            return;
        slot.bytes = (uint8_t)word.size();
        slot.n = (uint8_t)ids.size();
        memcpy(slot.text, word.data(), word.size());
        std::copy(ids.begin(), ids.end(), slot.ids);
    }

  private:
    static constexpr size_t kSlots = 1 << 15; /* of 64 bytes */
    std::unique_ptr<Slot[], void (*)(void *)> slots_{nullptr, free};
};

} /* namespace ltn */
#endif
