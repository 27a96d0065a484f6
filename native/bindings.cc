// The extension module. Each subject binds itself in a file of its own; these files alone know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "isa.h"

void bind_cpu_adam(pybind11::module_& m);
void bind_io(pybind11::module_& m);
void bind_nf4(pybind11::module_& m);

PYBIND11_MODULE(_offload_rt_native, m) {
  m.doc() = "Native core of offload_rt: asynchronous file I/O, checksums, NF4, AdamW.";
  m.def(
      "kernel_isas",
      [] {
        std::vector<std::string> names;
        for (const offload_rt::Isa isa : offload_rt::available_isas()) names.emplace_back(name_of(isa));
        return names;
      },
      "The instruction sets that kernels can use on this processor, slowest first; 'auto' is the last.");
  m.def(
      "isa",
      [] {
        pybind11::dict dict;
        for (const auto& [name, present] : offload_rt::detect_isa())
          dict[pybind11::str(std::string(name))] = present;
        return dict;
      },
      "Instruction sets that fast paths are chosen by, and whether this machine has them.");
  bind_cpu_adam(m);
  bind_io(m);
  bind_nf4(m);
}
