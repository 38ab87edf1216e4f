/* A CUDA driver and runtime without a GPU, for tests: torch's own CUDA code runs on it at true size.
 *
 * Kernels do nothing. Device memory is addresses without memory behind them. What the host reads back is zero. What is counted is
 * real: launches, copies, waits of the host, bytes that the allocator holds. What a GPU would refuse is refused too: more memory than
 * the card has, a launch with an invalid grid, a wait during the capture of a graph.
 *
 * Every function has the signature of NVIDIA's headers, so a compiler error tells of a changed interface. Functions that torch needs
 * and that are missing here end the process and give their name (stubs.py).
 *
 * Environment: NULL_DEVICE_CARD=a100|h100, NULL_DEVICE_COUNT, NULL_DEVICE_BYTES (memory of the card). */
#define _GNU_SOURCE
#define __CUDA_FP16_H__ /* these two headers need one of a package that torch does not install */
#define __CUDA_BF16_H__
typedef unsigned short __half, __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* What tests read: `driver.py: Counters` has the same fields. */
struct counters {
  long launches;     /* kernels that were launched, also by Triton; a graph counts as one */
  long products;     /* of them, products of cuBLAS */
  long graph_nodes;  /* kernels inside of launched graphs */
  long copies;       /* between host and device */
  long pageable;     /* of them, from or to host memory that is not pinned */
  long waits;        /* calls in which the host waits for the device */
  size_t held, most; /* bytes of device memory: now, at most */
} null_counters;
void (*null_on_wait)(const char *call); /* called at each wait, and at each pageable copy */

#define ADD(counter, n) __atomic_add_fetch(&null_counters.counter, n, __ATOMIC_RELAXED)
static __thread cudaError_t last_error;
static cudaError_t failed(cudaError_t error) { return last_error = error; }

/* ---- the card ---- */
struct card {
  const char *name;
  size_t bytes;
  int major, processors, optin, shared, l2;
};
static const struct card cards[] = {
    {"NVIDIA A100-SXM4-80GB (null device)", 85095874560, 8, 108, 166912, 167936, 41943040},
    {"NVIDIA H100 80GB HBM3 (null device)", 85017624576, 9, 132, 232448, 233472, 52428800},
};
static const struct card *card = cards;
static size_t card_bytes;
static int device_count = 1;
static __thread int current_device;

/* The attributes have the same numbers in the runtime and in the driver. Most are zero: "unsupported". */
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return card->optin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return card->shared;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMultiProcessorCount: return card->processors;
    case cudaDevAttrComputeCapabilityMajor: return card->major;
    case cudaDevAttrClockRate: return 1410000;
    case cudaDevAttrMemoryClockRate: return 1593000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return card->l2;
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrUnifiedAddressing: case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels: case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  if (device < 0 || device >= device_count) return failed(cudaErrorInvalidDevice);
  *p = (struct cudaDeviceProp){
      .totalGlobalMem = card_bytes, .sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock),
      .regsPerBlock = 65536, .warpSize = 32, .memPitch = 2147483647, .maxThreadsPerBlock = 1024,
      .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .clockRate = 1410000,
      .totalConstMem = 65536, .major = card->major, .multiProcessorCount = card->processors, .asyncEngineCount = 3,
      .canMapHostMemory = 1, .concurrentKernels = 1, .pciBusID = device, .unifiedAddressing = 1,
      .memoryClockRate = 1593000, .memoryBusWidth = 5120, .l2CacheSize = card->l2,
      .maxThreadsPerMultiProcessor = 2048, .sharedMemPerMultiprocessor = card->shared, .regsPerMultiprocessor = 65536,
      .managedMemory = 1, .cooperativeLaunch = 1, .sharedMemPerBlockOptin = card->optin,
      .maxBlocksPerMultiProcessor = 32};
  snprintf(p->name, sizeof p->name, "%s", card->name);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr which, int d) { *v = attribute(which); return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n) { *n = device_count; return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= device_count) return failed(cudaErrorInvalidDevice);
  current_device = d;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int d, int peer) { *can = 1; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t e) { return "an error of the null device"; }
const char *cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return cudaGetErrorName(e);
  }
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* ---- memory ---- */
#define ARENA ((size_t)1 << 46) /* addresses of the device; never used twice */
#define PAGE ((size_t)2 << 20)
#define BLOCKS 65536
static char *arena, *next_address;
static struct block { char *at; size_t size; } blocks[BLOCKS]; /* what is held: device, pinned, physical memory */
static int blocks_top;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int on_device(const void *p) { return (char *)p >= arena && (char *)p < arena + ARENA; }
static size_t pages(size_t n) { return (n + PAGE - 1) & ~(PAGE - 1); }
static char *addresses(size_t n) {
  char *at = __atomic_fetch_add(&next_address, pages(n) + PAGE, __ATOMIC_RELAXED);
  if (at + n > arena + ARENA) { fputs("null device: no addresses are left\n", stderr); abort(); }
  return at;
}

static void keep(void *at, size_t size) {
  int free = 0;
  while (free < blocks_top && blocks[free].at) free++;
  if (free == BLOCKS) { fprintf(stderr, "null device: more than %d blocks of memory\n", BLOCKS); abort(); }
  if (free == blocks_top) blocks_top++;
  blocks[free] = (struct block){at, size};
}
static struct block *block_of(const void *p) {
  for (int i = 0; i < blocks_top; i++)
    if (blocks[i].at && (char *)p >= blocks[i].at && (char *)p < blocks[i].at + blocks[i].size) return &blocks[i];
  return NULL;
}
/* Device memory is counted; pinned host memory is only remembered. */
static int take(void *at, size_t size, int counted) {
  pthread_mutex_lock(&lock);
  int fits = !counted || null_counters.held + size <= card_bytes;
  if (fits) keep(at, size);
  if (fits && counted && (null_counters.held += size) > null_counters.most) null_counters.most = null_counters.held;
  pthread_mutex_unlock(&lock);
  return fits;
}
static size_t drop(const void *at, int counted) {
  pthread_mutex_lock(&lock);
  struct block *block = block_of(at);
  size_t size = block ? block->size : 0;
  if (block) block->at = NULL;
  if (counted) null_counters.held -= size;
  pthread_mutex_unlock(&lock);
  return size;
}
static int pinned(const void *p) {
  pthread_mutex_lock(&lock);
  int found = block_of(p) != NULL;
  pthread_mutex_unlock(&lock);
  return found;
}

/* ---- streams, events, graphs: work is done when it is queued ---- */
static long handles;
static void *handle(void) { return (void *)(0x1000000 + 64 * __atomic_add_fetch(&handles, 1, __ATOMIC_RELAXED)); }
static struct { cudaStream_t stream; enum cudaStreamCaptureMode mode; unsigned long long id; long nodes; int active; } capture;
static __thread enum cudaStreamCaptureMode exchanged = cudaStreamCaptureModeGlobal;

/* A call that a capture does not allow. In relaxed mode, and in another thread than the capture's, it is allowed. */
static cudaError_t unless_capturing(void) {
  int forbidden = capture.active && capture.mode != cudaStreamCaptureModeRelaxed && exchanged != cudaStreamCaptureModeRelaxed;
  return forbidden ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
static cudaError_t wait(const char *call) {
  ADD(waits, 1);
  if (null_on_wait) null_on_wait(call);
  return unless_capturing();
}
cudaError_t cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait("cudaEventSynchronize"); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return unless_capturing(); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return unless_capturing(); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { f(data); return cudaSuccess; }

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = exchanged;
  exchanged = *mode;
  *mode = before;
  return cudaSuccess;
}
static int capturing(cudaStream_t s) { return capture.active && capture.stream == s; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  if (capture.active) return failed(cudaErrorIllegalState);
  capture.stream = s; capture.mode = mode; capture.nodes = 0; capture.id++; capture.active = 1;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  if (!capturing(s)) return failed(cudaErrorIllegalState);
  capture.active = 0;
  long *nodes = malloc(sizeof *nodes);
  *nodes = capture.nodes;
  *graph = (cudaGraph_t)nodes;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = capturing(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                        cudaGraph_t *graph, const cudaGraphNode_t **nodes, size_t *count) {
  cudaStreamIsCapturing(s, status);
  if (id) *id = capture.id;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = *(long *)graph; return cudaSuccess; }
static cudaError_t instantiated(cudaGraphExec_t *exec, cudaGraph_t graph) {
  long *nodes = malloc(sizeof *nodes);
  *nodes = *(long *)graph;
  *exec = (cudaGraphExec_t)nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) { return instantiated(exec, graph); }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) { return instantiated(exec, graph); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) { ADD(launches, 1); ADD(graph_nodes, *(long *)exec); return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { free(exec); return cudaSuccess; }

/* ---- allocations ---- */
cudaError_t cudaMalloc(void **p, size_t n) {
  cudaError_t refused = unless_capturing();
  if (refused) return refused;
  char *at = addresses(n);
  *p = NULL;
  if (!take(at, pages(n), 1)) return failed(cudaErrorMemoryAllocation);
  *p = at;
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) { if (p) drop(p, 1); return cudaSuccess; }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *total = card_bytes; *left = card_bytes - null_counters.held; return cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) {
  if (posix_memalign(p, 4096, n ? n : 1)) return failed(cudaErrorMemoryAllocation);
  take(*p, n, 0);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) { drop(p, 0); free(p); return cudaSuccess; }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) { take(p, n, 0); return cudaSuccess; }
cudaError_t cudaHostUnregister(void *p) { drop(p, 0); return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  int device = on_device(p), host = !device && pinned(p);
  *a = (struct cudaPointerAttributes){
      .type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered,
      .devicePointer = device || host ? (void *)p : NULL, .hostPointer = host ? (void *)p : NULL};
  return cudaSuccess;
}
/* Expandable segments of torch's allocator: addresses first, physical memory later. */
CUresult cuMemGetAllocationGranularity(size_t *n, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option) { *n = PAGE; return CUDA_SUCCESS; }
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t alignment, CUdeviceptr at, unsigned long long flags) { *p = (CUdeviceptr)addresses(n); return CUDA_SUCCESS; }
CUresult cuMemAddressFree(CUdeviceptr p, size_t n) { return CUDA_SUCCESS; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *prop, unsigned long long flags) {
  void *at = addresses(n);
  *h = (CUmemGenericAllocationHandle)at;
  return take(at, n, 1) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) { drop((void *)h, 1); return CUDA_SUCCESS; }
CUresult cuMemMap(CUdeviceptr p, size_t n, size_t offset, CUmemGenericAllocationHandle h, unsigned long long flags) { return CUDA_SUCCESS; }
CUresult cuMemUnmap(CUdeviceptr p, size_t n) { return CUDA_SUCCESS; }
CUresult cuMemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *desc, size_t count) { return CUDA_SUCCESS; }

/* ---- copies ---- */
static void copied(void *to, const void *from, size_t n) {
  if (on_device(to) && on_device(from)) { ADD(launches, 1); return; }
  ADD(copies, 1);
  const void *host = on_device(to) ? from : to;
  if (!pinned(host)) { ADD(pageable, 1); if (null_on_wait) null_on_wait("pageable copy"); }
  if (!on_device(to)) memset(to, 0, n);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) { copied(to, from, n); return cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { copied(to, from, n); return wait("cudaMemcpy"); }
cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind kind, cudaStream_t s) {
  copied(to, from, on_device(to) ? 0 : tp * h);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int td, const void *from, int fd, size_t n, cudaStream_t s) { copied(to, from, n); return cudaSuccess; }
cudaError_t cudaMemset(void *p, int value, size_t n) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) { ADD(launches, 1); return cudaSuccess; }

/* ---- kernels ---- */
#define KERNELS (1 << 20)
static struct kernel { const void *function; const char *name; long count; } kernels[KERNELS]; /* hashed by function */
static struct kernel *kernel_of(const void *function) {
  size_t at = ((size_t)function * 0x9e3779b97f4a7c15ull) >> 44;
  while (kernels[at].function && kernels[at].function != function) at = (at + 1) % KERNELS;
  return &kernels[at];
}
/* The kernels that were launched: the first at or after `*at`, which is set to the next. False: no more. */
int null_kernel(long *at, const char **name, long *count) {
  for (; *at < KERNELS; ++*at)
    if (kernels[*at].count) { *name = kernels[*at].name; *count = kernels[(*at)++].count; return 1; }
  return 0;
}
static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared) {
  size_t threads = (size_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024 ||
      block.z > 64 || shared > (size_t)card->optin)
    return failed(cudaErrorInvalidConfiguration);
  struct kernel *kernel = kernel_of(function);
  __atomic_add_fetch(&kernel->count, 1, __ATOMIC_RELAXED);
  if (capture.active) __atomic_add_fetch(&capture.nodes, 1, __ATOMIC_RELAXED);
  else ADD(launches, 1);
  return cudaSuccess;
}
/* nvcc writes calls of these into every library with kernels: registration, and the configuration of `f<<<...>>>(...)`. */
void **__cudaRegisterFatBinary(void *binary) { return (void **)handle(); }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
char __cudaInitModule(void **h) { return 1; }
void __cudaRegisterVar(void **h, char *host, char *device, const char *name, int ext, size_t n, int constant, int global) {}
void __cudaRegisterFunction(void **h, const char *function, char *device, const char *name, int limit, uint3 *tid, uint3 *bid,
                            dim3 *block, dim3 *grid, int *warp) {
  struct kernel *kernel = kernel_of(function);
  kernel->function = function;
  kernel->name = name;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  configuration.grid = grid; configuration.block = block; configuration.shared = shared; configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid; *block = configuration.block; *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return launch(f, grid, block, shared); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **arguments) { return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64, .binaryVersion = 10 * card->major, .ptxVersion = 10 * card->major};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute which, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared, unsigned flags) { *n = 2; return cudaSuccess; }

/* ---- the driver's own interface: Triton's and inductor's kernels ---- */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { *n = device_count; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int n) { *d = n; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute which, CUdevice d) { *v = attribute(which); return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)&card; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&card; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit which) { *v = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit which, size_t v) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "an error of the null device"; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !on_device((void *)p)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = p;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule *m, const char *file) { *m = handle(); return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = handle(); return CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) { *m = handle(); return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = handle();
  pthread_mutex_lock(&lock);
  __cudaRegisterFunction(NULL, (char *)*f, NULL, strdup(name), 0, NULL, NULL, NULL, NULL, NULL);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute which, CUfunction f) {
  *v = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int threads, size_t shared) { *n = 2; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at, const cuuint64_t *dim, const cuuint64_t *strides,
    const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion p, CUtensorMapFloatOOBfill o) {
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream s, void **arguments, void **extra) {
  return launch(f, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, arguments, extra);
}
void null_missing(const char *name) { fprintf(stderr, "null device: driver.c lacks %s\n", name); abort(); }
/* A driver function by name. torch looks up more than it calls. */
static CUresult absent(void) { fputs("null device: a function of the driver that driver.c lacks was called\n", stderr); abort(); }
cudaError_t cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void *)absent;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  return cudaGetDriverEntryPoint(name, f, flags, found);
}

/* ---- cuBLAS: what returns more than its status; stubs.py writes the rest ---- */
void null_product(void) { ADD(products, 1); if (capture.active) capture.nodes++; else ADD(launches, 1); }
cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { *h = handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *m) { *m = CUBLAS_POINTER_MODE_HOST; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *m) { *m = CUBLAS_DEFAULT_MATH; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t c, cudaDataType_t t) { *d = handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { *p = handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t rows, uint64_t columns, int64_t ld) { *l = handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t o, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t p, int asked, cublasLtMatmulHeuristicResult_t results[], int *found) {
  memset(results, 0, sizeof *results); /* status 0: success */
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

__attribute__((constructor)) static void start(void) {
  const char *name = getenv("NULL_DEVICE_CARD"), *count = getenv("NULL_DEVICE_COUNT"), *bytes = getenv("NULL_DEVICE_BYTES");
  if (name && !strcmp(name, "h100")) card = &cards[1];
  if (count) device_count = atoi(count);
  card_bytes = bytes ? strtoull(bytes, NULL, 10) : card->bytes;
  arena = next_address = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) { perror("null device: no addresses"); abort(); }
  next_address = (char *)(((size_t)arena + PAGE - 1) & ~(PAGE - 1));
}
