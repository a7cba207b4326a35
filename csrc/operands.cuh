// Operands of tiles of X^T Y: where rows and features lie, so that a weight, the column of
// ones of a bias, a convolution's patches and its padding cost no copy.
//
// TILE     64 or 128: rows and columns of a tile of the result.
// PATCHES  1 if features are a convolution's taps and channels.
// SQUARE   1 to square every element as it is read.
// PIPELINE 1 for the products of pipeline.cuh, 0 for those of tiles.cuh.
// TWO_SUMS 1 in a pipeline whose threads have two sums of each element: warps of 32 columns.
// WARPGROUP 1 in a pipeline whose products are those of warpgroup.cuh; TILE is 192, with
//          two sums 128. Words of TF32 are transposed for them, by transposed.cuh.
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
#ifndef PIPELINE
#define PIPELINE 0
#endif
#ifndef TWO_SUMS
#define TWO_SUMS 0
#endif
#ifndef WARPGROUP
#define WARPGROUP 0
#endif
#define TRANSPOSED (WARPGROUP && INPUT == INPUT_TF32)
#define LEFT_IN_REGISTERS (WARPGROUP && (TWO_SUMS || INPUT == INPUT_TF32))
// Warps of a pipeline along the columns of a tile; along its rows there are two.
constexpr int ACROSS = TWO_SUMS ? TILE / 32 : 2;
constexpr int THREADS = WARPGROUP  ? 2 * TILE
                        : PIPELINE ? 64 * ACROSS
                        : TILE == 128 ? 256
                                      : 128;
// A step of the sum is 16 rows of words: a word is one float32 or two rows of a half
// type, which makes the operand layouts of both tensor-core products the same.
constexpr int WORDS = 16;
constexpr int PACK = INPUT >= INPUT_BFLOAT16 ? 2 : 1;
constexpr int ROWS = WORDS * PACK;
constexpr int COUNT = TILE * TILE / THREADS;  // elements of the result per thread
static_assert(WARPGROUP ? TILE == (TWO_SUMS ? 128 : 192) : TILE == 64 || TILE == 128,
              "the layouts below are for these two");

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

template <class Position>
DEVICE bool inside(const Source& q, const Position& r, const Feature& f) {
#if PATCHES
    return (u32)(r.at[0] + f.at[0]) < (u32)q.size[0] &&
           (u32)(r.at[1] + f.at[1]) < (u32)q.size[1] &&
           (u32)(r.at[2] + f.at[2]) < (u32)q.size[2];
#else
    return true;
#endif
}

#if PIPELINE
// Features lie in aligned chunks of 16 bytes, in which rows are counted too.
constexpr int CHUNK = 16 / sizeof(Element);  // elements
constexpr int RING = 8;  // steps whose rows are known, some before they are read
constexpr int FAR = -(1 << 30);  // a position of no row, outside of every input

// Which row of a step a thread finds; ROWS and more: none. Warps take turns.
DEVICE int row_of_thread(int step) {
    int first = step % 4 * 32, thread = threadIdx.x;
    return thread < first ? ROWS : thread - first;
}

// Rows of a sum that follow each other at equal steps: nobody has to find them.
struct EvenRows {
    int first, pitch, count;  // in chunks; rows that there are
};

// A pitch of 0: rows are looked up.
DEVICE EvenRows even_rows(const Source& q, int block, int positions, int rows) {
    EvenRows even = {0, 0, rows};
#if !PATCHES
    i64 pitch = positions == 1 ? q.stride_n : q.stride_s;
    bool apart = positions > 1 && rows > positions;
    if (apart && q.stride_n != positions * q.stride_s) pitch = 0;
    even.first = (int)(block * q.stride_block / CHUNK);
    even.pitch = (int)(pitch / CHUNK);
#endif
    return even;
}

#endif

// Parts of one tile are written thread by thread, whatever the layout, and read back by
// threads that take their places; summed in their order, so that results repeat bit by bit.
DEVICE void write_part(float* parts, i64 item, const float (&sum)[COUNT]) {
    float* to = parts + item * (TILE * TILE) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i * THREADS] = sum[i];
}

// A tile's parts are added up by SLICES blocks: each has a run of every thread's elements.
constexpr int SLICES = 8, SLICE = COUNT / SLICES;
static_assert(COUNT % SLICES == 0, "slices are of one size");

DEVICE void sum_parts(float (&sum)[SLICE], const float* parts, i64 item, int splits) {
    const float* from = parts + item * (TILE * TILE) + threadIdx.x;
    from += blockIdx.x % SLICES * SLICE * THREADS;
#pragma unroll
    for (int i = 0; i < SLICE; i++) sum[i] = 0;
    for (int split = 0; split < splits; split++, from += TILE * TILE)
#pragma unroll
        for (int i = 0; i < SLICE; i++) sum[i] += from[i * THREADS];
}
