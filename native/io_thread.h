// Starting a thread that a host program will not notice.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace offload_rt {

// Signals stay with the program's own threads: the new one inherits a mask that blocks them all. The name is
// what `top -H` and debuggers show, at most 15 characters.
template <class Body>
[[nodiscard]] std::thread start_io_thread(const char* name, Body&& body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread thread(std::forward<Body>(body));
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread.native_handle(), name);
    return thread;
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
}

}  // namespace offload_rt
