// Products of warpgroups whose left operand is in registers, loaded from global memory. A
// lane's two rows of a fragment are any two features: it takes two that lie side by side, of
// eight rows of a half type or four of words, which never see shared memory. The right
// operand is read there: copied as in pipeline.cuh, or words transposed by transposed.cuh.
#pragma once
#include "warpgroup.cuh"

constexpr int PAIR = 2 / PACK;        // words of two features
constexpr int LANE_ROWS = 8 / PAIR;   // of a step
typedef Words<PAIR> PairWords;

// Words of two features of a row, or zeros if `number` is not below `count`.
DEVICE void load_pair(u32* to, const void* from, int number, int count) {
#ifdef EKFAC_HOST
    PairWords words = {};
    if (number < count) words = read_words<PairWords>(from);
    for (int i = 0; i < PAIR; i++) to[i] = words.v[i];
#elif TRANSPOSED
    asm volatile(
        "{ .reg .pred p; setp.lt.s32 p, %3, %4; mov.b32 %0, 0; mov.b32 %1, 0; "
        "@p ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
        : "=&r"(to[0]), "=&r"(to[1])
        : "l"(from), "r"(number), "r"(count));
#else
    asm volatile(
        "{ .reg .pred p; setp.lt.s32 p, %2, %3; mov.b32 %0, 0; "
        "@p ld.global.nc.b32 %0, [%1]; }"
        : "=&r"(to[0])
        : "l"(from), "r"(number), "r"(count));
#endif
}

DEVICE u32 load_word(const void* from) {
#ifdef EKFAC_HOST
    return read_words<Words<1>>(from).v[0];
#else
    u32 word;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
#endif
}

// Rows of a thread's words of a step: the first of them, and how far another is. Of the left
// operand they are rows of a fragment: of words in two products, of a half type neighbours in
// each word of these.
template <bool LEFT>
DEVICE int first_row() {
    return LEFT ? threadIdx.x % 4 * PACK : threadIdx.x / (TILE / 2) * 4;
}
template <bool LEFT>
DEVICE int row_after(int i) {
    return !LEFT ? i : PACK == 2 ? i / 4 * 16 + i / 2 % 2 * 8 + i % 2 : i * 4;
}

// Rows that follow each other at equal steps, as a thread reads them: where it does in the
// first of its rows of a step, and how far the others are, in chunks.
template <int SIZE>
struct Reader {
    const unsigned char* at;
    int apart[SIZE];

    DEVICE const unsigned char* row(int i) const { return at + (i64)apart[i] * 16; }
};

// A thread's words of a step, of which `there` rows are left from its first one on.
template <bool LEFT>
DEVICE void load_rows(u32 (&part)[8], const Reader<LANE_ROWS>& reader, int there) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++)
        load_pair(part + PAIR * i, reader.row(i), row_after<LEFT>(i), there);
}

#ifndef EKFAC_HOST
// The lower halves of two words, and the upper ones. Here and not where they are used, while
// products are under way.
DEVICE void exchange_halves(u32& a, u32& b) {
    u32 low, high;
    asm volatile("prmt.b32 %0, %2, %3, 0x5410; prmt.b32 %1, %2, %3, 0x7632;"
                 : "=&r"(low), "=r"(high)
                 : "r"(a), "r"(b));
    a = low, b = high;
}
#else
inline void exchange_halves(u32& a, u32& b) {
    host::changed();
    u32 low = (a & 0xffffu) | b << 16, high = a >> 16 | (b & 0xffff0000u);
    a = low, b = high;
}
#endif

DEVICE u32 rounded(float x) { return round_to_tf32(bits(SQUARE ? x * x : x)); }

// What was loaded becomes what products take.
DEVICE void prepare(u32 (&part)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (PACK == 1) part[i] = rounded(from_bits(part[i]));
        if (PACK == 2 && i % 2) exchange_halves(part[i - 1], part[i]);
    }
}

// A lane's two rows of its warp's 16, side by side in memory.
DEVICE int feature_of_row(int upper) { return threadIdx.x % 32 / 4 * 2 + upper; }
DEVICE int left_feature() { return warp_row() + feature_of_row(0); }

// Element i of a thread's part of the tile: a warp has 16 rows.
DEVICE int row_of(int i) { return warp_row() + feature_of_row(i % 4 / 2); }
#if TRANSPOSED
DEVICE int column_of(int i) {
    return i / 8 * 16 + (threadIdx.x % 4 * 2 + i % 2) * 2 + i / 4 % 2;
}
#else
DEVICE int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
#endif

// Steps between a load and its products; a step's products are groups of their own.
constexpr int AHEAD = TWO_SUMS ? 3 : 2, GROUPS = TWO_SUMS ? 2 : 1;
constexpr int PARTS = AHEAD + 1;  // of the left operand: one that is read by products
constexpr int STAGE_CHUNKS = sizeof(Stage) / 16;

// Copies of the right operand: those of a step that is multiplied next have come, and are seen
// by tensor cores.
#if TRANSPOSED
DEVICE void commit_right() {}
DEVICE void show_copies() {}
#else
DEVICE void commit_right() { commit_copies(); }
DEVICE void show_copies() {
    wait_for_copies<AHEAD - 1>();
    fence_writes();
}
#endif

// The loop over steps. Products of a step are under way when those of the next begin.
// Meanwhile what comes after is loaded; when the products of the step before are done, the
// left operand's words take their registers. Step s has part s % PARTS of it. Words of the
// right operand are loaded too, and stored a step before their products; a half type's are
// copied. Of a step the right operand is loaded first. `start` starts a step's products;
// where `ends()`, `finish` waits for them and does what is to be done with their sums.
template <class Rows, class LoadRight, class LoadLeft, class Store, class Start, class Ends,
          class Finish>
DEVICE void pipelined(int steps, Rows rows, LoadRight load_right, LoadLeft load_left,
                      Store store, Start start, Ends ends, Finish finish) {
    u32 left[PARTS][8] = {};
    constexpr int OTHERS = TRANSPOSED ? AHEAD - 1 : 1;
    u32 right[OTHERS][8] = {};
    for (int s = 0; s <= AHEAD; s++) rows(s);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s == AHEAD - 1) store(right[0], 0, 0);
        if (s < steps) {
            load_right(right[s % OTHERS], s);
            load_left(left[s], s);
        }
        commit_right();
    }
    if (TRANSPOSED) fence_writes();
    prepare(left[0]);
    for (int first = 0; first < steps; first += PARTS)
#pragma unroll
        for (int now = 0; now < PARTS; now++) {
            int step = first + now, ahead = step + AHEAD;
            if (step >= steps) break;
            int next = (now + 1) % PARTS, later = (now + AHEAD) % PARTS;
            show_copies();
            __syncthreads();
            bool more = ahead < steps;
            auto right_follows = [&] {
                if (step + 1 < steps) store(right[next % OTHERS], step + 1, next);
                if (TRANSPOSED) fence_writes();
                if (more) load_right(right[next % OTHERS], ahead);
                commit_right();
            };
            auto left_follows = [&] {
                settle(left[later]);
                if (more) load_left(left[later], ahead);
                rows(ahead + 1);
                prepare(left[next]);
            };
            if (ends()) {
                // With others still under way, ptxas would not see that sums are read in time.
                wait_for_products<0>();
                start(left[now], step, now);
                right_follows();
                left_follows();
                finish();
            } else {
                start(left[now], step, now);
                right_follows();
                wait_for_products<GROUPS>();
                left_follows();
            }
        }
    wait_for_products<0>();
}
