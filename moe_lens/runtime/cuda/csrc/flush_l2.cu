// flush_l2: reads a buffer several times the size of the L2 cache, which pushes out all else and
// leaves nothing to be written back (a flush that writes makes whoever comes next pay for it). The
// buffer holds zeros; the store that never happens keeps the loads from being optimised away.

extern "C" __global__ void __launch_bounds__(256)
moe_flush_l2(uint4* __restrict__ buffer, long long words) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    unsigned any = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride) {
        const uint4 word = buffer[i];
        any |= word.x | word.y | word.z | word.w;
    }
    if (any != 0) buffer[0].x = any;
}
