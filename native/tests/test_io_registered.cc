// Registered memory: the same bytes by other requests, and proof that those were used.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string>
#include <thread>

#include "check.h"
#include "faulty_ring.h"
#include "io_devices.h"
#include "scratch.h"

using namespace offload_rt;
using namespace offload_rt::testing;

namespace {

constexpr double kPatience = 60;  // seconds; a bound on hanging, not an expectation
constexpr std::uint32_t kIoBytes = 16384;
constexpr std::uint32_t kPieceBytes = 40960;  // not a multiple of kIoBytes: pieces end inside requests

#if defined(__SANITIZE_THREAD__)
constexpr bool kForkAllowed = false;  // the thread sanitizer cannot follow
#else
constexpr bool kForkAllowed = true;
#endif

IoRingPtr open_ring(IoBackend backend = IoBackend::io_uring) {
  IoRingPtr ring;
  const IoRingOptions options{
      .depth = 8, .io_bytes = kIoBytes, .backend = backend, .piece_bytes = kPieceBytes};
  const Status status = open_io_ring(options, ring);
  if (!status.ok()) throw CheckFailed(status.message());
  return ring;
}

void expect_ok(const Status& status) {
  if (!status.ok()) throw CheckFailed(status.message());
}

void transfer(IoRing& ring, IoKind kind, int fd, std::uint64_t offset, std::span<std::byte> bytes) {
  Ticket ticket = 0;
  expect_ok(ring.submit({kind, fd, "scratch", offset, bytes.data(), bytes.size()}, ticket));
  expect_ok(ring.wait(ticket, kPatience));
}

//     memory   [   0   ][   1   ][   2   ][3]     pieces of 40 KiB, the last one short
//               ^ begins and ends anywhere, also across pieces
void fixed_requests_move_the_same_bytes(bool memory) {
  const IoRingPtr ring = open_ring();
  const Buffer out(3 * kPieceBytes + 4096, 1), in(3 * kPieceBytes + 4096, 2);
  const ScratchFile scratch(O_DIRECT);
  if (memory) expect_ok(ring->register_memory(out.span()));
  if (memory) expect_ok(ring->register_memory(in.span()));
  std::uint64_t num_requests = 0, num_bytes = 0;
  for (std::size_t begin = 0; begin < out.size(); begin += 3 * kAlignment)
    for (std::size_t length = kAlignment; begin + length <= out.size(); length += 5 * kAlignment) {
      transfer(*ring, IoKind::write, scratch.fd(), begin, out.span().subspan(begin, length));
      transfer(*ring, IoKind::read, scratch.fd(), begin, in.span().subspan(begin, length));
      CHECK(std::equal(in.data() + begin, in.data() + begin + length, out.data() + begin));
      for (std::size_t at = begin; at < begin + length; num_requests += 2) {
        const std::size_t to_piece_end = memory ? kPieceBytes - at % kPieceBytes : kPieceBytes;
        at += std::min<std::size_t>({kIoBytes, to_piece_end, begin + length - at});
      }
      num_bytes += length;
    }
  const IoCounters counters = ring->counters();
  CHECK_EQUAL(counters.bytes_read, num_bytes);
  CHECK_EQUAL(counters.requests, num_requests);
  CHECK_EQUAL(counters.fixed_memory_requests, memory ? num_requests : 0);
}

void memory_around_a_region_is_plain() {
  const IoRingPtr ring = open_ring();
  const Buffer buffer(4 * kIoBytes);
  const ScratchFile file;
  expect_ok(ring->register_memory(buffer.span().subspan(kIoBytes, kIoBytes)));
  transfer(*ring, IoKind::write, file.fd(), 0, buffer.span());
  CHECK_EQUAL(ring->counters().requests, 4U);
  CHECK_EQUAL(ring->counters().fixed_memory_requests, 1U);
}

void what_is_forgotten_is_plain_again_and_can_be_registered_anew() {
  const IoRingPtr ring = open_ring();
  const ScratchFile file;
  for (int i = 0; i < 2 * kMaxFixedBuffers; ++i) {  // no place of the table is lost
    const Buffer buffer(kAlignment);
    expect_ok(ring->register_memory(buffer.span()));
    expect_ok(ring->forget_memory(buffer.data()));
  }
  const Buffer buffer(kAlignment);
  transfer(*ring, IoKind::write, file.fd(), 0, buffer.span());
  CHECK_EQUAL(ring->counters().fixed_memory_requests, 0U);
  CHECK(ring->forget_memory(buffer.data()).code == StatusCode::invalid);
}

void what_cannot_be_registered_is_refused_and_changes_nothing() {
  const IoRingPtr ring = open_ring();
  const Buffer buffer(8 * kAlignment);
  const auto span = buffer.span();
  CHECK(ring->register_memory(span.subspan(1)).code == StatusCode::invalid);
  CHECK(ring->register_memory({}).code == StatusCode::invalid);
  expect_ok(ring->register_memory(span.subspan(2 * kAlignment, 2 * kAlignment)));
  for (const std::size_t begin : {0, 1, 2, 3})
    CHECK(ring->register_memory(span.subspan(begin * kAlignment, 3 * kAlignment)).code ==
          StatusCode::invalid);
  expect_ok(ring->register_memory(span.subspan(0, 2 * kAlignment)));
  expect_ok(ring->register_memory(span.subspan(4 * kAlignment)));
}

// The second piece cannot be pinned, and the first is let go: its memory can be registered afterwards.
void a_region_is_registered_whole_or_not_at_all() {
  const IoRingPtr ring = open_ring();
  constexpr std::size_t kLength = 2 * kPieceBytes;
  void* const mapped = ::mmap(nullptr, kLength, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const std::span<std::byte> memory(static_cast<std::byte*>(mapped), kLength);
  ::mprotect(memory.data() + kPieceBytes, kPieceBytes, PROT_NONE);
  for (int i = 0; i < 2 * kMaxFixedBuffers; ++i)  // nor is a place of the table lost
    CHECK_EQUAL(ring->register_memory(memory).error_number, EFAULT);
  expect_ok(ring->register_memory(memory.first(kPieceBytes)));
  ::munmap(mapped, kLength);
}

void short_requests_go_on_with_fixed_ones() {
  const IoRingOptions options{.depth = 4, .io_bytes = kIoBytes, .piece_bytes = kPieceBytes};
  std::unique_ptr<UringKernel> inner;
  CHECK(UringKernel::open(options.num_slots(), inner).ok());
  using Kernel = FaultyKernel<UringKernel>;
  const Buffer out(4 * kPieceBytes, 1), in(4 * kPieceBytes, 2);
  const ScratchFile file;
  CHECK_EQUAL(::pwrite(file.fd(), out.data(), out.size(), 0), static_cast<ssize_t>(out.size()));
  const IoRingPtr ring =
      faulty_ring(std::make_unique<Kernel>(std::move(inner),
                                           [](const IoRequest&, std::uint64_t number) {
                                             return Fault{.at_most = number % 2 == 0 ? 5000 : Fault::kAll};
                                           }),
                  options);
  expect_ok(ring->register_memory(in.span()));
  transfer(*ring, IoKind::read, file.fd(), 0, in.span());
  CHECK(in == out);
  CHECK(ring->counters().resubmitted > 0);
  CHECK_EQUAL(ring->counters().fixed_memory_requests, ring->counters().requests);
}

void threads_refuse_and_serve_as_before() {
  const IoRingPtr ring = open_ring(IoBackend::threads);
  const Buffer out(kPieceBytes, 1), in(kPieceBytes, 2);
  const ScratchFile file;
  CHECK_EQUAL(ring->register_memory(in.span()).error_number, EOPNOTSUPP);
  transfer(*ring, IoKind::write, file.fd(), 0, out.span());
  transfer(*ring, IoKind::read, file.fd(), 0, in.span());
  CHECK(in == out);
  CHECK_EQUAL(ring->counters().fixed_memory_requests, 0U);
}

// RLIMIT_MEMLOCK counts registered memory for ordinary users, not for root.
void beyond_the_limit_an_ordinary_user_is_refused_and_reads_all_the_same() {
  const Buffer out(1 << 20, 1), in(1 << 20, 2);
  const ScratchFile file(O_DIRECT);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto run = [&] {
      constexpr rlimit kLimit{64 << 10, 64 << 10};
      if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) return 2;
      if (::setrlimit(RLIMIT_MEMLOCK, &kLimit) != 0) return 3;
      const IoRingPtr ring = open_ring();
      if (ring->register_memory(in.span()).error_number != ENOMEM) return 4;
      transfer(*ring, IoKind::write, file.fd(), 0, out.span());
      transfer(*ring, IoKind::read, file.fd(), 0, in.span());
      if (ring->counters().fixed_memory_requests != 0 || !(in == out)) return 5;
      if (!ring->register_memory(in.span().first(16 << 10)).ok()) return 6;  // within the limit
      transfer(*ring, IoKind::read, file.fd(), 0, in.span().first(16 << 10));
      return ring->counters().fixed_memory_requests == 1 ? 7 : 8;
    };
    int code = 1;
    try {
      code = run();
    } catch (const CheckFailed&) {
    }
    ::_exit(code);
  }
  int how = 0;
  ::waitpid(child, &how, 0);
  CHECK(WIFEXITED(how));
  CHECK_EQUAL(WEXITSTATUS(how), 7);
}

// A drive that has stopped does not stop the other one, whoever was asked first. (A memfd is another device.)
void devices_take_turns() {
  const IoRingOptions options{.depth = 2, .io_bytes = 4096};
  std::unique_ptr<ThreadKernel> inner;
  CHECK(ThreadKernel::open(options.num_slots(), inner).ok());
  const ScratchFile disk;
  const int memory = ::memfd_create("other device", MFD_CLOEXEC);
  const Buffer out(64 * 4096, 1);
  using Kernel = FaultyKernel<ThreadKernel>;
  auto faulty = std::make_unique<Kernel>(std::move(inner), [&](const IoRequest& request, std::uint64_t) {
    return Fault{.held = request.fd == disk.fd()};
  });
  Kernel* const kernel = faulty.get();
  const IoRingPtr ring = faulty_ring(std::move(faulty), options);
  Ticket stopped = 0;
  expect_ok(ring->submit({IoKind::write, disk.fd(), "stopped", 0, out.data(), out.size()}, stopped));
  transfer(*ring, IoKind::write, memory, 0, out.span());
  while (kernel->num_kept() < 2) std::this_thread::yield();
  const Status tuned = ring->tune(memory, 1, 16384);
  const std::uint64_t before = ring->counters().requests;
  transfer(*ring, IoKind::write, memory, 0, out.span());
  const IoCounters counters = ring->counters();
  kernel->let_go();
  expect_ok(ring->wait(stopped, kPatience));
  expect_ok(tuned);
  CHECK_EQUAL(counters.requests - before, 16U);
  CHECK_EQUAL(counters.max_in_flight, 4U);  // two of the stopped one's, two of the other's
  for (const unsigned depth : {0, 3}) CHECK(ring->tune(memory, depth, 4096).code == StatusCode::invalid);
  CHECK(ring->tune(memory, 1, 5000).code == StatusCode::invalid);
  CHECK_EQUAL(ring->tune(987'654, 1, 4096).error_number, EBADF);
  ::close(memory);
}

//     A  [1][2]        turns: A B A B, then B alone, up to its depth
//     B  [3][4][5]
void a_turn_is_one_request() {
  IoDevices<int> devices(/*depth=*/3, kIoBytes);
  std::array operations{1, 2, 3, 4, 5};
  for (int& operation : operations) devices.of(operation < 3 ? 10 : 20).queue.push_back(&operation);
  std::string turns;
  while (IoDevice<int>* device = devices.next()) {
    turns += std::to_string(*device->queue.front()) + ' ';
    device->queue.pop_front();
    device->in_flight++;
  }
  CHECK_EQUAL(turns, "1 3 2 4 5 ");
  CHECK(devices.idle());
}

}  // namespace

int main() {
  Suite suite;
#define RUN(test) suite.run(#test, [] { test; })
  RUN(threads_refuse_and_serve_as_before());
  RUN(devices_take_turns());
  RUN(a_turn_is_one_request());
  if (const Status status = probe_io_uring(); status.ok()) {
    RUN(fixed_requests_move_the_same_bytes(true));
    RUN(fixed_requests_move_the_same_bytes(false));
    RUN(memory_around_a_region_is_plain());
    RUN(what_is_forgotten_is_plain_again_and_can_be_registered_anew());
    RUN(what_cannot_be_registered_is_refused_and_changes_nothing());
    RUN(a_region_is_registered_whole_or_not_at_all());
    RUN(short_requests_go_on_with_fixed_ones());
    if (kForkAllowed) RUN(beyond_the_limit_an_ordinary_user_is_refused_and_reads_all_the_same());
  } else {
    std::printf("io_uring tests skipped: %s\n", status.message().c_str());
  }
#undef RUN
  return suite.finish("io_registered");
}
