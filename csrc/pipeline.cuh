// Square tiles of X^T Y on tensor cores, for rows whose features lie in aligned chunks of
// 16 bytes. Chunks are copied into shared memory asynchronously, STAGES - 1 steps ahead.
// They lie there as in memory, a row of features after the other, but swizzled: chunk c of
// a row is at c ^ swizzle(row), so that the eight reads of 16 bytes that are served
// together touch all banks once.
#pragma once
#include "operands.cuh"
#include "tensor.cuh"

constexpr int STAGES = 4;
constexpr int RING = STAGES + 1;  // rows are known a step before their copies start
constexpr int CHUNK = 16 / sizeof(Element);  // elements
constexpr int CHUNKS = TILE / CHUNK;         // of a row
constexpr int COPIES = ROWS * CHUNKS / THREADS;
constexpr int APART = THREADS / CHUNKS;  // rows between two copies of a thread
// A warp has a quarter of the tile, as M x N fragments of 16 x 8.
constexpr int WARP = TILE / 2, M = WARP / 16, N = WARP / 8;
constexpr int DEPTH = ROWS / 2;  // rows of one product of fragments
static_assert(INPUT != INPUT_FLOAT, "tensor cores multiply no float32");
static_assert(CHUNKS >= 8, "swizzling exchanges eight neighbours");

struct Stage {
    Words4 left[ROWS * CHUNKS], right[ROWS * CHUNKS];
};

// Rows of a step, each of their numbers side by side.
struct StepRows {
    i64 base[ROWS];  // below zero: no row
    float weight[ROWS];
#if PATCHES
    int at[3][ROWS];  // far outside: no row
#endif
};
constexpr int FAR = -(1 << 30);

struct Pipeline {
    Stage stages[STAGES];
    StepRows rows[RING];
};

DEVICE void keep_row(StepRows& rows, int i, const Row& row) {
    rows.weight[i] = row.weight;
#if PATCHES
    rows.base[i] = row.base;
    for (int axis = 0; axis < 3; axis++)
        rows.at[axis][i] = row.valid ? row.at[axis] : FAR;
#else
    rows.base[i] = row.valid ? row.base : -1;
#endif
}

// What of a row its copies ask for.
DEVICE Row kept_row(const StepRows& rows, int i) {
    Row row;
    row.base = rows.base[i];
#if PATCHES
    for (int axis = 0; axis < 3; axis++) row.at[axis] = rows.at[axis][i];
#endif
    return row;
}

DEVICE int chunk_at(int row, int chunk) {
    int swizzle = PACK == 2 ? row % 8 : row % 4 * 2;
    return row * CHUNKS + (chunk ^ swizzle);
}

// What a thread copies of every row: the same chunk of features.
struct Column {
    Feature first;
    int bytes;  // that are in memory; the rest is zero
};

DEVICE Column own_column(const Source& q, int tile) {
    Column c;
    int feature = tile * TILE + threadIdx.x % CHUNKS * CHUNK;
    make_feature(c.first, q, feature);
    int left = q.features - feature;
    c.bytes = left <= 0 ? 0 : left >= CHUNK ? 16 : left * (int)sizeof(Element);
    return c;
}

#ifndef EKFAC_HOST
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
// Copies 16 bytes, of which all but the first `bytes` are zeros that nobody reads.
DEVICE void copy_async(Words4* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits for this thread's groups of copies, but for the last LATER ones.
template <int LATER>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory");
}
// Four matrices of 8 x 8 halves, transposed: a lane gives the address of one row, and gets
// two rows' elements of its column.
DEVICE void load_matrices(u32* r, const Words4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#else
inline void copy_async(Words4* to, const void* from, int bytes) {
    host::copy_async(to, from, bytes);
}
inline void commit_copies() { host::commit_copies(); }
template <int LATER>
inline void wait_for_copies() {
    host::wait_for_copies(LATER);
}
inline void load_matrices(u32* r, const Words4* row) { host::load_matrices(r, row); }
#endif

DEVICE void copy_chunk(Words4* to, const Source& q, const Row& row, const Column& c) {
    bool there = PATCHES ? inside(q, row, c.first) : row.base >= 0;
    int bytes = there ? c.bytes : 0;
    i64 at = bytes ? (row.base + c.first.offset) * (i64)sizeof(Element) : 0;
    copy_async(to, static_cast<const unsigned char*>(q.data) + at, bytes);
}

// Start the copies of one step.
DEVICE void start_copies(Stage& stage, const StepRows& rows, const Source& q,
                         const Column& left, const Column& right, bool same) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int number = threadIdx.x / CHUNKS + i * APART;
        int at = chunk_at(number, threadIdx.x % CHUNKS);
        Row row = kept_row(rows, number);
        copy_chunk(stage.left + at, q, row, left);
        if (!same) copy_chunk(stage.right + at, q, row, right);
    }
}

DEVICE int warp_row() { return threadIdx.x / 64 * WARP; }
DEVICE int warp_column() { return threadIdx.x / 32 % 2 * WARP; }

#if INPUT == INPUT_TF32

// Words cannot be transposed on the way, but any feature may be any row of a fragment: a
// lane's four neighbouring features are its rows of two fragments, or its column of four.
DEVICE int feature_of_row(int m, int upper) {
    return m / 2 * 32 + threadIdx.x % 32 / 4 * 4 + m % 2 * 2 + upper;
}
DEVICE int feature_of_column(int n, int odd) {
    return n / 4 * 32 + (threadIdx.x % 4 * 2 + odd) * 4 + n % 4;
}

DEVICE Words4 lane_chunk(const Words4* tile, int row, int feature) {
    int lane = threadIdx.x % 32;
    return read_words<Words4>(tile + chunk_at(row + lane % 4, feature / 4 + lane / 4));
}

DEVICE void load_left(u32 (&a)[M * 4], const Words4* tile, int row, int feature) {
#pragma unroll
    for (int m = 0; m < M; m += 2)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Words4 w = lane_chunk(tile, row + half * 4, feature + m * 16);
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[(m + i / 2) * 4 + half * 2 + i % 2] = round_to_tf32(w.v[i]);
        }
}

DEVICE float weight_of(const StepRows& rows, int row, bool weighted) {
    return weighted ? rows.weight[row + threadIdx.x % 4] : 1.0f;
}

DEVICE void load_right(u32 (&b)[N * 2], const Words4* tile, const StepRows& rows, int row,
                       int feature, bool weighted) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float weight = weight_of(rows, row + half * 4, weighted);
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            Words4 w = lane_chunk(tile, row + half * 4, feature + n * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 word = weighted ? bits(from_bits(w.v[i]) * weight) : w.v[i];
                b[(n + i) * 2 + half] = round_to_tf32(word);
            }
        }
    }
}

// A column of ones, weighted as the right operand is, and seven of zeros.
DEVICE void load_ones(u32 (&b)[2], const StepRows& rows, int row, bool weighted) {
    bool first = threadIdx.x % 32 / 4 == 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float weight = weight_of(rows, row + half * 4, weighted);
        b[half] = first ? round_to_tf32(bits(weight)) : 0;
    }
}

#else

DEVICE int feature_of_row(int m, int upper) {
    return m * 16 + threadIdx.x % 32 / 4 + upper * 8;
}
DEVICE int feature_of_column(int n, int odd) { return n * 8 + threadIdx.x % 4 * 2 + odd; }

DEVICE void load_left(u32 (&a)[M * 4], const Words4* tile, int row, int feature) {
    int lane = threadIdx.x % 32;
    row += lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int m = 0; m < M; m++)
        load_matrices(a + m * 4,
                      tile + chunk_at(row, feature / 8 + m * 2 + lane / 8 % 2));
}

// Half types have no weights: a weighted row would be rounded once more.
DEVICE void load_right(u32 (&b)[N * 2], const Words4* tile, const StepRows&, int row,
                       int feature, bool) {
    int lane = threadIdx.x % 32;
    row += lane % 16;
#pragma unroll
    for (int n = 0; n < N; n += 2)
        load_matrices(b + n * 2, tile + chunk_at(row, feature / 8 + n + lane / 16));
}

// A column of ones and seven of zeros.
DEVICE void load_ones(u32 (&b)[2], const StepRows&, int, bool) {
    constexpr u32 ones = INPUT == INPUT_BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;
    b[0] = b[1] = threadIdx.x % 32 / 4 == 0 ? ones : 0;
}

#endif

// Element i of a thread's part of the tile.
DEVICE int row_of(int i) { return warp_row() + feature_of_row(i / (4 * N), i % 4 / 2); }
DEVICE int column_of(int i) {
    return warp_column() + feature_of_column(i / 4 % N, i % 2);
}

// Add the products of one step.
DEVICE void multiply(float (&sum)[COUNT], const Words4* left, const Words4* right,
                     const StepRows& rows, bool weighted) {
#pragma unroll
    for (int row = 0; row < ROWS; row += DEPTH) {
        u32 a[M * 4], b[N * 2];
        load_left(a, left, row, warp_row());
        load_right(b, right, rows, row, warp_column(), weighted);
        warp_product<M, N>(sum, a, b);
    }
}

// Add the weighted sums over one step of all the tile's features: two times M fragments
// with a column of ones.
DEVICE void add_sums(float (&sum)[COUNT], const Words4* left, const StepRows& rows,
                     bool weighted) {
#pragma unroll
    for (int row = 0; row < ROWS; row += DEPTH) {
        u32 ones[2];
        load_ones(ones, rows, row, weighted);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 a[M * 4];
            load_left(a, left, row, half * WARP);
            warp_product<M, 1>(sum + half * M * 4, a, ones);
        }
    }
}
