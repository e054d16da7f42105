"""What the CPU's row kernels ask memory for while they compute: each line of the next row once, none beyond it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
LINE = 64
PROGRAM = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#include <immintrin.h>
#include "args.h"
#include "policy_term.h"
static std::vector<const char*> asked;
#define __builtin_prefetch(at, ...) asked.push_back(at)
namespace ppg::cpu {
namespace {
#include "cpu/vec.h"
#include "cpu/elementary.h"
#include "cpu/row.h"
}
}
using namespace ppg;
template <class E> void sweep(int64_t V, int passes) {
  std::vector<char> memory(3 * V * 4);
  const int64_t labels[] = {0, 0, -1};
  const Rows rows{memory.data(), 3, 3 * V, V};
  const Sweep a{rows, labels, nullptr, 3, V, DType::F32, 1.f, 0.f};
  cpu::Fetch fetch = cpu::fetch_next<E>(a, 0, 3, passes), none = cpu::fetch_next<E>(a, 1, 3, passes);
  const char* row = memory.data() + V * sizeof(typename E::raw);
  asked.clear();
  for (int pass = 0; pass < passes; ++pass)
    for (int64_t v = 0; v + cpu::STEP <= V; v += cpu::STEP) fetch.step();
  const size_t of_row = asked.size();
  none.step();
  std::printf("%s[%zu, %zu", V == 1 ? "" : ",", of_row, asked.size());
  for (size_t i = 0; i < of_row; ++i) std::printf(", %td", asked[i] - row);
  std::printf("]");
}
int main() {
  std::printf("[");
  sweep<cpu::F32>(1, 1);
  for (const int64_t V : {32000, 50257, 515, 64})
    for (const int passes : {1, 2}) {
      sweep<cpu::F32>(V, passes);
      sweep<cpu::BF16>(V, passes);
    }
  std::printf("]");
}
"""


@pytest.fixture(scope="module", params=[8, 4])
def rows(request, tmp_path_factory):
    """By (V, passes, bytes of an element), the elements that a step takes beside what was asked for."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("prefetch")
    (folder / "a.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-w", f"-DPPG_LANES={request.param}", "-mavx2", "-mfma", "-mf16c", f"-I{CSRC}"]
    built = subprocess.run([compiler, *flags, "a.cpp", "-o", "a"], cwd=folder, capture_output=True, text=True)
    if "unrecognized" in built.stderr and "mavx2" in built.stderr:
        pytest.skip("not an x86 compiler")
    assert built.returncode == 0, built.stderr
    found = json.loads(subprocess.run([folder / "a"], capture_output=True, text=True, check=True).stdout)
    cases = [(1, 1, 4), *((V, p, size) for V in (32000, 50257, 515, 64) for p in (1, 2) for size in (4, 2))]
    return 4 * request.param, dict(zip(cases, found, strict=True))


def test_each_line_of_the_next_row_is_asked_for_and_none_beyond(rows):
    step, by_case = rows
    for (V, _, size), (count, with_none, *asked) in by_case.items():
        assert with_none == count, "a row that is masked is not asked for"
        assert len(asked) == count
        lines = [at // LINE for at in asked]
        assert all(at % LINE == 0 for at in asked)
        whole = V // step * step * size // LINE  # what whole steps cover; the tail of a row is left to hardware
        assert len(lines) > whole - 4, "less than a line of each part is left"
        assert len(set(lines)) == len(lines), "each once"
        assert min(lines, default=0) >= 0
        assert max(lines, default=0) <= -(-V * size // LINE) + 4, "a line too many for each of four parts at most"


def test_four_parts_are_asked_for_in_turn(rows):
    _, by_case = rows
    _, _, *asked = by_case[32000, 1, 4]
    part = 32000 * 4 // 4
    assert [at // part for at in asked[:8]] == [0, 1, 2, 3] * 2
    assert [at % part for at in asked[:8]] == [0] * 4 + [LINE] * 4
