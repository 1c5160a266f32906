// patches.cuh in plain loops, for tests on machines without a GPU. Built by CMakeLists.txt, or by
// g++ -O1 -ffp-contract=off -shared -fPIC -o libfastidc_patches.so patches_host.cpp
#include "patches.cuh"

#include <vector>

template <int KIND>
static void put(void* out, int64_t at, uint32_t level) {
    if (KIND == FP32) {
        static_cast<float*>(out)[at] = (float)level;
    } else {
        static_cast<uint16_t*>(out)[at] = (uint16_t)half_of<KIND>(level);
    }
}

// One strip of bytes as values, in groups of eight pixels where the kernel takes them so.
template <int KIND>
static void write(const uint8_t* strip, void* out, int64_t start, int patch, int width) {
    const int values = patch * width * 3;
    if (patch % 8) {
        for (int i = 0; i < values; ++i) put<KIND>(out, start + i, strip[byte_of_value(i, patch, width)]);
        return;
    }
    for (int t = 0; t < values / 24; ++t) {
        const uint8_t* from = strip + byte_of_group(t, patch, width);
        uint32_t words[6] = {};
        for (int b = 0; b < 24; ++b) words[b / 4] |= (uint32_t)from[b] << 8 * (b % 4);
        for (int channel = 0; channel < 3; ++channel) {
            for (int j = 0; j < 8; ++j) {
                put<KIND>(out, start + value_of_group(t, patch) + channel * patch * patch + j, level_of_group(words, j, channel));
            }
        }
    }
}

extern "C" void patches(const uint8_t* images, const int64_t* index, const float* with, void* out, int32_t* faults, int64_t stored, int64_t count,
                        int64_t height, int64_t width, int64_t patch, int64_t kind) {
    std::vector<uint8_t> strip(patch * width * 3);
    const int64_t rows = height / patch;
    for (int64_t s = 0; s < count * rows; ++s) {
        const int64_t k = s / rows, which = index[k], top = s % rows * patch;
        const bool there = which >= 0 && which < stored;
        if (!there && *faults < 2147483647 - k) *faults = (int32_t)(2147483647 - k);
        const uint8_t* image = there ? images + which * height * width * 3 : nullptr;
        for (int64_t i = 0; i < patch * width; ++i) {
            uint8_t* to = strip.data() + 3 * i;
            if (!there) {
                to[0] = to[1] = to[2] = 0;
            } else if (with) {
                augmented(image, (int)height, (int)width, with + k * COLUMNS, (int)(top + i / width), (int)(i % width), to);
            } else {
                for (int c = 0; c < 3; ++c) to[c] = image[(top * width + i) * 3 + c];
            }
        }
        const int64_t start = s * patch * width * 3;
        if (kind == BF16) write<BF16>(strip.data(), out, start, (int)patch, (int)width);
        if (kind == FP16) write<FP16>(strip.data(), out, start, (int)patch, (int)width);
        if (kind == FP32) write<FP32>(strip.data(), out, start, (int)patch, (int)width);
    }
}

extern "C" void squash(const Picture* pictures, uint8_t* out, int64_t count, int64_t size, int64_t room) {
    std::vector<int32_t> weights(room);
    for (int64_t k = 0; k < count; ++k) {
        const Picture& picture = pictures[k];
        const uint8_t* pixels = reinterpret_cast<const uint8_t*>(picture.address);
        std::vector<uint8_t> middle(picture.height * size * 3);
        for (int64_t x = 0; x < size; ++x) {
            int first = 0;
            const int taps = weights_of((int)picture.width, (int)size, (int)x, &first, weights.data(), 1, (int)room);
            for (int64_t y = 0; y < picture.height; ++y) {
                const uint8_t* from = pixels + y * picture.row + first * picture.column;
                for (int c = 0; c < 3; ++c) {
                    middle[(y * size + x) * 3 + c] = mixed(from + c * picture.channel, picture.column, weights.data(), 1, taps);
                }
            }
        }
        for (int64_t y = 0; y < size; ++y) {
            int first = 0;
            const int taps = weights_of((int)picture.height, (int)size, (int)y, &first, weights.data(), 1, (int)room);
            for (int64_t i = 0; i < size * 3; ++i) {
                const int64_t at = value_of_squashed(picture, y, i / 3, i % 3, size);
                out[k * size * size * 3 + at] = mixed(middle.data() + first * size * 3 + i, size * 3, weights.data(), 1, taps);
            }
        }
    }
}
