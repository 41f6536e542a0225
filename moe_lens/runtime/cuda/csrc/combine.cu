// combine: each token's rows times its weights, summed in float32 in the order of its choices and
// rounded once. Rows -1 add nothing, whatever their weight. Grid: (tokens, words / threads).

// Choices whose rows are fetched together, so that their loads wait for memory at the same time.
static constexpr int FETCHED = 4;

// weight_kind: 0 float32, 1 bfloat16, 2 float16.
__device__ __forceinline__ float weight_at(const void* weights, long long at, int weight_kind) {
    if (weight_kind == 0) return ((const float*)weights)[at];
    const unsigned bits = ((const unsigned short*)weights)[at];
    return weight_kind == 1 ? from_bf16(bits) : from_half(bits);
}

template <class Kind>
__device__ __forceinline__ void combine(const typename Kind::Word* __restrict__ y_SD,
                                        const int* __restrict__ row_TK,
                                        const void* __restrict__ weights_TK, int weight_kind,
                                        int top_k, int words,
                                        typename Kind::Word* __restrict__ y_TD) {
    typedef typename Kind::Word Word;
    const long long first = (long long)blockIdx.x * top_k;
    Word* const y_D = y_TD + (long long)blockIdx.x * words;
    const int stride = (int)(gridDim.y * blockDim.x);
    for (int d = (int)(blockIdx.y * blockDim.x + threadIdx.x); d < words; d += stride) {
        float sum[Kind::N];
#pragma unroll
        for (int n = 0; n < Kind::N; ++n) sum[n] = 0.0f;
        for (int k0 = 0; k0 < top_k; k0 += FETCHED) {
            int row[FETCHED];
            Word word[FETCHED];
#pragma unroll
            for (int j = 0; j < FETCHED; ++j) row[j] = k0 + j < top_k ? row_TK[first + k0 + j] : -1;
#pragma unroll
            for (int j = 0; j < FETCHED; ++j)
                if (row[j] >= 0) word[j] = y_SD[(long long)row[j] * words + d];
#pragma unroll
            for (int j = 0; j < FETCHED; ++j) {
                if (row[j] < 0) continue;
                const float weight = weight_at(weights_TK, first + k0 + j, weight_kind);
                float y[Kind::N];
                Kind::load(word[j], y);
#pragma unroll
                for (int n = 0; n < Kind::N; ++n) sum[n] += weight * y[n];
            }
        }
        y_D[d] = Kind::store(sum);
    }
}

#define COMBINE(NAME, KIND)                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                           \
    NAME(const KIND::Word* __restrict__ y_SD, const int* __restrict__ row_TK,                   \
         const void* __restrict__ weights_TK, int weight_kind, int top_k, int words,            \
         KIND::Word* __restrict__ y_TD) {                                                       \
        combine<KIND>(y_SD, row_TK, weights_TK, weight_kind, top_k, words, y_TD);               \
    }

COMBINE(moe_combine_float32_4, Floats4)
COMBINE(moe_combine_float32_1, Floats1)
COMBINE(moe_combine_bfloat16_8, Bf16s8)
COMBINE(moe_combine_bfloat16_1, Bf16s1)
COMBINE(moe_combine_float16_8, Halves8)
COMBINE(moe_combine_float16_1, Halves1)
