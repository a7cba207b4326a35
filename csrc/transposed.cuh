// Square tiles of X^T X in TF32 by products of warpgroups, for an even number of features that
// lie in aligned chunks of 16 bytes. Tensor cores take words of 32 bits only with what is summed
// over side by side ("K-major"), and rows are the other way round; what they read themselves
// they cut off. So words come through registers, where they are rounded. Those of the left
// operand stay there: two features of four rows are a thread's part of two products. Those
// of the right one are written to shared memory, four rows of a feature as one chunk: row r
// of the operand has 64 bytes, and its chunk c is at c ^ r / 2 % 4, the 64-byte swizzle,
// which gives eight features' chunks all banks.
#pragma once
#include "warpgroup.cuh"

constexpr int STAGES = 3;  // of what is stored, multiplied, and multiplied before
constexpr int CHUNKS = ROWS / 4;
constexpr int PAIRS = TILE / 2;  // of features
static_assert(ROWS == 16 && THREADS == PAIRS * CHUNKS, "a thread has 4 x 2 words of each");
static_assert(TILE % 16 == 0 && PAIRS % 32 == 0, "all threads of a warp have one chunk");

struct Stage {
    Words4 right[TILE * CHUNKS];
};
static_assert(sizeof(Stage) % 512 == 0, "a swizzled block begins at 512 bytes");

constexpr u32 NOWHERE = 0x80000000u;  // where a row begins that is none

// Rows of a step, as the threads of one operand read them: four at a time.
struct FourRows {
    Words4 base[4];  // in chunks
#if PATCHES
    Words4 at[3][4];  // far outside: no row
#endif
};
struct StepRows {
    FourRows left, right;  // rows i, i + 4, i + 8, i + 12; rows 4 i to 4 i + 3
    Words4 weight[4];      // zero: no row
};

struct Pipeline {
    Stage stages[STAGES];
    StepRows rows[RING];
};

DEVICE void keep_row(FourRows& rows, int four, int i, const Row& row) {
    int base = (int)(row.base / CHUNK);
#if PATCHES
    rows.base[four].v[i] = (u32)base;
    for (int axis = 0; axis < 3; axis++)
        rows.at[axis][four].v[i] = (u32)(row.valid ? row.at[axis] : FAR);
#else
    rows.base[four].v[i] = row.valid ? (u32)base : NOWHERE;
#endif
}

DEVICE void keep_row(StepRows& rows, int i, const Row& row) {
    keep_row(rows.left, i % 4, i / 4, row);
    keep_row(rows.right, i / 4, i % 4, row);
    rows.weight[i / 4].v[i % 4] = bits(row.valid ? row.weight : 0.0f);
}

// Two words of a row, or zeros.
DEVICE void load_pair(u32* to, const Words2* from, bool there) {
#ifdef EKFAC_HOST
    Words2 words = {{0, 0}};
    if (there) words = read_words<Words2>(from);
    to[0] = words.v[0], to[1] = words.v[1];
#else
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; "
        "@p ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
        : "=&r"(to[0]), "=&r"(to[1])
        : "l"(from), "r"((int)there));
#endif
}

// What a thread reads of every row: two features side by side.
struct Pair {
    Feature first;
    int half;  // where they begin, in halves of a chunk
};

// Beyond the last feature it is the first two: what comes of them is nobody's result.
DEVICE Pair own_pair(const Source& q, int feature) {
    Pair pair;
    make_feature(pair.first, q, feature < q.features ? feature : 0);
    pair.half = pair.first.offset / 2;
    return pair;
}

// An operand of a tile: its source, what of it a thread reads, and its rows.
struct Operand {
    const Source& q;
    Pair pair;
    bool is_left;
    EvenRows even;
    int begin;  // step of the sum that is the first here
};

// Of four rows where they begin, in chunks, or NOWHERE.
DEVICE Words4 look_up(const Operand& x, const FourRows& rows, int four) {
    Words4 base = read_words<Words4>(rows.base + four);
#if PATCHES
    bool there[4] = {true, true, true, true};
#pragma unroll
    for (int axis = 0; axis < 3; axis++) {
        Words4 at = read_words<Words4>(rows.at[axis] + four);
        for (int i = 0; i < 4; i++)
            there[i] &= at.v[i] + x.pair.first.at[axis] < (u32)x.q.size[axis];
    }
    for (int i = 0; i < 4; i++) base.v[i] = there[i] ? base.v[i] : NOWHERE;
#endif
    return base;
}

DEVICE Words4 even_four(const EvenRows& even, int row, int apart) {
    Words4 base;
#pragma unroll
    for (int i = 0; i < 4; i++, row += apart)
        base.v[i] = row < even.count ? (u32)(even.first + row * even.pitch) : NOWHERE;
    return base;
}

// A thread's words of a step: two features of four rows.
DEVICE void load_part(u32 (&part)[8], const Operand& x, const StepRows& rows, int step) {
    int four = x.is_left ? threadIdx.x % 4 : threadIdx.x / PAIRS;
    int row = (x.begin + step) * ROWS + four * (x.is_left ? 1 : 4);
    Words4 base = x.even.pitch ? even_four(x.even, row, x.is_left ? 4 : 1)
                               : look_up(x, x.is_left ? rows.left : rows.right, four);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int half = (int)base.v[i] * 2 + x.pair.half;
        const Words2* from = static_cast<const Words2*>(x.q.data) + half;
        load_pair(part + 2 * i, from, base.v[i] != NOWHERE);
    }
}

// A lane's two rows of its warp's 16, side by side in memory.
DEVICE int feature_of_row(int upper) { return threadIdx.x % 32 / 4 * 2 + upper; }
DEVICE int left_feature() { return warp_row() + feature_of_row(0); }
DEVICE int right_feature() { return threadIdx.x % PAIRS * 2; }

// The right operand's row that has a thread's first feature; its second is 8 rows on.
DEVICE int chunk_place() {
    int pair = threadIdx.x % PAIRS, row = pair / 8 * 16 + pair % 8;
    return row * CHUNKS + (threadIdx.x / PAIRS ^ row / 2 % 4);
}

// What is added up beside the products: of a thread's two features over its rows, and of
// their weights.
struct Sums {
    float feature[2], weight;
};

// Store a thread's part of the right operand, weighted and rounded.
DEVICE void store_part(Stage& stage, const u32 (&part)[8], const StepRows& rows,
                       bool weighted, bool with_sums, int place, Sums& sums) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = from_bits(part[i]);
    if (weighted) {
        Words4 weight = read_words<Words4>(rows.weight + threadIdx.x / PAIRS);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= from_bits(weight.v[i / 2]);
        if (with_sums)
#pragma unroll
            for (int i = 0; i < 4; i++) sums.weight += from_bits(weight.v[i]);
    }
    if (with_sums)
#pragma unroll
        for (int i = 0; i < 8; i++) sums.feature[i % 2] += x[i];
#pragma unroll
    for (int feature = 0; feature < 2; feature++) {
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; i++)
            words.v[i] = round_to_tf32(bits(x[2 * i + feature]));
        write_words(stage.right + place + feature * 8 * CHUNKS, words);
    }
}

DEVICE void round_part(u32 (&part)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) part[i] = round_to_tf32(part[i]);
}

// Start the products of one step: two, of eight rows each.
DEVICE void multiply(float (&sum)[COUNT], const u32 (&left)[8], const Stage& stage) {
    fence_sums();
#pragma unroll
    for (int half = 0; half < 2; half++)
        start_product(sum, left + half * 4,
                      descriptor(stage.right + half * 2, 1, 8 * CHUNKS, SWIZZLED_64));
    commit_products();
}

// The loop over steps. Products of a step are under way when those of the next begin.
// Meanwhile the right operand of the next step is stored and that after it loaded; when the
// products of the step before are done, the left operand's words take their registers. Step
// s has stage s % STAGES, and part s % STAGES of the left operand.
template <class Rows, class Load, class Store, class Multiply>
DEVICE void pipelined(u32 (&left)[STAGES][8], u32 (&right)[8], int steps, Rows rows,
                      Load load, Store store, Multiply multiply) {
    for (int s = 0; s < 3; s++) rows(s);
    __syncthreads();
    load(left[0], 0, true);
    load(right, 0, false);
    round_part(left[0]);
    store(right, 0, 0);
    fence_writes();
    if (steps > 1) load(left[1], 1, true);
    if (steps > 1) load(right, 1, false);
    for (int first = 0; first < steps; first += STAGES)
#pragma unroll
        for (int now = 0; now < STAGES; now++) {
            int step = first + now;
            if (step >= steps) break;
            int next = (now + 1) % STAGES, later = (now + 2) % STAGES;
            __syncthreads();
            multiply(left[now], now);
            if (step + 1 < steps) store(right, step + 1, next);
            fence_writes();
            if (step + 2 < steps) load(right, step + 2, false);
            wait_for_products<1>();
            settle(left[later]);
            if (step + 2 < steps) load(left[later], step + 2, true);
            rows(step + 3);
            round_part(left[next]);
        }
    wait_for_products<0>();
}

// Element i of a thread's part of the tile: a warp has 16 rows.
DEVICE int row_of(int i) { return warp_row() + feature_of_row(i % 4 / 2); }
DEVICE int column_of(int i) {
    return i / 8 * 16 + (threadIdx.x % 4 * 2 + i % 2) * 2 + i / 4 % 2;
}
