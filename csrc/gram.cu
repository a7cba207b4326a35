// C <- beta C + alpha sum_k w_k x_k x_k^T for many layers at once, each of its own size.
// Tiles on and above the diagonal are computed and written to both sides.
// With PIPELINE the rows' features lie in aligned chunks, and a bias is no feature of the
// tiles: the warp whose quarter of a diagonal tile is below the diagonal adds up its row.
#include "operands.cuh"
#if TRANSPOSED
#include "transposed.cuh"
#elif PIPELINE
#include "pipeline.cuh"
#else
#include "tiles.cuh"
#endif

struct Problem {
    Source x;
    const float* weight;  // [N, S] or null
    float* out;           // [blocks, d, d]
    i64 out_block, out_row;
    int positions, rows, blocks;  // S, N S
    int tiles;                    // along d
    int splits, steps;            // parts of the sum, and steps of each
    int first, first_tile;        // this problem's first piece of work, its first tile
    float alpha, beta;
};

struct Params {
    int count, padding;
    float* parts;
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

struct Tile {
    int block, i, j;
};

DEVICE Tile tile_of(const Problem& q, int index) {
    int pairs = q.tiles * (q.tiles + 1) / 2;
    Tile tile = {index / pairs, 0, 0};
    int rest = index % pairs;
    while (rest >= q.tiles - tile.i) rest -= q.tiles - tile.i++;
    tile.j = tile.i + rest;
    return tile;
}

// Write one element of the result, on both sides.
DEVICE void put(const Problem& q, float* out, i64 a, i64 b, float sum) {
    float value = updated(out + a * q.out_row + b, q.beta, q.alpha * sum);
    out[a * q.out_row + b] = value;
    out[b * q.out_row + a] = value;
}

#if TRANSPOSED
// Threads of warps 1 to 6 keep the sums of a bias, one feature each, in their element 0,
// which in a tile on the diagonal is below it; the first of them keeps that of the weights in
// element 1.
constexpr int FIRST = 32;

DEVICE void emit_sum(const Problem& q, const Tile& tile, float* out, int i, float sum) {
    int d = q.x.features, own = (int)threadIdx.x - FIRST, f = tile.i * TILE + own;
    if (i == 0 && 0 <= own && own < TILE && f < d) put(q, out, own_order(q.x, f), d, sum);
    if (i == 1 && own == 0 && tile.i == 0) put(q, out, d, d, sum);
}
#elif WARPGROUP
// A thread keeps the sums of a bias of its two rows in its elements 2 and 3, which in a tile
// on the diagonal are below it; element 0 of row 16 keeps that of the weights.
DEVICE void keep_sums(float (&sum)[COUNT], const float (&features)[4], float total) {
    sum[2] = features[0];
    sum[3] = features[2];
    if (threadIdx.x == 32) sum[0] = total;
}

DEVICE void emit_sum(const Problem& q, const Tile& tile, float* out, int i, float sum) {
    int d = q.x.features, f = tile.i * TILE + warp_row() + feature_of_row(0, i % 2);
    if ((i == 2 || i == 3) && threadIdx.x % 4 == 0 && f < d)
        put(q, out, own_order(q.x, f), d, sum);
    if (i == 0 && threadIdx.x == 32 && tile.i == 0) put(q, out, d, d, sum);
}
#elif PIPELINE
// Whether a warp adds up the sums of a bias: its quarter of a tile is below the diagonal.
DEVICE bool adds_sums(const Tile& tile) {
    return tile.i == tile.j && threadIdx.x / 32 == 2;
}

// Write a thread's element i of the sums of a tile's features, and of the weights.
DEVICE void emit_sum(const Problem& q, const Tile& tile, float* out, int i, float sum) {
    int d = q.x.features, m = i / 4, upper = i % 4 / 2;
    if (m < 2 * M && threadIdx.x % 4 == 0 && i % 2 == 0) {  // a lane's first column
        int f = tile.i * TILE + m / M * HEIGHT + feature_of_row(m % M, upper);
        if (f < d) put(q, out, own_order(q.x, f), d, sum);
    }
    if (i == 2 * M * 4 && tile.i == 0 && threadIdx.x % 32 == 0) put(q, out, d, d, sum);
}
#endif

// Write a thread's element i of a tile.
DEVICE void emit(const Problem& q, const Tile& tile, int i, float sum) {
    int d = PIPELINE ? q.x.features : q.x.features + q.x.bias;
    float* out = q.out + tile.block * q.out_block;
#if WARPGROUP
    if (q.x.bias && tile.i == tile.j) emit_sum(q, tile, out, i, sum);
#elif PIPELINE
    if (adds_sums(tile)) {
        if (q.x.bias) emit_sum(q, tile, out, i, sum);
        return;
    }
#endif
    int r = tile.i * TILE + row_of(i), c = tile.j * TILE + column_of(i);
    if (r <= c && c < d) put(q, out, own_order(q.x, r), own_order(q.x, c), sum);
}

// The rows of one step, as many threads as there are.
template <class Rows>
DEVICE void step_rows(const Problem& q, int block, int step, int last, Rows& rows) {
    int number = row_of_thread(step);
    if (number >= ROWS) return;
    int k = step * ROWS + number;
    int valid = k < last;
    int n = valid ? k / q.positions : 0, s = valid ? k % q.positions : 0;
    float weight = valid && q.weight ? q.weight[k] : 1.0f;
    Row row;
    make_row(row, q.x, block, n, s, valid, weight);
    keep_row(rows, number, row);
}

#if TRANSPOSED

// Add up what the threads of all chunks have of a feature, and of the weights.
DEVICE void keep_sums(float (&sum)[COUNT], const Sums& own, float total, bool weighted) {
    SHARED_BYTES(memory);
    float(&sums)[CHUNKS][TILE + 4] = *reinterpret_cast<float(*)[CHUNKS][TILE + 4]>(memory);
    int chunk = threadIdx.x / PAIRS, feature = right_feature();
    __syncthreads();
    sums[chunk][feature] = own.feature[0];
    sums[chunk][feature + 1] = own.feature[1];
    if (feature == 0) sums[chunk][TILE] = own.weight;
    __syncthreads();
    int mine = (int)threadIdx.x - FIRST;
    if (mine < 0 || mine >= TILE) return;
    sum[0] = 0;
    for (int i = 0; i < CHUNKS; i++) sum[0] += sums[i][mine];
    if (mine > 0) return;
    if (weighted) total = 0;
    for (int i = 0; weighted && i < CHUNKS; i++) total += sums[i][TILE];
    sum[1] = total;
}

// The sums of steps `begin` to `end` of one tile.
DEVICE void tile_sums(float (&sum)[COUNT], const Problem& q, const Tile& tile, int begin,
                      int end) {
    SHARED_BYTES(memory);
    Pipeline& shared = *reinterpret_cast<Pipeline*>(memory);
    bool weighted = q.weight != nullptr, with_sums = tile.i == tile.j && q.x.bias;
    EvenRows even = even_rows(q.x, tile.block, q.positions, q.rows);
    if (weighted) even.pitch = 0;  // weights are looked up with the rows
    Operand left = {q.x, own_pair(q.x, tile.i * TILE + left_feature()), true, even, begin};
    Operand right = {q.x, own_pair(q.x, tile.j * TILE + right_feature()), false, even,
                     begin};
    Sums sums = {{0, 0}, 0};
    int place = chunk_place();
    u64 stages = first_descriptor(shared.stages);
    auto rows = [&](int step) {
        if (even.pitch) return;
        step_rows(q, tile.block, begin + step, q.rows, shared.rows[step % RING]);
    };
    auto load_left = [&](u32(&part)[8], int step) {
        load_part(part, left, shared.rows[step % RING], step);
    };
    auto load_right = [&](u32(&part)[8], int step) {
        load_part(part, right, shared.rows[step % RING], step);
    };
    auto store = [&](const u32(&part)[8], int step, int stage) {
        store_part(shared.stages[stage], part, shared.rows[step % RING], weighted,
                   with_sums, place, sums);
    };
    auto start = [&](const u32(&part)[8], int, int stage) {
        multiply(sum, part, stages + stage * STAGE_CHUNKS);
    };
    auto ends = [] { return false; };
    auto finish = [] {};
    pipelined(end - begin, rows, load_right, load_left, store, start, ends, finish);
    settle(sum);
    if (!with_sums) return;
    int last = end * ROWS < q.rows ? end * ROWS : q.rows;
    keep_sums(sum, sums, (float)(last - begin * ROWS), weighted);
}

#elif WARPGROUP

// The sums of steps `begin` to `end` of one tile.
DEVICE void tile_sums(float (&sum)[COUNT], const Problem& q, const Tile& tile, int begin,
                      int end) {
    SHARED_BYTES(memory);
    Pipeline& shared = *reinterpret_cast<Pipeline*>(memory);
    bool same = tile.i == tile.j, with_sums = same && q.x.bias;
    EvenRows even = even_rows(q.x, tile.block, q.positions, q.rows);
    Operand left = {q.x, own_column(q.x, tile.i), shared.rows, even, begin};
    Operand right = {q.x, own_column(q.x, tile.j), shared.rows, even, begin};
    float features[4] = {0, 0, 0, 0};
    if (threadIdx.x < 16) {
        constexpr u32 two = INPUT == INPUT_BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;
        write_words(shared.ones + threadIdx.x, Words4{{two, two, two, two}});
    }
    auto rows = [&](int step) {
        if (even.pitch) return;
        step_rows(q, tile.block, begin + step, q.rows, shared.rows[step % RING]);
    };
    auto copy = [&](int step) {
        start_copies(shared.stages[step % STAGES], step, left, right, same);
    };
    auto add = [&](int step) {
        const Stage& stage = shared.stages[step % STAGES];
        multiply(sum, stage.left, same ? stage.left : stage.right);
        if (with_sums) add_sums(features, stage.left, shared.ones);
    };
    pipelined(end - begin, rows, copy, add);
    settle(sum);
    settle(features);
    if (!with_sums) return;
    int last = end * ROWS < q.rows ? end * ROWS : q.rows;
    keep_sums(sum, features, (float)(last - begin * ROWS));
}

#elif PIPELINE

DEVICE float weight_sum(const Problem& q, int begin, int end, float* shared) {
    int last = end * ROWS < q.rows ? end * ROWS : q.rows;
    float total = 0;
    for (int k = begin * ROWS + threadIdx.x; k < last; k += THREADS)
        total += q.weight ? q.weight[k] : 1.0f;
    return block_sum<THREADS>(total, shared);
}

// The sums of steps `begin` to `end` of one tile.
DEVICE void tile_sums(float (&sum)[COUNT], const Problem& q, const Tile& tile, int begin,
                      int end) {
    SHARED_BYTES(memory);
    Pipeline& shared = *reinterpret_cast<Pipeline*>(memory);
    bool same = tile.i == tile.j, weighted = q.weight != nullptr;
    Operand left = {q.x, own_column(q.x, tile.i), shared.rows};
    Operand right = {q.x, own_column(q.x, tile.j), shared.rows};
    Places places = own_places();
    auto rows = [&](int step) {
        step_rows(q, tile.block, begin + step, q.rows, shared.rows[step % RING]);
    };
    auto copy = [&](int step) {
        start_copies(shared.stages[step % STAGES], step, left, right, same);
    };
    auto add = [&](int step) {
        const Stage& stage = shared.stages[step % STAGES];
        const StepRows& kept = shared.rows[step % RING];
        const Words4* other = same ? stage.left : stage.right;
        if (adds_sums(tile)) {
            if (q.x.bias) add_sums(sum, stage.left, places, kept, weighted);
        } else if (weighted && INPUT == INPUT_TF32) {
            multiply<WEIGHTED>(sum, stage.left, other, places, kept);
        } else if (same && warp_row() == warp_column()) {
            multiply<LEFT_AGAIN>(sum, stage.left, other, places, kept);
        } else {
            multiply<PLAIN>(sum, stage.left, other, places, kept);
        }
    };
    pipelined(end - begin, rows, copy, add);
    if (q.x.bias && same && tile.i == 0) {
        float total = weight_sum(q, begin, end, reinterpret_cast<float*>(memory));
        if (adds_sums(tile)) sum[2 * M * 4] = total;
    }
}

#else

// The sums of steps `begin` to `end` of one tile.
DEVICE void tile_sums(float (&sum)[COUNT], const Problem& q, const Tile& tile, int begin,
                      int end) {
    __shared__ Shared shared;
    bool weighted = q.weight != nullptr;
    bool same = tile.i == tile.j && !weighted;
    for (int f = threadIdx.x; f < TILE; f += THREADS) {
        make_feature(shared.left_features[f], q.x, tile.i * TILE + f);
        make_feature(shared.right_features[f], q.x, tile.j * TILE + f);
    }
    Own own_left = own_features(q.x, tile.i), own_right = own_features(q.x, tile.j);
    u32 left[PER_THREAD], right[PER_THREAD];
    step_rows(q, tile.block, begin, q.rows, shared.rows[0]);
    __syncthreads();
    fetch(left, q.x, shared.rows[0], own_left, shared.left_features);
    if (!same) fetch(right, q.x, shared.rows[0], own_right, shared.right_features);
    for (int step = begin; step < end; step++) {
        int now = (step - begin) % 2, next = 1 - now;
        store(shared.left[now], left, q.x, shared.rows[now], false);
        if (!same) store(shared.right[now], right, q.x, shared.rows[now], weighted);
        step_rows(q, tile.block, step + 1, q.rows, shared.rows[next]);
        __syncthreads();
        if (step + 1 < end) {
            fetch(left, q.x, shared.rows[next], own_left, shared.left_features);
            if (!same)
                fetch(right, q.x, shared.rows[next], own_right, shared.right_features);
        }
        multiply(sum, shared.left[now], same ? shared.left[now] : shared.right[now]);
    }
}

#endif

KERNEL(gram, Params, THREADS) {
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int local = item - q.first;
    Tile tile = tile_of(q, local / q.splits);
    int begin = local % q.splits * q.steps, end = begin + q.steps;
    int all = (q.rows + ROWS - 1) / ROWS;
    if (end > all) end = all;
    float sum[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = 0;
    tile_sums(sum, q, tile, begin, end);
    if (q.splits > 1) {
        write_part(p.parts, item, sum);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) emit(q, tile, i, sum[i]);
}

// Sums the parts of every tile whose sum was split.
KERNEL(gram_finish, Params, THREADS) {
    int index = 0, tile_index = blockIdx.x / SLICES;
    while (index + 1 < p.count && p.problem[index + 1].first_tile <= tile_index) index++;
    const Problem& q = p.problem[index];
    if (q.splits == 1) return;
    int local = tile_index - q.first_tile;
    Tile tile = tile_of(q, local);
    float sum[SLICE];
    sum_parts(sum, p.parts, q.first + (i64)local * q.splits, q.splits);
#pragma unroll
    for (int i = 0; i < SLICE; i++)
        emit(q, tile, blockIdx.x % SLICES * SLICE + i, sum[i]);
}
