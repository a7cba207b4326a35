// Square tiles of X^T Y, for rows that lie anywhere: a table of rows and a table of
// features say where, so that a weight, the column of ones of a bias, a convolution's
// patches and its padding cost no copy.
//
// TILE   64 or 128: rows and columns of a tile of the result.
// PATCHES 1 if features are a convolution's taps and channels.
// SQUARE 1 to square every element as it is read.
#pragma once
#include "common.cuh"

#ifndef TILE
#define TILE 128
#endif
#ifndef PATCHES
#define PATCHES 0
#endif
#ifndef SQUARE
#define SQUARE 0
#endif
constexpr int THREADS = TILE == 128 ? 256 : 128;
// A step of the sum is 16 rows of words: a word is one float32 or two rows of a half
// type, which makes the operand layouts of both tensor-core products the same.
constexpr int WORDS = 16;
constexpr int PACK = INPUT >= INPUT_BFLOAT16 ? 2 : 1;
constexpr int ROWS = WORDS * PACK;
constexpr int PITCH = TILE + 8;  // four rows of eight neighbours: 32 different banks
constexpr int PER_THREAD = WORDS * TILE / THREADS;
constexpr int COUNT = TILE * TILE / THREADS;  // elements of the result per thread
static_assert(TILE == 64 || TILE == 128, "the layouts below are for these two");
static_assert(PER_THREAD == 8, "two quads or eight words per thread and step");

constexpr int NOTHING = -1, ONES = -2;

// Neighbouring threads read neighbouring rows, features, or aligned quads of features.
constexpr int LAYOUT_ROWS = 0, LAYOUT_FEATURES = 1, LAYOUT_QUADS = 2;

struct Source {
    const void* data;
    i64 stride_n, stride_block, stride_feature;  // in elements
    int features;  // without the bias
    int bias;      // 1: one more feature, of ones
    int layout;    // what lies side by side in memory, see below
#if PATCHES
    int channels;           // features are channels times taps
    i64 stride[3];          // of positions in the input, slowest first
    int size[3], out[3];    // positions of the input and of the output
    int kernel[3], step[3], pad[3], dilation[3];
#else
    int unused;
    i64 stride_s;
#endif
};

struct alignas(16) Feature {
    int offset, at[3];
};

struct alignas(16) Row {
    i64 base;
    int at[3];
    float weight;
    int valid, unused;
};

struct Shared {
    u32 left[2][WORDS * PITCH];
    u32 right[2][WORDS * PITCH];
    Feature left_features[TILE];
    Feature right_features[TILE];
    Row rows[2][ROWS];
};

// Features are counted tap by tap within the kernels, so that the channels of
// channels-last inputs are neighbours; the weight's own order is channel by channel.
DEVICE int own_order(const Source& q, int feature) {
#if PATCHES
    if (feature >= q.features) return feature;
    int taps = q.kernel[0] * q.kernel[1] * q.kernel[2];
    return feature % q.channels * taps + feature / q.channels;
#else
    return feature;
#endif
}

DEVICE void make_feature(Feature& f, const Source& q, int feature) {
    f.at[0] = f.at[1] = f.at[2] = 0;
    if (feature >= q.features) {
        f.offset = feature == q.features && q.bias ? ONES : NOTHING;
        return;
    }
#if PATCHES
    int tap = feature / q.channels;
    i64 offset = feature % q.channels * q.stride_feature;
    for (int axis = 2; axis >= 0; axis--) {
        f.at[axis] = tap % q.kernel[axis] * q.dilation[axis];
        tap /= q.kernel[axis];
        offset += f.at[axis] * q.stride[axis];
    }
    f.offset = (int)offset;
#else
    f.offset = (int)(feature * q.stride_feature);
#endif
}

DEVICE void make_row(Row& r, const Source& q, int block, int n, int s, int valid,
                     float weight) {
    r.valid = valid;
    r.weight = weight;
    i64 base = n * q.stride_n + block * q.stride_block;
#if PATCHES
    for (int axis = 2; axis >= 0; axis--) {
        r.at[axis] = s % q.out[axis] * q.step[axis] - q.pad[axis];
        s /= q.out[axis];
        base += r.at[axis] * q.stride[axis];
    }
#else
    base += s * q.stride_s;
#endif
    r.base = base;
}

DEVICE bool inside(const Source& q, const Row& r, const Feature& f) {
#if PATCHES
    return (u32)(r.at[0] + f.at[0]) < (u32)q.size[0] &&
           (u32)(r.at[1] + f.at[1]) < (u32)q.size[1] &&
           (u32)(r.at[2] + f.at[2]) < (u32)q.size[2];
#else
    return true;
#endif
}

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

// Four neighbouring features of one row: in PACK words of 16 or 8 bytes.
DEVICE Words4 quad(const Source& q, const Row& r, const Feature* f) {
    Words4 result = {{0, 0, 0, 0}};
    if (f[3].offset < 0) {
        for (int i = 0; i < 4; i++) result.v[i] = element(q, r, f[i]);
        return result;
    }
    if (!r.valid || !inside(q, r, f[0])) return result;
#if INPUT >= INPUT_BFLOAT16
    const u16* from = static_cast<const u16*>(q.data) + r.base + f[0].offset;
    Words2 raw = *reinterpret_cast<const Words2*>(from);
    result.v[0] = raw.v[0] & 0xffffu;
    result.v[1] = raw.v[0] >> 16;
    result.v[2] = raw.v[1] & 0xffffu;
    result.v[3] = raw.v[1] >> 16;
    return result;
#else
    const float* from = static_cast<const float*>(q.data) + r.base + f[0].offset;
    return *reinterpret_cast<const Words4*>(from);
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
                  const Feature* features) {
    int row, column;
    if (q.layout == LAYOUT_QUADS) {
#pragma unroll
        for (int w = 0; w < PER_THREAD; w += 4) {
            place(q, w, row, column);
            Words4 low = quad(q, rows[row * PACK], features + column);
            if (PACK == 2) {
                Words4 high = quad(q, rows[row * PACK + PACK - 1], features + column);
#pragma unroll
                for (int i = 0; i < 4; i++) low.v[i] |= high.v[i] << 16;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) words[w + i] = low.v[i];
        }
        return;
    }
#pragma unroll
    for (int w = 0; w < PER_THREAD; w++) {
        place(q, w, row, column);
        u32 word = element(q, rows[row * PACK], features[column]);
        if (PACK == 2)
            word |= element(q, rows[row * PACK + PACK - 1], features[column]) << 16;
        words[w] = word;
    }
}

DEVICE float weighted_value(float x, float weight) {
    if (SQUARE) x *= x;
    return x * weight;
}

// Put the words into the tile, as operands of the product.
DEVICE void store(u32* tile, const u32 (&words)[PER_THREAD], const Source& q,
                  const Row* rows, bool weighted) {
#pragma unroll
    for (int w = 0; w < PER_THREAD; w++) {
        int row, column;
        place(q, w, row, column);
        u32 word = words[w];
#if INPUT < INPUT_BFLOAT16
        // Half types have no weights: a weighted row would be rounded once more.
        if (weighted || SQUARE) {
            float weight = weighted ? rows[row].weight : 1.0f;
            word = bits(weighted_value(from_bits(word), weight));
        }
#endif
#if INPUT == INPUT_TF32
        word = round_to_tf32(word);
#endif
        tile[row * PITCH + column] = word;
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
        l[0] = *reinterpret_cast<const Words4*>(left + k * PITCH + top);
        l[1] = *reinterpret_cast<const Words4*>(left + k * PITCH + TILE / 2 + top);
#pragma unroll
        for (int c = 0; c < COLUMNS / 4; c++) {
            const u32* from = right + k * PITCH + c * (TILE / 2) + side;
            r[c] = *reinterpret_cast<const Words4*>(from);
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

#ifndef EKFAC_HOST
DEVICE void fragment_product(float* c, const u32* a, const u32* b) {
#if INPUT == INPUT_TF32
#define EKFAC_MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
#elif INPUT == INPUT_BFLOAT16
#define EKFAC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define EKFAC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
    asm(EKFAC_MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void warp_product(float* c, const u32* a, const u32* b) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; m++)
#pragma unroll
        for (int n = 0; n < FRAGMENTS_N; n++)
            fragment_product(c + (m * FRAGMENTS_N + n) * 4, a + m * 4, b + n * 2);
}
#else
// All lanes of a warp together, on the CPU.
inline void warp_product(float* c, const u32* a, const u32* b) {
    host::warp_product(c, a, b, FRAGMENTS_M, FRAGMENTS_N, INPUT - INPUT_TF32);
}
#endif

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
        warp_product(sum, a, b);
    }
}

#endif

// Parts of one tile are written thread by thread, whatever the layout, and read back by
// the same threads; summed in their order, so that results repeat bit by bit.
DEVICE void write_part(float* parts, i64 item, const float (&sum)[COUNT]) {
    float* to = parts + item * (TILE * TILE) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i * THREADS] = sum[i];
}

DEVICE void sum_parts(float (&sum)[COUNT], const float* parts, i64 item, int splits) {
    const float* from = parts + item * (TILE * TILE) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = 0;
    for (int split = 0; split < splits; split++, from += TILE * TILE)
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] += from[i * THREADS];
}
