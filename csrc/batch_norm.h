// BatchNorm + residual add + activation + gate on a CPU, forward and backward, for channels that lie side by side.
//
// A tensor is a list of rows of C channels: one row per position of a sample, the samples one after another. Rows may be
// further apart than C, as they are in a slice of the channels of a wider tensor. Each operation goes through its tensors once,
// in chunks of rows that fit in a core's cache. What chunks exist depends on the shape alone and their sums are added in their
// order, so that results are the same bits with any number of threads.
//
// Storage is float32 or bfloat16; arithmetic is float32, sums over chunks are float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// Versions of a function for instruction sets that the loader chooses from, where compiler and loader can do that.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FASTMERGE_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTMERGE_FOR_EACH_CPU
#endif
#define FASTMERGE_INLINE inline __attribute__((always_inline))

namespace fastmerge::batch_norm {

struct BFloat16 {
    std::uint16_t bits;
};

FASTMERGE_INLINE float to_float(float value) { return value; }
FASTMERGE_INLINE float to_float(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

FASTMERGE_INLINE void store_one(float* to, float value) { *to = value; }
FASTMERGE_INLINE void store_one(BFloat16* to, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // to the nearest, ties to even
    to->bits = value != value ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Vectors of so many channels; a size that depends on a template's argument is no constant to the attribute.
template <int lanes>
struct Vectors;
template <>
struct Vectors<16> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef std::int32_t Bits __attribute__((vector_size(64)));
    typedef std::uint32_t Words __attribute__((vector_size(64)));
    typedef std::uint16_t Halves __attribute__((vector_size(32)));
};
template <>
struct Vectors<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef std::int32_t Bits __attribute__((vector_size(32)));
    typedef std::uint32_t Words __attribute__((vector_size(32)));
    typedef std::uint16_t Halves __attribute__((vector_size(16)));
};
template <>
struct Vectors<4> {
    typedef float Floats __attribute__((vector_size(16)));
    typedef std::int32_t Bits __attribute__((vector_size(16)));
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    typedef std::uint16_t Halves __attribute__((vector_size(8)));
};

// What a loop over channels works on: several channels at a time, or one.
template <int lanes>
struct Wide {
    using Floats = typename Vectors<lanes>::Floats;
    using Bits = typename Vectors<lanes>::Bits;
    using Halves = typename Vectors<lanes>::Halves;
    using Value = Floats;
    using Words = typename Vectors<lanes>::Words;

    static FASTMERGE_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
    static FASTMERGE_INLINE void load(Floats& to, const BFloat16* from) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        const Bits bits = __builtin_convertvector(halves, Bits) << 16;
        std::memcpy(&to, &bits, sizeof to);
    }
    static FASTMERGE_INLINE void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }
    static FASTMERGE_INLINE void store(BFloat16* to, const Floats& value) {
        Bits bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits += 0x7fff + ((bits >> 16) & 1);
        bits = value == value ? bits >> 16 : Bits{} + 0x7fc0;
        const Halves halves = __builtin_convertvector(bits, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }
    static FASTMERGE_INLINE void fill(Floats& to, float value) { to = Floats{} + value; }
    static FASTMERGE_INLINE void clear_first(Floats& value, int count) {
        std::memset(&value, 0, static_cast<std::size_t>(count) * sizeof(float));
    }
};

struct Narrow {
    using Value = float;
    using Words = std::uint32_t;

    template <typename T>
    static FASTMERGE_INLINE void load(float& to, const T* from) { to = to_float(*from); }
    template <typename T>
    static FASTMERGE_INLINE void store(T* to, const float& value) { store_one(to, value); }
    static FASTMERGE_INLINE void fill(float& to, float value) { to = value; }
    static FASTMERGE_INLINE void clear_first(float&, int) {}
};

// Activations. apply: z becomes its activation. pass: dz, the gradient with respect to the activation of z, becomes that with
// respect to z. Comparisons let a NaN pass.
struct Identity {
    static constexpr const char* name = "identity";
    template <typename V>
    static FASTMERGE_INLINE void apply(typename V::Value&) {}
    template <typename V>
    static FASTMERGE_INLINE void pass(typename V::Value&, const typename V::Value&) {}
};

struct ReLU {
    static constexpr const char* name = "relu";
    template <typename V>
    static FASTMERGE_INLINE void apply(typename V::Value& z) {
        z = z <= 0.0f ? typename V::Value{} : z;
    }
    template <typename V>
    static FASTMERGE_INLINE void pass(typename V::Value& dz, const typename V::Value& z) {
        dz = z <= 0.0f ? typename V::Value{} : dz;
    }
};

struct ReLU6 {
    static constexpr const char* name = "relu6";
    template <typename V>
    static FASTMERGE_INLINE void apply(typename V::Value& z) {
        const typename V::Value zero{}, six = zero + 6.0f;
        z = z <= 0.0f ? zero : z;
        z = z >= 6.0f ? six : z;
    }
    template <typename V>
    static FASTMERGE_INLINE void pass(typename V::Value& dz, const typename V::Value& z) {
        // Of the same sign as z near 0 and as 6 - z near 6. Two comparisons become one of masks, which GCC takes apart.
        dz = z * (6.0f - z) <= 0.0f ? typename V::Value{} : dz;
    }
};

// 1 / (1 + exp(-z)) to a few units in the last place: exp(x) = 2^n · exp(r) with |r| ≤ ln(2) / 2, and a polynomial for exp(r).
template <typename V>
FASTMERGE_INLINE void sigmoid(typename V::Value& of, const typename V::Value& z) {
    using Value = typename V::Value;
    const Value least = Value{} - 87.0f, most = Value{} + 87.0f;  // beyond, float32 ends
    Value x = -z;
    x = x < -87.0f ? least : x;
    x = x > 87.0f ? most : x;
    // Adding 1.5 · 2^23 rounds to an integer, which stands in the lowest bits.
    constexpr float rounding = 12582912.0f;
    const Value shifted = x * 1.44269504f + rounding, n = shifted - rounding;
    const Value r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Value p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    typename V::Words bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127u << 23);
    Value power;
    std::memcpy(&power, &bits, sizeof power);
    of = 1.0f / (1.0f + p * power);
}

struct SiLU {
    static constexpr const char* name = "silu";
    template <typename V>
    static FASTMERGE_INLINE void apply(typename V::Value& z) {
        typename V::Value share;
        sigmoid<V>(share, z);
        z *= share;
    }
    template <typename V>
    static FASTMERGE_INLINE void pass(typename V::Value& dz, const typename V::Value& z) {
        typename V::Value share;
        sigmoid<V>(share, z);
        dz *= share * (1.0f + z * (1.0f - share));
    }
};

struct Hardswish {
    static constexpr const char* name = "hardswish";
    template <typename V>
    static FASTMERGE_INLINE void apply(typename V::Value& z) {
        const typename V::Value zero{}, six = zero + 6.0f;
        typename V::Value share = z + 3.0f;
        share = share <= 0.0f ? zero : share;
        share = share >= 6.0f ? six : share;
        z *= share * (1.0f / 6.0f);
    }
    template <typename V>
    static FASTMERGE_INLINE void pass(typename V::Value& dz, const typename V::Value& z) {
        const typename V::Value zero{};
        dz = z < 3.0f ? dz * (z * (1.0f / 3.0f) + 0.5f) : dz;
        dz = z <= -3.0f ? zero : dz;
    }
};

template <typename... Members>
struct Kinds {};
using Activations = Kinds<Identity, ReLU, ReLU6, SiLU, Hardswish>;

template <typename T>
struct Rows {
    T* data = nullptr;  // null: there are none
    std::int64_t stride = 0;

    explicit operator bool() const { return data != nullptr; }
    FASTMERGE_INLINE T* at(std::int64_t row, std::int64_t channel) const { return data + row * stride + channel; }
};

// Rows of all tensors of a call, cut into chunks: several samples, or a part of one.
struct Chunks {
    std::int64_t samples, positions, channels;
    std::int64_t samples_each = 1;  // whole samples in a chunk
    std::int64_t parts = 1;         // chunks in a sample

    Chunks(std::int64_t samples_, std::int64_t positions_, std::int64_t channels_)
        : samples(samples_), positions(positions_), channels(channels_) {
        constexpr std::int64_t elements = 1 << 14;  // of one tensor: 64 KiB, and two or three tensors fit in a core's L2
        const std::int64_t rows = std::max<std::int64_t>(1, elements / std::max<std::int64_t>(1, channels));
        samples_each = std::max<std::int64_t>(1, rows / std::max<std::int64_t>(1, positions));
        parts = std::max<std::int64_t>(1, (positions + rows - 1) / rows);
    }
    std::int64_t rows() const { return samples * positions; }
    std::int64_t count() const { return parts > 1 ? samples * parts : (samples + samples_each - 1) / samples_each; }
    std::int64_t first_sample(std::int64_t chunk) const { return parts > 1 ? chunk / parts : chunk * samples_each; }
    std::int64_t last_sample(std::int64_t chunk) const {
        return parts > 1 ? chunk / parts + 1 : std::min(samples, (chunk + 1) * samples_each);
    }
    // Positions of its samples, the same for all of them.
    std::int64_t first_position(std::int64_t chunk) const { return parts > 1 ? chunk % parts * positions / parts : 0; }
    std::int64_t last_position(std::int64_t chunk) const {
        return parts > 1 ? (chunk % parts + 1) * positions / parts : positions;
    }
    std::int64_t rows_of(std::int64_t chunk) const {
        return (last_sample(chunk) - first_sample(chunk)) * (last_position(chunk) - first_position(chunk));
    }
};

// Runs work(chunk) for each chunk, on OpenMP's threads, which are torch's own.
template <typename Work>
inline void for_each_chunk(const Chunks& chunks, std::int64_t threads, const Work& work) {
    const std::int64_t count = chunks.count();
    [[maybe_unused]] const int team = static_cast<int>(std::max<std::int64_t>(1, std::min(threads, count)));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (std::int64_t chunk = 0; chunk < count; ++chunk) work(chunk);
}

// Covers all channels by vectors of so many, or does nothing where there are fewer. The last vector ends with the last channel
// and repeats what the one before it did.
template <int lanes, typename Work>
FASTMERGE_INLINE bool cover(std::int64_t channels, const Work& work) {
    if (channels < lanes) return false;
    std::int64_t channel = 0;
    for (; channel + lanes <= channels; channel += lanes) work(Wide<lanes>{}, channel, 0);
    if (channel < channels) work(Wide<lanes>{}, channels - lanes, lanes - static_cast<int>(channels - channel));
    return true;
}

// Calls work(tag, channel, repeated) for all channels: the first `repeated` of a vector were in another call already. Several
// passes over narrow slices of the rows cost more than a vector's last lanes for nothing.
template <typename Work>
FASTMERGE_INLINE void for_each_channel(std::int64_t channels, const Work& work) {
    if (cover<16>(channels, work) || cover<8>(channels, work) || cover<4>(channels, work)) return;
    for (std::int64_t channel = 0; channel < channels; ++channel) work(Narrow{}, channel, 0);
}

// Mean and sum of squared distances from it, of the rows of one chunk.
template <typename T>
FASTMERGE_FOR_EACH_CPU void chunk_statistics(const Chunks& chunks, std::int64_t chunk, Rows<const T> x, float* mean, float* m2) {
    // The samples of a chunk follow one another, and so do the positions of a part of one.
    const std::int64_t first = chunks.first_sample(chunk) * chunks.positions + chunks.first_position(chunk);
    const std::int64_t count = chunks.rows_of(chunk);
    for_each_channel(chunks.channels, [&](auto tag, std::int64_t c, int) __attribute__((always_inline)) {
        using V = decltype(tag);
        typename V::Value sums[4], value, distance, centre;
        for (auto& sum : sums) V::fill(sum, 0.0f);
        std::int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            for (int k = 0; k < 4; ++k) {
                V::load(value, x.at(first + i + k, c));
                sums[k] += value;
            }
        }
        for (; i < count; ++i) {
            V::load(value, x.at(first + i, c));
            sums[0] += value;
        }
        centre = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(count);
        V::store(mean + c, centre);
        for (auto& sum : sums) V::fill(sum, 0.0f);
        for (i = 0; i + 4 <= count; i += 4) {
            for (int k = 0; k < 4; ++k) {
                V::load(value, x.at(first + i + k, c));
                distance = value - centre;
                sums[k] += distance * distance;
            }
        }
        for (; i < count; ++i) {
            V::load(value, x.at(first + i, c));
            distance = value - centre;
            sums[0] += distance * distance;
        }
        V::store(m2 + c, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
}

// Mean and biased variance of each channel; chunks are merged by Chan's formula.
template <typename T>
void statistics(const Chunks& chunks, Rows<const T> x, float* mean, float* var, std::int64_t threads) {
    const std::int64_t channels = chunks.channels, count = chunks.count();
    std::vector<float> partial(static_cast<std::size_t>(2 * count * channels));
    for_each_chunk(chunks, threads, [&](std::int64_t chunk) {
        float* own = partial.data() + 2 * chunk * channels;
        chunk_statistics<T>(chunks, chunk, x, own, own + channels);
    });
    for (std::int64_t c = 0; c < channels; ++c) {
        double total = 0, centre = 0, m2 = 0;
        for (std::int64_t chunk = 0; chunk < count; ++chunk) {
            const double rows = static_cast<double>(chunks.rows_of(chunk));
            const double distance = partial[static_cast<std::size_t>(2 * chunk * channels + c)] - centre;
            total += rows;
            centre += distance * rows / total;
            m2 += partial[static_cast<std::size_t>((2 * chunk + 1) * channels + c)] + distance * distance * rows * (total - rows) / total;
        }
        mean[c] = static_cast<float>(centre);
        var[c] = static_cast<float>(m2 / total);
    }
}

// Moves running statistics towards new ones; null: there are none.
inline void update(float* running, const float* found, std::int64_t channels, double momentum, double factor) {
    if (!running) return;
    for (std::int64_t c = 0; c < channels; ++c) {
        running[c] = static_cast<float>((1.0 - momentum) * static_cast<double>(running[c]) +
                                        momentum * factor * static_cast<double>(found[c]));
    }
}

// What each channel is multiplied by and what is added: y = (x - mean) * scale + bias.
struct Affine {
    const float* mean;
    std::vector<float> scale, bias, rstd;

    Affine(std::int64_t channels, const float* mean_, const float* var, const float* weight, const float* bias_, float eps)
        : mean(mean_), scale(static_cast<std::size_t>(channels)), bias(scale.size()), rstd(scale.size()) {
        for (std::size_t c = 0; c < scale.size(); ++c) {
            rstd[c] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(var[c]) + static_cast<double>(eps)));
            scale[c] = rstd[c] * (weight ? weight[c] : 1.0f);
            bias[c] = bias_ ? bias_[c] : 0.0f;
        }
    }
};

// One row of gates per sample, or one for all of them (stride 0).
using Gates = Rows<const float>;

template <typename Activation, typename T>
FASTMERGE_FOR_EACH_CPU void chunk_normalize(const Chunks& chunks, std::int64_t chunk, Rows<const T> x, const Affine& affine,
                                            Rows<const T> residual, Gates gates, Rows<T> y) {
    const std::int64_t first = chunks.first_position(chunk), last = chunks.last_position(chunk);
    for (std::int64_t sample = chunks.first_sample(chunk); sample < chunks.last_sample(chunk); ++sample) {
        for_each_channel(chunks.channels, [&](auto tag, std::int64_t c, int) __attribute__((always_inline)) {
            using V = decltype(tag);
            typename V::Value mean, scale, bias, gate, value, more;
            V::load(mean, affine.mean + c);
            V::load(scale, affine.scale.data() + c);
            V::load(bias, affine.bias.data() + c);
            V::fill(gate, 1.0f);
            if (gates) V::load(gate, gates.at(sample, c));
            for (std::int64_t row = sample * chunks.positions + first; row < sample * chunks.positions + last; ++row) {
                V::load(value, x.at(row, c));
                // Distances first: x times scale, far from 0, would lose the digits that the mean takes away.
                value = (value - mean) * scale + bias;
                if (residual) {
                    V::load(more, residual.at(row, c));
                    value += more;
                }
                Activation::template apply<V>(value);
                V::store(y.at(row, c), value * gate);
            }
        });
    }
}

// What goes into the backward pass, and what comes out where it is wanted.
template <typename T>
struct Backward {
    Rows<const T> dy, more, x, residual;  // more: what is to be added to dy
    Gates gates;
    bool training;
    Rows<T> dx, dresidual;
    float* dweight;
    float* dbias;
    Rows<float> dgates;
};

// Sums over a chunk of dz and of dz (x - mean), z being what the activation reads; per sample of dy · act(z).
template <typename Activation, typename T>
FASTMERGE_FOR_EACH_CPU void chunk_sums(const Chunks& chunks, std::int64_t chunk, const Backward<T>& call, const Affine& affine,
                                       float* sums, float* products, float* of_gates) {
    const std::int64_t first = chunks.first_position(chunk), last = chunks.last_position(chunk);
    std::fill(sums, sums + chunks.channels, 0.0f);
    std::fill(products, products + chunks.channels, 0.0f);
    for (std::int64_t sample = chunks.first_sample(chunk); sample < chunks.last_sample(chunk); ++sample) {
        for_each_channel(chunks.channels, [&](auto tag, std::int64_t c, int repeated) __attribute__((always_inline)) {
            using V = decltype(tag);
            typename V::Value mean, scale, bias, gate, dy, distance, z, more, sum, product, of_gate;
            V::load(mean, affine.mean + c);
            V::load(scale, affine.scale.data() + c);
            V::load(bias, affine.bias.data() + c);
            V::fill(gate, 1.0f);
            if (call.gates) V::load(gate, call.gates.at(sample, c));
            V::fill(sum, 0.0f);
            V::fill(product, 0.0f);
            V::fill(of_gate, 0.0f);
            for (std::int64_t row = sample * chunks.positions + first; row < sample * chunks.positions + last; ++row) {
                V::load(dy, call.dy.at(row, c));
                if (call.more) {
                    V::load(more, call.more.at(row, c));
                    dy += more;
                }
                V::load(distance, call.x.at(row, c));
                distance -= mean;
                z = distance * scale + bias;
                if (call.residual) {
                    V::load(more, call.residual.at(row, c));
                    z += more;
                }
                if (of_gates) {
                    more = z;
                    Activation::template apply<V>(more);
                    of_gate += dy * more;
                }
                Activation::template pass<V>(dy, z);
                dy *= gate;
                if (call.dresidual) {
                    // What the second pass will read is summed, rounded as it is.
                    V::store(call.dresidual.at(row, c), dy);
                    V::load(dy, call.dresidual.at(row, c));
                }
                sum += dy;
                product += dy * distance;
            }
            if (of_gates) V::store(of_gates + (sample - chunks.first_sample(chunk)) * chunks.channels + c, of_gate);
            V::clear_first(sum, repeated);
            V::clear_first(product, repeated);
            typename V::Value before;
            V::load(before, sums + c);
            V::store(sums + c, before + sum);
            V::load(before, products + c);
            V::store(products + c, before + product);
        });
    }
}

// dx of a chunk: scale · (dz - offset - (x - mean) · slope). Where the residual's gradient was written, it is dz.
template <typename Activation, typename T>
FASTMERGE_FOR_EACH_CPU void chunk_dx(const Chunks& chunks, std::int64_t chunk, const Backward<T>& call, const Affine& affine,
                                     const float* offset, const float* slope) {
    const std::int64_t first = chunks.first_position(chunk), last = chunks.last_position(chunk);
    for (std::int64_t sample = chunks.first_sample(chunk); sample < chunks.last_sample(chunk); ++sample) {
        for_each_channel(chunks.channels, [&](auto tag, std::int64_t c, int) __attribute__((always_inline)) {
            using V = decltype(tag);
            typename V::Value mean, scale, bias, gate, dy, distance, z, more, shift, tilt;
            V::load(mean, affine.mean + c);
            V::load(scale, affine.scale.data() + c);
            V::load(bias, affine.bias.data() + c);
            V::load(shift, offset + c);
            V::load(tilt, slope + c);
            V::fill(gate, 1.0f);
            if (call.gates) V::load(gate, call.gates.at(sample, c));
            for (std::int64_t row = sample * chunks.positions + first; row < sample * chunks.positions + last; ++row) {
                V::load(distance, call.x.at(row, c));
                distance -= mean;
                if (call.dresidual) {
                    V::load(dy, call.dresidual.at(row, c));
                    V::store(call.dx.at(row, c), scale * (dy - shift - distance * tilt));
                    continue;
                }
                V::load(dy, call.dy.at(row, c));
                if (call.more) {
                    V::load(more, call.more.at(row, c));
                    dy += more;
                }
                if constexpr (!std::is_same_v<Activation, Identity>) {
                    z = distance * scale + bias;
                    if (call.residual) {
                        V::load(more, call.residual.at(row, c));
                        z += more;
                    }
                    Activation::template pass<V>(dy, z);
                }
                V::store(call.dx.at(row, c), scale * (dy * gate - shift - distance * tilt));
            }
        });
    }
}

template <typename Activation, typename T>
void normalize(const Chunks& chunks, Rows<const T> x, const Affine& affine, Rows<const T> residual, Gates gates, Rows<T> y,
               std::int64_t threads) {
    for_each_chunk(chunks, threads, [&](std::int64_t chunk) {
        chunk_normalize<Activation, T>(chunks, chunk, x, affine, residual, gates, y);
    });
}

template <typename Activation, typename T>
void backward(const Chunks& chunks, const Backward<T>& call, const Affine& affine, std::int64_t threads) {
    const std::int64_t channels = chunks.channels, count = chunks.count();
    std::vector<float> offset(static_cast<std::size_t>(channels)), slope(offset.size());
    if (call.training || call.dweight || call.dbias || call.dgates || call.dresidual) {
        std::vector<float> partial(static_cast<std::size_t>(2 * count * channels));
        // Of each sample, or of each part of one.
        std::vector<float> of_gates(call.dgates ? static_cast<std::size_t>(chunks.samples * chunks.parts * channels) : 0);
        for_each_chunk(chunks, threads, [&](std::int64_t chunk) {
            float* own = partial.data() + 2 * chunk * channels;
            const std::int64_t first = chunks.parts > 1 ? chunk : chunks.first_sample(chunk);
            float* gates = call.dgates ? of_gates.data() + first * channels : nullptr;
            chunk_sums<Activation, T>(chunks, chunk, call, affine, own, own + channels, gates);
        });
        for (std::int64_t c = 0; c < channels; ++c) {
            double sum = 0, product = 0;
            for (std::int64_t chunk = 0; chunk < count; ++chunk) {
                sum += partial[static_cast<std::size_t>(2 * chunk * channels + c)];
                product += partial[static_cast<std::size_t>((2 * chunk + 1) * channels + c)];
            }
            const std::size_t i = static_cast<std::size_t>(c);
            if (call.dbias) call.dbias[c] = static_cast<float>(sum);
            if (call.dweight) call.dweight[c] = static_cast<float>(product * static_cast<double>(affine.rstd[i]));
            if (call.training) {
                const double rows = static_cast<double>(chunks.rows()), rstd = static_cast<double>(affine.rstd[i]);
                offset[i] = static_cast<float>(sum / rows);
                slope[i] = static_cast<float>(product / rows * rstd * rstd);
            }
        }
        if (call.dgates) {
            const bool shared = call.gates.stride == 0;
            const std::int64_t each = shared ? chunks.samples * chunks.parts : chunks.parts;
            for (std::int64_t row = 0; row < (shared ? 1 : chunks.samples); ++row) {
                for (std::int64_t c = 0; c < channels; ++c) {
                    double sum = 0;
                    for (std::int64_t part = 0; part < each; ++part) {
                        sum += of_gates[static_cast<std::size_t>((row * each + part) * channels + c)];
                    }
                    *call.dgates.at(row, c) = static_cast<float>(sum);
                }
            }
        }
    }
    if (call.dx) {
        for_each_chunk(chunks, threads, [&](std::int64_t chunk) {
            chunk_dx<Activation, T>(chunks, chunk, call, affine, offset.data(), slope.data());
        });
    }
}

}  // namespace fastmerge::batch_norm
