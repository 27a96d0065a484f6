// AdamW for Python: buffers in, spans out. Every size is checked here, once; the GIL is dropped around the
// work.
//
// Tensors arrive as one-dimensional numpy arrays, bfloat16 as uint16: the items' size says which it is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "bindings_buffers.h"
#include "cpu_adam.h"

namespace py = pybind11;
using namespace offload_rt;
using namespace offload_rt::adam;

namespace {

// Calls make.template operator()<T>() with the element type that the buffer's item size says.
template <typename F>
auto with_type_of(const py::buffer& buffer, F&& make) {
  if (buffer.request().itemsize == sizeof(BFloat16)) return make.template operator()<BFloat16>();
  return make.template operator()<float>();  // span_of refuses every other size
}

template <typename T>
std::span<T> span_of_size(const py::buffer& buffer, const char* name, std::size_t size) {
  const auto span = span_of<T>(buffer, name);
  check_size(name, span.size(), size);
  return span;
}

QuantizedMoment quantized_moment(const py::tuple& moment, const char* name, std::size_t size) {
  const auto parts = moment.cast<std::tuple<py::buffer, py::buffer, const DynamicMap*>>();
  return {span_of_size<std::uint8_t>(std::get<0>(parts), name, size),
          span_of_size<float>(std::get<1>(parts), name, ceil_divide(size, kQuantBlockSize)),
          std::get<2>(parts)};
}

void bound_step(const py::buffer& grad, const py::buffer& master, const py::object& exp_avg,
                const py::object& exp_avg_sq, const std::optional<py::buffer>& weight,
                const std::array<float, 8>& scalars, const std::string& isa, std::size_t num_threads,
                bool streaming_stores) {
  const Execution execution = execution_of(isa, num_threads, streaming_stores);
  Parameter parameter;
  parameter.master = span_of<float>(master, "master");
  const std::size_t size = parameter.master.size();
  with_type_of(grad, [&]<typename T>() { parameter.grad = span_of_size<const T>(grad, "grad", size); });
  if (py::isinstance<py::tuple>(exp_avg)) {
    parameter.moments = QuantizedMoments{quantized_moment(exp_avg, "exp_avg", size),
                                         quantized_moment(exp_avg_sq, "exp_avg_sq", size)};
  } else {
    const auto first = exp_avg.cast<py::buffer>(), second = exp_avg_sq.cast<py::buffer>();
    with_type_of(first, [&]<typename T>() {
      parameter.moments =
          Moments<T>{span_of_size<T>(first, "exp_avg", size), span_of_size<T>(second, "exp_avg_sq", size)};
    });
  }
  if (weight) {
    with_type_of(*weight, [&]<typename T>() { parameter.weight = span_of_size<T>(*weight, "weight", size); });
  }
  const auto& [grad_scale, decay, exp_avg_weight, exp_avg_sq_decay, exp_avg_sq_weight, bias_correction2_sqrt,
               eps, step_size] = scalars;
  const Step numbers = {
      grad_scale, decay,    exp_avg_weight, exp_avg_sq_decay, exp_avg_sq_weight, bias_correction2_sqrt,
      eps,        step_size};
  const py::gil_scoped_release unlocked;
  step(parameter, numbers, execution);
}

}  // namespace

void bind_cpu_adam(py::module_& m) {
  py::class_<DynamicMap>(m, "DynamicMap", "The 256 ascending values of 8-bit block-wise numbers.")
      .def(py::init([](const py::buffer& values) {
             const auto span = span_of_size<const float>(values, "values", DynamicMap::kSize);
             const auto map = DynamicMap::of(std::span<const float, DynamicMap::kSize>(span));
             if (!map) throw py::value_error("values: 256 ascending numbers, dense near 1, are needed");
             return *map;
           }),
           py::arg("values"));
  m.def(
      "adamw_step", &bound_step, py::arg("grad"), py::arg("master"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("weight"), py::arg("scalars"), py::kw_only(), py::arg("isa") = "auto",
      py::arg("num_threads") = 1, py::arg("streaming_stores") = false,
      "One AdamW step in place, and the new master rounded to `weight` unless that is None. `scalars` are "
      "the "
      "fields of Step in cpu_adam.h, in their order. 8-bit moments are tuples (codes, absmax, DynamicMap).");
}
