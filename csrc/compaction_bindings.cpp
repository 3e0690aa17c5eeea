// Binds csrc/compact.h and csrc/release.h to Python; memory comes as an address, so no version of torch is compiled in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "compact.h"
#include "release.h"

namespace py = pybind11;

PYBIND11_MODULE(_compaction, module) {
    module.doc() = "Compaction of a strided tensor in its own memory.";
    module.def("compact", &fastmerge::compact, py::arg("data"), py::arg("itemsize"), py::arg("shape"), py::arg("strides"),
               py::arg("keeps"), py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>(),
               "Keeps, along each dimension, the given indices of the tensor at address data, in place and densely. Strides "
               "count elements; a keep of None keeps all.");
    module.def("release", &fastmerge::release, py::arg("begin"), py::arg("end"), py::call_guard<py::gil_scoped_release>(),
               "Gives the whole pages between two addresses, which nothing reads any more, back to the system.");
}
