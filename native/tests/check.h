// Checks for the native tests: a failed one throws, and the suite prints which and where. Not a framework.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

namespace offload_rt::testing {

struct CheckFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(bool holds, const char* what, const char* file, int line) {
  if (!holds) throw CheckFailed(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (a == b) return;
  std::ostringstream text;
  text << file << ":" << line << ": " << what << " (" << a << " and " << b << ")";
  throw CheckFailed(text.str());
}

#define CHECK(condition) ::offload_rt::testing::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(a, b) ::offload_rt::testing::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

class Suite {
 public:
  template <class Test>
  void run(const std::string& name, Test&& test) {
    ++num_run_;
    try {
      test();
    } catch (const std::exception& error) {
      ++num_failed_;
      std::printf("FAILED %s\n       %s\n", name.c_str(), error.what());
    }
  }

  // What main returns.
  [[nodiscard]] int finish(const char* suite) const {
    std::printf("%-16s %d run, %d failed\n", suite, num_run_, num_failed_);
    return num_failed_ == 0 ? 0 : 1;
  }

 private:
  int num_run_ = 0;
  int num_failed_ = 0;
};

}  // namespace offload_rt::testing
