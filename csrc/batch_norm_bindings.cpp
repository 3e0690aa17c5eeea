// Binds csrc/batch_norm.h to Python; memory comes as addresses, so no version of torch is compiled in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "batch_norm.h"

namespace py = pybind11;
namespace bn = fastmerge::batch_norm;

namespace {

using Address = std::uintptr_t;                       // 0: no tensor
using StridedRows = std::pair<Address, std::int64_t>;  // where the first row is, and elements from row to row
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
bn::Rows<T> rows(const StridedRows& given) {
    return {pointer<T>(given.first), given.second};
}

bn::Chunks chunks_of(const Shape& shape) {
    const auto [samples, positions, channels] = shape;
    if (samples < 1 || positions < 1 || channels < 1) throw std::invalid_argument("batch_norm needs sizes of 1 or more");
    return {samples, positions, channels};
}

void need(Address address, const char* what) {
    if (!address) throw std::invalid_argument(std::string("batch_norm needs ") + what + "; its address is 0");
}

// Calls work with a value of the storage type.
template <typename Work>
void for_dtype(bool bfloat16, const Work& work) {
    if (bfloat16) {
        work(bn::BFloat16{});
    } else {
        work(0.0f);
    }
}

void statistics(const Shape& shape, bool bfloat16, const StridedRows& x, Address mean, Address var, std::int64_t threads) {
    const bn::Chunks chunks = chunks_of(shape);
    need(x.first, "x");
    need(mean, "mean");
    need(var, "var");
    for_dtype(bfloat16, [&](auto zero) {
        using T = decltype(zero);
        bn::statistics<T>(chunks, rows<const T>(x), pointer<float>(mean), pointer<float>(var), threads);
    });
}

void normalize(const Shape& shape, bool bfloat16, const StridedRows& x, Address mean, Address var, Address weight, Address bias,
               float eps, const StridedRows& residual, const StridedRows& gates, bool relu, const StridedRows& y,
               std::int64_t threads) {
    const bn::Chunks chunks = chunks_of(shape);
    need(x.first, "x");
    need(mean, "mean");
    need(var, "var");
    need(y.first, "y");
    const bn::Affine affine(chunks.channels, pointer<const float>(mean), pointer<const float>(var), pointer<const float>(weight),
                            pointer<const float>(bias), eps);
    for_dtype(bfloat16, [&](auto zero) {
        using T = decltype(zero);
        bn::normalize<T>(chunks, rows<const T>(x), affine, rows<const T>(residual), rows<const float>(gates), relu, rows<T>(y),
                         threads);
    });
}

void backward(const Shape& shape, bool bfloat16, const StridedRows& dy, const StridedRows& x, Address mean, Address var,
              Address weight, Address bias, float eps, const StridedRows& residual, const StridedRows& gates, bool relu,
              bool training, const StridedRows& dx, const StridedRows& dresidual, Address dweight, Address dbias, Address dgates,
              std::int64_t threads) {
    const bn::Chunks chunks = chunks_of(shape);
    need(dy.first, "dy");
    need(x.first, "x");
    need(mean, "mean");
    need(var, "var");
    if (dgates && !gates.first) throw std::invalid_argument("batch_norm needs gates where their gradient is wanted");
    const bn::Affine affine(chunks.channels, pointer<const float>(mean), pointer<const float>(var), pointer<const float>(weight),
                            pointer<const float>(bias), eps);
    for_dtype(bfloat16, [&](auto zero) {
        using T = decltype(zero);
        const bn::Backward<T> call{rows<const T>(dy), rows<const T>(x),   rows<const T>(residual), rows<const float>(gates),
                                   relu,              training,           rows<T>(dx),             rows<T>(dresidual),
                                   pointer<float>(dweight), pointer<float>(dbias), pointer<float>(dgates)};
        bn::backward<T>(chunks, call, affine, threads);
    });
}

}  // namespace

PYBIND11_MODULE(_batch_norm, module) {
    module.doc() =
        "BatchNorm + residual add + ReLU + gate on a CPU. A shape is samples, positions and channels; rows are the address of the "
        "first row and the elements from row to row; an address of 0 means none; what isn't rows is float32 and dense.";
    module.def("statistics", &statistics, py::arg("shape"), py::arg("bfloat16"), py::arg("x"), py::arg("mean"), py::arg("var"),
               py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Writes mean and biased variance of each channel.");
    module.def("normalize", &normalize, py::arg("shape"), py::arg("bfloat16"), py::arg("x"), py::arg("mean"), py::arg("var"),
               py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("residual"), py::arg("gates"), py::arg("relu"),
               py::arg("y"), py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Writes y = act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate; gates of stride 0 are shared by "
               "all samples.");
    module.def("backward", &backward, py::arg("shape"), py::arg("bfloat16"), py::arg("dy"), py::arg("x"), py::arg("mean"),
               py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("residual"), py::arg("gates"),
               py::arg("relu"), py::arg("training"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"),
               py::arg("dgates"), py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Writes the gradients whose address is not 0; with training, through the statistics of x.");
}
