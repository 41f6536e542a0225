// Enough of CUDA to run the kernels' text on a CPU: blocks one after the other, the threads of a
// block as fibers that switch at barriers and warp collectives, in an order that differs every time.
// What hangs on a device, or is undefined there (a barrier that some threads never reach, a lane
// that is missing in a collective, or is in another one), is an error here.

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Three { unsigned x, y, z; };
static Three threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

constexpr int MOST_SHARED = 48 << 10, CANARY = 256;
alignas(16) unsigned char shared_bytes[MOST_SHARED + CANARY];

// ---- fibers --------------------------------------------------------------------------------------

struct Post { int kind; unsigned mask, value; unsigned serial; };
struct Fiber {
    jmp_buf at;
    ucontext_t start;
    unsigned id, posts;
    bool started, done;
    Post post[2];  // a lane is at most one collective ahead of another
};
constexpr size_t STACK = 64 << 10;
static std::vector<Fiber> fibers(1024);
static std::vector<char> stacks(1024 * STACK);
static unsigned threads_now, waiting, generation;
static Fiber* current;
static jmp_buf scheduler;
static bool progress;
static std::string failure;
static std::function<void()> body;

[[noreturn]] static void leave() { _longjmp(scheduler, 1); }

static void yield_fiber() {
    if (_setjmp(current->at) == 0) leave();
}

[[noreturn]] static void fail(const std::string& why) {
    if (failure.empty()) failure = why;
    current->done = true;
    leave();
}

static void run_fiber() {
    body();
    current->done = progress = true;
    leave();
}

static void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx.x = fiber.id;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Threads in order, backwards, mixed, or warp by warp in any order of warps: one warp far ahead of
// the others, its first lane last, is what shows most races.
static void new_order(std::vector<unsigned>& order, std::mt19937& random) {
    const unsigned kind = random() % 4, turn = (unsigned)random();
    std::vector<unsigned> warps(order.size() / 32);
    for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
    if (kind == 2) std::shuffle(warps.begin(), warps.end(), random);
    for (unsigned i = 0; i < order.size(); ++i) {
        const unsigned lane = turn % 2 ? 31 - i % 32 : i % 32;
        order[i] = 32 * warps[i / 32] + lane;
    }
    if (kind == 1) std::reverse(order.begin(), order.end());
    if (kind == 3) std::shuffle(order.begin(), order.end(), random);
}

static void run_block(unsigned threads, std::mt19937& random) {
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.id = i;
        fiber.posts = 0;
        fiber.started = fiber.done = false;
        fiber.post[0].serial = fiber.post[1].serial = 0;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    threads_now = threads;
    waiting = generation = 0;
    for (bool left = true; left;) {
        left = progress = false;
        new_order(order, random);
        for (unsigned i : order) {
            if (fibers[i].done) continue;
            left = true;
            resume(fibers[i]);
            if (!failure.empty()) return;
        }
        if (left && !progress) {
            failure = "deadlock: threads wait for others that never come";
            return;
        }
    }
}

static void __syncthreads() {
    const unsigned mine = generation;
    if (++waiting == threads_now) {
        waiting = 0;
        ++generation;
    }
    while (generation == mine) yield_fiber();
    progress = true;
}

// Waits for all lanes of the mask in the same collective; returns where their values are.
static unsigned collective(int kind, unsigned mask, unsigned value) {
    const unsigned lane = current->id & 31u, warp = current->id & ~31u;
    if (!(mask >> lane & 1u)) fail("a lane is not in its own mask");
    const unsigned serial = ++current->posts, slot = serial & 1u;
    current->post[slot] = {kind, mask, value, serial};
    for (unsigned other = 0; other < 32; ++other) {
        if (!(mask >> other & 1u)) continue;
        if (warp + other >= threads_now) fail("a mask has a lane that does not exist");
        Fiber& peer = fibers[warp + other];
        while (peer.posts < serial) {
            if (peer.done) fail("a lane left before a collective that names it");
            yield_fiber();
        }
        const Post& post = peer.post[slot];
        if (post.serial != serial || post.kind != kind || post.mask != mask)
            fail("lanes of one mask are in different collectives");
    }
    progress = true;
    return slot;
}

static unsigned value_of(unsigned lane, unsigned slot) {
    return fibers[(current->id & ~31u) + lane].post[slot].value;
}

static void __syncwarp(unsigned mask = 0xffffffffu) { collective(0, mask, 0); }

static unsigned __match_any_sync(unsigned mask, int value) {
    const unsigned slot = collective(1, mask, (unsigned)value);
    unsigned peers = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1u && value_of(lane, slot) == (unsigned)value) peers |= 1u << lane;
    return peers;
}

static unsigned __ballot_sync(unsigned mask, bool vote) {
    const unsigned slot = collective(2, mask, vote);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1u && value_of(lane, slot)) votes |= 1u << lane;
    return votes;
}

static int __shfl_up_sync(unsigned mask, int value, unsigned step) {
    const unsigned slot = collective(3, mask, (unsigned)value), lane = current->id & 31u;
    return lane < step ? value : (int)value_of(lane - step, slot);
}

static int __shfl_sync(unsigned mask, int value, int from) {
    return (int)value_of((unsigned)from & 31u, collective(4, mask, (unsigned)value));
}

// ---- arithmetic ----------------------------------------------------------------------------------

static int atomicAdd(int* at, int value) { return (*at += value) - value; }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a < b ? b : a; }
#define __expf expf  // glibc has another function of this name
static float __fdividef(float a, float b) { return a / b; }

template <class To, class From> static To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static float __uint_as_float(unsigned bits) { return bits_of<float>(bits); }
static unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
static unsigned host_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
static unsigned host_half(float x) { return bits_of<unsigned short>((_Float16)x); }
static float host_from_half(unsigned bits) {
    return (float)bits_of<_Float16>((unsigned short)bits);
}

// ---- launches ------------------------------------------------------------------------------------

struct Kernel {
    std::string name;
    std::function<void(void**)> call;
    std::vector<int> sizes;  // bytes of each parameter
};

template <class... A, size_t... I>
static void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}

template <class... A> static Kernel kernel_of(const char* name, void (*kernel)(A...)) {
    auto call = [kernel](void** arguments) {
        apply(kernel, arguments, std::index_sequence_for<A...>{});
    };
    return {name, call, {(int)sizeof(A)...}};
}

static const std::vector<Kernel>& kernels();

// Null, or what went wrong.
extern "C" const char* lanes_launch(const char* name, unsigned grid_x, unsigned grid_y,
                                    unsigned threads, unsigned shared, unsigned seed,
                                    int parameters, const int* sizes, void** arguments) {
    failure.clear();
    const Kernel* found = nullptr;
    for (const Kernel& kernel : kernels())
        if (kernel.name == name) found = &kernel;
    if (!found) return "no such kernel";
    if (found->sizes != std::vector<int>(sizes, sizes + parameters))
        return "the arguments are not of the parameters' sizes";
    if (!grid_x || !grid_y || grid_y > 65535 || !threads || threads > 1024 || threads % 32)
        return "a grid or block that a device refuses, or no whole warps";
    if (shared > (unsigned)MOST_SHARED) return "more shared memory than every device has";
    std::mt19937 random(seed);
    body = [&] { found->call(arguments); };
    gridDim = {grid_x, grid_y, 1};
    blockDim = {threads, 1, 1};
    for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned i = 0; i < grid_x; ++i) {
            blockIdx = {seed % 2 ? grid_x - 1 - i : i, y, 0};
            memset(shared_bytes, 0xa5, sizeof shared_bytes);  // as it is found: not zeros
            run_block(threads, random);
            for (unsigned b = shared; b < MOST_SHARED + CANARY; ++b)
                if (shared_bytes[b] != 0xa5) failure = "a write past the block's shared memory";
            if (!failure.empty()) return failure.c_str();
        }
    }
    return nullptr;
}
