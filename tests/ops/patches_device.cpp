// cuda/patches.cu itself as C++ for a CPU. A block has one thread, so that a barrier has nobody to wait for; whoever calls a kernel says which
// block it is, and the loops over what a grid leaves do the rest.
#include <stdint.h>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Place {
    unsigned x, y;
} threadIdx{0, 0}, blockIdx{0, 0}, blockDim{1, 1}, gridDim{1, 1};

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T>
static void __stcg(T* to, T value) {
    *to = value;
}
static void atomicMax(int32_t* to, int32_t value) { *to = *to > value ? *to : value; }
static void __syncthreads() {}

uint4 memory[(160 << 10) / 16];  // a block's shared memory

#include "patches.cu"

extern "C" void at_block(int64_t x, int64_t y, int64_t columns, int64_t rows) {
    blockIdx = {(unsigned)x, (unsigned)y};
    gridDim = {(unsigned)columns, (unsigned)rows};
}
