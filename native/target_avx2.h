// Begins a region that is compiled for AVX2 with FMA and F16C, whatever the rest of the file is compiled for;
// target_end.h ends it. Templates and lambdas take their target from the region that they are written in. To
// be included several times; the standard headers come before.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
