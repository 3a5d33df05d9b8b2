// What the layer's rungs share: the workspace, the parts of the routed branch, and the two branches' order.
#ifndef FMOE_LAYER_CUH
#define FMOE_LAYER_CUH

#include "../ptx.cuh"
#include "layer.h"

#define FEW_TOKENS  16 // up to so many, a cluster of blocks a token or two,
#define TILE_TOKENS 64 // and up to so many, a router of the layer's own

// Where the layer's intermediate results and the steps' own workspaces lie. What the caller did not ask for is here
// too.
typedef struct {
    float *logits;    // [2, T, n]
    int32_t *indices; // [T, K]
    float *weights;   // [T, K]
    float *routed;    // [T, d] the experts' sum,
    float *shared;    // [T, d] and the MLP's: float32, because y is rounded once, when both are added
    void *router, *topk, *experts, *mlp;
    size_t router_bytes, topk_bytes, experts_bytes, mlp_bytes;
} layer_scratch;

layer_scratch layer_carve(const fmoe_layer_args *args, void *workspace, size_t *used);

// Everything the host can see; every rung starts so.
fmoe_status layer_check(const fmoe_layer_args *args, const void *workspace, size_t bytes, size_t needed);

// ---- Parts ----

// The expert step of chapter 5 with the sum left in float32. routed.cu
typedef struct {
    bool wide;           // in wider slices of the tables' columns, which are better for a part of the multiprocessors
    int multiprocessors; // that the first phase keeps to; 0: all
    int first, end;      // of the second phase's items, which may come in two parts; the first brings the first phase
    const float *shared; // the MLP's sum, to which the experts' is then added for y; or NULL
} routed_share;

// A token's columns of one slice are an item, all tokens of a slice come before the next slice: how many, and their
// columns.
int routed_items(const fmoe_layer_args *args, bool wide, int *columns);
fmoe_status routed_experts(const fmoe_layer_args *args, const layer_scratch &s, const routed_share &share,
                           cudaStream_t stream);
size_t routed_experts_bytes(const fmoe_layer_args *args);
bool routed_on_tensor_cores(const fmoe_layer_args *args); // the first phase of the wide slices

// The router for up to TILE_TOKENS tokens in evaluation, whose rows are multiples of 16 bytes. logits.cu
bool few_logits_fit(const fmoe_layer_args *args);
fmoe_status few_logits(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream);

// The whole branch in one kernel, for up to FEW_TOKENS tokens in evaluation (sm_90 on). few.cu
bool few_fit(const fmoe_layer_args *args);
fmoe_status few_routed(const fmoe_layer_args *args, const layer_scratch &s, cudaStream_t stream);
// The whole layer in two, where the MLP takes the rung rows and few_fit.
fmoe_status few_layer(const fmoe_layer_args *args, const fmoe_mlp_args *mlp, const layer_scratch &s,
                      cudaStream_t stream);

// ---- Beside the MLP ----

// The MLP's kernels want most of a multiprocessor's memory as shared memory. How it is divided cannot change while a
// block is there, so what is to find room beside them wants it divided so too. It pays for some tens of tokens; with
// fewer the caches miss the memory more.
static inline bool wants_room(int64_t T) {
    return T > TILE_TOKENS / 2 && T <= TILE_TOKENS;
}

// overlap: as in launch_overlapping.
template <typename... Parameters, typename... Arguments>
static inline fmoe_status launch_beside(const char *name, bool beside, bool overlap, void (*kernel)(Parameters...),
                                        unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
                                        Arguments... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    int count = 0;
    if (beside) {
        attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
        attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
    }
    if (overlap) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes, config.numAttrs = (unsigned)count;
    cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    return launched(name);
}

#endif
