// The right operand of products of warpgroups in TF32, for an even number of features that
// lie in aligned chunks of 16 bytes. Tensor cores take words of 32 bits only with what is summed
// over side by side ("K-major"), and rows are the other way round; what they read themselves
// they cut off. So words come through registers, where they are rounded: a thread loads two
// features of four rows, and writes four rows of a feature as one chunk. Row r of the operand
// has 64 bytes, and its chunk c is at c ^ r / 2 % 4, the 64-byte swizzle, which gives eight
// features' chunks all banks. The left operand is that of left.cuh.
#pragma once
#include "operands.cuh"

constexpr int PAIRS = TILE / 2;  // of features
constexpr int CHUNKS = ROWS / 4;
static_assert(ROWS == 16 && THREADS == PAIRS * CHUNKS, "a thread has 4 x 2 words of each");
static_assert(TILE % 16 == 0 && PAIRS % 32 == 0, "all threads of a warp have one chunk");

struct Stage {
    Words4 right[TILE * CHUNKS];
};
static_assert(sizeof(Stage) % 512 == 0, "a swizzled block begins at 512 bytes");

#include "left.cuh"

constexpr int STAGES = PARTS;  // one that is stored, others that are multiplied

DEVICE int right_feature() { return threadIdx.x % PAIRS * 2; }

// The right operand's row that has a thread's first feature; its second is 8 rows on.
DEVICE int chunk_place() {
    int pair = threadIdx.x % PAIRS, row = pair / 8 * 16 + pair % 8;
    return row * CHUNKS + (threadIdx.x / PAIRS ^ row / 2 % 4);
}

// Store a thread's two features of four rows, rounded.
DEVICE void store_rounded(Stage& stage, const float (&x)[8], int place) {
#pragma unroll
    for (int feature = 0; feature < 2; feature++) {
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; i++) words.v[i] = rounded(x[2 * i + feature]);
        write_words(stage.right + place + feature * 8 * CHUNKS, words);
    }
}

// Of the first of all stages; further columns of further ones, in two products of eight rows.
DEVICE u64 first_descriptor(const Stage* stages) {
    return descriptor(stages->right, 1, 8 * CHUNKS, SWIZZLED_64);
}
constexpr int COLUMN_CHUNKS = CHUNKS, HALF_CHUNKS = 2;

#if TWO_SUMS

// A thread's words of a step; of an `odd` tile's last feature one thread has it `alone`.
DEVICE void load_right_rows(u32 (&part)[8], const Reader<LANE_ROWS>& reader, int there,
                            bool odd, bool alone) {
    if (!odd) {
        load_rows<false>(part, reader, there);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        load_pair(part + 2 * i, reader.row(i), i, alone ? 0 : there);
        if (alone && i < there) part[2 * i] = load_word(reader.row(i));
    }
}

DEVICE void store_part(Stage& stage, const u32 (&part)[8], int place) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = from_bits(part[i]);
    store_rounded(stage, x, place);
}

#else

constexpr u32 NOWHERE = 0x80000000u;  // where a row begins that is none: the lowest number

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

// What a thread reads of every row: two features side by side.
struct Pair {
    Feature first;
    int at;  // where they begin, in pairs
};

// Beyond the last feature it is the first two: what comes of them is nobody's result.
DEVICE Pair own_pair(const Source& q, int feature) {
    Pair pair;
    make_feature(pair.first, q, feature < q.features ? feature : 0);
    pair.at = pair.first.offset / 2;
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
        int pair = (int)base.v[i] * 2 + x.pair.at;
        const Words2* from = static_cast<const Words2*>(x.q.data) + pair;
        load_pair(part + 2 * i, from, (int)NOWHERE, (int)base.v[i]);
    }
}

// What is added up beside the products: of a thread's two features over its rows, and of
// their weights.
struct Sums {
    float feature[2], weight;
};

// Store a thread's part of the right operand, weighted.
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
    store_rounded(stage, x, place);
}

// Start the products of one step: two, of eight rows each.
DEVICE void multiply(float (&sum)[COUNT], const u32 (&left)[8], u64 right) {
    fence_sums();
#pragma unroll
    for (int half = 0; half < 2; half++)
        start_product(sum, left + half * 4, right + half * HALF_CHUNKS);
    commit_products();
}

#endif
