// Rings, checksums and errors for Python. The native core owns no memory; here a Ring owns the buffers of its
// operations (it holds their Py_buffer, so that neither collection nor resizing can move them) until the
// operation was waited for, or the ring is closed or destroyed.
//
// The buffers are guarded by the GIL, the rest by the core's own lock. Whatever can block drops the GIL.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "crc32c.h"
#include "io_ring.h"
#include "status.h"

namespace py = pybind11;
using namespace offload_rt;

namespace {

constexpr const char* kModule = "_offload_rt_native";

// From here on dropping the GIL costs less than keeping others from running: about 100 us of checksum.
constexpr py::ssize_t kLargeBuffer = 1 << 20;

// Between two looks at Ctrl-C.
constexpr double kSignalCheckSeconds = 0.2;

// Becomes the Python exception of the same fields. Needs the GIL.
[[noreturn]] void throw_as_python(const Status& status) {
  if (status.code == StatusCode::invalid || status.code == StatusCode::unknown_ticket ||
      status.code == StatusCode::closed)
    throw py::value_error(status.code == StatusCode::closed && status.detail.empty()
                              ? status.path + ": the ring is closed"
                              : status.message());
  const py::object type = py::module_::import(kModule).attr(
      status.code == StatusCode::timed_out ? "NativeTimeout" : "NativeStorageError");
  Status summary = status;
  summary.detail = status.code == StatusCode::timed_out ? std::string() : status.detail;
  std::string message = summary.message();
  if (status.code == StatusCode::timed_out) message += "; outstanding:\n" + status.detail;
  py::object error = type(message);
  error.attr("errno") = status.error_number;
  error.attr("code") = std::string(name_of(status.code));
  error.attr("kind") = std::string(name_of(status.kind));
  error.attr("path") = status.path;
  error.attr("offset") = status.offset;
  error.attr("wanted") = status.wanted;
  error.attr("done") = status.done;
  error.attr("failed_at") = status.failed_at;
  if (status.code == StatusCode::timed_out) error.attr("dump") = status.detail;
  PyErr_SetObject(type.ptr(), error.ptr());
  throw py::error_already_set();
}

void raise_unless_ok(const Status& status) {
  if (!status.ok()) throw_as_python(status);
}

// A contiguous view of a Python object's memory, given back with the object. Made and destroyed with the GIL.
class BufferView {
 public:
  BufferView(const py::object& object, bool writable) : view_(new Py_buffer{}) {
    const int flags = PyBUF_ANY_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), view_.get(), flags) != 0) throw py::error_already_set();
  }

  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(view_->buf); }
  [[nodiscard]] py::ssize_t size() const { return view_->len; }

 private:
  struct Release {
    void operator()(Py_buffer* view) const {
      PyBuffer_Release(view);  // does nothing to one that was refused
      delete view;
    }
  };
  std::unique_ptr<Py_buffer, Release> view_;  // not moved in memory: it may point into itself
};

IoBackend parse_backend(std::string_view name) {
  if (name == "auto") return IoBackend::automatic;
  if (name == "io_uring") return IoBackend::io_uring;
  if (name == "threads") return IoBackend::threads;
  throw py::value_error("backend must be 'auto', 'io_uring' or 'threads', not '" + std::string(name) + "'");
}

class PyRing {
 public:
  PyRing(unsigned depth, std::uint32_t io_bytes, std::string_view backend, std::uint32_t piece_bytes,
         double patience_seconds)
      : patience_seconds_(patience_seconds) {
    raise_unless_ok(open_io_ring(
        {.depth = depth, .io_bytes = io_bytes, .backend = parse_backend(backend), .piece_bytes = piece_bytes},
        ring_));
  }

  // What a drive that hangs was asked for stays in its hands, for as long as the process lives: its memory,
  // its descriptors, and the ring that would see it end.
  ~PyRing() {
    const py::gil_scoped_release release;
    if (!ring_) return;
    const double patience = is_late_ ? 0 : patience_seconds_;
    if (ring_->close(patience, /*and_forget_queued=*/true).code == StatusCode::timed_out) {
      new auto(std::move(held_));
      static_cast<void>(ring_.release());
    }
    ring_.reset();
  }  // held_ goes after this, with the GIL

  PyRing(const PyRing&) = delete;
  PyRing& operator=(const PyRing&) = delete;

  Ticket submit(IoKind kind, int fd, std::string path, std::uint64_t offset_bytes, const py::object& buffer,
                py::object owner) {
    BufferView view(buffer, kind == IoKind::read);
    Ticket ticket = 0;
    raise_unless_ok(ring_->submit({.kind = kind,
                                   .fd = fd,
                                   .path = std::move(path),
                                   .offset = offset_bytes,
                                   .address = view.data(),
                                   .length = static_cast<std::uint64_t>(view.size())},
                                  ticket));
    held_.emplace(ticket, Held{std::move(view), std::move(owner)});
    return ticket;
  }

  void wait(Ticket ticket, double timeout_seconds, bool again) {
    const Status status =
        in_slices(timeout_seconds, [&](double seconds) { return ring_->wait(ticket, seconds); });
    if (again && status.code == StatusCode::unknown_ticket) {  // Ctrl-C came between its end and who waited
      const auto failed = failed_.find(ticket);
      if (failed != failed_.end()) throw_as_python(failed->second);
      return;
    }
    const bool finished = status.ok() || status.code == StatusCode::os_error ||
                          status.code == StatusCode::end_of_file || status.code == StatusCode::no_progress;
    // Taken out first: what goes with it may run Python, and drop the GIL.
    const auto over = finished ? held_.extract(ticket) : decltype(held_)::node_type{};
    if (finished && !status.ok()) failed_.emplace(ticket, status);
    raise_unless_ok(status);
  }

  [[nodiscard]] bool done(Ticket ticket) const {
    bool finished = false;
    raise_unless_ok(ring_->done(ticket, finished));
    return finished;
  }

  void close() {
    Status status;
    std::uint64_t before = 0;
    do {  // what is slow, and moves, is waited for
      before = moved_bytes();
      status = in_slices(patience_seconds_,
                         [&](double seconds) { return ring_->close(seconds, /*and_forget_queued=*/false); });
    } while (status.code == StatusCode::timed_out && moved_bytes() != before);
    is_late_ = status.code == StatusCode::timed_out;
    if (!is_late_) std::exchange(held_, {}).clear();
    raise_unless_ok(status);
  }

  // These block for as long as pinning takes, and touch no Python object.
  void register_memory(const py::object& memory) {
    const BufferView view(memory, /*writable=*/true);
    const std::span<std::byte> bytes(view.data(), static_cast<std::size_t>(view.size()));
    raise_unless_ok(without_gil([&] { return ring_->register_memory(bytes); }));
  }
  void forget_memory(std::uintptr_t address) {
    raise_unless_ok(without_gil([&] { return ring_->forget_memory(reinterpret_cast<std::byte*>(address)); }));
  }
  void tune(int fd, unsigned depth, std::uint32_t io_bytes) {
    raise_unless_ok(ring_->tune(fd, depth, io_bytes));
  }

  void record(std::size_t most) { ring_->record(most); }

  [[nodiscard]] const IoRing& core() const { return *ring_; }

 private:
  template <class Call>
  static Status without_gil(Call&& call) {
    const py::gil_scoped_release release;
    return call();
  }

  // What an operation needs: its memory, and whoever closes its descriptor.
  struct Held {
    BufferView view;
    py::object owner;
  };

  // Waits so that Ctrl-C is answered; whatever is waited for stays to be waited for then, as after a timeout.
  // A slice counts for its length, however long it took: a process that was stopped in it has waited for
  // nothing.
  template <class Wait>
  static Status in_slices(double timeout_seconds, const Wait& wait) {
    for (double left = timeout_seconds;;) {
      const double slice = left > kSignalCheckSeconds ? kSignalCheckSeconds : left;
      Status status;
      {
        const py::gil_scoped_release release;
        status = wait(slice);
      }
      if (status.code != StatusCode::timed_out || !(slice < left)) return status;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      left -= slice;
    }
  }

  [[nodiscard]] std::uint64_t moved_bytes() const {
    const IoCounters counters = ring_->counters();
    return counters.bytes_read + counters.bytes_written;
  }

  double patience_seconds_;  // to be closed
  bool is_late_ = false;     // that has timed out
  std::unordered_map<Ticket, Held> held_;
  std::unordered_map<Ticket, Status> failed_;  // what waits have ended with, where that was no success
  IoRingPtr ring_;
};

py::dict counters_dict(const PyRing& ring) {
  const IoCounters counters = ring.core().counters();
  py::dict dict;
  dict["bytes_read"] = counters.bytes_read;
  dict["bytes_written"] = counters.bytes_written;
  dict["operations"] = counters.operations;
  dict["requests"] = counters.requests;
  dict["resubmitted"] = counters.resubmitted;
  dict["max_in_flight"] = counters.max_in_flight;
  dict["fixed_memory_requests"] = counters.fixed_memory_requests;
  dict["read_seconds"] = counters.read_seconds;
  dict["write_seconds"] = counters.write_seconds;
  return dict;
}

// A tuple for each operation, and how many were left out.
py::tuple records_of(const PyRing& ring) {
  const IoRecords records = ring.core().records();
  py::list operations;
  for (const IoRecord& each : records.operations)
    operations.append(py::make_tuple(std::string(name_of(each.kind)), each.path, each.offset, each.length,
                                     each.submitted_seconds, each.begun_seconds, each.finished_seconds));
  return py::make_tuple(operations, records.left_out);
}

py::tuple io_uring_available() {
  const Status status = probe_io_uring();
  return py::make_tuple(status.ok(), status.ok() ? std::string() : status.message());
}

std::uint32_t checksum(const py::object& buffer, std::uint32_t seed) {
  const BufferView view(buffer, /*writable=*/false);
  const std::span<const std::byte> bytes(view.data(), static_cast<std::size_t>(view.size()));
  if (view.size() < kLargeBuffer) return crc32c(bytes, seed);
  const py::gil_scoped_release release;
  return crc32c(bytes, seed);
}

// Made by a Python class statement in effect, since pybind11 cannot give an exception attributes and a
// docstring.
void add_exception(py::module_& m, const char* name, PyObject* base, const char* doc) {
  const std::string full_name = std::string(kModule) + "." + name;
  PyObject* type = PyErr_NewExceptionWithDoc(full_name.c_str(), doc, base, nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::reinterpret_steal<py::object>(type);
}

}  // namespace

void bind_io(py::module_& m) {
  using py::arg;
  add_exception(m, "NativeStorageError", PyExc_OSError,
                "A read, write or fdatasync failed. errno (0: the kernel reported none), code ('os_error', "
                "'end_of_file' or\n"
                "'no_progress'), kind ('read', 'write' or 'fdatasync'), path, offset, wanted and done "
                "(bytes, of the operation),\n"
                "failed_at (the lowest file offset that failed).");
  add_exception(
      m, "NativeTimeout", PyExc_TimeoutError,
      "An operation did not finish in time. It goes on, and its ticket stays waitable. The attributes of\n"
      "NativeStorageError, and dump: one line per operation that is outstanding.");

  py::class_<PyRing>(m, "Ring", "Asynchronous reads and writes, on io_uring or on a pool of threads.")
      .def(
          py::init<unsigned, std::uint32_t, std::string_view, std::uint32_t, double>(), arg("depth") = 64,
          arg("io_bytes") = 1 << 20, arg("backend") = "auto", arg("piece_bytes") = 1 << 30,
          arg("patience_seconds") = 60.0,
          "At most `depth` requests of at most `io_bytes` bytes are in flight at a device. backend: 'auto',\n"
          "'io_uring' or 'threads'; 'auto' falls back to threads where the kernel refuses, and "
          "`fallback_reason`\n"
          "says why. Memory is registered in pieces of `piece_bytes`. What does not end within "
          "`patience_seconds`\n"
          "when the ring is closed, or collected, keeps its buffers and owners for good.")
      .def_property_readonly("backend",
                             [](const PyRing& ring) {
                               return ring.core().backend() == IoBackend::io_uring ? "io_uring" : "threads";
                             })
      .def_property_readonly("fallback_reason",
                             [](const PyRing& ring) { return ring.core().fallback_reason(); })
      .def(
          "read",
          [](PyRing& ring, int fd, std::string path, std::uint64_t offset_bytes, const py::object& buffer,
             py::object owner) {
            return ring.submit(IoKind::read, fd, std::move(path), offset_bytes, buffer, std::move(owner));
          },
          arg("fd"), arg("path"), arg("offset_bytes"), arg("buffer"), arg("owner") = py::none(),
          "Starts filling all of `buffer` from `offset_bytes` on; returns a ticket. The ring holds the "
          "buffer until\n"
          "the ticket was waited for; the descriptor must stay open as long, and whoever closes it with his\n"
          "end is `owner`, which is held too. `path` is for messages.")
      .def(
          "write",
          [](PyRing& ring, int fd, std::string path, std::uint64_t offset_bytes, const py::object& buffer,
             py::object owner) {
            return ring.submit(IoKind::write, fd, std::move(path), offset_bytes, buffer, std::move(owner));
          },
          arg("fd"), arg("path"), arg("offset_bytes"), arg("buffer"), arg("owner") = py::none(),
          "Starts writing all of `buffer` to `offset_bytes` on; returns a ticket. As read(), and the buffer "
          "must\n"
          "not be changed meanwhile. Written is not yet durable: that is sync's part.")
      .def(
          "sync",
          [](PyRing& ring, int fd, std::string path, py::object owner) {
            return ring.submit(IoKind::sync, fd, std::move(path), 0, py::bytes(), std::move(owner));
          },
          arg("fd"), arg("path"), arg("owner") = py::none(),
          "Starts fdatasync; returns a ticket. It covers what was waited for before this call, and nothing\n"
          "that is still under way.")
      .def("wait", &PyRing::wait, arg("ticket"), arg("timeout_seconds"), arg("again") = false,
           "Blocks, without the GIL, until the operation has ended; raises NativeStorageError if it failed "
           "and\n"
           "NativeTimeout if it has not ended. Ends the ticket, unless it timed out. `again`: where an "
           "earlier\n"
           "wait has ended it, ends as that did.")
      .def("done", &PyRing::done, arg("ticket"), "Whether wait() would return or raise at once.")
      .def("tune", &PyRing::tune, arg("fd"), arg("depth"), arg("io_bytes"),
           "Sets depth and request length for the device that `fd` lies on.")
      .def("register_memory", &PyRing::register_memory, arg("memory"),
           "Pins the pages of a page-aligned buffer once, instead of with every request. NativeStorageError "
           "where\n"
           "that is refused (EOPNOTSUPP: no io_uring; ENOMEM: RLIMIT_MEMLOCK): all works as before. The ring "
           "does\n"
           "not hold the buffer: forget it before it goes, when no operation on it is unfinished.")
      .def("forget_memory", &PyRing::forget_memory, arg("address"), "Undoes register_memory.")
      .def("outstanding", [](const PyRing& ring) { return ring.core().outstanding(); })
      .def("counters", &counters_dict)
      .def("record", &PyRing::record, arg("most"),
           "Forgets what was recorded; records of the operations submitted from now on the first `most` that "
           "finish,\n"
           "and those that have not. 0: none.")
      .def("records", &records_of,
           "((kind, path, offset, length, submitted, begun, finished), ...) and how many there was no room "
           "for. Bytes,\n"
           "and seconds of a steady clock; negative: not yet.")
      .def(
          "close", &PyRing::close,
          "Waits for all operations, gives their buffers back, and raises the first failure that nobody has\n"
          "waited for. Raises NativeTimeout after `patience_seconds`; then it may be called again.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PyRing& ring, const py::object& type, const py::object&, const py::object&) {
        try {
          ring.close();
        } catch (const py::error_already_set&) {
          if (type.is_none()) throw;  // else the exception that is already on its way says more
        }
      });

  m.def("io_uring_available", &io_uring_available, "(whether this process may use io_uring, why not).");
  m.def("crc32c", &checksum, arg("buffer"), arg("seed") = 0,
        "CRC32C of a contiguous buffer; the result is the seed of the next chunk. Drops the GIL for large "
        "buffers.");
}
