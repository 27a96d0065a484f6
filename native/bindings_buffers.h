// What the bindings over tensors share: buffers become spans, names become choices. Every size is checked
// before a span is made of it; a mistake is a ValueError that names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <type_traits>

#include "execution.h"

// The buffer's memory, after a check that it is one contiguous dimension of items of T's size. The Python
// caller keeps the object alive for the length of the call.
template <typename T>
std::span<T> span_of(const pybind11::buffer& buffer, const char* name) {
  const pybind11::buffer_info info = buffer.request(!std::is_const_v<T>);
  if (info.ndim != 1 || info.itemsize != sizeof(T) ||
      (info.shape[0] > 1 && info.strides[0] != info.itemsize)) {
    throw pybind11::value_error(std::string(name) + ": a contiguous one-dimensional array of " +
                                std::to_string(sizeof(T)) + "-byte items is needed, got " +
                                std::to_string(info.ndim) + " dimensions of " +
                                std::to_string(info.itemsize) + "-byte items");
  }
  return {static_cast<T*>(info.ptr), static_cast<std::size_t>(info.shape[0])};
}

inline void check_size(const char* name, std::size_t size, std::size_t wanted) {
  if (size == wanted) return;
  throw pybind11::value_error(std::string(name) + " has " + std::to_string(size) + " items, " +
                              std::to_string(wanted) + " are needed");
}

inline std::size_t ceil_divide(std::size_t left, std::size_t right) { return (left + right - 1) / right; }

inline offload_rt::Execution execution_of(const std::string& isa, std::size_t num_threads,
                                          bool streaming_stores) {
  const std::vector<offload_rt::Isa> available = offload_rt::available_isas();
  if (isa == "auto") return {available.back(), num_threads, streaming_stores};
  std::string allowed = "auto";
  for (const offload_rt::Isa candidate : available) {
    if (isa == name_of(candidate)) return {candidate, num_threads, streaming_stores};
    allowed += ", " + std::string(name_of(candidate));
  }
  throw pybind11::value_error("isa is '" + isa + "', this processor allows: " + allowed);
}
