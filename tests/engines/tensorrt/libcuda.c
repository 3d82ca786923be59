/* A driver whose one GPU is this process' own memory: it lets the ctypes code of cuda.py run without a GPU.
   Signatures and constants are those of CUDA's driver API; work happens at once, so streams do nothing. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int allocations;
static int contexts; /* current ones of the thread */
static long captures; /* -1 while a stream is captured */

static const char *gpus(void) { const char *count = getenv("STAND_IN_GPUS"); return count ? count : "1"; }

int cuInit(unsigned flags) { (void)flags; return atoi(gpus()) ? 0 : 100; } /* CUDA_ERROR_NO_DEVICE */
int cuDeviceGetCount(int *count) { *count = atoi(gpus()); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { (void)device; strncpy(name, "Stand-in GPU", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)5 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return 0;
}
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuGetErrorName(int code, const char **text) { *text = code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR"; return 0; }
int cuGetErrorString(int code, const char **text) { *text = code == 100 ? "no CUDA-capable device" : "an error"; return 0; }

int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &contexts; return 0; }
int cuCtxPushCurrent_v2(void *context) { contexts++; return context == &contexts ? 0 : 201; }
int cuCtxPopCurrent_v2(void **context) { contexts--; *context = &contexts; return 0; }

int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  if (bytes == 0) return 1;
  *address = (unsigned long long)malloc(bytes);
  allocations++;
  return 0;
}
int cuMemFree_v2(unsigned long long address) { free((void *)address); allocations--; return 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
  if (!stream) return 400;
  memcpy((void *)to, from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
  if (!stream) return 400;
  memcpy(to, (void *)from, bytes);
  return 0;
}

int cuStreamCreate(void **stream, unsigned flags) { if (flags != 1) return 1; *stream = malloc(1); return 0; }
int cuStreamDestroy_v2(void *stream) { free(stream); return 0; }
int cuStreamSynchronize(void *stream) { return stream ? 0 : 400; }

int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof(struct timespec)); return 0; }
int cuEventDestroy_v2(void *event) { free(event); return 0; }
int cuEventRecord(void *event, void *stream) { (void)stream; return clock_gettime(CLOCK_MONOTONIC, event); }
int cuEventElapsedTime(float *ms, const struct timespec *a, const struct timespec *b) {
  *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
  return 0;
}

int cuStreamBeginCapture_v2(void *stream, int mode) { (void)stream; captures = -1; return mode == 1 ? 0 : 1; }
int cuStreamEndCapture(void *stream, void **graph) { (void)stream; captures = 0; *graph = malloc(1); return 0; }
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  *executable = malloc(1);
  return graph && flags == 0 ? 0 : 1;
}
int cuGraphLaunch(void *executable, void *stream) { if (!executable || !stream) return 400; captures++; return 0; }
int cuGraphExecDestroy(void *executable) { free(executable); return 0; }
int cuGraphDestroy(void *graph) { free(graph); return 0; }

/* What tests ask: nothing of CUDA's own. */
int stand_in_allocations(void) { return allocations; }
int stand_in_contexts(void) { return contexts; }
long stand_in_graph_launches(void) { return captures; }
