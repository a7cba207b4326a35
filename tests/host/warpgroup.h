// Products of warpgroups (wgmma), on the CPU. They are done when they are waited for, as late
// as can be. With EKFAC_CHECKED what they read has to be there when they begin: written,
// shown to the tensor cores' proxy by the writer's fence, with a barrier after that; and
// nobody may write it until the whole warpgroup has waited. A left operand in registers has
// to be rounded and fenced when the product begins, and the same when it is waited for. Until
// then its sums are not numbers, and nobody may write them.
#pragma once

namespace host {

typedef unsigned long long u64;
constexpr long WINDOW = 1024;  // where dynamic shared memory begins in its address space
constexpr int MEMBERS = 128;

EKFAC_PLAIN u32 shared_address(const void* at) {
    return (u32)((const unsigned char*)at - dynamic_begin + WINDOW);
}

// An operand in shared memory: `size` features (rows, or columns) times 32 bytes to sum over,
// which are 16 elements of a half type or 8 of TF32.
struct Shared {
    u64 descriptor;
    int size, bytes;  // of an element
    bool transposed;  // features lie side by side ("MN-major"), as words may not

    bool operator==(const Shared& other) const {
        return descriptor == other.descriptor && size == other.size &&
               bytes == other.bytes && transposed == other.transposed;
    }

    EKFAC_PLAIN int depth() const { return 32 / bytes; }

    // Where an element is, as the PTX manual and CUTLASS (mma_traits_sm90_gmma.hpp) lay
    // matrices out without a swizzle and with those of 128 and 64 bytes.
    EKFAC_PLAIN long address(int feature, int k) const {
        long start = (descriptor & 0x3fff) << 4;
        long leading = (descriptor >> 16 & 0x3fff) << 4;
        long stride = (descriptor >> 32 & 0x3fff) << 4;
        int swizzle = (int)(descriptor >> 62);  // 0, 128, 64 or 32 bytes
        if (swizzle > 2) die("a swizzle that is not emulated");
        if (descriptor >> 49 & 7) die("a base offset that is not emulated");
        if (transposed && (swizzle == 2 || bytes != 2)) die("a layout that is not emulated");
        long at = start;
        if (transposed && swizzle)
            at += feature / 64 * leading + k / 8 * stride + k % 8 * 128 + feature % 64 * 2;
        else if (transposed)
            at += feature / 8 * stride + k / 8 * leading + k % 8 * 16 + feature % 8 * 2;
        else if (swizzle)
            at += feature / 8 * stride + feature % 8 * (128 / swizzle) + k * bytes;
        else
            at += feature / 8 * stride + k * bytes / 16 * leading + feature % 8 * 16 +
                  k * bytes % 16;
        int exchanged = swizzle == 0 ? 0 : swizzle == 1 ? 7 : 3;
        return at ^ (at >> 7 & exchanged) << 4;
    }

    EKFAC_PLAIN const unsigned char* element(int feature, int k) const {
        long at = address(feature, k) - WINDOW;
        if (at < 0 || at + bytes > dynamic_size) die("a product reads beyond shared memory");
        return dynamic_begin + at;
    }
};

struct Product {
    std::vector<Shared> operands;  // left and right, or the right one alone
    int kind;
    bool adds;  // to the sums, or begins them
    int begun = 0, waited = 0;
    std::vector<float> left, right;  // [features][depth], when they are read

    EKFAC_PLAIN bool is(const Product& other) const {
        return operands == other.operands && kind == other.kind && adds == other.adds;
    }
    EKFAC_PLAIN int depth() const { return operands[0].depth(); }
    EKFAC_PLAIN bool left_in_registers() const { return operands.size() == 1; }
};

inline std::vector<std::vector<Product>> warpgroups;  // of each, since the block began

// What tensor cores take for a word: they cut off what was not rounded before.
EKFAC_PLAIN float tf32_of(u32 word) {
    if (word & 0x1fffu && (word & 0x7f800000u) != 0x7f800000u)
        die("a product of a word that is not rounded");
    return from_bits(word);
}

EKFAC_PLAIN void begin_products(int threads) {
    warpgroups.assign((threads + MEMBERS - 1) / MEMBERS, {});
    for (int t = 0; t < threads; t++) {
        fibers[t].products.clear();
        fibers[t].sums.clear();
        fibers[t].begun = 0;
        fibers[t].product_group = 0;
        fibers[t].sums_fenced = false;
        fibers[t].fences.clear();
    }
}

EKFAC_PLAIN void end_products(int threads) {
    for (int t = 0; t < threads; t++)
        if (fibers[t].begun != warpgroups[t / MEMBERS].size())
            fail("products that part of a warpgroup left out");
}

#ifdef EKFAC_CHECKED
template <class Visit>
EKFAC_PLAIN void each_word(const Product& p, Visit visit) {
    for (const Shared& x : p.operands) {
        int several = 4 / x.bytes;  // elements of a word
        for (int feature = 0; feature < x.size; feature += x.transposed ? several : 1)
            for (int k = 0; k < x.depth(); k += x.transposed ? 1 : several) {
                uintptr_t at = (uintptr_t)x.element(feature, k);
                Region& one = *region_of(at);
                visit(one, at, one.cells[(at - one.begin) / 4]);
            }
    }
}

// What a product is going to read has to be there, for tensor cores to see.
EKFAC_PLAIN void claim(const Product& p) {
    each_word(p, [](Region& one, uintptr_t at, Cell& cell) {
        if (cell.coming) die_at(one, at, "where a copy is still on its way");
        for (int i = 0; i < 4; i++)
            if (!one.written[at - one.begin + i]) die_at(one, at, "reads what nobody wrote");
        if (cell.write_turn == turn)
            die_at(one, at, "a race with a write since the last barrier");
        const std::vector<int>& fences = fibers[cell.writer].fences;
        if (fences.size() <= cell.fences || fences[cell.fences] == turn)
            die_at(one, at, "a product reads what no fence has shown to it");
    });
    each_word(p, [](Region&, uintptr_t, Cell& cell) { cell.products++; });
}

// All have waited for it: it may be overwritten, after a barrier.
EKFAC_PLAIN void release(const Product& p) {
    each_word(p, [](Region&, uintptr_t, Cell& cell) {
        cell.readers = true;
        cell.read_block = blockIdx.x;
        cell.read_turn = turn;
        cell.products--;
    });
}
#else
EKFAC_PLAIN void claim(const Product&) {}
EKFAC_PLAIN void release(const Product&) {}
#endif

constexpr u32 UNDER_WAY = 0x7fc0dead;  // no number

// Sums that a product begins to be added to; they have `size` elements.
EKFAC_PLAIN void keep_sums(float* c, int size) {
    std::vector<Sums>& kept = fibers[current].sums;
    for (Sums& one : kept)
        if (one.c == c) {
            one.products++;
            return;
        }
    kept.push_back({c, 1, std::vector<float>(c, c + size)});
    for (int i = 0; i < size; i++) std::memcpy(c + i, &UNDER_WAY, 4);
}

// A product has been added to sums: they are what they are when it was the last.
EKFAC_PLAIN void give_sums(Sums& kept) {
    if (--kept.products) return;
    for (size_t i = 0; i < kept.values.size(); i++) {
        if (bits(kept.c[i]) != UNDER_WAY) die("sums changed before products were waited for");
        kept.c[i] = kept.values[i];
    }
    std::vector<Sums>& all = fibers[current].sums;
    all.erase(all.begin() + (&kept - all.data()));
}

EKFAC_PLAIN Sums& sums_of(float* c) {
    for (Sums& one : fibers[current].sums)
        if (one.c == c) return one;
    die("sums that no product is added to");
}

// This thread's part of a product begins; returns the product.
EKFAC_PLAIN Product& begin_product(float* c, const Product& mine, const u32* a) {
    Fiber& fiber = fibers[current];
    std::vector<Product>& begun = warpgroups[current / MEMBERS];
    if (!fiber.sums_fenced) die("a product without a fence of its registers");
    size_t number = fiber.begun++;
    if (number == begun.size()) {
        claim(mine);
        for (const Shared& x : mine.operands) read_by_products += 32 * x.size;
        begun.push_back(mine);
    }
    Product& its = begun[number];
    if (!its.is(mine)) die("another product than the rest of its warpgroup");
    its.begun++;
    moved = true;
    Pending pending = {c, number, fiber.product_group, a, {}};
    if (a) std::memcpy(pending.copy, a, sizeof pending.copy);
    fiber.products.push_back(pending);
    keep_sums(c, mine.operands.back().size / 2);
    return its;
}

// Both operands are in shared memory, of a half type, and "MN-major".
EKFAC_PLAIN void start_product(float* c, u64 a, u64 b, int columns, int kind) {
    bool before = watching;
    watching = false;
    begin_product(c, {{{a, 64, 2, true}, {b, columns, 2, true}}, kind, true}, nullptr);
    watching = before;
}

// The left operand is in registers: PTX ISA, "wgmma", fragments of .tf32, and of .f16 and
// .bf16, whose words are two elements.
EKFAC_PLAIN void start_product(float* c, const u32* a, u64 b, int columns, int kind,
                               bool adds) {
    bool before = watching;
    watching = false;
    int several = kind == 0 ? 1 : 2, depth = 8 * several;
    Shared right = {b, columns, 4 / several, kind != 0};
    Product& its = begin_product(c, {{right}, kind, adds}, a);
    its.left.resize(64 * depth);
    int member = current % MEMBERS, lane = current % 32;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < several; j++) {
            int row = member / 32 * 16 + lane / 4 + i % 2 * 8;
            int k = (lane % 4 + i / 2 * 4) * several + j;
            its.left[row * depth + k] = kind == 0 ? tf32_of(a[i]) : part(a[i], kind, j);
        }
    watching = before;
}

EKFAC_PLAIN void fence_sums() { fibers[current].sums_fenced = true; }
EKFAC_PLAIN void commit_products() { fibers[current].product_group++; }

EKFAC_PLAIN void fence_writes() {
    bool before = watching;
    watching = false;
    fibers[current].fences.push_back(turn);
    watching = before;
}

EKFAC_PLAIN void read_operand(const Shared& x, int kind, std::vector<float>& to) {
    for (int feature = 0; feature < x.size; feature++)
        for (int k = 0; k < x.depth(); k++) {
            u32 word = 0;
            std::memcpy(&word, x.element(feature, k), x.bytes);
            to.push_back(kind == 0 ? tf32_of(word) : part(word, kind, 0));
        }
}

EKFAC_PLAIN void read_operands(Product& p) {
    if (!p.left_in_registers()) read_operand(p.operands[0], p.kind, p.left);
    read_operand(p.operands.back(), p.kind, p.right);
}

// A thread's sums: those of two rows, as of the fragments of mma.sync (PTX ISA, "wgmma").
EKFAC_PLAIN void add_product(std::vector<float>& c, const Product& p) {
    int member = current % MEMBERS, lane = current % 32, depth = p.depth();
    for (int i = 0; i < p.operands.back().size / 2; i++) {
        int row = member / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const float *left = &p.left[row * depth], *right = &p.right[column * depth];
        float sum = 0;
        for (int k = 0; k < depth; k++) sum += left[k] * right[k];
        c[i] = p.adds ? c[i] + sum : sum;
    }
}

EKFAC_PLAIN void wait_for_products(int later) {
    bool before = watching;
    watching = false;
    Fiber& fiber = fibers[current];
    std::vector<Pending> rest;
    for (const Pending& one : fiber.products) {
        if (one.group >= fiber.product_group - later) {
            rest.push_back(one);
            continue;
        }
        // Registers of other threads are part of it.
        int group = current / MEMBERS;
        while (warpgroups[group][one.number].begun < MEMBERS) yield();
        Product& p = warpgroups[group][one.number];
        if (one.a && std::memcmp(one.a, one.copy, sizeof one.copy))
            die("registers changed while a product still reads it");
        if (p.right.empty()) read_operands(p);
        Sums& sums = sums_of(one.c);
        add_product(sums.values, p);
        give_sums(sums);
        if (++p.waited < MEMBERS) continue;
        release(p);
        p.left = p.right = {};
    }
    fiber.products.swap(rest);
    fiber.sums_fenced = false;
    watching = before;
}

}  // namespace host
