// Square tiles of X^T Y, for rows that lie anywhere: tables of rows and features say where.
#pragma once
#include "operands.cuh"
#include "tensor.cuh"

constexpr int PITCH = TILE + 8;  // four rows of eight neighbours: 32 different banks
constexpr int PER_THREAD = WORDS * TILE / THREADS;
static_assert(PER_THREAD == 8, "two quads or eight words per thread and step");

struct Shared {
    u32 left[2][WORDS * PITCH];
    u32 right[2][WORDS * PITCH];
    Feature left_features[TILE];
    Feature right_features[TILE];
    Row rows[2][ROWS];
};

// One element, as it lies in memory.
DEVICE u32 element(const Source& q, const Row& r, const Feature& f) {
    if (!r.valid || f.offset == NOTHING) return 0;
    if (f.offset == ONES) {
        return INPUT == INPUT_BFLOAT16 ? 0x3f80u
               : INPUT == INPUT_HALF   ? 0x3c00u
                                       : 0x3f800000u;
    }
    if (!inside(q, r, f)) return 0;
#if INPUT >= INPUT_BFLOAT16
    return static_cast<const u16*>(q.data)[r.base + f.offset];
#else
    return bits(static_cast<const float*>(q.data)[r.base + f.offset]);
#endif
}

// Which row of a step a thread finds; ROWS and more: none.
DEVICE int row_of_thread(int) { return threadIdx.x; }

DEVICE void keep_row(Row (&rows)[ROWS], int i, const Row& row) { rows[i] = row; }

// What a thread reads of every row, where that is the same features in each: one, or an
// aligned quad. Kept in registers: looking it up at every row would take longer than the
// products' operands do.
struct Own {
    Feature first;
    bool whole;  // a quad that is in memory, all of it
};

DEVICE Own own_features(const Source& q, int tile) {
    Own own = {{NOTHING, {0, 0, 0}}, false};
    int width = q.layout == LAYOUT_QUADS ? 4 : 1;
    if (q.layout == LAYOUT_ROWS) return own;
    int column = threadIdx.x % (TILE / width) * width;
    make_feature(own.first, q, tile * TILE + column);
    own.whole = tile * TILE + column + width <= q.features;
    return own;
}

// Four neighbouring features of one row: in PACK words of 16 or 8 bytes.
DEVICE Words4 quad(const Source& q, const Row& r, const Own& own, const Feature* f) {
    Words4 result = {{0, 0, 0, 0}};
    if (!own.whole) {
#pragma unroll 1  // the edge of a tile is no place to keep four features in registers
        for (int i = 0; i < 4; i++) result.v[i] = element(q, r, f[i]);
        return result;
    }
    if (!r.valid || !inside(q, r, own.first)) return result;
#if INPUT >= INPUT_BFLOAT16
    const u16* from = static_cast<const u16*>(q.data) + r.base + own.first.offset;
    Words2 raw = read_words<Words2>(from);
    result.v[0] = raw.v[0] & 0xffffu;
    result.v[1] = raw.v[0] >> 16;
    result.v[2] = raw.v[1] & 0xffffu;
    result.v[3] = raw.v[1] >> 16;
    return result;
#else
    const float* from = static_cast<const float*>(q.data) + r.base + own.first.offset;
    return read_words<Words4>(from);
#endif
}

// Where a thread's words of a step lie in the tile.
DEVICE void place(const Source& q, int word, int& row, int& column) {
    int thread = threadIdx.x;
    if (q.layout == LAYOUT_QUADS) {
        int item = thread + word / 4 * THREADS;
        row = item / (TILE / 4);
        column = item % (TILE / 4) * 4 + word % 4;
    } else if (q.layout == LAYOUT_FEATURES) {
        int item = thread + word * THREADS;
        row = item / TILE;
        column = item % TILE;
    } else {
        int item = thread + word * THREADS;
        row = item % WORDS;
        column = item / WORDS;
    }
}

// Read the thread's words of one step from global memory.
DEVICE void fetch(u32 (&words)[PER_THREAD], const Source& q, const Row* rows,
                  const Own& own, const Feature* features) {
    int row, column;
    if (q.layout == LAYOUT_QUADS) {
#pragma unroll
        for (int w = 0; w < PER_THREAD; w += 4) {
            place(q, w, row, column);
            const Row* at = rows + row * PACK;
            Words4 low = quad(q, at[0], own, features + column);
            if (PACK == 2) {
                Words4 high = quad(q, at[PACK - 1], own, features + column);
#pragma unroll
                for (int i = 0; i < 4; i++) low.v[i] |= high.v[i] << 16;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) words[w + i] = low.v[i];
        }
        return;
    }
    bool same = q.layout == LAYOUT_FEATURES;
#pragma unroll
    for (int w = 0; w < PER_THREAD; w++) {
        place(q, w, row, column);
        Feature f = same ? own.first : features[column];
        u32 word = element(q, rows[row * PACK], f);
        if (PACK == 2) word |= element(q, rows[row * PACK + PACK - 1], f) << 16;
        words[w] = word;
    }
}

// A word as an operand of the product.
DEVICE u32 operand(u32 word, const Row& r, bool weighted) {
#if INPUT < INPUT_BFLOAT16
    // Half types have no weights: a weighted row would be rounded once more.
    if (weighted || SQUARE) {
        float x = from_bits(word);
        if (SQUARE) x *= x;
        word = bits(weighted ? x * r.weight : x);
    }
#endif
#if INPUT == INPUT_TF32
    word = round_to_tf32(word);
#endif
    return word;
}

// Put the words into the tile, as operands of the product.
DEVICE void store(u32* tile, const u32 (&words)[PER_THREAD], const Source& q,
                  const Row* rows, bool weighted) {
    int row, column;
    if (q.layout == LAYOUT_QUADS) {
#pragma unroll
        for (int w = 0; w < PER_THREAD; w += 4) {
            place(q, w, row, column);
            Words4 four;
#pragma unroll
            for (int i = 0; i < 4; i++)
                four.v[i] = operand(words[w + i], rows[row], weighted);
            write_words(tile + row * PITCH + column, four);
        }
        return;
    }
#pragma unroll
    for (int w = 0; w < PER_THREAD; w++) {
        place(q, w, row, column);
        tile[row * PITCH + column] = operand(words[w], rows[row], weighted);
    }
}

#if INPUT == INPUT_FLOAT

// Element i of a thread's part of the tile. Without tensor cores: 8 rows in two groups
// of four, and 4 or 8 columns likewise, so that operands are read 16 bytes at a time.
constexpr int COLUMNS = TILE / 16;

DEVICE int row_of(int i) {
    int r = i / COLUMNS;
    return r / 4 * (TILE / 2) + threadIdx.x / 16 * 4 + r % 4;
}

DEVICE int column_of(int i) {
    int c = i % COLUMNS;
    return c / 4 * (TILE / 2) + threadIdx.x % 16 * 4 + c % 4;
}

DEVICE void multiply(float (&sum)[COUNT], const u32* left, const u32* right) {
    int top = threadIdx.x / 16 * 4, side = threadIdx.x % 16 * 4;
#pragma unroll 4
    for (int k = 0; k < WORDS; k++) {
        Words4 l[2], r[COLUMNS / 4];
        l[0] = read_words<Words4>(left + k * PITCH + top);
        l[1] = read_words<Words4>(left + k * PITCH + TILE / 2 + top);
#pragma unroll
        for (int c = 0; c < COLUMNS / 4; c++) {
            const u32* from = right + k * PITCH + c * (TILE / 2) + side;
            r[c] = read_words<Words4>(from);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int a = i / COLUMNS, b = i % COLUMNS;
            sum[i] += from_bits(l[a / 4].v[a % 4]) * from_bits(r[b / 4].v[b % 4]);
        }
    }
}

#else

// With tensor cores: a warp has TILE / 2 rows and 32 columns, as fragments of 16 x 8
// (PTX ISA, "Matrix Fragments for mma.m16n8k8" with .tf32 and "mma.m16n8k16" with
// .bf16 and .f16: in words of 32 bits the two have one layout).
constexpr int FRAGMENTS_M = TILE / 32, FRAGMENTS_N = 4;

DEVICE int warp_row() { return threadIdx.x / 32 % 2 * (TILE / 2); }
DEVICE int warp_column() { return threadIdx.x / 64 * 32; }

DEVICE int row_of(int i) {
    int lane = threadIdx.x % 32;
    return warp_row() + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
}

DEVICE int column_of(int i) {
    int lane = threadIdx.x % 32;
    return warp_column() + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
}

DEVICE void multiply(float (&sum)[COUNT], const u32* left, const u32* right) {
    int lane = threadIdx.x % 32;
    left += lane % 4 * PITCH + warp_row() + lane / 4;
    right += lane % 4 * PITCH + warp_column() + lane / 4;
#pragma unroll
    for (int k = 0; k < WORDS; k += 8) {
        u32 a[FRAGMENTS_M * 4], b[FRAGMENTS_N * 2];
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; m++) {
            a[m * 4] = left[k * PITCH + m * 16];
            a[m * 4 + 1] = left[k * PITCH + m * 16 + 8];
            a[m * 4 + 2] = left[(k + 4) * PITCH + m * 16];
            a[m * 4 + 3] = left[(k + 4) * PITCH + m * 16 + 8];
        }
#pragma unroll
        for (int n = 0; n < FRAGMENTS_N; n++) {
            b[n * 2] = right[k * PITCH + n * 8];
            b[n * 2 + 1] = right[(k + 4) * PITCH + n * 8];
        }
        warp_product<FRAGMENTS_M, FRAGMENTS_N>(sum, a, b);
    }
}

#endif
