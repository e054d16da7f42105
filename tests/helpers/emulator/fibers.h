// Test only: the threads of a grid as fibers, cluster by cluster, in an adversarial order. What they stop at and wait
// for, and the copies and sends that are on their way meanwhile. The CUDA names on top of it are in cuda_emu.h.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emu {
enum State { RUN, WARP, BLOCK, CLUSTER, WAIT, LEADER, DONE };
enum Mode : int { EAGER, RANDOM, LATE };  // when copies and sends land
struct Settings {  // the device that is played, how adversarial it is, and a plan that replaces the launcher's
  int major = 9, resident = 2;
  bool forced = false;
  int cluster = 0, threads = 0, slots = 0;
  unsigned seed = 1;
  int mode = RANDOM;
  int query_error = 0;  // what the device answers when asked how many clusters it holds
  int lose = 0;         // the arrival of this number at a barrier, or of bytes, does not count; 0: none is lost
};
struct Stats {
  int64_t copies = 0, copied_bytes = 0, sends = 0, most_in_flight = 0, vector_loads = 0, vector_stores = 0,
          launches = 0, cluster = 0, block = 0, queries = 0, copies_ahead = 0;  // ahead: before the leader had run
};
inline Settings settings;
inline Stats stats;
inline int planted = 0;  // the fault that the patched sources of a test make; 0: none

constexpr uint16_t READY = 0xA51;  // marks an initialised barrier
struct Bar {
  int32_t tx;
  uint16_t tag_phase;
  uint8_t pending, count;
  bool phase() const { return tag_phase & 1; }
};
static_assert(sizeof(Bar) == 8, "an mbarrier is 8 bytes");
struct Cta;
struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
  Cta* cta = nullptr;
  dim3 tid;
  State state = RUN;
  int op = 0;
  unsigned seq = 0;
  uint64_t slot[2] = {};
  Bar* bar = nullptr;
  bool parity = false, waited_for_leader = false;
};
struct Cta {
  unsigned rank, block, live;
  unsigned char* smem;
  size_t bytes;
  std::vector<Fiber*> fibers;
};
struct Op {  // a bulk copy (src) or a remote store (value) on its way
  Cta* cta;
  void* dst;
  const void* src;
  unsigned bytes;
  uint64_t value[2];
  Bar* bar;
};

inline std::vector<Cta> ctas;
inline std::vector<Op> ops;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline Fiber* me;
inline ucontext_t scheduler_context;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::string error, last_error;
inline std::mt19937 rng;
inline unsigned block_dim, grid_dim;
inline int arrivals = 0;      // of this launch, at all barriers
inline long long cycles = 0;  // of this launch: pass only where nothing else happens
constexpr size_t STACK = 96 << 10;
inline thread_local std::function<void()> leader;  // of the launch that runs, and has not run itself: leader.h
inline bool follows;                               // whether it has one

// swapcontext makes a system call each way; setjmp makes none but confuses AddressSanitizer.
#ifdef __SANITIZE_ADDRESS__
inline void leave() { swapcontext(&me->start, &scheduler_context); }
inline void resume(Fiber* f) { swapcontext(&scheduler_context, &f->start); }
#else
__attribute__((noinline)) inline void leave() {
  if (!_setjmp(me->here)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fiber* f) {
  if (_setjmp(scheduler)) return;
  if (f->started) _longjmp(f->here, 1);
  f->started = true;
  setcontext(&f->start);
}
#endif
inline void pause(State s) {
  me->state = s;
  leave();
}
[[noreturn]] inline void fail(const std::string& what) {
  error = what + " (block " + std::to_string(me->cta->block) + ", thread " + std::to_string(me->tid.x) + ")";
  for (;;) pause(DONE);
}
inline void entry() {
  body();
  if (follows && !me->waited_for_leader) fail("a thread has not waited for the launch that its own follows");
  for (;;) pause(DONE);
}
inline Bar* bar(Cta* c, uint64_t* p) {
  auto* b = reinterpret_cast<Bar*>(p);
  if ((unsigned char*)p < c->smem || (unsigned char*)(p + 1) > c->smem + c->bytes)
    fail("barrier outside this CTA's shared memory");
  if (b->tag_phase >> 1 != READY) fail("barrier used before it is initialised");
  return b;
}
inline void settle(Bar* b) {
  if (b->pending == 0 && b->tx == 0) {
    b->tag_phase ^= 1;
    b->pending = b->count;
  }
}
inline bool lost() { return ++arrivals == settings.lose; }
inline void deliver(size_t i) {
  const Op o = ops[i];
  ops[i] = ops.back();
  ops.pop_back();
  if (!o.cta->live) {
    error = "a CTA left while data was on its way to it";
    return;
  }
  std::memcpy(o.dst, o.src ? o.src : o.value, o.bytes);
  if (!lost()) o.bar->tx -= o.bytes;
  settle(o.bar);
}
inline bool runnable(const Fiber& f) {
  return f.state == RUN || (f.state == WAIT && f.bar->phase() != f.parity) || (f.state == LEADER && !leader);
}
inline bool release(const std::vector<Fiber*>& group, State s) {  // once all live fibers of the group wait in s
  size_t live = 0, there = 0;
  int op = 0;
  bool same = true;
  for (const auto* f : group) {
    if (f->state == DONE) continue;
    ++live;
    if (f->state != s) {
      if (s != WARP) return false;
      continue;
    }
    same &= !there || f->op == op;
    op = f->op;
    ++there;
  }
  if (!live || there < live) return false;
  if (s != CLUSTER && live < group.size()) error = "collective not reached by threads that have left";
  if (!same) error = "divergent warp collective";
  if (!error.empty()) return false;
  for (auto* f : group)
    if (f->state == s) f->state = RUN;
  return true;
}
inline void check() {
  if (!error.empty()) throw std::runtime_error("emulator: " + error);
}
inline bool run_warp(std::vector<Fiber*>& warp, int held) {  // some of its lanes, in some order, each to its next stop
  bool progress = false;
  const size_t turn = rng() % warp.size(), stop = rng() % 4 ? warp.size() : rng() % warp.size() + 1;
  for (size_t k = 0; k < stop; ++k) {
    Fiber* const f = warp[(k + turn) % warp.size()];
    if (f->state == DONE || (int)f->cta->rank == held || !runnable(*f)) continue;
    f->state = RUN;
    me = f;
    resume(f);
    progress = true;
    if (f->state == DONE && --f->cta->live == 0)
      for (const auto& o : ops)
        if (o.cta == f->cta) error = "a CTA left with copies in flight";
    check();
  }
  progress |= release(warp, WARP);
  check();
  return progress;
}
inline bool deliver_some(bool stuck) {
  const int mode = settings.mode;
  if (ops.empty() || !(mode == EAGER || (mode == RANDOM && rng() % 4 == 0) || stuck)) return false;
  for (size_t k = mode == EAGER ? ops.size() : mode == LATE ? 1 : 1 + rng() % ops.size(); k; --k)
    deliver(rng() % ops.size());
  check();
  return true;
}
inline bool lead_some(const std::vector<Fiber*>& all, bool stuck);  // leader.h
inline bool try_in_vain(const std::vector<Fiber*>& all) {  // waits for barriers give up, look at the clock, try again
  bool any = false;
  for (auto* f : all)
    if (f->state == WAIT) any = true, f->state = RUN;
  cycles += 1ll << 30;
  return any && cycles < 1ll << 36;  // a watchdog would have ended it by then
}
inline void run_cluster() {
  std::vector<std::vector<Fiber*>> warps;
  std::vector<Fiber*> all;
  for (auto& c : ctas) {
    for (size_t i = 0; i < c.fibers.size(); i += 32)
      warps.emplace_back(c.fibers.begin() + i, c.fibers.begin() + std::min(c.fibers.size(), i + 32));
    all.insert(all.end(), c.fibers.begin(), c.fibers.end());
  }
  int held = settings.mode != EAGER && rng() % 2 ? (int)(rng() % ctas.size())
                                                 : -1;  // this CTA starts when nothing else can go on
  for (;;) {
    bool progress = false;
    std::shuffle(warps.begin(), warps.end(), rng);
    for (auto& w : warps) progress |= run_warp(w, held);
    for (auto& c : ctas) progress |= release(c.fibers, BLOCK);
    progress |= release(all, CLUSTER);
    check();
    if (!progress)  // skipped by the random cut in run_warp
      for (const auto* f : all) progress |= f->state != DONE && (int)f->cta->rank != held && runnable(*f);
    progress |= deliver_some(!progress);
    progress |= lead_some(all, !progress);
    if (std::all_of(ctas.begin(), ctas.end(), [](const Cta& c) { return c.live == 0; })) return;
    if (!progress && held >= 0) held = -1;
    else if (!progress && !try_in_vain(all))
      throw std::runtime_error("emulator: deadlock (a barrier that never completes, or a divergent one)");
  }
}
inline void run_grid(unsigned grid, unsigned block, unsigned cluster, size_t smem) {
  rng.seed(settings.seed);
  block_dim = block;
  grid_dim = grid;
  error.clear();
  arrivals = 0;
  cycles = 0;
  while (stacks.size() < (size_t)cluster * block) stacks.emplace_back(new char[STACK]);
  for (unsigned b = 0; b < grid; b += cluster) {
    std::vector<Fiber> fibers((size_t)cluster * block);
    struct Cleanup {
      ~Cleanup() {
        for (auto& c : ctas) std::free(c.smem);
        ctas.clear();
        ops.clear();
      }
    } cleanup;
    for (unsigned r = 0; r < cluster; ++r) {
      void* p = nullptr;
      if (posix_memalign(&p, 128, smem + 1)) throw std::bad_alloc();
      std::memset(p, 0xFF, smem);
      ctas.push_back({r, b + r, block, (unsigned char*)p, smem, {}});
    }
    for (unsigned i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[i];
      f.cta = &ctas[i / block];
      f.tid = {i % block, 0, 0};
      f.cta->fibers.push_back(&f);
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = stacks[i].get();
      f.start.uc_stack.ss_size = STACK;
      f.start.uc_link = nullptr;
      makecontext(&f.start, entry, 0);
    }
    run_cluster();
  }
}
template <class T>
T exchange(T v, int from, int op) {  // two slots in turn: a lane cannot overtake its warp by more than one collective
  const unsigned k = me->seq++ & 1;
  std::memcpy(&me->slot[k], &v, sizeof v);
  me->op = op;
  pause(WARP);
  T o;
  std::memcpy(&o, &me->cta->fibers[(me->tid.x & ~31u) + (from & 31)]->slot[k], sizeof o);
  return o;
}
}  // namespace emu
