// NF4 for Python: buffers in, spans out. Every size is checked here, once; the GIL is dropped around the
// work.
//
// Tensors arrive as one-dimensional numpy arrays, the 16-bit types as uint16 with the type's name beside it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings_buffers.h"
#include "nf4.h"

namespace py = pybind11;
using namespace offload_rt;
using namespace offload_rt::nf4;

namespace {

// Calls f.template operator()<T>() with the element type of that name.
template <typename F>
auto with_type(const std::string& dtype, F&& f) {
  if (dtype == "float32") return f.template operator()<float>();
  if (dtype == "bfloat16") return f.template operator()<BFloat16>();
  if (dtype == "float16") return f.template operator()<Half>();
  throw py::value_error("dtype is '" + dtype + "', allowed: float32, bfloat16, float16");
}

Encoded encoded_of(const py::buffer& codes, const py::buffer& absmax, const py::buffer& nested_absmax,
                   const py::buffer& nested_offset, const py::buffer& nested_map, std::size_t num_elements) {
  const auto offset = span_of<const float>(nested_offset, "nested_offset");
  const auto map = span_of<const float>(nested_map, "nested_map");
  check_size("nested_offset", offset.size(), 1);
  check_size("nested_map", map.size(), kNestedMapSize);
  const Encoded encoded = {span_of<const std::uint8_t>(codes, "codes"),
                           span_of<const std::uint8_t>(absmax, "absmax"),
                           span_of<const float>(nested_absmax, "nested_absmax"), offset[0],
                           std::span<const float, kNestedMapSize>(map)};
  check_size("codes", encoded.codes.size(), ceil_divide(num_elements, 2));
  check_size("absmax", encoded.absmax.size(), ceil_divide(num_elements, kQuantBlockSize));
  check_size("nested_absmax", encoded.nested_absmax.size(),
             ceil_divide(encoded.absmax.size(), kNestedBlockSize));
  return encoded;
}

Team team_of(bool openmp) {
  const Team team = openmp ? openmp_team() : nullptr;
  if (openmp && team == nullptr)
    throw py::value_error("openmp is True, but this process has loaded no OpenMP runtime");
  return team;
}

void bound_decode(const py::buffer& codes, const py::buffer& absmax, const py::buffer& nested_absmax,
                  const py::buffer& nested_offset, const py::buffer& nested_map, const py::buffer& out,
                  const std::string& dtype, const std::string& isa, std::size_t num_threads,
                  bool streaming_stores, bool openmp) {
  Execution execution = execution_of(isa, num_threads, streaming_stores);
  execution.team = team_of(openmp);
  with_type(dtype, [&]<typename T>() {
    const auto elements = span_of<T>(out, "out");
    const Encoded encoded =
        encoded_of(codes, absmax, nested_absmax, nested_offset, nested_map, elements.size());
    const py::gil_scoped_release unlocked;
    decode(encoded, elements, execution);
  });
}

void bound_decode_transposed(const py::buffer& codes, const py::buffer& absmax,
                             const py::buffer& nested_absmax, const py::buffer& nested_offset,
                             const py::buffer& nested_map, std::size_t rows, std::size_t columns,
                             const py::buffer& out, const std::string& dtype, const std::string& isa,
                             std::size_t num_threads, bool openmp) {
  Execution execution = execution_of(isa, num_threads, false);
  execution.team = team_of(openmp);
  with_type(dtype, [&]<typename T>() {
    const auto elements = span_of<T>(out, "out");
    check_size("out", elements.size(), rows * columns);
    const Encoded encoded =
        encoded_of(codes, absmax, nested_absmax, nested_offset, nested_map, elements.size());
    const py::gil_scoped_release unlocked;
    decode_transposed(encoded, rows, columns, elements, execution);
  });
}

std::optional<std::size_t> bound_encode(const py::buffer& weights, const std::string& dtype,
                                        const py::buffer& codes, const py::buffer& absmax,
                                        const std::string& isa, std::size_t num_threads) {
  const Execution execution = execution_of(isa, num_threads, false);
  return with_type(dtype, [&]<typename T>() {
    const auto elements = span_of<const T>(weights, "weights");
    const auto code_bytes = span_of<std::uint8_t>(codes, "codes");
    const auto scales = span_of<float>(absmax, "absmax");
    check_size("codes", code_bytes.size(), ceil_divide(elements.size(), 2));
    check_size("absmax", scales.size(), ceil_divide(elements.size(), kQuantBlockSize));
    const py::gil_scoped_release unlocked;
    return encode(elements, code_bytes, scales, execution);
  });
}

void bound_encode_absmax(const py::buffer& absmax, float offset, const py::buffer& rounding,
                         const py::buffer& absmax_codes, const py::buffer& nested_absmax) {
  const auto scales = span_of<const float>(absmax, "absmax");
  const auto steps = span_of<const std::uint8_t>(rounding, "rounding");
  const auto codes = span_of<std::uint8_t>(absmax_codes, "absmax_codes");
  const auto nested = span_of<float>(nested_absmax, "nested_absmax");
  check_size("rounding", steps.size(), kAbsmaxSteps);
  check_size("absmax_codes", codes.size(), scales.size());
  check_size("nested_absmax", nested.size(), ceil_divide(scales.size(), kNestedBlockSize));
  const py::gil_scoped_release unlocked;
  encode_absmax(scales, offset, std::span<const std::uint8_t, kAbsmaxSteps>(steps), codes, nested);
}

}  // namespace

void bind_nf4(py::module_& m) {
  m.def("nf4_decode", &bound_decode, py::arg("codes"), py::arg("absmax"), py::arg("nested_absmax"),
        py::arg("nested_offset"), py::arg("nested_map"), py::arg("out"), py::arg("dtype"), py::kw_only(),
        py::arg("isa") = "auto", py::arg("num_threads") = 1, py::arg("streaming_stores") = false,
        py::arg("openmp") = false, "Decodes all elements of `out`, in order.");
  m.def("nf4_decode_transposed", &bound_decode_transposed, py::arg("codes"), py::arg("absmax"),
        py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("nested_map"), py::arg("rows"),
        py::arg("columns"), py::arg("out"), py::arg("dtype"), py::kw_only(), py::arg("isa") = "auto",
        py::arg("num_threads") = 1, py::arg("openmp") = false,
        "Decodes a (rows, columns) matrix into its transpose.");
  m.def(
      "has_openmp", [] { return openmp_team() != nullptr; },
      "Whether OpenMP's threads can be used; see [Note: whose threads] in execution.h.");
  m.def("nf4_encode", &bound_encode, py::arg("weights"), py::arg("dtype"), py::arg("codes"),
        py::arg("absmax"), py::kw_only(), py::arg("isa") = "auto", py::arg("num_threads") = 1,
        "Fills codes and float32 absmax. Returns the index of the first weight that is not finite, or None.");
  m.def("nf4_encode_absmax", &bound_encode_absmax, py::arg("absmax"), py::arg("offset"), py::arg("rounding"),
        py::arg("absmax_codes"), py::arg("nested_absmax"),
        "Rounds absmax - offset to 8 bits and fills the absmax of each nested block.");
}
