// What every kernel here shares. The files of this folder are compiled as one text, this one first,
// and include nothing: NVRTC then needs no header and no include path, and takes a fraction of a
// second. T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots,
// M runners-up of a token. Slots, rows and experts are int; what counts elements is 64 bits wide.

extern __shared__ __align__(16) unsigned char shared_bytes[];

static constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return (int)(threadIdx.x & 31u); }

__device__ __forceinline__ int warp_id() { return (int)(threadIdx.x >> 5); }

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

// Sum over this lane and those before it. All lanes of the warp take part.
__device__ __forceinline__ int sum_to_lane(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += before;
    }
    return value;
}

// ---- numbers: float32 to and from what rows are stored in --------------------------------------

__device__ __forceinline__ float from_bf16(unsigned bits) { return __uint_as_float(bits << 16); }

// Two floats to bf16, nearest even, the first in the low half.
__device__ __forceinline__ unsigned to_bf16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return host_bf16(low) | host_bf16(high) << 16;
#endif
}

__device__ __forceinline__ float from_half(unsigned bits) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((unsigned short)bits));
    return wide;
#else
    return host_from_half(bits & 0xffffu);
#endif
}

__device__ __forceinline__ unsigned to_half_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return host_half(low) | host_half(high) << 16;
#endif
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    return gate / (1.0f + expf(-gate)) * up;
}

// A few units in the last place of float32 worse, and a third of the instructions: for results that
// are rounded to 16 bits.
__device__ __forceinline__ float silu_times_fast(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// How N numbers of a row lie in one Word, the unit that a thread loads and stores.

struct Floats4 {
    typedef uint4 Word;
    static constexpr int N = 4;
    static __device__ __forceinline__ void load(Word w, float* x) {
        x[0] = __uint_as_float(w.x), x[1] = __uint_as_float(w.y);
        x[2] = __uint_as_float(w.z), x[3] = __uint_as_float(w.w);
    }
    static __device__ __forceinline__ Word store(const float* x) {
        Word w;
        w.x = __float_as_uint(x[0]), w.y = __float_as_uint(x[1]);
        w.z = __float_as_uint(x[2]), w.w = __float_as_uint(x[3]);
        return w;
    }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times(g, u); }
};

struct Floats1 {
    typedef float Word;
    static constexpr int N = 1;
    static __device__ __forceinline__ void load(Word w, float* x) { x[0] = w; }
    static __device__ __forceinline__ Word store(const float* x) { return x[0]; }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times(g, u); }
};

struct Bf16s8 {
    typedef uint4 Word;
    static constexpr int N = 8;
    static __device__ __forceinline__ void two(unsigned w, float* x) {
        x[0] = from_bf16(w & 0xffffu);
        x[1] = __uint_as_float(w & 0xffff0000u);
    }
    static __device__ __forceinline__ void load(Word w, float* x) {
        two(w.x, x), two(w.y, x + 2), two(w.z, x + 4), two(w.w, x + 6);
    }
    static __device__ __forceinline__ Word store(const float* x) {
        Word w;
        w.x = to_bf16_pair(x[0], x[1]), w.y = to_bf16_pair(x[2], x[3]);
        w.z = to_bf16_pair(x[4], x[5]), w.w = to_bf16_pair(x[6], x[7]);
        return w;
    }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times_fast(g, u); }
};

struct Bf16s1 {
    typedef unsigned short Word;
    static constexpr int N = 1;
    static __device__ __forceinline__ void load(Word w, float* x) { x[0] = from_bf16(w); }
    static __device__ __forceinline__ Word store(const float* x) {
        return (Word)(to_bf16_pair(x[0], 0.0f) & 0xffffu);
    }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times_fast(g, u); }
};

struct Halves8 {
    typedef uint4 Word;
    static constexpr int N = 8;
    static __device__ __forceinline__ void two(unsigned w, float* x) {
        x[0] = from_half(w & 0xffffu), x[1] = from_half(w >> 16);
    }
    static __device__ __forceinline__ void load(Word w, float* x) {
        two(w.x, x), two(w.y, x + 2), two(w.z, x + 4), two(w.w, x + 6);
    }
    static __device__ __forceinline__ Word store(const float* x) {
        Word w;
        w.x = to_half_pair(x[0], x[1]), w.y = to_half_pair(x[2], x[3]);
        w.z = to_half_pair(x[4], x[5]), w.w = to_half_pair(x[6], x[7]);
        return w;
    }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times_fast(g, u); }
};

struct Halves1 {
    typedef unsigned short Word;
    static constexpr int N = 1;
    static __device__ __forceinline__ void load(Word w, float* x) { x[0] = from_half(w); }
    static __device__ __forceinline__ Word store(const float* x) {
        return (Word)(to_half_pair(x[0], 0.0f) & 0xffffu);
    }
    static __device__ __forceinline__ float act(float g, float u) { return silu_times_fast(g, u); }
};
