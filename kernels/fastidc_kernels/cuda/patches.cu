// Launched by fastidc_kernels/patches.py through CuPy, whose Python integers arrive as 64 bits. No kernel allocates, waits or writes to what it reads.
#include "patches.cuh"

// ---- patches [count, height / patch * width / patch, 3 * patch * patch] of images [stored, height, width, 3] picked by index [count]
//
// A program takes one strip at a time: bytes into shared memory, 16 at a time, then values out of it, 16 bytes at a time.

// Eight values side by side. __stcg is one instruction of 16 bytes, where the compiler may split an assignment into four.
template <int KIND>
__device__ __forceinline__ void store(void* out, int64_t at, const uint32_t* levels) {
    if constexpr (KIND == FP32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t* four = levels + 4 * i;
            __stcg(to + i, make_float4((float)four[0], (float)four[1], (float)four[2], (float)four[3]));
        }
    } else {
        uint4* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at);
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = half_of<KIND>(levels[2 * i]) | half_of<KIND>(levels[2 * i + 1]) << 16;
        __stcg(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
}

template <int KIND>
__device__ __forceinline__ void store_one(void* out, int64_t at, uint32_t level) {
    if constexpr (KIND == FP32) {
        static_cast<float*>(out)[at] = (float)level;
    } else {
        static_cast<uint16_t*>(out)[at] = (uint16_t)half_of<KIND>(level);
    }
}

// An index that is none: its values are 0, and the first row with one stays in the flag as 2^31 - 1 - row.
__device__ __forceinline__ void note(int32_t* faults, int64_t row) {
    const int64_t last = 2147483647;
    atomicMax(faults, (int32_t)(last - (row < last ? row : last - 1)));
}

#ifdef __CUDACC__
// 16 bytes past the registers, so that all of a thread's copies are under way at once.
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else  // tests run these kernels on a CPU, a thread at a time
static void copy_16(void* shared, const void* global) { *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global); }
static void wait_for_copies() {}
#endif

template <bool AUGMENTED>
__device__ __forceinline__ void fill(uint8_t* strip, const uint8_t* image, const float* with, int height, int width, int top, int patch) {
    const int bytes = patch * width * 3, first = threadIdx.x, step = blockDim.x;
    if (image == nullptr) {
        for (int i = first; i < bytes; i += step) strip[i] = 0;
    } else if constexpr (AUGMENTED) {
        for (int i = first; i < patch * width; i += step) augmented(image, height, width, with, top + i / width, i % width, strip + 3 * i);
    } else {
        const uint8_t* from = image + (int64_t)top * width * 3;
        if (bytes % 16 == 0 && reinterpret_cast<uint64_t>(from) % 16 == 0) {
            for (int i = first; i < bytes / 16; i += step) copy_16(strip + 16 * i, from + 16 * i);
            wait_for_copies();
        } else {
            for (int i = first; i < bytes; i += step) strip[i] = from[i];
        }
    }
}

template <int KIND, int PATCH, bool AUGMENTED>
__device__ __forceinline__ void gather(const uint8_t* images, const int64_t* index, const float* with, void* out, int32_t* faults, int64_t stored,
                                       int64_t count, int height, int width, int any_patch) {
    extern __shared__ uint4 memory[];
    uint8_t* strip = reinterpret_cast<uint8_t*>(memory);
    const int patch = PATCH ? PATCH : any_patch, values = patch * width * 3, rows = height / patch;
    for (int64_t s = blockIdx.x; s < count * rows; s += gridDim.x) {
        const int64_t k = s / rows, which = index[k];
        const int row = (int)(s - k * rows);
        const bool there = which >= 0 && which < stored;
        if (!there && threadIdx.x == 0) note(faults, k);
        const uint8_t* image = there ? images + which * height * width * 3 : nullptr;
        fill<AUGMENTED>(strip, image, AUGMENTED ? with + k * COLUMNS : nullptr, height, width, row * patch, patch);
        __syncthreads();
        const int64_t start = s * values;
        if constexpr (PATCH && PATCH % 8 == 0) {
            for (int t = threadIdx.x; t < values / 24; t += blockDim.x) {
                const uint2* from = reinterpret_cast<const uint2*>(strip + byte_of_group(t, PATCH, width));
                const uint2 a = from[0], b = from[1], c = from[2];
                const uint32_t words[6] = {a.x, a.y, b.x, b.y, c.x, c.y};
                const int64_t at = start + value_of_group(t, PATCH);
#pragma unroll
                for (int channel = 0; channel < 3; ++channel) {
                    uint32_t levels[8];
#pragma unroll
                    for (int j = 0; j < 8; ++j) levels[j] = level_of_group(words, j, channel);
                    store<KIND>(out, at + channel * PATCH * PATCH, levels);
                }
            }
        } else if (values % 8 == 0) {
            for (int i = 8 * threadIdx.x; i < values; i += 8 * blockDim.x) {
                uint32_t levels[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) levels[j] = strip[byte_of_value(i + j, patch, width)];
                store<KIND>(out, start + i, levels);
            }
        } else {
            for (int i = threadIdx.x; i < values; i += blockDim.x) store_one<KIND>(out, start + i, strip[byte_of_value(i, patch, width)]);
        }
        __syncthreads();
    }
}

#define FASTIDC_PATCHES(NAME, KIND, PATCH)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) patches_##NAME(const uint8_t* images, const int64_t* index, const float* with, void* out, \
                                                                     int32_t* faults, int64_t stored, int64_t count, int64_t height,            \
                                                                     int64_t width, int64_t patch) {                                            \
        gather<KIND, PATCH, false>(images, index, with, out, faults, stored, count, (int)height, (int)width, (int)patch);                       \
    }                                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, 6)                                                                                        \
        patches_augmented_##NAME(const uint8_t* images, const int64_t* index, const float* with, void* out, int32_t* faults, int64_t stored,    \
                                 int64_t count, int64_t height, int64_t width, int64_t patch) {                                                 \
        gather<KIND, PATCH, true>(images, index, with, out, faults, stored, count, (int)height, (int)width, (int)patch);                        \
    }

FASTIDC_PATCHES(bf16_16, BF16, 16)
FASTIDC_PATCHES(bf16_32, BF16, 32)
FASTIDC_PATCHES(bf16_14, BF16, 14)
FASTIDC_PATCHES(bf16_any, BF16, 0)
FASTIDC_PATCHES(fp16_16, FP16, 16)
FASTIDC_PATCHES(fp16_32, FP16, 32)
FASTIDC_PATCHES(fp16_14, FP16, 14)
FASTIDC_PATCHES(fp16_any, FP16, 0)
FASTIDC_PATCHES(fp32_16, FP32, 16)
FASTIDC_PATCHES(fp32_32, FP32, 32)
FASTIDC_PATCHES(fp32_14, FP32, 14)
FASTIDC_PATCHES(fp32_any, FP32, 0)

// ---- squash of pictures [count] of any size to [count, size, size, 3]
//
// Three launches: weights int32 [count, 2, room, size] and spans int32 [count, 2, 2, size] (first, number; columns, then rows), every row of
// every picture squashed to `middle` [rows of all, size, 3], and its columns to `out`. blockIdx.y is the picture.

extern "C" __global__ void __launch_bounds__(256)
    squash_weights(const Picture* pictures, int32_t* weights, int32_t* spans, int64_t count, int64_t size, int64_t room) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count * 2 * size; i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t which = i / size;  // a picture's columns or rows
        const int at = (int)(i - which * size);
        const Picture& picture = pictures[which / 2];
        int first = 0;
        const int length = (int)(which % 2 ? picture.height : picture.width);
        const int taps = weights_of(length, (int)size, at, &first, weights + which * room * size + at, size, (int)room);
        spans[which * 2 * size + at] = first;
        spans[which * 2 * size + size + at] = taps;
    }
}

extern "C" __global__ void __launch_bounds__(256) squash_columns(const Picture* pictures, const int32_t* weights, const int32_t* spans,
                                                                 uint8_t* middle, int64_t count, int64_t size, int64_t room) {
    for (int64_t k = blockIdx.y; k < count; k += gridDim.y) {
        const Picture& picture = pictures[k];
        const uint8_t* pixels = reinterpret_cast<const uint8_t*>(picture.address);
        uint8_t* to = middle + picture.above * size * 3;
        for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < picture.height * size; i += (int64_t)gridDim.x * blockDim.x) {
            const int64_t y = i / size, x = i - y * size;
            const int32_t* span = spans + k * 4 * size + x;
            const uint8_t* from = pixels + y * picture.row + span[0] * picture.column;
            for (int c = 0; c < 3; ++c) {
                to[3 * i + c] = mixed(from + c * picture.channel, picture.column, weights + k * 2 * room * size + x, size, span[size]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) squash_rows(const Picture* pictures, const int32_t* weights, const int32_t* spans,
                                                              const uint8_t* middle, uint8_t* out, int64_t count, int64_t size, int64_t room) {
    for (int64_t k = blockIdx.y; k < count; k += gridDim.y) {
        const Picture& picture = pictures[k];
        const uint8_t* from = middle + picture.above * size * 3;
        for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < size * size * 3; i += (int64_t)gridDim.x * blockDim.x) {
            const int64_t y = i / (3 * size), beside = i - y * 3 * size;
            const int32_t* span = spans + (k * 4 + 2) * size + y;
            const uint8_t* column = from + span[0] * 3 * size + beside;
            const int64_t at = value_of_squashed(picture, y, beside / 3, beside % 3, size);
            out[k * size * size * 3 + at] = mixed(column, 3 * size, weights + (k * 2 + 1) * room * size + y, size, span[size]);
        }
    }
}
