// The two real back ends, behind one interface: every test runs on both, and what differs between them is a
// bug.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <thread>
#include <vector>

#include "check.h"
#include "io_ring.h"
#include "io_uring_abi.h"
#include "scratch.h"

using namespace offload_rt;
using namespace offload_rt::testing;

namespace {

constexpr double kPatience = 60;  // seconds; a bound on hanging, not an expectation

#if defined(__SANITIZE_THREAD__)
constexpr bool kForkAllowed = false;  // the thread sanitizer cannot follow
#else
constexpr bool kForkAllowed = true;
#endif

IoRingPtr open_ring(IoBackend backend, unsigned depth = 8, std::uint32_t io_bytes = 16384) {
  IoRingPtr ring;
  const Status status = open_io_ring({.depth = depth, .io_bytes = io_bytes, .backend = backend}, ring);
  if (!status.ok()) throw CheckFailed(status.message());
  return ring;
}

Ticket submit(IoRing& ring, IoKind kind, int fd, std::uint64_t offset, std::span<std::byte> bytes) {
  Ticket ticket = 0;
  const Status status = ring.submit({kind, fd, "scratch", offset, bytes.data(), bytes.size()}, ticket);
  if (!status.ok()) throw CheckFailed(status.message());
  return ticket;
}

void expect_ok(const Status& status) {
  if (!status.ok()) throw CheckFailed(status.message());
}

void round_trips_at_every_edge(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  for (const std::size_t length : {0, 1, 63, 64, 65, 4095, 4096, 4097, 16383, 16384, 16385, 1'000'003}) {
    const ScratchFile file;
    const Buffer out(length, 1), in(length, 2);
    for (const std::uint64_t offset : {0, 1, 4095}) {
      expect_ok(ring->wait(submit(*ring, IoKind::write, file.fd(), offset, out.span()), kPatience));
      expect_ok(ring->wait(submit(*ring, IoKind::read, file.fd(), offset, in.span()), kPatience));
      CHECK(in == out);
    }
  }
  CHECK_EQUAL(ring->counters().bytes_read, ring->counters().bytes_written);
  CHECK_EQUAL(ring->counters().resubmitted, 0U);
  CHECK_EQUAL(ring->outstanding(), "");
}

void direct_io_round_trips(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file(O_DIRECT);
  const Buffer out(37 * kAlignment, 1), in(37 * kAlignment, 2);
  expect_ok(ring->wait(submit(*ring, IoKind::write, file.fd(), kAlignment, out.span()), kPatience));
  expect_ok(ring->wait(submit(*ring, IoKind::read, file.fd(), kAlignment, in.span()), kPatience));
  CHECK(in == out);
  // 4 pages to a request.
  CHECK_EQUAL(ring->counters().requests, 20U);
}

void end_of_a_direct_file_is_an_error_also_when_it_is_not_aligned(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file(O_DIRECT);
  CHECK_EQUAL(::ftruncate(file.fd(), 5000), 0);
  const Buffer in(4 * kAlignment);
  const Status status = ring->wait(submit(*ring, IoKind::read, file.fd(), 0, in.span()), kPatience);
  CHECK(status.code == StatusCode::end_of_file);
  CHECK_EQUAL(status.done, 5000U);
  CHECK_EQUAL(status.failed_at, 5000U);
}

void depth_bounds_the_requests_in_flight_and_is_reached(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend, 4, 4096);
  const ScratchFile file;
  const Buffer out(64 * 4096);
  expect_ok(ring->wait(submit(*ring, IoKind::write, file.fd(), 0, out.span()), kPatience));
  CHECK_EQUAL(ring->counters().max_in_flight, 4U);
  CHECK_EQUAL(ring->counters().requests, 64U);
}

void many_threads_with_many_operations_each(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend, 8, 4096);
  const ScratchFile file;
  constexpr std::size_t kThreads = 4, kOperations = 40, kLength = 10'001;
  std::array<bool, kThreads> right{};
  {
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        std::vector<Buffer> out, in;
        std::vector<Ticket> tickets;
        const auto offset = [t](std::size_t i) { return (t * kOperations + i) * kLength; };
        for (std::size_t i = 0; i < kOperations; ++i) {
          out.emplace_back(kLength, static_cast<std::uint32_t>(t * 1000 + i));
          in.emplace_back(kLength);
          tickets.push_back(submit(*ring, IoKind::write, file.fd(), offset(i), out[i].span()));
        }
        bool all = true;
        for (const Ticket ticket : tickets) all &= ring->wait(ticket, kPatience).ok();
        tickets.clear();
        for (std::size_t i = 0; i < kOperations; ++i)
          tickets.push_back(submit(*ring, IoKind::read, file.fd(), offset(i), in[i].span()));
        for (std::size_t i = kOperations; i-- > 0;)  // not in the order of submission
          all &= ring->wait(tickets[i], kPatience).ok() && in[i] == out[i];
        right[t] = all;
      });
    for (std::thread& thread : threads) thread.join();
  }
  for (const bool all : right) CHECK(all);
  CHECK_EQUAL(ring->counters().operations, 2 * kThreads * kOperations);
}

void what_is_under_way_is_recorded_while_others_submit_and_ask(IoBackend backend) {
  constexpr std::size_t kLength = 4096, kThreads = 3, kRounds = 40;
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file;
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&] {
      const Buffer buffer(kLength, 1);
      for (std::size_t i = 0; i < kRounds; ++i)
        static_cast<void>(ring->wait(submit(*ring, IoKind::write, file.fd(), 0, buffer.span()), kPatience));
    });
  bool right = true;
  for (std::size_t i = 0; i < kRounds; ++i) {
    if (i % 8 == 0) ring->record(i);
    for (const IoRecord& each : ring->records().operations) {
      const bool begun = each.begun_seconds >= 0, finished = each.finished_seconds >= 0;
      right &= each.length == kLength && (!begun || each.submitted_seconds <= each.begun_seconds);
      right &= !finished || (begun && each.begun_seconds <= each.finished_seconds);
    }
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right);
  ring->record(kThreads * kRounds);
  CHECK(ring->records().operations.empty());
}

void a_sync_is_a_request_of_its_own_and_moves_nothing(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file;
  const Buffer out(100);
  expect_ok(ring->wait(submit(*ring, IoKind::write, file.fd(), 0, out.span()), kPatience));
  expect_ok(ring->wait(submit(*ring, IoKind::sync, file.fd(), 0, {}), kPatience));
  CHECK_EQUAL(ring->counters().requests, 2U);
  CHECK_EQUAL(ring->counters().bytes_written, 100U);
}

void a_sync_reports_what_the_kernel_says(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  std::array<int, 2> ends{};
  CHECK_EQUAL(::pipe2(ends.data(), O_CLOEXEC), 0);  // a pipe has nothing to sync
  const Status status = ring->wait(submit(*ring, IoKind::sync, ends[1], 0, {}), kPatience);
  for (const int end : ends) ::close(end);
  CHECK(status.code == StatusCode::os_error);
  CHECK_EQUAL(status.error_number, EINVAL);
  CHECK_EQUAL(status.message(),
              "scratch: fdatasync 0 of 0 bytes at offset 0 (errno 22, EINVAL, failed at offset 0)");
}

void a_closed_descriptor_is_an_error_with_evidence(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const Buffer buffer(100);
  const Status status = ring->wait(submit(*ring, IoKind::read, 987'654, 8192, buffer.span()), kPatience);
  CHECK(status.code == StatusCode::os_error);
  CHECK_EQUAL(status.message(),
              "scratch: read 0 of 100 bytes at offset 8192 (errno 9, EBADF, failed at offset 8192)");
}

void a_full_device_is_an_error(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const int fd = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  const Buffer buffer(100'000);
  const Status status = ring->wait(submit(*ring, IoKind::write, fd, 0, buffer.span()), kPatience);
  ::close(fd);
  CHECK_EQUAL(status.error_number, ENOSPC);
  CHECK_EQUAL(status.done, 0U);
}

void a_ticket_is_waited_for_once(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file;
  const Buffer buffer(100);
  const Ticket ticket = submit(*ring, IoKind::write, file.fd(), 0, buffer.span());
  expect_ok(ring->wait(ticket, kPatience));
  bool finished = false;
  CHECK(ring->wait(ticket, 0).code == StatusCode::unknown_ticket);
  CHECK(ring->done(ticket, finished).code == StatusCode::unknown_ticket);
  CHECK(ring->wait(ticket + 1, 0).code == StatusCode::unknown_ticket);
}

void close_finishes_what_was_submitted_and_tells_a_failure_nobody_waited_for(IoBackend backend) {
  const IoRingPtr ring = open_ring(backend);
  const ScratchFile file;
  const Buffer out(1'000'000, 1), in(1'000'000, 2);
  const Ticket write = submit(*ring, IoKind::write, file.fd(), 0, out.span());
  const Ticket lost = submit(*ring, IoKind::read, 987'654, 0, in.span());
  CHECK_EQUAL(ring->close().error_number, EBADF);
  expect_ok(ring->close());
  expect_ok(ring->wait(write, 0));
  CHECK_EQUAL(ring->wait(lost, 0).error_number, EBADF);
  Ticket ticket = 0;
  CHECK(ring->submit({.path = "scratch"}, ticket).code == StatusCode::closed);
}

// The buffer goes right after the ring: the address sanitizer sees a request that outlives the ring.
void destruction_waits_for_what_is_in_flight(IoBackend backend) {
  const ScratchFile file;
  CHECK_EQUAL(::ftruncate(file.fd(), 64 << 20), 0);
  for (int i = 0; i < 4; ++i) {
    const Buffer in(8 << 20);
    const IoRingPtr ring = open_ring(backend, 8, 1 << 17);
    for (std::size_t j = 0; j < 8; ++j)
      submit(*ring, IoKind::read, file.fd(), 0, in.span().subspan(j << 20, 1 << 20));
  }
}

void options_out_of_range_are_refused(IoBackend backend) {
  IoRingPtr ring;
  for (const IoRingOptions& options : {IoRingOptions{.depth = 0}, IoRingOptions{.depth = 5000},
                                       IoRingOptions{.io_bytes = 0}, IoRingOptions{.io_bytes = 5000}}) {
    IoRingOptions asked = options;
    asked.backend = backend;
    CHECK(open_io_ring(asked, ring).code == StatusCode::invalid);
  }
  ring = open_ring(backend);
  Ticket ticket = 0;
  CHECK(ring->submit({.path = "scratch", .offset = ~0ULL - 5, .length = 10}, ticket).code ==
        StatusCode::invalid);
}

template <class Body>
int exit_code_of_child(Body&& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int how = 0;
  ::waitpid(child, &how, 0);
  return WIFEXITED(how) ? WEXITSTATUS(how) : -1;
}

void a_forked_child_can_drop_the_ring_but_not_use_it(IoBackend backend) {
  IoRingPtr ring = open_ring(backend);
  const ScratchFile file;
  const Buffer buffer(100'000);
  const Ticket ticket = submit(*ring, IoKind::write, file.fd(), 0, buffer.span());
  const int code = exit_code_of_child([&] {
    Ticket fresh = 0;
    const bool refused = ring->wait(ticket, 0).code == StatusCode::invalid &&
                         ring->submit({.path = "scratch"}, fresh).code == StatusCode::invalid;
    ring.reset();
    return refused ? 7 : 1;
  });
  CHECK_EQUAL(code, 7);
  expect_ok(ring->wait(ticket, kPatience));
}

// As a container's seccomp profile does.
bool forbid_io_uring() {
  std::array program{
      sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, io_uring_abi::kSysSetup, 0, 1),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{program.size(), program.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

void threads_serve_where_the_kernel_refuses_io_uring() {
  const int code = exit_code_of_child([] {
    if (!forbid_io_uring()) return 7;  // nothing to see on this kernel
    IoRingPtr ring;
    if (!open_io_ring({.depth = 2}, ring).ok() || ring->backend() != IoBackend::threads) return 1;
    if (ring->fallback_reason() != "io_uring_setup (errno 1, EPERM)") return 2;
    if (open_io_ring({.backend = IoBackend::io_uring}, ring).error_number != EPERM) return 3;
    return probe_io_uring().error_number == EPERM ? 7 : 4;
  });
  CHECK_EQUAL(code, 7);
}

void run_all(Suite& suite, const std::string& name, IoBackend backend) {
#define RUN(test) suite.run(name + ": " #test, [&] { test(backend); })
  RUN(round_trips_at_every_edge);
  RUN(direct_io_round_trips);
  RUN(end_of_a_direct_file_is_an_error_also_when_it_is_not_aligned);
  RUN(depth_bounds_the_requests_in_flight_and_is_reached);
  RUN(many_threads_with_many_operations_each);
  RUN(what_is_under_way_is_recorded_while_others_submit_and_ask);
  RUN(a_sync_is_a_request_of_its_own_and_moves_nothing);
  RUN(a_sync_reports_what_the_kernel_says);
  RUN(a_closed_descriptor_is_an_error_with_evidence);
  RUN(a_full_device_is_an_error);
  RUN(a_ticket_is_waited_for_once);
  RUN(close_finishes_what_was_submitted_and_tells_a_failure_nobody_waited_for);
  RUN(destruction_waits_for_what_is_in_flight);
  RUN(options_out_of_range_are_refused);
  if (kForkAllowed) RUN(a_forked_child_can_drop_the_ring_but_not_use_it);
#undef RUN
}

}  // namespace

int main() {
  Suite suite;
  if (kForkAllowed)
    suite.run("threads_serve_where_the_kernel_refuses_io_uring",
              threads_serve_where_the_kernel_refuses_io_uring);
  run_all(suite, "threads", IoBackend::threads);
  if (const Status status = probe_io_uring(); status.ok())
    run_all(suite, "io_uring", IoBackend::io_uring);
  else
    std::printf("io_uring tests skipped: %s\n", status.message().c_str());
  return suite.finish("io_ring");
}
