// Binds csrc/batch_norm.h to Python; memory comes as addresses, so no version of torch is compiled in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_norm.h"

namespace py = pybind11;
namespace bn = fastmerge::batch_norm;

namespace {

using Address = std::uintptr_t;  // 0: no tensor
// Where the first row of each stream is, and elements from row to row; empty: no tensors.
using Streams = std::pair<std::vector<Address>, std::int64_t>;
using StridedRows = std::pair<Address, std::int64_t>;
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Rows of one of the streams.
template <typename T>
bn::Rows<T> rows(const Streams& given, std::size_t stream) {
    if (given.first.empty()) return {};
    return {pointer<T>(given.first[stream]), given.second};
}

// One stream's columns of rows that hold all streams' side by side.
template <typename T>
bn::Rows<T> columns(const StridedRows& given, std::size_t stream, std::int64_t channels) {
    if (!given.first) return {};
    return {pointer<T>(given.first) + static_cast<std::int64_t>(stream) * channels, given.second};
}

// One stream's part of a vector of all streams'.
template <typename T>
T* part(Address address, std::size_t stream, std::int64_t channels) {
    return address ? pointer<T>(address) + static_cast<std::int64_t>(stream) * channels : nullptr;
}

bn::Chunks chunks_of(const Shape& shape) {
    const auto [samples, positions, channels] = shape;
    if (samples < 1 || positions < 1 || channels < 1) throw std::invalid_argument("batch_norm needs sizes of 1 or more");
    return {samples, positions, channels};
}

void need(Address address, const char* what) {
    if (!address) throw std::invalid_argument(std::string("batch_norm needs ") + what + "; its address is 0");
}

void need(const Streams& given, std::size_t count, const char* what) {
    if (given.first.size() != count || !count) {
        throw std::invalid_argument(std::string("batch_norm needs ") + what + " of each stream");
    }
    for (const Address address : given.first) need(address, what);
}

void need_or_none(const Streams& given, std::size_t count, const char* what) {
    if (!given.first.empty()) need(given, count, what);
}

// Calls work with the activation of a name and a value of the storage type.
template <typename Work, typename... Members>
void for_kind(bn::Kinds<Members...>, std::string_view activation, bool bfloat16, const Work& work) {
    const auto matches = [&](auto member) {
        if (activation != decltype(member)::name) return false;
        bfloat16 ? work(member, bn::BFloat16{}) : work(member, 0.0f);
        return true;
    };
    if (!(matches(Members{}) || ...)) {
        throw std::invalid_argument("batch_norm needs an activation that it knows; got " + std::string(activation));
    }
}

template <typename... Members>
py::tuple names(bn::Kinds<Members...>) {
    return py::make_tuple(Members::name...);
}

void forward(const Shape& shape, bool bfloat16, const Streams& x, bool training, Address mean, Address var, Address running_mean,
             Address running_var, double momentum, Address weight, Address bias, float eps, const Streams& residual,
             const StridedRows& gates, std::string_view activation, const Streams& y, std::int64_t threads) {
    const bn::Chunks chunks = chunks_of(shape);
    const std::int64_t channels = chunks.channels;
    const std::size_t streams = x.first.size();
    need(x, streams, "x");
    need(mean, "mean");
    need(var, "var");
    need(y, streams, "y");
    need_or_none(residual, streams, "residual");
    for_kind(bn::Activations{}, activation, bfloat16, [&](auto act, auto zero) {
        using Activation = decltype(act);
        using T = decltype(zero);
        for (std::size_t t = 0; t < streams; ++t) {
            float *own_mean = part<float>(mean, t, channels), *own_var = part<float>(var, t, channels);
            if (training) {
                bn::statistics<T>(chunks, rows<const T>(x, t), own_mean, own_var, threads);
                const double rows = static_cast<double>(chunks.rows());
                bn::update(part<float>(running_mean, t, channels), own_mean, channels, momentum, 1.0);
                bn::update(part<float>(running_var, t, channels), own_var, channels, momentum, rows / (rows - 1.0));
            }
            const bn::Affine affine(channels, own_mean, own_var, part<const float>(weight, t, channels),
                                    part<const float>(bias, t, channels), eps);
            bn::normalize<Activation, T>(chunks, rows<const T>(x, t), affine, rows<const T>(residual, t),
                                         columns<const float>(gates, t, channels), rows<T>(y, t), threads);
        }
    });
}

void backward(const Shape& shape, bool bfloat16, const Streams& dy, const Streams& more, const Streams& x, Address mean,
              Address var, Address weight, Address bias, float eps, const Streams& residual, const StridedRows& gates,
              std::string_view activation, bool training, const Streams& dx, const Streams& dresidual, Address dweight,
              Address dbias, const StridedRows& dgates, std::int64_t threads) {
    const bn::Chunks chunks = chunks_of(shape);
    const std::int64_t channels = chunks.channels;
    const std::size_t streams = x.first.size();
    need(dy, streams, "dy");
    need(x, streams, "x");
    need(mean, "mean");
    need(var, "var");
    need_or_none(more, streams, "more");
    need_or_none(residual, streams, "residual");
    need_or_none(dx, streams, "dx");
    need_or_none(dresidual, streams, "dresidual");
    if (dgates.first && !gates.first) throw std::invalid_argument("batch_norm needs gates where their gradient is wanted");
    for_kind(bn::Activations{}, activation, bfloat16, [&](auto act, auto zero) {
        using Activation = decltype(act);
        using T = decltype(zero);
        for (std::size_t t = 0; t < streams; ++t) {
            const bn::Affine affine(channels, part<const float>(mean, t, channels), part<const float>(var, t, channels),
                                    part<const float>(weight, t, channels), part<const float>(bias, t, channels), eps);
            const bn::Backward<T> call{rows<const T>(dy, t),
                                       rows<const T>(more, t),
                                       rows<const T>(x, t),
                                       rows<const T>(residual, t),
                                       columns<const float>(gates, t, channels),
                                       training,
                                       rows<T>(dx, t),
                                       rows<T>(dresidual, t),
                                       part<float>(dweight, t, channels),
                                       part<float>(dbias, t, channels),
                                       columns<float>(dgates, t, channels)};
            bn::backward<Activation, T>(chunks, call, affine, threads);
        }
    });
}

}  // namespace

PYBIND11_MODULE(_batch_norm, module) {
    module.doc() =
        "BatchNorm + residual add + activation + gate on a CPU, of several streams. A shape is samples, positions and channels "
        "of a stream. Streams are the addresses of their first rows and the elements from row to row; vectors, and rows of gates, "
        "hold all streams' channels side by side. An address of 0, or no address, means none; what isn't streams is float32.";
    module.attr("ACTIVATIONS") = names(bn::Activations{});
    module.def("forward", &forward, py::arg("shape"), py::arg("bfloat16"), py::arg("x"), py::arg("training"), py::arg("mean"),
               py::arg("var"), py::arg("running_mean"), py::arg("running_var"), py::arg("momentum"), py::arg("weight"),
               py::arg("bias"), py::arg("eps"), py::arg("residual"), py::arg("gates"), py::arg("activation"), py::arg("y"),
               py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Writes y = act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate, in training after mean and "
               "biased variance of x and the running statistics; gates of stride 0 are shared by all samples.");
    module.def("backward", &backward, py::arg("shape"), py::arg("bfloat16"), py::arg("dy"), py::arg("more"), py::arg("x"),
               py::arg("mean"), py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("residual"),
               py::arg("gates"), py::arg("activation"), py::arg("training"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"),
               py::arg("dbias"), py::arg("dgates"), py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Writes the gradients that there is an address for, where that of y is dy + more; with training, through the "
               "statistics of x.");
}
