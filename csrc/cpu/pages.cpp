// Huge pages for fresh memory: a page fault per 4 KiB costs several times as much as the kernels' work on them.
#include <cstdint>

#include "../args.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ppg::cpu {
void want_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_HUGEPAGE);  // advice only: a system without huge pages ignores it
#else
  (void)data, (void)bytes;
#endif
}
}  // namespace ppg::cpu
