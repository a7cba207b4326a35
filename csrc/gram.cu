// C <- beta C + alpha sum_k w_k x_k x_k^T for many layers at once, each of its own size.
// Tiles on and above the diagonal are computed and written to both sides.
#include "tiles.cuh"

struct Problem {
    Source x;
    const float* weight;  // [N, S] or null
    float* out;           // [blocks, d, d]
    i64 out_block, out_row;
    int positions, rows, blocks;  // S, N S
    int tiles;                    // ceil(d / TILE)
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

DEVICE void emit(const Problem& q, const Tile& tile, const float (&sum)[COUNT]) {
    int d = q.x.features + q.x.bias;
    float* out = q.out + tile.block * q.out_block;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int r = tile.i * TILE + row_of(i), c = tile.j * TILE + column_of(i);
        if (r > c || c >= d) continue;
        i64 a = own_order(q.x, r), b = own_order(q.x, c);
        float value = updated(out + a * q.out_row + b, q.beta, q.alpha * sum[i]);
        out[a * q.out_row + b] = value;
        out[b * q.out_row + a] = value;
    }
}

DEVICE void step_rows(const Problem& q, int block, int step, int last, Row* rows) {
    if (threadIdx.x >= ROWS) return;
    int k = step * ROWS + threadIdx.x;
    int valid = k < last;
    int n = valid ? k / q.positions : 0, s = valid ? k % q.positions : 0;
    float weight = valid && q.weight ? q.weight[k] : 1.0f;
    make_row(rows[threadIdx.x], q.x, block, n, s, valid, weight);
}

KERNEL(gram, Params, THREADS) {
    __shared__ Shared shared;
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int local = item - q.first;
    Tile tile = tile_of(q, local / q.splits);
    int split = local % q.splits;
    bool weighted = q.weight != nullptr;
    bool same = tile.i == tile.j && !weighted;

    for (int f = threadIdx.x; f < TILE; f += THREADS) {
        make_feature(shared.left_features[f], q.x, tile.i * TILE + f);
        make_feature(shared.right_features[f], q.x, tile.j * TILE + f);
    }
    int begin = split * q.steps, end = begin + q.steps;
    int all = (q.rows + ROWS - 1) / ROWS;
    if (end > all) end = all;
    float sum[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = 0;
    u32 left[PER_THREAD], right[PER_THREAD];
    step_rows(q, tile.block, begin, q.rows, shared.rows[0]);
    __syncthreads();
    fetch(left, q.x, shared.rows[0], shared.left_features);
    if (!same) fetch(right, q.x, shared.rows[0], shared.right_features);
    for (int step = begin; step < end; step++) {
        int now = (step - begin) % 2, next = 1 - now;
        store(shared.left[now], left, q.x, shared.rows[now], false);
        if (!same) store(shared.right[now], right, q.x, shared.rows[now], weighted);
        step_rows(q, tile.block, step + 1, q.rows, shared.rows[next]);
        __syncthreads();
        if (step + 1 < end) {
            fetch(left, q.x, shared.rows[next], shared.left_features);
            if (!same) fetch(right, q.x, shared.rows[next], shared.right_features);
        }
        multiply(sum, shared.left[now], same ? shared.left[now] : shared.right[now]);
    }
    if (q.splits == 1)
        emit(q, tile, sum);
    else
        write_part(p.parts, item, sum);
}

// Sums the parts of every tile whose sum was split.
KERNEL(gram_finish, Params, THREADS) {
    int index = 0, tile_index = blockIdx.x;
    while (index + 1 < p.count && p.problem[index + 1].first_tile <= tile_index) index++;
    const Problem& q = p.problem[index];
    if (q.splits == 1) return;
    int local = tile_index - q.first_tile;
    float sum[COUNT];
    sum_parts(sum, p.parts, q.first + (i64)local * q.splits, q.splits);
    emit(q, tile_of(q, local), sum);
}
