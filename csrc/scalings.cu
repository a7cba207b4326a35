// s <- beta s + alpha sum_n (sum_t g_nt a_nt^T)^2 of projected g and a, for many layers
// at once. An example's gradient lives in registers, a tile at a time. With one position
// (SQUARE) the square of the outer product is the outer product of the squares.
#include "tiles.cuh"

struct Problem {
    Source g, a;
    float* out;  // [blocks, d_out, d_in]
    i64 out_block, out_row;
    int examples, positions, blocks;
    int tiles_g, tiles_a;
    int splits, share;      // parts of the sum, and examples of each
    int first, first_tile;  // this problem's first piece of work, its first tile
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
    int per_block = q.tiles_g * q.tiles_a, rest = index % per_block;
    return {index / per_block, rest / q.tiles_a, rest % q.tiles_a};
}

DEVICE void emit(const Problem& q, const Tile& tile, const float (&sum)[COUNT]) {
    float* out = q.out + tile.block * q.out_block;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int r = tile.i * TILE + row_of(i), c = tile.j * TILE + column_of(i);
        if (r >= q.g.features || c >= q.a.features) continue;
        float* to = out + r * q.out_row + c;
        *to = updated(to, q.beta, q.alpha * sum[i]);
    }
}

struct SharedPair : Shared {
    Row other_rows[2][ROWS];
};

// Rows of one step: of a run of examples, or of a run of positions of one example.
DEVICE void step_rows(const Problem& q, int block, int step, int begin, int end,
                      int chunks, SharedPair& shared, int slot) {
    if (threadIdx.x >= ROWS) return;
    int n = begin, s = 0, valid = 0;
    if (SQUARE) {
        n += step * ROWS + threadIdx.x;
        valid = n < end;
    } else {
        n += step / chunks;
        s = step % chunks * ROWS + threadIdx.x;
        valid = n < end && s < q.positions;
    }
    if (!valid) n = s = 0;
    make_row(shared.rows[slot][threadIdx.x], q.g, block, n, s, valid, 1.0f);
    make_row(shared.other_rows[slot][threadIdx.x], q.a, block, n, s, valid, 1.0f);
}

KERNEL(scalings, Params, THREADS) {
    __shared__ SharedPair shared;
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int local = item - q.first;
    Tile tile = tile_of(q, local / q.splits);
    int begin = local % q.splits * q.share, end = begin + q.share;
    if (end > q.examples) end = q.examples;

    for (int f = threadIdx.x; f < TILE; f += THREADS) {
        make_feature(shared.left_features[f], q.g, tile.i * TILE + f);
        make_feature(shared.right_features[f], q.a, tile.j * TILE + f);
    }
    Own own_g = own_features(q.g, tile.i), own_a = own_features(q.a, tile.j);
    int chunks = SQUARE ? 1 : (q.positions + ROWS - 1) / ROWS;
    int steps = SQUARE ? (end - begin + ROWS - 1) / ROWS : (end - begin) * chunks;
    float sum[COUNT], squares[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = squares[i] = 0;
    u32 left[PER_THREAD], right[PER_THREAD];
    step_rows(q, tile.block, 0, begin, end, chunks, shared, 0);
    __syncthreads();
    fetch(left, q.g, shared.rows[0], own_g, shared.left_features);
    fetch(right, q.a, shared.other_rows[0], own_a, shared.right_features);
    for (int step = 0, chunk = 0; step < steps; step++) {
        int now = step % 2, next = 1 - now;
        store(shared.left[now], left, q.g, shared.rows[now], false);
        store(shared.right[now], right, q.a, shared.other_rows[now], false);
        step_rows(q, tile.block, step + 1, begin, end, chunks, shared, next);
        __syncthreads();
        if (step + 1 < steps) {
            fetch(left, q.g, shared.rows[next], own_g, shared.left_features);
            fetch(right, q.a, shared.other_rows[next], own_a, shared.right_features);
        }
        multiply(sum, shared.left[now], shared.right[now]);
        if (!SQUARE && ++chunk == chunks) {
            chunk = 0;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                squares[i] += sum[i] * sum[i];
                sum[i] = 0;
            }
        }
    }
    if (!SQUARE) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] = squares[i];
    }
    if (q.splits == 1)
        emit(q, tile, sum);
    else
        write_part(p.parts, item, sum);
}

// Sums the parts of every tile whose sum was split.
KERNEL(scalings_finish, Params, THREADS) {
    int index = 0, tile_index = blockIdx.x;
    while (index + 1 < p.count && p.problem[index + 1].first_tile <= tile_index) index++;
    const Problem& q = p.problem[index];
    if (q.splits == 1) return;
    int local = tile_index - q.first_tile;
    float sum[COUNT];
    sum_parts(sum, p.parts, q.first + (i64)local * q.splits, q.splits);
    emit(q, tile_of(q, local), sum);
}
