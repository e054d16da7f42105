// Test only: a launch that another one follows (hw::Order) does nothing before a thread of that one waits for it, which
// is as late as it may be: what is read before the wait is what was there before both.
#pragma once
#include <utility>

#include "fibers.h"

namespace emu {
inline std::vector<std::unique_ptr<char[]>> leader_stacks;

inline void run_leader() {  // while the launch that follows it stands still
  struct Aside {
    std::vector<Cta> c;
    std::vector<Op> o;
    std::function<void()> b;
    std::mt19937 r = rng;
    unsigned block = block_dim, grid = grid_dim;
    void swap() { ctas.swap(c), ops.swap(o), body.swap(b), stacks.swap(leader_stacks); }
    Aside() { swap(), follows = false; }
    ~Aside() { swap(), rng = r, block_dim = block, grid_dim = grid, follows = true; }
  } aside;
  std::exchange(leader, nullptr)();
}
inline bool lead_some(const std::vector<Fiber*>& all, bool stuck) {
  const auto waits = [](const Fiber* f) { return f->state == LEADER; };
  if (!leader || std::none_of(all.begin(), all.end(), waits)) return false;
  const bool now = settings.mode == EAGER || (settings.mode == RANDOM && rng() % 4 == 0) || stuck;
  if (now) run_leader();
  return now;
}
}  // namespace emu
