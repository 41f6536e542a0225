// swiglu: silu(gate) * up in float32, rounded once; a row of gate_up is its gate, then its up.
// Rows from `*rows_end` on belong to no slot and are neither read nor written; null: all rows count.
// Grid: (rows, words / threads). `words` is F / N.

template <class Kind>
__device__ __forceinline__ void swiglu(const typename Kind::Word* __restrict__ gate_up_S2F,
                                       const int* __restrict__ rows_end, int words,
                                       typename Kind::Word* __restrict__ h_SF) {
    const long long row = blockIdx.x;
    if (rows_end && row >= *rows_end) return;
    const typename Kind::Word* const gate_F = gate_up_S2F + row * 2 * words;
    typename Kind::Word* const h_F = h_SF + row * words;
    const int stride = (int)(gridDim.y * blockDim.x);
    for (int f = (int)(blockIdx.y * blockDim.x + threadIdx.x); f < words; f += stride) {
        const typename Kind::Word gate_word = gate_F[f], up_word = gate_F[words + f];
        float gate[Kind::N], up[Kind::N];
        Kind::load(gate_word, gate);
        Kind::load(up_word, up);
#pragma unroll
        for (int n = 0; n < Kind::N; ++n) gate[n] = Kind::act(gate[n], up[n]);
        h_F[f] = Kind::store(gate);
    }
}

#define SWIGLU(NAME, KIND)                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                           \
    NAME(const KIND::Word* __restrict__ gate_up_S2F, const int* __restrict__ rows_end,          \
         int words, KIND::Word* __restrict__ h_SF) {                                            \
        swiglu<KIND>(gate_up_S2F, rows_end, words, h_SF);                                       \
    }

SWIGLU(moe_swiglu_float32_4, Floats4)
SWIGLU(moe_swiglu_float32_1, Floats1)
SWIGLU(moe_swiglu_bfloat16_8, Bf16s8)
SWIGLU(moe_swiglu_bfloat16_1, Bf16s1)
SWIGLU(moe_swiglu_float16_8, Halves8)
SWIGLU(moe_swiglu_float16_1, Halves1)
