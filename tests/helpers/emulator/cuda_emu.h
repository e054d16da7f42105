// Test only: our kernels' subset of CUDA on a CPU. Included before every .cu file of the emulated build; has the
// functions of csrc/cuda/hw.cuh, so that kernels and launchers compile unchanged. One fiber a thread, all CTAs of a
// cluster alive together.
//
// Adversarial on purpose: random order of warps and lanes, a CTA that starts late, bulk copies and remote stores that
// land late and in any order, the target of a copy poisoned while it is in flight, fresh shared memory poisoned, a
// launch that another follows run as late as when that one waits for it.
// Reports: divergent collectives, deadlock, misaligned or out-of-place copies, bad barrier counts, uninitialised
// barriers, sends to a CTA that has left, leaving with copies in flight, a thread that does not wait for the launch
// that its own follows. Where nothing can go on, time passes until the watchdog of a wait tells which; an arrival can
// be lost on purpose.
//
// Cannot see: memory ordering (fences, acquire/release, proxies), bank conflicts, timing, forward-progress rules of
// real hardware.
#pragma once
#include <cmath>

#include "leader.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

#define threadIdx (emu::me->tid)
#define blockIdx (dim3{emu::me->cta->block, 0, 0})
#define blockDim (dim3{emu::block_dim, 1, 1})
#define gridDim (dim3{emu::grid_dim, 1, 1})
inline void __syncthreads() {
  emu::me->op = 0;
  emu::pause(emu::BLOCK);
}
inline void __syncwarp(unsigned = ~0u) { emu::exchange(0, 0, 1); }
template <class T> T __shfl_xor_sync(unsigned, T v, int m) { return emu::exchange(v, (emu::me->tid.x & 31) ^ m, 2); }

namespace hw {
inline unsigned char* smem() { return emu::me->cta->smem; }
inline float ex2(float x) {  // flushes like .ftz
  const float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.f : y;
}
inline float rcp(float x) { return 1.f / x; }
inline float bits_to_float(uint32_t w) {
  float x;
  std::memcpy(&x, &w, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t w;
  std::memcpy(&w, &x, 4);
  return w;
}
inline uint32_t funnel(uint32_t lo, uint32_t hi, unsigned s) {
  return (uint32_t)(((uint64_t)hi << 32 | lo) >> (s & 31));
}
inline uint32_t bf16(float x) {
  const uint32_t w = float_to_bits(x);
  return x != x ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}
inline uint32_t f16(float x) {
  const _Float16 h = (_Float16)x;
  uint16_t w;
  std::memcpy(&w, &h, 2);
  return w;
}
inline uint32_t pack_bf16(float lo, float hi) { return bf16(hi) << 16 | bf16(lo); }
inline uint32_t pack_f16(float lo, float hi) { return f16(hi) << 16 | f16(lo); }
inline float half_to_float(uint32_t w) {
  const uint16_t u = (uint16_t)w;
  _Float16 h;
  std::memcpy(&h, &u, 2);
  return (float)h;
}
inline float warp_max(float x) {
  for (int o = 16; o; o >>= 1) x = std::max(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
inline uint4 load16(const void* p) {
  if ((uintptr_t)p % 16) emu::fail("misaligned 16-byte load");
  ++emu::stats.vector_loads;
  return *static_cast<const uint4*>(p);
}
inline void store16(void* p, uint4 v) {
  if ((uintptr_t)p % 16) emu::fail("misaligned 16-byte store");
  ++emu::stats.vector_stores;
  *static_cast<uint4*>(p) = v;
}
inline float load_shared_by_all(const float* p) { return *p; }
inline unsigned draw_ticket(uint32_t* counter) { return (*counter)++; }
inline void let_followers_start() {}
inline void wait_for_leader() {
  emu::me->waited_for_leader = true;
  if (emu::leader) emu::pause(emu::LEADER);
}
inline unsigned cluster_rank() { return emu::me->cta->rank; }
inline unsigned cluster_size() { return (unsigned)emu::ctas.size(); }
inline void cluster_sync() {
  emu::me->op = 0;
  emu::pause(emu::CLUSTER);
}
inline void bar_init(uint64_t* p, unsigned n) {
  *reinterpret_cast<emu::Bar*>(p) = {0, emu::READY << 1, (uint8_t)n, (uint8_t)n};
}
inline void fence_bar_init() {}
inline void fence_async() {}
inline void arrive(emu::Bar* b, unsigned bytes) {
  if (emu::lost()) return;
  if (!b->pending) emu::fail("more arrivals than the barrier expects");
  b->tx += bytes;
  --b->pending;
  emu::settle(b);
}
inline void bar_expect(uint64_t* p, unsigned bytes) { arrive(emu::bar(emu::me->cta, p), bytes); }
inline void bar_arrive(uint64_t* p) { bar_expect(p, 0); }
template <class T> T* there(T* p, unsigned rank) {  // the same address in another CTA of the cluster
  if (rank >= emu::ctas.size()) emu::fail("a rank outside the cluster");
  if (!emu::ctas[rank].live) emu::fail("send to a CTA that has left");
  return reinterpret_cast<T*>(emu::ctas[rank].smem + ((unsigned char*)p - emu::me->cta->smem));
}
inline void bar_arrive(uint64_t* p, unsigned rank) { arrive(emu::bar(&emu::ctas[rank], there(p, rank)), 0); }
template <bool CLUSTER> bool bar_try(uint64_t* p, unsigned parity) {
  auto* b = emu::bar(emu::me->cta, p);
  const auto done = [&] { return b->phase() != (bool)(parity & 1); };
  if (done()) return true;
  emu::me->bar = b;
  emu::me->parity = parity & 1;
  emu::pause(emu::WAIT);
  return done();
}
inline long long cycles() { return emu::cycles; }
inline void stuck(const char* file, unsigned line) {
  emu::fail("a phase of an mbarrier never completed: " + std::string(file) + ":" + std::to_string(line));
}
inline void push(emu::Op o) {
  emu::ops.push_back(o);
  int64_t bytes = 0;
  for (const auto& q : emu::ops) bytes += q.src ? q.bytes : 0;
  emu::stats.most_in_flight = std::max(emu::stats.most_in_flight, bytes);
}
inline void copy_in(void* dst, const void* src, unsigned bytes, uint64_t* p) {
  auto* c = emu::me->cta;
  if ((uintptr_t)dst % 16 || (uintptr_t)src % 16 || bytes % 16 || !bytes) emu::fail("misaligned bulk copy");
  if ((unsigned char*)dst < c->smem || (unsigned char*)dst + bytes > c->smem + c->bytes)
    emu::fail("bulk copy outside this CTA's shared memory");
  std::memset(dst, 0xFF, bytes);  // what is read before it has landed is NaN
  ++emu::stats.copies;
  if (emu::leader) ++emu::stats.copies_ahead;
  emu::stats.copied_bytes += bytes;
  push({c, dst, src, bytes, {}, emu::bar(c, p)});
}
template <class T> void send(T v, void* dst, uint64_t* p, unsigned rank) {
  if ((uintptr_t)dst % sizeof v) emu::fail("misaligned send");
  void* const target = there(static_cast<unsigned char*>(dst), rank);
  emu::Op o{&emu::ctas[rank], target, nullptr, sizeof v, {}, emu::bar(&emu::ctas[rank], there(p, rank))};
  std::memcpy(o.value, &v, sizeof v);
  ++emu::stats.sends;
  push(o);
}

// ---- host: an H200, or an A100 where settings.major is 8 ------------------------------------------------------------
constexpr int INVALID_VALUE = 1, EMULATOR_ERROR = 2, DOES_NOT_FIT = 3, MAX_DEVICES = 128;
struct Device {
  int id, major, sms, smem_block, smem_sm;
};
inline int current_device(
    Device* d) {  // as many SMs as clusters are resident; another number is another device to the launcher's caches
  const int sms = emu::settings.resident, major = emu::settings.major;
  *d = major >= 9 ? Device{sms, major, sms, 232448, 233472} : Device{sms, major, sms, 166912, 167936};
  return 0;
}
inline bool does_not_fit(int error) { return error == DOES_NOT_FIT; }
template <class Kernel> int resident_clusters(const Device&, Kernel, unsigned, unsigned, size_t, int* clusters) {
  ++emu::stats.queries;
  *clusters = emu::settings.resident;
  return emu::settings.query_error;
}
template <class Kernel> bool can_follow(Kernel) { return emu::settings.major >= 9; }
enum class Order : int { ALONE, LEADS, FOLLOWS };  // as in csrc/cuda/hw.cuh
template <class... Parameters, class... Arguments>
int launch(Order order, void (*kernel)(Parameters...), unsigned grid, unsigned block, unsigned cluster, size_t smem,
           void*, const Arguments&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++emu::stats.launches;
  Device device;
  if (current_device(&device) || smem > (size_t)device.smem_block || block > 1024 || grid % std::max(cluster, 1u))
    return INVALID_VALUE;
  const auto run = [=] {
    emu::body = [&] { kernel(arguments...); };
    emu::run_grid(grid, block, std::max(cluster, 1u), smem);
  };
  if (order != Order::FOLLOWS) emu::leader = nullptr;  // nobody came after it: an error in between
  if (order == Order::LEADS) {
    emu::leader = run;
    return 0;
  }
  emu::stats.cluster = cluster;
  emu::stats.block = block;
  try {
    emu::follows = order == Order::FOLLOWS;
    if (emu::follows && !emu::leader) throw std::runtime_error("emulator: a launch follows none");
    run();
  } catch (const std::exception& e) {
    emu::last_error = e.what();
    return EMULATOR_ERROR;
  }
  return 0;
}
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, unsigned cluster, size_t smem, void* stream,
           const Arguments&... arguments) {
  return launch(Order::ALONE, kernel, grid, block, cluster, smem, stream, arguments...);
}
inline const char* error_string(int error) {
  return error == EMULATOR_ERROR ? emu::last_error.c_str() : error == DOES_NOT_FIT ? "does not fit" : "invalid value";
}
}  // namespace hw
