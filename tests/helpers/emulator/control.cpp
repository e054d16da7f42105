// What the tests reach by ctypes: the emulator's settings and counts.
#include "cuda_emu.h"

extern "C" {
// threads 0: the launcher plans as it does on a GPU.
__attribute__((visibility("default"))) void emulator_set(int major, int resident, int cluster, int threads, int slots,
                                                         unsigned seed, int mode, int query_error, int lose) {
  emu::settings = {major, resident, threads != 0, cluster, threads, slots, seed, mode, query_error, lose};
}
__attribute__((visibility("default"))) void emulator_plant(int fault) { emu::planted = fault; }
// The counts of emu::Stats, in its order, since the last call.
__attribute__((visibility("default"))) void emulator_take_stats(int64_t* out) {
  std::memcpy(out, &emu::stats, sizeof emu::stats);
  emu::stats = {};
}
}
