// fmoe_cuda_check: what a kernel noted at the beginning of a workspace, as the message that the CPU would give.
#include "device.cuh"

#include <stdlib.h>

static fmoe_status to_host(void *host, const void *device, size_t bytes, cudaStream_t stream) {
    TRY(cuda_call("reading the workspace", cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream)));
    return cuda_call("waiting for the stream", cudaStreamSynchronize(stream));
}

static fmoe_status first_bad_index(const cuda_note *note, const cuda_note_line *lines) {
    for (long long t = 0; t < note->tokens; t++)
        if (lines[t].k >= 0)
            return fmoe_fail(FMOE_BAD_INDEX, "indices[%lld, %d] = %d is outside [0, %s = %lld)", t, lines[t].k,
                             lines[t].value, note->limit_is == LIMIT_PAIRS ? "n²" : "num_experts", note->limit);
    return FMOE_OK;
}

extern "C" fmoe_status fmoe_cuda_check(const void *workspace, void *stream) {
    if (!workspace)
        return fmoe_fail(FMOE_NULL_POINTER, "workspace is NULL");
    cuda_note note;
    TRY(to_host(&note, workspace, sizeof note, (cudaStream_t)stream));
    if (note.mark == 0) // a call without tokens
        return FMOE_OK;
    if (note.mark != CUDA_NOTE_MARK)
        return fmoe_fail(FMOE_BAD_WORKSPACE, "workspace is not one that the last call noted bad indices in");
    size_t bytes = (size_t)note.tokens * sizeof(cuda_note_line);
    cuda_note_line *lines = (cuda_note_line *)fmoe_allocate(note.tokens, sizeof *lines);
    if (!lines)
        return fmoe_no_memory(note.tokens, sizeof *lines);
    fmoe_status status = to_host(lines, (const char *)workspace + CUDA_NOTE_BYTES, bytes, (cudaStream_t)stream);
    if (status == FMOE_OK)
        status = first_bad_index(&note, lines);
    free(lines);
    return status;
}
