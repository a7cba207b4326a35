// Square tiles of X^T Y on tensor cores, for rows whose features lie in aligned chunks of
// 16 bytes. Chunks are copied into shared memory asynchronously, STAGES - 1 steps ahead.
// They lie there as in memory, a row of features after the other, but swizzled: chunk c of
// a row is at c ^ swizzle(row), so that the eight reads of 16 bytes that are served
// together touch all banks once. The loop over the steps issues little but copies, loads
// and products: what does not change from step to step is found before it, and kept.
#pragma once
#include "operands.cuh"
#include "tensor.cuh"

constexpr int STAGES = LEFT_IN_REGISTERS ? 8 : WARPGROUP ? 6 : 4;
constexpr int CHUNKS = TILE / CHUNK;         // of a row
constexpr int COPIES = ROWS * CHUNKS / THREADS;
constexpr int APART = THREADS / CHUNKS;  // rows between two copies of a thread
static_assert(INPUT != INPUT_FLOAT, "tensor cores multiply no float32");
static_assert(CHUNKS >= 8, "swizzling exchanges eight neighbours");
static_assert(APART % (PACK == 2 ? 8 : 4) == 0, "all rows of a thread swizzle alike");
static_assert((RING > STAGES || LEFT_IN_REGISTERS) && (RING & (RING - 1)) == 0, "counted by a mask");

struct Stage {
#if !LEFT_IN_REGISTERS
    Words4 left[ROWS * CHUNKS];
#endif
    Words4 right[ROWS * CHUNKS];
};

// Rows of a step. Numbers of the rows that one thread copies are neighbours, so that one
// read has them all.
typedef Words<COPIES> OwnRows;
struct StepRows {
    OwnRows base[APART];  // in chunks; below zero: no row
#if PATCHES
    OwnRows at[3][APART];  // far outside: no row
#endif
#if INPUT == INPUT_TF32
    float weight[ROWS];
#endif
};

struct Pipeline {
    Stage stages[STAGES];
#if !LEFT_IN_REGISTERS
    StepRows rows[RING];
#if WARPGROUP
    Words4 ones[16];
#endif
#endif
};

DEVICE void keep_row(StepRows& rows, int i, const Row& row) {
    int base = (int)(row.base / CHUNK), thread = i % APART, copy = i / APART;
#if INPUT == INPUT_TF32
    rows.weight[i] = row.weight;
#endif
#if PATCHES
    rows.base[thread].v[copy] = base;
    for (int axis = 0; axis < 3; axis++)
        rows.at[axis][thread].v[copy] = row.valid ? row.at[axis] : FAR;
#else
    rows.base[thread].v[copy] = row.valid ? base : -1;
#endif
}

// What of a row its copies ask for.
struct KeptRow {
    int base, at[3];  // in chunks, below zero: no row; position in the input
};

DEVICE void kept_rows(KeptRow (&kept)[COPIES], const StepRows& rows) {
    int thread = threadIdx.x / CHUNKS;
    OwnRows base = read_words<OwnRows>(rows.base + thread);
    for (int i = 0; i < COPIES; i++) kept[i].base = base.v[i];
#if PATCHES
    for (int axis = 0; axis < 3; axis++) {
        OwnRows at = read_words<OwnRows>(rows.at[axis] + thread);
        for (int i = 0; i < COPIES; i++) kept[i].at[axis] = at.v[i];
    }
#endif
}

// From a row to the next, in chunks. For a warpgroup every eight chunks are a block of
// their own, of all rows.
constexpr int ROW_PITCH = WARPGROUP ? 8 : CHUNKS;

DEVICE int chunk_at(int row, int chunk) {
    int swizzle = PACK == 2 ? row % 8 : row % 4 * 2;
    int block = WARPGROUP ? chunk / 8 * (ROWS * 8) : 0;
    return block + row * ROW_PITCH + ((WARPGROUP ? chunk % 8 : chunk) ^ swizzle);
}

#ifndef EKFAC_HOST
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
// two rows' elements of its column. AHEAD: chunks beyond `place`, which counts bytes.
template <int AHEAD>
DEVICE void load_matrices(u32* r, const Words4* tile, int place) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(tile) + place), "n"(AHEAD * 16)
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
template <int AHEAD>
inline void load_matrices(u32* r, const Words4* tile, int place) {
    host::load_matrices(r, tile + place / 16 + AHEAD);
}
#endif

// What a thread copies of every row of an operand: the same chunk of features.
struct Column {
    const unsigned char* from;  // in the row at the tensor's beginning
    Feature first;
    int bytes;  // that are in memory; the rest is zero
    int to;     // in a stage, of the thread's first row
};

DEVICE Column own_column(const Source& q, int tile) {
    Column c;
    int chunk = threadIdx.x % CHUNKS, feature = tile * TILE + chunk * CHUNK;
    make_feature(c.first, q, feature);
    int left = q.features - feature;
    c.bytes = left <= 0 ? 0 : left >= CHUNK ? 16 : left * (int)sizeof(Element);
    i64 offset = c.bytes ? c.first.offset * (i64)sizeof(Element) : 0;
    c.from = static_cast<const unsigned char*>(q.data) + offset;
    c.to = chunk_at(threadIdx.x / CHUNKS, chunk);
    keep(c.bytes);
    keep(c.to);
    return c;
}

template <bool PARTIAL>
DEVICE void copy_chunk(Words4* to, const Source& q, const KeptRow& row, const Column& c) {
    bool there = PATCHES ? inside(q, row, c.first) : row.base >= 0;
    const unsigned char* from = c.from + (i64)row.base * 16;
    if (PARTIAL)
        copy_async(to, from, there ? c.bytes : 0);
    else  // all or nothing: one instruction
        copy_async(to, from, there && c.bytes ? 16 : 0);
}

// An operand of a tile: its source, what of it a thread copies, and its rows.
struct Operand {
    const Source& q;
    Column column;
    StepRows* rows;  // [RING]
#if WARPGROUP
    EvenRows even;
    int begin;      // step of the sum that is the first here
#endif
};

#if WARPGROUP
DEVICE void even_kept(KeptRow (&kept)[COPIES], const EvenRows& even, int step) {
    int row = step * ROWS + threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < COPIES; i++, row += APART)
        kept[i].base = row < even.count ? even.first + row * even.pitch : -1;
}
#endif

template <bool PARTIAL>
DEVICE void copy_column(Words4* to, const Source& q, const Column& column,
                        const KeptRow (&rows)[COPIES]) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
        copy_chunk<PARTIAL>(to + column.to + i * APART * ROW_PITCH, q, rows[i], column);
}

#if !LEFT_IN_REGISTERS

template <bool PARTIAL>
DEVICE void copy_rows(Stage& stage, int step, const Operand& left, const Operand& right,
                      bool same) {
    KeptRow rows[COPIES];
#if WARPGROUP
    if (left.even.pitch)
        even_kept(rows, left.even, left.begin + step);
    else
        kept_rows(rows, left.rows[step % RING]);
#else
    kept_rows(rows, left.rows[step % RING]);
#endif
    copy_column<PARTIAL>(stage.left, left.q, left.column, rows);
    if (same) return;
    if (left.rows != right.rows) kept_rows(rows, right.rows[step % RING]);
    copy_column<PARTIAL>(stage.right, right.q, right.column, rows);
}

// Start the copies of one step; `same`: the left operand is both.
DEVICE void start_copies(Stage& stage, int step, const Operand& left,
                         const Operand& right, bool same) {
    if (left.column.bytes % 16 || right.column.bytes % 16)
        copy_rows<true>(stage, step, left, right, same);
    else
        copy_rows<false>(stage, step, left, right, same);
}

#endif

#if LEFT_IN_REGISTERS
#include "left.cuh"

// Start a thread's copies of one step, of which `there` rows are left from its first one on.
template <bool PARTIAL>
DEVICE void copy_rows(Stage& stage, const Column& column, const Reader<COPIES>& reader,
                      int there) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        Words4* to = stage.right + column.to + i * APART * ROW_PITCH;
        int bytes = PARTIAL ? column.bytes : 16;  // or nothing: one instruction
        copy_async(to, reader.row(i), i * APART < there ? bytes : 0);
    }
}

DEVICE void start_copies(Stage& stage, const Column& column, const Reader<COPIES>& reader,
                         int there) {
    if (column.bytes == 16)
        copy_rows<false>(stage, column, reader, there);
    else
        copy_rows<true>(stage, column, reader, there);
}

#elif WARPGROUP
#include "warpgroup.cuh"
#else

// A warp has M x N fragments of 16 x 8.
constexpr int HEIGHT = TILE / 2, WIDTH = TILE / ACROSS;
constexpr int M = HEIGHT / 16, N = WIDTH / 8;
constexpr int DEPTH = ROWS / 2;  // rows of one product of fragments

// The loop over steps. `rows(step)` finds the rows of a step, `copy(step)` starts its
// copies, `multiply(step)` adds its products; copies are STAGES - 1 steps ahead.
template <class Rows, class Copy, class Multiply>
DEVICE void pipelined(int steps, Rows rows, Copy copy, Multiply multiply) {
    for (int s = 0; s < STAGES; s++) rows(s);
    __syncthreads();
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) copy(s);
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        int ahead = step + STAGES - 1;
        if (ahead < steps) copy(ahead);
        commit_copies();
        rows(ahead + 1);
        multiply(step);
    }
}

DEVICE int warp_row() { return threadIdx.x / 32 / ACROSS * HEIGHT; }
DEVICE int warp_column() { return threadIdx.x / 32 % ACROSS * WIDTH; }

// Where a lane's parts of both operands are in a stage, in bytes.
constexpr int LEFT = PACK == 2 ? M : 2, RIGHT = PACK == 2 ? N / 2 : 2;
struct Places {
    int left[LEFT], right[RIGHT];
};

#if INPUT == INPUT_TF32

// Words cannot be transposed on the way, but any feature may be any row of a fragment: two
// neighbours are a lane's rows of a left fragment, and its columns of two right ones.
DEVICE int feature_of_row(int m, int upper) {
    return m * 16 + threadIdx.x % 32 / 4 * 2 + upper;
}
DEVICE int feature_of_column(int n, int odd) {
    return n / 2 * 16 + (threadIdx.x % 4 * 2 + odd) * 2 + n % 2;
}

// In 16 features and in the next ones, each four chunks.
DEVICE void lane_places(int (&place)[2], int feature) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
        int chunk = feature / 4 + odd * 4 + lane / 8;
        place[odd] = 16 * chunk_at(lane % 4, chunk) + lane / 4 % 2 * 8;
        keep(place[odd]);
    }
}

DEVICE Places own_places() {
    Places p;
    lane_places(p.left, warp_row());
    lane_places(p.right, warp_column());
    return p;
}

// A lane's two of the 16 features that begin at 16 * `pair`; the swizzle is the same eight
// chunks on.
DEVICE Words2 lane_words(const Words4* tile, const int (&place)[2], int row, int pair) {
    const char* from = reinterpret_cast<const char*>(tile) + place[pair % 2];
    return read_words<Words2>(from + 16 * (row * CHUNKS + pair / 2 * 8));
}

template <bool WITH_WEIGHT>
DEVICE u32 operand(u32 word, float weight) {
    float x = from_bits(word);
    if (SQUARE) x *= x;
    return round_to_tf32(bits(WITH_WEIGHT ? x * weight : x));
}

template <int ROW>
DEVICE void load_left(u32 (&a)[M * 4], const Words4* tile, const int (&place)[LEFT]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Words2 w = lane_words(tile, place, ROW + half * 4, m);
#pragma unroll
            for (int i = 0; i < 2; i++)
                a[m * 4 + half * 2 + i] = operand<false>(w.v[i], 1.0f);
        }
}

DEVICE float weight_of(const StepRows& rows, int row, bool weighted) {
    return weighted ? rows.weight[row + threadIdx.x % 4] : 1.0f;
}

template <int ROW, bool WITH_WEIGHT>
DEVICE void load_right(u32 (&b)[N * 2], const Words4* tile, const int (&place)[RIGHT],
                       const StepRows& rows) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float weight = weight_of(rows, ROW + half * 4, WITH_WEIGHT);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Words2 w = lane_words(tile, place, ROW + half * 4, n / 2);
#pragma unroll
            for (int i = 0; i < 2; i++)
                b[(n + i) * 2 + half] = operand<WITH_WEIGHT>(w.v[i], weight);
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

DEVICE int left_place(int m, int feature) {
    int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
    return 16 * chunk_at(row, feature / 8 + m * 2 + lane / 8 % 2);
}

DEVICE Places own_places() {
    Places p;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++) {
        p.left[m] = left_place(m, warp_row());
        keep(p.left[m]);
    }
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
        p.right[n] = 16 * chunk_at(lane % 16, warp_column() / 8 + n * 2 + lane / 16);
        keep(p.right[n]);
    }
    return p;
}

template <int ROW>
DEVICE void load_left(u32 (&a)[M * 4], const Words4* tile, const int (&place)[LEFT]) {
#pragma unroll
    for (int m = 0; m < M; m++)
        load_matrices<ROW * CHUNKS>(a + m * 4, tile, place[m]);
}

// Half types have no weights: a weighted row would be rounded once more.
template <int ROW, bool WITH_WEIGHT>
DEVICE void load_right(u32 (&b)[N * 2], const Words4* tile, const int (&place)[RIGHT],
                       const StepRows&) {
#pragma unroll
    for (int n = 0; n < N; n += 2)
        load_matrices<ROW * CHUNKS>(b + n * 2, tile, place[n / 2]);
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

// What a warp's right operand is made of: its own words, those with their weights, or the
// left operand's fragments, which have the same words in the same lanes.
enum RightOperand { PLAIN, WEIGHTED, LEFT_AGAIN };

// Add the products of one step.
template <RightOperand KIND, int ROW = 0>
DEVICE void multiply(float (&sum)[COUNT], const Words4* left, const Words4* right,
                     const Places& places, const StepRows& rows) {
    static_assert(KIND != LEFT_AGAIN || M * 16 == N * 8, "a square of fragments");
    u32 a[M * 4], b[N * 2];
    load_left<ROW>(a, left, places.left);
    if constexpr (KIND == LEFT_AGAIN) {
#pragma unroll
        for (int i = 0; i < N * 2; i++) b[i] = a[i / 4 * 4 + i % 2 * 2 + i / 2 % 2];
    } else {
        load_right<ROW, KIND == WEIGHTED>(b, right, places.right, rows);
    }
    warp_product<M, N>(sum, a, b);
    if constexpr (ROW + DEPTH < ROWS)
        multiply<KIND, ROW + DEPTH>(sum, left, right, places, rows);
}

// Add the weighted sums over one step of all the tile's features: two times M fragments
// with a column of ones. For the warp whose quarter begins at row HEIGHT.
template <int ROW = 0>
DEVICE void add_sums(float (&sum)[COUNT], const Words4* left, const Places& places,
                     const StepRows& rows, bool weighted) {
    u32 ones[2];
    load_ones(ones, rows, ROW, weighted);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 a[M * 4];
        int place[LEFT];
        // HEIGHT before, in chunks: an exchange of bits, as the swizzle is.
        for (int m = 0; m < LEFT; m++)
            place[m] = half ? places.left[m] : places.left[m] ^ 16 * (HEIGHT / CHUNK);
        load_left<ROW>(a, left, place);
        warp_product<M, 1>(sum + half * M * 4, a, ones);
    }
    if constexpr (ROW + DEPTH < ROWS)
        add_sums<ROW + DEPTH>(sum, left, places, rows, weighted);
}

#endif
