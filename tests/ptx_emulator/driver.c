/* What Triton's driver and launchers call of libcuda, for a GPU that isn't there.
 *
 * A device of compute capability 9.0, and a module that is the text of its PTX. Launches and tensor maps are handed to the two
 * functions of the emulator; what these say about a failure is what cuGetErrorString says. */

#include <string.h>

#include "cuda.h"

typedef CUresult (*Launch)(const char *ptx, const unsigned *grid, unsigned threads, unsigned shared, void **parameters);
typedef CUresult (*Encode)(CUtensorMap *map, int type, unsigned rank, void *address, const cuuint64_t *sizes,
                           const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, int interleave,
                           int swizzle, int fill);

static Launch launch_;
static Encode encode_;
static char message_[900];

void emulator_install(Launch launch, Encode encode) {
  launch_ = launch;
  encode_ = encode;
}

void emulator_fail(const char *message) { strncpy(message_, message, sizeof message_ - 1); }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = message_;
  return CUDA_SUCCESS;
}

/* No device for anyone but the emulator: PyTorch asks here first. */
CUresult cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) {
  *version = 99000; /* newer than whatever PyTorch was built for */
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; break;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* Modules are never unloaded, so neither is their text. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)strdup(image);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  return launch_((const char *)function, grid, config->blockDimX, config->sharedMemBytes, parameters);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return encode_(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, fill);
}
