// Breaks the kernel under the ring in every way it is known to break, over both real ones.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

#include "check.h"
#include "faulty_ring.h"
#include "scratch.h"

using namespace offload_rt;
using namespace offload_rt::testing;

namespace {

constexpr double kPatience = 60;  // seconds; a bound on hanging, not an expectation
constexpr std::uint32_t kIoBytes = 8192;

// A ring over a faulty kernel, a file of 16 requests, and a buffer to read it into.
//
//     file   [ 0 ][ 1 ][ 2 ] ... [ 15 ]     requests of 8 KiB, 4 of them in flight
template <class Inner>
struct Rig {
  explicit Rig(FaultPlan plan, int extra_flags = 0)
      : file(extra_flags), out(16 * kIoBytes, 1), in(16 * kIoBytes, 2) {
    CHECK_EQUAL(::pwrite(file.fd(), out.data(), out.size(), 0), static_cast<ssize_t>(out.size()));
    const IoRingOptions options{.depth = 4, .io_bytes = kIoBytes, .backend = IoBackend::threads};
    std::unique_ptr<Inner> inner;
    CHECK(Inner::open(options.num_slots(), inner).ok());
    auto faulty = std::make_unique<FaultyKernel<Inner>>(std::move(inner), std::move(plan));
    kernel = faulty.get();
    ring = faulty_ring(std::move(faulty), options);
  }

  Ticket submit(IoKind kind, const Buffer& buffer) {
    Ticket ticket = 0;
    CHECK(ring->submit({kind, file.fd(), "scratch", 0, buffer.data(), buffer.size()}, ticket).ok());
    return ticket;
  }
  Status read() { return ring->wait(submit(IoKind::read, in), kPatience); }
  Status write() { return ring->wait(submit(IoKind::write, out), kPatience); }

  ScratchFile file;
  Buffer out, in;
  FaultyKernel<Inner>* kernel = nullptr;
  IoRingPtr ring;  // last: gone before the buffers
};

Fault nothing() { return {}; }
Fault short_of(std::uint32_t at_most) { return {.at_most = at_most}; }
Fault error(int error_number) { return {.error_number = error_number}; }

void expect_ok(const Status& status) {
  if (!status.ok()) throw CheckFailed(status.message());
}

// ---- short ones go on from where they stopped ----

template <class Inner>
void short_reads_are_resubmitted() {
  Rig<Inner> rig(
      [](const IoRequest&, std::uint64_t number) { return number % 2 == 0 ? short_of(1001) : nothing(); });
  expect_ok(rig.read());
  CHECK(rig.in == rig.out);
  CHECK(rig.ring->counters().resubmitted >= 8);
  CHECK_EQUAL(rig.ring->counters().bytes_read, rig.in.size());
}

template <class Inner>
void short_writes_are_resubmitted() {
  Rig<Inner> rig([](const IoRequest& request, std::uint64_t number) {
    return request.kind == IoKind::write && number % 3 == 0 ? short_of(4095) : nothing();
  });
  CHECK_EQUAL(::ftruncate(rig.file.fd(), 0), 0);
  expect_ok(rig.write());
  expect_ok(rig.read());
  CHECK(rig.in == rig.out);
  CHECK(rig.ring->counters().resubmitted >= 5);
  CHECK_EQUAL(rig.ring->counters().bytes_written, rig.out.size());
}

// The kernel performs a real short O_DIRECT request here, and what is asked for next must be aligned again:
//
//     |        8192 wanted         |
//     |====== 5120 ======|                  arrived: not a multiple of 4096
//     |             ^ 4096                  asked for from here
template <class Inner>
void an_unaligned_short_direct_read_goes_on_from_an_aligned_place() {
  std::atomic<bool> aligned = true;
  Rig<Inner> rig(
      [&](const IoRequest& request, std::uint64_t number) {
        const auto address = reinterpret_cast<std::uintptr_t>(request.address);
        if ((request.offset | address | request.length) % kDirectAlignment != 0) aligned = false;
        return number == 1 ? short_of(5120) : nothing();
      },
      O_DIRECT);
  expect_ok(rig.read());
  CHECK(rig.in == rig.out);
  CHECK(aligned);
  CHECK_EQUAL(rig.ring->counters().resubmitted, 1U);
  CHECK_EQUAL(rig.ring->counters().bytes_read, rig.in.size());  // the repeated 1024 are not counted twice
}

// As above, and the second try stops before the place that the first one had reached: not the end of the
// file.
template <class Inner>
void a_direct_request_that_is_short_twice_in_one_page_gets_on() {
  for (const IoKind kind : {IoKind::read, IoKind::write}) {
    int num_short = 0;
    Rig<Inner> rig(
        [&](const IoRequest& request, std::uint64_t) {
          const bool again = request.offset == 4096;
          if (request.offset == 0 && request.length == kIoBytes) return short_of(5120);
          return again && num_short++ < 3 ? short_of(512) : nothing();
        },
        O_DIRECT);
    expect_ok(kind == IoKind::read ? rig.read() : rig.write());
    if (kind == IoKind::read) CHECK(rig.in == rig.out);
    CHECK_EQUAL(rig.ring->counters().resubmitted, 4U);
  }
}

// ---- lasting errors reach the waiter with their evidence ----

template <class Inner>
void an_error_in_the_middle_is_told_with_its_place() {
  for (const int error_number : {EIO, ENOSPC, ECANCELED, EBADF}) {
    Rig<Inner> rig([=](const IoRequest& request, std::uint64_t) {
      return request.offset == 3 * kIoBytes ? error(error_number) : nothing();
    });
    const Status status = rig.read();
    CHECK(status.code == StatusCode::os_error);
    CHECK_EQUAL(status.error_number, error_number);
    CHECK_EQUAL(status.failed_at, 3 * kIoBytes);
    CHECK_EQUAL(status.wanted, 16 * kIoBytes);
    CHECK(status.done >= 3 * kIoBytes && status.done % kIoBytes == 0);
    CHECK(rig.ring->counters().requests < 16);  // the rest of a lost operation is not asked for
    CHECK_EQUAL(rig.ring->counters().resubmitted, 0U);
  }
}

// However the two requests that fail come back, the lower place is told.
template <class Inner>
void of_several_failures_the_lowest_is_told() {
  for (const std::uint32_t first_lost : {1U, 2U}) {
    Rig<Inner> rig([=](const IoRequest& request, std::uint64_t) {
      const std::uint64_t index = request.offset / kIoBytes;
      if (index == first_lost + 1) return error(EIO);
      if (index == first_lost) return request.offset % kIoBytes == 0 ? short_of(1000) : error(ENXIO);
      return nothing();
    });
    const Status status = rig.read();
    CHECK_EQUAL(status.error_number, ENXIO);
    CHECK_EQUAL(status.failed_at, first_lost * kIoBytes + 1000);
  }
}

template <class Inner>
void no_bytes_is_an_error_for_both_kinds() {
  Rig<Inner> rig([](const IoRequest&, std::uint64_t) { return Fault{.empty = true}; });
  CHECK(rig.read().code == StatusCode::end_of_file);
  CHECK(rig.write().code == StatusCode::no_progress);
}

template <class Inner>
void an_error_of_one_operation_leaves_the_others_alone() {
  Rig<Inner> rig([](const IoRequest& request, std::uint64_t) {
    return request.kind == IoKind::write ? error(EIO) : nothing();
  });
  const Ticket first = rig.submit(IoKind::read, rig.in);
  const Ticket bad = rig.submit(IoKind::write, rig.out);
  const Buffer again(rig.in.size());
  const Ticket last = rig.submit(IoKind::read, again);
  CHECK_EQUAL(rig.ring->wait(bad, kPatience).error_number, EIO);
  expect_ok(rig.ring->wait(last, kPatience));
  expect_ok(rig.ring->wait(first, kPatience));
  CHECK(again == rig.out && rig.in == rig.out);
}

// ---- passing errors are tried again ----

template <class Inner>
void interruptions_are_retried() {
  for (const int error_number : {EINTR, EAGAIN}) {
    Rig<Inner> rig([=](const IoRequest&, std::uint64_t number) {
      return number < 20 ? error(error_number) : nothing();
    });
    expect_ok(rig.read());
    CHECK(rig.in == rig.out);
    CHECK_EQUAL(rig.ring->counters().resubmitted, 20U);
  }
}

template <class Inner>
void an_endless_refusal_ends_as_an_error() {
  Rig<Inner> rig([](const IoRequest&, std::uint64_t) { return error(EAGAIN); });
  CHECK_EQUAL(rig.read().error_number, EAGAIN);
}

template <class Inner>
void a_full_queue_delays_and_loses_nothing() {
  Rig<Inner> rig([](const IoRequest&, std::uint64_t number) { return Fault{.refused = number % 4 != 3}; });
  expect_ok(rig.read());
  CHECK(rig.in == rig.out);
}

// ---- slow ones ----

template <class Inner>
void a_failed_operation_is_not_over_while_a_request_is_in_flight() {
  // Request 0 fails at once. Request 1 is performed, and its completion held: the kernel may still write
  // there.
  Rig<Inner> rig([](const IoRequest& request, std::uint64_t) {
    if (request.offset == 0) return error(EIO);
    return Fault{.held = request.offset == kIoBytes};
  });
  const Ticket ticket = rig.submit(IoKind::read, rig.in);
  while (rig.kernel->num_kept() == 0) std::this_thread::yield();
  bool finished = true;
  CHECK(rig.ring->done(ticket, finished).ok());
  CHECK(!finished);
  CHECK(rig.ring->wait(ticket, 0.01).code == StatusCode::timed_out);
  rig.kernel->let_go();
  CHECK_EQUAL(rig.ring->wait(ticket, kPatience).error_number, EIO);
}

template <class Inner>
void a_timeout_dumps_what_is_outstanding_and_leaves_the_ticket() {
  Rig<Inner> rig(
      [](const IoRequest& request, std::uint64_t) { return Fault{.held = request.offset == 2 * kIoBytes}; });
  const Ticket ticket = rig.submit(IoKind::read, rig.in);
  while (rig.kernel->num_kept() == 0) std::this_thread::yield();
  Status status = rig.ring->wait(ticket, 0.05);
  CHECK(status.code == StatusCode::timed_out);
  CHECK(status.detail.starts_with("ticket 1: scratch: read "));
  CHECK(status.detail.find(" of 131072 bytes at offset 0, ") != std::string::npos);
  CHECK(status.detail.ends_with(" s old"));
  rig.kernel->let_go();
  expect_ok(rig.ring->wait(ticket, kPatience));
  CHECK(rig.in == rig.out);
}

template <class Inner>
void destruction_waits_for_slow_requests_and_forgets_the_queue() {
  std::atomic<std::uint64_t> num_offered = 0;
  {
    Rig<Inner> rig([&](const IoRequest&, std::uint64_t) {
      ++num_offered;
      return Fault{.slow = std::chrono::milliseconds(20)};
    });
    rig.submit(IoKind::read, rig.in);
    rig.submit(IoKind::read, rig.in);
    while (num_offered < 4) std::this_thread::yield();
  }
  CHECK(num_offered < 32);
}

// ---- busy seconds ----

// Two reads, held in the kernel together:
//
//     first   |====================|
//     second    |==================|        busy: from the first's begin to the last's end, not the sum
template <class Inner>
void reads_that_overlap_are_busy_once_and_idle_time_is_nobodys() {
  Rig<Inner> rig(
      [](const IoRequest& request, std::uint64_t) { return Fault{.held = request.kind == IoKind::read}; });
  const auto begin = std::chrono::steady_clock::now();
  const Buffer other(rig.in.size(), 3);
  const Ticket first = rig.submit(IoKind::read, rig.in), second = rig.submit(IoKind::read, other);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(rig.ring->counters().read_seconds >= 0.02);
  rig.kernel->let_go();
  expect_ok(rig.ring->wait(first, kPatience));
  expect_ok(rig.ring->wait(second, kPatience));
  const double busy = rig.ring->counters().read_seconds;
  CHECK(busy <= std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK_EQUAL(rig.ring->counters().read_seconds, busy);
  CHECK_EQUAL(rig.ring->counters().write_seconds, 0.0);
  expect_ok(rig.write());
  CHECK(rig.ring->counters().write_seconds > 0);
  CHECK_EQUAL(rig.ring->counters().read_seconds, busy);
}

// ---- syncs ----

template <class Inner>
void a_sync_is_retried_when_interrupted_and_told_when_it_fails() {
  Rig<Inner> rig([](const IoRequest& request, std::uint64_t number) {
    CHECK(request.kind == IoKind::sync);
    return number < 3 ? error(EINTR) : number < 4 ? nothing() : error(EIO);
  });
  const Buffer none(0);
  expect_ok(rig.ring->wait(rig.submit(IoKind::sync, none), kPatience));
  CHECK_EQUAL(rig.ring->counters().requests, 4U);
  const Status status = rig.ring->wait(rig.submit(IoKind::sync, none), kPatience);
  CHECK(status.code == StatusCode::os_error);
  CHECK_EQUAL(status.error_number, EIO);
}

template <class Inner>
void run_all(Suite& suite, const std::string& name) {
#define RUN(test) suite.run(name + ": " #test, test<Inner>)
  RUN(short_reads_are_resubmitted);
  RUN(short_writes_are_resubmitted);
  RUN(an_unaligned_short_direct_read_goes_on_from_an_aligned_place);
  RUN(a_direct_request_that_is_short_twice_in_one_page_gets_on);
  RUN(an_error_in_the_middle_is_told_with_its_place);
  RUN(of_several_failures_the_lowest_is_told);
  RUN(no_bytes_is_an_error_for_both_kinds);
  RUN(an_error_of_one_operation_leaves_the_others_alone);
  RUN(interruptions_are_retried);
  RUN(an_endless_refusal_ends_as_an_error);
  RUN(reads_that_overlap_are_busy_once_and_idle_time_is_nobodys);
  RUN(a_sync_is_retried_when_interrupted_and_told_when_it_fails);
  RUN(a_full_queue_delays_and_loses_nothing);
  RUN(a_failed_operation_is_not_over_while_a_request_is_in_flight);
  RUN(a_timeout_dumps_what_is_outstanding_and_leaves_the_ticket);
  RUN(destruction_waits_for_slow_requests_and_forgets_the_queue);
#undef RUN
}

}  // namespace

int main() {
  Suite suite;
  run_all<ThreadKernel>(suite, "threads");
  if (const Status status = probe_io_uring(); status.ok())
    run_all<UringKernel>(suite, "io_uring");
  else
    std::printf("io_uring tests skipped: %s\n", status.message().c_str());
  return suite.finish("io_faults");
}
