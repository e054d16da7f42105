// A/B of the ways to spread a row over the chip: the fused kernel in place, bfloat16, every plan beside the one that it would choose and
// beside a device copy of the same bytes; rows of several kinds; rows that are not aligned. Appends lines of JSON to the file it is given.
//   plans FILE [SECONDS] [N]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "../../csrc/cuda/policy_loss_sweep.cuh"

using namespace ppg;

#ifdef PPG_SOURCES
extern const char sources[];
const char sources[] = PPG_SOURCES;  // so that a program that is there is known to be of these sources
#endif

namespace plans {  // not a second unnamed one: nvcc 13 cannot tell it from that of ppg

void check(int error, const char* what) {
  if (!error) return;
  std::fprintf(stderr, "%s: %s\n", what, hw::error_string(error));
  std::exit(1);
}

__device__ uint32_t mix(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9ull;
  return uint32_t(x >> 32);
}

// Sums of four uniform numbers: random enough, never zeros.
__global__ void fill_logits(uint16_t* z, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    float x = -2.f;
    for (int k = 0; k < 4; ++k) x += mix(i * 4 + k) * 0x1p-32f;
    z[i] = uint16_t(__float_as_uint(x * 5.f) >> 16);
  }
}

// `full` of 100 rows in runs of 64 have an advantage, the others are masked.
__global__ void fill_rows(int64_t* labels, float* advantages, int64_t N, int64_t V, int full) {
  const int64_t n = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (n >= N) return;
  labels[n] = int(n / 64 * 37 % 100) < full ? int64_t(mix(n) % V) : -100;
  advantages[n] = n % 2 ? 0.7f : -1.3f;
}

struct Bench {
  int64_t N, V;
  uint16_t *pristine, *logits;
  int64_t* labels;
  float *advantages, *loss, *logprob;
  void* scrub;
  size_t scrub_bytes;
  cudaEvent_t start, stop;

  SweepArgs args() const {
    SweepArgs a{};
    a.logits = a.dlogits = Rows{logits, N, 0, V};
    a.tokens.labels = Column{labels, N, 1, 8, false};
    a.advantages = Column{advantages, N, 1, 4, true};
    a.tokens.N = a.tokens.length = N;
    a.tokens.sequences = 1;
    a.V = V;
    a.dtype = DType::BF16;
    a.temperature = 1.f;
    a.reduction = Reduction::NONE;
    a.term.loss_type = LossType::REINFORCE;
    a.term.kl_estimator = KLEstimator::K3;
    a.loss = loss;
    a.logprob = logprob;
    return a;
  }
  template <class Call> float milliseconds(Call call) {
    check(cudaMemsetAsync(scrub, 1, scrub_bytes, nullptr), "empty the caches");
    check(cudaEventRecord(start), "event");
    call();
    check(cudaEventRecord(stop), "event");
    check(cudaEventSynchronize(stop), "run");
    float ms = 0.f;
    check(cudaEventElapsedTime(&ms, start, stop), "event");
    return ms;
  }
  float copy() {
    return milliseconds([&] { check(cudaMemcpyAsync(logits, pristine, N * V * 2, cudaMemcpyDeviceToDevice, nullptr), "copy"); });
  }
  // -1 where this plan cannot be launched; a plan of cluster -1 is the one that the library would choose.
  float fused(const Plan& plan) {
    copy();
    hw::Device d;
    check(hw::current_device(&d), "device");
    const Plan chosen = plan.cluster < 0 ? plan_row(V, 2, d.major >= 9, 2, d.smem_block, d.smem_sm, ENTRY_BYTES<false>) : plan;
    int error = 0;
    const float ms = milliseconds([&] { error = launch_rows<BF16, false, PLAIN>(args(), d, chosen, nullptr); });
    (void)cudaGetLastError();
    return error ? -1.f : ms;
  }
};

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? -1.f : values[values.size() / 2];
}

// Largest difference of the log-probs from those of the default plan.
float difference(Bench& b, const Plan& plan, const std::vector<float>& expected) {
  std::vector<float> found(b.N);
  if (b.fused(plan) < 0) return -1.f;
  check(cudaMemcpy(found.data(), b.logprob, b.N * sizeof(float), cudaMemcpyDeviceToHost), "read");
  float worst = 0.f;
  for (int64_t n = 0; n < b.N; ++n) worst = std::max(worst, std::fabs(found[n] - expected[n]));
  return worst;
}

void measure(Bench& b, int full, const std::vector<Plan>& plans, int rounds, FILE* out) {
  fill_rows<<<(unsigned)((b.N + 255) / 256), 256>>>(b.labels, b.advantages, b.N, b.V, full);
  std::vector<float> expected(b.N), copies;
  std::vector<std::vector<float>> times(plans.size());
  b.fused(plans[0]);
  check(cudaMemcpy(expected.data(), b.logprob, b.N * sizeof(float), cudaMemcpyDeviceToHost), "read");
  std::vector<float> off;
  for (const Plan& plan : plans) off.push_back(difference(b, plan, expected));
  for (int round = 0; round < rounds; ++round) {
    copies.push_back(b.copy());
    for (size_t p = 0; p < plans.size(); ++p) {
      const size_t at = round % 2 ? plans.size() - 1 - p : p;
      if (off[at] >= 0) times[at].push_back(b.fused(plans[at]));
    }
  }
  for (size_t p = 0; p < plans.size(); ++p) {
    const float ms = median(times[p]), copy = median(copies);
    std::fprintf(out, "{\"plan\": {\"cluster\": %d, \"threads\": %d, \"slots\": %d}, \"N\": %lld, \"V\": %lld, \"full\": %d, ",
                 plans[p].cluster, plans[p].threads, plans[p].slots, (long long)b.N, (long long)b.V, full);
    if (off[p] < 0) std::fprintf(out, "\"launched\": false}\n");
    else
      std::fprintf(out, "\"launched\": true, \"ms\": %.5f, \"copy_ms\": %.5f, \"share_of_copy\": %.4f, \"difference\": %.3g}\n", ms, copy,
                   copy / ms, off[p]);
  }
  std::fflush(out);
}

}  // namespace plans
using namespace plans;

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  FILE* const out = std::fopen(argv[1], "a");
  const double seconds = argc > 2 ? std::atof(argv[2]) : 60.;
  const int64_t N = argc > 3 ? std::atoll(argv[3]) : 8192, largest = 262144;
  if (!out) return 2;
  Bench b{};
  b.N = N;
  b.scrub_bytes = 256 << 20;
  check(cudaMalloc(&b.pristine, N * largest * 2), "memory");
  check(cudaMalloc(&b.logits, N * largest * 2), "memory");
  check(cudaMalloc(&b.labels, N * 8), "memory");
  check(cudaMalloc(&b.advantages, N * 4), "memory");
  check(cudaMalloc(&b.loss, N * 4), "memory");
  check(cudaMalloc(&b.logprob, N * 4), "memory");
  check(cudaMalloc(&b.scrub, b.scrub_bytes), "memory");
  check(cudaEventCreate(&b.start), "event");
  check(cudaEventCreate(&b.stop), "event");
  fill_logits<<<4096, 256>>>(b.pristine, N * largest);
  const Plan own{-1, 0, 0, 0}, two{0, LARGE_THREADS, 0, 0};
  const struct {
    int64_t V;
    std::vector<Plan> plans;
  } rows[] = {
      {128256, {own, {2, 512, 13, 0}, {4, 256, 5, 0}, {4, 512, 13, 0}, {8, 256, 5, 0}, two}},
      {151936, {own, {2, 512, 13, 0}, {4, 256, 5, 0}, {4, 512, 13, 0}, {8, 256, 5, 0}, two}},
      {32000, {own, {1, 256, 6, 0}, {1, 512, 13, 0}, {2, 256, 5, 0}, two}},
      {262144, {own, {4, 512, 13, 0}, {8, 256, 6, 0}, {8, 512, 13, 0}, two}},
      {151669, {own, {4, 256, 5, 0}, {4, 512, 13, 0}, two}},
  };
  const std::time_t begin = std::time(nullptr);
  const auto over = [&] { return std::difftime(std::time(nullptr), begin) > seconds; };
  for (const auto& row : rows) {
    if (over()) break;
    b.V = row.V;
    measure(b, 100, row.plans, 15, out);
  }
  for (const int full : {50, 25, 10}) {
    if (over()) break;
    b.V = 128256;
    measure(b, full, {own, {4, 256, 5, 0}}, 15, out);
  }
  std::fclose(out);
  return 0;
}
