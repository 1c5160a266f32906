// The arithmetic of the patch gather, of its augmentation and of the squash, an element at a time.
//
// nvcc, NVRTC and g++ compile it alike: with products and sums never fused (-fmad=false, -ffp-contract=off) all three give the same bits,
// and fastidc/reference states them in torch. Little-endian machines only.
#pragma once

#ifdef __CUDACC_RTC__  // brings no headers of a system
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <stdint.h>
#endif

#ifdef __CUDACC__
#define FASTIDC_BOTH __host__ __device__ __forceinline__
#else
#define FASTIDC_BOTH static inline
#endif

// ---- what is written: 0..255 in bf16, fp16 or fp32, exactly

enum Kind { BF16 = 0, FP16 = 1, FP32 = 2 };

FASTIDC_BOTH uint32_t bits_of(float x) {
    union {
        float number;
        uint32_t bits;
    } same = {x};
    return same.bits;
}

FASTIDC_BOTH uint32_t bf16_of(uint32_t level) { return bits_of((float)level) >> 16; }  // eight significant bits, as a level has

FASTIDC_BOTH uint32_t fp16_of(uint32_t level) {
    return level ? (bits_of((float)level) >> 13) - ((127 - 15) << 10) : 0;  // fp32's exponent is biased by 127, fp16's by 15
}

template <int KIND>
FASTIDC_BOTH uint32_t half_of(uint32_t level) {
    return KIND == BF16 ? bf16_of(level) : fp16_of(level);
}

// ---- where it stands
//
// A strip is a row of patches: `patch` rows of an image, [patch, width, 3] bytes side by side in memory. Its patches [width / patch, 3, patch,
// patch] lie side by side as well, so a strip is read and written whole.

// The byte of a strip that is its value number i.
FASTIDC_BOTH int byte_of_value(int i, int patch, int width) {
    const int column = i % patch, row = i / patch % patch, channel = i / (patch * patch) % 3, which = i / (3 * patch * patch);
    return (row * width + which * patch + column) * 3 + channel;
}

// Where `patch` is a multiple of 8: group number t of a strip, 8 pixels side by side in one patch. Its first byte, and the first of its eight
// values of channel 0; those of the next channel stand patch * patch further.
FASTIDC_BOTH int byte_of_group(int t, int patch, int width) {
    const int across = patch / 8, column = t % across * 8, row = t / across % patch, which = t / (across * patch);
    return (row * width + which * patch + column) * 3;
}

FASTIDC_BOTH int value_of_group(int t, int patch) {
    const int across = patch / 8, column = t % across * 8, row = t / across % patch, which = t / (across * patch);
    return which * 3 * patch * patch + row * patch + column;
}

// Channel `channel` of pixel j of eight, which are six words.
FASTIDC_BOTH uint32_t level_of_group(const uint32_t* words, int j, int channel) {
    const int byte = 3 * j + channel;
    return words[byte / 4] >> 8 * (byte % 4) & 255;
}

// ---- augmentation: one image's parameters, fp32, in the order of fastidc.reference.patches.COLUMNS

enum Column {
    TOP, LEFT, HEIGHT, WIDTH,  // the part that fills the image, in pixels
    BRIGHTNESS, CONTRAST, SATURATION,  // factors; 1 changes nothing
    NOISE,  // standard deviation in levels
    KEY_LOW, KEY_HIGH,  // of the noise, 24 bits each
    ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH, FILL,  // what is erased, and the level that it becomes
    COLUMNS
};

// Where output pixel i of `size` lies in the image, between 0 and size - 1; NaN lies at 0.
FASTIDC_BOTH float place_of(int i, float start, float length, int size) {
    const float at = start + ((float)i + 0.5f) * (length / (float)size) - 0.5f, last = (float)(size - 1);
    return at > 0.0f ? (at < last ? at : last) : 0.0f;
}

// Philox-4x32-10 of (place, 0, 0, 0), its eight 16-bit halves added up, less their mean. A sum of eight uniforms is Gaussian but for its tails,
// which end at 4.9 standard deviations, and it is the same integer everywhere.
FASTIDC_BOTH int noise_of(uint32_t place, uint32_t low, uint32_t high) {
    uint32_t a = place, b = 0, c = 0, d = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = (uint64_t)0xD2511F53u * a, second = (uint64_t)0xCD9E8D57u * c;
        a = (uint32_t)(second >> 32) ^ b ^ low;
        c = (uint32_t)(first >> 32) ^ d ^ high;
        b = (uint32_t)second;
        d = (uint32_t)first;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    const uint32_t sum = (a & 65535) + (a >> 16) + (b & 65535) + (b >> 16) + (c & 65535) + (c >> 16) + (d & 65535) + (d >> 16);
    return (int)sum - 262140;
}

// Pixel (y, x) of the augmented image: cut and stretched bilinearly, brightness, contrast about 127.5, saturation, noise, rounded, erased.
FASTIDC_BOTH void augmented(const uint8_t* image, int height, int width, const float* with, int y, int x, uint8_t* out) {
    const float down = (float)y - with[ERASE_TOP], across = (float)x - with[ERASE_LEFT];
    if (down >= 0.0f && down < with[ERASE_HEIGHT] && across >= 0.0f && across < with[ERASE_WIDTH]) {
        out[0] = out[1] = out[2] = (uint8_t)with[FILL];
        return;
    }
    const float v = place_of(y, with[TOP], with[HEIGHT], height), u = place_of(x, with[LEFT], with[WIDTH], width);
    const int y0 = (int)v, x0 = (int)u, y1 = y0 + 1 < height ? y0 + 1 : y0, x1 = x0 + 1 < width ? x0 + 1 : x0;
    const float below = v - (float)y0, beside = u - (float)x0;
    float colour[3];
    for (int c = 0; c < 3; ++c) {
        const float a = image[(y0 * width + x0) * 3 + c], b = image[(y0 * width + x1) * 3 + c];
        const float d = image[(y1 * width + x0) * 3 + c], e = image[(y1 * width + x1) * 3 + c];
        const float upper = a + beside * (b - a), lower = d + beside * (e - d);
        colour[c] = with[CONTRAST] * (with[BRIGHTNESS] * (upper + below * (lower - upper)) - 127.5f) + 127.5f;
    }
    const float grey = 0.299f * colour[0] + 0.587f * colour[1] + 0.114f * colour[2];
    const float noise = with[NOISE] / 53510.62f;  // the standard deviation of noise_of
    for (int c = 0; c < 3; ++c) {
        float level = grey + with[SATURATION] * (colour[c] - grey);
        if (noise > 0.0f) level += noise * (float)noise_of((uint32_t)((y * width + x) * 3 + c), (uint32_t)with[KEY_LOW], (uint32_t)with[KEY_HIGH]);
        out[c] = (uint8_t)((level > 0.0f ? (level < 255.0f ? level : 255.0f) : 0.0f) + 0.5f);
    }
}

// ---- squash: antialiased bicubic in fixed point, as Pillow resizes, one axis after the other

enum { FIXED_BITS = 32 - 8 - 2 };

// How much wider than a pixel of the input the filter is.
FASTIDC_BOTH double stretch_of(int in, int out) { return (double)in / out < 1.0 ? 1.0 : (double)in / out; }

// The input pixels that output pixel i reads: the first, and how many.
FASTIDC_BOTH int taps_of(int in, int out, int i, int* first) {
    const double centre = (i + 0.5) * ((double)in / out), support = 2.0 * stretch_of(in, out);
    const int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
    *first = from < 0 ? 0 : from;
    return (to > in ? in : to) - *first;
}

// The cubic with a = -0.5, at input pixel `at` as output pixel i sees it; not normalised.
FASTIDC_BOTH double cubic_of(int in, int out, int i, int at) {
    double x = (at - (i + 0.5) * ((double)in / out) + 0.5) * (1.0 / stretch_of(in, out));
    x = x < 0.0 ? -x : x;
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

FASTIDC_BOTH int32_t fixed_of(double weight) {
    return (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << FIXED_BITS));
}

// Output pixel i's weights, every `stride` one place further; what is left of `room` places is 0. Gives the first pixel and their number.
FASTIDC_BOTH int weights_of(int in, int out, int i, int* first, int32_t* weights, int64_t stride, int room) {
    const int taps = taps_of(in, out, i, first);
    double sum = 0.0;
    for (int x = 0; x < taps; ++x) sum += cubic_of(in, out, i, *first + x);
    for (int x = 0; x < room; ++x) {
        weights[x * stride] = x < taps ? fixed_of(sum != 0.0 ? cubic_of(in, out, i, *first + x) / sum : 0.0) : 0;
    }
    return taps;
}

// The weighted sum of `taps` bytes that stand `step` apart.
FASTIDC_BOTH uint8_t mixed(const uint8_t* from, int64_t step, const int32_t* weights, int64_t stride, int taps) {
    int32_t sum = 1 << (FIXED_BITS - 1);
    for (int x = 0; x < taps; ++x) sum += from[x * step] * weights[x * stride];
    sum >>= FIXED_BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

// An image to squash, as the host writes it: eight int64. One whose rows go first is described, and squashed, turned about its diagonal.
struct Picture {
    int64_t address, row, column, channel;  // of its first byte; bytes from a row, a column, a channel to the next
    int64_t height, width;
    int64_t above;  // rows of all images before it
    int64_t turned;  // whether it is to be turned back
};

// Where value `channel` of output pixel (y, x) goes.
FASTIDC_BOTH int64_t value_of_squashed(const Picture& picture, int64_t y, int64_t x, int64_t channel, int64_t size) {
    return (picture.turned ? x * size + y : y * size + x) * 3 + channel;
}
