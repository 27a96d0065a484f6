#include "execution.h"

#include <dlfcn.h>

namespace offload_rt {

// Looked up at each call, because torch may be imported after this library was used.
Team openmp_team() { return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

}  // namespace offload_rt
