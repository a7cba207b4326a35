// s <- beta s + alpha sum_n (sum_t g_nt a_nt^T)^2 of projected g and a, for many layers
// at once. An example's gradient lives in registers, a tile at a time. With one position
// (SQUARE) the square of the outer product is the outer product of the squares.
// With PIPELINE features lie in aligned chunks, of both operands.
// With WARPGROUP the left operand is in registers, and an example's products are squared by
// halves of their columns, while tensor cores have those of the other half.
#if PIPELINE
#define TWO_SUMS 1
#endif
#include "operands.cuh"
#if TRANSPOSED
#include "transposed.cuh"
#elif PIPELINE
#include "pipeline.cuh"
#else
#include "tiles.cuh"
#endif

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

// Write a thread's element i of a tile.
DEVICE void emit(const Problem& q, const Tile& tile, int i, float sum) {
    int r = tile.i * TILE + row_of(i), c = tile.j * TILE + column_of(i);
    if (r >= q.g.features || c >= q.a.features) return;
    float* to = q.out + tile.block * q.out_block + r * q.out_row + c;
    *to = updated(to, q.beta, q.alpha * sum);
}

#if !WARPGROUP

// Rows of one step: of a run of examples, or of a run of positions of one example.
template <class Rows>
DEVICE void step_rows(const Problem& q, int block, int step, int begin, int end,
                      int chunks, Rows& rows, Rows& others) {
    int number = row_of_thread(step);
    if (number >= ROWS) return;
    int n = begin, s = 0, valid = 0;
    if (SQUARE) {
        n += step * ROWS + number;
        valid = n < end;
    } else {
        n += step / chunks;
        s = step % chunks * ROWS + number;
        valid = n < end && s < q.positions;
    }
    if (!valid) n = s = 0;
    Row row;
    make_row(row, q.g, block, n, s, valid, 1.0f);
    keep_row(rows, number, row);
    make_row(row, q.a, block, n, s, valid, 1.0f);
    keep_row(others, number, row);
}

// What is done after the products of a step: an example's gradient is squared when its
// last step is done.
struct Squares {
    int chunks, chunk;

    DEVICE void after_step(float (&sum)[COUNT], float (&squares)[COUNT]) {
        if (SQUARE || ++chunk < chunks) return;
        chunk = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            squares[i] += sum[i] * sum[i];
            sum[i] = 0;
        }
    }
};

#endif

#if WARPGROUP

// An operand's rows of a step after the other: of a run of examples, or of a run of positions
// of one example. They follow each other at equal steps: nobody has to look them up.
template <int SIZE>
struct Walk {
    Reader<SIZE> reader;
    i64 step, example;  // in bytes: to the next step, and from an example's last to the next

    // To read in row `row` of every step and in those that are `after` it, and there at `from`
    // in the tensor's first row.
    template <class After>
    DEVICE Walk(const Source& q, const void* from, int block, int begin, int chunks, int row,
                After after) {
        i64 pitch = SQUARE ? q.stride_n : q.stride_s;
        i64 first = begin * q.stride_n + block * q.stride_block + row * pitch;
        reader.at = static_cast<const unsigned char*>(from) + first * (i64)sizeof(Element);
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            reader.apart[i] = after(i) * (int)(pitch / CHUNK);
            keep(reader.apart[i]);
        }
        step = ROWS * pitch * (i64)sizeof(Element);
        example = q.stride_n * (i64)sizeof(Element) - (chunks - 1) * step;
    }

    DEVICE void next(bool ends) { reader.at += ends ? example : step; }
};

// Where two features begin in the tensor's first row. Beyond the last feature it is the first
// two: what comes of them is nobody's result.
DEVICE const Element* pair_of(const Source& q, int feature) {
    return static_cast<const Element*>(q.data) + (feature < q.features ? feature : 0);
}

struct Stages {
    Stage stages[STAGES];
};

// Columns of a product, and a thread's sums of them.
constexpr int COLUMNS = TILE / GROUPS, PART = COUNT / GROUPS;

// Add the squares of an example's products to those of the examples before.
DEVICE void add_squares(float* squares, float* sum) {
#pragma unroll
    for (int i = 0; i < PART; i++) {
        settle(sum[i]);
        squares[i] += sum[i] * sum[i];
    }
}

// Start the products of a step; an example's first do not read its sums.
DEVICE void start_products(float (&sum)[COUNT], const u32 (&left)[8], u64 right,
                           bool first) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        fence_sums();
#pragma unroll
        for (int half = 0; half < 2; half++)
            start_product(sum + group * PART, left + half * 4,
                          right + group * COLUMNS * COLUMN_CHUNKS + half * HALF_CHUNKS,
                          SQUARE || half || !first);
        commit_products();
    }
}

// The sums of examples `begin` to `end` of one tile, and their squares.
DEVICE void tile_sums(float (&sum)[COUNT], float (&squares)[COUNT], const Problem& q,
                      const Tile& tile, int begin, int end, int chunks, int steps) {
    SHARED_BYTES(memory);
    Stages& shared = *reinterpret_cast<Stages*>(memory);
    u64 stages = first_descriptor(shared.stages);
    // Rows of the step that is loaded next, and of all of its kind.
    int rows = SQUARE ? end - begin : q.positions, there = rows, chunk = 0;
    Walk<LANE_ROWS> left(q.g, pair_of(q.g, tile.i * TILE + left_feature()), tile.block,
                         begin, chunks, first_row<true>(), row_after<true>);
#if TRANSPOSED
    int feature = tile.j * TILE + right_feature(), last = q.a.features - 1;
    bool odd = last % 2 == 0 && last < (tile.j + 1) * TILE, alone = feature >= last;
    Walk<LANE_ROWS> right(q.a, pair_of(q.a, feature), tile.block, begin, chunks,
                          first_row<false>(), row_after<false>);
    int place = chunk_place();
    auto load_right = [&](u32(&part)[8], int) {
        load_right_rows(part, right.reader, there - first_row<false>(), odd, alone);
    };
    auto store = [&](const u32(&part)[8], int, int stage) {
        store_part(shared.stages[stage], part, place);
    };
#else
    Column column = own_column(q.a, tile.j);
    Walk<COPIES> right(q.a, column.from, tile.block, begin, chunks, threadIdx.x / CHUNKS,
                       [](int i) { return i * APART; });
    auto load_right = [&](u32(&)[8], int step) {
        start_copies(shared.stages[step % STAGES], column, right.reader,
                     there - threadIdx.x / CHUNKS);
    };
    auto store = [](const u32(&)[8], int, int) {};
#endif
    auto load_left = [&](u32(&part)[8], int) {
        load_rows<true>(part, left.reader, there - first_row<true>());
        there -= ROWS;
        bool ends = !SQUARE && there <= 0;
        left.next(ends);
        right.next(ends);
        if (ends) there = rows;
    };
    auto start = [&](const u32(&part)[8], int step, int stage) {
        u64 its = stages + (TRANSPOSED ? stage : step % STAGES) * STAGE_CHUNKS;
        start_products(sum, part, its, chunk == 0);
        chunk++;
    };
    auto ends = [&] { return !SQUARE && chunk == chunks - 1; };
    auto finish = [&] {
        wait_for_products<1>();
        add_squares(squares, sum);
        wait_for_products<0>();
        add_squares(squares + PART, sum + PART);
        chunk = 0;
    };
    auto none = [](int) {};
    pipelined(steps, none, load_right, load_left, store, start, ends, finish);
    settle(sum);
}

#elif PIPELINE

struct PairPipeline : Pipeline {
    StepRows others[RING];
};

// The sums of examples `begin` to `end` of one tile, and their squares.
DEVICE void tile_sums(float (&sum)[COUNT], float (&squares)[COUNT], const Problem& q,
                      const Tile& tile, int begin, int end, int chunks, int steps) {
    SHARED_BYTES(memory);
    PairPipeline& shared = *reinterpret_cast<PairPipeline*>(memory);
    Operand left = {q.g, own_column(q.g, tile.i), shared.rows};
    Operand right = {q.a, own_column(q.a, tile.j), shared.others};
    Places places = own_places();
    Squares example = {chunks, 0};
    auto rows = [&](int step) {
        int slot = step % RING;
        step_rows(q, tile.block, step, begin, end, chunks, shared.rows[slot],
                  shared.others[slot]);
    };
    auto copy = [&](int step) {
        start_copies(shared.stages[step % STAGES], step, left, right, false);
    };
    auto add = [&](int step) {
        const Stage& stage = shared.stages[step % STAGES];
        multiply<PLAIN>(sum, stage.left, stage.right, places, shared.rows[step % RING]);
        example.after_step(sum, squares);
    };
    pipelined(steps, rows, copy, add);
}

#else

struct SharedPair : Shared {
    Row others[2][ROWS];
};

// The sums of examples `begin` to `end` of one tile, and their squares.
DEVICE void tile_sums(float (&sum)[COUNT], float (&squares)[COUNT], const Problem& q,
                      const Tile& tile, int begin, int end, int chunks, int steps) {
    __shared__ SharedPair shared;
    for (int f = threadIdx.x; f < TILE; f += THREADS) {
        make_feature(shared.left_features[f], q.g, tile.i * TILE + f);
        make_feature(shared.right_features[f], q.a, tile.j * TILE + f);
    }
    Own own_g = own_features(q.g, tile.i), own_a = own_features(q.a, tile.j);
    Squares example = {chunks, 0};
    u32 left[PER_THREAD], right[PER_THREAD];
    step_rows(q, tile.block, 0, begin, end, chunks, shared.rows[0], shared.others[0]);
    __syncthreads();
    fetch(left, q.g, shared.rows[0], own_g, shared.left_features);
    fetch(right, q.a, shared.others[0], own_a, shared.right_features);
    for (int step = 0; step < steps; step++) {
        int now = step % 2, next = 1 - now;
        store(shared.left[now], left, q.g, shared.rows[now], false);
        store(shared.right[now], right, q.a, shared.others[now], false);
        step_rows(q, tile.block, step + 1, begin, end, chunks, shared.rows[next],
                  shared.others[next]);
        __syncthreads();
        if (step + 1 < steps) {
            fetch(left, q.g, shared.rows[next], own_g, shared.left_features);
            fetch(right, q.a, shared.others[next], own_a, shared.right_features);
        }
        multiply(sum, shared.left[now], shared.right[now]);
        example.after_step(sum, squares);
    }
}

#endif

KERNEL(scalings, Params, THREADS) {
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int local = item - q.first;
    Tile tile = tile_of(q, local / q.splits);
    int begin = local % q.splits * q.share, end = begin + q.share;
    if (end > q.examples) end = q.examples;
    int chunks = SQUARE ? 1 : (q.positions + ROWS - 1) / ROWS;
    if (chunks == 0) chunks = 1;  // an example of no position
    int steps = SQUARE ? (end - begin + ROWS - 1) / ROWS : (end - begin) * chunks;
    float sum[COUNT], squares[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = squares[i] = 0;
    tile_sums(sum, squares, q, tile, begin, end, chunks, steps);
    if (!SQUARE) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] = squares[i];
    }
    if (q.splits > 1) {
        write_part(p.parts, item, sum);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) emit(q, tile, i, sum[i]);
}

// Sums the parts of every tile whose sum was split.
KERNEL(scalings_finish, Params, THREADS) {
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
