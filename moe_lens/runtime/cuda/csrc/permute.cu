// permute: each row of x is read once and written to the rows of its K slots. Nothing is computed,
// so the dtype is the size of a unit: 16 bytes, or the largest power of two that rows begin at.
// Grid: (tokens, units / threads).

template <class Unit>
__device__ __forceinline__ void permute(const Unit* __restrict__ x_TD,
                                        const int* __restrict__ row_TK, int top_k, int units,
                                        Unit* __restrict__ x_SD) {
    const int* const row_K = row_TK + (long long)blockIdx.x * top_k;
    const Unit* const x_D = x_TD + (long long)blockIdx.x * units;
    const int stride = (int)(gridDim.y * blockDim.x);
    for (int d = (int)(blockIdx.y * blockDim.x + threadIdx.x); d < units; d += stride) {
        const Unit x = x_D[d];
#pragma unroll 4
        for (int k = 0; k < top_k; ++k) {
            const int row = row_K[k];
            if (row >= 0) x_SD[(long long)row * units + d] = x;
        }
    }
}

#define PERMUTE(NAME, UNIT)                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                           \
    NAME(const UNIT* __restrict__ x_TD, const int* __restrict__ row_TK, int top_k, int units,   \
         UNIT* __restrict__ x_SD) {                                                             \
        permute<UNIT>(x_TD, row_TK, top_k, units, x_SD);                                        \
    }

PERMUTE(moe_permute_16, uint4)
PERMUTE(moe_permute_8, uint2)
PERMUTE(moe_permute_4, unsigned)
PERMUTE(moe_permute_2, unsigned short)
