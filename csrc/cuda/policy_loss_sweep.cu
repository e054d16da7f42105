// The sweep's kernels of one dtype, PPG_DTYPE, and one set of sums, PPG_SUMS: csrc/sources.py has this file compiled
// for each, side by side. Without them it is all in one, for the emulator.
#include "policy_loss_sweep.cuh"

#define PPG_SWEEP(E, SUMS) \
  template int ppg::launch_sweep<ppg::E, ppg::SUMS>(const SweepArgs&, const hw::Device&, const Plan&, void*);
#ifdef PPG_DTYPE
PPG_SWEEP(PPG_DTYPE, PPG_SUMS)
#else
#define PPG_SWEEPS(E) PPG_SWEEP(E, PLAIN) PPG_SWEEP(E, ENTROPY) PPG_SWEEP(E, SCORE_NORM)
PPG_SWEEPS(F32)
PPG_SWEEPS(BF16)
PPG_SWEEPS(F16)
#endif
