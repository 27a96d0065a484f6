// Random operations through a randomly failing kernel, against a model: the file as a plain array of bytes.
//
// A round starts operations on ranges of the file that do not overlap, waits for all, and compares the whole
// file and all memory. Some requests are short, interrupted, refused, late; a few pages are bad for good, and
// every operation that touches one must fail, naming a place at or before it, while all others are right to
// the byte.
//
//     file    |---- op 0 ----|  |-- op 1 --X--|      |---- op 2 ----|      X: a bad page
//
// IO_FUZZ_SEEDS=n runs n seeds instead of 12, IO_FUZZ_FIRST=s starts at s: a failure names its seed.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>

#include "check.h"
#include "faulty_ring.h"
#include "scratch.h"

using namespace offload_rt;
using namespace offload_rt::testing;

namespace {

constexpr double kPatience = 60;  // seconds; a bound on hanging, not an expectation
constexpr std::size_t kFileBytes = 64 * kAlignment;
constexpr int kRounds = 4;

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  // In [low, high].
  std::uint64_t between(std::uint64_t low, std::uint64_t high) {
    return std::uniform_int_distribution<std::uint64_t>(low, high)(engine_);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }

 private:
  std::mt19937 engine_;
};

struct Operation {
  IoKind kind = IoKind::read;
  std::size_t offset = 0, length = 0;
  Ticket ticket = 0;
  bool failed = false;
};

template <class Inner>
class Scenario {
 public:
  Scenario(std::uint32_t seed, bool may_register)
      : random_(seed),
        faults_(seed + 1),
        direct_(random_.chance(0.5)),
        unit_(direct_ ? kAlignment : 1),
        file_(direct_ ? O_DIRECT : 0),
        model_(kFileBytes, seed),
        memory_(kFileBytes) {
    CHECK_EQUAL(::pwrite(file_.fd(), model_.data(), kFileBytes, 0), static_cast<ssize_t>(kFileBytes));
    const IoRingOptions options{
        .depth = static_cast<unsigned>(random_.between(1, 12)),
        .io_bytes = static_cast<std::uint32_t>(kAlignment * random_.between(1, 8)),
        .piece_bytes = static_cast<std::uint32_t>(kAlignment * random_.between(1, 40))};
    std::unique_ptr<Inner> inner;
    CHECK(Inner::open(options.num_slots(), inner).ok());
    auto faulty = std::make_unique<FaultyKernel<Inner>>(
        std::move(inner), [this](const IoRequest& request, std::uint64_t) { return fault(request); });
    ring_ = faulty_ring(std::move(faulty), options);
    if (may_register && random_.chance(0.7)) {
      const std::size_t begin = kAlignment * random_.between(0, 20),
                        end = kAlignment * random_.between(40, 64);
      CHECK(ring_->register_memory(memory_.span().subspan(begin, end - begin)).ok());
    }
    if (random_.chance(0.5))
      CHECK(ring_
                ->tune(file_.fd(), static_cast<unsigned>(random_.between(1, options.depth)),
                       static_cast<std::uint32_t>(kAlignment * random_.between(1, 8)))
                .ok());
  }

  void run() {
    for (int round = 0; round < kRounds; ++round) {
      bad_pages_.clear();
      while (random_.chance(0.4)) bad_pages_.insert(random_.between(0, kFileBytes / kAlignment - 1));
      const Buffer before(kFileBytes, static_cast<std::uint32_t>(random_.between(0, ~0U)));
      std::memcpy(memory_.data(), before.data(), kFileBytes);
      std::vector<Operation> operations = start();
      std::shuffle(operations.begin(), operations.end(), std::minstd_rand(static_cast<unsigned>(round)));
      for (Operation& operation : operations) judge(operation, before);
      compare(before, operations);
    }
    CHECK_EQUAL(ring_->outstanding(), "");
    CHECK(ring_->close().ok());
  }

 private:
  // Runs on the ring's thread, which alone uses faults_.
  Fault fault(const IoRequest& request) {
    if (const auto bad = bad_pages_.lower_bound(request.offset / kAlignment);
        bad != bad_pages_.end() && *bad * kAlignment < request.offset + request.length)
      return {.error_number = EIO};
    if (faults_.chance(0.05)) return {.error_number = faults_.chance(0.5) ? EINTR : EAGAIN};
    if (faults_.chance(0.05)) return {.refused = true};
    Fault fault;
    if (faults_.chance(0.2)) {
      const std::uint32_t step = direct_ ? 512 : 1;  // what a drive would stop at
      if (request.length > step)
        fault.at_most = step * static_cast<std::uint32_t>(faults_.between(1, request.length / step));
    }
    if (faults_.chance(0.02)) fault.slow = std::chrono::milliseconds(1);
    return fault;
  }

  std::vector<Operation> start() {
    std::vector<Operation> operations;
    for (std::size_t at = 0; at < kFileBytes;) {
      at += unit_ * random_.between(0, 9 * kAlignment / unit_);
      const std::size_t length = unit_ * random_.between(0, 30 * kAlignment / unit_);
      if (at + length > kFileBytes) break;
      Operation operation{random_.chance(0.5) ? IoKind::read : IoKind::write, at, length};
      CHECK(ring_
                ->submit({operation.kind, file_.fd(), "scratch", at, memory_.data() + at, length},
                         operation.ticket)
                .ok());
      operations.push_back(operation);
      at += length;
    }
    return operations;
  }

  void judge(Operation& operation, const Buffer& before) {
    const Status status = ring_->wait(operation.ticket, kPatience);
    std::byte* const in_file = model_.data() + operation.offset;
    const auto first_bad = bad_pages_.lower_bound(operation.offset / kAlignment);
    const bool bad = operation.length > 0 && first_bad != bad_pages_.end() &&
                     *first_bad * kAlignment < operation.offset + operation.length;
    if (!bad) {
      if (!status.ok()) throw CheckFailed(status.message());
      if (operation.kind == IoKind::write)
        std::memcpy(in_file, before.data() + operation.offset, operation.length);
      return;
    }
    operation.failed = true;
    CHECK(status.code == StatusCode::os_error);
    CHECK_EQUAL(status.error_number, EIO);
    CHECK(status.failed_at >= operation.offset);
    CHECK(status.failed_at <= std::max<std::uint64_t>(*first_bad * kAlignment, operation.offset));
    CHECK(status.done < operation.length);
    if (operation.kind == IoKind::write) {  // some of it arrived, nobody promised which
      Buffer found(kFileBytes);
      CHECK_EQUAL(::pread(file_.fd(), found.data(), kFileBytes, 0), static_cast<ssize_t>(kFileBytes));
      for (std::size_t i = 0; i < operation.length; ++i) {
        const std::byte now = found.data()[operation.offset + i];
        CHECK(now == in_file[i] || now == before.data()[operation.offset + i]);
        in_file[i] = now;
      }
    }
  }

  void compare(const Buffer& before, const std::vector<Operation>& operations) {
    Buffer found(kFileBytes);
    CHECK_EQUAL(::pread(file_.fd(), found.data(), kFileBytes, 0), static_cast<ssize_t>(kFileBytes));
    CHECK(found == model_);
    // Memory is as it was, but for what was read; a failed read leaves each byte old or right.
    const Buffer expected(kFileBytes);
    std::memcpy(expected.data(), before.data(), kFileBytes);
    for (const Operation& operation : operations) {
      if (operation.kind == IoKind::write) continue;
      const std::size_t end = operation.offset + operation.length;
      for (std::size_t i = operation.offset; i < end; ++i)
        if (!operation.failed || memory_.data()[i] != before.data()[i]) expected.data()[i] = model_.data()[i];
    }
    CHECK(memory_ == expected);
  }

  Random random_, faults_;
  const bool direct_;
  const std::size_t unit_;
  std::set<std::uint64_t> bad_pages_;  // changed only while nothing is under way
  ScratchFile file_;
  Buffer model_, memory_;
  IoRingPtr ring_;  // last: gone before the buffers
};

template <class Inner>
void run_all(Suite& suite, const std::string& name, bool may_register) {
  const char* const first_text = std::getenv("IO_FUZZ_FIRST");
  const char* const count_text = std::getenv("IO_FUZZ_SEEDS");
  const auto first = first_text != nullptr ? static_cast<std::uint32_t>(std::atoi(first_text)) : 0;
  const auto count = count_text != nullptr ? static_cast<std::uint32_t>(std::atoi(count_text)) : 12;
  for (std::uint32_t seed = first; seed < first + count; ++seed)
    suite.run(name + ": seed " + std::to_string(seed), [&] { Scenario<Inner>(seed, may_register).run(); });
}

}  // namespace

int main() {
  Suite suite;
  run_all<ThreadKernel>(suite, "threads", false);
  if (const Status status = probe_io_uring(); status.ok())
    run_all<UringKernel>(suite, "io_uring", true);
  else
    std::printf("io_uring tests skipped: %s\n", status.message().c_str());
  return suite.finish("io_fuzz");
}
