// Binds the operations of csrc/ to Python; memory comes as an address, so no version of torch is compiled in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "compact.h"

namespace py = pybind11;

PYBIND11_MODULE(_compaction, module) {
    module.doc() = "Compaction of a strided tensor in its own memory.";
    module.def(
        "compact",
        [](std::uintptr_t data, std::int64_t itemsize, const fastmerge::Indices& shape, const fastmerge::Indices& strides,
           const std::vector<std::optional<fastmerge::Indices>>& keeps, std::int64_t threads) {
            fastmerge::compact(reinterpret_cast<std::byte*>(data), itemsize, shape, strides, keeps, threads);
        },
        py::arg("data"), py::arg("itemsize"), py::arg("shape"), py::arg("strides"), py::arg("keeps"), py::arg("threads") = 1,
        py::call_guard<py::gil_scoped_release>(),
        "Keeps, along each dimension, the given indices of the tensor at address data, in place and densely; strides are in "
        "elements.");
}
