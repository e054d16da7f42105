// Everything that needs real hardware, one function each: Hopper's instructions for the kernels, and in hw_launch.cuh
// the CUDA runtime for the launchers. The emulator of the tests has the same functions for g++, so the kernels and
// launchers above them compile there unchanged.
#pragma once
#ifndef PPG_EMULATED
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

namespace hw {

// ---- device: every architecture ----
__device__ __forceinline__ unsigned char* smem() {
  extern __shared__ __align__(128) unsigned char raw[];
  return raw;
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float bits_to_float(uint32_t w) { return __uint_as_float(w); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t funnel(uint32_t lo, uint32_t hi, unsigned shift) {
  return __funnelshift_r(lo, hi, shift);
}
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
}
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
}
__device__ __forceinline__ float half_to_float(uint32_t w) {
  float x;
  asm("{ .reg .b16 a; cvt.u16.u32 a, %1; cvt.f32.f16 %0, a; }" : "=f"(x) : "r"(w));
  return x;
}
// The largest of a warp's values, none of them NaN: by one instruction, as integers in the order of the floats.
__device__ __forceinline__ float warp_max(float x) {
  const auto ordered = [](int i) { return i ^ ((i >> 31) & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}
// A plain load: the row may be overwritten later, which rules out the read-only path.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
// Streaming store: the value is not read again by this kernel.
__device__ __forceinline__ void store16(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }
// A value that another CTA of this launch has written: bypasses L1, which may be stale.
__device__ __forceinline__ float load_shared_by_all(const float* p) { return __ldcg(p); }
// The number of tickets drawn before this one. Orders memory: what earlier drawers had written before is visible.
__device__ __forceinline__ unsigned draw_ticket(uint32_t* counter) {
  __threadfence();
  const unsigned ticket = atomicAdd(counter, 1u);
  __threadfence();
  return ticket;
}

// Programmatic dependent launch, see Order below; nothing before sm_90.
__device__ __forceinline__ void let_followers_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns once the launch that this one follows is complete and all that it wrote is visible; at once for others.
__device__ __forceinline__ void wait_for_leader() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- device: clusters, mbarriers, bulk copies (sm_90 and later) ----
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void bar_init(uint64_t* bar, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(addr(bar)), "r"(count) : "memory");
}
// Makes the initialised barriers visible to the copy engine and to the other CTAs.
__device__ __forceinline__ void fence_bar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void bar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(addr(bar)) : "memory");
}
// The same at the same address in CTA `rank` of the cluster, for one who has read and let others write: what it has
// read is there, so no release at cluster scope is needed, which would wait for all its stores to global memory.
__device__ __forceinline__ void bar_arrive(uint64_t* bar, unsigned rank) {
  asm volatile("{ .reg .b32 b; mapa.shared::cluster.u32 b, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [b]; }" ::"r"(
                   addr(bar)),
               "r"(rank)
               : "memory");
}
// One arrival that also announces `bytes` still to be delivered.
__device__ __forceinline__ void bar_expect(uint64_t* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(addr(bar)), "r"(bytes) : "memory");
}
// Whether the phase of this parity has completed, after a short wait for it. CLUSTER: what other CTAs sent is visible
// too.
template <bool CLUSTER> __device__ __forceinline__ bool bar_try(uint64_t* bar, unsigned parity) {
  unsigned done;
  if constexpr (CLUSTER)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
        "}"
        : "=r"(done)
        : "r"(addr(bar)), "r"(parity)
        : "memory");
  else
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(addr(bar)), "r"(parity)
        : "memory");
  return done;
}
#ifdef PPG_WATCHDOG
__device__ __forceinline__ long long cycles() { return clock64(); }
// Traps as a failed assert does: file and line, block and thread on stderr, an error for every later call.
__device__ __forceinline__ void stuck(const char* file, unsigned line) {
  __assert_fail("a phase of an mbarrier never completed", file, line, "bar_wait");
  __builtin_unreachable();
}
#endif
// Bulk copy global -> shared; both addresses and the size are multiples of 16. The source is read once: evict first
// from L2.
__device__ __forceinline__ void copy_in(void* dst, const void* src, unsigned bytes, uint64_t* bar) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(addr(dst)),
      "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(addr(bar)), "l"(policy)
      : "memory");
}
// 16 bytes to the same shared-memory address in CTA `rank` of the cluster, counted on that CTA's barrier.
__device__ __forceinline__ void send(float4 v, void* dst, uint64_t* bar, unsigned rank) {
  asm volatile(
      "{ .reg .b32 d, b; mapa.shared::cluster.u32 d, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [d], {%3, %4, %5, %6}, [b]; }" ::"r"(addr(dst)),
      "r"(addr(bar)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void send(float v, void* dst, uint64_t* bar, unsigned rank) {
  asm volatile(
      "{ .reg .b32 d, b; mapa.shared::cluster.u32 d, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [d], %3, [b]; }" ::"r"(addr(dst)),
      "r"(addr(bar)), "r"(rank), "r"(float_to_bits(v))
      : "memory");
}
// Orders this thread's ordinary shared-memory stores before later copies into the same bytes.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

}  // namespace hw

#include "hw_launch.cuh"
#endif

// ---- on top of either ----
#if defined(PPG_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace hw {

constexpr long long WATCHDOG_CYCLES = 1ll << 33;  // 4 to 6 seconds; not tries, which take what the hardware likes

// Returns once the phase of this parity has completed. Built with PPG_WATCHDOG, a wait that lasts WATCHDOG_CYCLES ends
// the launch and tells its place; without, it would last for ever.
template <bool CLUSTER = false>
__device__ __forceinline__ void bar_wait(uint64_t* bar, unsigned parity, const char* file = __builtin_FILE(),
                                         unsigned line = __builtin_LINE()) {
#ifdef PPG_WATCHDOG
  for (const long long start = cycles(); !bar_try<CLUSTER>(bar, parity);)
    if (cycles() - start > WATCHDOG_CYCLES) stuck(file, line);
#else
  while (!bar_try<CLUSTER>(bar, parity)) {}
#endif
}

}  // namespace hw
#endif
