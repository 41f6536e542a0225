// plan: sort slots by expert, and within an expert by slot. A counting sort that asks, 32 slots at a
// time, which lanes of the warp hold the same expert (__match_any_sync): the place of a slot among
// its peers is the number of peers in lower lanes. No atomics, so the order is that of the slots,
// every time. Counts that several lanes of one warp share are written by the lowest lane alone.

// A slot's expert, or -1 if none runs for it. Ids out of range are refused where ids come from; here
// they must not write past an array.
__device__ __forceinline__ int expert_or_none(int id, int experts) {
    return (unsigned)id < (unsigned)experts ? id : -1;
}

// Counts of experts, in place, to the row each of them begins at. For one whole warp.
__device__ __forceinline__ void counts_to_begins(int* count_E, int experts, int lane) {
    const int each = (experts + 31) / 32;
    const int first = min(lane * each, experts);
    const int last = min(first + each, experts);
    int sum = 0;
    for (int e = first; e < last; ++e) sum += count_E[e];
    int begin = sum_to_lane(sum, lane) - sum;
    for (int e = first; e < last; ++e) {
        const int count = count_E[e];
        count_E[e] = begin;
        begin += count;
    }
}

// ---- up to a few thousand slots: one block does everything -------------------------------------
// Each warp has `span` slots in a row (a multiple of 128) and its own counts, 16 bits wide: so many
// slots fit. Shared: E ints, and one unsigned short for every warp and expert.

static constexpr int SMALL_UNROLL = 4;

extern "C" __global__ void __launch_bounds__(1024)
moe_plan_small(const int* __restrict__ ids_S, int slots, int experts, int span,
               int* __restrict__ row_S, int* __restrict__ slot_S, int* __restrict__ ends_E) {
    int* const begin_E = (int*)shared_bytes;
    unsigned short* const count_WE = (unsigned short*)(begin_E + experts);
    const int lane = lane_id(), warp = warp_id();
    const int threads = (int)blockDim.x, thread = (int)threadIdx.x, warps = threads / 32;
    unsigned short* const mine_E = count_WE + warp * experts;
    const int begin = min(warp * span, slots), end = min(begin + span, slots);

    for (int i = thread; i < warps * experts; i += threads) count_WE[i] = 0;
    __syncthreads();

    for (int s0 = begin; s0 < end; s0 += 32 * SMALL_UNROLL) {
        int expert[SMALL_UNROLL];
#pragma unroll
        for (int j = 0; j < SMALL_UNROLL; ++j) {
            const int s = s0 + 32 * j + lane;
            expert[j] = s < end ? expert_or_none(ids_S[s], experts) : -1;
        }
#pragma unroll
        for (int j = 0; j < SMALL_UNROLL; ++j) {
            const unsigned peers = __match_any_sync(ALL_LANES, expert[j]);
            if (expert[j] >= 0 && (peers & lanes_below(lane)) == 0)
                mine_E[expert[j]] = (unsigned short)(mine_E[expert[j]] + __popc(peers));
            __syncwarp();
        }
    }
    __syncthreads();

    // What each warp counted becomes what the warps before it counted.
    for (int e = thread; e < experts; e += threads) {
        int before = 0;
        for (int w = 0; w < warps; ++w) {
            const int count = count_WE[w * experts + e];
            count_WE[w * experts + e] = (unsigned short)before;
            before += count;
        }
        begin_E[e] = before;
        ends_E[e] = before;  // a count still: the ends follow
    }
    __syncthreads();
    if (warp == 0) counts_to_begins(begin_E, experts, lane);
    __syncthreads();
    // Each thread reads back the counts that it wrote itself.
    for (int e = thread; e < experts; e += threads) ends_E[e] += begin_E[e];

    for (int s0 = begin; s0 < end; s0 += 32 * SMALL_UNROLL) {
        int expert[SMALL_UNROLL];
#pragma unroll
        for (int j = 0; j < SMALL_UNROLL; ++j) {
            const int s = s0 + 32 * j + lane;
            expert[j] = s < end ? expert_or_none(ids_S[s], experts) : -1;
        }
#pragma unroll
        for (int j = 0; j < SMALL_UNROLL; ++j) {
            const int s = s0 + 32 * j + lane, e = expert[j];
            const unsigned peers = __match_any_sync(ALL_LANES, e);
            const unsigned lower = peers & lanes_below(lane);
            const int before = e >= 0 ? mine_E[e] : 0;
            __syncwarp();  // all peers have read the count before the lowest lane writes it
            if (e >= 0 && lower == 0) mine_E[e] = (unsigned short)(before + __popc(peers));
            __syncwarp();
            const int row = e >= 0 ? begin_E[e] + before + __popc(lower) : -1;
            if (s < end) row_S[s] = row;
            if (e >= 0) slot_S[row] = s;
        }
    }
    __syncthreads();  // all threads see the last end
    // Rows that no slot owns.
    for (int row = ends_E[experts - 1] + thread; row < slots; row += threads) slot_S[row] = -1;
}

// ---- any number of slots: count, sum up, scatter -------------------------------------------------
// One warp, which is one block, has `chunk` slots in a row (a multiple of 256).

static constexpr int UNROLL = 8;

// Shared: E ints. Grid: one block a chunk.
extern "C" __global__ void __launch_bounds__(32)
moe_plan_count(const int* __restrict__ ids_S, int slots, int experts, int chunk, int chunks,
               int* __restrict__ count_EC) {
    int* const mine_E = (int*)shared_bytes;
    const int lane = lane_id(), c = (int)blockIdx.x;
    const int begin = c * chunk, end = min(begin + chunk, slots);
    for (int e = lane; e < experts; e += 32) mine_E[e] = 0;
    __syncwarp();
    for (int s0 = begin; s0 < end; s0 += 32 * UNROLL) {
        int expert[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            const int s = s0 + 32 * j + lane;
            expert[j] = s < end ? expert_or_none(ids_S[s], experts) : -1;
        }
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            const unsigned peers = __match_any_sync(ALL_LANES, expert[j]);
            if (expert[j] >= 0 && (peers & lanes_below(lane)) == 0)
                mine_E[expert[j]] += __popc(peers);
            __syncwarp();
        }
    }
    for (int e = lane; e < experts; e += 32) count_EC[(long long)e * chunks + c] = mine_E[e];
}

// What each chunk counted becomes what the chunks before it counted. One warp an expert.
extern "C" __global__ void __launch_bounds__(256)
moe_plan_sum(int* __restrict__ count_EC, int experts, int chunks, int* __restrict__ total_E) {
    const int lane = lane_id();
    const int e = (int)(blockIdx.x * (blockDim.x / 32u)) + warp_id();
    if (e >= experts) return;  // the whole warp, and no barrier of the block follows
    int* const count_C = count_EC + (long long)e * chunks;
    int before = 0;
    for (int c0 = 0; c0 < chunks; c0 += 32) {
        const int c = c0 + lane;
        const int count = c < chunks ? count_C[c] : 0;
        const int sum = sum_to_lane(count, lane);
        if (c < chunks) count_C[c] = before + sum - count;
        before += __shfl_sync(ALL_LANES, sum, 31);
    }
    if (lane == 0) total_E[e] = before;
}

// Shared: E ints. Grid: one block a chunk.
extern "C" __global__ void __launch_bounds__(32)
moe_plan_scatter(const int* __restrict__ ids_S, int slots, int experts, int chunk, int chunks,
                 const int* __restrict__ count_EC, const int* __restrict__ total_E,
                 int* __restrict__ row_S, int* __restrict__ slot_S, int* __restrict__ ends_E) {
    int* const next_E = (int*)shared_bytes;
    const int lane = lane_id(), c = (int)blockIdx.x;
    const int begin = c * chunk, end = min(begin + chunk, slots);
    for (int e = lane; e < experts; e += 32) next_E[e] = total_E[e];
    __syncwarp();
    counts_to_begins(next_E, experts, lane);
    __syncwarp();
    const int running = next_E[experts - 1] + total_E[experts - 1];
    if (c == 0)
        for (int e = lane; e < experts; e += 32) ends_E[e] = next_E[e] + total_E[e];
    __syncwarp();  // all lanes have read the begins
    for (int e = lane; e < experts; e += 32) next_E[e] += count_EC[(long long)e * chunks + c];
    __syncwarp();
    for (int s0 = begin; s0 < end; s0 += 32 * UNROLL) {
        int expert[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            const int s = s0 + 32 * j + lane;
            expert[j] = s < end ? expert_or_none(ids_S[s], experts) : -1;
        }
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            const int s = s0 + 32 * j + lane, e = expert[j];
            const unsigned peers = __match_any_sync(ALL_LANES, e);
            const unsigned lower = peers & lanes_below(lane);
            const int next = e >= 0 ? next_E[e] : 0;
            __syncwarp();  // all peers have read the row before the lowest lane writes it
            if (e >= 0 && lower == 0) next_E[e] = next + __popc(peers);
            __syncwarp();
            const int row = e >= 0 ? next + __popc(lower) : -1;
            if (s < end) row_S[s] = row;
            if (e >= 0) slot_S[row] = s;
        }
    }
    // Of the rows that no slot owns, those numbered as this chunk's slots are.
    for (int row = max(begin, running) + lane; row < end; row += 32) slot_S[row] = -1;
}
