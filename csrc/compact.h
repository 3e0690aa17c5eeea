// Compaction of a strided tensor in its own memory.
//
// Along every dimension some indices stay. What stays moves, in the order of memory, to the front of the tensor's memory and
// lies there densely, in the same order of dimensions. Sorted and unique indices make destination <= source for every element,
// and both grow together, so going forward never overwrites what is still to be read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace fastmerge {

using Indices = std::vector<std::int64_t>;

// One dimension, the largest stride first. Strides are in bytes.
struct Axis {
    std::int64_t size = 0;
    std::int64_t source_stride = 0;
    std::int64_t target_stride = 0;
    const Indices* keep = nullptr;  // null: every index stays

    std::int64_t kept() const { return keep ? static_cast<std::int64_t>(keep->size()) : size; }
    std::int64_t source(std::int64_t i) const { return keep ? (*keep)[static_cast<std::size_t>(i)] : i; }
};

struct Plan {
    std::vector<Axis> axes;
    std::int64_t run = 1;   // bytes that lie side by side in source and target, below the last axis
    std::int64_t kept = 1;  // elements that stay
};

inline void check_keep(const Indices& keep, std::int64_t size, std::size_t dim) {
    for (std::size_t i = 0; i < keep.size(); ++i) {
        if (keep[i] < 0 || keep[i] >= size) {
            throw std::out_of_range("compact needs indices in [0, " + std::to_string(size) + ") for dimension " +
                                    std::to_string(dim) + "; position " + std::to_string(i) + " has " + std::to_string(keep[i]));
        }
        if (i > 0 && keep[i] <= keep[i - 1]) {
            throw std::invalid_argument("compact needs sorted, unique indices for dimension " + std::to_string(dim) + "; " +
                                        std::to_string(keep[i - 1]) + " is followed by " + std::to_string(keep[i]));
        }
    }
}

inline std::int64_t times(std::int64_t a, std::int64_t b) {
    std::int64_t product = 0;
    if (__builtin_mul_overflow(a, b, &product)) throw std::invalid_argument("compact needs sizes and strides that fit into memory");
    return product;
}

// Checks everything that memory safety hangs on and orders the dimensions as they lie in memory.
// Throws std::invalid_argument or std::out_of_range; the plan points into `keeps`.
inline Plan make_plan(std::int64_t itemsize, const Indices& shape, const Indices& strides,
                      const std::vector<std::optional<Indices>>& keeps) {
    if (itemsize <= 0) throw std::invalid_argument("compact needs a positive itemsize");
    if (shape.size() != strides.size() || shape.size() != keeps.size()) {
        throw std::invalid_argument("compact needs one stride and one keep per dimension");
    }
    Plan plan;
    plan.run = itemsize;
    for (std::size_t d = 0; d < shape.size(); ++d) {
        if (shape[d] < 0) throw std::invalid_argument("compact needs sizes of 0 or more");
        if (keeps[d]) check_keep(*keeps[d], shape[d], d);
        plan.kept = times(plan.kept, keeps[d] ? static_cast<std::int64_t>(keeps[d]->size()) : shape[d]);
        if (shape[d] == 1) continue;  // its stride means nothing; whether it stays, plan.kept knows
        plan.axes.push_back({shape[d], times(strides[d], itemsize), 0, keeps[d] ? &*keeps[d] : nullptr});
    }
    if (plan.kept == 0) return plan;
    std::stable_sort(plan.axes.begin(), plan.axes.end(),
                     [](const Axis& a, const Axis& b) { return a.source_stride > b.source_stride; });
    std::int64_t extent = itemsize;  // bytes spanned by the dimensions inside this one
    std::int64_t dense = itemsize;
    for (auto axis = plan.axes.rbegin(); axis != plan.axes.rend(); ++axis) {
        if (axis->source_stride < extent) {
            throw std::invalid_argument("compact needs a tensor whose elements do not overlap in memory");
        }
        extent = times(axis->source_stride, axis->size);
        axis->target_stride = dense;
        dense *= axis->kept();
    }
    while (!plan.axes.empty() && !plan.axes.back().keep && plan.axes.back().source_stride == plan.run) {
        plan.run *= plan.axes.back().size;
        plan.axes.pop_back();
    }
    return plan;
}

// Moves runs of a size that the compiler knows: one load and one store each, where memmove would be a call.
template <std::size_t size>
void move_small_runs(const Axis& axis, std::int64_t first, std::int64_t last, const std::byte* source, std::byte* target) {
    for (std::int64_t i = first; i < last; ++i) {
        std::byte run[size];  // source and target may overlap
        std::memcpy(run, source + axis.source(i) * axis.source_stride, size);
        std::memcpy(target + i * axis.target_stride, run, size);
    }
}

// Moves runs of any size, neighbours that stay as one.
inline void move_runs(const Axis& axis, std::int64_t run, std::int64_t first, std::int64_t last, const std::byte* source,
                      std::byte* target) {
    for (std::int64_t i = first, next; i < last; i = next) {
        next = i + 1;
        while (axis.source_stride == run && next < last && axis.source(next) == axis.source(next - 1) + 1) ++next;
        const std::byte* from = source + axis.source(i) * axis.source_stride;
        std::byte* to = target + i * axis.target_stride;
        if (from != to) std::memmove(to, from, static_cast<std::size_t>((next - i) * run));
    }
}

// Moves what stays of positions [first, last) of axis `level`; `source` and `target` are where the axis starts.
inline void move_forward(const Plan& plan, std::size_t level, std::int64_t first, std::int64_t last, const std::byte* source,
                         std::byte* target) {
    const Axis& axis = plan.axes[level];
    if (level + 1 < plan.axes.size()) {
        const std::int64_t inner = plan.axes[level + 1].kept();
        for (std::int64_t i = first; i < last; ++i) {
            move_forward(plan, level + 1, 0, inner, source + axis.source(i) * axis.source_stride, target + i * axis.target_stride);
        }
        return;
    }
    switch (plan.run) {
        case 1: return move_small_runs<1>(axis, first, last, source, target);
        case 2: return move_small_runs<2>(axis, first, last, source, target);
        case 4: return move_small_runs<4>(axis, first, last, source, target);
        case 8: return move_small_runs<8>(axis, first, last, source, target);
        case 16: return move_small_runs<16>(axis, first, last, source, target);
        default: return move_runs(axis, plan.run, first, last, source, target);
    }
}

// Positions [first, last) of the outermost axis at once, on up to `threads` threads; their targets must end before their
// sources begin, or no thread could know what another has still to read.
inline void move_in_parallel(const Plan& plan, std::int64_t first, std::int64_t last, std::int64_t threads, std::byte* data) {
    const std::int64_t share = (last - first + threads - 1) / threads;
    std::vector<std::thread> helpers;
    std::int64_t begin = first;
    try {
        helpers.reserve(static_cast<std::size_t>(threads));
        for (; begin + share < last; begin += share) {
            helpers.emplace_back([&plan, begin, share, data] { move_forward(plan, 0, begin, begin + share, data, data); });
        }
    } catch (const std::exception&) {
        // no more threads to be had: the rest is moved here
    }
    move_forward(plan, 0, begin, last, data, data);
    for (std::thread& helper : helpers) helper.join();
}

// Keeps, along each dimension, the given indices (none given: all) of the tensor at `address`, in place.
inline void compact(std::uintptr_t address, std::int64_t itemsize, const Indices& shape, const Indices& strides,
                    const std::vector<std::optional<Indices>>& keeps, std::int64_t threads) {
    constexpr std::int64_t worth_threads = std::int64_t{1} << 20;  // bytes: below, starting threads costs more than they save
    const Plan plan = make_plan(itemsize, shape, strides, keeps);
    if (plan.kept == 0 || plan.axes.empty()) return;
    auto* data = reinterpret_cast<std::byte*>(address);
    if (!data) throw std::invalid_argument("compact needs the tensor's memory; the address is 0");
    const Axis& outer = plan.axes.front();
    const std::int64_t kept = outer.kept();
    for (std::int64_t first = 0; first < kept;) {
        // As many positions as find room in front of the first one's source can move in any order. The gap grows with
        // everything dropped, so after a few small steps the rest goes in a few large ones.
        const std::int64_t gap = outer.source(first) * outer.source_stride;
        const std::int64_t last = std::min(kept, gap / outer.target_stride);
        if (threads > 1 && (last - first) * outer.target_stride >= worth_threads) {
            move_in_parallel(plan, first, last, std::min(threads, last - first), data);
            first = last;
        } else {
            move_forward(plan, 0, first, first + 1, data, data);
            ++first;
        }
    }
}

}  // namespace fastmerge
