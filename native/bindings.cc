// The extension module. Each subject binds itself in a file of its own; these files alone know Python.
#include <pybind11/pybind11.h>

void bind_io(pybind11::module_& m);
void bind_nf4(pybind11::module_& m);

PYBIND11_MODULE(_offload_rt_native, m) {
  m.doc() = "Native core of offload_rt: asynchronous file I/O, checksums, NF4.";
  bind_io(m);
  bind_nf4(m);
}
