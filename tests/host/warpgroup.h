// Products of warpgroups (wgmma), on the CPU. They are done when they are waited for, as late
// as can be. With EKFAC_CHECKED what they read has to be there when they begin: written,
// shown to the tensor cores' proxy by the writer's fence, with a barrier after that; and
// nobody may write it until the whole warpgroup has waited.
#pragma once

namespace host {

typedef unsigned long long u64;
constexpr long WINDOW = 1024;  // where dynamic shared memory begins in its address space
constexpr int MEMBERS = 128;

EKFAC_PLAIN u32 shared_address(const void* at) {
    return (u32)((const unsigned char*)at - dynamic_begin + WINDOW);
}

// An operand of 16-bit elements: `size` features (rows, or columns) times 16 to sum over.
struct Operand16 {
    u64 descriptor;
    int size;
    bool transposed;  // features lie side by side ("MN-major")

    bool operator==(const Operand16& other) const {
        return descriptor == other.descriptor && size == other.size &&
               transposed == other.transposed;
    }

    // Where an element is, as the PTX manual and CUTLASS (mma_traits_sm90_gmma.hpp) lay
    // matrices out without a swizzle and with that of 128 bytes.
    EKFAC_PLAIN long address(int feature, int k) const {
        long start = (descriptor & 0x3fff) << 4;
        long leading = (descriptor >> 16 & 0x3fff) << 4;
        long stride = (descriptor >> 32 & 0x3fff) << 4;
        bool swizzled = descriptor >> 62 == 1;
        if (descriptor >> 62 > 1) die("a swizzle that is not emulated");
        if (descriptor >> 49 & 7) die("a base offset that is not emulated");
        long at = start;
        if (transposed && swizzled)
            at += feature / 64 * leading + k / 8 * stride + k % 8 * 128 + feature % 64 * 2;
        else if (transposed)
            at += feature / 8 * stride + k / 8 * leading + k % 8 * 16 + feature % 8 * 2;
        else if (swizzled)
            at += feature / 8 * stride + feature % 8 * 128 + k * 2;
        else
            at += feature / 8 * stride + k / 8 * leading + feature % 8 * 16 + k % 8 * 2;
        return swizzled ? at ^ (at >> 7 & 7) << 4 : at;
    }

    EKFAC_PLAIN const unsigned char* element(int feature, int k) const {
        long at = address(feature, k) - WINDOW;
        if (at < 0 || at + 2 > dynamic_size) die("a product reads beyond shared memory");
        return dynamic_begin + at;
    }
};

struct Product {
    Operand16 a, b;
    int kind, waited = 0;
    std::vector<float> left, right;  // [features][16], when they are read
};

inline std::vector<std::vector<Product>> warpgroups;  // of each, since the block began

EKFAC_PLAIN void begin_products(int threads) {
    warpgroups.assign((threads + MEMBERS - 1) / MEMBERS, {});
    for (int t = 0; t < threads; t++) {
        fibers[t].products.clear();
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

template <class Visit>
inline void each_element(const Operand16& x, Visit visit) {
    for (int feature = 0; feature < x.size; feature++)
        for (int k = 0; k < 16; k++) visit(x.element(feature, k));
}

#ifdef EKFAC_CHECKED
template <class Visit>
EKFAC_PLAIN void each_word(const Product& p, Visit visit) {
    for (const Operand16* x : {&p.a, &p.b})
        for (int feature = 0; feature < x->size; feature += x->transposed ? 2 : 1)
            for (int k = 0; k < 16; k += x->transposed ? 1 : 2) {
                uintptr_t at = (uintptr_t)x->element(feature, k);
                Region& one = *region_of(at);
                visit(one, at, one.cells[(at - one.begin) / 4]);
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

EKFAC_PLAIN void start_product(float* c, u64 a, u64 b, int columns, int kind,
                               bool a_transposed, bool b_transposed) {
    bool before = watching;
    watching = false;
    Fiber& fiber = fibers[current];
    std::vector<Product>& begun = warpgroups[current / MEMBERS];
    if (!fiber.sums_fenced) die("a product without a fence of its sums");
    Product mine = {{a, 64, a_transposed}, {b, columns, b_transposed}, kind};
    size_t number = fiber.begun++;
    if (number == begun.size()) {
        claim(mine);
        read_by_products += 2 * 16 * (64 + columns);
        begun.push_back(mine);
    }
    const Product& its = begun[number];
    if (!(its.a == mine.a && its.b == mine.b && its.kind == kind))
        die("another product than the rest of its warpgroup");
    fiber.products.push_back({c, number, fiber.product_group});
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

EKFAC_PLAIN void read_operands(Product& p) {
    auto read = [&p](const Operand16& x, std::vector<float>& to) {
        each_element(x, [&](const unsigned char* at) {
            u16 word;
            std::memcpy(&word, at, 2);
            to.push_back(part(word, p.kind, 0));
        });
    };
    read(p.a, p.left);
    read(p.b, p.right);
}

// A thread's sums: those of two rows, as of the fragments of mma.sync (PTX ISA, "wgmma").
EKFAC_PLAIN void add_product(float* c, const Product& p) {
    int member = current % MEMBERS, lane = current % 32;
    for (int i = 0; i < p.b.size / 2; i++) {
        int row = member / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const float *left = &p.left[row * 16], *right = &p.right[column * 16];
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += left[k] * right[k];
        c[i] += sum;
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
        Product& p = warpgroups[current / MEMBERS][one.number];
        if (p.left.empty()) read_operands(p);
        add_product(one.c, p);
        if (++p.waited < MEMBERS) continue;
        release(p);
        p.left = p.right = {};
    }
    fiber.products.swap(rest);
    fiber.sums_fenced = false;
    watching = before;
}

}  // namespace host
