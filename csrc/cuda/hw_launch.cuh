// The CUDA runtime for the launchers, one function each; a part of hw.cuh.
#pragma once
#include <cuda_runtime.h>

namespace hw {

constexpr int INVALID_VALUE = cudaErrorInvalidValue;
constexpr int MAX_DEVICES = 64;

// An error that the caller is told of and that the next to ask for the last error, PyTorch for one, must not find.
inline int told(cudaError_t error) {
  if (error) (void)cudaGetLastError();
  return error;
}

struct Device {
  int id, major, sms, smem_block, smem_sm;
};

// How a launch stands to its neighbours on the stream. One that FOLLOWS may begin as soon as every CTA of the LEADS
// just before it has called let_followers_start or ended. Each of its threads calls wait_for_leader, before it reads
// what that launch writes and before it writes anything. Stream capture keeps this in the graph, as an edge of a kind
// of its own.
enum class Order : int { ALONE, LEADS, FOLLOWS };

// The current device; its attributes are cached per thread.
inline int current_device(Device* d) {
  static thread_local Device cache[MAX_DEVICES];
  int id = 0;
  if (const cudaError_t e = cudaGetDevice(&id)) return e;
  if (id >= MAX_DEVICES) return cudaErrorInvalidDevice;
  Device q = cache[id];
  if (!q.sms) {
    q.id = id;
    cudaDeviceGetAttribute(&q.major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&q.smem_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&q.smem_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    if (const cudaError_t e = cudaDeviceGetAttribute(&q.sms, cudaDevAttrMultiProcessorCount, id)) return e;
    cache[id] = q;
  }
  *d = q;
  return cudaSuccess;
}

inline cudaLaunchConfig_t launch_config(unsigned grid, unsigned block, unsigned cluster, size_t smem, void* stream,
                                        bool early, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cluster) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// Whether there is code for Hopper in it. What a newer GPU compiles from the PTX of an older one lacks all that is only
// there from sm_90 on: a launch that waits for its leader, clusters.
template <class Kernel> bool knows_hopper(Kernel kernel) {
  cudaFuncAttributes attributes;
  return !told(cudaFuncGetAttributes(&attributes, kernel)) && attributes.ptxVersion >= 90;
}

// Whether launches may follow others here (Order), `kernel` being one of this build. From CUDA 12.3 on, as older
// drivers cannot capture it. Cached per thread.
template <class Kernel> bool can_follow(Kernel kernel) {
  enum Answer : char { UNKNOWN, CAN, CANNOT };
  static thread_local Answer answers[MAX_DEVICES];
  Device d;
  if (current_device(&d)) return false;
  Answer& answer = answers[d.id];
  if (answer == UNKNOWN) {
    int driver = 0;
    const bool can = d.major >= 9 && !told(cudaDriverGetVersion(&driver)) && driver >= 12030 && knows_hopper(kernel);
    answer = can ? CAN : CANNOT;
  }
  return answer == CAN;
}

// A part smaller than the plan (of less shared memory, a MIG slice) answers so: another plan may fit. What else fails
// (a missing device, an earlier kernel's fault) would fail there as well.
inline bool does_not_fit(int error) {
  return error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration || error == cudaErrorNotSupported ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidClusterSize;
}

// How many clusters of this shape the chip holds at once; fewer than SMs / cluster where a cluster must not span two
// GPCs. Also lets the kernel use all the shared memory of an SM: must have been called before its first launch on this
// device.
template <class Kernel>
int resident_clusters(const Device& d, Kernel kernel, unsigned block, unsigned cluster, size_t smem, int* clusters) {
  if (!knows_hopper(kernel)) return cudaErrorNotSupported;
  if (const int e = told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.smem_block)))
    return e;
  if (const int e = told(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)))
    return e;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(cluster, block, cluster, smem, nullptr, false, attributes);
  if (const int e = told(cudaOccupancyMaxActiveClusters(clusters, kernel, &config))) return e;
  return *clusters ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

// cluster 0: a launch without clusters, for every architecture.
template <class... Parameters, class... Arguments>
int launch(Order order, void (*kernel)(Parameters...), unsigned grid, unsigned block, unsigned cluster, size_t smem,
           void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config =
      launch_config(grid, block, cluster, smem, stream, order == Order::FOLLOWS, attributes);
  return told(cudaLaunchKernelEx(&config, kernel, arguments...));
}
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, unsigned cluster, size_t smem, void* stream,
           const Arguments&... arguments) {
  return launch(Order::ALONE, kernel, grid, block, cluster, smem, stream, arguments...);
}

inline const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace hw
