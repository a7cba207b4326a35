// out <- beta out + alpha sum_k w_k x_k^2, element by element, for many layers at once:
// diagonal factors. Bound by memory: every input is read once.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 32;  // features of a piece of work

struct Problem {
    const void* x;
    const float* weight;                                     // [N, S] or null
    float* out;                                              // [blocks, d]
    i64 stride_n, stride_s, stride_block, stride_feature;    // in elements
    i64 out_block;
    int positions, rows, blocks;  // S, N S
    int features, bias, chunks;   // chunks: ceil(d / WIDTH)
    int splits, share;            // parts of the sum, and rows of each
    int lanes;                    // neighbouring threads along features: 32, or 1
    int first, first_tile;        // this problem's first piece of work, its first chunk
    float alpha, beta;
};

struct Params {
    int count, padding;
    float* parts;
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

DEVICE float square_at(const Problem& q, int block, int k, int f) {
    float weight = q.weight ? q.weight[k] : 1.0f;
    if (f >= q.features) return weight;
    int n = q.positions == 1 ? k : k / q.positions, s = k - n * q.positions;
    i64 at = n * q.stride_n + s * q.stride_s + block * q.stride_block;
    float x = to_float(static_cast<const Element*>(q.x)[at + f * q.stride_feature]);
    return weight * x * x;
}

DEVICE void emit(const Problem& q, int tile, int column, float sum) {
    int f = tile % q.chunks * WIDTH + column;
    if (f >= q.features + q.bias) return;
    float* to = q.out + tile / q.chunks * q.out_block + f;
    *to = updated(to, q.beta, q.alpha * sum);
}

KERNEL(diagonal, Params, THREADS) {
    __shared__ float sums[THREADS];
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int local = item - q.first, tile = local / q.splits;
    int begin = local % q.splits * q.share, end = begin + q.share;
    if (end > q.rows) end = q.rows;
    int along = THREADS / q.lanes, lane = threadIdx.x % q.lanes;
    for (int column = lane; column < WIDTH; column += q.lanes) {
        int f = tile % q.chunks * WIDTH + column;
        float sum = 0;
        if (f < q.features + q.bias)
            for (int k = begin + threadIdx.x / q.lanes; k < end; k += along)
                sum += square_at(q, tile / q.chunks, k, f);
        sums[threadIdx.x] = sum;
        for (int half = along / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x / q.lanes < half)
                sums[threadIdx.x] += sums[threadIdx.x + half * q.lanes];
        }
        __syncthreads();
        if (threadIdx.x < q.lanes) {
            float total = sums[threadIdx.x];
            if (q.splits == 1)
                emit(q, tile, column, total);
            else
                p.parts[(i64)item * WIDTH + column] = total;
        }
    }
}

// Sums the parts of every chunk whose sum was split, in their order.
KERNEL(diagonal_finish, Params, WIDTH) {
    int index = 0, tile_index = blockIdx.x;
    while (index + 1 < p.count && p.problem[index + 1].first_tile <= tile_index) index++;
    const Problem& q = p.problem[index];
    if (q.splits == 1) return;
    int local = tile_index - q.first_tile;
    const float* from = p.parts + (q.first + (i64)local * q.splits) * WIDTH + threadIdx.x;
    float sum = 0;
    for (int split = 0; split < q.splits; split++) sum += from[(i64)split * WIDTH];
    emit(q, local, threadIdx.x, sum);
}
