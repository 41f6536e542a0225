// capacity: which slots of an expert are kept, and who claims which runner-up. The slots of an
// expert are those of its rows in a plan, in slot order.

// A float as an unsigned whose order is that of the floats; both zeros are one, NaN is largest.
__device__ __forceinline__ unsigned ordered(float x) {
    if (x == 0.0f) return 0x80000000u;
    if (x != x) return 0xffffffffu;
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Every slot without a place claims the next unused runner-up of its token. One thread a token.
extern "C" __global__ void __launch_bounds__(256)
moe_claim(const int* __restrict__ ids_TK, int tokens, int top_k,
          const int* __restrict__ next_ids_TM, const float* __restrict__ next_priority_TM,
          int runners_up, const int* __restrict__ placed_TK, int* __restrict__ used_T,
          int* __restrict__ claim_ids_TK, int* __restrict__ claim_which_TK,
          float* __restrict__ claim_priority_TK) {
    const int t = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (t >= tokens) return;
    const long long first = (long long)t * runners_up;
    int used = used_T[t];
    for (int k = 0; k < top_k; ++k) {
        const int s = t * top_k + k;
        int id = -1, which = -1;
        float priority = 0.0f;
        if (ids_TK[s] >= 0 && placed_TK[s] < 0) {
            if (used < runners_up) {
                which = used;
                id = next_ids_TM[first + which];
                if (next_priority_TM) priority = next_priority_TM[first + which];
            }
            ++used;
        }
        claim_ids_TK[s] = id;
        claim_which_TK[s] = which;
        if (claim_priority_TK) claim_priority_TK[s] = priority;
    }
    used_T[t] = used;
}

__device__ __forceinline__ void place(int s, int expert, const int* which_S, int* placed_S,
                                      int* runner_up_S) {
    placed_S[s] = expert;
    if (which_S) runner_up_S[s] = which_S[s];
}

// Keeps as many slots of an expert as it has room for, and takes them off its room. The first of
// them; with priorities, the largest, and the lowest slots among equals: a radix select over the key
// finds the smallest key kept and how many of that key are, eight bits at a time.
// Grid: one block an expert, of whole warps. Shared: 256 + 2 + 32 ints.
extern "C" __global__ void __launch_bounds__(512)
moe_select(const int* __restrict__ slot_S, const int* __restrict__ ends_E,
           int* __restrict__ left_E, const float* __restrict__ priority_S,
           const int* __restrict__ which_S, int* __restrict__ placed_S,
           int* __restrict__ runner_up_S) {
    int* const bin = (int*)shared_bytes;
    int* const found = bin + 256;
    int* const warp_votes = found + 2;
    const int expert = (int)blockIdx.x, lane = lane_id(), warp = warp_id();
    const int thread = (int)threadIdx.x, threads = (int)blockDim.x;
    const int begin = expert > 0 ? ends_E[expert - 1] : 0;
    const int count = ends_E[expert] - begin;
    const int left = left_E[expert];
    const int take = min(max(left, 0), count);
    slot_S += begin;
    __syncthreads();  // all threads have read left_E
    if (thread == 0) left_E[expert] = left - take;
    // From here on the whole block takes the same branches.
    if (take == count || priority_S == nullptr) {
        for (int i = thread; i < take; i += threads)
            place(slot_S[i], expert, which_S, placed_S, runner_up_S);
        return;
    }
    if (take == 0) return;

    unsigned key = 0, known = 0;  // the bits of the smallest key kept that are known so far
    int need = take;              // how many are kept among the keys that begin so
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int b = thread; b < 256; b += threads) bin[b] = 0;
        __syncthreads();
        for (int i = thread; i < count; i += threads) {
            const unsigned mine = ordered(priority_S[slot_S[i]]);
            if ((mine & known) == key) atomicAdd(&bin[(mine >> shift) & 255u], 1);
        }
        __syncthreads();
        if (warp == 0) {  // lane 0 has the eight largest digits
            int sum = 0;
            for (int j = 0; j < 8; ++j) sum += bin[255 - 8 * lane - j];
            int above = sum_to_lane(sum, lane) - sum;
            if (above < need && need <= above + sum) {  // true for one lane
                int digit = 255 - 8 * lane;
                while (above + bin[digit] < need) above += bin[digit--];
                found[0] = digit;
                found[1] = need - above;
            }
        }
        __syncthreads();
        key |= (unsigned)found[0] << shift;
        known |= 255u << shift;
        need = found[1];
    }

    int seen = 0;  // slots of just this key so far
    for (int i0 = 0; i0 < count; i0 += threads) {
        const int i = i0 + thread;
        const int s = i < count ? slot_S[i] : -1;
        const unsigned mine = i < count ? ordered(priority_S[s]) : 0u;
        const bool equal = i < count && mine == key;
        const unsigned votes = __ballot_sync(ALL_LANES, equal);
        if (lane == 0) warp_votes[warp] = __popc(votes);
        __syncthreads();
        int before = seen + __popc(votes & lanes_below(lane));
        for (int w = 0; w < threads / 32; ++w) {
            if (w < warp) before += warp_votes[w];
            seen += warp_votes[w];
        }
        if (i < count && (mine > key || (equal && before < need)))
            place(s, expert, which_S, placed_S, runner_up_S);
        __syncthreads();  // warp_votes have been read
    }
}
